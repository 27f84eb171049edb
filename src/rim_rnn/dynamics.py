"""Independent dynamics (paper, section 2.2, equation 4): each winner runs its own LSTM or GRU, losers keep their state."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rim_rnn.units import SharedProjection, uniform_

State = tuple[Tensor, ...]
"""``(h, c)`` for LSTM, ``(h,)`` for GRU."""


class Dynamics(nn.Module):
    r"""What LSTM and GRU share: the weights, the input's part of the gates, and the identity for losers.

    Attributes:
        weight_ih: ``(n, H*value_size, G*u)``, with ``G`` gates in the order of torch.nn (``i, f, g, o`` or ``r, z, n``).
        weight_hh: ``(n, p, G*u)``.
        bias_ih, bias_hh: ``(n, G*u)`` each, or ``None``.
        weight_hr: ``(n, u, p)``, with projections only.
    """

    num_gates: int
    bias_ih: nn.Parameter | None
    bias_hh: nn.Parameter | None

    def __init__(
        self,
        num_units: int,
        unit_size: int,
        num_heads: int,
        value_size: int,
        proj_size: int,
        bias: bool,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.unit_size = num_heads, unit_size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_units, *shape, device=device, dtype=dtype))

        gates = self.num_gates * unit_size
        self.weight_ih = parameter(num_heads * value_size, gates)
        self.weight_hh = parameter(proj_size or unit_size, gates)
        self.register_parameter("bias_ih", parameter(gates) if bias else None)
        self.register_parameter("bias_hh", parameter(gates) if bias else None)
        if proj_size:
            self.weight_hr = parameter(unit_size, proj_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        uniform_(self.unit_size, *self.parameters())

    def project(self, x: Tensor, value: SharedProjection) -> Tensor:
        """``(x W^v + b^v) W_ih`` of all units, multiplied in the cheaper order: ``(M, input_size)`` -> ``(H, M, n, G*u)``.

        A read is a scalar times a projection of ``x``, so its part of the gates is that scalar times this.
        """
        heads, own = self.num_heads, self.weight_ih
        n, _, gates = own.shape
        weight_ih = own.view(n, heads, -1, gates).permute(1, 2, 0, 3).reshape(heads, -1, n * gates)
        # Multiplications per row. A compiler is told nothing of the rows, so that one graph serves all of their numbers.
        rows = math.inf if torch.compiler.is_compiling() else max(1, x.size(0))
        size_x, size_value, size_gates = x.size(1), weight_ih.size(1), n * gates
        if size_x * size_gates * (1 + size_value / rows) < size_value * (size_x + size_gates):
            weight = value.weight.view(heads, -1, size_x).transpose(1, 2) @ weight_ih
            shared = value.bias
            bias = None if shared is None else (shared.view(heads, 1, -1) @ weight_ih).flatten()
            projected = F.linear(x, weight.transpose(1, 2).reshape(-1, size_x), bias)
            return projected.view(-1, heads, n, gates).transpose(0, 1)
        values: Tensor = value(x).view(-1, heads, weight_ih.size(1)).transpose(0, 1)
        return (values @ weight_ih).view(heads, -1, n, gates)

    def forward(self, a_input: Tensor, value: Tensor | None, gates: Tensor | None, state: State) -> State:
        """The new state of every unit, whether it won or not.

        Args:
            a_input: ``(n, N, H)``, after dropout.
            value: ``x W^v + b^v``, ``(N, H*value_size)``; the read is ``a_input`` times this.
            gates: Or what :meth:`project` returns, where that was computed for all steps at once.
            state: The old states, ``(n, N, p)`` and ``(n, N, u)``.
        """
        if gates is None:
            assert value is not None
            heads, weight_ih = self.num_heads, self.weight_ih
            n, _, size = weight_ih.shape
            values = value.view(value.size(0), heads, 1, value.size(1) // heads).permute(1, 2, 0, 3)
            gates = torch.matmul(values, weight_ih.view(n, heads, -1, size).transpose(0, 1)).transpose(1, 2)
        return self.update(self.read(a_input, gates), state)

    def read(self, a_input: Tensor, gates: Tensor) -> Tensor:
        """``sum over heads of a_input * (value W_ih)  + bias``: ``(n, N, H)``, ``(H, N, n, G*u)`` -> ``(n, N, G*u)``."""
        a, first, *others = a_input.to(gates.dtype).unsqueeze(-1), *gates.transpose(1, 2).unbind(0)
        bias = self.read_bias()
        total = a[:, :, 0] * first if bias is None else torch.addcmul(bias.unsqueeze(1), a[:, :, 0], first)
        for head, other in enumerate(others, 1):
            total = torch.addcmul(total, a[:, :, head], other)
        return total

    def read_bias(self) -> Tensor | None:
        """The bias that comes with the read, ``(n, G*u)``."""
        return self.bias_ih

    def update(self, gates_x: Tensor, state: State) -> State:
        """Equation 4, from the read's part of the gates ``(n, N, G*u)`` and the old state."""
        raise NotImplementedError


def keep_losers(active: Tensor, new: State, old: State) -> State:
    """``h~``: the new state of a winner, bit for bit the old one of a loser. ``active``: ``(n, N)``."""
    return tuple(torch.where(active.unsqueeze(-1), after, before) for after, before in zip(new, old, strict=True))


class LongShortTermDynamics(Dynamics):
    r"""The LSTM of :class:`torch.nn.LSTM`, one per unit; with projections :math:`h' = (o \odot \tanh c') W_{hr}`."""

    num_gates = 4

    def read_bias(self) -> Tensor | None:
        """Both biases: they only ever meet in a sum."""
        bias_ih, bias_hh = self.bias_ih, self.bias_hh
        if bias_ih is None or bias_hh is None:
            return bias_hh if bias_ih is None else bias_ih
        return bias_ih + bias_hh

    def update(self, gates_x: Tensor, state: State) -> State:
        h, c = state
        i, f, g, o = torch.baddbmm(gates_x, h, self.weight_hh).chunk(4, dim=-1)
        c = torch.addcmul(torch.sigmoid(f) * c, torch.sigmoid(i), torch.tanh(g))
        h = torch.sigmoid(o) * torch.tanh(c)
        weight_hr = getattr(self, "weight_hr", None)
        return (h if weight_hr is None else torch.bmm(h, weight_hr)), c


class GatedRecurrentDynamics(Dynamics):
    r"""The GRU of :class:`torch.nn.GRU`, one per unit."""

    num_gates = 3

    def update(self, gates_x: Tensor, state: State) -> State:
        (h,) = state
        gates_h, bias_hh = torch.bmm(h, self.weight_hh), self.bias_hh
        if bias_hh is not None:
            gates_h = gates_h + bias_hh.unsqueeze(1)
        (x_r, x_z, x_n), (h_r, h_z, h_n) = gates_x.chunk(3, dim=-1), gates_h.chunk(3, dim=-1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * h_n)
        return ((1 - z) * n + z * h,)
