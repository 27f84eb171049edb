"""Graphs that are of the readable path whether the operator is there or not: exported ones, and those of transforms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drawn import assert_same, normal
from test_integrations import KINDS, kinds, layer, output_and_gradients, some_state

from rim_rnn import native, operator, readable

pytestmark = pytest.mark.slow
MANY = 4


@pytest.fixture
def four_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are unrolled: a graph of few steps is traced in less time."""
    monkeypatch.setattr(readable, "UNROLLED", MANY - 1)


@pytest.mark.usefixtures("four_are_many")
@pytest.mark.parametrize(
    "extra", [{}, {"bias": False}, {"input_dropout": 0.4, "comm_dropout": 0.4}], ids=["", "no bias", "drop"]
)
@kinds
def test_compiled_readable_path_agrees_with_eager_over_many_steps(kind: dict[str, Any], extra: dict[str, Any]) -> None:
    """Outputs, states and every gradient; and nothing is compiled anew for a second batch."""
    rnn = layer(kind, bidirectional=True, **extra, dtype=torch.float64)
    parameters = list(rnn.parameters())
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    with native.readable():
        for seed in range(2):
            x, hx, results = normal(MANY, 3, 3, seed=seed), some_state(rnn, 3), []
            for module in (compiled, rnn):
                torch.manual_seed(0)
                with torch.compiler.set_stance("default" if seed == 0 else "fail_on_recompile"):
                    results.append(output_and_gradients(module, parameters, x, hx))
            assert_same(*results)


@pytest.mark.usefixtures("four_are_many")
@pytest.mark.parametrize(("transform", "steps"), [("grad", 2), ("grad", MANY), ("vmap", MANY)])
def test_transforms_compile(transform: str, steps: int) -> None:
    rnn, x = layer(KINDS[0], dtype=torch.float64), normal(2, steps, 2, 3, seed=0)
    function = getattr(torch.func, transform)(lambda x: rnn(x)[0].sum() if transform == "grad" else rnn(x)[0])
    x = x[0] if transform == "grad" else x
    assert_same(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x))


def test_the_compiled_graph_of_the_readable_path_does_not_grow_with_the_steps() -> None:
    rnn, sizes, many = layer(KINDS[0]), [], readable.UNROLLED + 1

    def count(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    with native.readable():
        for steps in (1, 2, many, 10 * many):
            torch.compiler.reset()
            torch.compile(rnn, fullgraph=True, backend=count)(normal(steps, 2, 3, seed=0, dtype=torch.float32))
    assert sizes[0] < sizes[1]  # few steps are unrolled, for the compiler to fuse what it finds
    assert sizes[2] == sizes[3] < sizes[0]


def test_one_compiled_graph_serves_all_numbers_of_steps() -> None:
    """The first number that it is shown is unrolled if it is small; with the second the number stays open, in one graph."""
    rnn, graphs = layer(KINDS[0]), []

    def count(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(rnn, fullgraph=True, backend=count)
    with native.readable():
        for steps in (5, *range(2, 20)):
            x = normal(steps, 3, 3, seed=steps, dtype=torch.float32)
            torch.testing.assert_close(compiled(x), rnn(x))
    assert len(graphs) == 2
    assert graphs[1] < graphs[0]


@pytest.mark.parametrize("kind", [*KINDS, {"num_comm_heads": 0, "bias": False}], ids=["LSTM", "GRU", "proj", "bare"])
@pytest.mark.parametrize("batch_sizes", [None, [2, 2, 1]], ids=["padded", "packed"])
def test_opcheck_of_the_readable_scan(kind: dict[str, Any], batch_sizes: list[int] | None) -> None:
    cell = layer(kind, dtype=torch.float64).cells[0]
    x = normal(*((5, 3) if batch_sizes else (3, 2, 3)), seed=0).requires_grad_()
    state = tuple(normal(2, size, seed=1) for size in cell.state_sizes().values())
    parameters = operator.plain_parameters(cell, x, state)
    h, c = state if len(state) == 2 else (*state, None)
    arguments = (x, h, c, *parameters, None, None, *operator.sizes_of(cell, batch_sizes, True))
    torch.library.opcheck(torch.ops.rim_rnn.readable.default, arguments)


@kinds
@pytest.mark.parametrize("given_state", [False, True])
def test_export(kind: dict[str, Any], given_state: bool) -> None:
    """One graph, right for other inputs than the one it was traced with."""
    rnn = layer(kind, num_layers=2, bidirectional=True, dtype=torch.float64).eval()
    x, other = (normal(2, 5, 3, seed=seed) for seed in range(2))
    state = (some_state(rnn, 5),) if given_state else ()
    program = torch.export.export(rnn, (x, *state))
    assert_same(program.module()(other, *state), rnn(other, *state))


def test_export_with_a_dynamic_batch() -> None:
    rnn = layer({"rnn_cell": "LSTM"}).eval()
    program = torch.export.export(rnn, (torch.randn(3, 5, 3),), dynamic_shapes=({1: torch.export.Dim("batch")},))
    for batch in (2, 9):
        x = torch.randn(3, batch, 3)
        torch.testing.assert_close(program.module()(x), rnn(x))


def test_export_with_dynamic_steps_and_batch() -> None:
    """A loop in the graph, however many steps: results and gradients for other sizes, ties (no biases, no states) as ours."""
    rnn = layer({"proj_size": 4, "batch_first": True, "bias": False}, dtype=torch.float64).eval()
    dims = torch.export.Dim("steps"), torch.export.Dim("batch")
    shapes = dict(enumerate(reversed(dims) if rnn.batch_first else dims))
    program = torch.export.export(rnn, (normal(4, 5, 3, seed=0),), dynamic_shapes=(shapes,))
    assert any("scan" in str(node.target) for node in program.graph.nodes)
    for sizes in ((9, 2), (2, 7), (40, 3)):
        x = normal(*sizes, 3, seed=sum(sizes))
        assert_same(program.module()(x), rnn(x))
    module, gradients = program.module(), []
    for run in (module, rnn):
        output, _ = run(x)
        gradients.append(torch.autograd.grad(output.square().sum(), list(run.parameters())))
    assert_same(*gradients)
