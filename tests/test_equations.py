"""The equations: cell and layer against the paper in plain loops, and what the contract adds to them."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext
from typing import Any

import oracle
import pytest
import torch
from drawn import (
    Inputs,
    assert_identical,
    assert_same,
    cell_options,
    gradients,
    inputs,
    normal,
    options,
    run_rows,
    spec,
    strong,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rim_rnn import RIM, RIMCell, record
from rim_rnn.input_attention import compete

SIZES: dict[str, Any] = {"key_size_input": 3, "value_size_input": 2, "key_size_comm": 2, "value_size_comm": 3}
SMALL: dict[str, Any] = {**SIZES, "num_comm_heads": 2}


def states(rnn_cell: str, *shape: int, seed: int = 1) -> Any:
    """A random hx for an LSTM or a GRU without projections."""
    h, c = normal(*shape, seed=seed), normal(*shape, seed=seed + 1)
    return (h, c) if rnn_cell == "LSTM" else h


# The oracle


@given(st.data())
def test_cell_is_the_paper_in_loops(data: st.DataObject) -> None:
    drawn = data.draw(options(num_layers=1, bidirectional=False))
    cell = strong(RIMCell(**cell_options(drawn), dtype=torch.float64))
    params = dict(cell.named_parameters())
    batch = data.draw(st.integers(1, 3), label="batch")
    x = normal(batch, drawn["input_size"], seed=1).requires_grad_()
    h = normal(batch, drawn["proj_size"] or drawn["hidden_size"], seed=2).requires_grad_()
    c = normal(batch, drawn["hidden_size"], seed=3).requires_grad_() if drawn["rnn_cell"] == "LSTM" else None

    state = cell(x, h) if c is None else cell(x, (h, c))
    expected_h, expected_c, _ = oracle.cell(params, spec(drawn), x, h, c)
    actual = (state,) if c is None else state
    expected = (expected_h,) if c is None else (expected_h, expected_c)
    assert_same(actual, expected)

    leaves = [*params.values(), x, h] + ([] if c is None else [c])
    assert_same(gradients(actual, leaves), gradients(expected, leaves))


@given(st.data())
def test_layer_is_the_paper_in_loops(data: st.DataObject) -> None:
    """Sequences, packed or not, both directions, stacks: outputs, last states, records and every gradient."""
    drawn = data.draw(options())
    rnn = strong(RIM(**drawn, batch_first=data.draw(st.booleans(), label="batch_first"), dtype=torch.float64))
    params = dict(rnn.named_parameters())
    given_inputs = data.draw(inputs(drawn))

    rows, state = run_rows(rnn, given_inputs)
    expected = oracle.rim(params, spec(drawn), given_inputs.rows, *(given_inputs.state or ()))
    expected_state = (expected.h_n,) if expected.c_n is None else (expected.h_n, expected.c_n)
    assert_same(rows, expected.rows)
    assert_same(state, expected_state)

    with record(rnn) as records:
        run_rows(rnn, given_inputs)
    (seen,) = records
    assert torch.equal(seen.active, expected.active)
    assert_same(seen.input_attention, expected.input_attention)
    assert_same(seen.communication, expected.communication)

    leaves = [*params.values(), *given_inputs.leaves()]
    assert_same(gradients([*rows, *state], leaves), gradients([*expected.rows, *expected_state], leaves))


@pytest.mark.parametrize("rnn_cell", ["LSTM", "GRU"])
def test_default_sizes_are_the_paper_in_loops(rnn_cell: str) -> None:
    """Nothing but sizes and defaults: 4 units of 128 / 4, 3 of them active, 4 heads; freshly initialised."""
    rnn = RIM(5, 24, rnn_cell=rnn_cell, dtype=torch.float64)
    assert (rnn.num_units, rnn.k) == (6, 4)
    rows = [normal(3, 5, seed=b).requires_grad_() for b in range(2)]
    output, state = run_rows(rnn, Inputs(rows, None))
    params = dict(rnn.named_parameters())
    expected = oracle.rim(params, oracle.Spec(k=4, rnn_cell=rnn_cell), rows)
    assert_same(output, expected.rows)
    assert_same(state[0], expected.h_n)
    leaves = [*params.values(), *rows]
    assert_same(gradients(output, leaves), gradients(expected.rows, leaves))


# Derivatives against finite differences


@pytest.mark.parametrize("extra", [{"rnn_cell": "LSTM"}, {"rnn_cell": "GRU"}, {"proj_size": 3}], ids=["LSTM", "GRU", "proj"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(extra: dict[str, Any], dropout: float) -> None:
    """Input, states and all parameters at once, two of three units active, with and without (fixed) dropout."""
    rnn = RIM(2, 6, num_units=3, k=2, **SMALL, **extra, input_dropout=dropout, comm_dropout=dropout, dtype=torch.float64)
    strong(rnn, seed=3)
    names = [name for name, _ in rnn.named_parameters()]
    x = normal(3, 2, 2, seed=5).requires_grad_()
    sizes = [extra.get("proj_size", 6), 6] if rnn.mode == "LSTM" else [6]
    hx = [normal(1, 2, size, seed=6 + i).requires_grad_() for i, size in enumerate(sizes)]

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(7)
        hx, parameters = rest[: len(sizes)], dict(zip(names, rest[len(sizes) :], strict=True))
        state = hx if rnn.mode == "LSTM" else hx[0]
        output, last = torch.func.functional_call(rnn, parameters, (x, tuple(state) if rnn.mode == "LSTM" else state))
        return (output, *last) if rnn.mode == "LSTM" else (output, last)

    arguments = (x, *hx, *(p.detach().requires_grad_() for p in rnn.parameters()))
    assert torch.autograd.gradcheck(run, arguments, fast_mode=True)


@pytest.mark.parametrize("rnn_cell", ["LSTM", "GRU"])
def test_every_parameter_gets_a_gradient(rnn_cell: str) -> None:
    rnn = RIM(5, 24, 2, bidirectional=True, rnn_cell=rnn_cell)
    output, _ = rnn(torch.randn(6, 8, 5))
    output.square().sum().backward()
    without = [name for name, p in rnn.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


# Input attention


def bidder(bids: Any, k: int, heads: int = 1, dtype: torch.dtype = torch.float64, **extra: Any) -> RIM[Any]:
    """A layer whose units bid what `bids` (per unit, or per unit and head) says, at every step and for every input."""
    bids = torch.as_tensor(bids, dtype=dtype).reshape(-1, heads)
    n = len(bids)
    sizes = SMALL | {"key_size_input": 1} | extra
    rnn = strong(RIM(2, 2 * n, num_units=n, k=k, num_input_heads=heads, **sizes, dtype=dtype))
    attention = rnn.cells[0].input_attention
    with torch.no_grad():
        attention.query.weight.zero_()
        attention.query.bias.copy_(bids)
        attention.key.weight.zero_()
        attention.key.bias.fill_(1)
    return rnn


def winners_of(rnn: RIM[Any], x: Tensor, hx: Any = None) -> Tensor:
    """Which units won, (T, N, n)."""
    with record(rnn) as records, torch.no_grad():
        rnn(x, hx)
    return records[0].active[0]


def test_a_black_pixel_is_not_the_absence_of_input() -> None:
    """At x = 0 a unit still reads the value's bias; one that turns away altogether reads exactly nothing, no bias either."""
    rnn = bidder([50.0, -800.0], k=2, num_comm_heads=0)
    x, hx = torch.zeros(1, 1, 2, dtype=torch.float64), states("LSTM", 1, 1, 4)
    before, _ = rnn(x, hx)
    with torch.no_grad():
        rnn.cells[0].input_attention.value.bias.add_(1)
    after, _ = rnn(x, hx)
    assert (after != before).view(2, 2).all(-1).tolist() == [True, False]
    assert torch.equal(after[..., 2:], before[..., 2:])


