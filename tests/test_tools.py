"""At home with other people's tools: each runs a small real problem with the layer inside. One tool: `pytest -k skorch`."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import assert_identical, assert_same, strong
from torch import Tensor, nn
from torch.nn import functional as F

from rim_rnn import RIM

pytestmark = pytest.mark.tools
SMALL: dict[str, Any] = {"num_units": 4, "key_size_input": 8, "key_size_comm": 8, "value_size_comm": 8, "num_comm_heads": 2}


def echo(steps: int = 200, batch: int = 8, chunk: int = 4) -> list[tuple[Tensor, Tensor]]:
    """A stream of signs cut into chunks, and the sign before each: for the first of a chunk, that is in the chunk before."""
    signs = torch.randint(0, 2, (steps, batch, 1), generator=torch.Generator().manual_seed(0)).float()
    before = torch.cat([torch.zeros(1, batch, 1), signs[:-1]])
    return list(zip((2 * signs - 1).split(chunk), before.split(chunk), strict=True))


class Echo(nn.Module):
    """The layer and a read-out, as most models have them."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.rnn = RIM(1, 32, **(SMALL | options))
        self.head = nn.Linear(32, 1)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        output, state = self.rnn(x, state)
        return self.head(output), state


def shown(name: str) -> Any:
    """What the page on tools shows under this name."""
    page = (Path(__file__).parent.parent / "docs" / "tools.md").read_text(encoding="utf-8")
    (code,) = (
        block
        for block in re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
        if re.search(rf"^(class|def) {name}\(", block, re.MULTILINE)
    )
    names = {"__name__": "docs.tools"}
    exec(code, names)
    return names[name]


def shown_policy() -> Any:
    """The same for the page's policy, which stands in the gallery."""
    policies = pytest.importorskip("sb3_contrib.common.recurrent.policies")
    script = (Path(__file__).parent.parent / "examples" / "gallery" / "recurrent_policy.py").read_text(encoding="utf-8")
    (code,) = re.findall(r"^class RIMPolicy.*?(?=^\S)", script, re.DOTALL | re.MULTILINE)
    names = {"__name__": "docs.tools", "RIM": RIM, "RecurrentActorCriticPolicy": policies.RecurrentActorCriticPolicy}
    exec(code, names)
    return names["RIMPolicy"]


# Lightning


def cut(state: Any, in_place: bool) -> Any:
    """Truncated backpropagation through time: the state goes on, its history does not. In either of the usual ways."""
    if not in_place:
        return tuple(h.detach() for h in state) if isinstance(state, tuple) else state.detach()
    for h in state if isinstance(state, tuple) else (state,):
        h.detach_()
    return state


def stateful_module(in_place: bool, **options: Any) -> Any:
    """A LightningModule that carries the state from batch to batch, and into its checkpoints."""
    lightning = pytest.importorskip("lightning")

    class Stateful(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model, self.state, self.losses = Echo(**options), None, []

        def training_step(self, batch: Any, _: int) -> Tensor:
            x, target = batch
            logits, state = self.model(x, self.state)
            self.state = cut(state, in_place)
            loss = F.binary_cross_entropy_with_logits(logits, target)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=5e-3)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state"] = self.state

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.state = checkpoint["state"]

    return Stateful()


def lightning_fit(module: Any, epochs: int, root: Path, resume: str | None = None) -> Any:
    import lightning

    loader = torch.utils.data.DataLoader(echo(), batch_size=None)  # type: ignore[arg-type]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, enable_checkpointing=False, default_root_dir=root, **quiet
    )
    trainer.fit(module, loader, ckpt_path=resume)
    return trainer


lightning_noise = pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
)


@lightning_noise
@pytest.mark.parametrize(("rnn_cell", "in_place"), [("LSTM", True), ("GRU", False)], ids=["LSTM-detach_", "GRU-detach"])
def test_lightning_learns_across_batches(rnn_cell: str, in_place: bool, tmp_path: Path) -> None:
    """A quarter of the answers lie in the batch before: without a carried state the loss stays above 0.17."""
    module = stateful_module(in_place, rnn_cell=rnn_cell)
    lightning_fit(module, 12, tmp_path)
    assert sum(module.losses[-50:]) / 50 < 0.1


