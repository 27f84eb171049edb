"""How a call lies: packed or not, sorted or not, with a batch or without, batch or time first, in which dtype."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rim_rnn.dynamics import State
from rim_rnn.surroundings import autocast_dtype, autocast_result_dtype, check_alike, held_to_example, numbers


class Layout:
    """The layout of one call, which a layer's cells know nothing of: :meth:`pack` undoes what the other methods do.

    Args:
        input: What the layer was given.
        batch_first: Whether a batch of sequences that is not packed is ``(batch, seq, feature)``.

    Attributes:
        packed: Whether the input is packed; what follows is ``None`` where it is not.
        batch_sizes, sorted_indices, unsorted_indices: As a :class:`torch.nn.utils.rnn.PackedSequence` has them.
        sizes: Rows present at each step.
    """

    packed = False
    batched = True
    batch_first = False
    batch_sizes: Tensor | None = None
    sorted_indices: Tensor | None = None
    unsorted_indices: Tensor | None = None
    sizes: list[int] | None = None

    def __init__(self, input: Tensor | PackedSequence, batch_first: bool) -> None:
        if isinstance(input, PackedSequence):
            self.packed = True
            _, self.batch_sizes, self.sorted_indices, self.unsorted_indices = input
            self.sizes = numbers(self.batch_sizes)
            if not self.sizes or any(later > earlier for earlier, later in pairwise(self.sizes)):
                raise RuntimeError(f"batch_sizes of a PackedSequence should be there and never grow, got {self.sizes}")
        elif input.dim() == 3:
            self.batch_first = batch_first
        else:
            self.batched = False

    def unpack(self, input: Tensor | PackedSequence, weight: Tensor) -> Tensor:
        """The input as ``(T, N, input_size)``, or packed ``(sum(sizes), input_size)``, of the dtype of the ``weight``."""
        if isinstance(input, PackedSequence):
            x, self.batch = input.data, self.sizes[0]  # type: ignore[index]
        else:
            x = input
            if not self.batched:
                x = x.unsqueeze(1)
            elif self.batch_first:
                x = x.transpose(0, 1).contiguous()  # a copy: the input may be changed in place before backward, as nn.LSTM's
            self.batch = x.size(1)
        self.dtype = x.dtype
        return held_to_example(check_alike("input", x, weight), self.batch_sizes, self.sizes)

    def unpack_state(self, state: State, weight: Tensor) -> State:
        """Each state as ``(D * num_layers, N, features)``, in the order of the rows, of the dtype of the ``weight``."""
        self.dtype = state[0].dtype
        state = tuple(check_alike(f"{name}_0", s, weight) for name, s in zip("hc", state, strict=False))
        if not self.batched:
            return tuple(s.unsqueeze(1) for s in state)
        return state if self.sorted_indices is None else tuple(s.index_select(1, self.sorted_indices) for s in state)

    def pack(
        self, x: Tensor, state: State, lstm: bool, projected: bool, bidirectional: bool
    ) -> tuple[Tensor | PackedSequence, State]:
        """The outputs and last states as the input and the first ones were given."""
        if autocast_dtype(x.device):
            fused = lstm and not self.packed and not projected
            dtypes = [autocast_result_dtype(self.dtype, x.device, lowered) for lowered in (fused or projected, fused)]
            x, state = x.to(dtypes[0]), tuple(s.to(dtype) for s, dtype in zip(state, dtypes, strict=False))
        if self.unsorted_indices is not None:
            state = tuple(s.index_select(1, self.unsorted_indices) for s in state)
        if self.batch_first:
            x = x.transpose(0, 1)
        # What users of nn.LSTM and nn.GRU may change in place, or detach, is neither needed by backward nor a view.
        changeable = not lstm or projected or x.dtype == torch.float64 or self.packed
        traced = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        if (changeable and (x.requires_grad or traced) and not bidirectional) or (self.batch_first and not lstm):
            x = x.clone()
        if self.batch_sizes is not None:
            return PackedSequence(x, self.batch_sizes, self.sorted_indices, self.unsorted_indices), state
        return (x, state) if self.batched else (x.squeeze(1), tuple(s.squeeze(1) for s in state))