# Competition


def test_without_biases_and_states_all_bids_tie_and_the_lowest_units_win() -> None:
    rnn = strong(RIM(3, 12, num_units=6, k=4, bias=False, **SMALL))
    active = winners_of(rnn, torch.randn(1, 5, 3))
    assert active.tolist() == [[[True] * 4 + [False] * 2] * 5]


@pytest.mark.parametrize("batch", [1, 5, 8, 33])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_identical_units_tie_and_the_lowest_win(batch: int, heads: int, dtype: torch.dtype) -> None:
    """Seven units with the same parameters and states: the same bid in the last bit, whatever it is."""
    rnn = strong(RIM(3, 35, num_units=7, k=3, num_input_heads=heads, key_size_input=13, dtype=dtype))
    with torch.no_grad():
        for name, parameter in rnn.named_parameters():
            if "input_attention.key" not in name and "input_attention.value" not in name:
                parameter.copy_(parameter[:1].expand_as(parameter).clone())
    h = normal(1, batch, 5, seed=1, dtype=dtype).repeat(1, 1, 7)
    active = winners_of(rnn, normal(1, batch, 3, seed=2, dtype=dtype), (h, h.clone()))
    assert active.tolist() == [[[True] * 3 + [False] * 4] * batch]


special = st.sampled_from([float("nan"), float("-inf"), float("inf"), -1.0, -0.0, 0.0, 1.0, 1 + 2**-20])


