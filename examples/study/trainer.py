"""The training loop. All that the rest of a run depends on is in `Trainer.state`, so that it can stop and go on anywhere."""

import copy
import math
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint
import torch
from processes import Processes
from tasks import Task
from tasks.task import Examples
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:  # TensorBoard is not installed
    SummaryWriter = None

EVALUATION_BATCH = 256


class TrainingError(RuntimeError):
    """Training went wrong; the message says where."""


class Stopped(BaseException):
    """The run was asked to stop, and has saved its state."""


class Trainer:
    """Trains `model` on `task` and evaluates it after each epoch, with a log and checkpoints in `args.log_dir`.

    `header` says what runs. It is the first line of the log.
    """

    def __init__(self, args: Namespace, header: dict[str, Any], model: nn.Module, task: Task, processes: Processes) -> None:
        self.args, self.header, self.processes = args, header, processes
        self.model, self.task = model.to(processes.device), task
        self.log_dir = Path(args.log_dir)
        self.parallel = processes.parallel(model)
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema)) if args.ema else None
        self.batches = math.ceil(task.examples / args.batch_size)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
        self.scheduler = LambdaLR(self.optimizer, schedule(args.lr_schedule, args.epochs * self.batches, args.warmup_steps))
        self.order = torch.Generator().manual_seed(args.seed)
        self.valid_sizes = sorted({args.size, *args.valid_sizes}) if args.valid_sizes else []
        self.metrics: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        self.sizes: dict[str, dict[str, Any]] = {}
        self.stopping = False
        self.begin_epoch()

    def stop(self) -> None:
        """Asks the run to save its state after this batch and raise `Stopped`; asked twice, it ends at once."""
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated: the averaged one where weights are averaged."""
        return self.average.module if self.average else self.model

    def begin_epoch(self) -> None:
        self.order_state = self.order.get_state()  # from it, the order of the epoch's examples can be drawn once more
        sums = dict.fromkeys(self.task.measures, 0.0)
        self.progress = {"epoch": len(self.metrics), "batch": 0, "sums": sums, "seconds": 0.0}
        if self.valid_sizes:
            self.progress |= {"held_out": [], "evaluation_seconds": 0.0}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds. To be called in all processes at once."""
        cuda = torch.cuda.get_rng_state() if self.processes.device.type == "cuda" else None
        return {
            "header": self.header,
            "metrics": self.metrics,
            "progress": self.progress,
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average else {},
            "best": self.best,
            "sizes": self.sizes,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generators": {
                "order": self.order_state,
                "cpu": self.processes.gather(torch.get_rng_state()),
                "cuda": self.processes.gather(cuda),
            },
        }

    def load_evaluated(self, saved: dict[str, Any]) -> None:
        """Takes the weights of the chosen epoch, or else the last ones, into the model that is evaluated; nothing else."""
        part, model = ("average", self.average) if self.average else ("model", self.model)
        weights = saved.get(part)
        if saved["best"]:
            part, model, weights = "best.model", self.evaluated, saved["best"].get("model")
        self.load_weights(saved, part, model, weights)

    def load_weights(self, saved: dict[str, Any], part: str, model: nn.Module, weights: Any) -> None:
        self.check(model.state_dict(), weights, part, checkpoint.CHECKPOINT if "progress" in saved else checkpoint.WEIGHTS)
        model.load_state_dict(weights)

    def load_state(self, saved: dict[str, Any]) -> None:
        """Goes on where `saved` was, once all of it is known to fit."""
        expected = self.state() | {"header": saved["header"], "metrics": saved["metrics"]}
        position = saved["progress"]
        if position.get("epoch") or position.get("batch"):  # Adam has moments from the first step on
            moments = [{name: p.detach() for name in ("exp_avg", "exp_avg_sq")} for p in self.model.parameters()]
            expected["optimizer"]["state"] = {i: {"step": torch.tensor(0.0), **m} for i, m in enumerate(moments)}
        if self.args.valid and saved["metrics"]:
            expected["best"] = {"epoch": 0, "score": 0.0, "model": self.model.state_dict()}
        within = position.get("held_out", [])
        if self.valid_sizes and (within or saved["metrics"]):
            values = {str(size): 0.0 for size in self.valid_sizes}
            validation = {"step": 0} | {f"valid_{name}": values for name in self.task.measures}
            expected["progress"]["held_out"] = [validation] * len(within) if isinstance(within, list) else []
            best = {"step": 0, "score": 0.0, "model": self.model.state_dict()}
            expected["sizes"] = dict.fromkeys(values, best)
        self.check(expected, saved)
        every = self.args.valid_every or self.batches + 1
        validations = range(max(0, (position["batch"] - 1) // every), position["batch"] // every + 1)  # the last may be due
        fits = 0 <= position["batch"] <= self.batches and len(within) in validations
        if position["epoch"] != len(saved["metrics"]) or not fits:
            self.refuse(
                f"progress {position} does not fit {len(saved['metrics'])} epochs in the log, {self.batches} batches each"
            )
        steps = [part["step"] for line in [*saved["metrics"], position] for part in line.get("held_out", [])]
        for size, best in saved["sizes"].items():
            if best["step"] not in steps:
                self.refuse(f"sizes.{size}.step is {best['step']}, and the log has no validation there")
        self.model.load_state_dict(saved["model"])
        if self.average:
            self.average.load_state_dict(saved["average"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        try:
            self.order.set_state(saved["generators"]["order"])
            torch.set_rng_state(saved["generators"]["cpu"][self.processes.rank])
            if self.processes.device.type == "cuda":
                torch.cuda.set_rng_state(saved["generators"]["cuda"][self.processes.rank])
        except RuntimeError as error:
            self.refuse(f"generators: {error}")
        self.metrics, self.best, self.sizes = saved["metrics"], saved["best"], saved["sizes"]
        self.begin_epoch()
        self.progress = position

    def check(self, expected: Any, found: Any, name: str = "", file: str = checkpoint.CHECKPOINT) -> None:
        for difference in checkpoint.differences(expected, found, name):
            self.refuse(difference, file)

    def refuse(self, reason: str, file: str = checkpoint.CHECKPOINT) -> None:
        raise checkpoint.CheckpointError(f"{self.log_dir / file}: {reason}")

    def save(self) -> None:
        state = self.state()
        if self.processes.first:
            checkpoint.save(self.log_dir, state)

    def save_weights(self) -> None:
        """Those that are evaluated, with the log. Where the data lay is left out: others have them elsewhere."""
        if self.processes.first:
            header = self.header | {"arguments": {n: v for n, v in self.header["arguments"].items() if n != "data_dir"}}
            best = self.best or {"model": self.evaluated.state_dict()}
            for weights in (best["model"], *(chosen["model"] for chosen in self.sizes.values())):
                weights.update({name: value.cpu() for name, value in weights.items()})
            sizes = {size: {"model": chosen["model"]} for size, chosen in self.sizes.items()}
            state = {"header": header, "metrics": self.metrics, "best": {"model": best["model"]}, "sizes": sizes}
            checkpoint.save(self.log_dir, state, checkpoint.WEIGHTS)

    def fit(self) -> None:
        """All epochs that are left, then tests of the chosen one where it had none."""
        self.save()
        if self.processes.first:
            checkpoint.write_metrics(self.log_dir, [self.header, *self.metrics])
        board = None
        if SummaryWriter and self.processes.first and len(self.metrics) < self.args.epochs:
            board = SummaryWriter(self.log_dir / "tensorboard", purge_step=len(self.metrics) + 1)
        while len(self.metrics) < self.args.epochs:
            self.train_epoch()
            began = time.monotonic()
            epoch, progress = len(self.metrics) + 1, self.progress
            validation = self.validate()
            line = {
                "epoch": epoch,
                **{f"train_{name}": value / self.task.examples for name, value in progress["sums"].items()},
                **{name: values[str(self.args.size)] for name, values in validation.items()},
                **(self.test() if epoch == self.args.epochs or epoch % self.args.test_every == 0 else self.no_test()),
                "seconds": round(progress["seconds"], 2),
            }
            weights = copy.deepcopy(self.evaluated.state_dict())
            if self.args.valid:
                self.choose(line, weights)
                line["chosen"] = self.best["epoch"]
            if self.valid_sizes:
                line["held_out"] = [*progress["held_out"], self.choose_for_sizes(validation, weights)]
                began -= progress["evaluation_seconds"]
            line["evaluation_seconds"] = round(time.monotonic() - began, 2)
            self.metrics.append(line)
            self.begin_epoch()
            if self.processes.first:
                checkpoint.append_metrics(self.log_dir, line)
                print(summary(line, self.task, self.args.epochs), flush=True)
            if board:
                write_scalars(board, line)
            self.save()
        if board:
            board.close()
        self.test_chosen()

    def test_chosen(self) -> None:
        """Tests what validation has chosen, where there was no test of it: an epoch, and weights for each size at that size."""
        began = time.monotonic()
        tested = []
        if self.best and self.args.eval_sizes:
            line = self.metrics[self.best["epoch"] - 1]
            if not any(line[name] for name in self.no_test()):
                line |= self.test(model=self.evaluated_with(self.best["model"]))
                tested.append(line)
        for size, best in self.sizes.items():
            line, validation = self.validation_at(best["step"])
            if int(size) in self.args.eval_sizes and size not in validation.get("test_loss", {}):
                for name, values in self.test([int(size)], self.evaluated_with(best["model"])).items():
                    validation[name] = validation.get(name, {}) | values
                tested.append(line)
        if not tested:
            return
        tested[0]["evaluation_seconds"] = round(tested[0]["evaluation_seconds"] + time.monotonic() - began, 2)
        if self.processes.first:
            checkpoint.write_metrics(self.log_dir, [self.header, *self.metrics])
        self.save()

    def evaluated_with(self, weights: dict[str, Tensor]) -> nn.Module:
        model = copy.deepcopy(self.evaluated)
        model.load_state_dict(weights)
        return model

    def validation_at(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The line of the log with the validation after `step` batches, and that validation."""
        return next((line, part) for line in self.metrics for part in line["held_out"] if part["step"] == step)

    def score(self, value: float) -> float:
        """Of the first measure: more is better."""
        return value if next(iter(self.task.measures)) == "accuracy" else -value

    def choose(self, line: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Keeps the weights of this epoch where none before was better on the validation examples."""
        score = self.score(line[f"valid_{next(iter(self.task.measures))}"])
        if not self.best or score > self.best["score"]:
            self.best = {"epoch": line["epoch"], "score": score, "model": weights}

    def choose_for_sizes(self, validation: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Any]:
        """Keeps these weights for each size at which none before were better; the validation with its step."""
        step = self.progress["epoch"] * self.batches + self.progress["batch"]
        values = validation[f"valid_{next(iter(self.task.measures))}"]
        scores = {size: self.score(value) for size, value in values.items()}
        for size, score in scores.items():
            if size not in self.sizes or score > self.sizes[size]["score"]:
                self.sizes[size] = {"step": step, "score": score, "model": weights}
        return {"step": step, **validation}

    def train_epoch(self) -> None:
        """What is left of an epoch."""
        progress, batch_size = self.progress, self.args.batch_size
        examples = self.task.train(progress["epoch"])
        order = torch.randperm(self.task.examples, generator=self.order)
        saved = time.monotonic()
        self.parallel.train()
        with self.bar(f"epoch {progress['epoch'] + 1}/{self.args.epochs}", self.batches, progress["batch"]) as bar:
            for rows in order.split(batch_size)[progress["batch"] :]:
                self.validate_within()
                began = time.monotonic()
                due = self.processes.first and time.monotonic() - saved >= 60 * self.args.checkpoint_minutes
                *sums, due, stop = self.processes.sum(*self.step(examples, rows), due, self.stopping)
                progress["batch"] += 1
                for name, value in zip(self.task.measures, sums, strict=True):
                    progress["sums"][name] += value
                progress["seconds"] += time.monotonic() - began
                loss = sums[list(self.task.measures).index("loss")]
                if not math.isfinite(loss):
                    where = f"epoch {progress['epoch'] + 1}, batch {progress['batch']}"
                    raise TrainingError(f"the loss is {loss} at {where}; try a smaller --lr than {self.args.lr}")
                bar.set_postfix_str(f"loss {loss / len(rows):.3f}", refresh=False)
                bar.update()
                if due or stop:
                    self.save()
                    saved = time.monotonic()
                if stop:
                    self.processes.wait()  # for the first one to have saved it
                    raise Stopped

    def validate_within(self) -> None:
        """The validation that is due after so many batches of an epoch; where the run was stopped in it, once more."""
        progress, every = self.progress, self.args.valid_every
        if not every or progress["batch"] % every or len(progress["held_out"]) == progress["batch"] // every:
            return
        began = time.monotonic()
        weights = copy.deepcopy(self.evaluated.state_dict())
        progress["held_out"].append(self.choose_for_sizes(self.validate(), weights))
        progress["evaluation_seconds"] += time.monotonic() - began
        self.parallel.train()

    def step(self, examples: Examples, rows: Tensor) -> list[float]:
        """One step down the mean loss of `rows`; of this process's share, the sum of each measure."""
        mine = rows[self.processes.rank :: self.processes.count]
        inputs, targets = (part[mine].to(self.processes.device) for part in examples)
        measures = self.task.measure(self.parallel(inputs), targets)
        self.optimizer.zero_grad()
        # gradients are averaged over the processes, not summed
        (measures["loss"].sum() * self.processes.count / len(rows)).backward()
        if self.args.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip_grad)
        self.optimizer.step()
        self.scheduler.step()
        if self.average:
            self.average.update_parameters(self.model)
        return [measures[name].sum().item() for name in self.task.measures]

    def evaluate(self) -> dict[str, Any]:
        """Each measure on the validation examples, at the size of training, and on the test examples."""
        validation = self.validate([self.args.size])
        return {name: values[str(self.args.size)] for name, values in validation.items()} | self.test()

    def evaluate_for_sizes(self, saved: dict[str, Any]) -> dict[str, Any]:
        """At each size, each measure by the weights that `saved` has for it. The last ones stay in the model."""
        result: dict[str, Any] = {}
        for size in self.valid_sizes if saved["sizes"] else []:
            best = saved["sizes"].get(str(size))
            weights = best.get("model") if isinstance(best, dict) else None
            self.load_weights(saved, f"sizes.{size}.model", self.evaluated, weights)
            tested = self.test([size] if size in self.args.eval_sizes else [])
            for name, values in (self.validate([size]) | tested).items():
                result[name] = result.get(name, {}) | values
        return result

    def validate(self, sizes: list[int] | None = None) -> dict[str, dict[str, float]]:
        """Each measure on the validation examples, where there are any, at `sizes`, or else at all that were asked for."""
        if not self.args.valid:
            return {}
        result: dict[str, dict[str, float]] = {f"valid_{name}": {} for name in self.task.measures}
        for size in sizes or self.valid_sizes or [self.args.size]:
            title = "validation" if size == self.args.size else f"validation {self.task.label(size)}"
            for name, value in self.measure(self.task.valid(size), title).items():
                result[f"valid_{name}"][str(size)] = value
        return result

    def test(self, sizes: list[int] | None = None, model: nn.Module | None = None) -> dict[str, dict[str, float]]:
        """Each measure on the test examples at each of `sizes`, or else of `args.eval_sizes`."""
        result = self.no_test()
        for size in self.args.eval_sizes if sizes is None else sizes:
            for name, value in self.measure(self.task.test(size), f"test {self.task.label(size)}", model).items():
                result[f"test_{name}"][str(size)] = value
        return result

    def no_test(self) -> dict[str, dict[str, float]]:
        return {f"test_{name}": {} for name in self.task.measures}

    @torch.no_grad()
    def measure(self, examples: Examples, title: str, model: nn.Module | None = None) -> dict[str, float]:
        """The mean of each measure, by `model` or else the one that is evaluated."""
        model = model or self.evaluated
        count, sums = len(examples.targets), dict.fromkeys(self.task.measures, 0.0)
        mine = torch.arange(self.processes.rank, count, self.processes.count)
        model.eval()
        with self.bar(title, math.ceil(len(mine) / EVALUATION_BATCH)) as bar:
            for rows in mine.split(EVALUATION_BATCH):
                inputs, targets = (part[rows].to(self.processes.device) for part in examples)
                for name, values in self.task.measure(model(inputs), targets).items():
                    sums[name] += values.sum().item()
                bar.update()
                if self.stopping and self.processes.count == 1:  # several would have to agree on the batch
                    self.save()
                    raise Stopped
        totals = self.processes.sum(*sums.values())
        return {name: total / count for name, total in zip(sums, totals, strict=True)}

    def bar(self, title: str, total: int, done: int = 0) -> tqdm:
        """A progress bar, in the first process only and only on a terminal."""
        return tqdm(desc=title, total=total, initial=done, leave=False, disable=None if self.processes.first else True)


def schedule(name: str, steps: int, warmup_steps: int = 0) -> Callable[[int], float]:
    """The factor on `lr` at a step of `steps` in the whole run.

    constant: 1. cosine: half a cosine from 1 down to 0. one-cycle: half a cosine up from 1/25 to 1 in the first 30 %, then
    another one down to 0. Over the first `warmup_steps`, all that times a straight line up to 1.
    """

    def fall(share: float) -> float:
        return (1 + math.cos(math.pi * share)) / 2

    def factor(step: int) -> float:
        share = step / steps
        if name == "constant":
            return 1.0
        if name == "cosine":
            return fall(share)
        return fall((share - 0.3) / 0.7) if share >= 0.3 else 1 - 0.96 * fall(share / 0.3)

    return lambda step: factor(step) * min(1.0, (step + 1) / (warmup_steps + 1))


def summary(line: dict[str, Any], task: Task, epochs: int) -> str:
    name, measure = next(iter(task.measures.items()))
    trained = [f"epoch {line['epoch']}/{epochs}", f"train loss {line['train_loss']:.3f}"]
    evaluated = [f"validation {measure.show(line[f'valid_{name}'])}"] if f"valid_{name}" in line else []
    if "held_out" in line:
        values = line["held_out"][-1][f"valid_{name}"].items()
        evaluated = [f"validation {task.label(size)} {measure.show(value)}" for size, value in values]
    evaluated += [f"test {task.label(size)} {measure.show(value)}" for size, value in line[f"test_{name}"].items()]
    title = [measure.title] if evaluated else []  # not every epoch is evaluated
    return "  ".join([*trained, *title, *evaluated, f"{line['seconds']:.0f} s"])


def write_scalars(board: Any, line: dict[str, Any]) -> None:
    for part in line.get("held_out", []):
        for name in part.keys() - {"step"}:
            for size, value in part[name].items():
                board.add_scalar(f"held_out/{name}/{size}", value, part["step"])
    for name, value in line.items():
        if name == "held_out":
            continue
        for tag, scalar in value.items() if isinstance(value, dict) else [("", value)]:
            board.add_scalar(f"{name}/{tag}".rstrip("/"), scalar, line["epoch"])
    board.flush()
