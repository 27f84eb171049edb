"""The path of a GPU is the readable path, as far as a CPU can tell: its kernels run there, a thread for each of a GPU's."""

from __future__ import annotations

import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import assert_identical
from gpu_on_cpu import COMPILER, ThreadsOfACPU
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from rim_rnn import RIM, RIMCell, cuda, native, record
from rim_rnn.driver import SOURCES, Compiler, Driver, Layout, Limits, Sizes, lay_out, libraries

needs_a_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which(COMPILER) is None, reason="g++ makes the kernels run on a CPU, on Linux"
)
CLUSTERS, GROUPS = Limits(90, 1 << 17, 64, threads=8), Limits(80, 1 << 17, 64, threads=8)
"""Blocks that read each other's shared memory, and blocks that meet in global memory."""


def install(monkeypatch: pytest.MonkeyPatch, machine: ThreadsOfACPU) -> ThreadsOfACPU:
    monkeypatch.setitem(cuda.machines, "cpu", machine)
    monkeypatch.setattr(cuda, "IS_ON", True)
    return machine


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> ThreadsOfACPU:
    return install(monkeypatch, ThreadsOfACPU(CLUSTERS))


@pytest.fixture(autouse=True)
def nothing_is_read_before_it_is_written() -> Iterator[None]:
    """New tensors are NaN. (torch's own switch imports the compiler first, which takes half a minute.)"""
    torch._C._set_deterministic_algorithms(True)
    yield
    torch._C._set_deterministic_algorithms(False)


def results_and_gradients(scan: Callable[..., Any], cell: RIMCell[Any], x: Tensor, state: Any, *rest: Any) -> dict[str, Tensor]:
    x, *state = (t.detach().clone().requires_grad_() for t in (x, *state))
    cell.zero_grad()
    torch.manual_seed(2)  # of the dropouts
    output, last, traces = scan(cell, x, tuple(state), *rest, True)
    generator = torch.Generator().manual_seed(1)
    results = {"output": output, **{f"last {i}": s for i, s in enumerate(last)}}
    sum((r * torch.randn(r.shape, generator=generator)).sum() for r in results.values()).backward()  # type: ignore[union-attr]
    gradients = {"input": x, **{f"first {i}": s for i, s in enumerate(state)}, **dict(cell.named_parameters())}
    zero = {name: torch.zeros_like(t) for name, t in gradients.items()}
    traced = {f"{name} at {t}": part for t, trace in enumerate(traces) for name, part in trace._asdict().items()}
    for trace in traces:  # of losers nobody says what they would have heard
        trace.communication.mul_(trace.active.t()[:, None, :, None])
    results = {name: result.detach() for name, result in results.items()}
    return results | traced | {f"gradient of {name}": zero[name] if t.grad is None else t.grad for name, t in gradients.items()}