@given(st.lists(special, min_size=1, max_size=7), st.data(), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=100)
def test_the_k_highest_bids_win(bids: list[float], data: st.DataObject, dtype: torch.dtype) -> None:
    """Ties to the lowest unit, NaN below -inf, exactly k whatever the bids are."""
    k = data.draw(st.integers(1, len(bids)), label="k")
    active = winners_of(bidder(bids, k, dtype=dtype), torch.zeros(2, 3, 2, dtype=dtype))
    expected = torch.zeros(len(bids), dtype=torch.bool)
    expected[oracle.winners(bids, k)] = True
    assert torch.equal(active[0], expected.expand(3, -1))
    assert (active.sum(-1) == k).all()


def test_a_bid_is_the_mean_of_the_scores_not_of_the_attentions() -> None:
    """The sigmoids of these scores average to 0.50, 0.48, 0.50: ranked by attention, units 0 and 2 would win."""
    scores = [[9.0, -9.5], [-0.1, -0.1], [40.0, -39.0]]
    active = winners_of(bidder(scores, k=2, heads=2), torch.zeros(1, 1, 2, dtype=torch.float64))
    assert active.tolist() == [[[False, True, True]]]


def test_bids_beyond_the_saturation_of_the_sigmoid_still_rank() -> None:
    """In float64 sigmoid(50) == sigmoid(60) == 1: ranked by attention, unit 0 would win."""
    active = winners_of(bidder([50.0, 60.0, 55.0], k=2), torch.zeros(1, 1, 2, dtype=torch.float64))
    assert active.tolist() == [[[False, True, True]]]


@pytest.mark.parametrize("rnn_cell", ["LSTM", "GRU"])
def test_winners_do_not_depend_on_how_a_batch_is_split(rnn_cell: str) -> None:
    rnn = RIM(3, 24, bidirectional=True, rnn_cell=rnn_cell)
    x = torch.randn(7, 9, 3)
    with torch.no_grad():
        unrecorded, _ = rnn(x)
        with record(rnn) as records:
            rnn(x)
        (whole,) = records
        for size in (1, 2, 4, 8):
            parts = x.split(size, dim=1)
            torch.testing.assert_close(torch.cat([rnn(part)[0] for part in parts], dim=1), unrecorded)
            with record(rnn) as records:
                torch.testing.assert_close(torch.cat([rnn(part)[0] for part in parts], dim=1), unrecorded)
            assert torch.equal(torch.cat([seen.active for seen in records], dim=2), whole.active), f"split into {size}"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 3e38])
