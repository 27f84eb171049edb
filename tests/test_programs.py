"""A layer lives in a program: gradients of gradients, of many at once and of what was changed in place; long runs; training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import assert_identical, cell_options, normal, options, strong
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from rim_rnn import RIM, RIMCell, native, operator

needs_native = pytest.mark.skipif(native._unavailable is not None, reason=str(native._unavailable))
SMALL: dict[str, Any] = {
    "num_units": 4,
    "k": 3,
    "key_size_input": 3,
    "value_size_input": 2,
    "key_size_comm": 2,
    "value_size_comm": 3,
    "num_comm_heads": 2,
}
KINDS: dict[str, dict[str, Any]] = {"LSTM": {}, "GRU": {"rnn_cell": "GRU"}, "proj": {"proj_size": 4}}
kinds = pytest.mark.parametrize("kind", KINDS)
PATHS: dict[str, Callable[[], AbstractContextManager[None]]] = {"native": nullcontext, "readable": native.readable}
paths = pytest.mark.parametrize("path", [pytest.param("native", marks=needs_native), "readable"])


def layer(kind: str, *sizes: int, dtype: torch.dtype = torch.float64, **extra: Any) -> RIM[Any]:
    """Three inputs, four units of two, three of them active, unless told otherwise; parameters far from zero."""
    return strong(RIM(*(sizes or (3, 8)), dtype=dtype, **(SMALL | KINDS[kind] | extra)))


def a_cell(kind: str, *sizes: int, **extra: Any) -> RIMCell[Any]:
    return strong(RIMCell(*(sizes or (3, 8)), dtype=torch.float64, **(SMALL | KINDS[kind] | extra)))


def parts(state: Any) -> list[Tensor]:
    """(h, c) or h as a list."""
    return [*state] if isinstance(state, tuple) else [state]


def whole(state: list[Tensor]) -> Any:
    """The list as a layer takes it."""
    return tuple(state) if len(state) == 2 else state[0]


def first_state(rnn: Any, *batch: int, seed: int = 50, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """States that want gradients, of a layer of ours or of torch's, or of a cell."""
    if rnn.__class__ in (nn.GRU, nn.GRUCell) or getattr(rnn, "rnn_cell", None) == "GRU":
        sizes = [rnn.hidden_size]
    else:
        sizes = [getattr(rnn, "proj_size", 0) or rnn.hidden_size, rnn.hidden_size]
    return [normal(*batch, size, seed=seed + i, dtype=dtype).requires_grad_() for i, size in enumerate(sizes)]


def weigh(results: list[Tensor], seed: int = 100) -> Tensor:
    """A loss that knows every element of every result, and is not linear in it."""
    total = torch.zeros((), dtype=torch.float64)
    for i, result in enumerate(results):
        wide = result.double()
        total = total + (wide * normal(*result.shape, seed=seed + i)).sum() + 0.1 * (wide * wide).sum()
    return total


def gradients(loss: Tensor, leaves: list[Tensor], **how: Any) -> tuple[Tensor, ...]:
    if not loss.requires_grad:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True, **how)


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """Each pair differs by at most `tolerance` of its largest element, or of 1e-3 where all of them are smaller."""
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        one, other = one.detach(), other.detach()
        assert (one - other).abs().max() <= tolerance * max(1e-3, float(other.abs().max()))


# Gradients of gradients, over networks of calls.


