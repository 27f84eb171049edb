"""The layer is what it is made of: a loop of cells, a stack of layers, two directions, rows that run alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drawn import Inputs, assert_identical, assert_same, cell_options, gradients, inputs, normal, options, run_rows, strong
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence, unpack_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rim_rnn import RIM, RIMCell

FLOAT64: dict[str, Any] = {"dtype": torch.float64}
KINDS = [{"rnn_cell": "LSTM"}, {"rnn_cell": "GRU"}, {"rnn_cell": "LSTM", "proj_size": 4}]
kinds = pytest.mark.parametrize("kind", KINDS, ids=["LSTM", "GRU", "proj"])


def pair(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def unpair(state: tuple[Tensor, ...]) -> Any:
    return state if len(state) == 2 else state[0]


def sizes(rnn: RIM[Any]) -> list[int]:
    return [rnn.proj_size or rnn.hidden_size, rnn.hidden_size][: 2 if rnn.mode == "LSTM" else 1]


def some_states(rnn: RIM[Any], batch: int, seed: int = 50) -> tuple[Tensor, ...]:
    return tuple(normal(len(rnn.cells), batch, size, seed=seed + i).requires_grad_() for i, size in enumerate(sizes(rnn)))


def layer(kind: dict[str, Any], **extra: Any) -> RIM[Any]:
    """Three inputs, four units of two, three of them active."""
    return strong(RIM(3, 8, num_units=4, k=3, key_size_input=3, key_size_comm=3, value_size_comm=2, **kind, **extra, **FLOAT64))


# Time


@given(st.data())
def test_a_layer_is_a_loop_of_its_cell(data: st.DataObject) -> None:
    """Outputs, last state and every gradient."""
    drawn = data.draw(options(num_layers=1, bidirectional=False))
    rnn = strong(RIM(**drawn, **FLOAT64))
    cell = RIMCell(**cell_options(drawn), **FLOAT64)
    cell.load_state_dict(rnn.cells[0].state_dict())
    steps = data.draw(st.integers(1, 6), label="steps")
    x = normal(steps, 2, drawn["input_size"], seed=1).requires_grad_()
    hx = some_states(rnn, 2)

    output, last = rnn(x, unpair(hx))
    state = tuple(s[0] for s in hx)
    loop = []
    for x_t in x.unbind(0):
        state = pair(cell(x_t, unpair(state)))
        loop.append(state[0])
    assert_same(output, torch.stack(loop))
    assert_same(pair(last), tuple(s.unsqueeze(0) for s in state))
    ours = gradients([output, *pair(last)], [x, *hx, *rnn.parameters()])
    theirs = gradients([torch.stack(loop), *(s.unsqueeze(0) for s in state)], [x, *hx, *cell.parameters()])
    assert_same(ours, theirs)


@kinds
def test_a_sequence_in_two_halves_is_the_sequence(kind: dict[str, Any]) -> None:
    rnn = layer(kind, num_layers=2)
    x, hx = normal(7, 3, 3, seed=1), unpair(some_states(rnn, 3))
    whole, last = rnn(x, hx)
    first_half, middle = rnn(x[:4], hx)
    second_half, end = rnn(x[4:], middle)
    assert_same(torch.cat([first_half, second_half]), whole)
    assert_same(end, last)


@kinds
def test_no_state_is_a_state_of_zeros(kind: dict[str, Any]) -> None:
    rnn = layer(kind, num_layers=2, bidirectional=True)
    x = normal(4, 3, 3, seed=1)
    zeros = unpair(tuple(torch.zeros_like(s) for s in some_states(rnn, 3)))
    assert_identical(rnn(x), rnn(x, zeros))


@kinds
def test_the_last_output_of_the_last_layer_is_h_n(kind: dict[str, Any]) -> None:
    rnn = layer(kind, num_layers=2, bidirectional=True)
    output, state = rnn(normal(4, 3, 3, seed=1))
    size = sizes(rnn)[0]
    assert torch.equal(output[-1, :, :size], pair(state)[0][2])
    assert torch.equal(output[0, :, size:], pair(state)[0][3])


# Layers and directions


@given(st.data())
def test_a_stack_is_its_layers_one_after_the_other(data: st.DataObject) -> None:
    drawn = data.draw(options(num_layers=3))
    stack = strong(RIM(**drawn, **FLOAT64))
    given_inputs = data.draw(inputs(drawn))
    directions = stack.num_directions
    rows, state = run_rows(stack, given_inputs)

    below, ends = given_inputs.rows, []
    for i in range(3):
        width = below[0].size(-1)
        single = RIM(**(drawn | {"num_layers": 1, "input_size": width}), **FLOAT64)
        cells = slice(i * directions, (i + 1) * directions)
        single.cells = nn.ModuleList(stack.cells[cells])
        hx = None if given_inputs.state is None else tuple(s[cells] for s in given_inputs.state)
        below, end = run_rows(single, Inputs(below, hx))
        ends.append(end)
    expected_state = tuple(torch.cat(parts) for parts in zip(*ends, strict=True))
    assert_same(rows, below)
    assert_same(state, expected_state)
    leaves = [*given_inputs.leaves(), *stack.parameters()]
    assert_same(gradients([*rows, *state], leaves), gradients([*below, *expected_state], leaves))


@given(st.data())
def test_two_directions_are_one_and_one_on_the_flipped_rows(data: st.DataObject) -> None:
    """Each row is flipped within its own length; h_n of the reverse direction is at the row's first step."""
    drawn = data.draw(options(num_layers=1, bidirectional=True))
    both = strong(RIM(**drawn, **FLOAT64))
    given_inputs = data.draw(inputs(drawn))
    rows, state = run_rows(both, given_inputs)

    expected_rows, expected_states = [], []
    for direction, cell in enumerate(both.cells):
        single = RIM(**(drawn | {"bidirectional": False}), **FLOAT64)
        single.cells = nn.ModuleList([cell])
        hx = None if given_inputs.state is None else tuple(s[direction : direction + 1] for s in given_inputs.state)
        turn = (lambda row: row.flip(0)) if direction else (lambda row: row)
        outputs, end = run_rows(single, Inputs([turn(row) for row in given_inputs.rows], hx))
        expected_rows.append([turn(row) for row in outputs])
        expected_states.append(end)
    expected = [torch.cat(two, -1) for two in zip(*expected_rows, strict=True)]
    expected_state = tuple(torch.cat(two) for two in zip(*expected_states, strict=True))
    assert_same(rows, expected)
    assert_same(state, expected_state)
    leaves = [*given_inputs.leaves(), *both.parameters()]
    assert_same(gradients([*rows, *state], leaves), gradients([*expected, *expected_state], leaves))


