"""The native operator is the readable path, faster: the same outputs, states and gradients, the same winners."""

from __future__ import annotations

import multiprocessing
import os
import platform
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from drawn import assert_identical, normal, or_not_on_this_processor, strong
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_padded_sequence

from rim_rnn import RIM, RIMCell, native, record
from rim_rnn.operator import PARAMETERS, sizes_of
from rim_rnn.readable import UNROLLED
from rim_rnn.recording import Record

pytestmark = pytest.mark.skipif(native._unavailable is not None, reason=str(native._unavailable))


DROPOUTS = {"input_dropout": 0.4, "comm_dropout": 0.4}


def make(**options: Any) -> RIMCell[Any]:
    options = {"input_size": 5, "hidden_size": 24, "num_units": 4, "k": 3, "dtype": torch.float64} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return RIMCell(**options)


@contextmanager
def number_of_threads(threads: int) -> Iterator[None]:
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def states(cell: RIMCell[Any], batch: int) -> tuple[Tensor, ...]:
    dtype = cell.dynamics.weight_hh.dtype
    return tuple(torch.randn(batch, size, dtype=dtype) for size in cell.state_sizes().values())


def results_and_gradients(scan: Callable[..., Any], cell: RIMCell[Any], x: Tensor, state: Any, *rest: Any) -> dict[str, Tensor]:
    x, *state = (t.detach().clone().requires_grad_() for t in (x, *state))
    cell.zero_grad()
    torch.manual_seed(2)  # of the dropouts
    output, last = scan(cell, x, tuple(state), *rest)[:2]
    generator = torch.Generator().manual_seed(1)
    results = {"output": output, **{f"last {i}": s for i, s in enumerate(last)}}
    loss = sum((r * torch.randn(r.shape, generator=generator, dtype=r.dtype)).sum() for r in results.values())
    assert isinstance(loss, Tensor)
    loss.backward()
    gradients = {"input": x, **{f"first {i}": s for i, s in enumerate(state)}, **dict(cell.named_parameters())}
    zero = {name: torch.zeros_like(t) for name, t in gradients.items()}
    return results | {f"gradient of {name}": zero[name] if t.grad is None else t.grad for name, t in gradients.items()}


def assert_equal_paths(cell: RIMCell[Any], x: Tensor, state: Any, *rest: Any, tolerance: float = 1e-12) -> None:
    """Each result differs by at most `tolerance` of its largest element, or of 1e-3 where all of them are smaller."""
    assert native.supports(cell, x, state) is None
    ours = results_and_gradients(native.scan, cell, x, state, *rest)
    theirs = results_and_gradients(RIMCell.scan, cell, x, state, *rest)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape, name
        error = (ours[name] - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
        assert error <= tolerance, f"{name} differs by {error:.1e}"


@st.composite
def cells(draw: st.DrawFn) -> dict[str, Any]:
    """Every option of a cell, sizes that fill vectors and sizes that don't."""
    n, u = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 3, 7, 8, 17, 32]))
    rnn_cell = draw(st.sampled_from(["LSTM", "GRU"]))
    proj = draw(st.sampled_from([0, 0, 1, 3, 8])) if rnn_cell == "LSTM" else 0
    return {
        "input_size": draw(st.sampled_from([1, 2, 3, 9, 40])),
        "hidden_size": n * u,
        "bias": draw(st.booleans()),
        "proj_size": n * proj if proj < u else 0,
        "num_units": n,
        "k": draw(st.integers(1, n)),
        "rnn_cell": rnn_cell,
        "key_size_input": draw(st.sampled_from([1, 3, 16])),
        "value_size_input": draw(st.sampled_from([1, 5, 32])),
        "num_input_heads": draw(st.integers(1, 3)),
        "key_size_comm": draw(st.sampled_from([1, 4, 5, 8, 12, 20, 32])),
        "value_size_comm": draw(st.sampled_from([1, 3, 4, 12, 16, 28, 32])),
        "num_comm_heads": draw(st.integers(0, 4)),
        "comm_bounded": draw(st.booleans()),
        "input_dropout": draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])),
        "comm_dropout": draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])),
    }


FEW = st.tuples(st.integers(1, 6), st.integers(1, 9))  # steps and batch: weights are used as they lie
MANY = st.tuples(st.integers(12, 14), st.integers(46, 50))  # weights are packed first, also where half the rows are padding


