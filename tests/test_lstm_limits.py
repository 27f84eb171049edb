"""The limits nobody can doubt: a RIM whose units see all of the input and nothing of each other is torch.nn.LSTM.

Query and key biases make every score at least 40, so that the attention to the input is 1.0 to the last bit of float64;
the value projection is the identity; there is no communication; all units are active. What is left is n independent
nn.LSTMs (or nn.GRUs) side by side.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drawn import assert_same, gradients, normal, strong
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from rim_rnn import RIM, RIMCell, record

CELLS = {
    "LSTM": {"rnn_cell": "LSTM"},
    "GRU": {"rnn_cell": "GRU"},
    "proj": {"rnn_cell": "LSTM", "proj": 2},
}
INPUT, UNIT, BATCH, TIME = 3, 4, 3, 5


def saturate(module: RIM[Any] | RIMCell[Any]) -> None:
    """Attention of exactly 1 to the input, whatever input and states below 1 in size are, and values equal to the input."""
    for cell in module.cells if isinstance(module, RIM) else [module]:
        attention = cell.input_attention
        with torch.no_grad():
            for projection in (attention.query, attention.key):
                projection.weight.mul_(0.01)
                projection.bias.fill_(30)
            attention.value.weight.copy_(torch.eye(*attention.value.weight.shape))
            attention.value.bias.zero_()


def limit(name: str, num_units: int, heads: int = 1, **options: Any) -> RIM[Any]:
    """A saturated layer; the heads' values together hold the widest input of any layer."""
    extra = dict(CELLS[name])
    proj = extra.pop("proj", 0)
    widest = max(INPUT, num_units * (proj or UNIT) * (2 if options.get("bidirectional") else 1))
    rnn = RIM(
        INPUT,
        num_units * UNIT,
        proj_size=num_units * proj,
        num_units=num_units,
        k=num_units,
        key_size_input=4,
        num_input_heads=heads,
        value_size_input=-(-widest // heads),
        num_comm_heads=0,
        dtype=torch.float64,
        **extra,
        **options,
    )
    saturate(strong(rnn))
    return rnn


def torch_weights(cell: RIMCell[Any], unit: int, suffix: str = "") -> dict[str, Tensor]:
    """One unit's weights under the names of torch.nn, as views that lead gradients back to the cell's own."""
    dynamics = cell.dynamics
    weights = {"weight_ih": dynamics.weight_ih[unit, : cell.input_size].T, "weight_hh": dynamics.weight_hh[unit].T}
    weights |= {"bias_ih": dynamics.bias_ih[unit], "bias_hh": dynamics.bias_hh[unit]}
    if cell.proj_size:
        weights["weight_hr"] = dynamics.weight_hr[unit].T
    return {name + suffix: weight for name, weight in weights.items()}


def torch_layer(rnn: RIM[Any], layers: list[int], unit: int, x: Any, hx: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...]]:
    """torch's own layer on the weights of one unit of some of our layers: output and states, always a tuple."""
    cells = [rnn.cells[layer * rnn.num_directions + d] for layer in layers for d in range(rnn.num_directions)]
    suffixes = [f"_l{i}{direction}" for i in range(len(layers)) for direction in ["", "_reverse"][: rnn.num_directions]]
    weights: dict[str, Tensor] = {}
    for cell, suffix in zip(cells, suffixes, strict=True):
        weights |= torch_weights(cell, unit, suffix)
    extra = {"proj_size": rnn.proj_size // rnn.num_units} if rnn.proj_size else {}
    kind: Any = getattr(nn, rnn.mode)
    theirs = kind(
        cells[0].input_size,
        UNIT,
        len(layers),
        batch_first=rnn.batch_first,
        bidirectional=rnn.bidirectional,
        dtype=torch.float64,
        **extra,
    )
    weights = {name: weight.contiguous() for name, weight in weights.items()}
    output, last = torch.func.functional_call(theirs, weights, (x, hx if rnn.mode == "LSTM" else hx[0]), strict=True)
    return output, last if rnn.mode == "LSTM" else (last,)


def side_by_side(rnn: RIM[Any], x: Any, hx: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...]]:
    """Every layer as independent torch.nn layers, outputs and states of the units next to each other."""
    n, directions, ends = rnn.num_units, rnn.num_directions, []
    for layer in range(rnn.num_layers):
        cells = slice(layer * directions, (layer + 1) * directions)
        states = [tuple(s[cells].chunk(n, -1)[unit].contiguous() for s in hx) for unit in range(n)]
        outputs, lasts = zip(*(torch_layer(rnn, [layer], unit, x, states[unit]) for unit in range(n)), strict=True)
        data = [output.data if isinstance(output, PackedSequence) else output for output in outputs]
        halves = [torch.cat([d.chunk(directions, -1)[i] for d in data], -1) for i in range(directions)]
        x = x._replace(data=torch.cat(halves, -1)) if isinstance(x, PackedSequence) else torch.cat(halves, -1)
        ends.append([torch.cat(parts, -1) for parts in zip(*lasts, strict=True)])
    return x, tuple(torch.cat(parts) for parts in zip(*ends, strict=True))


