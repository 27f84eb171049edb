"""What sizes of keys, values and heads cost in quality: rules for a layer's sizes side by side, and `nn.LSTM` beside them.

    python quality.py                                # everything, or what is not finished of it
    python quality.py --runs results/quality --write PAGE    # the table of what there is
    python quality.py --tasks policy --rules "values from u" LSTM

A rule says the sizes of a layer by `u`, the state size of one unit; all of them agree at the paper's 100. Digits and copying
are trained by train.py, the other tasks here: a character model, and the gallery's forecaster and policy. The policy needs
`pip install 'rim-rnn[tools]'`.
"""

import argparse
import itertools
import math
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import checkpoint
import numpy as np
import torch
from report import markdown
from study import flags
from study_report import origin
from torch import Tensor, nn
from torch.nn import functional as F
from train import describe

from rim_rnn import RIM

sys.path.append(str(Path(__file__).parents[1]))
from common import put

HERE = Path(__file__).parent
SEEDS = [0, 1, 2]


def eighths(u: int) -> int:
    """The unit in eighths of the paper's, which has a state of 100: from 1 to 8."""
    return min(max(round(8 * u / 100), 1), 8)


def sizes(key_input: int, key_comm: int, value_input: int, heads: int = 4) -> dict[str, int]:
    return {
        "key_size_input": key_input,
        "key_size_comm": key_comm,
        "value_size_comm": key_comm,
        "value_size_input": value_input,
        "num_comm_heads": heads,
    }