@given(cells(), FEW | MANY, st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_equals_the_readable_path(
    options: dict[str, Any], sizes_of_time: tuple[int, int], packed: bool, reverse: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    steps, batch = sizes_of_time
    cell = make(**options)
    x = torch.randn(steps, batch, cell.input_size, dtype=torch.float64)
    sizes = None
    if packed:
        lengths = torch.randint(1, steps + 1, (batch,)).sort(descending=True).values
        data = pack_padded_sequence(x, lengths)
        x, sizes = data.data, data.batch_sizes.tolist()
    assert_equal_paths(cell, x, states(cell, batch), sizes, reverse)


@pytest.mark.parametrize("rnn_cell", ["LSTM", "GRU"])
@pytest.mark.parametrize(("input_size", "steps"), [(1, 40), (64, 9), (64, 1)])
def test_float32_within_rounding(rnn_cell: str, input_size: int, steps: int) -> None:
    """At the default sizes of a common cell, with the long panels of weight gradients in use (40 steps of 16 rows)."""
    cell = make(input_size=input_size, hidden_size=96, num_units=6, k=4, rnn_cell=rnn_cell, dtype=torch.float32)
    assert_equal_paths(cell, torch.randn(steps, 16, input_size), states(cell, 16), tolerance=2e-5)


def forward_and_backward(rnn: RIM[Any], x: Tensor) -> tuple[list[Tensor], Record]:
    """Outputs, last states and gradients; and the record."""
    leaf = x.clone().requires_grad_()
    torch.manual_seed(2)  # of the dropouts
    with record(rnn) as records:
        output, last = rnn(leaf)
    results = [output, *(last if isinstance(last, tuple) else (last,))]
    torch.autograd.backward(results, [torch.ones_like(r) for r in results])
    return [*results, *(t.grad for t in (leaf, *rnn.parameters()) if t.grad is not None)], records[0]


@pytest.mark.parametrize("options", [{}, {"rnn_cell": "GRU"}, {"proj_size": 8}, {"input_dropout": 0.5, "comm_dropout": 0.5}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_numbers_are_computed_in_float32(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Bit for bit what float32 makes of the same numbers, rounded at the end. Records are not rounded."""
    rnn, wide = (RIM(5, 24, num_units=4, k=3, dtype=d, **options) for d in (dtype, torch.float32))
    wide.load_state_dict(rnn.state_dict())
    x = torch.randn(6, 3, 5, dtype=dtype)
    assert rnn.path(x) == "native"
    ours, seen = forward_and_backward(rnn, x)
    theirs, expected = forward_and_backward(wide, x.float())
    assert len(ours) == len(theirs) > len(list(rnn.parameters()))
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype is dtype
        assert torch.equal(our, their.to(dtype))
    assert_identical(list(seen), list(expected))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rnn_cell": "GRU"},
        {"proj_size": 44},
        {"bias": False, "num_input_heads": 2},
        {"num_comm_heads": 0},
        {"bidirectional": True},
    ],
)
@pytest.mark.parametrize("sizes", [(5, 52), (64, 280)])  # more than 256 gates
def test_products_in_bfloat16(options: dict[str, Any], sizes: tuple[int, int]) -> None:
    """Many rows of a bfloat16 layer may be multiplied in bfloat16, and summed in float32: near the float32 of the same, in
    results and gradients. All units win, for where one hardly wins, rounding may choose another."""
    rnn, wide = (RIM(*sizes, num_units=4, k=4, dtype=d, **options) for d in (torch.bfloat16, torch.float32))
    wide.load_state_dict(rnn.state_dict())
    x = torch.randn(20, 33, sizes[0], dtype=torch.bfloat16)
    for our, their in zip(forward_and_backward(rnn, x)[0], forward_and_backward(wide, x.float())[0], strict=True):
        assert our.dtype is torch.bfloat16
        assert (our.float() - their).norm() <= 0.01 * their.norm()


@pytest.mark.parametrize("rnn_cell", ["LSTM", "GRU"])
def test_products_in_bfloat16_leave_bids_and_rows_alone(rnn_cell: str) -> None:
    """From the same states come the winners of float32; a row has the same bits whatever rows are beside it."""
    rnn, wide = (RIM(64, 256, num_units=4, k=2, rnn_cell=rnn_cell, dtype=d) for d in (torch.bfloat16, torch.float32))
    wide.load_state_dict(rnn.state_dict())
    x, h_0 = torch.randn(2, 600, 64, dtype=torch.bfloat16), torch.randn(1, 600, 256, dtype=torch.bfloat16)
    state = h_0 if rnn_cell == "GRU" else (h_0, h_0)
    with record(rnn) as ours:
        output, _ = rnn(x, state)
    with record(wide) as theirs:
        wide(x.float(), h_0.float() if rnn_cell == "GRU" else (h_0.float(), h_0.float()))
    assert torch.equal(ours[0].active[0, 0], theirs[0].active[0, 0])
    some = tuple(s[:, 101:501] for s in state) if isinstance(state, tuple) else state[:, 101:501]
    assert torch.equal(rnn(x[:, 101:501], some)[0], output[:, 101:501])


@pytest.mark.parametrize("rnn_cell", ["LSTM", "GRU"])
def test_autocast_leaves_float32_as_it_is(rnn_cell: str) -> None:
    """Only results are rounded, to what torch's own layer returns under autocast."""
    rnn = RIM(5, 24, num_units=4, rnn_cell=rnn_cell)
    x = torch.randn(6, 3, 5)
    expected, _ = rnn(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rnn.path(x) == rnn.path(x.bfloat16()) == "native"
        output, _ = rnn(x)
    assert torch.equal(output, expected.to(output.dtype))
    with or_not_on_this_processor(), torch.autocast("cpu", dtype=torch.bfloat16):
        like, _ = getattr(nn, rnn_cell)(5, 24)(x)
    assert output.dtype is like.dtype


def test_gradients_that_have_gradients_are_those_of_the_same_winners_under_autocast() -> None:
    rnn, x = RIM(6, 24, num_units=4, k=1), torch.randn(40, 16, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients = [torch.autograd.grad(rnn(x)[0].float().square().sum(), x, create_graph=c)[0] for c in (False, True)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}])
def test_gradients_that_have_gradients_are_those_of_the_same_winners_where_bids_nearly_tie(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Units that are alike bid alike but for rounding, which is another on the readable path."""
    rnn, x = RIM(10, 48, rnn_cell="GRU", dtype=dtype, **options), normal(20, 32, 10, seed=0, dtype=dtype)
    for parameter in rnn.parameters():
        nn.init.constant_(parameter, 0.05)
    for sequence in (x, pack_padded_sequence(x, torch.arange(32) % 20 + 1, enforce_sorted=False)):
        output, h_n = rnn(sequence)
        rows = output if isinstance(output, Tensor) else output.data
        loss, parameters = h_n.square().sum() + rows.square().sum(), list(rnn.parameters())
        once, again = (torch.autograd.grad(loss, parameters, retain_graph=True, create_graph=c) for c in (False, True))
        for first, second in zip(once, again, strict=True):
            assert (first - second).norm() <= torch.finfo(dtype).eps ** 0.5 * first.norm()


@pytest.mark.parametrize("options", [{}, {"rnn_cell": "GRU", "num_input_heads": 2}, {"bidirectional": True}])
def test_gradients_that_have_gradients_are_those_of_the_same_winners_in_bfloat16(options: dict[str, Any]) -> None:
    """Products in bfloat16 lead to other winners than float32 does, which a gradient of the same call has to know."""
    for _ in range(3):
        rnn, x = RIM(16, 48, num_units=4, k=1, dtype=torch.bfloat16, **options), torch.randn(40, 16, 16, dtype=torch.bfloat16)
        x.requires_grad_()
        once, again = (torch.autograd.grad(rnn(x)[0].float().square().sum(), x, create_graph=c)[0] for c in (False, True))
        assert (once.float() - again.float()).norm() < 0.02 * once.float().norm()
    packed = pack_padded_sequence(x.detach(), torch.arange(40, 24, -1), enforce_sorted=False)
    once, again = (
        torch.autograd.grad(rnn(packed)[0].data.float().square().sum(), rnn.cells[0].dynamics.weight_hh, create_graph=c)[0]
        for c in (False, True)
    )
    assert (once.float() - again.float()).norm() < 0.02 * once.float().norm()


def test_a_loop_of_narrow_cells_keeps_no_copies_of_weights() -> None:
    cell, kept = RIMCell(5, 96, num_units=4, dtype=torch.bfloat16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        cell(torch.randn(1, 5, dtype=torch.bfloat16))
    weights = sum(p.numel() * p.element_size() for p in cell.parameters())
    assert sum(t.numel() * t.element_size() for t in kept if not any(t is p for p in cell.parameters())) < weights / 4


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_narrow_numbers_and_autocast_compile(autocast: bool) -> None:
    """Many steps are one node of the graph there too."""
    dtype = torch.float32 if autocast else torch.bfloat16
    rnn, x = RIM(5, 24, num_units=4, dtype=dtype), torch.randn(UNROLLED + 4, 3, 5, dtype=dtype)
    graphs = []
    compiled = torch.compile(rnn, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)  # type: ignore[func-returns-value]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert_identical(compiled(x), rnn(x))
    (graph,) = graphs
    assert sum("rim_rnn" in str(node.target) for node in graph.graph.nodes) == 1


@pytest.mark.parametrize(
    "options", [{}, {"rnn_cell": "GRU"}, {"proj_size": 64}, {"bias": False, "num_comm_heads": 0}, DROPOUTS]
)
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (1, 16), (3, 5), (4, 16)])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("hidden_size", [192, 180])  # units that fill vectors of every instruction set, and units that do not
def test_few_rows(options: dict[str, Any], steps: int, batch: int, threads: int, hidden_size: int) -> None:
    """Few rows take the weights as they lie in memory; threads divide the units of the fewest, or the rows."""
    cell = make(hidden_size=hidden_size, num_units=4, k=3, key_size_input=16, num_input_heads=2, key_size_comm=16, **options)
    x = torch.randn(steps, batch, 5, dtype=torch.float64)
    with number_of_threads(threads):
        assert_equal_paths(cell, x, states(cell, batch))


@pytest.mark.parametrize("options", [{}, {"rnn_cell": "GRU"}, {"proj_size": 64}])
@pytest.mark.parametrize("reverse", [False, True])
def test_threads_that_share_the_units_of_packed_rows(options: dict[str, Any], reverse: bool) -> None:
    """With gradients and without, the same bits as one thread."""
    cell = make(hidden_size=192, num_units=4, k=3, key_size_input=16, key_size_comm=16, **options)
    x, state, rest = torch.randn(9, 5, dtype=torch.float64), states(cell, 5), ([5, 3, 1], reverse)
    with torch.no_grad():
        alone = native.scan(cell, x, state, *rest)
    with number_of_threads(3):
        assert_equal_paths(cell, x, state, *rest)
        with torch.no_grad():
            together = native.scan(cell, x, state, *rest)
    for ours, expected in zip((together[0], *together[1]), (alone[0], *alone[1]), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "batch"), [(40, 15), (20, 31)])
def test_threads_with_a_row_less_than_others(steps: int, batch: int) -> None:
    """In steps enough to fill what is collected for the gradients of the weights."""
    cell = make(hidden_size=96)
    with number_of_threads(2):
        assert_equal_paths(cell, torch.randn(steps, batch, 5, dtype=torch.float64), states(cell, batch))


@settings(max_examples=10)
@given(st.integers(2, 4), st.integers(1, 30))
def test_any_number_of_threads(threads: int, batch: int) -> None:
    """Outputs bit for bit, gradients up to the order of their sums; the same bits from run to run."""
    cell = make(input_size=16, hidden_size=192, num_units=4, dtype=torch.float64)
    x, state = torch.randn(6, batch, 16, dtype=torch.float64), states(cell, batch)
    alone = results_and_gradients(native.scan, cell, x, state)
    with number_of_threads(threads):
        together, again = (results_and_gradients(native.scan, cell, x, state) for _ in range(2))
    for name, expected in alone.items():
        assert torch.equal(together[name], again[name]), name
        if "gradient" in name:
            torch.testing.assert_close(together[name], expected, rtol=1e-12, atol=1e-13)
        else:
            assert torch.equal(together[name], expected), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rnn_cell": "GRU", "bias": False},
        {"proj_size": 4, "num_comm_heads": 0},
        {"num_input_heads": 2, "input_dropout": 0.4, "comm_dropout": 0.4},
    ],
)
def test_gradcheck(options: dict[str, Any]) -> None:
    sizes = {"input_size": 2, "hidden_size": 8, "key_size_input": 3, "value_size_input": 2}
    sizes |= {"num_comm_heads": 2, "key_size_comm": 2, "value_size_comm": 3}
    cell = make(**(sizes | options))
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    state = tuple(s.requires_grad_() for s in states(cell, 2))
    names, parameters = zip(*cell.named_parameters(), strict=True)

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(2)  # of the dropouts
        given_parameters = dict(zip(names, rest[len(state) :], strict=True))
        for name, value in given_parameters.items():
            path, _, last = name.rpartition(".")
            cell.get_submodule(path)._parameters[last] = value  # type: ignore[assignment]
        output, last_state, _ = native.scan(cell, x, rest[: len(state)])
        return output, *last_state

    inputs = (x, *state, *(p.detach().clone().requires_grad_() for p in parameters))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_only_some_results_or_inputs_have_gradients() -> None:
    cell = make()
    x, state = torch.randn(4, 3, 5, dtype=torch.float64), states(cell, 3)
    for pick in (lambda out: out[0], lambda out: out[1][0], lambda out: out[1][1]):
        for wanted in (lambda x: [x], lambda x: [cell.dynamics.weight_hh]):
            gradients = []
            for scan in (native.scan, RIMCell.scan):
                leaf = x.clone().requires_grad_()
                gradients.append(torch.autograd.grad(pick(scan(cell, leaf, state)).sum(), wanted(leaf))[0])
            torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-13)


def test_backward_twice_and_second_derivative() -> None:
    cell, x = make(), torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    state = states(cell, 2)
    output = native.scan(cell, x, state)[0].pow(2).sum()
    first = torch.autograd.grad(output, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(output, x, retain_graph=True)[0])
    second = []
    for scan in (native.scan, RIMCell.scan):
        (g,) = torch.autograd.grad(scan(cell, x, state)[0].pow(2).sum(), x, create_graph=True)
        second.append(torch.autograd.grad(g.pow(2).sum(), cell.dynamics.weight_hh)[0])
    torch.testing.assert_close(*second, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed: bool) -> None:
    for cell in (make(), make(rnn_cell="GRU", bias=False, num_comm_heads=0), make(proj_size=8, comm_bounded=False, **DROPOUTS)):
        shape = (5, 5) if packed else (3, 2, 5)
        x, state = torch.randn(*shape, dtype=torch.float64, requires_grad=True), states(cell, 2)
        h, c = state if len(state) == 2 else (*state, None)
        arguments = (
            x,
            h,
            c,
            *native.OPERATOR.parameters(cell, x, state),
            *cell.draw(x),
            *sizes_of(cell, [2, 2, 1] if packed else None, packed),
            False,
        )
        torch.library.opcheck(torch.ops.rim_rnn.scan.default, arguments)
        detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
        torch.library.opcheck(torch.ops.rim_rnn.infer.default, detached)
        output, h_n, c_n, winners, saved = torch.ops.rim_rnn.scan.default(*detached)
        grads = (torch.randn_like(output), torch.randn_like(h_n), None if c is None else torch.randn_like(c_n))
        torch.library.opcheck(torch.ops.rim_rnn.scan_backward.default, (*grads, output, winners, saved, True, *detached))


@pytest.mark.slow
@pytest.mark.parametrize("dropouts", [{}, DROPOUTS])
def test_compiles_whole(dropouts: dict[str, float]) -> None:
    torch.compiler.reset()
    rnn = RIM(3, 24, num_layers=2, bidirectional=True, num_units=4, **dropouts, dtype=torch.float64)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    gradients = []
    for layer in (rnn, compiled):
        rnn.zero_grad()
        torch.manual_seed(2)
        output, (h_n, c_n) = layer(x)
        (output.pow(2).sum() + h_n.sum() + c_n.pow(3).sum()).backward()
        gradients.append((output, h_n, c_n, *[p.grad for p in rnn.parameters()]))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_equal_bids_go_to_the_lowest_unit() -> None:
    cell = make(bias=False, k=2, num_units=6)
    x = torch.randn(1, 3, 5, dtype=torch.float64)
    h, c = (torch.zeros(3, 24, dtype=torch.float64) for _ in range(2))
    _, (_, c_n), _ = native.scan(cell, x, (h, c))
    assert torch.equal(c_n.view(3, 6, 4).ne(0).any(-1), torch.tensor([[True, True, False, False, False, False]] * 3))
    with torch.no_grad():  # units 1 and 4 are the same and bid highest: of two equal bids, the lower index
        for parameter in cell.input_attention.query.parameters():
            parameter[4] = parameter[1]
    h = torch.zeros(3, 6, 4, dtype=torch.float64)
    h[:, [1, 4]] = torch.randn(4, dtype=torch.float64)
    cell.k = 1
    winners = []
    for sign in (1, -1):
        _, (_, c_n), _ = native.scan(cell, x * sign, (h.flatten(1), c))
        winners.append(c_n.view(3, 6, 4).ne(0).any(-1))
    assert not torch.stack(winners)[:, :, 4].any()
    assert (winners[0] | winners[1])[:, 1].all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_row_stays_alone(bad: float) -> None:
    cell = make(hidden_size=60, dtype=torch.float32)
    x, state = torch.randn(4, 9, 5), states(cell, 9)
    clean = native.scan(cell, x, state)
    x[1, 4] = bad
    output, last, _ = native.scan(cell, x, state)
    others = [i for i in range(9) if i != 4]
    assert torch.equal(output[:, others], clean[0][:, others])
    for ours, theirs in zip(last, clean[1], strict=True):
        assert torch.equal(ours[others], theirs[others])
    assert output[0].isfinite().all()
    readable = cell.scan(x, state)[0]
    assert torch.equal(output.isnan(), readable.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [2, 300])  # weights as they lie, whatever the batch; and weights packed
def test_a_row_gets_the_same_bits_in_every_batch(dtype: torch.dtype, steps: int) -> None:
    cell = make(input_size=40, hidden_size=60, dtype=dtype, value_size_input=3, key_size_input=2)  # products not folded
    x, state = torch.randn(steps, 23, 40, dtype=dtype), states(cell, 23)
    output, last, _ = native.scan(cell, x, state)
    for rows in (slice(0, 1), slice(3, 10), slice(10, 23)):
        part, part_last, _ = native.scan(cell, x[:, rows], tuple(s[rows] for s in state))
        assert torch.equal(part, output[:, rows])
        assert all(torch.equal(a, b[rows]) for a, b in zip(part_last, last, strict=True))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other processors are as fast with such numbers")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("dtype", "tiny"), [(torch.float32, 1e-41), (torch.float64, 1e-310)])
@pytest.mark.parametrize("steps", [2, 60])  # weights as they lie; and weights packed, in several threads
def test_numbers_below_the_smallest_normal_one_count_as_zero(steps: int, dtype: torch.dtype, tiny: float, threads: int) -> None:
    """Where a gradient vanishes most numbers are such, and would take ten times as long; outside a call nothing changes."""
    cell = make(hidden_size=96, dtype=dtype)
    x = torch.randn(steps, 40, 5, dtype=dtype, requires_grad=True)
    with number_of_threads(threads):
        for take in (native.scan, RIMCell.scan):
            output, _ = take(cell, x, states(cell, 40))[:2]
            found = torch.autograd.grad(output, [x, *cell.parameters()], torch.full_like(output, tiny))
            assert {bool(t.any()) for t in found} == {take is RIMCell.scan}
            assert (torch.full((1_000_000,), 2 * tiny, dtype=dtype) * 0.5 == tiny).all()


def test_strided_inputs_and_nothing_written() -> None:
    cell = make()
    x = torch.randn(3, 5, 7, dtype=torch.float64).permute(2, 0, 1)
    state = tuple(s.t().contiguous().t() for s in states(cell, 3))
    before = [t.clone() for t in (x, *state, *cell.parameters())]
    expected = cell.scan(x, state)[0]
    torch.testing.assert_close(native.scan(cell, x, state)[0], expected, rtol=1e-12, atol=1e-13)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *state, *cell.parameters()), strict=True))


def test_in_place_edits_of_weights_are_seen() -> None:
    cell = make()
    x, state = torch.randn(2, 2, 5, dtype=torch.float64), states(cell, 2)
    before = native.scan(cell, x, state)[0]
    with torch.no_grad():
        cell.dynamics.weight_hh.mul_(2)
    after = native.scan(cell, x, state)[0]
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, cell.scan(x, state)[0], rtol=1e-12, atol=1e-13)


def test_a_weight_edited_between_forward_and_backward_is_an_error() -> None:
    """Any of them, and the input and states: torch's own error, as its layers give it."""
    for cell in (make(proj_size=8), make(rnn_cell="GRU")):
        x, state = torch.randn(2, 2, 5, dtype=torch.float64), states(cell, 2)
        for tensor in (x, *state, *cell.parameters()):
            output = native.scan(cell, x, state)[0]
            with torch.no_grad():
                tensor.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                output.sum().backward()


@pytest.mark.parametrize(("forward", "backward"), [(1, 3), (3, 1), (2, 4)])
def test_the_number_of_threads_may_change_before_backward(forward: int, backward: int) -> None:
    cell = make(input_size=16, hidden_size=192, num_units=4)
    x, state = torch.randn(6, 30, 16, dtype=torch.float64), states(cell, 30)
    expected = torch.autograd.grad(native.scan(cell, x, state)[0].square().sum(), list(cell.parameters()))
    try:
        torch.set_num_threads(forward)
        loss = native.scan(cell, x, state)[0].square().sum()
        torch.set_num_threads(backward)
        gradients = torch.autograd.grad(loss, list(cell.parameters()))
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-12)


def _run_in_child(queue: Any, cell: RIMCell[Any], x: Tensor, state: tuple[Tensor, ...]) -> None:
    torch.set_num_threads(1)
    output = native.scan(cell, x, state)[0]
    queue.put((output.detach().numpy(), torch.autograd.grad(output.sum(), cell.dynamics.weight_hh)[0].numpy()))


@pytest.mark.slow
@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_in_another_process(method: str) -> None:
    """Forward and backward, from a cell in shared memory."""
    cell = make(hidden_size=96).share_memory()
    x, state = torch.randn(6, 12, 5, dtype=torch.float64), states(cell, 12)
    output = native.scan(cell, x, state)[0]
    gradient = torch.autograd.grad(output.sum(), cell.dynamics.weight_hh)[0]
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    child = context.Process(target=_run_in_child, args=(queue, cell, x, state))
    child.start()
    got = [torch.from_numpy(part) for part in queue.get()]
    child.join()
    assert torch.equal(got[0], output)
    assert torch.equal(got[1], gradient)


ULPS = """
import torch, warnings
warnings.simplefilter("ignore")
from rim_rnn import RIMCell, native
for dtype, bound, ceiling in ((torch.float32, 3, 80), (torch.float64, 3, 600)):
    magnitude = torch.logspace(-8, 2.5, 60001, dtype=torch.float64).clamp(max=ceiling)
    values = torch.cat([-magnitude.flip(0), torch.zeros(1, dtype=torch.float64), magnitude]).to(dtype)
    cell = RIMCell(1, 512, num_units=8, k=8, value_size_input=1, key_size_input=1, num_comm_heads=0, dtype=dtype)
    zeros, x = torch.zeros(1, 512, dtype=dtype), torch.zeros(1, 1, 1, dtype=dtype)
    torch.nn.utils.vector_to_parameters(torch.zeros(sum(p.numel() for p in cell.parameters()), dtype=dtype), cell.parameters())
    for name in ("sigmoid", "tanh"):
        got = []
        for part in torch.nn.functional.pad(values, (0, -len(values) % 512)).view(-1, 8, 64):
            gates = (part, 0, 50, 0) if name == "sigmoid" else (50, 0, part, 0)  # c = sigmoid(i) tanh(g)
            with torch.no_grad():
                for gate, value in enumerate(gates):
                    cell.dynamics.bias_ih[:, gate * 64 : (gate + 1) * 64] = value
                got.append(native.scan(cell, x, (zeros, zeros))[1][1])
        c, wide = torch.cat(got, dim=1)[0, : len(values)].double(), values.double()
        exact = 1 / (1 + torch.exp(-wide)) if name == "sigmoid" else torch.tanh(wide)
        unit = torch.nextafter(exact.to(dtype).abs(), torch.tensor(torch.inf, dtype=dtype)).double() - exact.to(dtype).abs()
        error = ((c - exact).abs() / unit).max()
        assert error <= bound, (dtype, name, error)
"""

SCAN = """
import sys, torch
sys.path.insert(0, "tests")
import test_native
for options in ({}, {"rnn_cell": "GRU", "hidden_size": 68}, {"proj_size": 12, "bias": False}):
    cell = test_native.make(**options)
    test_native.assert_equal_paths(cell, torch.randn(4, 9, 5, dtype=torch.float64), test_native.states(cell, 9))
"""


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("program", [ULPS, SCAN], ids=["exp and tanh", "scan"])
def test_every_instruction_set(isa: str, program: str) -> None:
    """ULPS: sigmoid and tanh against float64. One that the processor does not have is refused."""
    has = torch.backends.cpu.get_cpu_capability()
    if {"avx2": has == "DEFAULT", "avx512": has != "AVX512"}.get(isa, False):
        pytest.skip(f"{has} only")
    environment = os.environ | {"RIM_RNN_ISA": isa, "OMP_NUM_THREADS": "1"}
    root = os.path.dirname(os.path.dirname(__file__))
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=root)


class Reason:
    """One way to make a call that the operator declines, and a word of its reason."""

    def __init__(self, word: str, change: Callable[[RIMCell[Any]], object] | None = None, **options: Any) -> None:
        self.word, self.change, self.options = word, change, options


class Doubled(nn.Module):
    """A module that someone put around one of ours."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = 2 * self.inner(x)
        return result


class Silent(nn.Module):
    """A stage that someone put in the place of ours, with nothing of what ours has."""

    def forward(self, h: Tensor, active: Tensor, weight: None, keep: None) -> tuple[Tensor, Tensor]:
        return h, h.new_zeros(h.size(1), 0, len(h), len(h))


REASONS = [
    Reason("hook is registered in communication", lambda cell: cell.communication.register_forward_hook(lambda *a: None)),
    Reason(
        "hook is registered in input_attention.query",
        lambda cell: cell.input_attention.query.register_forward_pre_hook(lambda *a: None),
    ),
    Reason(
        "dynamics is a ParametrizedLongShortTerm",
        lambda cell: parametrize.register_parametrization(cell.dynamics, "weight_hh", nn.Identity()),
    ),
    Reason(
        "input_attention.key is a Doubled",
        lambda cell: setattr(cell.input_attention, "key", Doubled(cell.input_attention.key)),
    ),
    Reason("communication is a Silent", lambda cell: setattr(cell, "communication", Silent())),
    Reason(
        "input_attention is a Sequential", lambda cell: setattr(cell, "input_attention", nn.Sequential(cell.input_attention))
    ),
    Reason("input_attention.value is missing", lambda cell: delattr(cell.input_attention, "value")),
    Reason("where the cell keeps it", lambda cell: cell.communication.output._parameters.pop("weight")),
    Reason("where the cell keeps it", lambda cell: setattr(cell.dynamics, "bias_ih", None)),
    Reason("differ", lambda cell: cell.communication.float()),
]


@pytest.mark.parametrize("reason", REASONS, ids=lambda r: r.word)
def test_declines_with_a_reason(reason: Reason) -> None:
    cell = make(**reason.options)
    x, state = torch.randn(2, 2, 5, dtype=cell.dynamics.weight_hh.dtype), states(cell, 2)
    if reason.change:
        reason.change(cell)
    given_reason = native.supports(cell, x, state)
    assert given_reason is not None
    assert reason.word in given_reason


def test_transforms_are_declined() -> None:
    cell = make()
    x, state = torch.randn(2, 2, 5, dtype=torch.float64), states(cell, 2)
    assert native.supports(cell, x, state) is None
    assert "empty" in str(native.supports(cell, x[:, :0], state))
    assert "complex64" in str(native.supports(cell, x.to(torch.complex64), state))
    with native.readable():
        assert native.supports(cell, x, state) == "switched off"
    with torch.autograd.forward_ad.dual_level():
        assert "forward-mode" in str(native.supports(cell, x, state))
    seen = []
    torch.func.vmap(lambda x: seen.append(native.supports(cell, x, state)) or x)(x)
    assert "torch.func" in str(seen[0])


def test_layers_say_which_path_they_take() -> None:
    rnn = RIM(5, 24, num_units=4)
    assert rnn.path(torch.randn(3, 2, 5)) == "native"
    with native.readable():
        assert rnn.path(torch.randn(3, 2, 5)) == "readable: switched off"
    with record(rnn):
        assert rnn.path(torch.randn(3, 2, 5)) == "native"


def test_readable_blocks_of_threads_may_overlap() -> None:
    """Whoever leaves last switches the fast path on again, also where one leaves by an error."""
    rnn, x = RIM(5, 24, num_units=4), torch.randn(3, 2, 5)
    entered, leave, left, seen = threading.Event(), threading.Event(), threading.Event(), []

    def other() -> None:
        with suppress(KeyError), native.readable():
            entered.set()
            leave.wait(10)
            raise KeyError
        left.set()

    thread = threading.Thread(target=other)
    with native.readable():  # A enters, B enters, A leaves, B leaves
        thread.start()
        assert entered.wait(10)
        seen.append(rnn.path(x))
    seen.append(rnn.path(x))
    leave.set()
    assert left.wait(10)
    thread.join()
    assert [*seen, rnn.path(x)] == ["readable: switched off", "readable: switched off", "native"]


def fails(program: str, **environment: str) -> str:
    """The last line of what a program says that fails, but is not killed."""
    command, root = [sys.executable, "-W", "ignore", "-c", program], os.path.dirname(os.path.dirname(__file__))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)} | environment
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_an_instruction_set_that_is_none() -> None:
    said = fails("import rim_rnn", RIM_RNN_ISA="sse9")
    assert said == "ImportError: RIM_RNN_ISA should be baseline, avx2, avx512 or empty, got 'sse9'"


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_an_instruction_set_that_the_processor_lacks(isa: str) -> None:
    has = torch.backends.cpu.get_cpu_capability()
    if has == "AVX512" or (has == "AVX2" and isa == "avx2"):
        pytest.skip(f"it has {isa}")
    said = fails("import rim_rnn", RIM_RNN_ISA=isa)
    assert said.startswith("ImportError: ")
    assert f"RIM_RNN_ISA={isa}, which this processor does not have" in said


MEMORY = """
import resource, torch
from rim_rnn import RIM
rnn = RIM(1, 600, num_units=6)
x = torch.zeros(1, 1, 1).expand(20000, 64, 1)
assert rnn.path(x) == "native"
rnn(x[:2])[0].sum().backward()
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
rnn(x)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of memory")
def test_out_of_memory_says_for_what_and_how_much() -> None:
    """20,000 steps of 64 rows and 4 winners, 725 numbers each of which backward needs."""
    said = fails(MEMORY)
    assert "not enough memory for what backward needs of shape (3712000000,)" in said
    assert f"could not allocate {3712000000 * 4} bytes" in said


def test_working_memory_is_kept_and_can_be_given_back() -> None:
    """A call leaves some for the next; without any, the next has the same bits."""
    rnn, x = RIM(3, 24), normal(5, 4, 3, seed=1).float()
    before = rnn(x)[0]
    assert native.empty_cache() > 0
    assert native.empty_cache() == 0
    assert_identical(rnn(x)[0], before)


def test_working_memory_that_is_kept_is_bounded() -> None:
    rnn, x = RIM(2, 960, dtype=torch.float64), normal(1, 4000, 2, seed=1)
    native.empty_cache()
    with torch.no_grad():
        rnn(x)  # 250 MB
        assert native.empty_cache() == 0
        rnn(x[:, :1])
    assert 0 < native.empty_cache() <= 64 << 20


def test_calls_at_the_same_time_have_memory_of_their_own() -> None:
    """Layers of different sizes, each in a Python thread of its own, forward and backward."""
    layers = [strong(RIM(3, 12 * (i + 1), num_units=4)) for i in range(4)]
    x, wrong = normal(40, 8, 3, seed=1).float(), []

    def results(rnn: RIM[Any]) -> list[Tensor]:
        output = rnn(x)[0]
        return [output, *torch.autograd.grad(output.square().sum(), list(rnn.parameters()))]

    def repeat(rnn: RIM[Any], expected: list[Tensor]) -> None:
        for _ in range(20):
            wrong.extend(1 for got, right in zip(results(rnn), expected, strict=True) if not torch.equal(got, right))

    threads = [threading.Thread(target=repeat, args=(rnn, results(rnn))) for rnn in layers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


HUGE: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("h_0", (2**31, 8), {}),
    ("h_0", (2**29, 8), {}),  # times 4 units
    ("input_attention.query.weight", (2**31, 2, 128), {}),
    ("input_attention.query.weight", (4, 2**31, 128), {}),
    ("input_attention.query.weight", (4, 2**29, 128), {}),
    ("input_attention.key.weight", (2**32, 5), {}),
    ("input_attention.value.weight", (2**32, 5), {}),
    ("dynamics.weight_ih", (4, 48, 2**33), {}),
    ("dynamics.weight_ih", (4, 48, 2**31), {}),
    ("communication.query.weight", (4, 2, 2**33), {}),
    ("communication.value.weight", (4, 2, 2**33), {}),
    ("input", (3, 2, 2**31), {}),
    ("input", (2**50, 2, 5), {}),
    ("input", (2**33, 2, 5), {"batch_sizes": [2**32, 2**32]}),
]


@pytest.mark.parametrize(
    ("name", "shape", "others"), HUGE, ids=lambda value: str(value) if isinstance(value, str | tuple) else ""
)
def test_sizes_beyond_32_bits_are_refused(name: str, shape: tuple[int, ...], others: dict[str, Any]) -> None:
    """Of tensors that take no memory: one number, expanded."""
    for operator in ("infer", "scan"):
        huge = arguments_of(operator, **ALL) | {name: torch.empty(1).expand(shape)} | others
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"^rim_rnn: .*got ") as error:
            getattr(torch.ops.rim_rnn, operator).default(*huge.values())
        assert name in str(error.value) or "num_units" in str(error.value)


@pytest.mark.parametrize("operator", ["infer", "scan", "scan_backward"])
def test_a_meta_tensor_among_others_is_refused(operator: str) -> None:
    """Whichever it is: where there is one, torch asks for shapes alone, and nothing would be computed."""
    right = arguments_of(operator, **ALL)
    for name, value in right.items():
        if isinstance(value, Tensor):
            with torch.no_grad(), pytest.raises(RuntimeError, match="all tensors should be on one device, got cpu, meta"):
                getattr(torch.ops.rim_rnn, operator).default(*(right | {name: value.to("meta")}).values())


ARGUMENTS = ("input", "h_0", "c_0", *PARAMETERS, "keep_input", "keep_comm")
SIZES = ("batch_sizes", "k", "num_input_heads", "num_comm_heads", "comm_bounded", "reverse", "rounded")


def arguments_of(operator: str, packed: bool = False, **options: Any) -> dict[str, Any]:
    """A right call of the operator, by the names that its errors use."""
    cell, x = make(num_input_heads=2, **options, dtype=torch.float32), torch.randn(*(5, 5) if packed else (3, 2, 5))
    state = states(cell, 2)
    tensors = (x, *state, *[None] * (2 - len(state)), *native.OPERATOR.parameters(cell, x, state), *cell.draw(x))
    sizes = *sizes_of(cell, [2, 2, 1] if packed else None, False), False
    right = dict(zip((*ARGUMENTS, *SIZES), (*tensors, *sizes), strict=True))
    if operator == "scan_backward":
        output, h_n, c_n, winners, saved = torch.ops.rim_rnn.scan.default(*right.values())
        grads = {"grad_output": output, "grad_h_n": h_n, "grad_c_n": c_n if len(state) == 2 else None}
        right = {**grads, "output": output, "winners": winners, "saved": saved, "input_grad": True} | right
    return right


def wrong_tensors(value: Tensor | None) -> Iterator[Tensor]:
    """Of a wrong dtype, with a dimension too many, and each size in turn one too large, and zero."""
    if value is None:
        yield torch.zeros(1)
        return
    yield value.half()
    yield value[None]
    for dim in range(value.dim()):
        yield torch.cat([value, value.narrow(dim, 0, 1)], dim)
        yield value.narrow(dim, 0, 0)


WRONG_SIZES = {
    "batch_sizes": [[2, 3], [3, 2], [2, 2], [2, 2, 1, 1], [2, 2, 0, 1], [2, 2, -1, 2], [5, 0], [0], [-5], [2**62] * 4],
    "k": [0, -1, 5, 2**31, 2**63 - 1],
    "num_input_heads": [0, -1, 3, 2**31, 2**63 - 1],
    "num_comm_heads": [-1, 3, 5, 2**31, 2**63 - 1],
}
OPERATORS = ("infer", "scan", "scan_backward")
ALL, NOTHING = {"proj_size": 8, **DROPOUTS}, {"rnn_cell": "GRU", "bias": False, "num_comm_heads": 0}


@pytest.mark.parametrize("options", [ALL, NOTHING], ids=["all", "nothing"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_tensors_are_checked_by_name(operator: str, options: dict[str, Any]) -> None:
    """Each tensor in turn; where others take their sizes from it, the first that does not fit it is named instead."""
    call, right = getattr(torch.ops.rim_rnn, operator).default, arguments_of(operator, **options)
    tensors = [
        name for name in right if name not in (*SIZES, "input_grad") and not (name == "grad_c_n" and right[name] is None)
    ]
    assert set(tensors) >= set(ARGUMENTS)
    for name in tensors:
        others = right if name in ARGUMENTS else [name]
        for wrong in wrong_tensors(right[name]):
            if (name == "input" and wrong.size(0) == 4) or (name == "h_0" and wrong.dim() == 3 and right["c_0"] is None):
                continue  # one step more is right, and so is a state as a layer has it
            with torch.no_grad(), pytest.raises(RuntimeError, match=r"^rim_rnn: ") as error:
                call(*(right | {name: wrong}).values())
            assert any(other in str(error.value) for other in others), (name, wrong.shape, error.value)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", WRONG_SIZES)
def test_sizes_are_checked_by_name(operator: str, name: str) -> None:
    call = getattr(torch.ops.rim_rnn, operator).default
    right = arguments_of(operator, packed=True, **ALL)
    for wrong in WRONG_SIZES[name]:
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"^rim_rnn: ") as error:
            call(*(right | {name: wrong}).values())
        assert name in str(error.value), (wrong, error.value)


@pytest.mark.parametrize("operator", OPERATORS)
def test_any_strides_are_right(operator: str) -> None:
    call, right = getattr(torch.ops.rim_rnn, operator).default, arguments_of(operator, **ALL)
    strided = {
        name: torch.stack([value, value], dim=-1)[..., 0] if isinstance(value, Tensor) and name != "winners" else value
        for name, value in right.items()
    }
    assert not any(value.is_contiguous() for name, value in strided.items() if isinstance(value, Tensor) and name != "winners")
    for ours, expected in zip(call(*strided.values()), call(*right.values()), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("winners", [[0, 1, 4], [-1, 0, 1], [0, 0, 1], [1, 0, 2], [0, 1, 2**31 - 1]])
def test_winners_are_checked(winners: list[int]) -> None:
    right = arguments_of("scan_backward", **ALL)
    right["winners"][4] = torch.tensor(winners)
    with pytest.raises(RuntimeError, match="winners of a row should ascend, from 0 to 3"):
        torch.ops.rim_rnn.scan_backward.default(*right.values())


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("input", torch.zeros(3, 2, 4), r"input should have shape \(3, 2, 5\), got \(3, 2, 4\)"),
        ("h_0", torch.zeros(2, 15), r"h_0 should have shape \(2, 8\), got \(2, 15\)"),
        ("c_0", torch.zeros(2, 24, dtype=torch.float64), "c_0 should have the dtype of input"),
        ("input_attention.key.bias", None, "input_attention.key.bias should be a tensor, got None"),
        ("communication.query.weight", None, "communication.query.weight should be a tensor, got None"),
        (
            "communication.query.weight",
            torch.zeros(4, 2, 13),
            r"communication.query.weight.size\(2\)=13 should be divisible by",
        ),
        ("batch_sizes", [2, 2, 2], "input should have 2 dimensions, got 3"),
        ("k", 5, "k should be from 1 to 4, got 5"),
        ("num_input_heads", 3, r"input_attention.key.weight.size\(0\)=16 should be divisible by num_input_heads=3"),
    ],
)
def test_errors_say_what_was_expected_and_what_was_given(name: str, wrong: Any, message: str) -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"^rim_rnn: {message}"):
        torch.ops.rim_rnn.infer.default(*(arguments_of("infer", **ALL) | {name: wrong}).values())
