"""What a trace or a graph keeps of its example: on other data it gives what the layer gives, or refuses in words."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from drawn import assert_same, strong
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from rim_rnn import RIM, native
from rim_rnn.operator import plain_parameters, sizes_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning"),
]
SMALL: dict[str, Any] = {"num_units": 4, "k": 2, "key_size_input": 4, "key_size_comm": 3, "value_size_comm": 2}
LAYERS: dict[str, dict[str, Any]] = {
    "LSTM": {"proj_size": 4},
    "GRU": {"rnn_cell": "GRU", "num_layers": 2, "bidirectional": True},
}
layers = pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)


def layer(options: dict[str, Any]) -> RIM[Any]:
    return strong(RIM(3, 8, **(SMALL | options), dtype=torch.float64), scale=0.5).eval()


class Padded(nn.Module):
    def __init__(self, rnn: RIM[Any]) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Any:
        return self.rnn(x)


class Packing(Padded):
    """Padded rows and their lengths, packed inside."""

    def forward(self, x: Tensor, lengths: Tensor) -> Any:  # type: ignore[override]
        output, state = self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return output.data, state


class Parts(Padded):
    """The parts of a packed sequence."""

    def forward(self, *parts: Tensor) -> Any:
        output, state = self.rnn(PackedSequence(*parts))
        return output.data, state


def loaded(module: nn.Module, example: tuple[Tensor, ...]) -> Any:
    """By torch.jit.trace, written to a file and read again."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, example), file)  # type: ignore[no-untyped-call]
    file.seek(0)
    return torch.jit.load(file)  # type: ignore[no-untyped-call]


def by_fx(mode: str) -> Callable[..., Any]:
    """By make_fx, which wants to be given parameters, not to find them."""

    def trace(module: nn.Module, example: tuple[Tensor, ...]) -> Any:
        parameters = dict(module.named_parameters())
        graph = make_fx(lambda p, *data: torch.func.functional_call(module, p, data), tracing_mode=mode)(parameters, *example)
        return lambda *data: graph(parameters, *data)

    return trace


TRACERS: dict[str, Callable[..., Any]] = {
    "jit": loaded,
    **{mode: by_fx(mode) for mode in ("real", "fake", "symbolic")},
    "export": lambda module, example: torch.export.export(module, example, strict=False).module(),
    "export, strict": lambda module, example: torch.export.export(module, example, strict=True).module(),
    "fx": lambda module, example: fx.symbolic_trace(module),
}
LENGTHS = [4, 2, 1]
OTHER_LENGTHS = {
    "as the example": LENGTHS,
    "unsorted": [2, 4, 1],
    "as many rows in all": [3, 3, 1],
    "more rows in all": [4, 4, 1],
    "another batch": [4, 3],
    "more steps": [5, 1, 1],
    "fewer steps": [3, 2, 2],
}
SAME = ("as the example", "unsorted")
SIZES = 5, 7  # which are no size of the layer's: make_fx takes equal ones for one
OTHER_SIZES = {
    "as the example": SIZES,
    "fewer rows": (5, 2),
    "more rows": (5, 9),
    "one row": (5, 1),
    "more steps": (6, 7),
    "one step": (1, 7),
    "turned": (7, 5),
}
EXACT = {"jit": ("as the example", "fewer rows", "more rows", "one row"), "symbolic": OTHER_SIZES, "fx": OTHER_SIZES}
"""The sizes that each takes, besides those of the example. Others are exact or an error."""
WORDS = r"this graph was traced for 5 steps|Tensor sizes mismatch|input should have shape|must match the size|Guard failed"


def packed(lengths: list[int]) -> tuple[Tensor, Tensor]:
    return torch.randn(max(lengths), len(lengths), 3, dtype=torch.float64), torch.tensor(lengths)


@layers
@pytest.mark.parametrize("tracer", ["jit", "real"])
@pytest.mark.parametrize("how", [Packing, Parts])
def test_packed_is_for_the_lengths_of_the_example(how: Any, tracer: str, options: dict[str, Any]) -> None:
    module = how(layer(options))
    given: Any = {
        name: packed(lengths) if how is Packing else tuple(pack_padded_sequence(*packed(lengths), enforce_sorted=False))
        for name, lengths in OTHER_LENGTHS.items()
    }
    graph = TRACERS[tracer](module, given["as the example"])
    for name, data in given.items():
        if name in SAME:
            assert_same(graph(*data), module(*data))
        else:
            with pytest.raises(RuntimeError, match=r"traced for a PackedSequence with batch_sizes=\[3, 2, 1, 1\]"):
                graph(*data)


@pytest.mark.parametrize("tracer", ["fake", "symbolic", "export", "export, strict"])
def test_packed_is_refused_where_lengths_stay_open(tracer: str) -> None:
    parts = tuple(pack_padded_sequence(*packed(LENGTHS), enforce_sorted=False))
    with pytest.raises(RuntimeError, match="how long the sequences of a PackedSequence are has to be known"):
        TRACERS[tracer](Parts(layer({})), parts)


