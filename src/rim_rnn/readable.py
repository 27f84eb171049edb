"""The readable scan where it can not simply run: one node of the graph for any number of steps under torch.compile, a loop
over a number of steps that torch.export leaves open, gradients that have gradients.

It is equal to :meth:`Step.scan` because it calls that, or its step, with the given parameters, and lets autograd differentiate.
Here too stands what decides whether any operator may take over, :func:`plain_parameters`, in the order of the schema.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan as scan_operator
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from rim_rnn.dynamics import State
from rim_rnn.recording import Trace
from rim_rnn.step import Projected, Step, exactly_ours, kind_without_parametrisation, oddity
from rim_rnn.units import autocast_dtype, divide, is_exporting, unite

UNROLLED = 16
"""Up to so many steps torch.compile sees each of them and fuses what it finds, which takes its time for every one."""

PARAMETERS = (
    *(f"input_attention.{part}.{name}" for part in ("query", "key", "value") for name in ("weight", "bias")),
    *(f"dynamics.{name}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")),
    *(f"communication.{part}.weight" for part in ("query", "key", "value", "output")),
)
"""A cell's parameters in the order of the operators' schema."""

NUM_TENSORS = 3 + len(PARAMETERS) + 2
"""input, h, c, the parameters, and what dropout drew: the tensors of the schema, before the sizes."""


def plain_parameters(cell: Any, input: Tensor, state: State) -> list[Tensor | None] | str:
    """The parameters in the order of the schema, ``None`` where the cell has none; or why they do not tell all of a call."""
    if input.numel() == 0:
        return "the input is empty"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is on"
    if isinstance(torch._C._functorch.peek_interpreter_stack(), torch._C._functorch.CInterpreter):
        return "a torch.func transform is active"
    if not torch.compiler.is_compiling():
        if torch._C._get_tracing_state() is not None:
            return "torch.jit is tracing"
    elif is_exporting():
        return "torch.export: the graph stays portable"
    if _has_own_step(cell):
        return f"a {type(cell).__name__} has a step of its own"
    modules: Any = exactly_ours(cell)
    if modules is None:
        return oddity(cell) or "a stage is not ours"
    parameters = _in_order(cell, [module._parameters for module in modules])
    if parameters is None:
        return ELSEWHERE
    dtype, on_cpu = input.dtype, input.is_cpu
    for tensor in (input, *state, *parameters):
        if tensor is None:
            continue
        if type(tensor) is not nn.Parameter and type(tensor) is not Tensor:
            return f"a {type(tensor).__name__} is not a plain tensor"
        if tensor.dtype is not dtype or tensor.is_cpu is not on_cpu:
            return "the tensors differ in dtype or device"
    return parameters


ELSEWHERE = "a parameter is not where the cell keeps it"  # as after pruning


def is_computed(cell: nn.Module) -> bool:
    """Whether torch.nn.utils.parametrize computes one of the cell's parameters."""
    return any([parametrize.is_parametrized(module) for module in cell.modules()])  # noqa: C419 (of torch.compile)


def computed_parameters(cell: Any) -> list[Tensor | None] | None:
    """The parameters of such a cell, each computed once; ``None`` of another, or where there is more to heed."""
    if not is_computed(cell) or _has_own_step(cell):
        return None
    modules: Any = exactly_ours(cell, kind_without_parametrisation)
    if modules is None:
        return None
    computed = [getattr(module, "parametrizations", ()) for module in modules]
    return _in_order(
        cell,
        [{**m._parameters, **{name: getattr(m, name) for name in names}} for m, names in zip(modules, computed, strict=True)],
    )


def _has_own_step(cell: Any) -> bool:
    """Whether the cell's class puts the stages together in a way of its own."""
    kind = type(cell)
    return (
        kind.step is not Step.step
        or kind.scan is not Step.scan
        or kind.project is not Step.project
        or kind.draw is not Step.draw
    )


def _in_order(cell: Any, kept: Sequence[Any]) -> list[Tensor | None] | None:
    """What each module of :func:`exactly_ours` keeps, by name, in the order of the schema; ``None`` if it is not all there."""
    _, query, key, value, gates, _, *talking = kept
    try:
        parameters: list[Tensor | None] = [
            *[part[name] for part in (query, key, value) for name in ("weight", "bias")],
            *(gates["weight_ih"], gates["weight_hh"], gates["bias_ih"], gates["bias_hh"], gates.get("weight_hr")),
            *([part["weight"] for part in talking] or (None,) * 4),
        ]
    except KeyError:
        return None
    absent = (0 if cell.bias else 5) + (0 if cell.proj_size else 1) + (0 if cell.stages()[2].num_heads else 4)
    return parameters if sum([tensor is None for tensor in parameters]) == absent else None