RULES: dict[str, Callable[[int], dict[str, int]]] = {
    "the paper's": lambda u: sizes(64, 32, 4 * u),
    "keys in proportion": lambda u: sizes(8 * eighths(u), 4 * eighths(u), 4 * u),
    "values from 3u": lambda u: sizes(8 * eighths(u), 4 * eighths(u), u * max(eighths(u), 6) // 2),
    "values from 2u": lambda u: sizes(8 * eighths(u), 4 * eighths(u), u * max(eighths(u), 4) // 2),
    "values from u": lambda u: sizes(8 * eighths(u), 4 * eighths(u), u * max(eighths(u), 2) // 2),
    "keys of 64, values from 2u": lambda u: sizes(64, 4 * eighths(u), u * max(eighths(u), 4) // 2),
    "heads in proportion": lambda u: sizes(64, 4 * eighths(u), 4 * u),
    "heads of 32, values from 2u": lambda u: sizes(64, 32, u * max(eighths(u), 4) // 2),
    "fewer heads": lambda u: sizes(8 * eighths(u), 32, u * max(eighths(u), 4) // 2, heads=max(1, eighths(u) // 2)),
}
LSTM = "LSTM"

DIGITS = {
    "input_size": 4, "epochs": 12, "lr": 3e-3, "lr_schedule": "cosine", "clip_grad": 1.0, "test_every": 100,
}  # fmt: skip
COPYING = {
    "size": 10, "eval_sizes": [10, 20, 40], "examples": 6400, "epochs": 12, "lr": 3e-3, "lr_schedule": "cosine",
    "clip_grad": 1.0, "test_every": 100,
}  # fmt: skip
STUDIED = {  # task of train.py, units, size of each, arguments
    "copying": ("copying", 4, 32, COPYING),
    "copying, lr 6e-3": ("copying", 4, 32, COPYING | {"lr": 6e-3}),
    "many units": ("sequential_mnist", 8, 16, DIGITS | {"input_size": 14, "eval_sizes": [14]}),
    "digits": ("sequential_mnist", 6, 20, DIGITS),
}
"""Copying, also at another learning rate; the demo's digits with 8 units, a line of pixels per step; and as the demo has
them."""


def layer(rule: str, input_size: int, units: int, u: int, **given: Any) -> nn.Module:
    """A RIM with the sizes of a rule, or an `nn.LSTM`."""
    if rule == LSTM:
        return nn.LSTM(input_size, units * u, **{name: given[name] for name in given.keys() & {"num_layers"}})
    return RIM(input_size, units * u, num_units=units, **RULES[rule](u), **given)


def characters(rule: str) -> tuple[nn.Module, dict[str, float]]:
    """Two layers of 96, six units of 16, that read what Python's help() says, the state carried along; bits per character.

    The last tenth of the text is held out.
    """
    from pydoc_data.topics import topics

    text = "".join(topics.values())[:120_000]
    alphabet = sorted(set(text))
    codes = torch.tensor([alphabet.index(character) for character in text])
    held_out = len(codes) // 10
    embedding, rnn = nn.Embedding(len(alphabet), 96), layer(rule, 96, 6, 16, num_layers=2)
    model = nn.ModuleList([embedding, rnn, nn.Linear(96, len(alphabet))])
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)

    def losses(codes: Tensor, rows: int = 16, span: int = 40) -> Any:
        sequences, state = codes[: len(codes) // rows * rows].view(rows, -1).t(), None
        for start in range(0, len(sequences) - 1 - span, span):
            output, state = rnn(embedding(sequences[start : start + span]), state)
            state = tuple(part.detach() for part in state)
            yield F.cross_entropy(model[2](output).flatten(0, 1), sequences[start + 1 : start + 1 + span].flatten())

    for _ in range(4):
        trained = []
        for loss in losses(codes[:-held_out]):
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            trained.append(loss.item() / math.log(2))
    with torch.no_grad():
        tested = mean(loss.item() / math.log(2) for loss in losses(codes[-held_out:]))
    return rnn, {"trained": mean(trained), "held out": tested}


def forecaster(rule: str) -> tuple[nn.Module, dict[str, float]]:
    """The gallery's forecast of sunspots, four units of 8: the mean forecast of five models, off by how much a year ahead."""
    from statsmodels.datasets import sunspots

    numbers = sunspots.load_pandas().data["SUNACTIVITY"].to_numpy()
    series = torch.tensor(numbers, dtype=torch.float32).sqrt().div(10).view(-1, 1, 1)
    first, forecasts = len(series) - 60, []
    for _ in range(5):
        rnn, head = layer(rule, 1, 4, 8, input_dropout=0.1, comm_dropout=0.1), nn.Linear(32, 1)
        model = nn.ModuleList([rnn, head])
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)
        for _ in range(150):
            output, _ = rnn(series[: first - 1])
            loss = F.mse_loss(series[: first - 1] + head(output), series[1:first])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.eval()
        with torch.no_grad():
            output, _ = rnn(series[:-1])
            forecasts.append((series[:-1] + head(output))[first - 1 :])
    predicted = torch.stack(forecasts).mean(0).clamp(min=0).mul(10).square().flatten().numpy()
    return rnn, {"error": float(((predicted - numbers[first:]) ** 2).mean() ** 0.5)}


def policy(rule: str) -> tuple[nn.Module, dict[str, float]]:
    """The gallery's policy, four units of 8, twelve steps from sign to act: the mean reward in training, and at its end."""
    import gymnasium
    from sb3_contrib import RecurrentPPO
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
    from stable_baselines3.common.callbacks import BaseCallback

    class Sign(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        action_space = gymnasium.spaces.Discrete(2)
        steps = 12

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            self.at, self.sign = 0, int(self.np_random.integers(2))
            return self.seen(), {}

        def seen(self) -> Any:
            return np.array([2 * self.sign - 1 if self.at == 0 else 0, self.at / self.steps], np.float32)

        def step(self, action: Any) -> Any:
            self.at += 1
            done = self.at == self.steps
            return self.seen(), float(done and action == self.sign), done, False, {}

    class Policy(RecurrentActorCriticPolicy):
        def __init__(self, observation_space: Any, action_space: Any, lr_schedule: Any, **kwargs: Any) -> None:
            super().__init__(observation_space, action_space, lr_schedule, **kwargs)
            for name in ("lstm_actor", "lstm_critic"):
                if (lstm := getattr(self, name)) is not None:
                    setattr(self, name, layer(rule, lstm.input_size, 4, 8))
            self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    class Rewards(BaseCallback):
        def _on_training_start(self) -> None:
            self.rewards: list[float] = []

        def _on_step(self) -> bool:
            self.rewards += [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
            return True

    callback = Rewards()
    agent = RecurrentPPO(
        Policy, Sign(), policy_kwargs={"lstm_hidden_size": 32, "net_arch": []}, n_steps=192, batch_size=96, n_epochs=4,
        learning_rate=3e-3, seed=torch.initial_seed(), device="cpu",
    )  # fmt: skip
    agent.learn(7680, callback)
    return agent.policy.lstm_actor, {"reward": mean(callback.rewards), "last 100": mean(callback.rewards[-100:])}


TRAINED_HERE = {"characters": characters, "forecaster": forecaster, "policy": policy}
ALL_TASKS = ["policy", "forecaster", "characters", *STUDIED]


def folder_of(runs: Path, task: str, rule: str, seed: int) -> Path:
    return runs / task.replace(",", "").replace(" ", "-") / rule.replace(" ", "-").replace("'", "") / f"seed-{seed}"


def read(runs: Path, task: str, rule: str, seed: int) -> list[dict[str, Any]]:
    """The log of a run that is finished, else nothing."""
    log = folder_of(runs, task, rule, seed) / checkpoint.METRICS
    lines = checkpoint.read_metrics(log) if log.exists() else []
    epochs = STUDIED[task][3]["epochs"] if task in STUDIED else 1
    return lines if len(lines) > epochs else []


def train_here(task: str, rule: str, seed: int, folder: Path) -> None:
    """Trains, and writes a log of two lines: what ran, and what it came to."""
    torch.manual_seed(seed)
    began, start = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.monotonic()
    rnn, measures = TRAINED_HERE[task](rule)
    args = Namespace(task=task, rule=rule, seed=seed, cuda=False)
    header = describe(args, rnn, Namespace(identity=dict), Namespace(count=1))
    folder.mkdir(parents=True, exist_ok=True)
    line = {"epoch": 1, **measures, "seconds": round(time.monotonic() - start, 2)}
    checkpoint.write_metrics(folder, [header | {"began": began, "layer": repr(rnn)}, line])


def train_studied(task: str, rule: str, seed: int, folder: Path) -> None:
    """By train.py, which is given the sizes of the rule in numbers."""
    kind, units, u, given = STUDIED[task]
    own = {"model": "LSTM"} if rule == LSTM else {"num_units": units, **RULES[rule](u)}
    given = {"task": kind, "hidden_size": units * u, **given, **own, "seed": seed, "log_dir": str(folder), "loadsaved": True}
    if kind == "sequential_mnist":
        given["data_dir"] = os.path.relpath(HERE / "digits")
    subprocess.run([sys.executable, str(HERE / "train.py"), *flags(given)], check=True, stdout=subprocess.DEVNULL)


MEASURES = {  # what is shown of a task: its title, the measure in the log and for study's tasks the size, its factor, digits
    "policy": [("policy, reward", "reward", "", 1, 2)],
    "forecaster": [("forecaster, error", "error", "", 1, 1)],
    "characters": [("characters, bits", "held out", "", 1, 2)],
    "copying": [("copying 10, loss", "test_loss", "10", 1, 2), ("copying 20", "test_loss", "20", 1, 2)],
    "copying, lr 6e-3": [("copying 10, lr 6e-3", "test_loss", "10", 1, 2)],
    "many units": [("8 units, 14x14, %", "test_accuracy", "14", 100, 1)],
    "digits": [(f"{size}x{size}, %", "test_accuracy", str(size), 100, 1) for size in (14, 16, 19, 24)],
}


def table(runs: Path) -> str:
    """A line for each rule: mean, standard deviation where there are several seeds, and in brackets how many."""
    rows = [["sizes", *(title for task in ALL_TASKS for title, *_ in MEASURES[task])]]
    for rule in [*RULES, LSTM]:
        row = [rule]
        for task in ALL_TASKS:
            logs = [log for log in (read(runs, task, rule, seed) for seed in range(5)) if log]
            for _, name, size, factor, digits in MEASURES[task]:
                values = [factor * (log[-1][name][size] if size else log[-1][name]) for log in logs]
                spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
                row.append(f"{mean(values):.{digits}f}{spread} ({len(values)})" if values else "")
        rows.append(row)
    headers = [read(runs, task, rule, seed) for task in ALL_TASKS for rule in [*RULES, LSTM] for seed in range(5)]
    return markdown(rows) + "\n\n" + origin([log[0] for log in headers if log])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    rules = [*RULES, LSTM]
    add("--runs", type=Path, default=Path("runs/quality"), help="folder for the logs (default: %(default)s)")
    add("--tasks", nargs="+", choices=ALL_TASKS, default=ALL_TASKS, metavar="TASK", help=f"of {', '.join(ALL_TASKS)}")
    add("--rules", nargs="+", choices=rules, default=rules, metavar="RULE", help=f"of {', '.join(rules)}")
    add("--seeds", nargs="+", type=int, default=SEEDS, help="(default: 0 1 2)")
    add("--write", type=Path, metavar="PAGE", help="put the table of the logs into this page, and train nothing")
    args = parser.parse_args()
    if args.write:
        args.write.write_text(put(args.write.read_text(), {"sizes": table(args.runs)}, "examples/study/quality.py"))
        return
    for task, seed, rule in itertools.product(args.tasks, args.seeds, args.rules):
        if not read(args.runs, task, rule, seed):
            train = train_studied if task in STUDIED else train_here
            train(task, rule, seed, folder_of(args.runs, task, rule, seed))
            header, *_, last = read(args.runs, task, rule, seed)
            shown = {name: value for name, value in last.items() if not name.startswith("train_")}
            print(time.strftime("%H:%M:%S"), task, rule, seed, header["parameters"], shown, flush=True)


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # as train.py
    main()
