"""The layer on the accelerator that torch finds, where it finds one: what it computes there is what it computes on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from drawn import assert_same, gradients, inputs, normal, options, run_rows, strong
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rim_rnn import RIM, RIMCell, cuda, record
from rim_rnn.operator import plain_parameters, run, sizes_of

pytestmark = pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator is here")

there = torch.accelerator.current_accelerator() or torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "LSTM": {},
    "GRU": {"rnn_cell": "GRU"},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "proj": {"proj_size": 12},
    "not bounded": {"comm_bounded": False},
    "no communication": {"num_comm_heads": 0},
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def both(module: nn.Module) -> tuple[Any, Any]:
    """The module, and one equal to it on the accelerator."""
    return module, copy.deepcopy(module).to(there)


def back(values: Any) -> Any:
    """The same values on the CPU."""
    return values.cpu() if isinstance(values, Tensor) else type(values)(map(back, values))


def train(rnn: nn.Module, steps: int, x: Tensor) -> list[float]:
    """The losses of so many steps, with the state carried on from each to the next."""
    optimizer = torch.optim.Adam(rnn.parameters(), lr=1e-2)
    losses, hx = [], None
    for _ in range(steps):
        output, hx = rnn(x, hx)
        hx = tuple(part.detach() for part in hx) if isinstance(hx, tuple) else hx.detach()
        loss = (output - x.sum(-1, keepdim=True).tanh()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@given(st.data())
def test_layer_is_that_of_the_cpu(data: st.DataObject) -> None:
    """Sequences, packed or not, both directions, stacks, with states or without: results, records and every gradient."""
    drawn = data.draw(options())
    here, moved = both(strong(RIM(**drawn, batch_first=data.draw(st.booleans(), label="batch_first"), dtype=torch.float64)))
    rows = data.draw(inputs(drawn))
    rows_there = type(rows)(
        [row.detach().to(there).requires_grad_() for row in rows.rows],
        None if rows.state is None else tuple(part.detach().to(there).requires_grad_() for part in rows.state),
    )
    with record(here) as records:
        output, state = run_rows(here, rows)
    with record(moved) as records_there:
        output_there, state_there = run_rows(moved, rows_there)
    assert {part.device.type for part in (*output_there, *state_there)} == {there.type}
    assert_same(back([*output_there, *state_there]), [*output, *state])
    for seen, expected in zip(records_there, records, strict=True):
        assert torch.equal(seen.active.cpu(), expected.active)
        assert_same(back([*seen[1:]]), [*expected[1:]])
    leaves = [*here.parameters(), *rows.leaves()]
    found = gradients([part.cpu() for part in (*output_there, *state_there)], [*moved.parameters(), *rows_there.leaves()])
    assert_same(back(list(found)), list(gradients([*output, *state], leaves)))


@kinds
def test_an_epoch_of_training_is_that_of_the_cpu(kind: dict[str, Any]) -> None:
    here, moved = both(RIM(5, 24, **kind, dtype=torch.float64))
    x = normal(7, 4, 5, seed=1)
    losses = train(here, 20, x)
    assert_same(train(moved, 20, x.to(there)), losses, rtol=1e-6)
    assert losses[-1] < losses[0]
    assert_same([back(p.detach()) for p in moved.parameters()], [p.detach() for p in here.parameters()], rtol=1e-5, atol=1e-7)


@kinds
def test_float32_is_as_near_to_float64_as_on_the_cpu(kind: dict[str, Any]) -> None:
    exact = RIM(5, 24, **kind, dtype=torch.float64)
    x = normal(7, 4, 5, seed=1)
    expected, _ = exact(x)
    _, moved = both(copy.deepcopy(exact).float())
    torch.testing.assert_close(moved(x.float().to(there))[0].cpu(), expected.float(), rtol=1e-4, atol=1e-5)


def test_dropouts_are_drawn_there() -> None:
    """Anew at each call, and again as they were from the same seed; none in eval mode."""
    rnn = RIM(5, 24, input_dropout=0.5, comm_dropout=0.5, device=there)
    x = normal(7, 4, 5, seed=1, dtype=torch.float32).to(there)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(rnn(x)[0])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    rnn.eval()
    assert torch.equal(rnn(x)[0], rnn(x)[0])


@kinds
def test_second_derivatives_are_those_of_the_cpu(kind: dict[str, Any]) -> None:
    found = []
    for rnn in both(strong(RIM(3, 24, **kind, dtype=torch.float64), scale=0.3)):
        x = normal(4, 2, 3, seed=1).to(next(rnn.parameters()).device).requires_grad_()
        (first,) = torch.autograd.grad(rnn(x)[0].sin().sum(), x, create_graph=True)
        found.append(back(list(torch.autograd.grad(first.square().sum(), [x, *rnn.parameters()], materialize_grads=True))))
    assert_same(found[1], found[0], rtol=1e-7, atol=1e-9)


@kinds
def test_autocast_gives_the_dtypes_of_torch(kind: dict[str, Any]) -> None:
    """And values near those without it, and gradients of the parameters' own dtype."""
    rnn = RIM(5, 24, **kind, device=there)
    sizes = (5, 24, kind.get("num_layers", 1), True, kind.get("batch_first", False), 0.0, kind.get("bidirectional", False))
    theirs: Any = nn.GRU(*sizes) if rnn.mode == "GRU" else nn.LSTM(*sizes, proj_size=rnn.proj_size)
    theirs.to(there)
    x = normal(7, 4, 5, seed=1, dtype=torch.float32).to(there)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast(there.type, dtype):
            output, hx = rnn(x)
            expected, expected_hx = theirs(x)
        assert output.dtype == dtype
        if expected.dtype == dtype:  # cuDNN's is float16, whichever is asked for
            assert [h.dtype for h in hx] == [h.dtype for h in expected_hx]
        torch.testing.assert_close(output.float(), rnn(x)[0], rtol=0.1, atol=0.1)
    output.float().sum().backward()
    assert {p.grad.dtype for p in rnn.parameters() if p.grad is not None} == {torch.float32}


