"""What torch is doing around a call: autocast, export, tracing; and what a call has to be given for it."""

import operator
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype autocast uses on ``device``, or ``None`` where it is off."""
    kind = device.type
    # torch.compile of torch 2.10 can not look inside is_autocast_available.
    known = kind == "cpu" or (kind != "meta" if torch.compiler.is_compiling() else torch.amp.is_autocast_available(kind))
    return torch.get_autocast_dtype(kind) if known and torch.is_autocast_enabled(kind) else None


def autocast_result_dtype(given: torch.dtype, device: torch.device, lowered: bool = False) -> torch.dtype:
    """The dtype of a result, as torch's own recurrent modules have it: that of the ``given`` state unless under autocast.

    Autocast leaves float64 alone. Elsewhere the result has autocast's dtype; on a CPU only if an operator that autocast lowers
    makes it (``lowered``: a padded ``nn.LSTM``, which is one operator, or a projection), else what both dtypes promote to.
    """
    lower = autocast_dtype(device)
    if lower is None or given == torch.float64:
        return given
    return lower if lowered or device.type != "cpu" else torch.promote_types(given, lower)


def without_mixed_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Without autocast to the one narrow dtype where a call is all in the other: it knows no sum, nor even a cat, of both."""
    lower = autocast_dtype(x.device)
    mixed = lower is not None and {x.dtype, lower} == {torch.bfloat16, torch.float16}
    return torch.autocast(x.device.type, enabled=False) if mixed else nullcontext()


def is_exporting() -> bool:
    """Whether torch.export is at work: what is_exporting() says, but under Dynamo of torch 2.10, which takes it for true."""
    return torch.compiler._is_exporting_flag


def is_fake(tensor: Tensor) -> bool:
    """Whether it is a FakeTensor, a shape alone; by name, for who imports that class waits for sympy, too."""
    kind = type(tensor)
    return kind.__name__ == "FakeTensor" and kind.__module__ == "torch._subclasses.fake_tensor"


def is_traced_by_fx() -> bool:
    """Whether make_fx is at work, which writes down every operator that is called."""
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return False
    return get_proxy_mode() is not None


def held_to_example(x: Tensor, batch_sizes: Tensor | None, sizes: list[int] | None) -> Tensor:
    """``x``, ``(T, N, input_size)``, or packed with ``sizes``, the numbers in ``batch_sizes``.

    While a graph is traced that is right for what of them is a number in its example, it is told to raise on others.
    """
    by_jit = not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None
    if not (by_jit or is_traced_by_fx()):
        if sizes and x.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
            warnings.warn(f"RIM: this CUDA graph takes every input for one with batch_sizes={sizes}", stacklevel=2)
        return x
    if torch.onnx.is_in_onnx_export():  # whose graphs have the sizes of their inputs
        return x
    same: Any
    if batch_sizes is not None:
        expected = torch.tensor([*(sizes or ()), 0], device="cpu")
        same = (torch.cat([batch_sizes, torch.zeros_like(expected)])[: len(expected)] == expected).all()
        what = f"a PackedSequence with batch_sizes={sizes} and takes no other lengths. Trace the layer with padded input"
    elif by_jit:
        steps = operator.index(x.size(0))
        same = x.size(0) == steps  # a tensor, here
        what = (
            f"{steps} steps and takes no other number. Trace one for each, or take torch.export.export, which can keep it open"
        )
    else:
        if not is_fake(x):  # one of which knows what its shape may be, and is given to an operator that does
            torch.ops.aten._assert_tensor_metadata.default(x, x.shape)
        return x
    token = torch.zeros((), dtype=x.dtype, device="cpu")  # without which torch.jit would take the check for dead code
    message = f"RIM: this graph was traced for {what}"
    held: Tensor = x + torch.ops.aten._functional_assert_async.msg(same, message, token)
    return held


def numbers(batch_sizes: Tensor) -> list[int]:
    """Those of a PackedSequence, over which steps run; an error where a graph, or a fake tensor, leaves them open."""
    if is_exporting() or torch.onnx.is_in_onnx_export() or is_fake(batch_sizes):
        raise RuntimeError(
            "RIM: how long the sequences of a PackedSequence are has to be known here, and batch_sizes leaves it open. Pass "
            "padded input, or under FakeTensorMode batch_sizes that was made outside of it"
        )
    sizes: list[int] = batch_sizes.tolist()
    return sizes


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
