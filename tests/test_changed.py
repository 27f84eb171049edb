"""Code that changes the layer is heard or refused, never ignored: subclasses, forwards and methods put on instances, hooks,
modules in another's place.

Each is tried on the first cell, of a layer, of a stack or alone, in two ways. One does nothing, and results and gradients are
those of the plain layer. One does something plain (a sign is changed, a gradient doubled), and results and gradients are those
of the equations written out below, with that at the same place.
"""

from __future__ import annotations

import abc
import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Generic, NamedTuple, TypeVar

import pytest
import torch
from drawn import assert_identical, assert_same, gradients, normal, strong
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize, prune

from rim_rnn import RIM, RIMCell, native, record

SIZES: dict[str, Any] = {"num_units": 4, "k": 2, "key_size_input": 3, "value_size_input": 3, "dtype": torch.float64}
SIZES |= {"key_size_comm": 3, "value_size_comm": 2, "num_comm_heads": 2}
STAGES = ("input_attention", "dynamics", "communication")
PROJECTIONS = (
    *(f"input_attention.{name}" for name in ("query", "key", "value")),
    *(f"communication.{name}" for name in ("query", "key", "value", "output")),
)


class Place(NamedTuple):
    """A layer, a stack or a lone cell, with an input of few rows or of many."""

    kind: str
    steps: int
    batch: int

    def make(self, rnn_cell: str = "LSTM", **options: Any) -> Any:
        options = SIZES | options
        if self.kind == "cell":
            return strong(RIMCell(3, 8, rnn_cell=rnn_cell, **options))
        stack = {"num_layers": 2, "bidirectional": True} if self.kind == "stack" else {}
        return strong(RIM(3, 8, rnn_cell=rnn_cell, **stack, **options))

    def inputs(self, module: Any) -> tuple[Tensor, ...]:
        """Of all steps, and the first states of all cells."""
        states = 2 if module.rnn_cell == "LSTM" else 1
        shape = (self.batch, 8) if self.kind == "cell" else (len(module.cells), self.batch, 8)
        return normal(self.steps, self.batch, 3, seed=1), *(normal(*shape, seed=2 + i) for i in range(states))


PLACES = [Place("layer", 3, 2), Place("layer", 12, 48), Place("stack", 3, 2), Place("cell", 1, 3), Place("cell", 1, 64)]
SLOW = [p for p in PLACES if p.batch > 3 or p.kind == "stack"]  # half a minute in all
CASES = [pytest.param(p, id=f"{p.kind}-{p.steps}x{p.batch}", marks=[pytest.mark.slow] if p in SLOW else []) for p in PLACES]
places = pytest.mark.parametrize("place", CASES)
layers = pytest.mark.parametrize("place", CASES[:3])
units = pytest.mark.parametrize("rnn_cell", ["LSTM", "GRU"])
modules = pytest.mark.parametrize("path", ["", *STAGES, *PROJECTIONS])
inner_modules = pytest.mark.parametrize("path", [*STAGES, *PROJECTIONS])


def cells_of(module: Any) -> list[Any]:
    return [module] if isinstance(module, RIMCell) else [*module.cells]


def at(module: Any, path: str) -> nn.Module:
    """A module of the first cell, by its name in the cell."""
    found: nn.Module = cells_of(module)[0].get_submodule(path)
    return found


def flat(*parts: Any) -> list[Tensor]:
    return [tensor for part in parts for tensor in (flat(*part) if isinstance(part, tuple | list) else [part])]


def run(module: Any, x: Tensor, *states: Tensor) -> list[Tensor]:
    """Output, if it is a layer's, and last states."""
    hx = states if module.rnn_cell == "LSTM" else states[0]
    return flat(module(x[0] if isinstance(module, RIMCell) else x, hx))


def results(place: Place, module: Any, call: Callable[..., list[Tensor]] = run) -> list[Tensor]:
    """What a call makes of the place's inputs, then the gradients of these and of all parameters."""
    leaves = [t.requires_grad_() for t in place.inputs(module)]
    torch.manual_seed(3)  # of the dropouts
    outputs = call(module, *leaves)
    return [*outputs, *gradients(outputs, [*leaves, *module.parameters()])]


