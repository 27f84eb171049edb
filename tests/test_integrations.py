"""The rest of torch: compile, export, jit.trace, autocast, torch.func, double backward, meta device, dtypes, threads."""

from __future__ import annotations

import io
import threading
from typing import Any

import pytest
import torch
from drawn import assert_identical, assert_same, normal, or_not_on_this_processor, strong
from torch import Tensor, nn

from rim_rnn import RIM, RIMCell

KINDS = [{"rnn_cell": "LSTM"}, {"rnn_cell": "GRU"}, {"rnn_cell": "LSTM", "proj_size": 4}]
kinds = pytest.mark.parametrize("kind", KINDS, ids=["LSTM", "GRU", "proj"])
SMALL: dict[str, Any] = {
    "key_size_input": 3,
    "value_size_input": 3,
    "key_size_comm": 3,
    "value_size_comm": 2,
    "num_comm_heads": 2,
}


def layer(kind: dict[str, Any], scale: float = 0.8, **extra: Any) -> RIM[Any]:
    """Three inputs, four units of two, three of them active."""
    return strong(RIM(3, 8, num_units=4, k=3, **(SMALL | kind | extra)), scale=scale)


def flat(result: tuple[Tensor, Any]) -> list[Tensor]:
    """(output, (h_n, c_n)) or (output, h_n) as a list."""
    output, state = result
    return [output, *(state if isinstance(state, tuple) else (state,))]


def some_state(rnn: RIM[Any], batch: int) -> Any:
    dtype = next(rnn.parameters()).dtype
    sizes = [rnn.proj_size or rnn.hidden_size, rnn.hidden_size][: 2 if rnn.mode == "LSTM" else 1]
    state = tuple(normal(len(rnn.cells), batch, size, seed=50 + i, dtype=dtype) for i, size in enumerate(sizes))
    return state if len(state) == 2 else state[0]


# torch.compile and torch.export


