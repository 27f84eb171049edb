"""At home with tools that look into a model, or change it by what they find there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from drawn import assert_same, strong
from test_tools import SMALL, shown
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rim_rnn import RIM, native

pytestmark = pytest.mark.tools


class Model(nn.Module):
    """Something before the layer and something behind it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 5))
        self.rnn = RIM(5, 16, batch_first=True, **(SMALL | options))
        self.behind = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.rnn(self.before(x))[0])


# opacus

opacus_noise = pytest.mark.filterwarnings(
    "ignore:Secure RNG turned off",
    "ignore:Optimal order is the",
    "ignore:Full backward hook is firing",
    "ignore::DeprecationWarning",
)
KINDS: list[dict[str, Any]] = [{}, {"rnn_cell": "GRU"}, {"num_layers": 2, "bidirectional": True, "proj_size": 8}]


@opacus_noise
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_opacus_clips_the_gradient_of_each_sample(options: dict[str, Any], mode: str) -> None:
    """Without noise a step of opacus is the mean of the samples' gradients, each cut to the norm that is allowed."""
    opacus = pytest.importorskip("opacus")
    x, y = torch.randn(6, 4, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 0, 1])
    rnn = strong(RIM(3, 16, batch_first=True, dtype=torch.float64, **(SMALL | options)), scale=0.4)
    model = nn.Sequential(shown("OnePiece")(rnn), nn.Flatten(), nn.Linear(64, 2, dtype=torch.float64))
    assert opacus.validators.ModuleValidator.validate(model) == []
    alone, criterion = copy.deepcopy(model), nn.CrossEntropyLoss()

    each = []
    for i in range(6):
        alone.zero_grad()
        criterion(alone(x[i : i + 1]), y[i : i + 1]).backward()
        each.append([p.grad.clone() for p in alone.parameters() if p.grad is not None])
    norms = [torch.cat([grad.flatten() for grad in grads]).norm() for grads in each]
    most = float(torch.stack(norms).median())
    clipped = [[grad * min(1.0, most / float(norm)) for grad in grads] for grads, norm in zip(each, norms, strict=True)]

    private = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), 1.0),
        criterion=criterion,
        data_loader=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=6),
        noise_multiplier=0.0,
        max_grad_norm=most,
        grad_sample_mode=mode,
        poisson_sampling=False,
    )
    wrapped, optimizer, criterion = private[0], private[1], private[2] if mode == "ghost" else criterion
    optimizer.zero_grad()
    criterion(wrapped(x), y).backward()
    optimizer.step()
    for old, new, *grads in zip(alone.parameters(), model.parameters(), *clipped, strict=True):
        assert_same((old - new).detach(), torch.stack(grads).mean(0), rtol=1e-5, atol=1e-7)  # it divides by the norm plus 1e-6


@opacus_noise
def test_opacus_by_hand() -> None:
    """The mode no_op: gradients of each sample by vmap, of a layer that stands in no other module."""
    opacus = pytest.importorskip("opacus")
    model, x = Model(), torch.randn(8, 4, 3)
    parameters = dict(model.named_parameters())
    before = [p.detach().clone() for p in parameters.values()]
    wrapped, optimizer, _ = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        data_loader=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode="no_op",
        poisson_sampling=False,
    )

    def loss(given: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, given, (sample.unsqueeze(0),)).square().mean()

    detached = {name: p.detach() for name, p in parameters.items()}
    for name, grads in torch.func.vmap(torch.func.grad(loss), (None, 0))(detached, x).items():
        parameters[name].grad_sample = grads  # type: ignore[attr-defined]
    optimizer.step()
    assert wrapped(x).isfinite().all()
    assert all(not torch.equal(old, p) for old, p in zip(before, parameters.values(), strict=True))


@opacus_noise
def test_opacus_is_told_what_to_do() -> None:
    """Without the module around the layer, the first call says that it is missing, where opacus' own validator says nothing."""
    opacus = pytest.importorskip("opacus")
    rnn = opacus.grad_sample.GradSampleModule(RIM(3, 12, batch_first=True))
    with pytest.raises(RuntimeError, match=r"as one piece \(the page Tools shows the module\), or by torch.func.vmap"):
        rnn(torch.randn(2, 4, 3))


# captum


class Effect(nn.Module):
    """One number for each row of a batch, in double precision."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.rnn = strong(RIM(3, 16, batch_first=True, dtype=torch.float64, **(SMALL | options)))

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][:, -1].sum(-1)


def attributed(method: str, model: nn.Module, **options: Any) -> tuple[Tensor, Tensor]:
    """What a method attributes to each row's input in all, and the effect of that input."""
    captum = pytest.importorskip("captum.attr")
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    found = getattr(captum, method)(model).attribute(x, torch.zeros_like(x), **options)
    return found.flatten(1).sum(1).detach(), (model(x) - model(torch.zeros_like(x))).detach()


