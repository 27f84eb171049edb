"""At home with torch's own tools: several processes, checkpointing, parametrisations, pruning, averaging, Muon, adapters."""

from __future__ import annotations

import copy
import datetime
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from drawn import assert_identical, assert_same, normal, strong
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from rim_rnn import RIM, RIMCell

pytestmark = pytest.mark.tools
SMALL: dict[str, Any] = {"key_size_input": 4, "key_size_comm": 3, "value_size_comm": 2, "num_comm_heads": 2}
cells = pytest.mark.parametrize("rnn_cell", ["LSTM", "GRU"])


def layer(num_layers: int = 1, seed: int = 0, scale: float = 0.4, **options: Any) -> RIM[Any]:
    """Three inputs, three units of four, two of them active."""
    options = {"num_units": 3, "k": 2, "dtype": torch.float64} | SMALL | options
    return strong(RIM(3, 12, num_layers, **options), seed, scale)


def flat(result: tuple[Any, Any]) -> list[Tensor]:
    output, state = result
    return [output, *(state if isinstance(state, tuple) else (state,))]


def loss_of(result: tuple[Any, Any]) -> Tensor:
    """A mean over rows, so that the mean over halves of a batch is that over the batch."""
    return sum((part.square().sum(-1).mean() for part in flat(result)), torch.zeros(()))