def output_and_gradients(module: Any, parameters: list[nn.Parameter], x: Tensor, hx: Any) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    result = flat(module(leaf, hx))
    loss = sum(part.square().sum() for part in result)
    return [*(part.detach() for part in result), *torch.autograd.grad(loss, [leaf, *parameters])]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"rnn_cell": "LSTM", "num_layers": 2}, {"rnn_cell": "GRU", "bidirectional": True}], ids=str
)
def test_compile_fullgraph_agrees_with_eager(options: dict[str, Any]) -> None:
    """Outputs, states and every gradient; and nothing is compiled anew for a second batch."""
    rnn = layer(options, dtype=torch.float64)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    parameters, hx = list(rnn.parameters()), some_state(rnn, 5)
    for seed in range(2):
        x = normal(2, 5, 3, seed=seed)
        with torch.compiler.set_stance("default" if seed == 0 else "fail_on_recompile"):
            actual = output_and_gradients(compiled, parameters, x, hx)
        assert_same(actual, output_and_gradients(rnn, parameters, x, hx), rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_inductor_at_default_sizes_agrees_with_eager_and_keeps_ties() -> None:
    """Without biases and states every unit bids 0 at the first step: the compiled layer, too, lets the lowest win.

    The one test of torch.compile's own backend: half a minute for its C++ where nothing is in its cache.
    """
    rnn = RIM(3, 24, bias=False)
    compiled = torch.compile(rnn, fullgraph=True)
    parameters, hx, x = list(rnn.parameters()), (torch.zeros(1, 33, 24), torch.zeros(1, 33, 24)), torch.randn(2, 33, 3)
    actual = output_and_gradients(compiled, parameters, x, hx)
    torch.testing.assert_close(actual, output_and_gradients(rnn, parameters, x, hx))
    assert (actual[0][0].view(33, 6, 4) != 0).any(-1).tolist() == [[True] * 4 + [False] * 2] * 33


@pytest.mark.slow
@pytest.mark.parametrize("rnn_cell", ["LSTM", "GRU"])
def test_compiled_cell_agrees_with_eager(rnn_cell: str) -> None:
    cell = strong(RIMCell(3, 8, num_units=4, k=3, rnn_cell=rnn_cell, dtype=torch.float64, **SMALL))
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    x, h, c = normal(5, 3, seed=1), normal(5, 8, seed=2), normal(5, 8, seed=3)
    state = (h, c) if rnn_cell == "LSTM" else h
    assert_same(compiled(x, state), cell(x, state))
    assert_same(compiled(x), cell(x))


@pytest.mark.slow
@pytest.mark.parametrize("batch_first", [False, True])
def test_compiled_gru_output_changed_in_place(batch_first: bool) -> None:
    rnn = layer({"rnn_cell": "GRU"}, batch_first=batch_first)
    compiled, x, gradients = torch.compile(rnn, backend="aot_eager"), torch.randn(4, 4, 3), []
    for in_place in (False, True):
        output, _ = compiled(x)
        output = output.mul_(2) if in_place else output * 2
        gradients.append(torch.autograd.grad(output.square().sum(), list(rnn.parameters())))
    assert_same(*gradients)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@kinds
def test_jit_trace(kind: dict[str, Any]) -> None:
    """As nn.LSTM: of any batch, once it is loaded again too; the number of steps is that of the trace."""
    rnn, file = layer(kind, num_layers=2), io.BytesIO()
    torch.jit.save(torch.jit.trace(rnn, torch.randn(3, 5, 3)), file)  # type: ignore[no-untyped-call]
    file.seek(0)
    traced = torch.jit.load(file)  # type: ignore[no-untyped-call]
    for batch in (2, 9):
        x = torch.randn(3, batch, 3)
        assert_same(flat(traced(x)), flat(rnn(x)), rtol=1e-5, atol=1e-6)


# Autocast and dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rnn_cell", ["LSTM", "GRU"])
def test_autocast_returns_what_torch_returns_and_trains(rnn_cell: str, dtype: torch.dtype) -> None:
    """dtypes as nn.LSTM and nn.GRU have them, values near those of float32, gradients in float32."""
    rnn = layer({"rnn_cell": rnn_cell}, scale=0.3, num_layers=2)
    x = torch.randn(1, 4, 3)
    with torch.autocast("cpu", dtype=dtype):
        result = flat(rnn(x))
    torch.testing.assert_close([part.float() for part in result], flat(rnn(x)), rtol=0.02, atol=0.02)
    sum(part.float().sum() for part in result).backward()
    for parameter in rnn.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype is torch.float32
        assert parameter.grad.isfinite().all()
    with or_not_on_this_processor(), torch.autocast("cpu", dtype=torch.bfloat16):  # fewer still run nn.LSTM in float16
        expected = flat(getattr(nn, rnn_cell)(3, 8, 2)(x))
    assert [part.dtype for part in result] == [dtype if part.dtype is torch.bfloat16 else part.dtype for part in expected]


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("options", [{}, {"rnn_cell": "GRU"}, {"proj_size": 4}], ids=["LSTM", "GRU", "projected"])
def test_a_layer_of_one_narrow_dtype_under_autocast_to_the_other(options: dict[str, Any], hooked: bool) -> None:
    """It runs and trains, forward and backward, in every way that calls it, as a projected nn.LSTM does."""
    rnn = layer(options, scale=0.3, num_layers=2, dtype=torch.float32)
    x = torch.randn(3, 4, 3).bfloat16()
    expected = flat(rnn(x.float()))
    rnn.bfloat16()
    if hooked:
        for cell in rnn.cells:
            cell.register_forward_hook(lambda *_: None)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 3, 2, 1]))
    with torch.autocast("cpu", dtype=torch.float16):
        result = flat(rnn(x))
        rnn(packed)
        cell_result = rnn.cells[0](x[0])
    torch.testing.assert_close([part.float() for part in result], expected, rtol=0.05, atol=0.05)
    assert all(part.isfinite().all() for part in (cell_result if isinstance(cell_result, tuple) else [cell_result]))
    sum(part.float().sum() for part in result).backward()
    for parameter in rnn.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype is torch.bfloat16