def run(rnn: RIM[Any], x: Any, hx: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...]]:
    output, state = rnn(x, hx if rnn.mode == "LSTM" else hx[0])
    return output, state if rnn.mode == "LSTM" else (state,)


def first_states(rnn: RIM[Any]) -> tuple[Tensor, ...]:
    sizes = [rnn.proj_size or rnn.hidden_size, rnn.hidden_size][: 2 if rnn.mode == "LSTM" else 1]
    return tuple(normal(len(rnn.cells), BATCH, size, seed=20 + i).tanh().requires_grad_() for i, size in enumerate(sizes))


def assert_torch_s_own(rnn: RIM[Any], theirs: Any, rows: list[Tensor], x: Any, hx: tuple[Tensor, ...]) -> None:
    """Outputs, states, and the gradients of input, states and every recurrent weight."""
    output, state = run(rnn, x, hx)
    expected, expected_state = theirs
    if isinstance(output, PackedSequence):
        for part, expected_part in zip(output[1:], expected[1:], strict=True):
            assert torch.equal(part, expected_part)
        output, expected = output.data, expected.data
    assert_same(output, expected)
    assert_same(state, expected_state)
    leaves = [*rows, *hx, *(p for cell in rnn.cells for p in cell.dynamics.parameters())]
    wanted = gradients([expected, *expected_state], leaves)
    assert all(g.abs().sum() > 0 for g in wanted)
    assert_same(gradients([output, *state], leaves), wanted)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_saturated_units_are_independent_torch_layers(name: str, bidirectional: bool, packed: bool) -> None:
    """Three units, two layers."""
    rnn = limit(name, 3, num_layers=2, bidirectional=bidirectional, heads=2)
    lengths = [2, 5, 3] if packed else [TIME] * BATCH
    rows = [normal(t, INPUT, seed=b).requires_grad_() for b, t in enumerate(lengths)]

    def batch() -> Any:
        return pack_sequence(rows, enforce_sorted=False) if packed else torch.stack(rows, dim=1)

    hx = first_states(rnn)
    with record(rnn) as records:
        run(rnn, batch(), hx)
    present = records[0].active.all(-1)
    assert present.sum() == sum(lengths) * len(rnn.cells)
    assert (records[0].input_attention[present] == 1.0).all()
    assert_torch_s_own(rnn, side_by_side(rnn, batch(), hx), rows, batch(), hx)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_one_saturated_unit_is_torch_s_own_layer(name: str, batch_first: bool, packed: bool) -> None:
    """n = 1, three layers, two directions: one nn.LSTM or nn.GRU with everything switched on."""
    rnn = limit(name, 1, num_layers=3, bidirectional=True, batch_first=batch_first)
    lengths = [2, 5, 3] if packed else [TIME] * BATCH
    rows = [normal(t, INPUT, seed=b).requires_grad_() for b, t in enumerate(lengths)]

    def batch() -> Any:
        return pack_sequence(rows, enforce_sorted=False) if packed else torch.stack(rows, dim=0 if batch_first else 1)

    hx = first_states(rnn)
    assert_torch_s_own(rnn, torch_layer(rnn, [0, 1, 2], 0, batch(), hx), rows, batch(), hx)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_one_saturated_unit_is_torch_s_own_cell(kind: str) -> None:
    cell = RIMCell(INPUT, UNIT, num_units=1, rnn_cell=kind, value_size_input=INPUT, num_comm_heads=0, dtype=torch.float64)
    saturate(strong(cell))
    theirs = getattr(nn, f"{kind}Cell")(INPUT, UNIT, dtype=torch.float64)
    theirs.load_state_dict(torch_weights(cell, 0))
    x, h, c = normal(BATCH, INPUT, seed=1), normal(BATCH, UNIT, seed=2).tanh(), normal(BATCH, UNIT, seed=3)
    state = (h, c) if kind == "LSTM" else h
    assert_same(cell(x, state), theirs(x, state))
    assert_same(cell(x), theirs(x))