def test_captum_along_a_path() -> None:
    """The competition makes the output jump, which gradients do not see; where all units are active, they add up."""
    few, effect = attributed("IntegratedGradients", Effect(k=2), n_steps=50)
    many, _ = attributed("IntegratedGradients", Effect(k=2), n_steps=200)
    assert (few - effect).abs().max() > 0.05
    assert (many - effect).abs().max() > 0.05
    whole, effect = attributed("IntegratedGradients", Effect(k=4), n_steps=200)
    torch.testing.assert_close(whole, effect, rtol=1e-3, atol=1e-3)


def test_captum_by_calls() -> None:
    """Shapley values add up to the effect, and an ablation is the difference of two calls, whoever wins."""
    captum = pytest.importorskip("captum.attr")
    model, steps = Effect(k=2), torch.arange(5).view(1, 5, 1).repeat(1, 1, 3)
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    shapley = captum.ShapleyValueSampling(model).attribute(x, feature_mask=steps, n_samples=3)[:, :, 0].sum(1)
    torch.testing.assert_close(
        shapley, (model(x) - model(torch.zeros_like(x))).detach().to(shapley.dtype), rtol=1e-4, atol=1e-4
    )
    without = x.clone()
    without[:, 2] = 0
    ablated = captum.FeatureAblation(model).attribute(x, feature_mask=steps)[:, 2, 0]
    torch.testing.assert_close(ablated, (model(x) - model(without)).detach().to(ablated.dtype))


# Counters and summaries


def counted(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("rnn_cell", ["LSTM", "GRU"])
def test_operations_are_counted(rnn_cell: str) -> None:
    """Every step counts the same, and all products with units' weights; so does the line that the page has for other tools."""
    rnn = RIM(3, 16, batch_first=True, rnn_cell=rnn_cell, **SMALL)
    totals = [counted(rnn, torch.randn(2, steps, 3)) for steps in (4, 5, 6)]
    a_step = totals[1] - totals[0]
    assert a_step == totals[2] - totals[1]
    cell = rnn.cells[0]
    per_row = [cell.input_attention.query.weight, cell.dynamics.weight_hh, cell.input_attention.key.weight]
    per_row += [module.weight for module in cell.communication.children()]
    assert a_step > 2 * 2 * sum(weight.numel() for weight in per_row)  # two rows; a multiplication and an addition
    rnn.total_ops = 0  # type: ignore[assignment]
    x = torch.randn(2, 4, 3)
    shown("count_rim")(rnn, (x,), rnn(x))
    assert rnn.total_ops == totals[0] / 2


def test_operations_of_the_profiler() -> None:
    """It counts what torch's operators do: the native one is not among them, so inside readable()."""
    rnn, x = RIM(3, 16, batch_first=True, **SMALL), torch.randn(2, 4, 3)
    with native.readable(), torch.profiler.profile(with_flops=True) as profile:
        rnn(x)
    assert sum(event.flops or 0 for event in profile.key_averages()) > counted(rnn, x) / 2  # it knows no baddbmm


def test_torchinfo_folds_the_steps() -> None:
    """Up to one below the layer it is one row, with all its parameters and the shape of its output."""
    torchinfo = pytest.importorskip("torchinfo")
    model, x = Model(), torch.randn(2, 6, 3)
    expected = sum(p.numel() for p in model.parameters())
    for depth, given in ((1, {"input_data": x}), (2, {"input_data": x}), (9, {})):
        summary = torchinfo.summary(model, depth=depth, verbose=0, **given)
        assert summary.total_params == expected
        rows = str(summary).splitlines()
        assert len([row for row in rows if "RIM" in row and "RIMCell" not in row]) == 1
        assert len([row for row in rows if "RIMCell" in row]) == (1 if depth == 9 else 0)
    assert "[2, 6, 16]" in str(torchinfo.summary(model, depth=1, verbose=0, input_data=x))


# torch-pruning


@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")  # the layer's, which it is told to leave
def test_torch_pruning_of_what_is_around() -> None:
    """Channels go where neither the layer nor its input is; the layer keeps its parameters, and the model runs and trains."""
    pruning = pytest.importorskip("torch_pruning")
    model, x = Model(), torch.randn(2, 6, 3)
    before = copy.deepcopy(model.rnn.state_dict())
    fed, last = model.before[2], model.behind[2]
    pruner = pruning.pruner.MagnitudePruner(
        model,
        x,
        importance=pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[model.rnn, fed, last],
    )
    pruner.step()
    assert_same(model.rnn.state_dict(), before)
    sizes = [layer.weight.shape for layer in (model.before[0], fed, model.behind[0], last)]
    assert sizes == [(4, 3), (5, 4), (4, 16), (2, 4)]
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