@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_runs_and_trains(kind: dict[str, Any], dtype: torch.dtype) -> None:
    """One step is that of float64 from the same rounded numbers; several steps stay in the dtype, gradients too."""
    rnn = layer(kind, scale=0.5, bidirectional=True, dtype=dtype)
    wide = layer(kind, bidirectional=True, dtype=torch.float64)
    wide.load_state_dict(rnn.state_dict())
    x = normal(1, 6, 3, seed=1, dtype=dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    for part, expected in zip(flat(rnn(x)), flat(wide(x.double())), strict=True):
        assert part.dtype is dtype
        torch.testing.assert_close(part.double(), expected, rtol=tolerance, atol=tolerance)

    x = normal(5, 6, 3, seed=2, dtype=dtype).requires_grad_()
    result = flat(rnn(x, some_state(rnn, 6)))
    assert all(part.dtype is dtype for part in result)
    sum(part.sum() for part in result).backward()
    for leaf in (x, *rnn.parameters()):
        assert leaf.grad is not None
        assert leaf.grad.dtype is dtype
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_is_that_of_new_layers_and_of_no_other(default: torch.dtype) -> None:
    before = layer({})
    x = torch.randn(3, 2, 3)
    expected = before(x)
    torch.set_default_dtype(default)
    assert_identical(before(x), expected)
    after = RIM(3, 8)
    assert {p.dtype for p in after.parameters()} == {default}
    assert {part.dtype for part in flat(after(torch.randn(3, 2, 3)))} == {default}


# torch.func, double backward, forward mode


@kinds
def test_functional_call_and_grad(kind: dict[str, Any]) -> None:
    """Parameters from outside give the same outputs and, under torch.func.grad, the gradients of backward()."""
    rnn, other = layer(kind, dtype=torch.float64), strong(layer(kind, dtype=torch.float64), seed=9)
    parameters, x = dict(other.named_parameters()), normal(4, 3, 3, seed=1)
    assert_identical(torch.func.functional_call(rnn, parameters, (x,)), other(x))

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(rnn, parameters, (x,))[0].square().sum()

    grads = torch.func.grad(loss)({name: p.detach() for name, p in parameters.items()})
    other(x)[0].square().sum().backward()
    assert_same(grads, {name: p.grad for name, p in parameters.items()})
    assert all(p.grad is None for p in rnn.parameters())


@kinds
def test_vmap_gives_every_sample_its_own_gradient(kind: dict[str, Any]) -> None:
    rnn = layer(kind, num_layers=2, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in rnn.named_parameters()}
    samples = normal(4, 3, 3, seed=1)  # four unbatched sequences

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(rnn, parameters, (x,))[0].square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, samples)
    for i, sample in enumerate(samples):
        rnn.zero_grad()
        rnn(sample)[0].square().sum().backward()
        assert_same({name: g[i] for name, g in per_sample.items()}, {name: p.grad for name, p in rnn.named_parameters()})


@kinds
def test_vmap_over_an_ensemble(kind: dict[str, Any]) -> None:
    """Three models' parameters stacked: each runs as it does alone."""
    models = [strong(layer(kind, dtype=torch.float64), seed=i) for i in range(3)]
    parameters, _ = torch.func.stack_module_state(models)
    x = normal(4, 2, 3, seed=1)
    outputs = torch.func.vmap(lambda p: torch.func.functional_call(models[0], p, (x,))[0])(parameters)
    assert_same(outputs, torch.stack([model(x)[0] for model in models]))


@kinds
def test_forward_mode_agrees_with_reverse_mode(kind: dict[str, Any]) -> None:
    rnn = layer(kind, dtype=torch.float64)
    x, tangent = normal(3, 2, 3, seed=1), normal(3, 2, 3, seed=2)
    _, forward = torch.func.jvp(lambda x: rnn(x)[0], (x,), (tangent,))
    jacobian = torch.autograd.functional.jacobian(lambda x: rnn(x)[0], x)
    assert_same(forward, (jacobian * tangent).sum((-3, -2, -1)))


