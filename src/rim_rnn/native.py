"""The fast path: a whole sequence of one cell, forward and backward, in one native operator (``csrc/``).

It is equal to :meth:`Step.scan` because it computes the same four stages from the same parameters: ``csrc/step.h`` has them
by name and in order, and only multiplies the weights that meet ``x`` out first, which changes rounding and nothing else. (On
x86, numbers below the smallest normal one count as 0.) The readable path stays the definition; ``tests/test_native.py``
holds every output and every gradient of this one against it.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rim_rnn.dynamics import State
from rim_rnn.readable import (
    NUM_TENSORS,
    SCHEMA,
    differentiate,
    gradients_like,
    is_registered,
    on_one_device,
    plain_parameters,
    results_like,
    sizes_of,
)
from rim_rnn.recording import Trace
from rim_rnn.units import divide

ISAS = ("baseline", "avx2", "avx512")
"""The instruction sets that the operator is built for, in the order of ``csrc/rim.cpp``."""

NARROW = (torch.bfloat16, torch.float16)
"""Computed in float32, and only the results are rounded; of a bfloat16 layer also what the gates, the projection and the
communication multiply, where rows are many and the processor has products of bfloat16."""


def _load() -> str | None:
    """Load the operator. The reason why there is none, or ``None``."""
    wanted, isa = os.environ.get("RIM_RNN_NATIVE", ""), os.environ.get("RIM_RNN_ISA", "")
    if wanted not in ("", "0", "1"):
        raise ImportError(f"RIM_RNN_NATIVE should be 0, 1 or empty, got {wanted!r}")
    if isa and isa not in ISAS:
        raise ImportError(f"RIM_RNN_ISA should be {', '.join(ISAS)} or empty, got {isa!r}")
    if wanted == "0":
        return "switched off by RIM_RNN_NATIVE=0"
    here = Path(__file__).parent
    library = next((path for path in here.glob("_native.*") if path.suffix in (".so", ".pyd")), None)
    if library is None:
        reason = "the native operator is not installed (the page Installing says where it is, and how to build it)"
    elif library.stat().st_mtime < max((path.stat().st_mtime for path in here.glob("csrc/*")), default=0):  # in a checkout
        reason = "the native operator is older than its sources (make setup builds it again)"
    else:
        try:
            if not is_registered("infer", f"({SCHEMA}, bool rounded) -> (Tensor output, Tensor h_n, Tensor c_n)"):
                torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
                _register()
            torch.ops.rim_rnn.isa()  # or the error of one that the processor does not have
        except OSError as error:
            reason = f"the native operator does not load: {error}"
        except RuntimeError as error:
            raise ImportError(str(error)) from error
        else:
            return None
    if wanted == "1":
        raise ImportError(f"RIM_RNN_NATIVE=1, but {reason}")
    return reason


def instruction_set() -> str:
    """The one that the operator runs on here: the best that the processor has, or what RIM_RNN_ISA names."""
    return ISAS[torch.ops.rim_rnn.isa()]


def empty_cache() -> int:
    """Give back the working memory that the operator keeps from one call to the next: at most 64 MiB, by all layers together.

    Returns:
        How many bytes it had; 0 without the operator.

    Example:
        >>> from rim_rnn import native
        >>> bytes_given_back = native.empty_cache()
        >>> native.empty_cache()
        0
    """
    given_back: int = torch.ops.rim_rnn.release() if _unavailable is None else 0
    return given_back


_switched_off = 0  # by so many readable() at this time
_switch = Lock()


@contextmanager
def readable() -> Iterator[None]:
    """Inside, every call takes the readable path, those of other threads too."""
    global _switched_off
    with _switch:
        _switched_off += 1
    try:
        yield
    finally:
        with _switch:
            _switched_off -= 1


def supports(cell: Any, input: Tensor, state: State) -> str | None:
    """Why a call can not run natively, or ``None`` where it can.

    Args:
        cell: The :class:`Step`.
        input, state: As :meth:`Step.scan` takes them.

    Returns:
        The reason for taking the readable path, or ``None``.
    """
    found = _parameters(cell, input, state)
    return found if isinstance(found, str) else None


def _parameters(cell: Any, input: Tensor, state: State) -> list[Tensor | None] | str:
    """The parameters in the order of the schema, ``None`` where the cell has none; or a reason to decline.

    The reasons here are the operator's own; those that keep any operator from taking over are :func:`plain_parameters`'s.
    """
    if _unavailable is not None:
        return _unavailable
    if _switched_off:
        return "switched off"
    if not input.is_cpu:
        return f"the input is on {input.device}, not on the CPU"
    if input.dtype not in (torch.float32, torch.float64, *NARROW):
        return f"the input is {input.dtype}, not of a floating-point type"
    return plain_parameters(cell, input, state)


def _widened(tensors: Sequence[Any]) -> Sequence[Any]:
    """The tensors of the schema in a dtype that the operator computes in."""
    return [t if t is None else t.float() for t in tensors] if tensors[0].dtype in NARROW else tensors


def scan(
    cell: Any,
    input: Tensor,
    state: State,
    batch_sizes: Sequence[int] | None = None,
    reverse: bool = False,
    record: bool = False,
) -> tuple[Tensor, State, list[Trace]] | None:
    """:meth:`Step.scan` in the native operator.

    Args:
        cell: The :class:`Step`.
        input: ``(T, N, input_size)``, or packed ``(sum(batch_sizes), input_size)``.
        state: ``(h_0, c_0)`` or ``(h_0,)``, each ``(N, features)`` or ``(1, N, features)``.
        batch_sizes: Rows present at each step, never growing; ``None`` where the input is not packed.
        reverse: Go from the last step to the first; results stay in the input's order of time.
        record: Also return what each step did.

    Returns:
        The outputs in the layout of ``input``, the last states in that of ``state``, and one trace per step if ``record``; or
        ``None`` where :func:`supports` has a reason to decline.

    Raises:
        RuntimeError: A size does not fit; the message names it.
    """
    parameters = _parameters(cell, input, state)
    if isinstance(parameters, str):
        return None
    c = state[1] if len(state) == 2 else None
    tensors: Sequence[Any]
    tensors = [input, state[0], c, *parameters, *cell.draw(input)]
    sizes = *sizes_of(cell, batch_sizes, reverse), input.dtype is torch.bfloat16
    traces: list[Trace] = []
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    ours = differentiable and not torch.compiler.is_compiling()
    if not ours:
        tensors = _widened(tensors)
    if differentiable or record:
        operator: Any = _Scan.apply if ours else torch.ops.rim_rnn.scan.default
        output, h_n, c_n, winners, saved = operator(*tensors, *sizes)
        if record:
            with torch.no_grad():
                traces = _traces(
                    cell, input, state[0].reshape(-1, state[0].size(-1)), batch_sizes, reverse, output, winners, saved
                )
    else:
        output, h_n, c_n = torch.ops.rim_rnn.infer.default(*tensors, *sizes)
    if input.dtype in NARROW:
        output, h_n, c_n = output.to(input.dtype), h_n.to(input.dtype), c_n.to(input.dtype)
    return output, (h_n,) if c is None else (h_n, c_n), traces


def _traces(
    cell: Any,
    input: Tensor,
    h_0: Tensor,
    batch_sizes: Sequence[int] | None,
    reverse: bool,
    output: Tensor,
    winners: Tensor,
    saved: Tensor,
) -> list[Trace]:
    """What each step did: winners and communication as the operator kept them, ``a_input`` from the states it put out."""
    n, k, heads = cell.num_units, cell.k, cell.communication.num_heads
    rows = [input.size(1)] * input.size(0) if batch_sizes is None else list(batch_sizes)
    total = sum(rows)
    steps = torch.split(output.reshape(total, -1), rows)
    before = []
    for t, present in enumerate(rows):
        earlier = t + 1 if reverse else t - 1
        old = steps[earlier][:present] if 0 <= earlier < len(rows) else h_0[:0]
        before.append(torch.cat([old, h_0[old.size(0) : present]]))
    key = cell.input_attention.project(input.reshape(total, -1))
    a_input = cell.input_attention.attend(cell.input_attention.bid(divide(torch.cat(before), n), key))
    active = torch.zeros(total, n, dtype=torch.bool).scatter(1, winners.long(), True).t()
    # The end of `saved`, (row, unit that is read, winner, head): csrc/problem.h.
    kept = saved[saved.numel() - total * n * k * heads :].view(total, n, k, heads).permute(0, 3, 2, 1)
    readers = winners.long().view(total, 1, k, 1).expand(total, heads, k, n)
    communication = saved.new_zeros(total, heads, n, n).scatter(2, readers, kept)
    parts = torch.split(active, rows, dim=1), torch.split(a_input, rows, dim=1), torch.split(communication, rows)
    return [Trace(*step) for step in zip(*parts, strict=True)]


# What torch.library wants to know of the operators: shapes of results without running, and gradients.


def _scan_fake(input: Tensor, h: Tensor, c: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    results, query, weight_ih = results_like(input, h, c, *rest), rest[0], rest[6]
    _, k, heads, comm_heads, bounded, _, _ = rest[-7:]
    total = input.numel() // input.shape[-1]
    u = weight_ih.shape[2] // (3 if c is None else 4)
    n, p, _ = query.shape
    per_winner = heads + 4 * u + (0 if c is None else u) + (2 if bounded and comm_heads else 1) * p + comm_heads * n
    winners = input.new_empty(total, k, dtype=torch.int32)
    return *results, winners, input.new_empty(total * k * per_winner)


def _backward_fake(*args: Any) -> list[Tensor]:
    on_one_device(*args)
    input_grad, tensors = args[6], args[7 : 7 + NUM_TENSORS]
    grads = gradients_like(*tensors[:-2])
    return grads if input_grad else [grads[0].new_empty(0), *grads[1:]]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[3], output[4])
    ctx.save_for_backward(*inputs[:NUM_TENSORS], output[0], output[3], output[4])
    ctx.sizes = inputs[NUM_TENSORS:]


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    *given, output, winners, saved = ctx.saved_tensors
    tensors = _widened(given)
    without = None, None, *(None for _ in ctx.sizes)  # what dropout drew, and the sizes, have no gradient
    if torch.is_grad_enabled():  # exactly when the caller asked for create_graph
        *sizes, _ = ctx.sizes
        found = differentiate(tensors, tuple(sizes), grads[:3], ctx.needs_input_grad, winners)
        return *found, *without
    grad_c = None if tensors[2] is None else grads[2]
    results = iter(
        torch.ops.rim_rnn.scan_backward.default(
            grads[0], grads[1], grad_c, output, winners, saved, ctx.needs_input_grad[0], *tensors, *ctx.sizes
        )
    )
    by_tensor = [None if t is None else next(results) for t in tensors[:-2]]
    if not ctx.needs_input_grad[0]:
        by_tensor[0] = None
    return *by_tensor, *without  # autograd rounds gradients to the dtype of what they belong to


def _backward_of_many(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[list[Tensor], list[int]]:
    """The batching rule of backward, for many gradients of one call: each by itself. A list's ``in_dims`` are a list."""
    backward, dims = torch.ops.rim_rnn.scan_backward.default, list(zip(args, in_dims, strict=True))
    each = [backward(*(a.select(d, i) if isinstance(d, int) else a for a, d in dims)) for i in range(info.batch_size)]
    return [torch.stack(parts) for parts in zip(*each, strict=True)], [0] * len(each[0])


