"""Whether all of a cell is exactly ours, or what is not, in words.

Where all of it is, its parameters tell what a call of it does, and may be used without one.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize

from rim_rnn.communication import Communication
from rim_rnn.dynamics import Dynamics, GatedRecurrentDynamics, LongShortTermDynamics
from rim_rnn.input_attention import InputAttention
from rim_rnn.units import SharedProjection, UnitProjection

MODULES: dict[str, tuple[type[nn.Module], ...]] = {
    "input_attention": (InputAttention,),
    "input_attention.query": (UnitProjection,),
    "input_attention.key": (SharedProjection,),
    "input_attention.value": (SharedProjection,),
    "dynamics": (LongShortTermDynamics, GatedRecurrentDynamics),
    "communication": (Communication,),
    **{f"communication.{part}": (UnitProjection,) for part in ("query", "key", "value", "output")},
}
"""A cell's modules and what they have to be. Those of the communication come last: without heads it has none."""

KINDS = {kinds[:length] for kinds in product(*MODULES.values()) for length in (len(MODULES) - 4, len(MODULES))}
"""The same by position, for one look-up."""

STEP = frozenset({"stages", "draw", "project", "step", "scan"})
"""The methods of ``Step``, which stands above."""

METHODS = (STEP | {"forward"}).union(
    name
    for kind in (InputAttention, Dynamics, Communication, UnitProjection)
    for name, value in vars(kind).items()
    if callable(value)
)
"""What nobody puts on an instance but to change what it does."""


def exactly_ours(cell: nn.Module, kind: Callable[[Any], type] = type) -> tuple[nn.Module, ...] | None:
    """The modules of a cell in the order of :data:`MODULES`, if all of them are exactly ours, by ``kind``; else ``None``."""
    try:
        own: Any = cell._modules
        attention, dynamics, communication = own["input_attention"], own["dynamics"], own["communication"]
        parts, talk = attention._modules, communication._modules
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


WATCHERS = "torch.distributed._tools.mod_tracker"
"""The module whose global hooks only note what is at work, for trackers of memory: they would see another call than the one
that goes without them, were they to be heard inside."""


def is_any_hooked() -> bool:
    """The same for every module: a hook for all of them."""
    forward, before = nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks
    backward, before_backward = nn_module._global_backward_hooks, nn_module._global_backward_pre_hooks
    if not (forward or before or backward or before_backward):
        return False
    kinds: Any = (forward, before, backward, before_backward)
    return any([hook.__module__ != WATCHERS for hooks in kinds for hook in hooks.values()])  # noqa: C419


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


def asks_stages(cell: Any) -> bool:
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
        _refuse_samples(cell)
        _, dynamics, communication = cell.stages()
        for stage, method in ((dynamics, "project"), (communication, "stacked_weights")):
            if _is_own(stage, method):
                raise RuntimeError(
                    f"a {method} of its own of a {type(stage).__name__} is for all steps at once, which a hook, a forward "
                    "or a module of its own in the same cell rules out"
                )
    return asked


def _refuse_samples(cell: Any) -> None:
    """An error where hooks on a stage would take the gradients of each sample, as opacus' do: there the units come first."""
    for path, _, module in _every_module(cell):
        if (
            module is not None
            and does_more(module)
            and any(hasattr(p, "grad_sample") for p in module.parameters(recurse=False))
        ):
            raise RuntimeError(
                f"the gradients of each sample can not be taken by hooks on {path}, where the units come before the batch. "
                "Have them taken of the layer as one piece (the page Tools shows the module), or by "
                'torch.func.vmap(torch.func.grad(...)) with grad_sample_mode="no_op"'
            )


def _is_own(stage: nn.Module, method: str) -> bool:
    """Whether a stage has a method that is not that of our class, and the forward of our class, which does not know it."""
    ours = next((k for kinds in MODULES.values() for k in kinds if isinstance(stage, k)), None)
    if ours is None or type(stage).forward is not ours.forward:
        return False
    return method in vars(stage) or getattr(type(stage), method) is not getattr(ours, method, None)
