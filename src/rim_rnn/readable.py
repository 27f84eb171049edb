"""The readable scan where it can not simply run: one node of the graph for any number of steps under torch.compile, a loop
over a number of steps that torch.export leaves open, parameters that are computed from others.

It is equal to :meth:`Step.scan` because it calls that, or its step, with the given parameters, and lets autograd differentiate.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan as scan_operator
from torch.nn.utils import parametrize

from rim_rnn.dynamics import State
from rim_rnn.intact import exactly_ours, kind_without_parametrisation
from rim_rnn.operator import (
    ELSEWHERE,
    GRADS,
    NUM_TENSORS,
    SCHEMA,
    Lent,
    gradients_like,
    has_own_step,
    in_order,
    is_registered,
    lend,
    plain_parameters,
    results_like,
    run,
    sizes_of,
)
from rim_rnn.recording import Trace
from rim_rnn.step import Projected, Step
from rim_rnn.surroundings import autocast_dtype, is_exporting, is_fake, is_traced_by_fx
from rim_rnn.units import divide, unite

UNROLLED = 16
"""Up to so many steps torch.compile sees each of them and fuses what it finds, which takes its time for every one; unless it
leaves their number open, as it does from the second number on that it is shown: then one graph serves all."""


def _is_short(steps: int) -> bool:
    """Whether a compiler knows that there are no more than :data:`UNROLLED` steps, and not only of its example."""
    shapes: Any = torch.fx.experimental.symbolic_shapes  # a compiler has imported it, `import torch` has not
    short: bool = shapes.statically_known_true(steps <= UNROLLED)
    return short


def scan(
    cell: Any, input: Tensor, state: State, batch_sizes: Sequence[int] | None, reverse: bool, record: bool
) -> tuple[Tensor, State, list[Trace]] | None:
    """:meth:`Step.scan` as one operator, where torch.compile would unroll many steps, and from weights that are computed once,
    as :class:`torch.nn.LSTM` does it, where parametrisations compute some; elsewhere ``None``."""
    steps = input.size(0) if batch_sizes is None else len(batch_sizes)
    compiling = torch.compiler.is_compiling()
    graph = compiling or (is_fake(input) and is_traced_by_fx())  # make_fx, with shapes alone
    if graph:
        if is_exporting() or record or autocast_dtype(input.device) or (compiling and _is_short(steps)):
            return None
        parameters = plain_parameters(cell, input, state)
    else:
        if steps == 1 or torch._C._get_tracing_state() is not None:
            return None
        parameters = computed_parameters(cell) or ELSEWHERE
    if isinstance(parameters, str):
        return None
    c = state[1] if len(state) == 2 else None
    tensors = [input, state[0], c, *parameters, *cell.draw(input)]
    sizes = sizes_of(cell, batch_sizes, reverse)
    if not graph:
        return lend(tensors, sizes, None, record)
    output, h_n, c_n = torch.ops.rim_rnn.readable.default(*tensors, *sizes)
    return output, (h_n,) if c is None else (h_n, c_n), []


def loop(
    cell: Step, input: Tensor, state: State, batch_sizes: Sequence[int] | None, reverse: bool, record: bool
) -> tuple[Tensor, State, list[Trace]] | None:
    """:meth:`Step.scan` as a loop in the graph of torch.export, if that leaves the number of steps open; elsewhere ``None``."""
    if record or not (torch.compiler.is_compiling() and is_exporting()):
        return None
    if batch_sizes is not None or isinstance(input.size(0), int):
        return None
    steps, batch, size = input.shape
    onnx = torch.onnx.is_in_onnx_export()  # whose passes run the loop again, and stumble over what gradients would need

    def bare(tensor: Tensor) -> Tensor:
        return tensor.detach() if onnx else tensor

    _, key, gates, *keep, comm_weight = cell.project(input.reshape(steps * batch, size), cell.draw(input))
    gates = None if gates is None else gates.transpose(0, 1)  # rows first, as all have them
    rows: list[Any] = [part if part is None else part.view(steps, batch, *part.shape[1:]) for part in (key, gates, *keep)]
    # No views: Dynamo's guards do not take them.
    rows = [part if part is None else bare(part.flip(0) if reverse else part.clone()) for part in (input, *rows)]
    comm_weight = comm_weight if comm_weight is None else bare(comm_weight)
    lent, parameters = Lent(cell, "step"), {f"step.{name}": p.detach() for name, p in cell.named_parameters()}

    def advance(now: State, given: list[Tensor]) -> tuple[State, Tensor]:
        some = iter(given)
        every: list[Any] = [part if part is None else next(some) for part in rows]
        x, key, gates, keep_input, keep_comm = every
        gates = None if gates is None else gates.transpose(0, 1)
        projected = Projected(x, key, gates, keep_input, keep_comm, comm_weight)
        now, _ = torch.func.functional_call(lent, parameters, (projected, now)) if onnx else cell.step(projected, now)
        return now, now[0].clone()

    first = tuple(torch.stack(divide(s, cell.num_units).unbind(0)) for s in state)  # contiguous, whatever the batch
    asked = next((p for p in cell.parameters() if p.requires_grad), None)
    if not onnx and asked is not None and torch.is_grad_enabled():
        # torch 2.10 gets all gradients wrong unless the first state asks for one.
        first = tuple(torch.where(s.new_zeros((), dtype=torch.bool), asked.flatten()[0], s) for s in first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns itself: of being compiled inside an export, of asking for .grad
        last, outputs = scan_operator(advance, first, [part for part in rows if part is not None])
    output = unite((outputs.flip(0) if reverse else outputs).transpose(0, 1))
    return output, tuple(unite(s.unsqueeze(1) if state[0].dim() == 3 else s) for s in last), []


def unrolled(
    cell: Step, input: Tensor, state: State, batch_sizes: list[int] | None, reverse: bool, record: bool
) -> tuple[Tensor, State, list[Trace]] | None:
    """:meth:`Step.scan` where a compiler sees every step, and is shown one computation of what parametrisations compute;
    elsewhere ``None``."""
    if not (torch.compiler.is_compiling() and is_computed(cell)):
        return None
    with parametrize.cached():
        done = cell.scan(input, state, batch_sizes, reverse, record)
    return done


def is_computed(cell: nn.Module) -> bool:
    """Whether torch.nn.utils.parametrize computes one of the cell's parameters."""
    return any([parametrize.is_parametrized(module) for module in cell.modules()])  # noqa: C419 (of torch.compile)


