"""How a state is divided among units.

Axes, here and in the stages: ``n`` units, ``N`` batch rows, ``H`` heads, ``p`` output state of one unit, ``u`` cell state of
one unit. Inside a step tensors are unit-major, ``(n, N, ...)``, so that every per-unit product is one batched product.
"""

import math
import numbers
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F


def choose_num_units(hidden_size: int, proj_size: int = 0, stacklevel: int = 3) -> int:
    """The default ``num_units``: the divisor that is at most 8 and closest to 6, a tie going to the smaller one."""
    size = math.gcd(hidden_size, proj_size)
    num_units = min((d for d in range(1, 9) if size % d == 0), key=lambda d: (abs(d - 6), d))
    if num_units == 1:
        whose = f"hidden_size={hidden_size} has no"
        if proj_size:
            whose = f"hidden_size={hidden_size} and proj_size={proj_size} have no common"
        warnings.warn(
            f"{whose} divisor from 2 to 8, so num_units=1: a single unit never competes; "
            "choose a size with more divisors, or pass num_units",
            stacklevel=stacklevel,
        )
    return num_units


def choose_k(num_units: int) -> int:
    """The default ``k``: two thirds of the units, rounded up (6 -> 4)."""
    return -(-2 * num_units // 3)


def check_int(name: str, value: object, least: int, most: int | None = None) -> None:
    """``TypeError`` unless ``value`` is an int, ``ValueError`` unless it lies from ``least`` to ``most``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} should be of type int, got: {type(value).__name__}")
    if value < least or (most is not None and value > most):
        expected = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} should be {expected}, got {name}={value}")


def plain_int(value: int) -> int:
    """An ``int`` from the integer of another library, such as ``numpy.int64``; anything else as it is."""
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else value


def check_bool(name: str, value: object) -> None:
    """``TypeError`` unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")


def check_probability(name: str, value: object) -> None:
    """Unless ``value`` is a number from 0 to 1: ``TypeError`` where ``float`` takes no such type, else ``ValueError``."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 <= float(value) <= 1:
        error = ValueError if isinstance(value, str) or hasattr(value, "__float__") else TypeError
        raise error(
            f"{name} should be a number in range [0, 1] representing the probability of an element being zeroed, "
            f"got {name}={value!r}"
        )


def check_sizes(rnn_cell: str, input_size: int, hidden_size: int, bias: bool, proj_size: int) -> None:
    """What :class:`torch.nn.LSTM` demands of the arguments that it shares with one cell of ours."""
    if rnn_cell not in ("LSTM", "GRU"):
        raise ValueError(f'rnn_cell should be "LSTM" or "GRU", got rnn_cell={rnn_cell!r}')
    check_bool("bias", bias)
    check_int("input_size", input_size, 1)
    check_int("hidden_size", hidden_size, 1)
    if proj_size and rnn_cell == "GRU":
        raise ValueError(f'proj_size is only supported for rnn_cell="LSTM", got proj_size={proj_size!r} with "GRU"')
    check_int("proj_size", proj_size, 0)
    if proj_size >= hidden_size:
        raise ValueError(
            f"proj_size should be smaller than hidden_size, got proj_size={proj_size} and hidden_size={hidden_size}"
        )


def check_num_units(num_units: int, hidden_size: int, proj_size: int = 0) -> None:
    """``ValueError`` that names the nearest divisors where ``num_units`` does not divide the sizes."""
    check_int("num_units", num_units, 1)
    for name, size in (("hidden_size", hidden_size), ("proj_size", proj_size)):
        if size % num_units:
            common = math.gcd(hidden_size, proj_size)
            divisors = [d for d in range(1, common + 1) if common % d == 0]
            below, above = [d for d in divisors if d < num_units][-1:], [d for d in divisors if d > num_units][:1]
            nearest = " and ".join(map(str, below + above))
            plural = "divisors are" if below and above else "divisor is"
            raise ValueError(f"num_units={num_units} does not divide {name}={size}; nearest {plural} {nearest}")


def check_query_size(which: str, query_size: int | None, key_size: int) -> None:
    """``ValueError`` unless ``query_size`` is ``None`` or the key's: a dot product needs two vectors of one size."""
    if query_size is not None and query_size != key_size:
        raise ValueError(
            f"query_size_{which} should be None or equal to key_size_{which}={key_size}, because queries and keys meet "
            f"in a dot product, got query_size_{which}={query_size}"
        )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype autocast uses on ``device``, or ``None`` where it is off."""
    kind = device.type
    # torch.compile of torch 2.10 can not look inside is_autocast_available.
    known = kind == "cpu" or (kind != "meta" if torch.compiler.is_compiling() else torch.amp.is_autocast_available(kind))
    return torch.get_autocast_dtype(kind) if known and torch.is_autocast_enabled(kind) else None


def is_exporting() -> bool:
    """Whether torch.export is at work: what is_exporting() says, but under Dynamo of torch 2.10, which takes it for true."""
    return torch.compiler._is_exporting_flag


def check_alike(name: str, tensor: Tensor, weight: Tensor) -> Tensor:
    """``tensor`` in the parameters' dtype under autocast; else a ``RuntimeError`` if dtype, device or layout do not fit."""
    if tensor.device != weight.device:
        raise RuntimeError(
            f"Input and parameter tensors are not at the same device: {name} is at {tensor.device}, the parameters "
            f"at {weight.device}. Move it: {name}.to('{weight.device}'), or the model: model.to('{tensor.device}')"
        )
    if tensor.dtype != weight.dtype:
        known = (torch.float32, torch.bfloat16, torch.float16)  # to autocast, which leaves float64 alone
        if not (autocast_dtype(tensor.device) and tensor.dtype in known and weight.dtype in known):
            raise RuntimeError(
                f"{name} dtype ({tensor.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert it: {name}.to({weight.dtype}), or the model: model.to({tensor.dtype})"
            )
        tensor = tensor.to(weight.dtype)
    if tensor.is_complex() or tensor.layout is not torch.strided:
        raise RuntimeError(f"{name} should be strided and of real numbers, got {tensor.layout} and {tensor.dtype}")
    return tensor


def autocast_result_dtype(given: torch.dtype, device: torch.device, lowered: bool = False) -> torch.dtype:
    """The dtype of a result, as torch's own recurrent modules have it: that of the ``given`` state unless under autocast.

    Autocast leaves float64 alone. Elsewhere the result has autocast's dtype; on a CPU only if an operator that autocast lowers
    makes it (``lowered``: a padded ``nn.LSTM``, which is one operator, or a projection), else what both dtypes promote to.
    """
    lower = autocast_dtype(device)
    if lower is None or given == torch.float64:
        return given
    return lower if lowered or device.type != "cpu" else torch.promote_types(given, lower)


def divide(state: Tensor, num_units: int) -> Tensor:
    """Unit-major view of a state, ``(N, n*p)`` or ``(1, N, n*p)`` -> ``(n, N, p)``: unit ``j`` owns ``[..., j*p:(j+1)*p]``."""
    return state.view(state.size(-2), num_units, state.size(-1) // num_units).transpose(0, 1)


def unite(state: Tensor) -> Tensor:
    """The inverse of :func:`divide`, ``(n, ..., p)`` -> ``(..., n*p)``, in memory of its own."""
    return torch.cat(state.unbind(0), dim=-1)


def draw_dropout(probability: float, x: Tensor, *shape: int) -> Tensor:
    """What dropout multiplies probabilities with, 0 or ``1/(1-p)`` each: ``(M, *shape)`` for ``M`` rows of ``x``."""
    return F.dropout(x.new_ones(x.numel() // x.size(-1), *shape), probability)


def leaf(module: nn.Module, input: Any, hx: Any) -> fx.Proxy | None:
    """A call of the module, for torch.fx.symbolic_trace, which looks into it as little as into a module of torch.nn.

    ``None`` where nothing is traced: neither the input nor a state is a stand-in.
    """
    proxy = next(
        (part for part in (input, hx, *(hx if isinstance(hx, tuple | list) else ())) if isinstance(part, fx.Proxy)), None
    )
    if proxy is None:
        return None
    name = type(module).__name__
    tracer: Any = proxy.tracer
    try:
        path = tracer.path_of_module(module)
    except NameError:
        path = ""
    if not path:  # it is the root itself, or was put into it while tracing
        raise fx.proxy.TraceError(f"symbolic_trace does not look inside a {name}: trace a module that holds one")
    call: fx.Proxy = tracer.create_proxy("call_module", path, (input,) if hx is None else (input, hx), {})
    return call


def refuse_to_script(module: nn.Module) -> None:
    """What :func:`torch.jit.script` asks of a module, and of those in it, before it begins."""
    name = type(module).__name__
    raise NotImplementedError(
        f"torch.jit.script can not take a {name}; torch.export.export, torch.compile and torch.jit.trace can (torch.jit.trace "
        "for the number of steps that it is shown)"
    )


def describe(module: Any, **defaults: object) -> str:
    """The ``extra_repr`` of cell and layer: the two sizes, then whatever differs from its default.

    What a stage would tell that another module was put in the place of is left out.
    """
    found = {name: getattr(module, name, value) for name, value in defaults.items()}
    shown = [f"{name}={found[name]!r}" for name, value in defaults.items() if found[name] != value]
    return ", ".join([f"{module.input_size}, {module.hidden_size}", *shown])


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