# Packed rows


@given(st.data())
def test_packed_rows_run_as_if_each_were_alone(data: st.DataObject) -> None:
    drawn = data.draw(options())
    rnn = strong(RIM(**drawn, **FLOAT64))
    given_inputs = data.draw(inputs(drawn, st.lists(st.integers(1, 5), min_size=2, max_size=5)))
    hx = given_inputs.state
    output, state = rnn(pack_sequence(given_inputs.rows, enforce_sorted=False), None if hx is None else unpair(hx))
    rows, state = unpack_sequence(output), pair(state)

    alone, ends = [], []
    for b, row in enumerate(given_inputs.rows):
        out, end = rnn(row.unsqueeze(1), None if hx is None else unpair(tuple(s[:, b : b + 1] for s in hx)))
        alone.append(out.squeeze(1))
        ends.append(pair(end))
    expected_state = tuple(torch.cat(parts, dim=1) for parts in zip(*ends, strict=True))
    assert_same(rows, alone)
    assert_same(state, expected_state)
    leaves = [*given_inputs.leaves(), *rnn.parameters()]
    assert_same(gradients([*rows, *state], leaves), gradients([*alone, *expected_state], leaves))


@pytest.mark.parametrize("enforce_sorted", [True, False])
@kinds
def test_a_packed_sequence_comes_back_packed_in_the_same_order(kind: dict[str, Any], enforce_sorted: bool) -> None:
    rnn = layer(kind, bidirectional=True)
    lengths = [5, 4, 4, 1] if enforce_sorted else [4, 1, 5, 4]
    packed = pack_sequence([normal(t, 3, seed=t) for t in lengths], enforce_sorted=enforce_sorted)
    output, _ = rnn(packed)
    for ours, given_part in zip(output[1:], packed[1:], strict=True):
        assert (ours is None and given_part is None) or torch.equal(ours, given_part)
    assert output.data.shape == (sum(lengths), 2 * sizes(rnn)[0])


@kinds
def test_padding_is_never_read_and_gets_no_gradient(kind: dict[str, Any]) -> None:
    rnn = layer(kind, num_layers=2, bidirectional=True)
    lengths = torch.tensor([2, 5, 3])
    x = normal(5, 3, 3, seed=1)
    padding = torch.arange(5)[:, None] >= lengths
    x[padding] = float("nan")
    x.requires_grad_()
    output, state = rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
    padded, _ = pad_packed_sequence(output)
    (padded.sum() + sum(s.sum() for s in pair(state))).backward()
    assert padded.isfinite().all()
    assert (padded[padding] == 0).all()
    assert (x.grad[padding] == 0).all()
    assert (x.grad[~padding] != 0).any(-1).all()