@kinds
def test_double_backward(kind: dict[str, Any]) -> None:
    """gradgradcheck over input, states and all parameters, one unit of three silent at each step."""
    sizes = {"proj_size": 3} if "proj_size" in kind else {}
    rnn = strong(RIM(2, 6, num_units=3, k=2, rnn_cell=kind["rnn_cell"], dtype=torch.float64, **sizes, **SMALL), seed=3)
    names = [name for name, _ in rnn.named_parameters()]
    hx = some_state(rnn, 2)
    hx = hx if isinstance(hx, tuple) else (hx,)

    def run(x: Tensor, *rest: Tensor) -> list[Tensor]:
        state, parameters = rest[: len(hx)], dict(zip(names, rest[len(hx) :], strict=True))
        return tuple(flat(torch.func.functional_call(rnn, parameters, (x, state if len(state) == 2 else state[0]))))

    arguments = [normal(2, 2, 2, seed=5), *hx, *(p.detach() for p in rnn.parameters())]
    assert torch.autograd.gradgradcheck(run, [a.clone().requires_grad_() for a in arguments], fast_mode=True)


def test_a_gradient_penalty_reaches_the_parameters() -> None:
    """create_graph=True, then backward: what a critic or a physics loss does."""
    rnn = layer({})
    x = torch.randn(3, 2, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(rnn(x)[0].sum(), x, create_graph=True)
    grad.square().sum().backward()
    weight = rnn.cells[0].dynamics.weight_hh
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


# Construction and threads


@kinds
def test_meta_device_then_to_empty(kind: dict[str, Any]) -> None:
    """Nothing is allocated on meta; after to_empty, loading or reset_parameters gives the layer that was meant."""
    ready = layer(kind, num_layers=2, bidirectional=True)
    empty = RIM(3, 8, 2, bidirectional=True, num_units=4, k=3, device="meta", **(SMALL | kind))
    assert all(p.is_meta for p in empty.parameters())
    shapes = [part.shape for part in flat(empty(torch.randn(3, 2, 3, device="meta")))]
    x = torch.randn(3, 2, 3)
    assert shapes == [part.shape for part in flat(ready(x))]

    empty.to_empty(device="cpu")
    empty.load_state_dict(ready.state_dict())
    assert_identical(empty(x), ready(x))

    torch.manual_seed(5)
    empty.reset_parameters()
    torch.manual_seed(5)
    fresh = RIM(3, 8, 2, bidirectional=True, num_units=4, k=3, **(SMALL | kind))
    assert_identical(dict(empty.named_parameters()), dict(fresh.named_parameters()))


def test_one_seed_one_model() -> None:
    def build(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return RIM(3, 12, 2).state_dict()

    assert_identical(build(1), build(1))
    assert all(not torch.equal(a, b) for a, b in zip(build(1).values(), build(2).values(), strict=True))


def test_threads_share_a_layer() -> None:
    """Four threads at once get what each gets alone, gradients of the input included."""
    rnn = layer({}, num_layers=2)
    inputs = [torch.randn(6, 4, 3) for _ in range(4)]

    def run(x: Tensor) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        output, _ = rnn(leaf)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), leaf)]

    expected = [run(x) for x in inputs]
    results: dict[int, list[Tensor]] = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: run(inputs[i])})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_identical([results[i] for i in range(4)], expected)


def test_weights_changed_in_place_count_at_once() -> None:
    """No copy of a weight goes stale: .data, no_grad edits, load_state_dict, .to()."""
    rnn, other = layer({}), strong(layer({}), seed=7)
    x = torch.randn(3, 2, 3)
    rnn(x)
    with torch.no_grad():
        for ours, theirs in zip(rnn.parameters(), other.parameters(), strict=True):
            ours.copy_(theirs)
    assert_identical(rnn(x), other(x))
    rnn.cells[0].dynamics.weight_hh.data *= 2
    other.load_state_dict(rnn.state_dict())
    assert_identical(rnn(x), other(x))
    rnn.double()
    torch.testing.assert_close(rnn(x.double())[0].float(), other(x)[0])
