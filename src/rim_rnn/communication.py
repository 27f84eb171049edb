"""Communication (paper, section 2.3, equations 5 and 6): winners read from every unit."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from rim_rnn.units import UnitProjection, draw_dropout, reset


class Communication(nn.Module):
    r"""Multi-head attention among the units of one row, added onto the winners' states.

    .. math::
        \mathrm{attention}_{jm} = \mathrm{softmax}_m\left(\frac{(\tilde h_j W^q_j)(\tilde h_m W^k_m)^\top}{\sqrt{d}}\right),
        \qquad \mathrm{message}_j = \left[\textstyle\sum_m \mathrm{attention}_{jm}\, \tilde h_m W^v_m\right] W^o_j

    for winners ``j`` and every unit ``m``, ``j`` itself included; a loser keeps its state (equations 5 and 6). What is added
    has a bound, :math:`h_j = \tilde h_j + \mathrm{room}_j \tanh(\mathrm{message}_j)`, where an LSTM has room for 1 and a GRU
    for :math:`\max(0, 1 - |\tilde h_j|)`; with ``bounded=False`` it is the message itself, as equation 6 is printed. With
    ``num_heads=0`` there are no parameters, and the states pass unchanged: the paper's ablation.

    Attributes:
        query, key: :class:`UnitProjection` with weight ``(n, p, heads*key_size)``, no bias.
        value: :class:`UnitProjection` with weight ``(n, p, heads*value_size)``, no bias.
        output: :class:`UnitProjection` with weight ``(n, heads*value_size, p)``, no bias.
    """

    def __init__(
        self,
        num_units: int,
        unit_size: int,
        num_heads: int,
        key_size: int,
        value_size: int,
        dropout: float,
        bounded: bool,
        rnn_cell: str,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.key_size, self.value_size = num_heads, key_size, value_size
        self.dropout_probability = dropout
        self.num_units, self.bounded, self.rnn_cell = num_units, bounded, rnn_cell
        if num_heads:
            self.query = UnitProjection(num_units, unit_size, num_heads * key_size, device=device, dtype=dtype)
            self.key = UnitProjection(num_units, unit_size, num_heads * key_size, device=device, dtype=dtype)
            self.value = UnitProjection(num_units, unit_size, num_heads * value_size, device=device, dtype=dtype)
            self.output = UnitProjection(num_units, num_heads * value_size, unit_size, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        if self.num_heads:
            reset(self.query, self.key, self.value, self.output)

    def stacked_weights(self) -> Tensor | None:
        """``[W^q / sqrt(d) | W^k | W^v]`` of one head after the other, so that one product makes all; once for all steps."""
        if not self.num_heads:
            return None
        query, key, value = (
            weight.view(*weight.shape[:2], self.num_heads, -1)
            for weight in (self.query.weight, self.key.weight, self.value.weight)
        )
        return torch.cat([query / math.sqrt(self.key_size), key, value], dim=-1).flatten(2)

    def draw(self, x: Tensor) -> Tensor | None:
        """Dropout on the probabilities, ``(M, heads, n, n)``: a draw per row, head, reader and unit that is read."""
        if not (self.dropout_probability and self.num_heads):
            return None
        return draw_dropout(self.dropout_probability, x, self.num_heads, self.num_units, self.num_units)

    def forward(
        self, h: Tensor, active: Tensor, weight: Tensor | None = None, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One exchange.

        Args:
            h: ``h~`` of every unit, ``(n, N, p)``.
            active: The winners, ``(n, N)``.
            weight: What :meth:`stacked_weights` returns, where that was computed for all steps at once.
            keep: What :meth:`draw` returns, for these rows.

        Returns:
            The new ``h``, ``(n, N, p)``, and the attention before dropout, ``(N, heads, n readers, n read)``.
        """
        n, batch, _ = h.shape
        heads, d = self.num_heads, self.key_size
        if not heads:
            return h, h.new_zeros(batch, 0, n, n)

        # One small attention per row and head. As 3-D products: torch.compile takes 4-D ones with this order of axes for
        # another layout and returns wrong numbers (torch 2.13, inductor on a CPU).
        def by_head(projected: Tensor, size: int) -> Tensor:
            return projected.view(n, batch, heads, size).permute(1, 2, 0, 3).reshape(batch * heads, n, size)

        if weight is None:
            query, key = by_head(self.query(h), d) / math.sqrt(d), by_head(self.key(h), d)
            value = by_head(self.value(h), self.value_size)
        else:
            sizes = [d, d, self.value_size]
            query, key, value = torch.split(by_head(torch.bmm(h, weight), sum(sizes)), sizes, dim=-1)
        # A softmax over the second of three axes: over a last one so short torch takes four times as long.
        attention = torch.softmax(torch.bmm(key, query.transpose(1, 2)), dim=1).transpose(1, 2)
        dropped = attention if keep is None else attention * keep.reshape(attention.shape)
        context = torch.bmm(dropped, value)
        context = context.view(batch, heads, n, self.value_size).permute(2, 0, 1, 3).reshape(n, batch, heads * self.value_size)
        message = self.output(context)
        if self.bounded:
            message = torch.tanh(message)
            if self.rnn_cell == "GRU":
                message = torch.relu(1 - h.abs()) * message
        return torch.where(active.unsqueeze(-1), h + message, h), attention.view(batch, heads, n, n)