def scan(
    cell: Any, input: Tensor, state: State, batch_sizes: Sequence[int] | None, reverse: bool, record: bool
) -> tuple[Tensor, State, list[Trace]] | None:
    """:meth:`Step.scan` as one operator, where torch.compile would unroll many steps, and from weights that are computed once,
    as :class:`torch.nn.LSTM` does it, where parametrisations compute some; elsewhere ``None``."""
    steps = input.size(0) if batch_sizes is None else len(batch_sizes)
    compiling = torch.compiler.is_compiling()
    if compiling:
        if is_exporting() or record or autocast_dtype(input.device) or steps <= UNROLLED:
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
    if not compiling:
        return _lend(tensors, sizes, None, record)
    output, h_n, c_n = torch.ops.rim_rnn.readable.default(*tensors, *sizes)
    return output, (h_n,) if c is None else (h_n, c_n), []


def loop(
    cell: Step, input: Tensor, state: State, batch_sizes: Sequence[int] | None, reverse: bool
) -> tuple[Tensor, State, list[Trace]] | None:
    """:meth:`Step.scan` as a loop in the graph of torch.export, if that leaves the number of steps open; elsewhere ``None``."""
    if not (torch.compiler.is_compiling() and is_exporting()) or batch_sizes is not None or isinstance(input.size(0), int):
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
    lent, parameters = _Lent(cell, "step"), {f"step.{name}": p.detach() for name, p in cell.named_parameters()}

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


def sizes_of(cell: Any, batch_sizes: Sequence[int] | None, reverse: bool) -> tuple[Any, ...]:
    """The rest of the schema: what the shapes of the tensors do not tell."""
    input_attention, _, communication = cell.stages()
    return [*(batch_sizes or ())], cell.k, input_attention.num_heads, communication.num_heads, communication.bounded, reverse


class _Lent(nn.Module):
    """A step whose forward is one of its methods, so that torch.func.functional_call can lend it parameters."""

    def __init__(self, step: Step, method: str) -> None:
        super().__init__()
        self.step, self.method = step, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.step, self.method)(*args, **kwargs)


def run(tensors: Sequence[Any], sizes: tuple[Any, ...], winners: Tensor | None = None) -> tuple[Tensor, ...]:
    """The readable scan of a step with these parameters, and of these ``winners``, ``(rows of all steps, k)``, if given."""
    output, last, _ = _lend(tensors, sizes, winners)
    return output, *last