def gradients(rnn: nn.Module, x: Tensor, call: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    rnn.zero_grad()
    loss_of((call or rnn)(x)).backward()
    return {name: p.grad.clone() for name, p in rnn.named_parameters() if p.grad is not None}


def matrices(rnn: RIM[Any]) -> list[tuple[nn.Module, str]]:
    """Where the projections are: every query, key, value and output, as parent and name."""
    places = []
    for cell in rnn.cells:
        places += [(cell.input_attention, name) for name in ("query", "key", "value")]
        places += [(cell.communication, name) for name in ("query", "key", "value", "output")]
    return places


# Two processes


def alone(rank: int, store: str, job: Callable[..., Any], *args: Any) -> Any:
    """What one of the two processes does: join the other, do the job, leave."""
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=20)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=limit)
    try:
        return job(rank, *args)
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    """Runs a job in two processes that talk through gloo, and returns what each of them returns."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("no gloo")
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:

        def run(job: Callable[..., Any], *args: Any) -> list[Any]:
            store = str(tmp_path_factory.mktemp("gloo") / "store")
            both = [pool.submit(alone, rank, store, job, *args) for rank in range(2)]
            return [one.result(timeout=60) for one in both]

        yield run


def two_steps(rnn: nn.Module, x: Tensor, whole: Callable[[Tensor], Tensor] = Tensor.clone) -> list[dict[str, Tensor]]:
    """The gradients of two steps of SGD, the second from where the first one led."""
    optimizer, steps = torch.optim.SGD(rnn.parameters(), 0.1), []
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(rnn(x)).backward()
        steps.append({name.removeprefix("module."): whole(p.grad) for name, p in rnn.named_parameters()})
        optimizer.step()
    return steps


def ddp(rank: int, options: dict[str, Any]) -> list[dict[str, Tensor]]:
    model = nn.parallel.DistributedDataParallel(layer(**options, seed=rank))  # rank 0's parameters go to both
    return two_steps(model, normal(5, 4, 3, seed=0).chunk(2, 1)[rank])


def test_ddp(together: Callable[..., list[Any]]) -> None:
    """Each process has half the batch: gradients of both are those of the whole batch, with no parameter unused."""
    options = {"num_layers": 2, "bidirectional": True}
    expected = two_steps(layer(**options), normal(5, 4, 3, seed=0))
    for steps in together(ddp, options):
        assert_same(steps, expected)


SHARDED: dict[str, Callable[[RIM[Any]], list[nn.Module]]] = {
    "layer": lambda rnn: [rnn],
    "cells": lambda rnn: [*rnn.cells, rnn],
    "cells alone": lambda rnn: [*rnn.cells],
    "submodules": lambda rnn: [*(getattr(*place) for place in matrices(rnn)), *(cell.dynamics for cell in rnn.cells), rnn],
}


def fsdp(rank: int, sharded: str, options: dict[str, Any]) -> list[dict[str, Tensor]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rnn, mesh = layer(**options), init_device_mesh("cpu", (2,))
    for module in SHARDED[sharded](rnn):
        fully_shard(module, mesh=mesh)
    return two_steps(rnn, normal(5, 4, 3, seed=0).chunk(2, 1)[rank], lambda grad: grad.full_tensor())  # type: ignore[attr-defined]


def fsdp1(rank: int, sharded: str, use_orig_params: bool, options: dict[str, Any]) -> dict[str, Tensor]:
    from torch.distributed.fsdp import FullyShardedDataParallel, wrap

    policies: dict[str, Any] = {
        "layer": None,
        "cells": wrap.ModuleWrapPolicy({RIMCell}),
        "by size": partial(wrap.size_based_auto_wrap_policy, min_num_params=10),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch would rather have FSDP2
        model = FullyShardedDataParallel(
            layer(**options),
            auto_wrap_policy=policies[sharded],
            use_orig_params=use_orig_params,
            device_id=torch.device("cpu"),
        )
        optimizer, x = torch.optim.SGD(model.parameters(), 0.1), normal(5, 4, 3, seed=0).chunk(2, 1)[rank]
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model(x)).backward()
            optimizer.step()
        with FullyShardedDataParallel.summon_full_params(model):
            named = model.named_parameters()
            return {name.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for name, p in named}


@pytest.mark.parametrize(("sharded", "use_orig_params"), [("layer", False), ("cells", True), ("by size", True)])
def test_fsdp1(sharded: str, use_orig_params: bool, together: Callable[..., list[Any]]) -> None:
    """FullyShardedDataParallel: after two steps in two processes, the parameters that one process has with the whole batch."""
    options = {"num_layers": 2}
    rnn = layer(**options)
    optimizer, x = torch.optim.SGD(rnn.parameters(), 0.1), normal(5, 4, 3, seed=0)
    for _ in range(2):
        gradients(rnn, x)
        optimizer.step()
    for parameters in together(fsdp1, sharded, use_orig_params, options):
        assert_same(parameters, {name: p.detach() for name, p in rnn.named_parameters()})


@pytest.mark.parametrize("options", [{"num_layers": 2}, {"rnn_cell": "GRU"}], ids=["LSTM", "GRU"])
@pytest.mark.parametrize("sharded", SHARDED)
def test_fsdp(sharded: str, options: dict[str, Any], together: Callable[..., list[Any]]) -> None:
    """fully_shard, whatever is sharded: three units over two processes, and the gradients of the whole batch."""
    expected = two_steps(layer(**options), normal(5, 4, 3, seed=0))
    for steps in together(fsdp, sharded, options):
        assert_same(steps, expected)


# Checkpointing


@pytest.mark.parametrize("use_reentrant", [False, True])
@cells
def test_activation_checkpointing(rnn_cell: str, use_reentrant: bool) -> None:
    """Computed twice, dropout's draws included: gradients as without, also of the first state."""
    rnn = layer(2, rnn_cell=rnn_cell, input_dropout=0.3, comm_dropout=0.3, dropout=0.3)
    leaves = [normal(5, 2, 3, seed=1), *(normal(2, 2, 12, seed=2 + i) for i in range(2 if rnn_cell == "LSTM" else 1))]

    def forward(x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:  # the reentrant kind sees no tensor inside a tuple
        return tuple(flat(rnn(x, state if rnn_cell == "LSTM" else state[0])))

    def run(call: Callable[..., tuple[Tensor, ...]]) -> Any:
        torch.manual_seed(5)
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        output, *state = call(*inputs)
        return output, gradients(rnn, inputs[0], lambda _: (output, tuple(state))), [leaf.grad for leaf in inputs]

    checkpoint = torch.utils.checkpoint.checkpoint
    assert_identical(run(lambda *inputs: checkpoint(forward, *inputs, use_reentrant=use_reentrant)), run(forward))


# Parametrisations, pruning


class Half(nn.Module):
    """A parametrisation that is easily done by hand."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight * 2


PARAMETERS = [name.removeprefix("cells.0.") for name, _ in layer(proj_size=6).named_parameters()]


def place(rnn: RIM[Any], name: str) -> tuple[nn.Module, str]:
    """The module of the first cell that holds a parameter, and the parameter's name there."""
    path, _, last = name.rpartition(".")
    return rnn.cells[0].get_submodule(path), last


@pytest.mark.parametrize("name", PARAMETERS)
def test_any_parameter_can_be_parametrised(name: str) -> None:
    """Halved by a parametrisation is halved by hand: outputs, gradients, and after it was removed."""
    rnn, plain = layer(proj_size=6), layer(proj_size=6)
    module, last = place(rnn, name)
    parametrize.register_parametrization(module, last, Half())
    x = normal(5, 2, 3, seed=1)
    assert_same(flat(rnn(x)), flat(plain(x)))  # twice its half
    with torch.no_grad():
        module.parametrizations[last].original.mul_(0.3)
        getattr(*place(plain, name)).mul_(0.3)
    assert_same(flat(rnn(x)), flat(plain(x)))
    found, expected = gradients(rnn, x), gradients(plain, x)
    original = next(key for key in found if ".parametrizations." in key)
    assert_same(2 * found[original], expected[f"cells.0.{name}"])
    parametrize.remove_parametrizations(module, last)
    assert_same(gradients(rnn, x), expected)
    assert rnn.path(x) == plain.path(x)


def unit_norms(weight: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(weight, 2, dim=(-2, -1), keepdim=True)


class UnitSpectralNorm(nn.Module):
    """A spectral norm of 1 for each unit, where torch's spectral_norm takes all units for one matrix."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / unit_norms(weight)


NORMS: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Tensor], Any]]] = {
    "weight_norm": (
        lambda module: parametrizations.weight_norm(module, "weight_hh"),
        lambda weight: None,
    ),
    "spectral_norm": (
        lambda module: parametrizations.spectral_norm(module, "weight_hh", n_power_iterations=50),
        lambda weight: assert_same(unit_norms(weight.flatten(1)), torch.ones(1, 1, dtype=weight.dtype), rtol=1e-4),
    ),
    "of each unit": (
        lambda module: parametrize.register_parametrization(module, "weight_hh", UnitSpectralNorm()),
        lambda weight: assert_same(unit_norms(weight), torch.ones(3, 1, 1, dtype=weight.dtype)),
    ),
    "orthogonal": (
        lambda module: parametrizations.orthogonal(module, "weight_hh"),
        lambda weight: assert_same(weight @ weight.mT, torch.eye(4, dtype=weight.dtype).expand(3, 4, 4), atol=1e-10),
    ),
}


@pytest.mark.parametrize("norm", NORMS)
@cells
def test_parametrisations_of_torch_train(norm: str, rnn_cell: str) -> None:
    """A step of training keeps the constraint; the layer is the one that has those weights; baked in, it stays that one."""
    apply, check = NORMS[norm]
    rnn, x = layer(rnn_cell=rnn_cell), normal(5, 2, 3, seed=1)
    dynamics = rnn.cells[0].dynamics
    apply(dynamics)
    optimizer = torch.optim.SGD(rnn.parameters(), 0.05)
    losses = []
    for _ in range(5):
        losses.append(loss_of(rnn(x)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    rnn.eval()
    check(dynamics.weight_hh.detach())
    plain = layer(rnn_cell=rnn_cell)
    values = dict(rnn.named_parameters()) | {"cells.0.dynamics.weight_hh": dynamics.weight_hh}
    plain.load_state_dict({key: values[key] for key in plain.state_dict()})
    assert_same(flat(rnn(x)), flat(plain(x)))
    parametrize.remove_parametrizations(dynamics, "weight_hh")
    assert_same(flat(rnn(x)), flat(plain(x)))


@pytest.mark.parametrize("name", PARAMETERS)
def test_any_parameter_can_be_pruned_and_trained_on(name: str) -> None:
    """Three steps with a mask of prune are three steps with weight and gradient masked by hand; so is what remains after it."""
    rnn, plain = layer(proj_size=6), layer(proj_size=6)
    module, last = place(rnn, name)
    weight = getattr(*place(plain, name))
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)).gt(0.5).to(weight.dtype)
    prune.custom_from_mask(module, last, mask)
    weight.data *= mask
    x = normal(5, 2, 3, seed=1)
    optimizers = [torch.optim.SGD(some.parameters(), 0.1) for some in (rnn, plain)]
    for _ in range(3):
        assert_same(flat(rnn(x)), flat(plain(x)))
        gradients(rnn, x)
        gradients(plain, x)
        weight.grad *= mask
        for optimizer in optimizers:
            optimizer.step()
    prune.remove(module, last)
    assert_same(flat(rnn(x)), flat(plain(x)))
    assert rnn.path(x) == plain.path(x)
    assert getattr(module, last).eq(0).sum() >= mask.eq(0).sum() > 0


# Averages and ensembles


@cells
def test_averaged_model(rnn_cell: str) -> None:
    """SWA and EMA of a training run: the parameters' averages, in a layer that runs."""
    swa_utils = torch.optim.swa_utils
    rnn, x = layer(rnn_cell=rnn_cell), normal(5, 2, 3, seed=1)
    swa = swa_utils.AveragedModel(rnn)
    ema = swa_utils.AveragedModel(rnn, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(rnn.parameters(), 0.1)
    seen: list[dict[str, Tensor]] = []
    for _ in range(4):
        gradients(rnn, x)
        optimizer.step()
        seen.append(copy.deepcopy(rnn.state_dict()))
        swa.update_parameters(rnn)
        ema.update_parameters(rnn)
    mean = {key: sum(state[key] for state in seen) / len(seen) for key in seen[0]}
    moving = seen[0]
    for state in seen[1:]:
        moving = {key: 0.9 * moving[key] + 0.1 * state[key] for key in state}
    for averaged, expected in ((swa, mean), (ema, moving)):
        plain = layer(rnn_cell=rnn_cell)
        plain.load_state_dict(expected)
        assert_same(flat(averaged(x)), flat(plain(x)))


@cells
def test_ensemble_trains_as_its_members(rnn_cell: str) -> None:
    """stack_module_state and vmap: three layers in one call, three steps, each as it trains alone."""
    members = [layer(rnn_cell=rnn_cell, seed=seed) for seed in range(3)]
    x = normal(4, 2, 3, seed=1)
    stacked, buffers = torch.func.stack_module_state(members)  # type: ignore[arg-type]
    base = copy.deepcopy(members[0]).to("meta")

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return loss_of(torch.func.functional_call(base, (parameters, {}), (x,)))

    assert not buffers
    for _ in range(3):
        grads = torch.func.vmap(torch.func.grad(loss))(stacked)
        stacked = {key: value.detach() - 0.1 * grads[key] for key, value in stacked.items()}
        for member in members:
            gradients(member, x)
            torch.optim.SGD(member.parameters(), 0.1).step()
    for key, value in stacked.items():
        assert_same(value, torch.stack([dict(member.named_parameters())[key].detach() for member in members]))


# Muon


def test_muon_takes_the_matrices_and_another_optimiser_the_rest() -> None:
    """torch.optim.Muon wants matrices: 2-D and no bias (a unit's bias is a row of a 2-D one). Both together train the layer."""
    rnn, x = layer(2), normal(5, 2, 3, seed=1)
    with pytest.raises(ValueError, match="2D"):
        torch.optim.Muon(rnn.parameters())
    matrix = {name: p for name, p in rnn.named_parameters() if p.ndim == 2 and "bias" not in name}
    rest = [p for name, p in rnn.named_parameters() if name not in matrix]
    assert {name.removeprefix("cells.0.").removeprefix("cells.1.") for name in matrix} == {
        "input_attention.key.weight",
        "input_attention.value.weight",
    }
    optimizers = [torch.optim.Muon([*matrix.values()], lr=0.02), torch.optim.AdamW(rest, lr=1e-2)]
    before, losses = copy.deepcopy(rnn.state_dict()), []
    for _ in range(20):
        losses.append(loss_of(rnn(x)).item())
        gradients(rnn, x)
        for optimizer in optimizers:
            optimizer.step()
    assert losses[-1] < losses[0] / 2
    assert all(not torch.equal(before[name], p) for name, p in rnn.named_parameters())


# Modules in a projection's place


class Adapted(nn.Module):
    """LoRA: the projection that was there, frozen, and a product of two small matrices beside it."""

    def __init__(self, base: nn.Module, size_in: int, size_out: int, rank: int = 2) -> None:
        super().__init__()
        weight = base.weight
        units = weight.shape[:-2]
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(*units, size_in, rank, dtype=weight.dtype))
        self.b = nn.Parameter(torch.zeros(*units, rank, size_out, dtype=weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a @ self.b


class SeeThrough(Adapted):
    """As adapters of libraries are: whoever asks for `weight` gets that of the projection inside."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


def adapt(parent: nn.Module, name: str, kind: type[Adapted]) -> Adapted:
    """An adapter in a projection's place."""
    projection = getattr(parent, name)
    sizes = projection.weight.shape[-2:] if projection.weight.dim() == 3 else projection.weight.shape[::-1]
    setattr(parent, name, kind(projection, *sizes))
    return getattr(parent, name)


def merge(weight: Tensor, change: Tensor) -> None:
    """The shared key and value have their outputs first, as nn.Linear; the units' weights have their inputs first."""
    weight.data += change if weight.dim() == 3 else change.T


@pytest.mark.parametrize("kind", [Adapted, SeeThrough])
@cells
def test_lora(rnn_cell: str, kind: type[Adapted]) -> None:
    """Adapters in the place of every projection: they alone learn, and merged into the weights they give the same layer."""
    rnn, x = layer(2, rnn_cell=rnn_cell).requires_grad_(False), normal(5, 2, 3, seed=1)
    plain = copy.deepcopy(rnn)
    for parent, name in matrices(rnn):
        adapt(parent, name, kind)
    assert_same(flat(rnn(x)), flat(plain(x)))  # b is 0

    trained = [p for p in rnn.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(matrices(rnn))
    optimizer, losses = torch.optim.Adam(trained, lr=1e-2), []
    for _ in range(10):
        losses.append(loss_of(rnn(x)).item())
        assert len(gradients(rnn, x)) == len(trained)
        optimizer.step()
    assert losses[-1] < losses[0]
    for (parent, name), old in zip(matrices(rnn), matrices(plain), strict=True):
        adapted, projection = getattr(parent, name), getattr(*old)
        assert adapted.b.ne(0).any()
        assert_identical(adapted.base.state_dict(), projection.state_dict())
        merge(projection.weight, adapted.a.detach() @ adapted.b.detach())
    assert_same(flat(rnn(x)), flat(plain(x)))


@pytest.mark.parametrize("kind", [Adapted, SeeThrough])
@pytest.mark.parametrize("path", [name.removesuffix(".weight") for name in PARAMETERS if name.endswith(".weight")])
def test_each_adapter_is_called(path: str, kind: type[Adapted]) -> None:
    rnn, x = layer(), normal(5, 2, 3, seed=1)
    before = flat(rnn(x))
    adapt(*place(rnn, path), kind).b.data += 0.5
    assert (rnn(x)[0] - before[0]).abs().max() > 1e-4


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning", "ignore:torch.quantize_per_tensor")
@cells
def test_dynamic_quantisation_of_linears_leaves_the_layer(rnn_cell: str) -> None:
    """The linear layers around it are quantised; the RIM has none and gives the same numbers, bit for bit."""
    from torch.ao.quantization import quantize_dynamic

    model = nn.ModuleDict({"rnn": layer(2, rnn_cell=rnn_cell, dtype=torch.float32), "head": nn.Linear(12, 5)})
    x = torch.randn(5, 2, 3)
    output, _ = model["rnn"](x)
    small = quantize_dynamic(model, {nn.Linear})
    assert type(small["head"]) is not nn.Linear
    assert_identical(small["rnn"](x), model["rnn"](x))
    torch.testing.assert_close(small["head"](output), model["head"](output), rtol=0.1, atol=0.1)
