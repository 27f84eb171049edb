"""The definition: a step reads like section 2 of the paper, a scan is the step over time.

Weights apply per unit, states are unit-major ``(n, N, ...)``: see units.py. Everything else in the package is either one of the
four stages that meet here, or a faster or more convenient way to run what stands here.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize

from rim_rnn.communication import Communication
from rim_rnn.dynamics import Dynamics, GRUDynamics, LSTMDynamics, State, keep_losers
from rim_rnn.input_attention import InputAttention, compete
from rim_rnn.recording import Trace
from rim_rnn.units import SharedProjection, UnitProjection, divide, unite

Keep = tuple[Tensor | None, Tensor | None]
"""What dropout drew for the input attention, ``(M, n, H)``, and for the communication, ``(M, heads, n, n)``."""


class Projected(NamedTuple):
    """Everything a step needs beside the state: the input, what of it was computed for all steps at once, what dropout drew."""

    x: Tensor  # (M, input_size)
    key: Tensor | None  # (M, H*key_size): x W^e + b^e
    gates: Tensor | None  # (H, M, n, G*u): (x W^v + b^v) W_ih
    keep_input: Tensor | None  # (M, n, H)
    keep_comm: Tensor | None  # (M, heads, n, n)
    comm_weight: Tensor | None  # of all steps: Communication.stacked_weights

    def split(self, sizes: list[int]) -> list["Projected"]:
        """The rows of each step, of which there are ``sizes``."""
        *of_rows, comm_weight = self
        rows_at = (0, 0, 1, 0, 0)
        parts: Any = (
            [None] * len(sizes) if p is None else torch.split(p, sizes, d) for p, d in zip(of_rows, rows_at, strict=True)
        )
        return [Projected(*step, comm_weight) for step in zip(*parts, strict=True)]  # type: ignore[call-arg]


class Step(nn.Module):
    """The four stages of section 2 and their order; what :class:`RIMCell` is, without its manners.

    Args:
        input_size, hidden_size, bias, device, dtype: As in :class:`RIMCell`, and all that follows as well, nothing left open.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        proj_size: int,
        num_units: int,
        k: int,
        rnn_cell: str,
        key_size_input: int,
        value_size_input: int,
        num_input_heads: int,
        input_dropout: float,
        key_size_comm: int,
        value_size_comm: int,
        num_comm_heads: int,
        comm_dropout: float,
        comm_bounded: bool,
    ) -> None:
        super().__init__()
        self.num_units, self.k = num_units, k
        u, p = hidden_size // num_units, (proj_size or hidden_size) // num_units
        self.input_attention = InputAttention(
            input_size, num_units, p, num_input_heads, key_size_input, value_size_input, input_dropout, bias, device, dtype
        )
        self.dynamics = (LSTMDynamics if rnn_cell == "LSTM" else GRUDynamics)(
            num_units, u, num_input_heads, value_size_input, proj_size // num_units, bias, device, dtype
        )
        self.communication = Communication(
            num_units, p, num_comm_heads, key_size_comm, value_size_comm, comm_dropout, comm_bounded, rnn_cell, device, dtype
        )

    def stages(self) -> tuple[InputAttention, Dynamics, Communication]:
        """The modules of section 2 in its order, without the search of ``nn.Module.__getattr__`` for each of them."""
        stages: Any = self._modules
        return stages["input_attention"], stages["dynamics"], stages["communication"]

    def draw(self, x: Tensor) -> Keep:
        """Dropout's draws, for one step or for all at once: ``x`` is ``(..., input_size)``, ``M`` rows in all."""
        if not self.training:
            return None, None
        input_attention, _, communication = self.stages()
        return _draw(input_attention, x), _draw(communication, x)

    def project(self, x: Tensor, keep: Keep) -> Projected:
        """What does not depend on the state, for one step or for all at once: ``x`` is ``(M, input_size)``.

        Only of stages whose calls do no more than what our classes say: of others a step asks everything by calling them.
        """
        if asks_stages(self):
            return Projected(x, None, None, *keep, None)
        input_attention, dynamics, communication = self.stages()
        gates = dynamics.project(x, input_attention.value)
        return Projected(x, input_attention.project(x), gates, *keep, communication.stacked_weights())

    def step(self, projected: Projected, state: State) -> tuple[State, Trace]:
        """One step of section 2, on unit-major states ``(n, N, ...)``."""
        input_attention, dynamics, communication = self.stages()
        x, key, gates, keep_input, keep_comm, comm_weight = projected
        # Input attention, equation 2: every unit bids for the input, and weighs it.
        score, a_input, a_kept, value = input_attention(state[0], x, key, keep_input)
        # Competition: the k highest bids win.
        active = compete(score, self.k)
        # Independent dynamics, equation 4: winners only.
        new = dynamics(a_kept, value, gates, state)
        h, *c = keep_losers(active, new, state)
        # Communication, equations 5 and 6: winners read every unit.
        h, attention = communication(h, active, comm_weight, keep_comm)
        return (h, *c), Trace(active, a_input, attention)

    def scan(
        self,
        input: Tensor,
        state: State,
        batch_sizes: list[int] | None = None,
        reverse: bool = False,
        record: bool = False,
        keep: Keep | None = None,
    ) -> tuple[Tensor, State, list[Trace]]:
        """The step over time.

        Args:
            input: ``(T, N, input_size)``, or packed ``(sum(batch_sizes), input_size)``.
            state: ``(h_0, c_0)`` or ``(h_0,)``, each ``(N, features)`` or ``(1, N, features)``.
            batch_sizes: Rows present at each step, never growing; ``None`` where the input is not packed.
            reverse: Go from the last step to the first; results stay in the input's order of time.
            record: Also return what each step did.
            keep: What :meth:`draw` returned for the input's rows in packed order; drawn here if not given.

        Returns:
            The outputs in the layout of ``input``, the last states in that of ``state``, and one trace per step if ``record``.
        """
        sizes = [input.size(1)] * input.size(0) if batch_sizes is None else batch_sizes
        x = input.reshape(-1, input.size(-1))
        steps = self.project(x, self.draw(x) if keep is None else keep).split(sizes)
        traces: list[Trace] = []

        def advance(t: int, now: State) -> State:
            now, trace = self.step(steps[t], now)
            if record:
                traces.append(Trace(*(part.detach() for part in trace)))
            return now

        output, last = over_time(advance, state, self.num_units, sizes, reverse, packed=batch_sizes is not None)
        return output, last, traces[::-1] if reverse else traces