@layers
@pytest.mark.parametrize("tracer", TRACERS)
def test_padded_is_exact_or_refused(tracer: str, options: dict[str, Any]) -> None:
    """Never other numbers, nor other shapes."""
    module = Padded(layer(options))
    graph = TRACERS[tracer](module, (torch.randn(*SIZES, 3, dtype=torch.float64),))
    for name, sizes in OTHER_SIZES.items():
        x = torch.randn(*sizes, 3, dtype=torch.float64)
        if name in EXACT.get(tracer, ("as the example",)):
            assert_same(graph(x), module(x))
            continue
        found = result_or_words(graph, x)
        if isinstance(found, str):
            assert re.search(WORDS, found)
        else:
            assert tracer != "jit"
            assert_same(found, module(x))


def result_or_words(graph: Callable[..., Any], x: Tensor) -> Any:
    try:
        return graph(x)
    except (RuntimeError, AssertionError) as error:
        return str(error)


@layers
@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("path", ["native", "readable"])
def test_one_node_for_a_scan(path: str, mode: str, options: dict[str, Any]) -> None:
    """On whichever path, of however many steps, and one for its gradient."""
    rnn = layer(options)
    parameters, x = dict(rnn.named_parameters()), torch.randn(50, 2, 3, dtype=torch.float64)

    def gradients(parameters: dict[str, Tensor], x: Tensor) -> Any:
        output, _ = torch.func.functional_call(rnn, parameters, (x,))
        return torch.autograd.grad(output.square().sum(), list(parameters.values()))

    with native.readable() if path == "readable" else nullcontext():
        graph = make_fx(gradients, tracing_mode=mode)(parameters, x)
    ours = [str(node.target) for node in graph.graph.nodes if "rim_rnn" in str(node.target)]
    assert len(ours) == 2 * len(rnn.cells)
    assert sum("backward" in name for name in ours) == len(rnn.cells)
    assert len(graph.graph.nodes) < 60 + 80 * len(rnn.cells)
    if mode == "symbolic":
        x = torch.randn(7, 5, 3, dtype=torch.float64)
    assert_same(graph(parameters, x), gradients(parameters, x))


@layers
def test_fake_tensors_take_the_path_that_tensors_take(options: dict[str, Any]) -> None:
    """In training and not, with gradients of gradients, and in the dtypes of the layer."""
    path = layer(options).path(torch.zeros(3, 2, 3, dtype=torch.float64))
    for dtype in (torch.float64, torch.bfloat16):
        with FakeTensorMode():
            rnn = RIM(3, 8, **(SMALL | options), dtype=dtype)
            x = torch.randn(3, 2, 3, dtype=dtype, requires_grad=True)
            assert rnn.path(x) == path
            output, state = rnn(x)
            (grad,) = torch.autograd.grad(output.sum(), x, create_graph=True)
            grad.square().sum().backward()
            with torch.no_grad():
                silent, _ = rnn(x)
        real = RIM(3, 8, **(SMALL | options), dtype=dtype)(torch.randn(3, 2, 3, dtype=dtype))
        for fake, right in zip(
            torch.utils._pytree.tree_leaves((output, state)), torch.utils._pytree.tree_leaves(real), strict=True
        ):
            assert (fake.shape, fake.dtype, fake.device) == (right.shape, right.dtype, right.device)
        assert silent.shape == output.shape
        assert all(p.grad is not None and p.grad.shape == p.shape for p in (x, *rnn.parameters()))


@pytest.mark.skipif(native._unavailable is not None, reason="no native operator")
@pytest.mark.parametrize("rnn_cell", ["LSTM", "GRU"])
def test_a_tracker_of_memory_sees_what_the_operator_keeps(rnn_cell: str) -> None:
    """Input, outputs, and what scan returns besides; not what a thousand steps of the readable path would keep."""
    tracking = pytest.importorskip("torch.distributed._tools.mem_tracker")
    with FakeTensorMode():
        rnn, tracker = RIM(3, 24, rnn_cell=rnn_cell), tracking.MemTracker()
        tracker.track_external(rnn)
        with tracker:
            rnn(torch.randn(1000, 8, 3))[0].sum().backward()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    cell = RIM(3, 24, rnn_cell=rnn_cell).cells[0]
    x, state = torch.randn(1000, 8, 3), tuple(torch.zeros(8, 24) for _ in range(2 if rnn_cell == "LSTM" else 1))
    parameters = plain_parameters(cell, x, state)
    h, c = state if len(state) == 2 else (*state, None)
    kept = torch.ops.rim_rnn.scan.default(x, h, c, *parameters, None, None, *sizes_of(cell, None, False), False)
    expected = sum(t.nbytes for t in (x, *kept) if t is not None)
    assert expected <= max(peak.values()) < 1.3 * expected
