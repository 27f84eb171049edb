"""Sequential MNIST at several resolutions: trains a RIM or an LSTM on small digits and tests it on larger ones.

    python train.py                          # the paper's setting, on MNIST, downloaded
    python train.py --model LSTM --log_dir runs/lstm
    python train.py --loadsaved              # go on after an interruption
    python train.py --no-train               # evaluate the saved model once more
    torchrun --nproc_per_node 2 train.py     # on several processes or GPUs

The task is that of Goyal et al., 2021, *Recurrent Independent Mechanisms*, appendix D.3.
"""

import argparse
import datetime
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoint
import data
import report
import torch
from arguments import parse
from model import MODEL_ARGUMENTS, Classifier
from processes import Processes
from trainer import Trainer, TrainingError

UNRECORDED = {"train", "loadsaved", "log_dir"}  # arguments that say what to do with a run, not what it is
CHANGEABLE = {"epochs", "data_dir", "checkpoint_minutes"}  # arguments that may be others when a run goes on


def describe(
    args: argparse.Namespace, model: Classifier, train: data.Digits, test: data.Digits, processes: Processes
) -> dict[str, Any]:
    """What runs: the first line of the log."""
    return {
        "arguments": {name: value for name, value in vars(args).items() if name not in UNRECORDED},
        "processes": processes.count,
        "digits": {"train": train.sha256(), "test": test.sha256()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if args.cuda else f"CPU, {torch.get_num_threads()} threads",
        "began": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


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
    old, new = ({**h["arguments"], "processes": h["processes"], "digits": h["digits"]} for h in (saved["header"], header))
    fixed = set(MODEL_ARGUMENTS)
    if args.train:
        fixed = (old.keys() | new.keys()) - CHANGEABLE
        if args.lr_schedule != "constant":
            fixed.add("epochs")  # the schedule stretches over them
    others = [f"{name} {old.get(name)}, not {new.get(name)}" for name in sorted(fixed) if old.get(name) != new.get(name)]
    if others:
        raise checkpoint.CheckpointError(f"{args.log_dir} holds a run with other arguments: {'; '.join(others)}")


def go_on(old: dict[str, Any], new: dict[str, Any], epochs: int) -> dict[str, Any]:
    """The header of a run that goes on after `epochs`; it tells where the code or torch is no longer the same."""
    header = old | {"arguments": new["arguments"]}
    sessions = old.get("resumed", [])
    if any(new[name] != [old, *sessions][-1][name] for name in ("commit", "torch")):
        header["resumed"] = [*sessions, {"epochs": epochs, "commit": new["commit"], "torch": new["torch"]}]
    return header


def run(args: argparse.Namespace, saved: dict[str, Any] | None, processes: Processes) -> None:
    torch.manual_seed(args.seed + 1_000_003 * processes.rank)  # the processes differ in dropout; parameters are the first one's
    try:
        model = Classifier(args)
    except ValueError as error:  # a size or a number that RIM refuses
        sys.exit(f"error: {error}")
    if not processes.first:
        processes.wait()  # for the first one to have downloaded what is to be downloaded
    train, test = data.load(args.data_dir)
    if processes.first:
        processes.wait()
    header = describe(args, model, train, test, processes)
    check_log_dir(args, header, saved)
    if saved and args.train:
        header = go_on(saved["header"], header, len(saved["metrics"]))
    trainer = Trainer(args, header, model, train, test, processes)
    say = print if processes.first else lambda *_: None
    say(f"{args.model}({model.rnn.extra_repr()}), {header['parameters']} parameters, {header['device']}")
    say(f"{len(train.labels)} digits to train, {len(test.labels)} to test")
    if saved and args.train:
        trainer.load_state(saved)
        say(f"going on after {len(trainer.metrics)} epochs and {trainer.progress['batch']} batches")
    elif saved:
        trainer.load_model(saved)
    processes.wait()  # all have looked at log_dir, now the first one may write
    if args.train:
        Path(args.log_dir).mkdir(parents=True, exist_ok=True)
        trainer.fit()
        metrics, results = trainer.metrics, trainer.metrics[-1]
    else:
        metrics, results = saved["metrics"], trainer.evaluate()
    if processes.first:
        folder = Path(args.log_dir)
        print(report.table(args.model, results))
        if metrics:
            report.draw_curves(folder / report.CURVES, header, metrics)
        if args.model == "RIM":
            report.draw_units(folder / report.UNITS, model, test, args.size, args.input_size)
        print(f"log, checkpoint and pictures are in {folder}")


def main() -> None:
    try:
        args, saved = parse(__doc__)
        processes = Processes(args.cuda)
        try:
            run(args, saved, processes)
        finally:
            processes.close()
    except (data.DataError, checkpoint.CheckpointError, TrainingError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
