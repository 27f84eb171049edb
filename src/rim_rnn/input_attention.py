"""Input attention and competition (paper, section 2.2, equation 2): every unit bids for the input, ``k`` bids win."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rim_rnn.units import UnitLinear, autocast_dtype, draw_dropout


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
        query: :class:`UnitLinear` with weight ``(n, p, H*key_size)`` and bias ``(n, H*key_size)``.
        key: :class:`torch.nn.Linear` with weight ``(H*key_size, input_size)``, shared by the units as in the paper.
        value: :class:`torch.nn.Linear` with weight ``(H*value_size, input_size)``, shared as well.
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
        self.num_heads, self.key_size, self.value_size, self.dropout = num_heads, key_size, value_size, dropout
        self.query = UnitLinear(num_units, unit_size, num_heads * key_size, bias, device, dtype)
        self.key = nn.Linear(input_size, num_heads * key_size, bias, device, dtype)
        self.value = nn.Linear(input_size, num_heads * value_size, bias, device, dtype)

    def reset_parameters(self) -> None:
        for projection in (self.query, self.key, self.value):
            projection.reset_parameters()

    def project(self, x: Tensor) -> Tensor:
        """The keys, ``(M, input_size)`` -> ``(M, H*key_size)``; ``1/sqrt(key_size)`` rides on them, once for all steps."""
        wide = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.key.bias is None else self.key.bias.to(wide)
        with full_precision(x.device):
            return F.linear(x.to(wide), self.key.weight.to(wide), bias) / math.sqrt(self.key_size)

    def bid(self, h: Tensor, key: Tensor) -> Tensor:
        """``score = query . key / sqrt(key_size)`` in at least float32, ``(n, N, p)``, ``(N, H*key_size)`` -> ``(n, N, H)``."""
        with full_precision(h.device):
            query: Tensor = self.query(h.to(key.dtype))
        return (query * key).view(*query.shape[:-1], self.num_heads, self.key_size).sum(-1)

    def attend(self, score: Tensor) -> Tensor:
        """``a_input``, the second entry of ``softmax([0, score])``."""
        return torch.sigmoid(score)

    def draw(self, x: Tensor) -> Tensor | None:
        """Dropout on the probabilities, ``(M, n, H)``: a draw per row, unit and head. (The null row's would scale a zero.)"""
        if not self.dropout:
            return None
        return draw_dropout(self.dropout, x, self.query.weight.size(0), self.num_heads)

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
    """
    bids = score.detach().mean(-1)
    if k == bids.size(0):
        return torch.ones_like(bids, dtype=torch.bool)
    winners = torch.sort(-bids, dim=0, stable=True).indices[:k]
    return torch.zeros_like(bids, dtype=torch.bool).scatter(0, winners, 1)  # torch.jit takes no True there