def _backward_of_many_grads(*args: Any) -> list[Tensor]:
    """The same where torch.autograd.grad has is_grads_batched: that is an earlier vmap, which asks for its rule by a key."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    dims = [0 if isinstance(a, Tensor) and torch._C._dispatch_keys(a).has("Batched") else None for a in args]
    args = tuple(a if d is None else torch._remove_batch_dim(a, level, 0, 0) for a, d in zip(args, dims, strict=True))
    size = next(a.size(0) for a, d in zip(args, dims, strict=True) if d is not None)
    results, _ = _backward_of_many(SimpleNamespace(batch_size=size), dims, *args)
    return [torch._add_batch_dim(result, 0, level) for result in results]


class _Scan(torch.autograd.Function):
    """The autograd registered below, without the tenth of a millisecond that torch.library adds to a call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            tensors, sizes = _widened(inputs[:NUM_TENSORS]), inputs[NUM_TENSORS:]
            results: tuple[Tensor, ...] = torch.ops.rim_rnn.scan.default(*tensors, *sizes)
        _setup_context(ctx, inputs, results)
        return results

    backward = staticmethod(_backward)


def _register() -> None:
    torch.library.register_fake("rim_rnn::infer", results_like)
    torch.library.register_fake("rim_rnn::scan", _scan_fake)
    torch.library.register_fake("rim_rnn::scan_backward", _backward_fake)
    torch.library.register_autograd("rim_rnn::scan", _backward, setup_context=_setup_context)
    torch.library.register_vmap("rim_rnn::scan_backward", _backward_of_many)
    torch.library.impl("rim_rnn::scan_backward", "Batched", _backward_of_many_grads)


_unavailable = _load()
