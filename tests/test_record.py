"""record(): what it shows (against the paper in loops: test_equations.py), and that looking changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drawn import assert_identical, assert_same, normal, strong
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from rim_rnn import RIM, record

SMALL: dict[str, Any] = {"key_size_input": 3, "key_size_comm": 3, "value_size_comm": 2, "num_comm_heads": 2}


def layer(**extra: Any) -> RIM[Any]:
    return strong(RIM(3, 8, num_units=4, k=3, **(SMALL | extra)))


@pytest.mark.parametrize("rnn_cell", ["LSTM", "GRU"])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_recording_changes_no_bit_of_outputs_or_gradients(rnn_cell: str, p: float) -> None:
    """With dropout, too: recording draws no random numbers either."""
    dropouts = {"dropout": p, "input_dropout": p, "comm_dropout": p}
    rnn = layer(num_layers=2, bidirectional=True, rnn_cell=rnn_cell, num_input_heads=2, **dropouts)
    x = torch.randn(5, 3, 3)

    def run() -> list[Any]:
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        output, state = rnn(leaf)
        loss = output.square().sum() + sum(s.square().sum() for s in (state if isinstance(state, tuple) else (state,)))
        return [output, state, torch.get_rng_state(), *torch.autograd.grad(loss, [leaf, *rnn.parameters()])]

    before = run()
    with record(rnn) as records:
        during = run()
    assert len(records) == 1
    assert_identical(during, before)
    assert_identical(run(), before)


@pytest.mark.parametrize("autocast", [False, True])
def test_shapes_and_dtypes(autocast: bool) -> None:
    rnn, x = layer(num_layers=2, bidirectional=True), torch.randn(5, 6, 3)
    if not autocast:
        rnn, x = rnn.bfloat16(), x.bfloat16()
    with record(rnn) as records, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rnn(x)
    (seen,) = records
    assert seen._fields == ("active", "input_attention", "communication")
    assert seen.active.shape == (4, 5, 6, 4)
    assert seen.input_attention.shape == (4, 5, 6, 4)
    assert seen.communication.shape == (4, 5, 6, 2, 4, 4)
    assert seen.active.dtype is torch.bool
    assert seen.input_attention.dtype is torch.float32
    assert seen.communication.dtype is torch.float32


def test_batch_first_leaves_records_time_first() -> None:
    rnn, swapped = layer(bidirectional=True), layer(bidirectional=True, batch_first=True)
    x = torch.randn(5, 2, 3)
    with record(rnn) as records, record(swapped) as others:
        rnn(x)
        swapped(x.transpose(0, 1))
    assert_identical(others, records)


def test_unbatched_input_has_no_batch_dimension() -> None:
    rnn = layer(bidirectional=True)
    x = torch.randn(5, 3)
    with record(rnn) as records:
        rnn(x)
        rnn(x.unsqueeze(1))
    alone, batched = records
    assert alone.communication.shape == (2, 5, 2, 4, 4)
    assert_identical(alone, tuple(part.squeeze(2) for part in batched))


def test_no_heads_no_communication() -> None:
    rnn = layer(num_comm_heads=0)
    with record(rnn) as records:
        rnn(torch.randn(5, 2, 3))
    assert records[0].communication.shape == (1, 5, 2, 0, 4, 4)


def test_what_a_record_holds() -> None:
    """k winners; a winner's row of communication sums to 1, a silent reader's is zero; attention is a probability."""
    rnn = layer(num_layers=2)
    with record(rnn) as records:
        rnn(torch.randn(5, 6, 3))
    (seen,) = records
    assert (seen.active.sum(-1) == 3).all()
    assert ((seen.input_attention > 0) & (seen.input_attention < 1)).all()
    sums = seen.communication.sum(-1)
    expected = seen.active.unsqueeze(-2).expand(sums.shape).float()
    torch.testing.assert_close(sums, expected)
    silent = ~seen.active.unsqueeze(-2).expand(sums.shape)
    assert (seen.communication[silent] == 0).all()


def test_attention_is_averaged_over_heads() -> None:
    """Scores 0 and 40, whose attentions are 0.5 and 1."""
    rnn = layer(num_input_heads=2, key_size_input=1)
    attention = rnn.cells[0].input_attention
    with torch.no_grad():
        for projection in (attention.query, attention.key):
            projection.weight.zero_()
            projection.bias.copy_(torch.tensor([0.0, 40.0**0.5]))
    with record(rnn) as records:
        rnn(torch.randn(2, 3, 3))
    assert (records[0].input_attention == 0.75).all()


def test_attention_is_that_before_dropout() -> None:
    rnn = layer(input_dropout=0.5, comm_dropout=0.5)
    with record(rnn) as records:
        rnn(torch.randn(5, 6, 3))
    (seen,) = records
    assert ((seen.input_attention > 0) & (seen.input_attention < 1)).all()
    rows = seen.communication.sum(-1)[seen.active.unsqueeze(-2).expand(-1, -1, -1, 2, -1)]
    torch.testing.assert_close(rows, torch.ones_like(rows))


def test_time_is_the_input_s_own_in_both_directions() -> None:
    rnn = layer(bidirectional=True)
    rnn.cells[1].load_state_dict(rnn.cells[0].state_dict())
    x = torch.randn(6, 2, 3)
    with record(rnn) as records:
        rnn(x)
        rnn(x.flip(0))
    there, back = records
    for seen, mirrored in zip(there, back, strict=True):
        assert_same(seen[1], mirrored[0].flip(0), rtol=1e-5, atol=1e-6)
        assert not torch.equal(seen[1], seen[0])


def test_packed_rows_are_in_the_caller_s_order_and_padding_is_zero() -> None:
    rnn = layer(num_layers=2, bidirectional=True).double()
    rows = [normal(t, 3, seed=t) for t in (2, 5, 1, 3)]
    with record(rnn) as records:
        rnn(pack_sequence(rows, enforce_sorted=False))
        for row in rows:
            rnn(row)
    packed, *alone = records
    for b, (row, single) in enumerate(zip(rows, alone, strict=True)):
        for together, own in zip(packed, single, strict=True):
            assert together.shape[:3] == (4, 5, 4)
            assert_same(together[:, : len(row), b], own)
            assert (together[:, len(row) :, b] == 0).all()


def test_one_record_per_forward_and_none_after_the_block() -> None:
    rnn, x = layer(), torch.randn(2, 3, 3)
    with record(rnn) as records:
        assert records == []
        rnn(x)
        assert len(records) == 1
        rnn(x[:1])
        assert [seen.active.size(1) for seen in records] == [2, 1]
    rnn(x)
    assert len(records) == 2


def test_records_are_detached_and_stay_as_they_were() -> None:
    rnn, x = layer(), torch.randn(4, 3, 3)
    with record(rnn) as records:
        output, _ = rnn(x)
        kept = [part.clone() for part in records[0]]
        assert not any(part.requires_grad for part in records[0])
        with torch.no_grad():
            for parameter in rnn.parameters():
                parameter.zero_()
            output.zero_()
            rnn(x)
    assert_identical(list(records[0]), kept)


def test_an_exception_ends_the_recording() -> None:
    rnn, x = layer(), torch.randn(2, 3, 3)
    with pytest.raises(RuntimeError, match="input_size"), record(rnn) as records:
        rnn(torch.randn(2, 3, 4))
    rnn(x)
    assert records == []


def test_what_vmap_would_take_away_is_refused() -> None:
    rnn = layer()
    with record(rnn) as records, pytest.raises(RuntimeError, match=r"does not see into torch\.func\.vmap"):
        torch.func.vmap(rnn)(torch.randn(2, 5, 3, 3))
    assert records == []
    rnn(torch.randn(5, 3, 3))


def test_recordings_can_be_nested_and_know_only_their_own_layer() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lower, self.upper = layer(), RIM(8, 6, num_units=2, k=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.upper(self.lower(x)[0])[0]

    model = Model()
    with record(model.lower) as outer:
        with record(model.lower) as inner, record(model.upper) as upper, torch.no_grad():
            model(torch.randn(2, 3, 3))
        model(torch.randn(2, 3, 3))
    assert (len(outer), len(inner), len(upper)) == (2, 1, 1)
    assert_identical(list(outer[0]), list(inner[0]))
    assert upper[0].active.shape == (1, 2, 3, 2)


@pytest.mark.slow
def test_a_compiled_layer_records_the_same() -> None:
    rnn, x = layer(num_layers=2), torch.randn(2, 2, 3)
    compiled = torch.compile(rnn, backend="aot_eager")
    with torch.no_grad():
        expected = compiled(x)
        with record(rnn) as records:
            rnn(x)
        with record(compiled) as seen:
            output = compiled(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close([tuple(r) for r in seen], [tuple(r) for r in records])