def test_what_lies_elsewhere_is_refused() -> None:
    rnn = RIM(5, 24, device=there)
    with pytest.raises(RuntimeError, match="device"):
        rnn(torch.zeros(7, 4, 5))
    with pytest.raises(RuntimeError, match="device"):
        rnn(torch.zeros(7, 4, 5, device=there), (torch.zeros(1, 4, 24), torch.zeros(1, 4, 24)))


def test_it_goes_there_and_comes_back(tmp_path: Any) -> None:
    here, moved = both(RIM(5, 24))
    assert moved.path(torch.zeros(1, 1, 5, device=there)).startswith("readable")
    torch.save(moved.state_dict(), tmp_path / "there.pt")
    again = RIM(5, 24)
    again.load_state_dict(torch.load(tmp_path / "there.pt", map_location="cpu"))
    x = normal(7, 4, 5, seed=1, dtype=torch.float32)
    assert torch.equal(again(x)[0], here(x)[0])
    assert torch.equal(moved.cpu()(x)[0], here(x)[0])


def test_a_cell_is_that_of_the_cpu() -> None:
    here, moved = both(RIMCell(5, 24, dtype=torch.float64))
    x = normal(4, 5, seed=1)
    state, state_there = here(x), moved(x.to(there))
    for _ in range(3):
        state, state_there = here(x, state), moved(x.to(there), state_there)
    assert_same(back(state_there), state)


@pytest.mark.skipif(there.type != "cuda", reason="graphs of kernels are CUDA's")
@kinds
def test_a_training_step_is_captured_as_a_graph(kind: dict[str, Any]) -> None:
    """Replayed with other numbers it does what a plain step does with them."""
    plain = RIM(5, 24, **kind, dtype=torch.float64, device=there)
    captured = copy.deepcopy(plain)
    first, second = (normal(7, 4, 5, seed=seed).to(there) for seed in (1, 2))
    x = first.clone()

    def step(rnn: nn.Module, x: Tensor) -> None:
        rnn(x)[0].square().sum().backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(captured, x)
    torch.cuda.current_stream().wait_stream(stream)
    captured.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured, x)
    for numbers in (second, first):
        plain.zero_grad()
        step(plain, numbers)
        x.copy_(numbers)
        for p in captured.parameters():
            if p.grad is not None:
                p.grad.zero_()
        graph.replay()
        assert_same(
            [p.grad for p in captured.parameters() if p.grad is not None],
            [p.grad for p in plain.parameters() if p.grad is not None],
        )


@pytest.mark.filterwarnings(r"ignore:\s*Online softmax is disabled:UserWarning")  # Inductor's, about its own work
def test_compiled_it_computes_the_same() -> None:
    rnn = RIM(5, 24, device=there, dtype=torch.float64)
    x = normal(4, 3, 5, seed=1).to(there)
    assert_same(torch.compile(rnn)(x), rnn(x), rtol=1e-7, atol=1e-9)


@pytest.mark.skipif(there.type != "cuda", reason="the kernels are CUDA's")
@pytest.mark.parametrize("sizes", [(5, 24, 4), (64, 600, 6), (128, 1024, 6)])
@pytest.mark.parametrize("batch", [1, 3, 64, 257])
@kinds
def test_the_kernels_compute_what_the_cpu_does(
    kind: dict[str, Any], batch: int, sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, where the CPU is given the winners: bids that nearly tie are another's there. And the same bits twice."""
    monkeypatch.setattr(cuda, "IS_ON", True)
    torch.manual_seed(0)
    input_size, hidden_size, num_units = sizes
    options = {name: value for name, value in kind.items() if name not in ("num_layers", "bidirectional", "batch_first")}
    cell = RIMCell(input_size, hidden_size // num_units * num_units, num_units=num_units, **options)
    x, state = torch.randn(20, batch, input_size), [torch.randn(batch, size) for size in cell.state_sizes().values()]
    moved = copy.deepcopy(cell).to(there)
    assert cuda.supports(moved, x.to(there), tuple(s.to(there) for s in state)) is None

    def results(tensors: list[Any], cell: RIMCell[Any]) -> tuple[list[Tensor], Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        output, last, traces = cuda.scan(cell, leaves[0], tuple(leaves[1:]), record=True)  # type: ignore[misc]
        made = [output, *last]
        found = torch.autograd.grad(sum(m.square().sum() for m in made), [*leaves, *cell.parameters()], allow_unused=True)
        return [*made, *(g for g in found if g is not None)], torch.cat([trace.active.t() for trace in traces])

    ours, active = results([t.to(there) for t in (x, *state)], moved)
    again, _ = results([t.to(there) for t in (x, *state)], moved)
    for first, second in zip(ours, again, strict=True):
        assert torch.equal(first, second)
    leaves = [t.requires_grad_() for t in (x, *state)]
    parameters = plain_parameters(cell, x, tuple(state))
    assert not isinstance(parameters, str)
    tensors = [x, state[0], state[1] if len(state) == 2 else None, *parameters, None, None]
    winners = active.cpu().nonzero()[:, 1].view(-1, cell.k)
    made = run(tensors, sizes_of(cell, None, False), winners)
    found = torch.autograd.grad(sum(m.square().sum() for m in made), [*leaves, *cell.parameters()], allow_unused=True)
    theirs = [*made, *(g for g in found if g is not None)]
    for our, their in zip(ours, theirs, strict=True):
        assert (our.cpu() - their).norm() <= 1e-5 * their.norm()