def computed_parameters(cell: Any) -> list[Tensor | None] | None:
    """The parameters of such a cell, each computed once; ``None`` of another, or where there is more to heed."""
    if not is_computed(cell) or has_own_step(cell):
        return None
    modules: Any = exactly_ours(cell, kind_without_parametrisation)
    if modules is None:
        return None
    computed = [getattr(module, "parametrizations", ()) for module in modules]
    return in_order(
        cell,
        [{**m._parameters, **{name: getattr(m, name) for name in names}} for m, names in zip(modules, computed, strict=True)],
    )


def _readable(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    results = run(args[:NUM_TENSORS], args[NUM_TENSORS:])
    return (*results, results_like(*args)[2]) if args[2] is None else results  # type: ignore[return-value]


def _readable_backward(*args: Any) -> list[Tensor]:
    grads, tensors, sizes = args[:3], args[3 : 3 + NUM_TENSORS], args[3 + NUM_TENSORS :]
    places = [i for i, t in enumerate(tensors[:-2]) if t is not None]

    def results(*leaves: Tensor) -> tuple[Tensor, ...]:
        lent = list(tensors)
        for place, leaf in zip(places, leaves, strict=True):
            lent[place] = leaf
        return run(lent, sizes)

    found, pull = torch.func.vjp(  # type: ignore[misc]
        results, *(tensors[i] for i in places)
    )
    cotangents = tuple(torch.zeros_like(r) if g is None else g for r, g in zip(found, grads, strict=False))
    return [gradient.contiguous() for gradient in pull(cotangents)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:NUM_TENSORS])
    ctx.sizes = inputs[NUM_TENSORS:]


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    found = iter(torch.ops.rim_rnn.readable_backward.default(*grads, *tensors, *ctx.sizes))
    return *(None if t is None else next(found) for t in tensors[:-2]), None, None, *(None for _ in ctx.sizes)


def _register() -> None:
    forward = f"({SCHEMA}) -> (Tensor output, Tensor h_n, Tensor c_n)"
    if is_registered("readable", forward):
        return
    torch.library.define("rim_rnn::readable", forward)
    torch.library.define("rim_rnn::readable_backward", f"({GRADS}, {SCHEMA}) -> Tensor[]")
    torch.library.impl("rim_rnn::readable", "CompositeExplicitAutograd", _readable)
    torch.library.impl("rim_rnn::readable_backward", "CompositeExplicitAutograd", _readable_backward)
    torch.library.register_fake("rim_rnn::readable", results_like)
    torch.library.register_fake("rim_rnn::readable_backward", lambda *args: gradients_like(*args[3 : 1 + NUM_TENSORS]))
    torch.library.register_autograd("rim_rnn::readable", _backward, setup_context=_setup_context)


_register()
