"""What fast paths share. Each is a scan in one operator of its own, forward and backward; here stands how a call becomes one of
the operator, and what torch.library wants to know of it beside what operator.py says.
"""

import abc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rim_rnn.dynamics import State
from rim_rnn.operator import (
    GRADS,
    NUM_SIZES,
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

NARROW = (torch.bfloat16, torch.float16)
"""Computed in float32, and the results are rounded."""


def _widened(tensors: Sequence[Any]) -> Sequence[Any]:
    """The tensors of the schema in a dtype that an operator computes in."""
    return [t if t is None else t.float() for t in tensors] if tensors[0].dtype in NARROW else tensors


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


def is_switched_off() -> bool:
    """Whether a call that begins now takes the readable path because of :func:`readable`."""
    return _switched_off > 0


class FastPath(abc.ABC):
    """A scan in three operators of ``torch.ops.rim_rnn``, whose schemas :meth:`schemas` gives.

    The first, for calls without gradients, returns the outputs and last states alone. The second returns them with the winners,
    int32 ``(rows of all steps, k)``, and ``saved``, whatever the third wants to know. The third is given both, and returns a
    gradient for each tensor that is there, but for what dropout drew; without ``input_grad`` the input's is of no size. None of
    them meets a dtype of :data:`NARROW`.

    A subclass says what the operators are called, when to decline, and how it fills ``saved``; it calls :meth:`register` once
    before the first scan.
    """

    name: str
    """What :meth:`RIM.path` calls it."""
    names: tuple[str, str, str]
    """Of the three operators."""
    options: str
    """What they take behind :data:`SCHEMA`, as a schema has it: nothing, or ``", "`` first."""

    @abc.abstractmethod
    def serves(self, device: torch.device) -> bool:
        """Whether it is for tensors on this device, and its reason to decline the one to tell."""

    @abc.abstractmethod
    def declines(self, input: Tensor) -> str | None:
        """Why this path can not take over a call, or ``None``. What keeps every path from it is said elsewhere."""

    @abc.abstractmethod
    def told(self, input: Tensor) -> tuple[Any, ...]:
        """The values of the :attr:`options` for a call with this input, whose dtype may be one of :data:`NARROW`."""

    @abc.abstractmethod
    def size_saved(self, rows: int, n: int, p: int, u: int, lstm: bool, k: int, heads: int, talk: int, bounded: bool) -> int:
        """The number of elements in ``saved`` for so many rows of all steps, with ``talk`` heads of the communication."""

    @abc.abstractmethod
    def heard(self, saved: Tensor, winners: Tensor, n: int, talk: int) -> Tensor:
        """How much each winner took from each unit, ``(rows, talk, k, n)``, from what was saved."""

    def schemas(self) -> dict[str, str]:
        """What the operators take and return, by name."""
        infer, scan, backward = self.names
        results, takes = "Tensor output, Tensor h_n, Tensor c_n", f"{SCHEMA}{self.options}"
        return {
            infer: f"({takes}) -> ({results})",
            scan: f"({takes}) -> ({results}, Tensor winners, Tensor saved)",
            backward: f"({GRADS}, Tensor output, Tensor winners, Tensor saved, bool input_grad, {takes}) -> Tensor[]",
        }

    def register(self, load: Callable[[], object]) -> None:
        """Take the operators of an earlier import, or else let ``load`` register them, and tell torch.library what it asks."""
        if not all(is_registered(name, schema) for name, schema in self.schemas().items()):
            load()
            infer, scan, backward = (f"rim_rnn::{name}" for name in self.names)
            torch.library.register_fake(infer, results_like)
            torch.library.register_fake(scan, self._scan_fake)
            torch.library.register_fake(backward, self._backward_fake)
            torch.library.register_autograd(scan, self._backward, setup_context=self._setup_context)
            torch.library.register_vmap(backward, self._backward_of_many)
            torch.library.impl(backward, "Batched", self._backward_of_many_grads)
        self._infer, self._scan, self._scan_backward = (getattr(torch.ops.rim_rnn, name).default for name in self.names)

        class _Scan(torch.autograd.Function):
            """The autograd registered above, without the tenth of a millisecond that torch.library adds to a call."""

            forward = staticmethod(self._forward)
            backward = staticmethod(self._backward)

        self._differentiable: Any = _Scan.apply

    def supports(self, cell: Any, input: Tensor, state: State) -> str | None:
        """Why a call can not run this way, or ``None`` where it can.

        Args:
            cell: The :class:`Step`.
            input, state: As :meth:`Step.scan` takes them.

        Returns:
            The first reason for taking another path, or ``None``.
        """
        found = self.parameters(cell, input, state)
        return found if isinstance(found, str) else None

    def parameters(self, cell: Any, input: Tensor, state: State) -> list[Tensor | None] | str:
        """The parameters in the order of the schema, ``None`` where the cell has none; or a reason to decline."""
        return self.declines(input) or plain_parameters(cell, input, state)

    def scan(
        self,
        cell: Any,
        input: Tensor,
        state: State,
        batch_sizes: Sequence[int] | None = None,
        reverse: bool = False,
        record: bool = False,
    ) -> tuple[Tensor, State, list[Trace]] | None:
        """:meth:`Step.scan` in this operator.

        Args:
            cell: The :class:`Step`.
            input: ``(T, N, input_size)``, or packed ``(sum(batch_sizes), input_size)``.
            state: ``(h_0, c_0)`` or ``(h_0,)``, each ``(N, features)`` or ``(1, N, features)``.
            batch_sizes: Rows present at each step, never growing; ``None`` where the input is not packed.
            reverse: Go from the last step to the first; results stay in the input's order of time.
            record: Also return what each step did.

        Returns:
            The outputs in the layout of ``input``, the last states in that of ``state``, and one trace per step if ``record``;
            or ``None`` where :meth:`supports` has a reason to decline.

        Raises:
            RuntimeError: A size does not fit; the message names it.
        """
        parameters = self.parameters(cell, input, state)
        if isinstance(parameters, str):
            return None
        c = state[1] if len(state) == 2 else None
        tensors: Sequence[Any]
        tensors = [input, state[0], c, *parameters, *cell.draw(input)]
        sizes = *sizes_of(cell, batch_sizes, reverse), *self.told(input)
        traces: list[Trace] = []
        differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        ours = differentiable and not torch.compiler.is_compiling()
        if not ours:
            tensors = _widened(tensors)
        if differentiable or record:
            operator = self._differentiable if ours else self._scan
            output, h_n, c_n, winners, saved = operator(*tensors, *sizes)
            if record:
                with torch.no_grad():
                    h_0 = state[0].reshape(-1, state[0].size(-1))
                    traces = self._traces(cell, input, h_0, batch_sizes, reverse, output, winners, saved)
        else:
            output, h_n, c_n = self._infer(*tensors, *sizes)
        if input.dtype in NARROW:
            output, h_n, c_n = output.to(input.dtype), h_n.to(input.dtype), c_n.to(input.dtype)
        return output, (h_n,) if c is None else (h_n, c_n), traces

    def _traces(
        self,
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
        active = winners.new_zeros(total, n, dtype=torch.bool).scatter(1, winners.long(), True).t()
        readers = winners.long().view(total, 1, k, 1).expand(total, heads, k, n)
        communication = saved.new_zeros(total, heads, n, n).scatter(2, readers, self.heard(saved, winners, n, heads))
        parts = torch.split(active, rows, dim=1), torch.split(a_input, rows, dim=1), torch.split(communication, rows)
        return [Trace(*step) for step in zip(*parts, strict=True)]

    def _scan_fake(self, input: Tensor, h: Tensor, c: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        results, query, weight_ih = results_like(input, h, c, *rest), rest[0], rest[6]
        _, k, heads, talk, bounded, *_ = rest[NUM_TENSORS - 3 :]
        total = input.numel() // input.shape[-1]
        u = weight_ih.shape[2] // (3 if c is None else 4)
        n, p, _ = query.shape
        size = self.size_saved(total, n, p, u, c is not None, k, heads, talk, bounded)
        winners = input.new_empty(total, k, dtype=torch.int32)
        return *results, winners, input.new_empty(size)

    def _backward_fake(self, *args: Any) -> list[Tensor]:
        on_one_device(*args)
        input_grad, tensors = args[6], args[7 : 7 + NUM_TENSORS]
        grads = gradients_like(*tensors[:-2])
        return grads if input_grad else [grads[0].new_empty(0), *grads[1:]]

    def _forward(self, ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            tensors, sizes = _widened(inputs[:NUM_TENSORS]), inputs[NUM_TENSORS:]
            results: tuple[Tensor, ...] = self._scan(*tensors, *sizes)
        self._setup_context(ctx, inputs, results)
        return results

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[3], output[4])
        ctx.save_for_backward(*inputs[:NUM_TENSORS], output[0], output[3], output[4])
        ctx.sizes = inputs[NUM_TENSORS:]

    def _backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        *given, output, winners, saved = ctx.saved_tensors
        tensors = _widened(given)
        without = None, None, *(None for _ in ctx.sizes)  # what dropout drew, and the sizes, have no gradient
        if torch.is_grad_enabled():  # exactly when the caller asked for create_graph
            found = differentiate(tensors, ctx.sizes[:NUM_SIZES], grads[:3], ctx.needs_input_grad, winners)
            return *found, *without
        grad_c = None if tensors[2] is None else grads[2]
        results = iter(
            self._scan_backward(
                grads[0], grads[1], grad_c, output, winners, saved, ctx.needs_input_grad[0], *tensors, *ctx.sizes
            )
        )
        by_tensor = [None if t is None else next(results) for t in tensors[:-2]]
        if not ctx.needs_input_grad[0]:
            by_tensor[0] = None
        return *by_tensor, *without  # autograd rounds gradients to the dtype of what they belong to

    def _backward_of_many(self, info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[list[Tensor], list[int]]:
        """The batching rule of backward, for many gradients of one call: each by itself. A list's ``in_dims`` are a list."""
        backward, dims = self._scan_backward, list(zip(args, in_dims, strict=True))
        each = [backward(*(a.select(d, i) if isinstance(d, int) else a for a, d in dims)) for i in range(info.batch_size)]
        return [torch.stack(parts) for parts in zip(*each, strict=True)], [0] * len(each[0])

    def _backward_of_many_grads(self, *args: Any) -> list[Tensor]:
        """The same where torch.autograd.grad has is_grads_batched: an earlier vmap, which asks for its rule by a key."""
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        dims = [0 if isinstance(a, Tensor) and torch._C._dispatch_keys(a).has("Batched") else None for a in args]
        args = tuple(a if d is None else torch._remove_batch_dim(a, level, 0, 0) for a, d in zip(args, dims, strict=True))
        size = next(a.size(0) for a, d in zip(args, dims, strict=True) if d is not None)
        results, _ = self._backward_of_many(SimpleNamespace(batch_size=size), dims, *args)
        return [torch._add_batch_dim(result, 0, level) for result in results]
