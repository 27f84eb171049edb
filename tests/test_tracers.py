"""torch.fx takes the layer as a leaf, as it takes torch's own; torch.jit.script says at once that it can not take it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drawn import assert_identical
from torch import Tensor, fx, nn

from rim_rnn import RIM, RIMCell

kinds = pytest.mark.parametrize("kind", [RIM, RIMCell])
units = pytest.mark.parametrize("rnn_cell", ["LSTM", "GRU"])


class Model(nn.Module):
    """The layer deep inside, between other modules."""

    def __init__(self, kind: Any, rnn_cell: str) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 5)
        self.parts = nn.ModuleList([kind(5, 8, num_units=4, rnn_cell=rnn_cell)])
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        embedded, rnn = torch.relu(self.embed(x)), self.parts[0]
        result = rnn(embedded) if hx is None else rnn(embedded, hx)
        return (self.head(result[0]), result[1]) if isinstance(rnn, RIM) else result


class WithStates(Model):
    """First states as arguments of their own, as an exported model has them, or an LSTM's as a list."""

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
        hx: Any = h if self.parts[0].rnn_cell == "GRU" else [h, c]
        return self.parts[0](input=self.embed(x), hx=hx)


@kinds
@units
@pytest.mark.parametrize("given", [False, True])
def test_fx_takes_it_as_a_leaf(kind: Any, rnn_cell: str, given: bool) -> None:
    """One call in the graph, with the layer itself behind it: same results and gradients, as often as it is run."""
    model = (WithStates if given else Model)(kind, rnn_cell)
    graph = fx.symbolic_trace(model, None if given else {"hx": None})
    calls = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert calls.count("parts.0") == 1
    assert not [call for call in calls if str(call).startswith("parts.0.")]
    assert type(graph.get_submodule("parts.0")) is kind
    for batch in (2, 5):
        x = torch.randn(*((4, batch, 3) if kind is RIM else (batch, 3)))
        states = [torch.randn(*((1, batch, 8) if kind is RIM else (batch, 8))) for _ in range(2 if given else 0)]
        found, expected = (torch.utils._pytree.tree_leaves(module(x, *states)) for module in (graph, model))
        assert_identical(found, expected)
        of_graph, of_model = (torch.autograd.grad(r[0].sum(), list(model.parts.parameters())) for r in (found, expected))
        assert_identical(of_graph, of_model)


class OwnInput(WithStates):
    """The states are given, the input is the model's."""

    def __init__(self, kind: Any, rnn_cell: str) -> None:
        super().__init__(kind, rnn_cell)
        self.register_buffer("x", torch.randn(*((4, 2, 5) if kind is RIM else (2, 5))))

    def forward(self, h: Any) -> Any:
        return self.parts[0](self.x, h)


@kinds
@units
def test_fx_takes_it_as_a_leaf_where_only_the_state_is_given(kind: Any, rnn_cell: str) -> None:
    model = OwnInput(kind, rnn_cell)
    state = torch.randn(*((1, 2, 8) if kind is RIM else (2, 8)))
    hx = state if rnn_cell == "GRU" else (state, state)
    assert_identical(*(torch.utils._pytree.tree_leaves(module(hx)) for module in (fx.symbolic_trace(model), model)))


@kinds
@units
def test_fx_of_the_layer_itself(kind: Any, rnn_cell: str) -> None:
    with pytest.raises(fx.proxy.TraceError, match=f"symbolic_trace does not look inside a {kind.__name__}: trace a module"):
        fx.symbolic_trace(kind(3, 8, num_units=4, rnn_cell=rnn_cell))


@pytest.mark.parametrize("mode", [RIM, RIMCell])
@units
def test_jit_script_says_what_to_take_instead(mode: Any, rnn_cell: str) -> None:
    rnn = mode(3, 8, num_units=4, rnn_cell=rnn_cell)
    for module in (rnn, nn.Sequential(nn.Linear(3, 3), rnn), Model(mode, rnn_cell)):
        with pytest.raises(NotImplementedError, match=f"torch.jit.script can not take a {mode.__name__}; torch.export.export"):
            torch.jit.script(module)  # type: ignore[no-untyped-call]


@kinds
def test_states_in_a_list(kind: Any) -> None:
    """Where a tuple is what torch's own take and give."""
    rnn = kind(3, 8, num_units=4)
    x, h, c = torch.randn(*((4, 2, 3) if kind is RIM else (2, 3))), *(torch.randn(1, 2, 8) for _ in range(2))
    h, c = (h, c) if kind is RIM else (h[0], c[0])
    assert_identical(rnn(x, [h, c]), rnn(x, (h, c)))
    with pytest.raises(RuntimeError, match="should hold two states"):
        rnn(x, [h, c, c])
