"""Input attention and competition (paper, section 2.2, equation 2): every unit bids for the input, ``k`` bids win."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rim_rnn.surroundings import autocast_dtype, is_exporting
from rim_rnn.units import SharedProjection, UnitProjection, draw_dropout, reset


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Inside, autocast is off: bids are formed and compared in at least float32."""
    return torch.autocast(device.type, enabled=False) if autocast_dtype(device) else nullcontext()


class InputAttention(nn.Module):
    r"""Two-row attention of each unit over "no input" and the input.

    .. math::
        a = \mathrm{softmax}\left(\frac{(h_j W^q_j)\, [0;\, x W^e]^\top}{\sqrt{d}}\right),
        \qquad \mathrm{read}_j = a\, [0;\, x W^v]

    The null row is zero *after* projection, so its score is 0, the softmax over the two rows is a sigmoid of the other
    score, and the read is the scalar ``a_input`` times the value (equation 2 of the paper, appendix A for the null row).

    Attributes:
        query: :class:`UnitProjection` with weight ``(n, p, H*key_size)`` and bias ``(n, H*key_size)``.
        key: :class:`SharedProjection` with weight ``(H*key_size, input_size)``, shared by the units as in the paper.
        value: :class:`SharedProjection` with weight ``(H*value_size, input_size)``, shared too; drawn twice as large.
    """

    def __init__(
        self,
        input_size: int,
        num_units: int,
        unit_size: int,
        num_heads: int,
        key_size: int,
        value_size: int,
        dropout: float,
        bias: bool,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.key_size, self.value_size = num_heads, key_size, value_size
        self.dropout_probability = dropout
        self.num_units = num_units
        self.query = UnitProjection(num_units, unit_size, num_heads * key_size, bias, device, dtype)
        self.key = SharedProjection(input_size, num_heads * key_size, bias, device, dtype)
        # A unit that knows nothing of the input takes half of the value: a read of x W^v begins as large as nn.Linear's.
        self.value = SharedProjection(input_size, num_heads * value_size, bias, device, dtype, gain=2.0)

    def reset_parameters(self) -> None:
        reset(self.query, self.key, self.value)

    def forward(
        self, h: Tensor, x: Tensor, key: Tensor | None = None, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Every unit bids for the input, and weighs it.

        Args:
            h: The states, ``(n, N, p)``.
            x: The input, ``(N, input_size)``.
            key: What :meth:`project` returns for ``x``, where that was computed for all steps at once; else computed here.
            keep: What :meth:`draw` returns, for these rows.

        Returns:
            ``score`` and ``a_input``, ``(n, N, H)`` each, ``a_input`` after dropout, and the value of ``x``,
            ``(N, H*value_size)``, unless a ``key`` was given: then the value has been put to use as well.
        """
        value = None
        if key is None:
            key, value = self.project(x), self.value(x)
        score = self.bid(h, key)
        a_input = self.attend(score)
        return score, a_input, self.drop(a_input, keep), value

    def project(self, x: Tensor) -> Tensor:
        """The keys, ``(M, input_size)`` -> ``(M, H*key_size)``; ``1/sqrt(key_size)`` rides on them, once for all steps."""
        with full_precision(x.device):
            return self._wide(self.key, x) / math.sqrt(self.key_size)

    def bid(self, h: Tensor, key: Tensor) -> Tensor:
        """``score = query . key / sqrt(key_size)`` in at least float32, ``(n, N, p)``, ``(N, H*key_size)`` -> ``(n, N, H)``."""
        with full_precision(h.device):
            query = self._wide(self.query, h)
        return (query * key).view(*query.shape[:-1], self.num_heads, self.key_size).sum(-1)

    def _wide(self, projection: nn.Module, x: Tensor) -> Tensor:
        """What the projection makes of ``x`` in at least float32; another's in the place of ours is given ``x`` as it is."""
        wide = torch.promote_types(x.dtype, torch.float32)
        ours = isinstance(projection, UnitProjection | SharedProjection)
        projected: Tensor = projection(x.to(wide) if ours else x)
        return projected.to(wide)

    def attend(self, score: Tensor) -> Tensor:
        """``a_input``, the second entry of ``softmax([0, score])``."""
        return torch.sigmoid(score)

    def draw(self, x: Tensor) -> Tensor | None:
        """Dropout on the probabilities, ``(M, n, H)``: a draw per row, unit and head. (The null row's would scale a zero.)"""
        if not self.dropout_probability:
            return None
        return draw_dropout(self.dropout_probability, x, self.num_units, self.num_heads)

    def drop(self, a_input: Tensor, keep: Tensor | None) -> Tensor:
        """``a_input`` ``(n, N, H)`` after dropout: times what :meth:`draw` returned for these rows."""
        return a_input if keep is None else a_input * keep.transpose(0, 1)


def compete(score: Tensor, k: int) -> Tensor:
    """The ``k`` highest bids win: exactly ``k``, ties to the lowest unit, NaN counting as the lowest bid.

    A unit's bid is its score averaged over heads. Ascending and stable on the *negated* bids does all three: equal bids
    keep the order of their units, and NaN sorts last.

    Args:
        score: ``(n, N, H)``, at least float32.
        k: Number of winners.

    Returns:
        ``(n, N)``, bool, ``k`` times true in each column.

    Raises:
        ValueError: ``k`` is not from 1 to ``n``, as when it was assigned to a cell.
    """
    bids = score.detach().mean(-1)
    n = bids.size(0)
    if not 1 <= k <= n:
        raise ValueError(f"k should be from 1 to {n}, got {k}")
    if k == n:
        return torch.ones_like(bids, dtype=torch.bool)
    if not is_exporting():
        winners = torch.sort(-bids, dim=0, stable=True).indices[:k]
        return torch.zeros_like(bids, dtype=torch.bool).scatter(0, winners, 1)  # torch.jit takes no True there
    # ONNX has no stable sort. The same by rank: how many units are ahead, by a higher bid or an equal one that stands first.
    bids = bids.nan_to_num(-math.inf, math.inf, torch.finfo(bids.dtype).min)
    one, first = bids.unsqueeze(1), torch.ones(n, n, dtype=torch.bool, device=bids.device).triu(1).unsqueeze(-1)
    ahead = (one > bids) | (first & (one == bids))
    return ahead.sum(0) < k