def _draw(stage: nn.Module, x: Tensor) -> Tensor | None:
    """What dropout draws for a stage, which may be wrapped in another module."""
    draw: Any = getattr(stage, "draw", None)
    if draw is None:
        draw = next((inner.draw for inner in stage.modules() if hasattr(inner, "draw")), lambda x: None)
    drawn: Tensor | None = draw(x)
    return drawn


def over_time(
    advance: Callable[[int, State], State], state: State, num_units: int, sizes: list[int], reverse: bool, packed: bool
) -> tuple[Tensor, State]:
    """``advance(t, now)`` at each step, on the unit-major states of the ``sizes[t]`` rows that are present then.

    Args:
        advance: Returns the states after step ``t``.
        state: The first states, ``(N, features)`` or ``(1, N, features)``.
        num_units: By how many to :func:`divide` them.
        sizes: Rows present at each step, never growing.
        reverse: Go from the last step to the first.
        packed: Return the outputs as ``(sum(sizes), features)``, not as ``(T, N, features)``.

    Returns:
        The outputs in order of time, and each row's last states in the layout of ``state``.
    """
    first = tuple(divide(s, num_units) for s in state)
    times = range(len(sizes) - 1, -1, -1) if reverse else range(len(sizes))
    present = sizes[times[0]]
    now, ended = tuple(s[:, :present] for s in first), []
    outputs: list[Tensor] = [state[0]] * len(sizes)
    for t in times:
        if sizes[t] < present:  # rows whose sequence has ended
            ended.append(tuple(s[:, sizes[t] :] for s in now))
            now = tuple(s[:, : sizes[t]] for s in now)
        elif sizes[t] > present:  # rows whose sequence begins, seen from its end
            now = tuple(torch.cat([s, s_0[:, present : sizes[t]]], dim=1) for s, s_0 in zip(now, first, strict=True))
        present = sizes[t]
        now = advance(t, now)
        outputs[t] = now[0]
    output = unite(torch.cat(outputs, dim=1) if packed else torch.stack(outputs, dim=1))
    last = [torch.cat(rows, dim=1) for rows in zip(now, *reversed(ended), strict=True)]
    return output, tuple(unite(s.unsqueeze(1) if state[0].dim() == 3 else s) for s in last)


# What is exactly ours. Where all of a cell is, its parameters tell what a call of it does, and may be used without one.

MODULES: dict[str, tuple[type[nn.Module], ...]] = {
    "input_attention": (InputAttention,),
    "input_attention.query": (UnitProjection,),
    "input_attention.key": (SharedProjection,),
    "input_attention.value": (SharedProjection,),
    "dynamics": (LSTMDynamics, GRUDynamics),
    "communication": (Communication,),
    **{f"communication.{part}": (UnitProjection,) for part in ("query", "key", "value", "output")},
}
"""A cell's modules and what they have to be. Those of the communication come last: without heads it has none."""

