"""The readable scan as one operator: under torch.compile the graph, and the time it takes to compile, stay the same for any
number of steps.

It is equal to :meth:`RIMCell.scan` because it calls that on a cell with the given parameters; its backward calls it again and
lets autograd differentiate, which is also how the native operator answers double backward.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from rim_rnn.communication import Communication
from rim_rnn.dynamics import GRU, LSTM
from rim_rnn.input_attention import InputAttention
from rim_rnn.recording import Trace
from rim_rnn.units import UnitLinear, autocast_dtype

State = tuple[Tensor, ...]

UNROLLED = 16
"""Up to so many steps torch.compile sees each of them and fuses what it finds, which takes its time for every one."""

MODULES: dict[str, tuple[type[nn.Module], ...]] = {
    "input_attention": (InputAttention,),
    "input_attention.query": (UnitLinear,),
    "input_attention.key": (nn.Linear,),
    "input_attention.value": (nn.Linear,),
    "dynamics": (LSTM, GRU),
    "communication": (Communication,),
    **{f"communication.{part}": (UnitLinear,) for part in ("query", "key", "value", "output")},
}
"""A cell's modules and what they have to be. Those of the communication come last: without heads it has none."""

KINDS = {kinds[:length] for kinds in product(*MODULES.values()) for length in (len(MODULES) - 4, len(MODULES))}
"""The same by position, for one look-up."""

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
    elif torch.compiler._is_exporting_flag:  # what is_exporting() says, but under Dynamo of torch 2.10, which takes it for true
        return "torch.export: the graph stays portable"
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks or nn_module._global_backward_hooks:
        return "a global module hook is registered"
    try:
        attention, dynamics, communication = cell.stages()
        parts, talk = attention._modules, communication._modules
        reading = parts["query"], parts["key"], parts["value"]
        talking = (talk["query"], talk["key"], talk["value"], talk["output"]) if talk else ()
        modules = (attention, *reading, dynamics, communication, *talking)
        if tuple(map(type, modules)) not in KINDS:
            return oddity(cell)
        for module in modules:
            if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
                return oddity(cell)
        gates = dynamics._parameters
        parameters: list[Tensor | None] = [
            *[module._parameters[name] for module in reading for name in ("weight", "bias")],
            *(gates["weight_ih"], gates["weight_hh"], gates["bias_ih"], gates["bias_hh"], gates.get("weight_hr")),
            *([module._parameters["weight"] for module in talking] or (None,) * 4),
        ]
    except (KeyError, AttributeError):  # something was put in its place
        return oddity(cell)
    absent, dtype, on_cpu = 0, input.dtype, input.is_cpu
    for tensor in (input, *state, *parameters):
        if tensor is None:
            absent += 1
            continue
        if type(tensor) is not nn.Parameter and type(tensor) is not Tensor:
            return f"a {type(tensor).__name__} is not a plain tensor"
        if tensor.dtype is not dtype or tensor.is_cpu is not on_cpu:
            return "the tensors differ in dtype or device"
    if absent != (0 if cell.bias else 5) + (0 if cell.proj_size else 1) + (0 if communication.num_heads else 4):
        return oddity(cell)
    return parameters


def oddity(cell: Any) -> str:
    """Why a cell's parameters do not tell all of a call, in words: :func:`plain_parameters` only sees that it is so."""
    for path, kinds in MODULES.items():
        module = cell
        for name in path.split("."):
            module = module._modules.get(name)
            if module is None:
                break
        if module is None:
            if path.startswith("communication.") and not cell._modules["communication"].num_heads:
                continue
            return f"{path} is missing"
        if type(module) not in kinds:
            return f"{path} is a {type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return f"a hook is registered in {path}"
    return "a parameter is not where the cell keeps it"  # as after pruning


def scan(
    cell: Any, input: Tensor, state: State, batch_sizes: Sequence[int] | None, reverse: bool, record: bool
) -> tuple[Tensor, State, list[Trace]] | None:
    """:meth:`RIMCell.scan` as one operator, where torch.compile would unroll many steps; elsewhere ``None``."""
    if not torch.compiler.is_compiling() or record or autocast_dtype(input.device):
        return None
    if (input.size(0) if batch_sizes is None else len(batch_sizes)) <= UNROLLED:
        return None
    parameters = plain_parameters(cell, input, state)
    if isinstance(parameters, str):
        return None
    c = state[1] if len(state) == 2 else None
    output, h_n, c_n = torch.ops.rim_rnn.readable.default(
        input, state[0], c, *parameters, *cell.draw(input), *sizes_of(cell, batch_sizes, reverse)
    )
    return output, (h_n,) if c is None else (h_n, c_n), []


def sizes_of(cell: Any, batch_sizes: Sequence[int] | None, reverse: bool) -> tuple[Any, ...]:
    """The rest of the schema: what the shapes of the tensors do not tell."""
    input_attention, _, communication = cell.stages()
    return [*(batch_sizes or ())], cell.k, input_attention.num_heads, communication.num_heads, reverse


class _Scan(nn.Module):
    """A cell whose forward is its scan, so that torch.func.functional_call can lend it parameters."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.cell = cell

    def forward(
        self, input: Tensor, state: State, batch_sizes: list[int] | None, reverse: bool, keep: Any
    ) -> tuple[Tensor, ...]:
        output, last, _ = self.cell.scan(input, state, batch_sizes, reverse, keep=keep)
        return output, *last


def run(tensors: Sequence[Any], sizes: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The readable scan of a cell with these parameters."""
    from rim_rnn.cell import RIMCell  # the one look upwards: the definition itself

    *tensors, keep_input, keep_comm = tensors
    input, h, c, query, query_bias, key, _, value, _, weight_ih, *_ = tensors
    comm_query, _, comm_value, _ = tensors[-4:]
    batch_sizes, k, heads, comm_heads, reverse = sizes
    n = query.size(0)
    with torch.no_grad():
        cell = RIMCell(
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
            key_size_comm=1 if comm_query is None else comm_query.size(2) // comm_heads,
            value_size_comm=1 if comm_value is None else comm_value.size(2) // comm_heads,
            num_comm_heads=comm_heads,
        )
    parameters = {f"cell.{name}": t for name, t in zip(PARAMETERS, tensors[3:], strict=True) if t is not None}
    state = (h,) if c is None else (h, c)
    results: tuple[Tensor, ...] = torch.func.functional_call(
        _Scan(cell), parameters, (input, state, list(batch_sizes) or None, reverse, (keep_input, keep_comm))
    )
    return results


def results_like(input: Tensor, h: Tensor, c: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs and last states, empty: their shapes without running. A GRU's ``c_n`` has no rows."""
    weight_ih = rest[6]
    output = input.new_empty(*input.shape[:-1], h.shape[1])
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
    "int[] batch_sizes, int k, int heads, int comm_heads, bool reverse"
)

_library = torch.library.Library("rim_rnn", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(f"readable({SCHEMA}) -> (Tensor output, Tensor h_n, Tensor c_n)")  # type: ignore[no-untyped-call]
_library.define(f"readable_backward(Tensor? grad_output, Tensor? grad_h, Tensor? grad_c, {SCHEMA}) -> Tensor[]")  # type: ignore[no-untyped-call]
_library.impl("readable", _readable, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("readable_backward", _readable_backward, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("rim_rnn::readable", results_like, lib=_library)
torch.library.register_fake(
    "rim_rnn::readable_backward", lambda *args: gradients_like(*args[3 : 1 + NUM_TENSORS]), lib=_library
)
torch.library.register_autograd("rim_rnn::readable", _backward, setup_context=_setup_context, lib=_library)