class Network:
    """Two cells and a layer that share or tie what was drawn, and the calls that a program makes of them."""

    CALLS = ("step", "step", "fed back", "one tensor twice", "state as input", "no state", "sequence", "sequence")

    def __init__(self, draw: st.DrawFn) -> None:
        given_options = draw(options(num_layers=1, bidirectional=False), label="options")
        given_options["input_size"] = given_options["proj_size"] or given_options["hidden_size"]
        make = cell_options(given_options)
        self.cells = [strong(RIMCell(**make, dtype=torch.float64), seed=i, scale=0.6) for i in range(2)]
        self.rnn = strong(RIM(**given_options | {"num_layers": 2}, dtype=torch.float64), seed=2, scale=0.6)
        for place in draw(st.sets(st.integers(0, 1)), label="cells shared with the layer"):
            self.rnn.cells[place] = self.cells[0]
        for name in draw(st.sets(st.sampled_from([n for n, _ in self.cells[0].named_parameters()])), label="tied"):
            module, _, last = name.rpartition(".")
            setattr(self.cells[1].get_submodule(module), last, self.cells[0].get_parameter(name))
        self.calls = draw(
            st.lists(st.tuples(st.sampled_from(self.CALLS), st.integers(0, 1)), min_size=2, max_size=4), label="calls"
        )
        batch = draw(st.integers(1, 2), label="batch")
        self.inputs = [normal(batch, given_options["input_size"], seed=10 + i) for i in range(2)]
        self.state = [s.detach() for s in first_state(self.cells[0], batch)]
        self.lone = len(self.state) == 1
        named = {f"x_{i}": x for i, x in enumerate(self.inputs)} | {f"first {i}": s for i, s in enumerate(self.state)}
        named |= {f"parameter {i}": p for i, p in enumerate(self.parameters())}
        wanted = draw(
            st.lists(st.sampled_from(sorted(named)), min_size=1, unique=True) | st.just(sorted(named)), label="wanted"
        )
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self.leaves = [named[name].requires_grad_() for name in wanted]
        self.only_last = draw(st.booleans(), label="a loss of the last state alone")

    def parameters(self) -> list[nn.Parameter]:
        return list(nn.ModuleList([*self.cells, self.rnn]).parameters())

    def run(self) -> list[Tensor]:
        """All results of all calls, or one state that the last one returned."""
        x, state, results = self.inputs[0], self.state, []
        for i, (call, which) in enumerate(self.calls):
            cell, (h, *c) = self.cells[which], state
            x = self.inputs[i] if i < len(self.inputs) else x
            if call == "sequence":
                sequence = torch.stack([x, h, x * h])
                output, last = self.rnn(sequence, whole([torch.stack([s, s.tanh()]) for s in state]))
                state = [s[which] for s in parts(last)]
                results.append(output)
                x = output[1]
            elif call == "no state":
                state = parts(cell(x))
            elif call == "state as input":
                state = parts(cell(h, whole(state)))
            elif call == "one tensor twice" and c and c[0].shape == h.shape:
                state = parts(cell(x, (h, h)))
            else:
                state = parts(cell(x, whole(state)))
                x = state[0] if call == "fed back" else x
            results += state
        return state[-1:] if self.only_last else results


networks = st.composite(Network)


@pytest.mark.slow
@needs_native
@settings(max_examples=50)
@given(networks())
def test_create_graph_in_a_network_of_calls(network: Network) -> None:
    """First derivatives are those without create_graph, second ones those of plain autograd through the readable path."""
    leaves = network.leaves
    plain = gradients(weigh(network.run()), leaves)
    first = gradients(weigh(network.run()), leaves, create_graph=True)
    second = gradients(weigh(list(first), seed=200), leaves)
    with native.readable():
        expected = gradients(weigh(network.run()), leaves, create_graph=True)
        expected_second = gradients(weigh(list(expected), seed=200), leaves)
    assert_close(plain, expected)
    assert_close(first, expected)
    assert_close(second, expected_second)