KINDS = {kinds[:length] for kinds in product(*MODULES.values()) for length in (len(MODULES) - 4, len(MODULES))}
"""The same by position, for one look-up."""

METHODS = frozenset(
    name
    for kind in (Step, InputAttention, Dynamics, Communication, UnitProjection)
    for name, value in vars(kind).items()
    if callable(value)
) | {"forward"}
"""What nobody puts on an instance but to change what it does."""


def exactly_ours(cell: nn.Module, kind: Callable[[Any], type] = type) -> tuple[nn.Module, ...] | None:
    """The modules of a cell in the order of :data:`MODULES`, if all of them are exactly ours, by ``kind``; else ``None``."""
    try:
        attention, dynamics, communication = (cell._modules[name] for name in ("input_attention", "dynamics", "communication"))
        parts, talk = attention._modules, communication._modules  # type: ignore[union-attr]
        talking = (talk["query"], talk["key"], talk["value"], talk["output"]) if talk else ()
        found: Any = (attention, parts["query"], parts["key"], parts["value"], dynamics, communication, *talking)
    except (KeyError, AttributeError):  # something was put in its place
        return None
    if tuple(map(kind, found)) not in KINDS or is_any_hooked():
        return None
    for module in found:
        if does_more(module):
            return None
    stages = found[0], found[4], found[5]
    for module in (cell, *stages):
        if _has_method(module):
            return None
    ours: tuple[nn.Module, ...] = found
    return ours


def kind_without_parametrisation(module: nn.Module) -> type:
    """Its class; where torch.nn.utils.parametrize gave it another one, that of before."""
    kind = type(module)
    before = cast("type", kind.__base__)
    return before if parametrize.is_parametrized(module) and kind.__name__ == f"Parametrized{before.__name__}" else kind


def does_more(module: nn.Module) -> bool:
    """Whether a call of this module does more than its class says: a hook, or a forward of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_any_hooked() -> bool:
    """The same for every module: a hook for all of them."""
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


def _has_method(module: nn.Module) -> bool:
    """Whether one of :data:`METHODS` was put on this instance."""
    if torch.compiler.is_compiling():  # torch 2.10 can not look into isdisjoint
        return any([name in module.__dict__ for name in METHODS])  # noqa: C419
    return not METHODS.isdisjoint(module.__dict__)


def _every_module(cell: nn.Module) -> Iterator[tuple[str, tuple[type[nn.Module], ...], nn.Module | None]]:
    """Path, kinds and module of a cell for each of :data:`MODULES` that it should have."""
    for path, kinds in MODULES.items():
        try:
            yield path, kinds, cell.get_submodule(path)
        except AttributeError:
            if not path.startswith("communication.") or getattr(cell.communication, "num_heads", True):
                yield path, kinds, None


def oddity(cell: nn.Module) -> str | None:
    """What about a cell's stages is not exactly ours, in words; or ``None``. :func:`exactly_ours` only sees that it is so."""
    if exactly_ours(cell) is not None:
        return None
    if is_any_hooked():
        return "a global module hook is registered"
    for path, kinds, module in _every_module(cell):
        if module is None:
            return f"{path} is missing"
        if type(module) not in kinds:
            return f"{path} is a {type(module).__name__}"
        if does_more(module):
            return f"a hook is registered in {path}, or a forward put on it"
        if _has_method(module):
            return f"a method was put on {path}"
    return "a method was put on the cell"


def asks_stages(cell: Step) -> bool:
    """Whether a step has to call the stages for all it wants to know, because a call does more than our classes say."""
    if exactly_ours(cell) is not None:
        return False
    asked = is_any_hooked() or any(
        module is None
        or does_more(module)
        or not any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)
        for _, kinds, module in _every_module(cell)
    )
    if asked:
        _, dynamics, communication = cell.stages()
        for stage, method in ((dynamics, "project"), (communication, "stacked_weights")):
            if _is_own(stage, method):
                raise RuntimeError(
                    f"a {method} of its own of a {type(stage).__name__} is for all steps at once, which a hook, a forward "
                    "or a module of its own in the same cell rules out"
                )
    return asked


def _is_own(stage: nn.Module, method: str) -> bool:
    """Whether a stage has a method that is not that of our class, and the forward of our class, which does not know it."""
    ours = next((k for kinds in MODULES.values() for k in kinds if isinstance(stage, k)), None)
    if ours is None or type(stage).forward is not ours.forward:
        return False
    return method in vars(stage) or getattr(type(stage), method) is not getattr(ours, method, None)
