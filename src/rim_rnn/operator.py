"""A scan as one operator, whoever computes it: its schema, the parameters in its order, and what decides whether any operator
may take over, :func:`plain_parameters`; the shapes of its results without running, and gradients that have gradients, which are
those of :meth:`Step.scan` with the given parameters, where autograd differentiates.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from rim_rnn.dynamics import State
from rim_rnn.intact import exactly_ours, oddity
from rim_rnn.recording import Trace
from rim_rnn.step import Step
from rim_rnn.surroundings import is_exporting, is_fake

PARAMETERS = (
    *(f"input_attention.{part}.{name}" for part in ("query", "key", "value") for name in ("weight", "bias")),
    *(f"dynamics.{name}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")),
    *(f"communication.{part}.weight" for part in ("query", "key", "value", "output")),
)
"""A cell's parameters in the order of the schema."""

NUM_TENSORS = 3 + len(PARAMETERS) + 2
"""input, h, c, the parameters, and what dropout drew: the tensors of the schema, before the sizes."""

SCHEMA = (
    "Tensor input, Tensor h, Tensor? c, Tensor query, Tensor? query_bias, Tensor key, Tensor? key_bias, Tensor value, "
    "Tensor? value_bias, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor? weight_hr, "
    "Tensor? comm_query, Tensor? comm_key, Tensor? comm_value, Tensor? comm_output, Tensor? keep_input, Tensor? keep_comm, "
    "int[] batch_sizes, int k, int heads, int comm_heads, bool bounded, bool reverse"
)
"""What every operator takes."""

NUM_SIZES = 6
"""batch_sizes, k, heads, comm_heads, bounded, reverse: the rest of it."""

GRADS = "Tensor? grad_output, Tensor? grad_h, Tensor? grad_c"
"""What every backward takes first."""

ELSEWHERE = "a parameter is not where the cell keeps it"  # as after pruning


PLAIN = (nn.Parameter, Tensor)
"""Tensors that are no more than that. Of a FakeTensor, which is a shape alone, an operator knows the shapes that it returns."""


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
    if has_own_step(cell):
        return f"a {type(cell).__name__} has a step of its own"
    modules: Any = exactly_ours(cell)
    if modules is None:
        return oddity(cell) or "a stage is not ours"
    parameters = in_order(cell, [module._parameters for module in modules])
    if parameters is None:
        return ELSEWHERE
    dtype, on_cpu = input.dtype, input.is_cpu
    for tensor in (input, *state, *parameters):
        if tensor is None:
            continue
        if type(tensor) not in PLAIN and not is_fake(tensor):
            return f"a {type(tensor).__name__} is not a plain tensor"
        if tensor.dtype is not dtype or tensor.is_cpu is not on_cpu:
            return "the tensors differ in dtype or device"
    return parameters


def has_own_step(cell: Any) -> bool:
    """Whether the cell's class puts the stages together in a way of its own."""
    kind = type(cell)
    return (
        kind.step is not Step.step
        or kind.scan is not Step.scan
        or kind.project is not Step.project
        or kind.draw is not Step.draw
    )


def in_order(cell: Any, kept: Sequence[Any]) -> list[Tensor | None] | None:
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


def sizes_of(cell: Any, batch_sizes: Sequence[int] | None, reverse: bool) -> tuple[Any, ...]:
    """The rest of the schema: what the shapes of the tensors do not tell."""
    input_attention, _, communication = cell.stages()
    return [*(batch_sizes or ())], cell.k, input_attention.num_heads, communication.num_heads, communication.bounded, reverse


def is_registered(name: str, schema: str) -> bool:
    """Whether an earlier import, or a copy of this package, has registered the operator. Of another version: an error."""
    try:
        found = str(getattr(torch.ops.rim_rnn, name).default._schema)
    except AttributeError:
        return False
    if found != str(torch._C.parse_schema(f"rim_rnn::{name}{schema}")):
        raise ImportError("another version of rim_rnn has registered its operators in this process")
    return True


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


class Lent(nn.Module):
    """A step whose forward is one of its methods, so that torch.func.functional_call can lend it parameters."""

    def __init__(self, step: Step, method: str) -> None:
        super().__init__()
        self.step, self.method = step, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.step, self.method)(*args, **kwargs)


def lend(
    tensors: Sequence[Any], sizes: tuple[Any, ...], winners: Tensor | None, record: bool = False
) -> tuple[Tensor, State, list[Trace]]:
    """:meth:`Step.scan` of a step with these parameters, and of these ``winners``, ``(rows of all steps, k)``, if given."""
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
        Lent(step, "scan"), parameters, given, {"keep": (keep_input, keep_comm)}
    )
    return done


def run(tensors: Sequence[Any], sizes: tuple[Any, ...], winners: Tensor | None = None) -> tuple[Tensor, ...]:
    """The outputs and last states of the same."""
    output, last, _ = lend(tensors, sizes, winners)
    return output, *last


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