def differ(some: list[Tensor], others: list[Tensor]) -> bool:
    return any((a - b).abs().max() > 1e-3 for a, b in zip(some, others, strict=True))


def reason(place: Place, module: Any) -> str:
    """What the layer says of its path, or the native operator of the lone cell."""
    x, *states = place.inputs(module)
    if isinstance(module, RIM):
        return module.path(x).removeprefix("readable: ")
    return native.supports(module, x, tuple(states)) or "native"


# The equations, with something at one place


def first(change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    """The change of a tensor as one of a result or of arguments: of the first of them."""

    def changed(result: Any) -> Any:
        return (change(result[0]), *result[1:]) if isinstance(result, tuple) else change(result)

    return changed


def nothing(result: Any) -> Any:
    return result


negate = first(torch.neg)
double = first(lambda t: 2 * t)
double_gradient = first(lambda t: 2 * t - t.detach())


def double_all(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if g is None else 2 * g for g in grads)


def double_gradients(result: Any) -> Any:
    """Of all parts of a result."""
    return tuple(map(double_gradient, result)) if isinstance(result, tuple) else double_gradient(result)


class Equations:
    """One cell, section 2 of the paper; states are ``(N, n, u)``. ``before`` and ``after`` are at the module of that path."""

    def __init__(
        self, cell: Any, path: str | None = None, before: Callable[[Any], Any] = nothing, after: Callable[[Any], Any] = nothing
    ) -> None:
        self.cell, self.path, self.before, self.after = cell, path, before, after

    def call(self, path: str, function: Callable[..., Any], *args: Any) -> Any:
        return self.after(function(*self.before(args))) if path == self.path else function(*args)

    def projection(self, path: str, x: Tensor) -> Tensor:
        module: Any = self.cell.get_submodule(path)
        bias = 0 if module.bias is None else module.bias
        product = "Ni,oi->No" if x.dim() == 2 else "Nni,nio->Nno"
        result: Tensor = self.call(path, lambda x: torch.einsum(product, x, module.weight) + bias, x)
        return result

    def input_attention(self, h: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        query, key, value = (
            self.projection(f"input_attention.{name}", t) for name, t in {"query": h, "key": x, "value": x}.items()
        )
        score = torch.einsum("Nnd,Nd->Nn", query, key) / key.size(-1) ** 0.5
        return score, torch.sigmoid(score), value

    def dynamics(self, a: Tensor, value: Tensor, h: Tensor, *c: Tensor) -> tuple[Tensor, ...]:
        own = self.cell.dynamics
        gates_x = torch.einsum("Nn,Nd,ndg->Nng", a, value, own.weight_ih) + own.bias_ih
        gates_h = torch.einsum("Nnu,nug->Nng", h, own.weight_hh) + own.bias_hh
        if c:
            i, f, g, o = (gates_x + gates_h).chunk(4, -1)
            new = f.sigmoid() * c[0] + i.sigmoid() * g.tanh()
            return o.sigmoid() * new.tanh(), new
        (r, z, n), (h_r, h_z, h_n) = gates_x.chunk(3, -1), gates_h.chunk(3, -1)
        z = (z + h_z).sigmoid()
        return ((1 - z) * (n + (r + h_r).sigmoid() * h_n).tanh() + z * h,)

    def communication(self, h: Tensor, active: Tensor) -> Tensor:
        heads = self.cell.num_comm_heads
        query, key, value = (
            self.projection(f"communication.{name}", h).unflatten(-1, (heads, -1)) for name in ("query", "key", "value")
        )
        attention = torch.softmax(torch.einsum("Njhd,Nmhd->Nhjm", query, key) / query.size(-1) ** 0.5, -1)
        message = self.projection("communication.output", torch.einsum("Nhjm,Nmhd->Njhd", attention, value).flatten(2)).tanh()
        room = torch.relu(1 - h.abs()) if self.cell.rnn_cell == "GRU" else 1
        return torch.where(active, h + room * message, h)

    def step(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        score, a, value = self.call("input_attention", self.input_attention, state[0], x)
        active = torch.zeros_like(score).scatter(1, score.topk(self.cell.k).indices, 1.0).bool().unsqueeze(-1)
        new = self.call("dynamics", self.dynamics, a, value, *state)
        h, *c = (torch.where(active, s, old) for s, old in zip(new, state, strict=True))
        return self.call("communication", self.communication, h, active), *c

    def over_time(self, x: Tensor, *state: Tensor, reverse: bool = False) -> tuple[Tensor, ...]:
        now, outputs = tuple(s.unflatten(-1, (self.cell.num_units, -1)) for s in state), {}
        for t in reversed(range(len(x))) if reverse else range(len(x)):
            now = self.call("", self.step, x[t], *now)
            outputs[t] = now[0].flatten(1)
        return torch.stack([outputs[t] for t in range(len(x))]), *(s.flatten(1) for s in now)


def by_hand(path: str | None = None, **changes: Callable[[Any], Any]) -> Callable[..., list[Tensor]]:
    """What :func:`run` gives, by the equations of all cells; the first one has the changes."""

    def call(module: Any, x: Tensor, *states: Tensor) -> list[Tensor]:
        if isinstance(module, RIMCell):
            return flat(Equations(module, path, **changes).over_time(x, *states)[1:])
        last = []
        for layer in range(module.num_layers):
            outputs = []
            for direction in range(module.num_directions):
                index = layer * module.num_directions + direction
                equations = Equations(module.cells[index], path, **changes) if index == 0 else Equations(module.cells[index])
                output, *state = equations.over_time(x, *(s[index] for s in states), reverse=direction == 1)
                outputs.append(output)
                last.append(state)
            x = torch.cat(outputs, -1)
        return [x, *(torch.stack(s) for s in zip(*last, strict=True))]

    return call


@places
@units
def test_the_plain_layer_is_native_and_what_the_equations_say(place: Place, rnn_cell: str) -> None:
    module = place.make(rnn_cell)
    if native._unavailable is None:
        assert reason(place, module) == "native"
    assert_same(results(place, module), results(place, module, by_hand()))


def assert_heard(place: Place, module: Any, plain: Any, expected: Callable[..., list[Tensor]], word: str = "") -> None:
    """The results and gradients that are expected, which are not those of the plain layer; and the reason has the word."""
    found = results(place, module)
    assert_same(found, results(place, plain, expected))
    assert differ(found, results(place, plain))
    if word and native._unavailable is None:
        assert word in reason(place, module)


def word_for(place: Place, path: str, otherwise: str) -> str:
    """What the reason has to name. Of a lone cell's own call the operator that runs inside it knows nothing."""
    if path:
        return otherwise.format(path)
    return "" if place.kind == "cell" else "cells.0 has a hook or a forward of its own"


# Subclasses of the cell


class Plain(RIMCell[Any]):
    """Overrides nothing that runs."""

    note = "mine"

    def extra_repr(self) -> str:
        return self.note


class OwnStep(RIMCell[Any]):
    def step(self, projected: Any, state: Any) -> Any:
        new, trace = super().step(projected, state)
        return negate(new), trace


class OwnScan(RIMCell[Any]):
    def scan(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().scan(-input, *args, **kwargs)


class OwnProject(RIMCell[Any]):
    def project(self, x: Tensor, keep: Any) -> Any:
        return super().project(-x, keep)


class OwnForward(RIMCell[Any]):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return negate(super().forward(input, hx))


class OwnDraw(RIMCell[Any]):
    """Of every read nothing is kept, and nothing said is dropped."""

    def draw(self, x: Tensor) -> Any:
        return x.new_zeros(x.numel() // x.size(-1), self.num_units, 1), None


class NoDraw(RIMCell[Any]):
    """A dropout that is switched off."""

    def draw(self, x: Tensor) -> Any:
        return None, None


def put(module: Any, kind: type[RIMCell[Any]]) -> Any:
    """The same with a first cell of that kind."""
    old = cells_of(module)[0]
    names = ("input_size", "hidden_size", "rnn_cell", "input_dropout", "comm_dropout")
    new: Any = kind(**SIZES, **{name: getattr(old, name) for name in names})
    new.load_state_dict(old.state_dict())
    if module is old:
        return new
    module.cells[0] = new
    return module


@places
@units
def test_a_subclass_that_overrides_nothing_is_the_cell(place: Place, rnn_cell: str) -> None:
    module = put(place.make(rnn_cell), Plain)
    assert reason(place, module) == reason(place, place.make(rnn_cell))
    assert_identical(results(place, module), results(place, place.make(rnn_cell)))


@places
@units
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (OwnStep, {"after": negate}),
        (OwnForward, {"after": negate}),
        (OwnScan, {"before": negate}),
        (OwnProject, {"before": negate}),
    ],
    ids=lambda kind: getattr(kind, "__name__", ""),
)
def test_a_subclass_with_code_of_its_own(kind: Any, changes: Any, place: Place, rnn_cell: str) -> None:
    word = word_for(place, "", "") if kind is OwnForward else f"a {kind.__name__} has a step of its own"
    assert_heard(place, put(place.make(rnn_cell), kind), place.make(rnn_cell), by_hand("", **changes), word)


@places
@units
def test_a_subclass_that_draws(place: Place, rnn_cell: str) -> None:
    """Whatever the dropouts are: with nothing of a read kept, value and attention are those of no input."""
    silence = by_hand("input_attention", after=lambda result: (result[0], 0 * result[1], result[2]))
    for dropout in (0.0, 0.5):
        silent, off = place.make(rnn_cell), place.make(rnn_cell)
        for module in (silent, off):
            cell = cells_of(module)[0]
            cell.input_attention.dropout_probability = cell.communication.dropout_probability = dropout
        plain = place.make(rnn_cell)
        assert_heard(place, put(silent, OwnDraw), plain, silence, "a OwnDraw has a step of its own")
        assert_same(results(place, put(off, NoDraw)), results(place, plain))


# Forwards and methods on instances


def put_on(module: nn.Module, method: str, change: Callable[[Any], Any]) -> list[str]:
    """In the place of a method, as accelerate does it; what is returned grows with each call."""
    old, calls = getattr(module, method), []

    def new(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(method)
        return change(old(*args, **kwargs))

    setattr(module, method, functools.update_wrapper(functools.partial(new, module), old))
    return calls


@places
@units
@modules
def test_a_forward_on_an_instance(path: str, place: Place, rnn_cell: str) -> None:
    module, plain = place.make(rnn_cell), place.make(rnn_cell)
    calls = put_on(at(module, path), "forward", nothing)
    assert_same(results(place, module), results(place, plain))
    assert len(calls) == place.steps
    put_on(at(module, path), "forward", negate)
    word = word_for(place, path, "a hook is registered in {}, or a forward put on it")
    assert_heard(place, module, plain, by_hand(path, after=negate), word)


METHODS = ("step", "scan", "project", "draw")
METHODS += tuple(f"input_attention.{name}" for name in ("project", "bid", "attend", "drop", "draw"))
METHODS += tuple(f"dynamics.{name}" for name in ("project", "read", "read_bias", "update"))
METHODS += tuple(f"communication.{name}" for name in ("stacked_weights", "draw"))


def halve(result: Any) -> Any:
    """All numbers of a result."""
    if isinstance(result, tuple):
        parts = [halve(part) for part in result]
        return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
    return result / 2 if isinstance(result, Tensor) and result.is_floating_point() else result


def override(module: nn.Module, method: str, change: Callable[[Any], Any]) -> list[str]:
    """As :func:`put_on`, by a subclass."""
    kind, calls = type(module), []

    def new(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(method)
        return change(getattr(kind, method)(self, *args, **kwargs))

    module.__class__ = type(f"Own{kind.__name__}", (kind,), {method: new})
    return calls


@places
@units
@pytest.mark.parametrize("how", [put_on, override], ids=["instance", "subclass"])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_of_a_cell_or_stage(name: str, how: Callable[..., list[str]], place: Place, rnn_cell: str) -> None:
    """Put on it, or of a subclass."""
    options = {"input_dropout": 0.5, "comm_dropout": 0.5}
    (path, _, method), expected = name.rpartition("."), results(place, place.make(rnn_cell, **options))
    module, changed = place.make(rnn_cell, **options), place.make(rnn_cell, **options)
    calls = how(at(module, path), method, nothing)
    assert reason(place, module) != "native"
    assert_same(results(place, module), expected)
    assert calls
    how(at(changed, path), method, halve)
    assert differ(results(place, changed), expected)


@places
@units
@pytest.mark.parametrize("how", [put_on, override], ids=["instance", "subclass"])
@pytest.mark.parametrize("name", [name for name in METHODS if "." in name])
def test_a_method_of_a_stage_beside_a_hook(name: str, how: Callable[..., list[str]], place: Place, rnn_cell: str) -> None:
    """Modules are called at each step then; what is for all steps at once is refused."""
    options = {"input_dropout": 0.5, "comm_dropout": 0.5}
    (path, _, method), expected = name.rpartition("."), results(place, place.make(rnn_cell, **options))
    module = place.make(rnn_cell, **options)
    at(module, "input_attention.query").register_forward_hook(lambda *_: None)
    how(at(module, path), method, halve)
    if name in ("dynamics.project", "communication.stacked_weights"):
        with pytest.raises(RuntimeError, match=f"a {method} of its own of a .* is for all steps at once"):
            results(place, module)
    else:
        assert differ(results(place, module), expected)


# Hooks


@places
@units
@modules
def test_forward_hooks(path: str, place: Place, rnn_cell: str) -> None:
    """Before and after each step, with what a module takes and gives; one that returns nothing changes nothing."""
    module, plain, calls = place.make(rnn_cell), place.make(rnn_cell), []
    at(module, path).register_forward_pre_hook(lambda *_: calls.append("before"))
    at(module, path).register_forward_hook(lambda *_: calls.append("after"))
    assert_same(results(place, module), results(place, plain))
    assert calls == ["before", "after"] * place.steps

    word = word_for(place, path, "a hook is registered in {}")
    before, after = place.make(rnn_cell), place.make(rnn_cell)
    at(before, path).register_forward_pre_hook(lambda _, args: negate(args))
    assert_heard(place, before, plain, by_hand(path, before=negate), word)
    at(after, path).register_forward_hook(lambda _, args, result: negate(result))
    assert_heard(place, after, plain, by_hand(path, after=negate), word)


@places
@units
@modules
def test_backward_hooks(path: str, place: Place, rnn_cell: str) -> None:
    """At each step as well; a gradient that one returns goes on in the place of that which it was given."""
    module, plain, calls = place.make(rnn_cell), place.make(rnn_cell), []
    at(module, path).register_full_backward_pre_hook(lambda *_: calls.append("before"))
    at(module, path).register_full_backward_hook(lambda *_: calls.append("after"))
    assert_same(results(place, module), results(place, plain))
    assert sorted(calls) == sorted(["before", "after"] * place.steps)

    word = word_for(place, path, "a hook is registered in {}")
    before, after = place.make(rnn_cell), place.make(rnn_cell)
    at(after, path).register_full_backward_hook(lambda _, grad_input, grad_output: double(grad_input))
    assert_heard(place, after, plain, by_hand(path, before=double_gradient), word)
    at(before, path).register_full_backward_pre_hook(lambda _, grad_output: double_all(grad_output))
    assert_heard(place, before, plain, by_hand(path, after=double_gradients), word)


GLOBAL_HOOKS = ("forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook")


@contextmanager
def global_hook(kind: str, hook: Callable[..., None]) -> Iterator[None]:
    handle = getattr(nn_module, f"register_module_{kind}")(hook)
    try:
        yield
    finally:
        handle.remove()


@places
@units
@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
def test_global_hooks(kind: str, place: Place, rnn_cell: str) -> None:
    """For every cell, stage and projection, at every step."""
    module, calls = place.make(rnn_cell), []
    expected = results(place, module)
    with global_hook(kind, lambda module, *_: calls.append(id(module))):
        assert_same(results(place, module), expected)
        assert native._unavailable is not None or "hook" in reason(place, module)
    for cell in cells_of(module):
        for name, inner in cell.named_modules():
            assert calls.count(id(inner)) == place.steps, name
    assert_identical(results(place, module), expected)


# Modules in another's place


class Around(nn.Module):
    """Has nothing of what the module inside has."""

    def __init__(self, inner: nn.Module, change: Callable[[Any], Any]) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, *args: Any) -> Any:
        return self.change(self.inner(*args))


def wrap(module: Any, path: str, change: Callable[[Any], Any] = nothing) -> Any:
    parent, _, name = path.rpartition(".")
    inner = at(module, path)
    setattr(at(module, parent), name, Around(inner, change))
    return module


@places
@units
@inner_modules
def test_a_wrapper(path: str, place: Place, rnn_cell: str) -> None:
    """Dropouts act inside it, too, and draw what they draw in the plain layer."""
    for options in ({}, {"input_dropout": 0.5, "comm_dropout": 0.5}):
        expected = results(place, place.make(rnn_cell, **options))
        assert_same(results(place, wrap(place.make(rnn_cell, **options), path)), expected)
        assert not options or differ(expected, results(place, place.make(rnn_cell)))
    module = wrap(place.make(rnn_cell), path, negate)
    assert_heard(place, module, place.make(rnn_cell), by_hand(path, after=negate), f"{path} is a Around")


@places
@units
def test_wrappers_everywhere(place: Place, rnn_cell: str) -> None:
    module = place.make(rnn_cell)
    for path in (*PROJECTIONS, *STAGES):
        wrap(module, path)
    assert_same(results(place, module), results(place, place.make(rnn_cell)))


@layers
@units
def test_a_wrapper_of_a_cell(place: Place, rnn_cell: str) -> None:
    """It is called at every step, whether it has the attributes of the cell or not."""
    for change in (nothing, negate):
        module = place.make(rnn_cell)
        module.cells[0] = Around(module.cells[0], change)
        if change is nothing:
            assert_same(results(place, module), results(place, place.make(rnn_cell)))
            assert_same(records_of(place, module), records_of(place, place.make(rnn_cell)))
        else:
            assert_heard(place, module, place.make(rnn_cell), by_hand("", after=negate), "cells.0 is a Around")
    calls = 0

    def count(function: Callable[..., Any], *args: Any) -> Any:
        nonlocal calls
        calls += 1
        return function(*args)

    module = place.make(rnn_cell)
    module.cells[0] = checkpoint_wrapper(module.cells[0], checkpoint_fn=count)
    assert_same(results(place, module), results(place, place.make(rnn_cell)))
    assert calls == place.steps


@layers
@units
def test_what_holds_no_cell_is_refused(place: Place, rnn_cell: str) -> None:
    module = place.make(rnn_cell)
    inputs = place.inputs(module)
    module.cells[0] = nn.Identity()
    with pytest.raises(TypeError, match="should be a RIMCell, or hold one, got: Identity"):
        module(inputs[0])


def records_of(place: Place, module: Any) -> list[Tensor]:
    with record(module) as records:
        run(module, *place.inputs(module))
    return [part.double() for part in records[0]]


PARAMETERS = [name for name, _ in RIMCell(3, 8, **SIZES).named_parameters()]


class Negative(nn.Module):
    calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return -weight


class DropConnect(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        self.drawn = nn.functional.dropout(weight, 0.5)
        return self.drawn


@places
@units
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_parameter_that_others_tell(name: str, place: Place, rnn_cell: str) -> None:
    """A parametrisation, computed once for all steps, and a mask of prune, against the parameter that they give."""
    path, _, last = name.rpartition(".")
    parametrised, pruned = place.make(rnn_cell), place.make(rnn_cell)
    negative = Negative()
    parametrize.register_parametrization(at(parametrised, path), last, negative)
    weight = getattr(at(pruned, path), last)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)).gt(0.3).to(weight.dtype)
    prune.custom_from_mask(at(pruned, path), last, mask)
    inputs = place.inputs(parametrised)
    for module, factor in ((parametrised, -1), (pruned, mask)):
        plain = place.make(rnn_cell)
        with torch.no_grad():
            getattr(at(plain, path), last).mul_(factor)
        assert_same(run(module, *inputs), run(plain, *inputs))
        assert differ(run(module, *inputs), run(place.make(rnn_cell), *inputs))
        assert reason(place, module) != "native"
    negative.calls = 0
    run(parametrised, *inputs)
    assert negative.calls == 1


@places
@units
@pytest.mark.parametrize("gone", ["bias_ih", "bias_hh"])
def test_a_bias_that_is_taken_away_leaves_the_other(gone: str, place: Place, rnn_cell: str) -> None:
    module, zeros = place.make(rnn_cell), place.make(rnn_cell)
    setattr(at(module, "dynamics"), gone, None)
    nn.init.zeros_(getattr(at(zeros, "dynamics"), gone))
    parameters = list(zeros.parameters())
    expected = results(place, zeros)
    del expected[[p is getattr(at(zeros, "dynamics"), gone) for p in parameters].index(True) - len(parameters)]
    assert_same(results(place, module), expected)
    assert "where the cell keeps it" in reason(place, module) or native._unavailable is not None


@units
@pytest.mark.parametrize(
    ("how", "place"),
    [
        *(pytest.param(how, *p.values, id=f"{how}-{p.id}", marks=p.marks) for how in ("eager", "recorded") for p in CASES[:3]),
        pytest.param("compiled", PLACES[0], marks=pytest.mark.slow),
    ],
)
def test_what_a_parametrisation_draws_is_drawn_once(how: str, place: Place, rnn_cell: str) -> None:
    """Connections dropped, as regularised LSTMs have it: the same ones at every step."""
    module, plain = place.make(rnn_cell), place.make(rnn_cell)
    drop = DropConnect()
    parametrize.register_parametrization(module.cells[0].dynamics, "weight_hh", drop)
    with record(module) if how == "recorded" else nullcontext():
        found = (torch.compile(run, backend="eager", fullgraph=True) if how == "compiled" else run)(
            module, *place.inputs(module)
        )
    with torch.no_grad():
        plain.cells[0].dynamics.weight_hh.copy_(drop.drawn)
    assert_same(found, run(plain, *place.inputs(plain)))


@places
@inner_modules
def test_a_module_around_another_hides_no_more_than_it_has_to(place: Place, path: str) -> None:
    """What the layer prints, and new parameters for what is inside."""
    module, plain = place.make(), place.make()
    parent, _, name = path.rpartition(".")
    setattr(at(module, parent), name, nn.Sequential(at(module, path)))
    assert type(module).__name__ in repr(module)
    for one in (module, plain):
        torch.manual_seed(0)
        one.reset_parameters()
    assert_identical([*module.parameters()], [*plain.parameters()])


@places
@units
def test_initialisers_by_name_pass_the_modules_inside_by(place: Place, rnn_cell: str) -> None:
    """Habits of existing code that do nothing to an nn.LSTM: by attribute, by a part of a class's name, by a class's name."""
    module = place.make(rnn_cell)
    for inner in module.modules():
        name = type(inner).__name__
        assert isinstance(getattr(inner, "weight", torch.empty(0)), Tensor), name
        assert name not in ("LSTM", "GRU", "RNN")
        assert not any(word in name for word in ("Linear", "Conv", "Norm", "Embedding", "Dropout")), name
        assert inner is module or isinstance(inner, RIMCell) or not hasattr(inner, "dropout"), name


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning", "ignore:torch.quantize_per_tensor")
@places
@units
def test_no_linear_layer_is_inside(place: Place, rnn_cell: str) -> None:
    """Quantising those of a model leaves the layer as it is."""
    from torch.ao.quantization import quantize_dynamic

    module = place.make(rnn_cell, dtype=torch.float32)
    assert not [name for name, inner in module.named_modules() if isinstance(inner, nn.Linear)]
    inputs = [t.float() for t in place.inputs(module)]
    small = quantize_dynamic(nn.ModuleDict({"rnn": copy.deepcopy(module), "head": nn.Linear(8, 8)}), {nn.Linear})
    assert_identical(run(small["rnn"], *inputs), run(module, *inputs))


# Records


@layers
@units
@inner_modules
def test_records_of_changed_stages(path: str, place: Place, rnn_cell: str) -> None:
    """The same: with a hook, with a wrapper, with a forward put on."""
    recorded = []
    for change in (
        nothing,
        lambda module: at(module, path).register_forward_hook(lambda *_: None),
        lambda module: wrap(module, path),
        lambda module: put_on(at(module, path), "forward", nothing),
    ):
        module = place.make(rnn_cell)
        change(module)
        with record(module) as records:
            found = run(module, *place.inputs(module))
        assert_same(found, run(module, *place.inputs(module)), rtol=0, atol=0)
        recorded.append([part.double() for part in records[0]])
    for other in recorded[1:]:
        assert_same(other, recorded[0])


@layers
@units
def test_records_of_a_changed_call_of_a_cell(place: Place, rnn_cell: str) -> None:
    """The same, where the layer calls the cell at each step: with hooks, global ones too, and a forward put on."""
    plain = place.make(rnn_cell)
    with record(plain) as expected:
        run(plain, *place.inputs(plain))

    def recorded(change: Callable[[Any], Any]) -> None:
        module = place.make(rnn_cell)
        change(module.cells[0])
        with record(module) as records:
            found = run(module, *place.inputs(module))
        assert_same([part.double() for part in records[0]], [part.double() for part in expected[0]])
        assert_identical(found, run(module, *place.inputs(module)))
        assert len(records) == 1

    recorded(lambda cell: cell.register_forward_hook(lambda *_: None))
    recorded(lambda cell: cell.register_full_backward_hook(lambda *_: None))
    recorded(lambda cell: put_on(cell, "forward", nothing))
    for kind in GLOBAL_HOOKS:
        with global_hook(kind, lambda *_: None):
            recorded(nothing)


@layers
@units
def test_no_record_of_a_forward_that_is_not_ours(place: Place, rnn_cell: str) -> None:
    """It says so, and nothing is left behind."""
    module = place.make(rnn_cell)
    module.cells[0].forward = lambda x, hx: hx
    with record(module) as records, pytest.raises(RuntimeError, match="a cell whose own forward does not go through"):
        run(module, *place.inputs(module))
    assert records == []
    run(module, *place.inputs(module))


# Classes of other libraries


T = TypeVar("T")


class OfNoKind:
    """A mix-in of no kind."""


class OfKind(Generic[T]):
    """One with a parameter of type."""


class Abstract(abc.ABC):  # noqa: B024
    """One of whose methods subclasses may have to give."""


class AbstractFirst(abc.ABC, nn.Module):
    """A module of its own, as some libraries mix into the class of each submodule."""


class AbstractLast(nn.Module, abc.ABC):
    """The same the other way round."""


MIXED = [OfNoKind, OfKind, Abstract, AbstractFirst, AbstractLast]


@pytest.mark.parametrize("mixin", MIXED)
@pytest.mark.parametrize("first", [True, False])
@units
def test_another_class_is_mixed_in_from_either_side(rnn_cell: str, first: bool, mixin: type) -> None:
    """Into the class of every module: it is the layer that it was."""
    rnn = PLACES[0].make(rnn_cell)
    inputs = PLACES[0].inputs(rnn)
    expected = rnn(inputs[0], inputs[1] if rnn_cell == "GRU" else inputs[1:])

    def mixed(module: nn.Module) -> Any:
        kind: Any = type(module)
        made = object.__new__(type(f"Mixed{kind.__name__}", (mixin, kind) if first else (kind, mixin), {}))
        made.__dict__ |= module.__dict__ | {"_modules": {name: mixed(child) for name, child in module.named_children()}}
        return made

    rnn = mixed(rnn)
    assert_same(rnn(inputs[0], inputs[1] if rnn_cell == "GRU" else inputs[1:]), expected)


@units
def test_no_module_inside_is_called_like_one_of_torch(rnn_cell: str) -> None:
    """By which tools would take it for that, and look for its parameters."""
    inside = [type(module).__name__ for module in RIM(3, 8, rnn_cell=rnn_cell, proj_size=4 * (rnn_cell == "LSTM")).modules()][
        1:
    ]
    assert not [
        name for name in inside for word in ("lstm", "gru", "rnn", "linear", "conv", "norm", "embed") if word in name.lower()
    ]