@lightning_noise
def test_lightning_resumes_where_it_stopped(tmp_path: Path) -> None:
    """Two epochs, a checkpoint, two more: the losses and parameters of four epochs, bit for bit."""
    whole, first, second = (stateful_module(False) for _ in range(3))
    lightning_fit(whole, 4, tmp_path)
    lightning_fit(first, 2, tmp_path).save_checkpoint(tmp_path / "half.ckpt")
    lightning_fit(second, 4, tmp_path, str(tmp_path / "half.ckpt"))
    assert first.losses + second.losses == whole.losses
    assert_identical(second.state_dict(), whole.state_dict())


# skorch


class FirstSign(nn.Module):
    """Two classes: the sign of a sequence's first entry, which is long past at its end."""

    def __init__(self, num_units: int = 4, k: int | None = None) -> None:
        super().__init__()
        self.rnn = RIM(1, 16, batch_first=True, **(SMALL | {"num_units": num_units, "k": k}))
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.rnn(x)
        return self.head(output[:, -1])


def first_sign_net() -> tuple[Any, Any, Any]:
    skorch = pytest.importorskip("skorch")
    torch.manual_seed(0)
    x = torch.randn(160, 6, 1).sign()
    y = (x[:, 0, 0] > 0).long()
    net = skorch.NeuralNetClassifier(
        FirstSign, criterion=nn.CrossEntropyLoss, optimizer=torch.optim.Adam, lr=2e-2, max_epochs=25, batch_size=20, verbose=0
    )
    return net, x.numpy(), y.numpy()


def test_skorch_grid_search() -> None:
    """`module__num_units` and `module__k` are searched like any other argument, and the best one is trained again."""
    net, x, y = first_sign_net()
    net.set_params(train_split=None)
    from sklearn.model_selection import GridSearchCV

    search = GridSearchCV(
        net, {"module__num_units": [2, 4], "module__k": [1, 2]}, cv=2, scoring="accuracy", error_score="raise"
    )
    search.fit(x, y)
    best = search.best_estimator_.module_.rnn
    assert (best.num_units, best.k) == (search.best_params_["module__num_units"], search.best_params_["module__k"])
    assert search.best_score_ > 0.8


def test_skorch_pickles_a_fitted_net() -> None:
    net, x, y = first_sign_net()
    net.fit(x, y)
    assert net.history[-1, "train_loss"] < 0.3
    again = pickle.loads(pickle.dumps(net))
    assert_identical(torch.tensor(again.predict_proba(x)), torch.tensor(net.predict_proba(x)))
    for some in (net, again):  # the optimiser's state came along
        some.partial_fit(x[:20], y[:20])
    assert [p.shape for p in again.module_.parameters()] == [p.shape for p in net.module_.parameters()]
    assert all(p.isfinite().all() for p in again.module_.parameters())


# sb3-contrib and torchrl: an agent in an environment that shows what matters in its first observation only


def cue_env(steps: int = 4) -> Any:
    """The first observation is a sign, the others are zero; at the last step the action that repeats the sign is rewarded."""
    gymnasium = pytest.importorskip("gymnasium")

    class Cue(gymnasium.Env):  # type: ignore[misc, name-defined]
        observation_space = gymnasium.spaces.Box(-1, 1, (1,))
        action_space = gymnasium.spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            self.t, self.cue = 0, int(self.np_random.integers(2))
            return self.observe(), {}

        def observe(self) -> Any:
            return torch.tensor([2.0 * self.cue - 1 if self.t == 0 else 0.0]).numpy()

        def step(self, action: Any) -> Any:
            self.t += 1
            done = self.t == steps
            return self.observe(), float(done and action == self.cue), done, False, {}

    return Cue()