@pytest.mark.parametrize(("rnn_cell", "where"), [("LSTM", "x"), ("LSTM", "h"), ("LSTM", "c"), ("GRU", "x"), ("GRU", "h")])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_bad_row_touches_no_other(bad: float, rnn_cell: str, where: str, bidirectional: bool, recorded: bool) -> None:
    """NaN, infinity or overflow in row 1: outputs, states, records and input gradients of the others stay bit for bit."""
    rnn = RIM(3, 12, bidirectional=bidirectional, num_units=4, k=2, rnn_cell=rnn_cell, **SMALL)
    cells = rnn.num_layers * rnn.num_directions
    x, h, c = torch.randn(4, 3, 3), torch.randn(cells, 3, 12), torch.randn(cells, 3, 12)

    def run(spoil: bool) -> list[Tensor]:
        leaves = [t.clone() for t in (x, h, c)]
        if spoil:
            leaves["xhc".index(where)][:, 1] = bad
        leaves = [t.requires_grad_() for t in leaves]
        with record(rnn) if recorded else nullcontext([]) as records:
            output, state = rnn(leaves[0], (leaves[1], leaves[2]) if rnn.mode == "LSTM" else leaves[1])
        results = [output, *(state if rnn.mode == "LSTM" else [state])]
        others = [t[:, [0, 2]] for t in results]
        sum(t.square().sum() for t in others).backward()
        grads = [t.grad[:, [0, 2]] for t in leaves if t.grad is not None]
        return [t.detach() for t in others] + grads + [part[:, :, [0, 2]] for seen in records for part in seen]

    assert_identical(run(spoil=True), run(spoil=False))


def test_exactly_k_win_even_in_a_row_of_nan() -> None:
    rnn = RIM(3, 24, num_units=6, k=4)
    x = torch.randn(5, 3, 3)
    x[2:, 1] = float("nan")
    active = winners_of(rnn, x)
    assert (active.sum(-1) == 4).all()
    assert active[2, 1].tolist() == [True] * 4 + [False] * 2


def test_an_exported_competition_is_the_same() -> None:
    """Bids that tie, that are infinite, that are NaN: ranks in the graph, the order of a stable sort outside."""

    class Competition(torch.nn.Module):
        def forward(self, score: Tensor) -> Tensor:
            return compete(score, 3)

    values = torch.tensor([0.0, 1.0, -1.0, math.inf, -math.inf, math.nan])
    score = values[torch.randint(6, (5, 400, 1), generator=torch.Generator().manual_seed(0))]
    exported = torch.export.export(Competition(), (score,)).module()
    assert torch.equal(exported(score), compete(score, 3))
    assert exported(score).sum(0).unique().tolist() == [3]


# Silent units


