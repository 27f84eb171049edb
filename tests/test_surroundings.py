"""Whatever torch's defaults for new tensors are, a layer that is there computes the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from drawn import assert_identical, strong
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from rim_rnn import RIM, RIMCell, record

OPTIONS: dict[str, dict[str, Any]] = {
    "LSTM": {"bidirectional": True, "num_layers": 2},
    "GRU": {"rnn_cell": "GRU", "batch_first": True},
    "proj": {"proj_size": 4, "bidirectional": True},
    "dropout": {"input_dropout": 0.4, "comm_dropout": 0.4, "dropout": 0.3, "num_layers": 2},
    "bare": {"bias": False, "num_comm_heads": 0},
    "bfloat16": {"dtype": torch.bfloat16},
}


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS: dict[str, Callable[[], Any]] = {
    "set_default_device": default_device,
    "with torch.device": lambda: torch.device("meta"),
    "set_default_dtype": default_dtype,
}


def flat(nested: Any) -> list[Tensor]:
    return [nested] if isinstance(nested, Tensor) else [t for part in nested if part is not None for t in flat(part)]


def everything(rnn: Any, input: Any, hx: Any, leaves: list[Tensor]) -> list[Tensor]:
    """What calls return without gradients and with them, its gradients and theirs, and what a record shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        results = flat(rnn(input, hx))
    first = flat(rnn(input))
    loss = sum(t.square().sum() for t in first if t.is_floating_point())
    results += [*first, *torch.autograd.grad(loss, leaves, retain_graph=True)]
    given = flat(rnn(input, hx))
    gradients = torch.autograd.grad(sum(t.square().sum() for t in given if t.is_floating_point()), leaves, create_graph=True)
    results += [
        *gradients,
        *torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves, retain_graph=True, allow_unused=True),
    ]
    if isinstance(rnn, RIM):
        with record(rnn) as records:
            results += flat(rnn(input, hx))
        results += flat(records)
    return [t.detach() for t in results if t is not None]


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["padded", "packed", "unbatched", "cell"])
def test_defaults_for_new_tensors_change_nothing(kind: str, options: dict[str, Any], default: str) -> None:
    """Not of a layer on the CPU: neither a result, nor its dtype, nor its device."""
    sizes: dict[str, Any] = {"num_units": 4, "k": 3, "key_size_input": 4, "key_size_comm": 3, "value_size_comm": 2, **options}
    dtype = sizes.setdefault("dtype", torch.float32)
    alone = {
        name: value for name, value in sizes.items() if name not in ("dropout", "num_layers", "bidirectional", "batch_first")
    }
    rnn: Any = strong(RIMCell(3, 8, **alone) if kind == "cell" else RIM(3, 8, **sizes), scale=0.5)
    cell = rnn if kind == "cell" else rnn.cells[0]
    rows = () if kind == "unbatched" else (2,)
    shape = {"cell": (2, 3), "unbatched": (5, 3)}.get(kind, (2, 5, 3) if getattr(rnn, "batch_first", False) else (5, 2, 3))
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    lead = rows if kind == "cell" else (len(rnn.cells), *rows)
    state = tuple(torch.randn(*lead, size, dtype=dtype) for size in cell.state_sizes().values())
    hx = state if len(state) == 2 else state[0]
    input: Tensor | PackedSequence = x
    if kind == "packed":
        input = pack_sequence(
            [x[0, :3] if rnn.batch_first else x[:3, 0], x[1] if rnn.batch_first else x[:, 1]], enforce_sorted=False
        )
    leaves = [x, *rnn.parameters()]
    expected = everything(rnn, input, hx, leaves)
    with DEFAULTS[default]():
        found = everything(rnn, input, hx, leaves)
    assert [(t.dtype, t.device) for t in found] == [(t.dtype, t.device) for t in expected]
    assert_identical(found, expected)