def test_sb3_recurrent_ppo_remembers_the_cue(tmp_path: Path) -> None:
    """Chance is 0.5. A saved agent acts as the one that was trained."""
    sb3 = pytest.importorskip("sb3_contrib")
    agent = sb3.RecurrentPPO(
        shown_policy(),
        cue_env(),
        policy_kwargs={"lstm_hidden_size": 16, "net_arch": []},
        n_steps=128,
        batch_size=64,
        n_epochs=4,
        learning_rate=1e-2,
        seed=0,
        device="cpu",
    )
    agent.learn(2048)
    agent.save(tmp_path / "agent")
    again = sb3.RecurrentPPO.load(tmp_path / "agent", device="cpu")
    assert type(again.policy.lstm_actor) is RIM
    assert_identical(again.policy.state_dict(), agent.policy.state_dict())

    env, rewards = cue_env(), []
    for seed in range(20):
        observation, _ = env.reset(seed=seed)
        states, starts, done = {agent: None, again: None}, [True], False
        while not done:
            actions = []
            for one in states:
                action, states[one] = one.predict(observation, states[one], starts, deterministic=True)
                actions.append(int(action))
            assert actions[0] == actions[1]
            observation, reward, done, *_ = env.step(actions[0])
            starts = [False]
        rewards.append(reward)
    assert sum(rewards) / len(rewards) == 1


def torchrl_parts(rnn: RIM[Any]) -> tuple[Any, Any]:
    """The environment, primed with the layer's states, and the layer in the module that torchrl has for it."""
    pytest.importorskip("torchrl")
    from torchrl.envs import Compose, GymWrapper, InitTracker, TransformedEnv
    from torchrl.modules import GRUModule, LSTMModule

    if rnn.mode == "LSTM":
        module = LSTMModule(lstm=rnn, in_keys=["observation", "h", "c"], out_keys=["features", ("next", "h"), ("next", "c")])
    else:
        module = GRUModule(gru=rnn, in_keys=["observation", "h"], out_keys=["features", ("next", "h")])
    env = TransformedEnv(GymWrapper(cue_env()), Compose(InitTracker(), module.make_tensordict_primer()))
    env.set_seed(0)
    return env, module


def torchrl_policy(module: Any) -> Any:
    from tensordict.nn import TensorDictModule, TensorDictSequential

    head = TensorDictModule(nn.Linear(16, 2), ["features"], ["logits"])
    act = TensorDictModule(lambda logits: F.one_hot(logits.argmax(-1), 2), ["logits"], ["action"])
    return TensorDictSequential(module, head, act), TensorDictSequential(module, head)


@pytest.mark.parametrize("rnn_cell", ["LSTM", "GRU"])
@pytest.mark.parametrize(("kind", "steps"), [("RIM", 4), ("MaskedRIM", 18)], ids=["one episode", "several"])
def test_torchrl_rollout_again_in_one_call(kind: str, steps: int, rnn_cell: str) -> None:
    """Step by step in the rollout, then as sequences in training: the same features, nothing leaks from episode to episode."""
    torchrl = pytest.importorskip("torchrl.modules")
    env, module = torchrl_parts((RIM if kind == "RIM" else shown(kind))(1, 16, 2, batch_first=True, rnn_cell=rnn_cell, **SMALL))
    policy, learner = torchrl_policy(module)
    with torch.no_grad():
        data = env.rollout(steps, policy, break_when_any_done=False)
    assert int(data["is_init"].sum()) == -(-steps // 4)
    with torchrl.set_recurrent_mode(True):
        again = learner(data.exclude("features", "logits").unsqueeze(0))[0]
    assert_same(again["features"].detach(), data["features"], rtol=1e-5, atol=1e-6)
    assert_same(again["next", "h"][-1].detach(), data["next", "h"][-1], rtol=1e-5, atol=1e-6)


def test_torchrl_learns_from_rollouts() -> None:
    """From whole rollouts of several episodes the layer learns to name the cue that an episode began with."""
    torchrl = pytest.importorskip("torchrl.modules")
    env, module = torchrl_parts(shown("MaskedRIM")(1, 16, batch_first=True, **SMALL))
    policy, learner = torchrl_policy(module)
    with torch.no_grad():
        data = env.rollout(80, policy, break_when_any_done=False)
    cues = data["observation"][::4, 0].repeat_interleave(4).gt(0).long()
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-2)
    for _ in range(60):
        with torchrl.set_recurrent_mode(True):
            logits = learner(data.exclude("features", "logits").unsqueeze(0))["logits"][0]
        loss = F.cross_entropy(logits, cues)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