@pytest.mark.parametrize("rnn_cell", ["LSTM", "GRU"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_silent_units_keep_their_state_bit_for_bit(rnn_cell: str, dtype: torch.dtype) -> None:
    rnn = bidder([0.0, 3.0, 1.0, 2.0], k=2, rnn_cell=rnn_cell, dtype=dtype)
    x = torch.randn(3, 5, 2, dtype=dtype)
    hx = states(rnn_cell, 1, 5, 8)
    hx = tuple(s.to(dtype) for s in hx) if rnn_cell == "LSTM" else hx.to(dtype)
    _, last = rnn(x, hx)
    befores, afters = (hx, last) if rnn_cell == "LSTM" else ((hx,), (last,))
    for before, after in zip(befores, afters, strict=True):
        before, after = before.view(5, 4, 2), after.view(5, 4, 2)
        assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
        assert (after[:, [1, 3]] != before[:, [1, 3]]).any(-1).all()


@pytest.mark.parametrize("rnn_cell", ["LSTM", "GRU"])
def test_gradient_flows_through_silent_units_as_through_an_identity(rnn_cell: str) -> None:
    """The Jacobian of a silent unit's state over three steps is exactly the identity, and zero towards the others."""
    rnn = bidder([0.0, 3.0, 1.0], k=1, rnn_cell=rnn_cell)
    x, hx = normal(3, 2, seed=1), states(rnn_cell, 1, 6)

    def last(*hx: Tensor) -> Any:
        return rnn(x, hx if rnn_cell == "LSTM" else hx[0])[1]

    jacobian = torch.autograd.functional.jacobian(last, hx)
    blocks = [jacobian[i][i] for i in range(2)] if rnn_cell == "LSTM" else [jacobian]
    for block in blocks:
        block = block.reshape(6, 6)
        for silent in (slice(0, 2), slice(4, 6)):
            expected = torch.eye(6, dtype=torch.float64)[silent]
            assert torch.equal(block[silent], expected)
        assert (block[2:4] != 0).any()


def test_winners_read_silent_units_and_silent_units_learn_from_it() -> None:
    """Gradient reaches the communication keys and values of units that never win."""
    rnn = bidder([0.0, 3.0, 1.0], k=1)
    output, _ = rnn(normal(3, 2, 2, seed=1), states("LSTM", 1, 2, 6))
    output.view(3, 2, 3, 2)[:, :, 1].sum().backward()
    for stage in (rnn.cells[0].communication.key, rnn.cells[0].communication.value):
        assert (stage.weight.grad.abs().sum((1, 2)) > 0).all()
    query = rnn.cells[0].communication.query.weight.grad
    assert query[1].abs().sum() > 0
    assert query[[0, 2]].abs().sum() == 0


# Communication


def test_communication_leaves_c_alone() -> None:
    """c after a step doesn't depend on any communication parameter."""
    cell = strong(RIMCell(2, 6, num_units=3, k=2, **SMALL))
    h, c = cell(torch.randn(4, 2), (torch.randn(4, 6), torch.randn(4, 6)))
    parameters = list(cell.communication.parameters())
    grads = torch.autograd.grad(c.sum(), parameters, retain_graph=True, allow_unused=True)
    assert all(g is None or not g.any() for g in grads)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(h.sum(), parameters))


def test_a_single_unit_attends_to_itself() -> None:
    """n = 1: the softmax over one unit is 1, so h = h~ + tanh(h~ W^v W^o)."""
    cell = strong(RIMCell(2, 3, num_units=1, dtype=torch.float64, **SMALL))
    silent = RIMCell(2, 3, num_units=1, dtype=torch.float64, **(SMALL | {"num_comm_heads": 0}))
    silent.load_state_dict({k: v for k, v in cell.state_dict().items() if not k.startswith("communication")})
    x, state = normal(4, 2, seed=1), (normal(4, 3, seed=2), normal(4, 3, seed=3))
    tilde, c = silent(x, state)
    h, same_c = cell(x, state)
    values, output = cell.communication.value.weight[0], cell.communication.output.weight[0]
    assert_same(h, tilde + torch.tanh(tilde @ values @ output))
    assert_same(same_c, c)


# Precision of the bids


def bids_of(rnn: RIM[Any], x: Tensor, h: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The bids of one step from parameters, inputs and states as they are, computed in `dtype`, (N, n)."""
    p = {name.removeprefix("cells.0.input_attention."): p.detach().to(dtype) for name, p in rnn.named_parameters()}
    units = h.to(dtype).view(len(h), rnn.num_units, -1)
    query = torch.einsum("bjp,jpd->bjd", units, p["query.weight"]) + p["query.bias"]
    key = x.to(dtype) @ p["key.weight"].T + p["key.bias"]
    return (query * key[:, None]).sum(-1) / rnn.key_size_input**0.5 / rnn.num_input_heads


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["bfloat16", "float16", "autocast bfloat16", "autocast float16", "float32"])
@pytest.mark.parametrize("heads", [1, 2])
def test_low_precision_does_not_change_who_wins(mode: str, heads: int) -> None:
    """Winners are those of the bids in float64 from the same rounded parameters, inputs and states."""
    autocast, dtype = mode.startswith("autocast"), getattr(torch, mode.split()[-1])
    stored = torch.float32 if autocast else dtype
    rnn = RIM(8, 48, num_units=6, k=3, num_input_heads=heads, key_size_input=16, dtype=stored)
    x, h, c = (normal(1, 8000, size, seed=i, dtype=stored) for i, size in enumerate((8, 48, 48)))
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        active = winners_of(rnn, x, (h, c))[0]

    def winners(bids: Tensor) -> Tensor:
        return torch.zeros_like(bids, dtype=torch.bool).scatter(1, bids.topk(3).indices, True)

    bids = bids_of(rnn, x[0], h[0])
    ranked = bids.sort(descending=True).values
    clear = ranked[:, 2] - ranked[:, 3] > 2e-6
    assert clear.sum() > 7960
    in_low_precision = winners(bids_of(rnn, x[0], h[0], torch.float16 if dtype is torch.float32 else dtype))
    assert (in_low_precision != winners(bids))[clear].any(), "no bids here are close enough for precision to matter"
    assert torch.equal(active[clear], winners(bids)[clear])


# Dropout


def matches(actual: Tensor, candidates: list[Tensor]) -> list[int]:
    return [i for i, candidate in enumerate(candidates) if torch.allclose(actual, candidate, rtol=1e-9, atol=1e-12)]


def dropped(p: float, bits: int) -> list[Tensor]:
    """Every outcome of `bits` draws: 0 or 1 / (1 - p) each."""
    return [torch.tensor(outcome, dtype=torch.float64) / (1 - p) for outcome in itertools.product([0.0, 1.0], repeat=bits)]


def assert_fair(kept: Tensor, p: float) -> None:
    """Within four standard deviations of 1 - p, in all and per column, and no two columns the same."""
    columns = kept.reshape(-1, kept.size(-1)).double()
    spread = 4 * (p * (1 - p) / len(columns)) ** 0.5
    assert ((columns.mean(0) - (1 - p)).abs() < spread).all()
    assert len(columns.t().unique(dim=0)) == columns.size(1)


def test_input_dropout_scales_one_draw_per_row_step_unit_and_head() -> None:
    """Every unit's new state is that of exactly one outcome of its heads' draws, and outcomes are as frequent as p says."""
    p, heads, n = 0.25, 2, 3
    rnn = RIM(2, 6, num_units=n, k=n, rnn_cell="GRU", num_input_heads=heads, num_comm_heads=0, input_dropout=p, **SIZES)
    strong(rnn.double())
    params = {name.removeprefix("cells.0."): q.detach() for name, q in rnn.named_parameters()}
    spec_ = oracle.Spec(k=n, rnn_cell="GRU", num_input_heads=heads, num_comm_heads=0)
    x, h_0 = normal(2, 40, 2, seed=1), normal(40, 6, seed=2)
    with torch.no_grad():
        output, _ = rnn(x, h_0.unsqueeze(0))
    before = torch.stack([h_0, output[0]])
    outcomes = dropped(p, heads)
    kept = torch.zeros(2, 40, n, heads)
    for t, b in itertools.product(range(2), range(40)):
        runs = [oracle.step(params, spec_, x[t, b], before[t, b], None, o.expand(n, heads)).h.view(n, 2) for o in outcomes]
        for j in range(n):
            (which,) = matches(output[t, b].view(n, 2)[j], [run[j] for run in runs])
            kept[t, b, j] = outcomes[which] > 0
    assert_fair(kept.transpose(0, 1).flatten(1), p)


def test_comm_dropout_scales_one_draw_per_row_head_reader_and_unit_read() -> None:
    p, heads, n = 0.25, 2, 2
    rnn = RIM(2, 4, num_units=n, k=n, rnn_cell="GRU", num_comm_heads=heads, comm_dropout=p, comm_bounded=False, **SIZES)
    strong(rnn.double())
    params = {name.removeprefix("cells.0."): q.detach() for name, q in rnn.named_parameters()}
    spec_ = oracle.Spec(k=n, rnn_cell="GRU", num_comm_heads=heads, comm_bounded=False)
    x, h_0 = normal(1, 60, 2, seed=1), normal(60, 4, seed=2)
    with torch.no_grad():
        output, _ = rnn(x, h_0.unsqueeze(0))
    outcomes = [o.view(heads, 1, n) for o in dropped(p, heads * n)]
    kept = torch.zeros(60, n, heads, n)
    for b in range(60):
        runs = [oracle.step(params, spec_, x[0, b], h_0[b], None, None, o.expand(heads, n, n)).h.view(n, 2) for o in outcomes]
        for j in range(n):
            (which,) = matches(output[0, b].view(n, 2)[j], [run[j] for run in runs])
            kept[b, j] = outcomes[which].view(heads, n) > 0
    assert_fair(kept.flatten(1), p)


def test_dropout_between_layers_scales_one_draw_per_feature() -> None:
    """Layer 2 runs on layer 1's outputs, each 0 or doubled; layer 2's own outputs are not dropped."""
    p = 0.5
    rnn = RIM(2, 2, 2, dropout=p, num_units=2, k=2, rnn_cell="GRU", num_comm_heads=1, **SIZES)
    strong(rnn.double())
    x = normal(1, 80, 2, seed=1)
    with torch.no_grad():
        output, h_n = rnn(x)
    params = {name.removeprefix("cells.1."): q.detach() for name, q in rnn.named_parameters() if name.startswith("cells.1.")}
    spec_ = oracle.Spec(k=2, rnn_cell="GRU", num_comm_heads=1)
    outcomes = dropped(p, 2)
    kept = torch.zeros(80, 2)
    for b in range(80):
        runs = [oracle.step(params, spec_, h_n[0, b] * o, torch.zeros(2, dtype=torch.float64)).h for o in outcomes]
        (which,) = matches(output[0, b], runs)
        kept[b] = outcomes[which] > 0
    assert_fair(kept, p)


def test_dropout_does_not_touch_the_competition() -> None:
    """The first step's winners and recorded attentions in train mode are those of eval mode."""
    rnn = strong(RIM(2, 12, num_units=4, k=2, input_dropout=0.5, comm_dropout=0.5))
    x = torch.randn(1, 30, 2)
    with record(rnn) as records:
        rnn.train()(x)
        rnn.eval()(x)
    assert torch.equal(records[0].active, records[1].active)
    assert torch.equal(records[0].input_attention, records[1].input_attention)


@pytest.mark.parametrize("dropouts", [{}, {"dropout": 0.5, "input_dropout": 0.5, "comm_dropout": 0.5}], ids=["none", "all"])
def test_eval_mode_is_deterministic_and_ignores_dropout(dropouts: dict[str, float]) -> None:
    rnn = RIM(3, 12, 2, num_units=4, **dropouts).eval()
    plain = RIM(3, 12, 2, num_units=4)
    plain.load_state_dict(rnn.state_dict())
    x, before = torch.randn(4, 2, 3), torch.get_rng_state()
    assert_identical(rnn(x), plain(x))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rnn_cell", ["LSTM", "GRU"])
def test_defaults_draw_no_random_numbers_in_train_mode(rnn_cell: str) -> None:
    rnn = RIM(3, 12, 2, bidirectional=True, rnn_cell=rnn_cell).train()
    x, before = torch.randn(4, 2, 3, requires_grad=True), torch.get_rng_state()
    once, again = rnn(x), rnn(x)
    once[0].sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert_identical(once, again)


def test_certain_dropout_leaves_no_input() -> None:
    """input_dropout=1: nothing is read, so the outputs don't depend on the values' weights, and stay finite."""
    rnn = RIM(3, 12, num_units=4, k=4, input_dropout=1.0)
    x = torch.randn(2, 3, 3)
    output, _ = rnn(x)
    with torch.no_grad():
        rnn.cells[0].input_attention.value.weight.add_(1)
    assert_identical(rnn(x)[0], output)
    assert output.isfinite().all()
