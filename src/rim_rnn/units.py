"""How a state is divided among units.

Axes, here and in the stages: ``n`` units, ``N`` batch rows, ``H`` heads, ``p`` output state of one unit, ``u`` cell state of
one unit. Inside a step tensors are unit-major, ``(n, N, ...)``, so that every per-unit product is one batched product.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def divide(state: Tensor, num_units: int) -> Tensor:
    """Unit-major view of a state, ``(N, n*p)`` or ``(1, N, n*p)`` -> ``(n, N, p)``: unit ``j`` owns ``[..., j*p:(j+1)*p]``."""
    return state.view(state.size(-2), num_units, state.size(-1) // num_units).transpose(0, 1)


def unite(state: Tensor) -> Tensor:
    """The inverse of :func:`divide`, ``(n, ..., p)`` -> ``(..., n*p)``, in memory of its own."""
    return torch.cat(state.unbind(0), dim=-1)


def draw_dropout(probability: float, x: Tensor, *shape: int) -> Tensor:
    """What dropout multiplies probabilities with, 0 or ``1/(1-p)`` each: ``(M, *shape)`` for ``M`` rows of ``x``."""
    return F.dropout(x.new_ones(x.numel() // x.size(-1), *shape), probability)


def uniform_(fan_in: int, *parameters: Tensor | None, gain: float = 1.0) -> None:
    """Draw parameters from ``uniform(-gain/sqrt(fan_in), gain/sqrt(fan_in))``."""
    bound = gain / math.sqrt(fan_in)
    for parameter in parameters:
        if parameter is not None and not parameter.is_meta:
            nn.init.uniform_(parameter, -bound, bound)


def reset(*modules: Any) -> None:
    """Draw the parameters of each module anew; of one that was put around others and has no way to, those of the others."""
    for module in modules:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        else:
            reset(*module.children())


class UnitProjection(nn.Module):
    """One linear map per unit: ``x[j] @ weight[j] + bias[j]`` for ``x`` of shape ``(n, N, in_features)``.

    Attributes:
        weight: ``(n, in_features, out_features)``.
        bias: ``(n, out_features)``, or ``None``.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        num_units: int,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_units, in_features, out_features, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(num_units, out_features, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        uniform_(self.weight.size(1), self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if bias is None:
            return torch.bmm(x, weight.to(x.dtype))
        return torch.baddbmm(bias.to(x.dtype).unsqueeze(1), x, weight.to(x.dtype))

    def extra_repr(self) -> str:
        num_units, in_features, out_features = self.weight.shape
        return f"{num_units}, {in_features}, {out_features}" + ("" if self.bias is None else ", bias=True")


class SharedProjection(nn.Module):
    """One linear map that all units share: ``x @ weight.T + bias`` for ``x`` of shape ``(..., in_features)``.

    No :class:`torch.nn.Linear`, for what such a layer is replaced with (quantised, adapted, sharded) expects to be called, and
    a fast path does not call it.

    Attributes:
        weight: ``(out_features, in_features)``.
        bias: ``(out_features,)``, or ``None``.
        gain: The range that the weight is drawn from, as a multiple of that of an :class:`torch.nn.Linear`.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.gain = gain
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        uniform_(self.weight.size(1), self.weight, gain=self.gain)
        uniform_(self.weight.size(1), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias
        return F.linear(x, self.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"{in_features}, {out_features}" + ("" if self.bias is None else ", bias=True")