# accelerate


def train_echo(
    model: nn.Module, optimizer: Any, batches: Any, backward: Callable[[Tensor], Any], clip: Callable[..., Any]
) -> Any:
    losses, state = [], None
    for x, target in batches:
        logits, state = model(x, state)
        state = tuple(h.detach() for h in state)
        loss = F.binary_cross_entropy_with_logits(logits, target)
        optimizer.zero_grad()
        backward(loss)
        clip(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_accelerate_trains_as_by_hand() -> None:
    """prepare, backward, clip_grad_norm_, unwrap_model: bit for bit the plain loop."""
    accelerate = pytest.importorskip("accelerate")
    plain = Echo()
    model = copy.deepcopy(plain)
    expected = train_echo(
        plain, torch.optim.Adam(plain.parameters(), 5e-3), echo(), lambda loss: loss.backward(), nn.utils.clip_grad_norm_
    )
    accelerator = accelerate.Accelerator(cpu=True)
    loader = torch.utils.data.DataLoader(echo(), batch_size=None)  # type: ignore[arg-type]
    wrapped, optimizer, loader = accelerator.prepare(model, torch.optim.Adam(model.parameters(), 5e-3), loader)
    losses = train_echo(wrapped, optimizer, loader, accelerator.backward, accelerator.clip_grad_norm_)
    assert losses == expected
    assert losses[-1] < losses[0]
    assert accelerator.unwrap_model(wrapped) is model
    assert_identical(model.state_dict(), plain.state_dict())


def owners(module: nn.Module) -> dict[str, nn.Module]:
    """The submodules that hold parameters of their own."""
    return {name: m for name, m in module.named_modules() if any(True for _ in m.parameters(recurse=False))}


@pytest.mark.parametrize("rnn_cell", ["LSTM", "GRU"])
def test_accelerate_hooks_on_every_submodule_run(rnn_cell: str) -> None:
    """accelerate's hooks take the place of `forward` on the instance: none is passed by, and results stay."""
    hooks = pytest.importorskip("accelerate.hooks")

    class Count(hooks.ModelHook):  # type: ignore[misc, name-defined]
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    rnn = strong(RIM(3, 8, 2, k=2, rnn_cell=rnn_cell, **SMALL), scale=0.4)
    x = torch.randn(5, 2, 3)
    expected = rnn(x)
    counts = {name: Count() for name in owners(rnn)}
    for name, module in owners(rnn).items():
        hooks.add_hook_to_module(module, counts[name])
    torch.testing.assert_close(rnn(x), expected)
    assert [name for name, count in counts.items() if not count.calls] == []


@pytest.mark.parametrize("options", [{"preload_module_classes": ["RIM"]}, {}], ids=["as a whole", "by submodule"])
def test_accelerate_cpu_offload(options: dict[str, Any]) -> None:
    """Weights wait elsewhere and come for the call; between calls the layer itself holds none."""
    accelerate = pytest.importorskip("accelerate")
    model = Echo(k=2)
    x = torch.randn(5, 2, 1)
    expected, _ = model(x)
    accelerate.cpu_offload(model, torch.device("cpu"), **options)
    for _ in range(2):
        assert all(p.is_meta for p in model.parameters())
        torch.testing.assert_close(model(x)[0], expected)


# peft


def adapted(config: dict[str, Any]) -> tuple[Any, Tensor, Tensor]:
    """A model with adapters that do something, an input, and the output of the model without them."""
    peft = pytest.importorskip("peft")
    model, x = strong(Echo(k=2), scale=0.4), torch.randn(5, 2, 1)
    before = model(x)[0].detach()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, **config))
    torch.testing.assert_close(wrapped(x)[0], before)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.2)
    return wrapped, x, before