@paths
@kinds
@pytest.mark.parametrize("bounded", [True, False])
def test_second_derivative_of_two_steps_by_finite_differences(kind: str, bounded: bool, path: str) -> None:
    """Of a cell whose second step gets the states, and as its input the output, of the first."""
    cell = a_cell(kind, 4 if kind == "proj" else 8, 8, comm_bounded=bounded)
    x = normal(2, cell.input_size, seed=1).requires_grad_()
    names = ("dynamics.weight_hh", "communication.output.weight", "input_attention.query.weight")
    leaves = [x, *first_state(cell, 2), *(cell.get_parameter(name) for name in names)]

    def first(*values: Tensor) -> tuple[Tensor, ...]:
        x, *rest = values
        state, chosen = rest[:-3], dict(zip(names, rest[-3:], strict=True))

        def call(x: Tensor, state: list[Tensor]) -> list[Tensor]:
            for name, value in chosen.items():
                module, _, last = name.rpartition(".")
                cell.get_submodule(module)._parameters[last] = value  # type: ignore[assignment]
            return parts(cell(x, whole(state)))

        state = call(x, state)
        return gradients(weigh(call(state[0], state)), list(values), create_graph=True)

    with PATHS[path]():
        values = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        found = gradients(weigh(list(first(*values)), seed=200), values)
        for i, value in enumerate(values):
            direction, step = normal(*value.shape, seed=300 + i), 1e-5
            ends = []
            for sign in (1, -1):
                moved = [v.detach().clone() for v in values]
                moved[i] = moved[i] + sign * step * direction
                ends.append(float(weigh(list(first(*(m.requires_grad_() for m in moved))), seed=200).detach()))
            slope = (ends[0] - ends[1]) / (2 * step)
            assert float((found[i] * direction).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-6)


@pytest.mark.slow
@needs_native
@kinds
@pytest.mark.parametrize("steps", [1, 2])
def test_create_graph_where_a_result_depends_on_nothing_that_wants_a_gradient(kind: str, steps: int) -> None:
    """Each input, state and parameter alone, beside each result alone: zero where there is no path, never an error."""
    rnn = layer(kind)
    x, state = normal(steps, 1, 3, seed=1), [s.detach() for s in first_state(rnn, 1, 1)]
    rnn.requires_grad_(False)
    seen = Counter[bool]()
    for leaf in (x, *state, *rnn.parameters()):
        leaf.requires_grad_()
        for i in range(1 + len(state)):
            found = []
            for create_graph, path in ((False, "native"), (True, "native"), (True, "readable")):
                with PATHS[path]():
                    output, last = rnn(x, whole(state))
                    first = gradients(weigh([[output, *parts(last)][i]]), [leaf], create_graph=create_graph)
                    second = gradients(weigh(list(first), seed=200), [leaf]) if create_graph else ()
                    found.append((*first, *second))
            assert_close(found[0], found[2][:1])
            assert_close(found[1], found[2])
            seen[bool(found[0][0].any())] += 1
        leaf.requires_grad_(False)
    assert seen[True]
    assert seen[False] or steps > 1 or kind == "GRU"


def nodes_of(tensors: list[Tensor]) -> int:
    """How many nodes their graph has."""
    seen, left = set(), [t.grad_fn for t in tensors]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [next_node for next_node, _ in node.next_functions]
    return len(seen)


