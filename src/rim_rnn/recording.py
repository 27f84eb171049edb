"""Looking inside: which units won, what they attended to, without changing one bit of any output or gradient."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Trace(NamedTuple):
    """What one step of one cell did, detached, for the ``N`` rows that were present."""

    active: Tensor  # (n, N), bool
    input_attention: Tensor  # (n, N, H), before dropout
    communication: Tensor  # (N, heads, n readers, n read), before dropout


class Record(NamedTuple):
    """What one forward of a :class:`~rim_rnn.RIM` did.

    Every tensor is detached and indexed ``[layer * num_directions + direction, time, batch, ...]``, whatever ``batch_first``
    says. Time is the input's own order, also for the reverse direction; padding of packed input is inactive and zero; the
    batch is in the caller's order; an unbatched input has no batch dimension. Attentions are in at least float32.

    Attributes:
        active: Whether a unit won, bool, ``(..., num_units)``; ``k`` of them at every step that is not padding.
        input_attention: ``a_input``, how much of its read came from the input and not from the null row, before dropout and
            averaged over heads, ``(..., num_units)``. Silent units have one too: it is what they bid.
        communication: How much each reader took from each unit, before dropout, ``(..., num_comm_heads, num_units readers,
            num_units read)``. A winner's row sums to 1, a silent reader's is zero.
    """

    active: Tensor
    input_attention: Tensor
    communication: Tensor


@contextmanager
def record(rnn: nn.Module) -> Iterator[list[Record]]:
    """Record every forward of a :class:`~rim_rnn.RIM` inside the ``with`` block.

    Outputs, states and gradients stay the same bit for bit.

    Args:
        rnn: The layer, or the same layer under :func:`torch.compile`.

    Yields:
        A list to which each forward appends one :class:`~rim_rnn.recording.Record`, with ``active`` and ``input_attention`` of
        shape ``(num_layers * num_directions, time, batch, num_units)`` and ``communication`` of shape ``(num_layers *
        num_directions, time, batch, num_comm_heads, num_units, num_units)``. The list outlives the block.

    Raises:
        TypeError: ``rnn`` is not a :class:`~rim_rnn.RIM`.
        RuntimeError: In a forward inside: one under ``torch.func.vmap``, or through a cell whose own ``forward`` does not
            go through that of :class:`~rim_rnn.RIMCell`.

    Example:
        >>> import torch
        >>> from rim_rnn import RIM, record
        >>> rnn = RIM(8, 30, num_units=5, k=2)
        >>> with record(rnn) as records:
        ...     output, _ = rnn(torch.randn(7, 3, 8))
        >>> records[0].active.shape
        torch.Size([1, 7, 3, 5])
        >>> bool((records[0].active.sum(-1) == 2).all())
        True

    The attentions are those of equations 2 and 5 of Goyal et al., 2021, *Recurrent Independent Mechanisms*.
    """
    rnn = getattr(rnn, "_orig_mod", rnn)
    if not isinstance(rnn, nn.Module) or not hasattr(rnn, "_recorders"):
        raise TypeError(
            f"record() expects a rim_rnn.RIM, got: {type(rnn).__name__}; pass the layer, for example record(model.rnn)"
        )
    records: list[Record] = []
    layer: Any = rnn
    layer._recorders = [*layer._recorders, records]
    try:
        yield records
    finally:
        layer._recorders = [recorder for recorder in layer._recorders if recorder is not records]


def assemble(traces: list[list[Trace]], unsorted_indices: Tensor | None, batched: bool) -> Record:
    """One :class:`Record` from the steps of each cell, in the input's order of time."""
    if not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(traces[0][0].active):
        raise RuntimeError("record() does not see into torch.func.vmap: what is recorded there ends with it")
    batch = max(step.active.size(1) for step in traces[0])

    def padded(values: list[list[Tensor]]) -> Tensor:
        rows = [[F.pad(v, [0, 0] * (v.dim() - 1) + [0, batch - v.size(0)]) for v in cell] for cell in values]
        whole = torch.stack([torch.stack(cell) for cell in rows])
        if unsorted_indices is not None:
            whole = whole.index_select(2, unsorted_indices)
        return whole if batched else whole.squeeze(2)

    def heard(step: Trace) -> Tensor:
        readers = step.active.t()[:, None, :, None]
        return torch.where(readers, step.communication.to(step.input_attention.dtype), 0.0)

    return Record(
        active=padded([[step.active.t() for step in cell] for cell in traces]),
        input_attention=padded([[step.input_attention.mean(-1).t() for step in cell] for cell in traces]),
        communication=padded([[heard(step) for step in cell] for cell in traces]),
    )