def assert_equal_paths(machine: ThreadsOfACPU, case: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, records and gradients differ by rounding, from the largest element or from 1e-3 where all are smaller."""
    install(monkeypatch, machine)
    options = {"input_size": 5, "hidden_size": 12, "num_units": 3, "k": 2, "key_size_comm": 3, "value_size_comm": 5}
    options |= {"num_comm_heads": 2, **case}
    steps, batch, sizes, reverse = (options.pop(name, default) for name, default in SEQUENCE.items())
    monkeypatch.setattr(cuda, "ROWS_AT_ONCE", options.pop("rows_at_once", 2048))
    torch.manual_seed(options.pop("seed", 0))
    cell = RIMCell(**options)
    x = torch.randn(steps, batch, cell.input_size)
    if sizes:
        batch, x = sizes[0], torch.randn(sum(sizes), cell.input_size)
    state = tuple(torch.randn(batch, size) for size in cell.state_sizes().values())
    assert cuda.supports(cell, x, state) is None
    ours = results_and_gradients(cuda.scan, cell, x, state, sizes, reverse)
    theirs = results_and_gradients(RIMCell.scan, cell, x, state, sizes, reverse)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape, name
        if expected.numel():
            error = (ours[name].float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-3)
            assert error <= 1e-5, f"{name} differs by {error:.1e}"


SEQUENCE: dict[str, Any] = {"steps": 3, "batch": 5, "sizes": None, "reverse": False}
DROPOUTS = {"input_dropout": 0.4, "comm_dropout": 0.4}
CASES: dict[str, dict[str, Any]] = {
    "LSTM": {},
    "GRU": {"rnn_cell": "GRU", "reverse": True},
    "projections": {"proj_size": 6, "sizes": [5, 5, 2], "reverse": True},
    "input heads": {"num_input_heads": 3, "value_size_input": 2, "bias": False},
    "wide input": {"input_size": 40, "value_size_input": 3, "key_size_input": 7},
    "no communication": {"num_comm_heads": 0, "rnn_cell": "GRU", "rows_at_once": 5},
    "no communication, LSTM": {"num_comm_heads": 0, "sizes": [3, 2, 2, 1]},
    "as printed": {"comm_bounded": False, "rnn_cell": "GRU", "bias": False},
    "packed": {"sizes": [9, 9, 5, 3, 1, 1], **DROPOUTS},
    "packed, from the end": {"sizes": [9, 9, 5, 3, 1, 1], "reverse": True, **DROPOUTS, "rnn_cell": "GRU"},
    "chunks": {"steps": 5, "rows_at_once": 10},
    "chunks, from the end": {"steps": 5, "rows_at_once": 10, "reverse": True, "proj_size": 3},
    "packed chunks": {"sizes": [6, 6, 5, 3, 1, 1], "rows_at_once": 9, "reverse": True},
    "one row, one step": {"steps": 1, "batch": 1, "num_units": 4, "k": 1},
    "one unit": {"num_units": 1, "k": 1, "hidden_size": 7, "num_comm_heads": 1, "key_size_comm": 1, "value_size_comm": 1},
    "many units": {"num_units": 9, "k": 9, "hidden_size": 9},
    "default sizes": {
        "num_comm_heads": 4,
        "key_size_comm": 32,
        "value_size_comm": 32,
        "hidden_size": 30,
        "num_units": 6,
        "k": 4,
    },
}


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_readable_path(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, states, records and every gradient."""
    assert_equal_paths(ThreadsOfACPU(CLUSTERS), case, monkeypatch)


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("RIM_RNN_GPU_CASES", "3"))))
def test_equals_the_readable_path_at_sizes_that_are_drawn(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    n, u = draw.randint(1, 6), draw.choice([1, 2, 3, 7, 8, 17])
    rnn_cell, steps, batch = draw.choice(["LSTM", "GRU"]), draw.randint(1, 6), draw.randint(1, 9)
    case = {
        "input_size": draw.choice([1, 2, 3, 9, 40]),
        "hidden_size": n * u,
        "bias": draw.random() < 0.7,
        "proj_size": n * draw.randrange(u) if rnn_cell == "LSTM" and draw.random() < 0.5 else 0,
        "num_units": n,
        "k": draw.randint(1, n),
        "rnn_cell": rnn_cell,
        "key_size_input": draw.choice([1, 3, 16]),
        "value_size_input": draw.choice([1, 5, 32]),
        "num_input_heads": draw.randint(1, 3),
        "key_size_comm": draw.choice([1, 5, 8, 32]),
        "value_size_comm": draw.choice([1, 3, 16, 32]),
        "num_comm_heads": draw.randint(0, 4),
        "comm_bounded": draw.random() < 0.7,
        "input_dropout": draw.choice([0.0, 0.0, 0.3, 1.0]),
        "comm_dropout": draw.choice([0.0, 0.0, 0.3, 1.0]),
        "steps": steps,
        "batch": batch,
        "sizes": sorted((draw.randint(1, batch) for _ in range(steps)), reverse=True) if draw.random() < 0.5 else None,
        "reverse": draw.random() < 0.5,
        "rows_at_once": draw.choice([1, 8, 2048]),
        "seed": seed,
    }
    limits = draw.choice([CLUSTERS, GROUPS])._replace(shared=draw.choice([1 << 17, 16000]))
    try:
        assert_equal_paths(ThreadsOfACPU(limits, at_once=draw.choice([6, 64])), case, monkeypatch)
    except Exception as error:
        raise AssertionError(f"{case}") from error


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("machine", "case"),
    [
        (ThreadsOfACPU(GROUPS), {}),
        (ThreadsOfACPU(GROUPS, at_once=3), {"batch": 9, "rnn_cell": "GRU"}),  # tiles in turns
        (ThreadsOfACPU(GROUPS._replace(shared=6000)), {}),  # no weight in shared memory
        (ThreadsOfACPU(CLUSTERS._replace(shared=8000), at_once=3), {"proj_size": 6}),  # some
        (ThreadsOfACPU(CLUSTERS._replace(multiprocessors=3, threads=32)), {"batch": 17}),  # tiles of 16 rows
    ],
    ids=["groups", "groups in turns", "no weight kept", "some weights kept", "tiles of 16 rows"],
)
def test_equals_the_readable_path_however_it_is_laid_out(
    machine: ThreadsOfACPU, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_equal_paths(machine, case, monkeypatch)
    assert {layout.cluster for _, layout, _ in machine.launches} == {machine.limits(torch.device("cpu")).clusters}


def winners(rnn: RIM[Any], h_0: Tensor) -> Tensor:
    with torch.no_grad(), record(rnn) as records:
        rnn(torch.ones(1, h_0.size(0), 1), h_0.unsqueeze(0))
    return records[0].active[0, 0]


def hostile_bids() -> tuple[RIM[Any], Tensor]:
    """A layer whose units are alike, without biases, so that a bid is a number times the state; and states."""
    rnn = RIM(1, 6, bias=False, num_units=6, k=3, rnn_cell="GRU", num_comm_heads=0)
    for parameter in rnn.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    nan, inf = torch.nan, torch.inf
    return rnn, torch.tensor(
        [
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            [0.0, -0.0, 0.0, -0.0, 0.0, 1.0],
            [nan, 1.0, nan, -1.0, -inf, nan],
            [nan, nan, nan, nan, nan, nan],
            [inf, nan, inf, 1.0, inf, inf],
            [-1.0, -1.0, 2.0, -1.0, nan, -1.0],
            [-inf, -inf, nan, -inf, nan, -inf],
        ]
    )


@needs_a_compiler
def test_ties_go_to_the_lowest_unit_and_nan_to_the_last(machine: ThreadsOfACPU) -> None:
    rnn, h_0 = hostile_bids()
    ours = winners(rnn, h_0)
    assert machine.launches
    with native.readable():
        assert torch.equal(ours, winners(rnn, h_0))


@needs_a_compiler
def test_a_layer_takes_it_and_says_so(machine: ThreadsOfACPU) -> None:
    """Stacks in both directions; results and records have the readable path's, and the same bits twice."""
    torch.manual_seed(0)
    rnn, x = RIM(5, 12, num_units=3, num_layers=2, bidirectional=True), torch.randn(4, 5, 5)
    assert rnn.path(x) == "cuda"
    sequence = pack_padded_sequence(x, torch.tensor([4, 1, 3, 4, 2]), enforce_sorted=False)
    for given in (x, sequence):
        with record(rnn) as ours:
            output, last = rnn(given)
        with record(rnn) as again:
            assert_identical(rnn(given), (output, last))
        with native.readable(), record(rnn) as theirs:
            expected, expected_last = rnn(given)
        assert_identical(list(ours[0]), list(again[0]))
        torch.testing.assert_close((output[:1], *last), (expected[:1], *expected_last), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(tuple(ours[0]), tuple(theirs[0]), rtol=1e-5, atol=1e-6)
        with torch.no_grad():  # without what backward needs
            assert_identical(rnn(given), (output, last))
    assert {name for name, *_ in machine.launches} == {"forward"}


@needs_a_compiler
def test_gradients_that_have_gradients_and_many_of_them(machine: ThreadsOfACPU) -> None:
    torch.manual_seed(0)
    rnn, x = RIM(5, 12, num_units=3), torch.randn(3, 2, 5, requires_grad=True)
    output, leaves = rnn(x)[0].square().sum(-1), [x, *rnn.parameters()]
    once, again = (torch.autograd.grad(output.sum(), leaves, retain_graph=True, create_graph=c) for c in (False, True))
    torch.testing.assert_close(once, again, rtol=1e-4, atol=1e-5)
    ones = torch.eye(6).view(6, 3, 2)
    many = torch.autograd.grad(output, leaves, ones, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(tuple(g.sum(0) for g in many), once, rtol=1e-4, atol=1e-5)
    gradient = torch.autograd.grad(output.sum(), leaves[1], retain_graph=True)[0]  # the input's is not wanted
    assert torch.equal(gradient, once[1])


@needs_a_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_numbers_are_computed_in_float32(machine: ThreadsOfACPU, dtype: torch.dtype) -> None:
    """Bit for bit what float32 makes of the same numbers, rounded at the end; under autocast too."""
    rnn, wide = (RIM(5, 12, num_units=3, dtype=d) for d in (dtype, torch.float32))
    wide.load_state_dict(rnn.state_dict())
    x = torch.randn(3, 2, 5, dtype=dtype)
    expected, _ = wide(x.float())
    expected.sum().backward()
    assert rnn.path(x) == "cuda"
    output, _ = rnn(x)
    output.float().sum().backward()
    assert torch.equal(output, expected.to(dtype))
    for ours, theirs in zip(rnn.parameters(), wide.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad.to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        assert wide.path(x) == "cuda"
        output, _ = wide(x.float())
    assert torch.equal(output, expected.to(output.dtype))


@needs_a_compiler
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": torch.float64}, "torch.float64"),
        ({"hidden_size": 3000, "num_units": 1, "k": 1}, "shared memory"),
        ({"hidden_size": 130, "num_units": 65}, "65 units are more"),
    ],
)
def test_what_it_declines_is_said_and_takes_the_readable_path(
    options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = install(monkeypatch, ThreadsOfACPU(GROUPS._replace(shared=1 << 16)))
    rnn = RIM(5, **{"hidden_size": 12, "num_units": 3, **options})
    x = torch.randn(1, 1, 5, dtype=options.get("dtype"))
    assert words in rnn.path(x)
    assert rnn.path(x).startswith("readable: ")
    with torch.no_grad():
        rnn(x)
    assert not machine.launches


def test_it_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rnn, x = RIM(5, 12, num_units=3), torch.randn(1, 1, 5)
    assert rnn.path(x) in ("native", f"readable: {native._unavailable}")
    monkeypatch.setitem(cuda.machines, "cpu", ThreadsOfACPU())
    assert cuda.IS_ON is (os.environ.get("RIM_RNN_CUDA") == "1")
    monkeypatch.setattr(cuda, "IS_ON", False)
    assert "checked on a CPU only, and RIM_RNN_CUDA=1 turns them on" in rnn.path(x)
    monkeypatch.setenv("RIM_RNN_CUDA", "2")
    with pytest.raises(ImportError, match="RIM_RNN_CUDA should be 0, 1 or empty, got '2'"):
        cuda._is_on()


@needs_a_compiler
@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, torch.zeros(3, 2, 4), r"input should have shape \(3, 2, 5\), got \(3, 2, 4\)"),
        (1, torch.zeros(2, 15), r"h_0 should have shape \(2, 12\), got \(2, 15\)"),
        (2, torch.zeros(2, 12, dtype=torch.float64), "c_0 should be torch.float32 on cpu, got torch.float64"),
        (6, None, "input_attention.key.bias should be a tensor, got None"),
        (10, torch.zeros(3, 4, 15), r"dynamics.weight_hh should have shape \(3, 4, 16\)"),
        (13, torch.zeros(3, 4, 2), r"dynamics.weight_hr should have shape \(3, 4, 4\)"),
        (14, None, "communication.query.weight should have 3 dimensions"),
        (18, torch.zeros(6, 3, 2), r"keep_input should have shape \(6, 3, 1\)"),
        (20, [2, 3, 1], "batch_sizes should begin at 2, never grow, and sum to 6"),
        (21, 4, "k should be from 1 to 3, got 4"),
        (22, 3, "input_attention.key.weight should have 2 dimensions, of which number 0 is a multiple of 3"),
    ],
)
def test_sizes_are_checked_before_a_kernel_runs(machine: ThreadsOfACPU, place: int, wrong: Any, message: str) -> None:
    cell = RIMCell(5, 12, num_units=3, k=2)
    state = torch.zeros(2, 12), torch.zeros(2, 12)
    parameters = cuda.OPERATOR.parameters(cell, torch.zeros(3, 2, 5), state)
    arguments: list[Any] = [torch.zeros(3, 2, 5), *state, *parameters, None, None, [], 2, 1, 4, True, False]
    arguments[place] = wrong
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"^rim_rnn: {message}"):
        torch.ops.rim_rnn.cuda_infer.default(*arguments)
    assert not machine.launches


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("sanitizer", "limits", "case"),
    [
        ("thread", CLUSTERS, {"proj_size": 6, "steps": 2, "batch": 3}),
        ("thread", GROUPS, {"rnn_cell": "GRU", "sizes": [5, 2], "batch": 3}),
        ("address", CLUSTERS._replace(shared=9000), {"sizes": [5, 2], "reverse": True, **DROPOUTS}),
    ],
)
def test_no_barrier_is_missing_and_nothing_lies_outside(
    sanitizer: str, limits: Limits, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_equal_paths(ThreadsOfACPU(limits, sanitizer=sanitizer), case, monkeypatch)


def mutant(file: str, old: str, new: str) -> dict[str, str]:
    text = SOURCES[file].read_text()
    assert text.count(old) == 1, f"{old!r} is not in {file} exactly once"
    return {file: text.replace(old, new)}


@needs_a_compiler
def test_a_wrong_tie_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for old, new in (("alike && m < j", "alike && m > j"), ("(mine != mine && other == other) ||", "")):
        install(monkeypatch, ThreadsOfACPU(CLUSTERS, sources=mutant("forward.cu", old, new)))
        rnn, h_0 = hostile_bids()
        ours = winners(rnn, h_0)
        with native.readable():
            assert not torch.equal(ours, winners(rnn, h_0)), old


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "old", "new", "case"),
    [
        (
            "forward.cu",
            "{ a.h[(row * n + j) * p + d] = s.h[d * R + r]; }",
            "{ (void)d; }",
            "chunks",
        ),  # the next chunk begins where this one did
        ("backward.cu", "dgate[2] = dinner * reset;", "dgate[2] = dinner;", "GRU"),
        ("common.cuh", "return reverse ? steps - 1 - step : step;", "return step;", "GRU"),
    ],
)
def test_a_wrong_number_is_noticed(file: str, old: str, new: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match=r"e-\d\d|e\+\d\d|nan"):
        assert_equal_paths(ThreadsOfACPU(CLUSTERS, sources=mutant(file, old, new)), CASES[case], monkeypatch)


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "old", "case"),
    [
        ("forward.cu", "__syncthreads();  // this is for it", {"num_comm_heads": 0}),
        ("forward.cu", "circle.arrive();\n        circle.wait();\n        exchange();", {}),
        ("backward.cu", "    __syncthreads();\n    s.weight_talk.multiply", {}),
    ],
)
def test_a_missing_barrier_is_noticed(file: str, old: str, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    new = re.sub(r"__syncthreads\(\);|circle.arrive\(\);|circle.wait\(\);", "", old)
    machine = ThreadsOfACPU(CLUSTERS, sources=mutant(file, old, new), sanitizer="thread")
    with pytest.raises(RuntimeError, match="data race"):
        assert_equal_paths(machine, {"steps": 2, "batch": 3, **case}, monkeypatch)


# What compiles them for a GPU.

DEVICES = {
    80: Limits(80, 166912, 108),
    86: Limits(86, 101376, 84),
    89: Limits(89, 101376, 128),
    90: Limits(90, 232448, 132),
    100: Limits(100, 232448, 148),
    120: Limits(120, 101376, 170),
}
PAPER = Sizes(6, 4, 100, 100, 1, 4, 32, 32, lstm=True, projected=False, bounded=True)


@pytest.mark.slow
@pytest.mark.skipif(not libraries(), reason="NVRTC comes with the extra nvrtc, and is not here")
@pytest.mark.parametrize("architecture", DEVICES)
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_compiles_for_every_architecture(architecture: int, name: str) -> None:
    """At the paper's sizes, within the registers of a thread and nearly without spills."""
    layout = lay_out(PAPER, 64, DEVICES[architecture])
    assert isinstance(layout, Layout)
    assert layout.cluster is (architecture >= 90)
    cubin, log = Compiler().compile(name, layout, architecture, "--ptxas-options=-v")
    assert cubin.startswith(b"\x7fELF")
    assert "warning" not in log
    assert max(map(int, re.findall(r"Used (\d+) registers", log))) * layout.threads <= 65536
    assert max(map(int, re.findall(r"(\d+) bytes spill", log))) <= 128
    assert layout.bytes(name == "backward") <= DEVICES[architecture].shared


class CompilesNothing(Compiler):
    def __init__(self) -> None:
        self.version, self.compiled = "13.0", 0

    def compile(self, name: str, layout: Layout, architecture: int, *options: str) -> tuple[bytes, str]:
        self.compiled += 1
        return f"{name} for {architecture}".encode(), ""


def test_compiled_kernels_are_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, sizes, architecture and version; a damaged one is compiled anew; where nobody can write, each is."""
    monkeypatch.setenv("PYTORCH_KERNEL_CACHE_PATH", str(tmp_path / "kernels"))
    layout = lay_out(PAPER, 64, DEVICES[90])
    assert isinstance(layout, Layout)
    compiler = CompilesNothing()
    for _ in range(2):
        assert compiler.cubin("forward", layout, 90) == b"forward for 90"
    assert compiler.compiled == 1
    compiler.cubin("backward", layout, 90), compiler.cubin("forward", layout, 100)
    compiler.version = "13.1"
    compiler.cubin("forward", layout, 90)
    assert compiler.compiled == 4
    kept = sorted((tmp_path / "kernels").iterdir())
    assert [path.suffix for path in kept] == [".cubin"] * 4
    for path in kept:
        path.write_bytes(path.read_bytes()[:-1])
    assert compiler.cubin("forward", layout, 90) == b"forward for 90"
    assert compiler.compiled == 5
    assert compiler.cubin("forward", layout, 90) == b"forward for 90"
    assert compiler.compiled == 5
    monkeypatch.setenv("PYTORCH_KERNEL_CACHE_PATH", "/dev/null/kernels")
    assert compiler.cubin("forward", layout, 90) == b"forward for 90"
    monkeypatch.setenv("USE_PYTORCH_KERNEL_CACHE", "0")
    assert compiler.cubin("forward", layout, 90) == b"forward for 90"
    assert compiler.compiled == 7


class Refuses:
    """A library whose every function fails."""

    def __init__(self, error: int) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Callable[..., int]:
        return lambda *arguments: 0 if name == "cuGetErrorString" else self.error


@pytest.mark.parametrize(("error", "kind"), [(2, torch.OutOfMemoryError), (719, torch.AcceleratorError)])
def test_an_error_of_the_driver_is_torchs_and_names_the_call(error: int, kind: type[Exception]) -> None:
    driver = Driver()
    assert not {"compiler", "library"} & driver.__dict__.keys()  # nothing is loaded yet
    driver.__dict__["library"] = Refuses(error)
    with pytest.raises(kind, match=f"rim_rnn: cuLaunchKernelEx failed with CUDA error {error}"):
        driver._call("cuLaunchKernelEx", None)