def _lend(
    tensors: Sequence[Any], sizes: tuple[Any, ...], winners: Tensor | None, record: bool = False
) -> tuple[Tensor, State, list[Trace]]:
    *tensors, keep_input, keep_comm = tensors
    input, h, c, query, query_bias, key, _, value, _, weight_ih, *_ = tensors
    comm_query, _, comm_value, _ = tensors[-4:]
    batch_sizes, k, heads, comm_heads, bounded, reverse = sizes
    n = query.size(0)
    with torch.no_grad():
        step = Step(
            input.size(-1),
            n * (weight_ih.size(2) // (3 if c is None else 4)),
            query_bias is not None,
            device="meta",
            dtype=input.dtype,
            proj_size=0 if tensors[13] is None else n * query.size(1),
            num_units=n,
            k=k,
            rnn_cell="GRU" if c is None else "LSTM",
            key_size_input=key.size(0) // heads,
            value_size_input=value.size(0) // heads,
            num_input_heads=heads,
            input_dropout=0.0,
            key_size_comm=1 if comm_query is None else comm_query.size(2) // comm_heads,
            value_size_comm=1 if comm_value is None else comm_value.size(2) // comm_heads,
            num_comm_heads=comm_heads,
            comm_dropout=0.0,
            comm_bounded=bounded,
        )
    if winners is not None:
        present = list(batch_sizes) or [input.size(1)] * input.size(0)
        won = h.new_zeros(len(winners), n).scatter(1, winners.long(), 1.0).t().unsqueeze(-1).split(present, dim=1)
        order = iter(won[::-1] if reverse else won)
        step.input_attention.register_forward_hook(lambda module, given, made: (next(order), *made[1:]))  # in place of scores
    parameters = {f"step.{name}": t for name, t in zip(PARAMETERS, tensors[3:], strict=True) if t is not None}
    state = (h,) if c is None else (h, c)
    given = input, state, list(batch_sizes) or None, reverse, record
    done: tuple[Tensor, State, list[Trace]] = torch.func.functional_call(
        _Lent(step, "scan"), parameters, given, {"keep": (keep_input, keep_comm)}
    )
    return done


def differentiate(
    tensors: Sequence[Any],
    sizes: tuple[Any, ...],
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
    winners: Tensor,
) -> list[Tensor | None]:
    """The gradients of a scan, themselves differentiable, for each of the ``tensors`` but what dropout drew.

    The scan had these ``winners``. Another competition may have others, where bids differ by no more than rounding.
    Tensors of one call may share a history, or be one another's. An alias of each has none but that it is an alias of it:
    gradients stop there, and theirs go on.
    """
    aliases: list[Any] = [t if t is None else t.view_as(t) for t in tensors]
    places = [i for i, (t, want) in enumerate(zip(aliases[:-2], wanted, strict=False)) if t is not None and want]
    found: list[Tensor | None] = [None] * (len(tensors) - 2)
    with torch.autocast(tensors[0].device.type, enabled=False):  # forward was not lowered either
        results = run(aliases, sizes, winners)
        given = [(r, g) for r, g in zip(results, grads, strict=False) if g is not None and r.requires_grad]
        if given and places:
            outputs, given_grads = zip(*given, strict=True)
            gradients = torch.autograd.grad(
                outputs, [aliases[i] for i in places], given_grads, create_graph=True, allow_unused=True
            )
            for place, gradient in zip(places, gradients, strict=True):
                found[place] = gradient
    return found


def on_one_device(*arguments: Any) -> None:
    """An error where one tensor of many is on the meta device, which the shapes alone would not notice."""
    devices = {a.device for a in arguments if isinstance(a, Tensor)}
    if len(devices) > 1:
        raise RuntimeError(f"rim_rnn: all tensors should be on one device, got {', '.join(sorted(map(str, devices)))}")


def results_like(input: Tensor, h: Tensor, c: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs and last states, empty: their shapes without running. A GRU's ``c_n`` has no rows."""
    on_one_device(input, h, c, *rest)
    query, weight_ih = rest[0], rest[6]
    if input is None or h is None or query is None or weight_ih is None:
        raise RuntimeError(
            "rim_rnn: input, h_0, input_attention.query.weight and dynamics.weight_ih should be tensors, got None"
        )
    output = input.new_empty(*input.shape[:-1], h.shape[-1])
    c_n = input.new_empty(*((0, weight_ih.shape[0] * (weight_ih.shape[2] // 3)) if c is None else c.shape))
    return output, h.new_empty(h.shape), c_n


def gradients_like(*tensors: Tensor | None) -> list[Tensor]:
    """One for each tensor that is there, contiguous and empty."""
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors if t is not None]


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


SCHEMA = (
    "Tensor input, Tensor h, Tensor? c, Tensor query, Tensor? query_bias, Tensor key, Tensor? key_bias, Tensor value, "
    "Tensor? value_bias, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor? weight_hr, "
    "Tensor? comm_query, Tensor? comm_key, Tensor? comm_value, Tensor? comm_output, Tensor? keep_input, Tensor? keep_comm, "
    "int[] batch_sizes, int k, int heads, int comm_heads, bool bounded, bool reverse"
)


def is_registered(name: str, schema: str) -> bool:
    """Whether an earlier import, or a copy of this package, has registered the operator. Of another version: an error."""
    try:
        found = str(getattr(torch.ops.rim_rnn, name).default._schema)
    except AttributeError:
        return False
    if found != str(torch._C.parse_schema(f"rim_rnn::{name}{schema}")):
        raise ImportError("another version of rim_rnn has registered its operators in this process")
    return True


def _register() -> None:
    forward = f"({SCHEMA}) -> (Tensor output, Tensor h_n, Tensor c_n)"
    if is_registered("readable", forward):
        return
    torch.library.define("rim_rnn::readable", forward)
    torch.library.define(
        "rim_rnn::readable_backward", f"(Tensor? grad_output, Tensor? grad_h, Tensor? grad_c, {SCHEMA}) -> Tensor[]"
    )
    torch.library.impl("rim_rnn::readable", "CompositeExplicitAutograd", _readable)
    torch.library.impl("rim_rnn::readable_backward", "CompositeExplicitAutograd", _readable_backward)
    torch.library.register_fake("rim_rnn::readable", results_like)
    torch.library.register_fake("rim_rnn::readable_backward", lambda *args: gradients_like(*args[3 : 1 + NUM_TENSORS]))
    torch.library.register_autograd("rim_rnn::readable", _backward, setup_context=_setup_context)


_register()
