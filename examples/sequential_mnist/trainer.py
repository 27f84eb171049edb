"""The training loop. All that the rest of a run depends on is in `Trainer.state`, so that it can stop and go on anywhere."""

import math
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint
import torch
from data import Digits
from processes import Processes
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:  # TensorBoard is not installed
    SummaryWriter = None

EVALUATION_BATCH = 256


class TrainingError(RuntimeError):
    """Training went wrong; the message says where."""


class Trainer:
    """Trains `model` on `train` and evaluates it on `test` after each epoch, with a log and checkpoints in `args.log_dir`.

    `header` says what runs. It is the first line of the log.
    """

    def __init__(
        self, args: Namespace, header: dict[str, Any], model: nn.Module, train: Digits, test: Digits, processes: Processes
    ) -> None:
        self.args, self.header, self.processes = args, header, processes
        self.model, self.test = model.to(processes.device), test
        self.log_dir = Path(args.log_dir)
        self.parallel = processes.parallel(model)
        self.inputs, self.labels = train.sequences(args.size, args.input_size), train.labels.long()
        self.batches = math.ceil(len(self.labels) / args.batch_size)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
        self.scheduler = LambdaLR(self.optimizer, schedule(args.lr_schedule, args.epochs * self.batches))
        self.order = torch.Generator().manual_seed(args.seed)
        self.metrics: list[dict[str, Any]] = []
        self.begin_epoch()

    def begin_epoch(self) -> None:
        self.order_state = self.order.get_state()  # from it, the order of the epoch's digits can be drawn once more
        self.progress = {"epoch": len(self.metrics), "batch": 0, "loss": 0.0, "correct": 0.0, "seconds": 0.0}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds. To be called in all processes at once."""
        cuda = torch.cuda.get_rng_state() if self.processes.device.type == "cuda" else None
        return {
            "header": self.header,
            "metrics": self.metrics,
            "progress": self.progress,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generators": {
                "order": self.order_state,
                "cpu": self.processes.gather(torch.get_rng_state()),
                "cuda": self.processes.gather(cuda),
            },
        }

    def load_model(self, saved: dict[str, Any]) -> None:
        """Takes the parameters of `saved` and nothing else."""
        self.check({"model": self.model.state_dict()}, {"model": saved["model"]})
        self.model.load_state_dict(saved["model"])

    def load_state(self, saved: dict[str, Any]) -> None:
        """Goes on where `saved` was, once all of it is known to fit."""
        expected = self.state() | {"header": saved["header"], "metrics": saved["metrics"]}
        position = saved["progress"]
        if position.get("epoch") or position.get("batch"):  # Adam has moments from the first step on
            moments = [{name: p.detach() for name in ("exp_avg", "exp_avg_sq")} for p in self.model.parameters()]
            expected["optimizer"]["state"] = {i: {"step": torch.tensor(0.0), **m} for i, m in enumerate(moments)}
        self.check(expected, saved)
        if position["epoch"] != len(saved["metrics"]) or not 0 <= position["batch"] <= self.batches:
            self.refuse(
                f"progress {position} does not fit {len(saved['metrics'])} epochs in the log, {self.batches} batches each"
            )
        self.load_model(saved)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        try:
            self.order.set_state(saved["generators"]["order"])
            torch.set_rng_state(saved["generators"]["cpu"][self.processes.rank])
            if self.processes.device.type == "cuda":
                torch.cuda.set_rng_state(saved["generators"]["cuda"][self.processes.rank])
        except RuntimeError as error:
            self.refuse(f"generators: {error}")
        self.metrics = saved["metrics"]
        self.begin_epoch()
        self.progress = position

    def check(self, expected: Any, found: Any) -> None:
        for difference in checkpoint.differences(expected, found):
            self.refuse(difference)

    def refuse(self, reason: str) -> None:
        raise checkpoint.CheckpointError(f"{self.log_dir / checkpoint.CHECKPOINT}: {reason}")

    def save(self) -> None:
        state = self.state()
        if self.processes.first:
            checkpoint.save(self.log_dir, state)

    def fit(self) -> None:
        """All epochs that are left."""
        self.save()
        if self.processes.first:
            checkpoint.write_metrics(self.log_dir, [self.header, *self.metrics])
        board = None
        if SummaryWriter and self.processes.first and len(self.metrics) < self.args.epochs:
            board = SummaryWriter(self.log_dir / "tensorboard", purge_step=len(self.metrics) + 1)
        while len(self.metrics) < self.args.epochs:
            self.train_epoch()
            line = {
                "epoch": len(self.metrics) + 1,
                "train_loss": self.progress["loss"] / len(self.labels),
                "train_accuracy": self.progress["correct"] / len(self.labels),
                **self.evaluate(),
                "seconds": round(self.progress["seconds"], 2),
            }
            self.metrics.append(line)
            self.begin_epoch()
            if self.processes.first:
                checkpoint.append_metrics(self.log_dir, line)
                print(summary(line, self.args.epochs), flush=True)
            if board:
                write_scalars(board, line)
            self.save()
        if board:
            board.close()

    def train_epoch(self) -> None:
        """What is left of an epoch."""
        progress, batch_size = self.progress, self.args.batch_size
        order = torch.randperm(len(self.labels), generator=self.order)
        saved = time.monotonic()
        began = saved - progress["seconds"]
        self.parallel.train()
        with self.bar(f"epoch {progress['epoch'] + 1}/{self.args.epochs}", self.batches, progress["batch"]) as bar:
            for rows in order.split(batch_size)[progress["batch"] :]:
                due = self.processes.first and time.monotonic() - saved >= 60 * self.args.checkpoint_minutes
                loss, correct, due = self.processes.sum(*self.step(rows), due)
                progress["batch"] += 1
                progress["loss"] += loss
                progress["correct"] += correct
                progress["seconds"] = time.monotonic() - began
                if not math.isfinite(loss):
                    where = f"epoch {progress['epoch'] + 1}, batch {progress['batch']}"
                    raise TrainingError(f"the loss is {loss} at {where}; try a smaller --lr than {self.args.lr}")
                bar.set_postfix_str(f"loss {loss / len(rows):.3f}", refresh=False)
                bar.update()
                if due:
                    self.save()
                    saved = time.monotonic()

    def step(self, rows: Tensor) -> tuple[float, int]:
        """One step down the mean loss of the digits `rows`; of this process's share, the summed loss and the hits."""
        mine = rows[self.processes.rank :: self.processes.count]
        inputs, labels = self.inputs[mine].to(self.processes.device), self.labels[mine].to(self.processes.device)
        scores = self.parallel(inputs)
        loss = cross_entropy(scores, labels, reduction="sum")
        self.optimizer.zero_grad()
        (loss * self.processes.count / len(rows)).backward()  # gradients are averaged over the processes, not summed
        self.optimizer.step()
        self.scheduler.step()
        return loss.item(), int((scores.argmax(1) == labels).sum())

    @torch.no_grad()
    def evaluate(self) -> dict[str, dict[str, float]]:
        """Loss and accuracy on the test digits at each of `args.eval_sizes`."""
        result: dict[str, dict[str, float]] = {"test_loss": {}, "test_accuracy": {}}
        labels = self.test.labels.long()
        mine = torch.arange(self.processes.rank, len(labels), self.processes.count)
        self.model.eval()
        for size in self.args.eval_sizes:
            inputs = self.test.sequences(size, self.args.input_size)
            loss = correct = 0.0
            with self.bar(f"test {size}x{size}", math.ceil(len(mine) / EVALUATION_BATCH)) as bar:
                for rows in mine.split(EVALUATION_BATCH):
                    scores = self.model(inputs[rows].to(self.processes.device)).cpu()
                    loss += cross_entropy(scores, labels[rows], reduction="sum").item()
                    correct += int((scores.argmax(1) == labels[rows]).sum())
                    bar.update()
            loss, correct = self.processes.sum(loss, correct)
            result["test_loss"][str(size)] = loss / len(labels)
            result["test_accuracy"][str(size)] = correct / len(labels)
        return result

    def bar(self, title: str, total: int, done: int = 0) -> tqdm:
        """A progress bar, in the first process only and only on a terminal."""
        return tqdm(desc=title, total=total, initial=done, leave=False, disable=None if self.processes.first else True)


def schedule(name: str, steps: int) -> Callable[[int], float]:
    """The factor on `lr` at a step: always 1, or half a cosine from 1 down to 0 over all `steps` of the run."""
    if name == "constant":
        return lambda step: 1.0
    return lambda step: (1 + math.cos(math.pi * step / steps)) / 2


def summary(line: dict[str, Any], epochs: int) -> str:
    accuracies = "  ".join(f"{size}x{size} {100 * value:.1f}%" for size, value in line["test_accuracy"].items())
    return f"epoch {line['epoch']}/{epochs}  train loss {line['train_loss']:.3f}  test {accuracies}  {line['seconds']:.0f} s"


def write_scalars(board: Any, line: dict[str, Any]) -> None:
    for name, value in line.items():
        for tag, scalar in value.items() if isinstance(value, dict) else [("", value)]:
            board.add_scalar(f"{name}/{tag}".rstrip("/"), scalar, line["epoch"])
    board.flush()