@needs_native
@kinds
def test_gradients_of_gradients_cost_the_same_for_every_step(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop of a cell, outputs fed back: one readable step for each, and as many nodes, whatever went before."""
    cell, ran = a_cell(kind, 4 if kind == "proj" else 8, 8), []
    run = operator.run
    monkeypatch.setattr(operator, "run", lambda *args: ran.append(1) or run(*args))  # type: ignore[func-returns-value]
    nodes = []
    for steps in (2, 4, 8):
        state = first_state(cell, 1)
        x = normal(1, cell.input_size, seed=1)
        for _ in range(steps):
            state = parts(cell(x, whole(state)))
            x = state[0]
        first = gradients(weigh(state), list(cell.parameters()), create_graph=True)
        assert len(ran) == steps
        nodes.append(nodes_of(list(first)))
        gradients(weigh(list(first), seed=200), list(cell.parameters()), create_graph=True)
        assert len(ran) == 2 * steps  # once more for the third derivative, of each
        ran.clear()
    assert nodes[2] - nodes[1] == 2 * (nodes[1] - nodes[0])


# Many gradients at once.


def a_call(
    kind: str, packed: bool, hidden_size: int = 8, **extra: Any
) -> tuple[RIM[Any], Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """A layer, its results as a function of input and states, and those: three steps of two rows, or five packed rows."""
    rnn = layer(kind, 3, hidden_size, **extra)
    x = normal(5, 3, seed=1) if packed else normal(3, 2, 3, seed=1)

    def call(x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        output, last = rnn(PackedSequence(x, torch.tensor([2, 2, 1])) if packed else x, whole([*state]))
        return (output.data if packed else output, *parts(last))

    return rnn, call, [x.requires_grad_(), *first_state(rnn, len(rnn.cells), 2)]


layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])


@paths
@layouts
@kinds
@pytest.mark.parametrize("extra", [{}, {"input_dropout": 0.4, "comm_dropout": 0.4}], ids=["", "dropout"])
def test_batched_gradients(kind: str, packed: bool, path: str, extra: dict[str, Any]) -> None:
    """is_grads_batched, and vmap over grad: of all results and of each, for all inputs and without the sequence."""
    rnn, call, inputs = a_call(kind, packed, **extra)
    with PATHS[path]():
        for leaves in ([*inputs, *rnn.parameters()], [*inputs[1:], *rnn.parameters()]):
            inputs[0].requires_grad_(leaves[0] is inputs[0])
            results = call(*inputs)
            for some in (results, *((result,) for result in results)):
                given_grads = [normal(3, *result.shape, seed=20 + i) for i, result in enumerate(some)]

                def pull(*grads: Tensor, results: Any = some, leaves: Any = leaves, **how: Any) -> tuple[Tensor, ...]:
                    return gradients_of(results, leaves, grads, **how)

                each = [pull(*(g[i] for g in given_grads)) for i in range(3)]
                expected = [torch.stack(same) for same in zip(*each, strict=True)]
                assert_close(pull(*given_grads, is_grads_batched=True), expected, 1e-12)
                assert_close(torch.func.vmap(pull)(*given_grads), expected, 1e-12)


def gradients_of(results: Any, leaves: Any, grads: Any, **how: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(results, leaves, grads, retain_graph=True, allow_unused=True, materialize_grads=not how, **how)


@pytest.mark.slow
@paths
@layouts
@kinds
def test_vectorised_jacobian_and_hessian(kind: str, packed: bool, path: str) -> None:
    _, call, inputs = a_call(kind, packed, hidden_size=4, num_units=2, k=1, proj_size=2 if kind == "proj" else 0)
    functional = torch.autograd.functional
    with PATHS[path]():
        jacobians = [functional.jacobian(call, tuple(inputs), vectorize=vectorize) for vectorize in (False, True)]
        hessians = [
            functional.hessian(lambda *args: weigh([*call(*args)]), tuple(inputs), vectorize=vectorize)
            for vectorize in (False, True)
        ]
    for one, other in (jacobians, hessians):
        for row, expected in zip(other, one, strict=True):
            assert_close(row, expected, 1e-12)


@needs_native
@layouts
@kinds
def test_gradcheck_with_batched_gradients(kind: str, packed: bool) -> None:
    rnn, call, inputs = a_call(kind, packed)
    assert rnn.path(torch.zeros(3, 2, 3, dtype=torch.float64)) == "native"
    assert torch.autograd.gradcheck(call, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, inputs, check_batched_grad=True, fast_mode=True)


@layouts
@kinds
def test_vmap_over_a_vjp_obtained_outside(kind: str, packed: bool) -> None:
    _, call, inputs = a_call(kind, packed)
    results, pull = torch.func.vjp(call, *inputs)
    given_grads = tuple(normal(3, *result.shape, seed=20 + i) for i, result in enumerate(results))
    each = [gradients_of(call(*inputs), inputs, [g[i] for g in given_grads]) for i in range(3)]
    assert_close(torch.func.vmap(pull)(given_grads), [torch.stack(same) for same in zip(*each, strict=True)], 1e-12)


# In place, as truncated backpropagation has it.

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-11, torch.bfloat16: 3e-2}
LAYOUTS = ("padded", "unbatched", "packed")
STACKS = [
    (*manner, dtype) for manner, dtype in zip(product((1, 2), (False, True), (False, True)), cycle(TOLERANCES), strict=False)
]
"""Layers, directions, batch_first, and a dtype: each pair of values once at least."""


def pair(kind: str, layers: int, bidirectional: bool, batch_first: bool, dtype: torch.dtype) -> tuple[Any, RIM[Any]]:
    """torch's layer and ours of the same options."""
    manners: dict[str, Any] = {"num_layers": layers, "bidirectional": bidirectional, "batch_first": batch_first, "dtype": dtype}
    sizes = {"proj_size": 4} if kind == "proj" else {}
    return getattr(nn, "GRU" if kind == "GRU" else "LSTM")(3, 8, **manners, **sizes), layer(kind, **manners)


def some_call(rnn: Any, layout: str, given: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """What a call takes and what it returns, flat; the data of a packed output."""
    dtype = next(rnn.parameters()).dtype
    shape = (3, 3) if layout == "unbatched" else (2, 3, 3) if rnn.batch_first else (3, 2, 3)
    x: Any = normal(*shape, seed=1, dtype=dtype).requires_grad_()
    batch = () if layout == "unbatched" else (2,)
    state = first_state(rnn, rnn.num_layers * (1 + rnn.bidirectional), *batch, dtype=dtype) if given else []
    packed = layout == "packed"
    sequence = pack_padded_sequence(x, [2, 3], rnn.batch_first, enforce_sorted=False) if packed else x
    output, last = rnn(sequence, whole(state) if given else None)
    return [x, *state], [output.data if packed else output, *parts(last)]


def refusal(habit: Callable[[], Any]) -> str:
    """What torch says against it, or nothing."""
    try:
        habit()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.slow
@paths
@kinds
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_detached_in_place_wherever_torch_allows_it(kind: str, path: str) -> None:
    """`for h in state: h.detach_()` and `output.detach_()`: no error of ours, and the gradients of what was not detached."""
    allowed = Counter[str]()
    for stack in STACKS:
        theirs, ours = pair(kind, *stack)
        for layout, grad, given_state, what in product(LAYOUTS, (True, False), (True, False), ("state", "output")):
            chosen = slice(1, None) if what == "state" else slice(0, 1)
            others = slice(0, 1) if what == "state" else slice(1, None)
            with torch.set_grad_enabled(grad):
                _, results = some_call(theirs, layout, given_state)
                if refusal(lambda results=results, chosen=chosen: [r.detach_() for r in results[chosen]]):  # type: ignore[misc]
                    continue
                allowed[what] += 1
                with PATHS[path]():
                    leaves, results = some_call(ours, layout, given_state)
                    for result in results[chosen]:
                        result.detach_()
                        assert not result.requires_grad
                        assert result.is_leaf
                    if not (grad and given_state):
                        continue
                    assert all(result.requires_grad for result in results[others])
                    leaves_of_all, untouched = some_call(ours, layout, given_state)
                    found = gradients(weigh(results[others]), [*leaves, *ours.parameters()])
                    expected = gradients(weigh(untouched[others]), [*leaves_of_all, *ours.parameters()])
                    assert_identical(found, expected)
    assert allowed["state"] > 50
    assert allowed["output"] > 33


@pytest.mark.slow
@paths
@kinds
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_changed_in_place_before_backward(kind: str, path: str) -> None:
    """Wherever torch allows it ours does, with the gradients of the change out of place; elsewhere an error or those."""
    allowed = 0

    def attempt(rnn: Any, layout: str, what: str, in_place: bool) -> list[Tensor] | str:
        leaves, results = some_call(rnn, layout)
        chosen = {"output": [0], "h": [1], "all": [*range(len(results))]}[what]
        for i in chosen:
            factor = normal(*results[i].shape, seed=70 + i, dtype=results[i].dtype)
            results[i] = results[i].mul_(factor) if in_place else results[i] * factor
        try:
            return [g.double() for g in gradients(weigh(results), [*leaves, *rnn.parameters()])]
        except RuntimeError as error:
            return str(error)

    for layers, bidirectional, batch_first, dtype in STACKS:
        theirs, ours = pair(kind, layers, bidirectional, batch_first, dtype)
        for layout, what in product(LAYOUTS, ("output", "h", "all")):
            does = not isinstance(attempt(theirs, layout, what, True), str)
            with PATHS[path]():
                found = attempt(ours, layout, what, True)
                if isinstance(found, str):
                    assert "modified by an inplace operation" in found
                    assert not does, (layers, bidirectional, batch_first, dtype, layout, what)
                    continue
                assert_close(found, attempt(ours, layout, what, False), TOLERANCES[dtype])
                allowed += does
    assert allowed > 60


# Bounded.

UNITS = ("LSTM", "GRU")
units = pytest.mark.parametrize("rnn_cell", UNITS)


@pytest.mark.slow
@paths
@units
@pytest.mark.parametrize("scale", [1, 10, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_state_is_bounded(rnn_cell: str, scale: int, dtype: torch.dtype, path: str) -> None:
    """Weights and inputs of any size, first states within the bound and beyond it: no rounding passes it in many steps."""
    steps = 3000 if path == "native" else 600
    rnn = RIM(3, 24, num_units=4, rnn_cell=rnn_cell, dtype=dtype)
    rnn.load_state_dict(
        {name: (normal(*p.shape, seed=i) * scale).to(dtype) for i, (name, p) in enumerate(rnn.state_dict().items())}
    )
    sizes = torch.tensor([0, 1e-3, 1, 1e3, 1e20], dtype=torch.float64)
    x = (normal(steps, 2, 5, 3, seed=100) * sizes.unsqueeze(1)).flatten(1, 2).to(dtype)
    h_0 = (normal(1, 2, 5, 24, seed=101) * torch.tensor([0.1, 100]).view(2, 1, 1)).flatten(1, 2).to(dtype)
    with torch.no_grad(), PATHS[path]():
        output, _ = rnn(x, h_0 if rnn_cell == "GRU" else (h_0, 10 * h_0))
    bound = h_0[0].abs().amax(-1).clamp(min=1 if rnn_cell == "GRU" else 2)
    largest = output.abs().amax((0, 2))
    assert (largest <= bound).all(), (largest, bound)
    assert largest.max() > 10


def text() -> Tensor:
    """Characters of this package, by number."""
    written = "".join(path.read_text(encoding="utf-8") for path in sorted(Path(native.__file__).parent.glob("*.py")))[:32_000]
    alphabet = sorted(set(written))
    return torch.tensor([alphabet.index(character) for character in written])


@pytest.mark.slow
@units
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=needs_native) for seed in (1, 2))])
def test_a_stateful_character_model_trains(rnn_cell: str, seed: int) -> None:
    """An epoch with the state carried from batch to batch: finite, within the bound, and better than frequencies tell.

    As equation 6 is printed, those of GRU units leave the bound within three batches, and mostly end in NaN.
    """
    torch.manual_seed(seed)
    characters, span, rows = text(), 40, 16
    shares = torch.bincount(characters) / len(characters)
    embedding, rnn = nn.Embedding(len(shares), 96), RIM(96, 96, num_layers=2, rnn_cell=rnn_cell)
    model = nn.ModuleList([embedding, rnn, nn.Linear(96, len(shares))])
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    sequences = characters[: len(characters) // rows * rows].view(rows, -1).t()
    losses, state = [], None
    for start in range(0, len(sequences) - 1 - span, span):
        output, last = rnn(embedding(sequences[start : start + span]), state)
        scores: Tensor = model[2](output)
        loss = F.cross_entropy(scores.flatten(0, 1), sequences[start + 1 : start + 1 + span].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        state = whole([s.detach() for s in parts(last)])
        assert norm.isfinite()
        assert output.detach().abs().max() <= (1 if rnn_cell == "GRU" else 2)
    assert sum(losses[-20:]) / 20 < 0.95 * float(-(shares * shares.log()).sum())
