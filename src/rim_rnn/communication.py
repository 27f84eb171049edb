"""Communication (paper, section 2.3, equations 5 and 6): winners read from every unit."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from rim_rnn.units import UnitLinear, draw_dropout


class Communication(nn.Module):
    r"""Multi-head attention among the units of one row, added onto the winners' states.

    .. math::
        \mathrm{attention}_{jm} = \mathrm{softmax}_m\left(\frac{(\tilde h_j W^q_j)(\tilde h_m W^k_m)^\top}{\sqrt{d}}\right),
        \qquad h_j = \tilde h_j + \left[\textstyle\sum_m \mathrm{attention}_{jm}\, \tilde h_m W^v_m\right] W^o_j

    for winners ``j`` and every unit ``m``, ``j`` itself included; a loser keeps its state (equations 5 and 6). With
    ``num_heads=0`` there are no parameters, and the states pass unchanged: the paper's ablation.

    Attributes:
        query, key: :class:`UnitLinear` with weight ``(n, p, heads*key_size)``, no bias.
        value: :class:`UnitLinear` with weight ``(n, p, heads*value_size)``, no bias.
        output: :class:`UnitLinear` with weight ``(n, heads*value_size, p)``, no bias.
    """

    def __init__(
        self,
        num_units: int,
        unit_size: int,
        num_heads: int,
        key_size: int,
        value_size: int,
        dropout: float,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.key_size, self.value_size, self.dropout = num_heads, key_size, value_size, dropout
        if num_heads:
            self.query = UnitLinear(num_units, unit_size, num_heads * key_size, device=device, dtype=dtype)
            self.key = UnitLinear(num_units, unit_size, num_heads * key_size, device=device, dtype=dtype)
            self.value = UnitLinear(num_units, unit_size, num_heads * value_size, device=device, dtype=dtype)
            self.output = UnitLinear(num_units, num_heads * value_size, unit_size, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        if self.num_heads:
            for projection in (self.query, self.key, self.value, self.output):
                projection.reset_parameters()

    def weight(self) -> Tensor | None:
        """``[W^q / sqrt(d) | W^k | W^v]`` of one head after the other, so that one product makes all; once for all steps."""
        if not self.num_heads:
            return None
        query, key, value = (
            part.weight.view(*part.weight.shape[:2], self.num_heads, -1) for part in (self.query, self.key, self.value)
        )
        return torch.cat([query / math.sqrt(self.key_size), key, value], dim=-1).flatten(2)

    def draw(self, x: Tensor) -> Tensor | None:
        """Dropout on the probabilities, ``(M, heads, n, n)``: a draw per row, head, reader and unit that is read."""
        if not (self.dropout and self.num_heads):
            return None
        n = self.query.weight.size(0)
        return draw_dropout(self.dropout, x, self.num_heads, n, n)

    def forward(self, h: Tensor, active: Tensor, weight: Tensor | None, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """One exchange.

        Args:
            h: ``h~`` of every unit, ``(n, N, p)``.
            active: The winners, ``(n, N)``.
            weight: What :meth:`weight` returns.
            keep: What :meth:`draw` returns, for these rows.

        Returns:
            The new ``h``, ``(n, N, p)``, and the attention before dropout, ``(N, heads, n readers, n read)``.
        """
        n, batch, _ = h.shape
        if weight is None:
            return h, h.new_zeros(batch, 0, n, n)
        heads, d = self.num_heads, self.key_size
        # One small attention per row and head. As 3-D products: torch.compile takes 4-D ones with this order of axes for
        # another layout and returns wrong numbers (torch 2.13, inductor on a CPU).
        sizes = [d, d, self.value_size]
        projected = torch.bmm(h, weight).view(n, batch, heads, sum(sizes)).permute(1, 2, 0, 3)
        query, key, value = torch.split(projected.reshape(batch * heads, n, sum(sizes)), sizes, dim=-1)
        # A softmax over the second of three axes: over a last one so short torch takes four times as long.
        attention = torch.softmax(torch.bmm(key, query.transpose(1, 2)), dim=1).transpose(1, 2)
        dropped = attention if keep is None else attention * keep.reshape(attention.shape)
        context = torch.bmm(dropped, value)
        context = context.view(batch, heads, n, self.value_size).permute(2, 0, 1, 3).reshape(n, batch, heads * self.value_size)
        attention = attention.view(batch, heads, n, n)
        return torch.where(active.unsqueeze(-1), h + self.output(context), h), attention