def check_adapted(wrapped: Any, x: Tensor, before: Tensor) -> set[str]:
    """Adapters are called, they alone learn, and merged they give the same: the modules that have one."""
    output, _ = wrapped(x)
    assert (output - before).abs().max() > 1e-4
    output.square().sum().backward()
    trained = {name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad}
    assert [name for name, grad in trained.items() if "lora" not in name or grad is None or not grad.any()] == []
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(x)[0], output, rtol=1e-4, atol=1e-5)
    assert type(merged.rnn) is RIM
    return {name.removeprefix("base_model.model.").partition(".lora")[0].removesuffix(".base_layer") for name in trained}


def test_peft_all_linear_passes_the_layer_by() -> None:
    """The usual setting adapts what is linear around the layer, as around an nn.LSTM."""
    assert check_adapted(*adapted({"target_modules": "all-linear"})) == {"head"}


PROJECTIONS = [
    *(f"input_attention.{name}.weight" for name in ("query", "key", "value")),
    *(f"communication.{name}.weight" for name in ("query", "key", "value", "output")),
]


@pytest.mark.parametrize("name", PROJECTIONS)
def test_peft_target_parameters(name: str) -> None:
    """peft's way to weights that are no nn.Linear's, a low-rank product for each unit: for every projection of the layer."""
    wrapped, x, before = adapted({"target_modules": [], "target_parameters": [name]})
    assert check_adapted(wrapped, x, before) == {f"rnn.cells.0.{name.removesuffix('.weight')}"}


# transformers


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("lost", ["", "rnn.", "rnn.cells.0.dynamics."])
def test_transformers_fill_what_a_checkpoint_does_not_have(lost: str, tmp_path: Path) -> None:
    """Saved and loaded it is the same model; what is missing is drawn as a new layer's is, and the rest is what was saved."""
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    kind = shown("Tagger")
    model, fresh = kind(transformers.PretrainedConfig()), [RIM(8, 24).state_dict(prefix="rnn.") for _ in range(20)]
    strong(model.rnn)
    model.save_pretrained(tmp_path)
    saved = model.state_dict()
    kept = {name: value for name, value in saved.items() if not lost or not name.startswith(lost)}
    safetensors.save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = kind.from_pretrained(tmp_path).state_dict()
    assert again.keys() == saved.keys()
    for name, value in again.items():
        if name in kept:
            assert_identical(value, kept[name])
        else:
            drawn = torch.stack([state[name] for state in fresh])
            assert_same(value.std(), drawn.std(), rtol=0.4)
            assert value.abs().max() <= 1.1 * drawn.abs().max()


# safetensors


@pytest.mark.parametrize(
    "options", [{}, {"rnn_cell": "GRU"}, {"proj_size": 16, "bidirectional": True}], ids=["LSTM", "GRU", "proj"]
)
def test_safetensors_round_trip(options: dict[str, Any], tmp_path: Path) -> None:
    """Every parameter under its own name, none shared with another, loaded strictly: the same layer."""
    safetensors = pytest.importorskip("safetensors.torch")
    rnn, again = (RIM(3, 32, 2, **(SMALL | options)) for _ in range(2))
    safetensors.save_model(rnn, tmp_path / "rnn.safetensors")
    assert set(safetensors.load_file(tmp_path / "rnn.safetensors")) == set(rnn.state_dict())
    assert safetensors.load_model(again, tmp_path / "rnn.safetensors", strict=True) == (set(), [])
    x = torch.randn(5, 2, 3)
    assert_identical(again(x), rnn(x))
