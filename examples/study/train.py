"""Trains a RIM or an LSTM on a task and tests it at larger sizes than those it was trained at.

    python train.py                          # sequential MNIST in the paper's setting, downloaded
    python train.py --model LSTM --log_dir runs/lstm
    python train.py --task copying           # or adding; --task copying --help has its options
    python train.py --loadsaved              # go on after an interruption
    python train.py --no-train               # evaluate the saved model once more
    torchrun --nproc_per_node 2 train.py     # on several processes or GPUs

The tasks are those of Goyal et al., 2021, *Recurrent Independent Mechanisms*, appendix D.
"""

import argparse
import datetime
import platform
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import checkpoint
import report
import torch
from arguments import build_parser, parse
from model import MODEL_ARGUMENTS, Model
from processes import Processes, asked_to_stop
from tasks import TASKS, Task
from tasks.task import DataError
from trainer import Stopped, Trainer, TrainingError

sys.path.append(str(Path(__file__).parents[1]))
from common import cpu

UNRECORDED = {"task", "train", "loadsaved", "log_dir"}  # arguments with a place of their own, or no part of what a run is
CHANGEABLE = {"epochs", "data_dir", "checkpoint_minutes"}  # arguments that may be others when a run goes on


def describe(args: argparse.Namespace, model: Model, task: Task, processes: Processes) -> dict[str, Any]:
    """What runs: the first line of the log."""
    threads = torch.get_num_threads()
    return {
        "task": args.task,
        "arguments": {name: value for name, value in vars(args).items() if name not in UNRECORDED},
        "processes": processes.count,
        "data": task.identity(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "command": shlex.join(["python", from_here(sys.argv[0]), *sys.argv[1:]]),
        "commit": commit(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if args.cuda else f"{cpu()}, {threads} thread{'s' * (threads > 1)}",
        "began": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def from_here(path: str) -> str:
    """A path below the working directory as seen from there, any other as it is: a log tells nothing of a machine's folders."""
    whole, here = Path(path).resolve(), Path.cwd()
    return str(whole.relative_to(here)) if whole.is_relative_to(here) else path


def commit() -> str | None:
    """The commit that is checked out here, with `-dirty` where files differ from it; None outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def check_log_dir(args: argparse.Namespace, header: dict[str, Any], saved: dict[str, Any] | None) -> None:
    """Refuses to mix two runs, before anything is written."""
    if saved is None:
        there = [name for name in report.FILES if Path(args.log_dir, name).exists()]
        if there:
            raise checkpoint.CheckpointError(
                f"{args.log_dir} holds {', '.join(there)} of an earlier run; take another --log_dir"
                + (f" (--loadsaved goes on with a {checkpoint.CHECKPOINT})" if checkpoint.CHECKPOINT in there else "")
            )
        return
    old, new = ({**h["arguments"], "processes": h["processes"], "data": h["data"]} for h in (saved["header"], header))
    others = differences(args.task, old, new, fixed(old, new) if args.train else set(MODEL_ARGUMENTS))
    if others:
        raise checkpoint.CheckpointError(f"{args.log_dir} holds a run with other arguments: {others}")
    if args.train and args.epochs < len(saved["metrics"]):
        raise checkpoint.CheckpointError(
            f"{args.log_dir} holds {len(saved['metrics'])} epochs, more than --epochs {args.epochs}"
        )


def fixed(old: dict[str, Any], new: dict[str, Any]) -> set[str]:
    """Which of a run's arguments have to be the same where it goes on."""
    names = (old.keys() | new.keys()) - UNRECORDED - CHANGEABLE
    return names if new["lr_schedule"] == "constant" else names | {"epochs"}  # a schedule stretches over them


def differences(task: str, old: dict[str, Any], new: dict[str, Any], names: set[str]) -> str:
    """In words; a run from before there was an argument had its default."""
    old = vars(build_parser(task).parse_args([])) | old
    return "; ".join(f"{name} {old.get(name)}, not {new.get(name)}" for name in sorted(names) if old.get(name) != new.get(name))


def go_on(old: dict[str, Any], new: dict[str, Any], epochs: int) -> dict[str, Any]:
    """The header of a run that goes on after `epochs`; it tells where the code, torch or the machine is no longer the same."""
    header = old | {"arguments": new["arguments"]}
    sessions = old.get("resumed", [])
    last = old | (sessions[-1] if sessions else {})
    now = {name: new[name] for name in ("commit", "torch", "device")}
    if any(last.get(name) != value for name, value in now.items()):
        header["resumed"] = [*sessions, {"epochs": epochs, **now}]
    return header


def prepare(args: argparse.Namespace, processes: Processes) -> tuple[Task, Model]:
    if not processes.first:
        processes.wait()  # for the first one to have downloaded what is to be downloaded
    try:
        task = TASKS[args.task](args)
        torch.manual_seed(args.seed + 1_000_003 * processes.rank)  # they differ in dropout; parameters are the first one's
        model = Model(args, task)
    except DataError:
        raise
    except ValueError as error:  # a size or a number that RIM or the task refuses
        sys.exit(f"error: {error}")
    if processes.first:
        processes.wait()
    return task, model


def run(args: argparse.Namespace, saved: dict[str, Any] | None, processes: Processes) -> None:
    task, model = prepare(args, processes)
    trainer = Trainer(args, describe(args, model, task, processes), model, task, processes)
    if args.train:
        train(trainer)
    else:
        evaluate(trainer, saved)


def introduce(trainer: Trainer) -> None:
    args, header, rnn = trainer.args, trainer.header, trainer.model.rnn
    if trainer.processes.first:
        print(f"{args.task}: {args.model}({rnn.extra_repr()}), {header['parameters']} parameters, {header['device']}")


def evaluate(trainer: Trainer, saved: dict[str, Any]) -> None:
    check_log_dir(trainer.args, trainer.header, saved)
    introduce(trainer)
    trainer.load_evaluated(saved)
    if trainer.processes.first and saved["header"]["data"] != trainer.header["data"]:
        print("these are other examples than those of the log: they may have been trained on, and figures do not compare")
    results = trainer.evaluate()
    for_sizes = trainer.evaluate_for_sizes(saved)
    if trainer.processes.first:
        print(tables(saved["header"], results, for_sizes))
        if saved["metrics"]:
            print("\nin the log:\n" + logged(saved["header"], saved["metrics"]))


def tables(header: dict[str, Any], chosen: dict[str, Any], for_sizes: dict[str, Any]) -> str:
    parts = [report.table(header, chosen)] + ([report.table_for_sizes(header, for_sizes)] if for_sizes else [])
    return "\n\n".join(parts)


def logged(header: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    measure = next(iter(TASKS[header["task"]].measures))
    return tables(header, report.chosen(metrics), report.for_sizes(metrics, measure))


def train(trainer: Trainer) -> None:
    args, folder, processes = trainer.args, trainer.log_dir, trainer.processes
    folder.mkdir(parents=True, exist_ok=True)
    with checkpoint.locked(folder) if processes.first else nullcontext():
        processes.wait()  # for the lock: only what lies there from now on is sure to stay the run's last state
        there = args.loadsaved and (folder / checkpoint.CHECKPOINT).exists()
        saved = checkpoint.load(folder) if there else None
        check_log_dir(args, trainer.header, saved)
        introduce(trainer)
        if saved:
            trainer.header = go_on(saved["header"], trainer.header, len(saved["metrics"]))
            trainer.load_state(saved)
            if processes.first:
                print(f"going on after {len(trainer.metrics)} epochs and {trainer.progress['batch']} batches")
        processes.wait()  # all have looked at the folder, now the first one may write
        if processes.first and len(trainer.metrics) < args.epochs:
            (folder / report.CURVES).unlink(missing_ok=True)  # drawn last, so that it tells of a run that is finished
        with asked_to_stop(trainer.stop):
            trainer.fit()
        trainer.load_evaluated(trainer.state())
        trainer.save_weights()
        if processes.first:
            finish(folder, trainer)


def finish(folder: Path, trainer: Trainer) -> None:
    """A table of what the run came to, and its pictures."""
    print(logged(trainer.header, trainer.metrics))
    if trainer.args.model == "RIM":
        report.draw_units(folder, trainer.task, trainer.evaluated)
    report.draw_curves(folder / report.CURVES, trainer.header, trainer.metrics)
    print(f"log, checkpoint and pictures are in {folder}")


def main() -> None:
    try:
        args, saved = parse(__doc__)
        processes = Processes(args.cuda)
        run(args, saved, processes)
        processes.close()
    except (DataError, checkpoint.CheckpointError, TrainingError, OSError) as error:  # such as a full disk
        sys.exit(f"error: {error}")
    except Stopped:
        sys.exit(f"stopped; --loadsaved --log_dir {args.log_dir} goes on")


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # a vanishing gradient is full of numbers below 1e-38, each of which takes a CPU long
    main()