# Forms of input


@kinds
def test_batch_first_swaps_input_and_output_and_leaves_the_states(kind: dict[str, Any]) -> None:
    rnn, swapped = (
        layer(kind, num_layers=2, bidirectional=True),
        layer(kind, num_layers=2, bidirectional=True, batch_first=True),
    )
    x, hx = normal(4, 3, 3, seed=1), unpair(some_states(rnn, 3))
    (output, state), (swapped_output, swapped_state) = rnn(x, hx), swapped(x.transpose(0, 1), hx)
    assert_identical(swapped_output, output.transpose(0, 1))
    assert_identical(swapped_state, state)
    packed = pack_sequence([x[:, 0], x[:2, 1]])
    assert_identical(swapped(packed)[0].data, rnn(packed)[0].data)


@kinds
def test_unbatched_input_is_a_batch_of_one(kind: dict[str, Any]) -> None:
    rnn = layer(kind, num_layers=2, bidirectional=True, batch_first=True)
    x, hx = normal(4, 3, seed=1), some_states(rnn, 1)
    output, state = rnn(x, unpair(tuple(s.squeeze(1) for s in hx)))
    expected, expected_state = rnn(x.unsqueeze(0), unpair(hx))
    assert_identical(output, expected.squeeze(0))
    assert_identical(pair(state), tuple(s.squeeze(1) for s in pair(expected_state)))
    cell = rnn.cells[0]
    assert_identical(pair(cell(x[0])), tuple(s.squeeze(0) for s in pair(cell(x[:1]))))


@kinds
def test_strides_don_t_matter_and_inputs_are_left_as_they_were(kind: dict[str, Any]) -> None:
    rnn = layer(kind, bidirectional=True)
    x, hx = normal(4, 3, 3, seed=1), tuple(s.detach() for s in some_states(rnn, 3))
    before = [t.clone() for t in (x, *hx)]
    expected = rnn(x, unpair(hx))
    assert_identical([x, *hx], before)

    def strided(t: Tensor) -> Tensor:
        return torch.stack([t, -t], dim=-1).transpose(0, 2).contiguous().transpose(0, 2)[..., 0]

    assert not strided(x).is_contiguous()
    assert_same(rnn(strided(x), unpair(tuple(strided(s) for s in hx))), expected)


@kinds
def test_outputs_and_states_can_be_changed_in_place_after_the_fact(kind: dict[str, Any]) -> None:
    """What a forward returned is the caller's: no later call and no input shares its memory."""
    rnn = layer(kind)
    x, hx = normal(1, 3, 3, seed=1), tuple(s.detach() for s in some_states(rnn, 3))
    with torch.no_grad():
        output, state = rnn(x, unpair(hx))
        kept = [t.clone() for t in (x, *hx)]
        for t in (output, *pair(state)):
            t.zero_()
        assert_identical([x, *hx], kept)


@kinds
@pytest.mark.parametrize("cell", [False, True], ids=["layer", "cell"])
@pytest.mark.parametrize("steps", [1, 2])
def test_every_parameter_has_a_gradient_of_any_result_alone(kind: dict[str, Any], steps: int, cell: bool) -> None:
    """Though it be zero, as that of the communication of ``c`` after one step: DistributedDataParallel waits for each."""
    rnn: Any = layer(kind, num_layers=2)
    module, x = (rnn.cells[0], normal(2, 3, seed=1)) if cell else (rnn, normal(steps, 2, 3, seed=1))
    parameters = list(module.parameters())
    for result in tree_leaves(module(x)):
        given = torch.autograd.grad(result.sum(), parameters, retain_graph=True, allow_unused=True)
        assert all(gradient is not None for gradient in given)


# Devices


class OnDevice(TorchDispatchMode):
    """Lets no operation see a tensor that is not on the device. Meta tensors have no values, so to ask for one is an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        elsewhere = [t.device for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor) and not t.is_meta]
        assert not elsewhere, f"{func} sees tensors on {elsewhere}"
        return result


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_device_never_waits_for_the_host(kind: dict[str, Any], packed: bool) -> None:
    """Neither forward nor backward: what it is to do never depends on a value, and no value goes there or comes back."""
    rnn = RIM(3, 8, 2, bidirectional=True, num_units=4, dropout=0.1, input_dropout=0.1, comm_dropout=0.1, device="meta", **kind)
    x = torch.empty(5, 3, 3, device="meta", requires_grad=True)
    sequence: Any = pack_padded_sequence(x, [5, 3, 2]) if packed else x
    with OnDevice():
        output, last = rnn(sequence)
        loss = sum(t.sum() for t in (output.data if packed else output, *pair(last)))
        loss.backward()
    assert x.grad is not None
    assert x.grad.is_meta
