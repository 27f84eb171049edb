"""Runs a whole table: every row of a study with every one of its seeds.

    python study.py study.toml               # begins, or goes on with what is not finished
    python study.py search.toml --jobs 2 --rows "RIM" "LSTM"
    python study.py search.toml --published results/search    # only what has no complete log there
    python study_report.py study.toml        # the table and pictures of what there is so far

A study is a file in TOML: tables named by a task, with arguments of `train.py` that all its rows share, and an array of `rows`.
A row has a `name`, a `task`, a list of `seeds` (or that of its task) and arguments of its own. Rows run in their order.

SIGINT or SIGTERM stops it once every run has saved its state; the same command goes on from there.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import arguments
import checkpoint
import report
import torch
from processes import asked_to_stop
from tasks import TASKS
from train import UNRECORDED, differences, fixed

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

HERE = Path(__file__).parent
OUTPUT = "output.txt"


class StudyError(ValueError):
    """A study says something that cannot be run; the message says where."""


class Row(NamedTuple):
    """One line of the table: a task and arguments, once for each seed."""

    name: str
    task: str
    seeds: list[int]
    flags: list[str]
    arguments: Namespace

    def log_dir(self, runs: Path, seed: int) -> Path:
        return runs / self.task / re.sub(r"[^\w.+-]+", "-", self.name) / f"seed-{seed}"

    def epochs(self, runs: Path, seed: int) -> list[dict[str, Any]]:
        """The log of a run, header and epochs, empty where it has not begun; refused where it is one of another run."""
        log = self.log_dir(runs, seed) / checkpoint.METRICS
        lines = checkpoint.read_metrics(log) if log.exists() else []
        if lines:
            found, wanted = lines[0]["arguments"], vars(self.arguments) | {"seed": seed}
            others = differences(self.task, found, wanted, fixed(found, wanted) - {"cuda"})
            if others:
                raise StudyError(f"{log} is of a run with other arguments: {others}")
        return lines

    def finished(self, runs: Path, seed: int) -> bool:
        """Whether all epochs are in the log, and the picture that is drawn last is there."""
        complete = len(self.epochs(runs, seed)) > self.arguments.epochs
        return complete and (self.log_dir(runs, seed) / report.CURVES).exists()

    def published(self, folder: Path | None, seed: int) -> bool:
        """Whether a log with all epochs is in `folder`, where `study_report.py` publishes them."""
        return folder is not None and len(self.epochs(folder, seed)) > self.arguments.epochs


def flags(given: dict[str, Any]) -> list[str]:
    """Arguments as the command line has them."""
    result = []
    for name, value in given.items():
        if isinstance(value, bool):
            result.append(f"--{name}" if value else f"--no-{name}")
        else:
            values = value if isinstance(value, list) else [value]
            result += [f"--{name}", *map(str, values)]
    return result


def read(path: Path) -> list[Row]:
    """The rows of a study, each one checked."""
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise StudyError(f"{path}: {error}") from error
    unknown = [name for name in content if name not in TASKS and name != "rows"]
    if unknown:
        raise StudyError(f"{path}: {unknown[0]} is no task; there are {', '.join(TASKS)}")
    rows = content.get("rows", [])
    if not isinstance(rows, list):
        raise StudyError(f"{path}: rows should be an array of tables, [[rows]], got {rows!r}")
    for part in [*(content[name] for name in content if name != "rows"), *rows]:
        if not isinstance(part, dict):
            raise StudyError(f"{path}: expected a table of arguments for a task or a row, got {part!r}")
    if not rows:
        raise StudyError(f"{path}: has no rows")
    rows = [read_row(path, content, dict(given)) for given in rows]
    folders = [row.log_dir(path, 0) for row in rows]
    for row, folder in zip(rows, folders, strict=True):
        if folders.count(folder) > 1:
            raise StudyError(f"{path}: two rows of {row.task} have the name {row.name}, or nearly so")
    return rows


def read_row(path: Path, content: dict[str, Any], given: dict[str, Any]) -> Row:
    name, task = given.pop("name", None), given.pop("task", None)
    if not isinstance(name, str) or not re.search(r"\w", name) or "|" in name or task not in list(TASKS):
        raise StudyError(
            f"{path}: a row needs a name and a task, one of {', '.join(TASKS)}, and no | in the name: {name}, {task}"
        )
    given = content.get(task, {}) | given
    seeds = given.pop("seeds", None)
    if not isinstance(seeds, list) or not seeds or any(type(seed) is not int or seed < 0 for seed in seeds):
        raise StudyError(f"{path}: {name} needs a list of seeds, numbers from 0 on")
    for other in given.keys() & (UNRECORDED | {"seed", "help"}):
        raise StudyError(f"{path}: {name}: {other} is not for a study to say")
    if len(set(seeds)) < len(seeds):
        raise StudyError(f"{path}: {name} has a seed twice: {seeds}")
    parser = arguments.build_parser(task)
    parser.usage, parser.prog = argparse.SUPPRESS, f"{path}: {name}"
    args = parser.parse_args(flags(given))
    arguments.check(parser, args)
    return Row(name, task, seeds, ["--task", task, *flags(given)], args)


def start(row: Row, seed: int, args: Namespace) -> subprocess.Popen[bytes]:
    log_dir = row.log_dir(args.runs, seed)
    given: dict[str, Any] = {"seed": seed, "log_dir": log_dir, "loadsaved": True}
    if args.data_dir and "data_dir" in row.arguments:
        given["data_dir"] = args.data_dir
    threads = max(1, torch.get_num_threads() // args.jobs)
    with open(log_dir / OUTPUT, "ab") as output:
        return subprocess.Popen(
            [sys.executable, str(HERE / "train.py"), *row.flags, *flags(given)],
            stdout=output, stderr=output, stdin=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            start_new_session=True,  # a Ctrl-C is for this process alone, which passes it on
        )  # fmt: skip


class Running(NamedTuple):
    process: subprocess.Popen[bytes]
    log_dir: Path
    output: TextIO
    """What it prints, from here on."""


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def run(rows: list[Row], args: Namespace) -> list[str]:
    """Starts what is not finished, `args.jobs` at a time; the names of runs that failed."""
    waiting = [
        (row, seed)
        for row in rows
        for seed in row.seeds
        if not row.finished(args.runs, seed) and not row.published(args.published, seed)
    ]
    running: dict[str, Running] = {}
    failed: list[str] = []
    stopping = False

    def stop() -> None:
        nonlocal stopping
        stopping = True
        for name in running:
            running[name].process.terminate()

    say(f"{sum(len(row.seeds) for row in rows)} runs, {len(waiting)} of them not finished")
    with asked_to_stop(stop), ExitStack() as opened:
        while running or (waiting and not stopping):
            while waiting and len(running) < args.jobs and not stopping:
                row, seed = waiting.pop(0)
                name = f"{row.task}, {row.name}, seed {seed}"
                log_dir = row.log_dir(args.runs, seed)
                say(f"{name} begins: {log_dir / OUTPUT}")
                log_dir.mkdir(parents=True, exist_ok=True)
                (log_dir / OUTPUT).touch()
                output = opened.enter_context(open(log_dir / OUTPUT, errors="replace"))
                output.seek(0, os.SEEK_END)
                running[name] = Running(start(row, seed, args), log_dir, output)
                if stopping:  # asked to while it was starting
                    running[name].process.terminate()
            for name, (process, log_dir, output) in list(running.items()):
                ended = process.poll() is not None
                for line in output:
                    if line.startswith("epoch "):
                        say(f"{name}: {line.rstrip()}")
                if not ended:
                    continue
                del running[name]
                if process.returncode == 0:
                    say(f"{name} is finished")
                    continue
                last = ((log_dir / OUTPUT).read_text(errors="replace").splitlines() or [""])[-1]
                say(f"{name} {'stopped' if stopping else 'failed'}: {last}")
                failed += [name] * (not stopping)
            time.sleep(0.1)
    if stopping:
        sys.exit("stopped; the same command goes on")
    return failed


def build_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the file with the rows")
    parser.add_argument("--runs", type=Path, help="folder for logs and checkpoints (default: runs/ and the file's name)")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="only these seeds")
    return parser


def parse(parser: argparse.ArgumentParser) -> tuple[Namespace, list[Row]]:
    args = parser.parse_args()
    args.runs = args.runs or Path("runs", args.study.stem)
    rows = read(args.study)
    unknown = set(args.rows or []) - {row.name for row in rows}
    if unknown:
        raise StudyError(f"{args.study}: has no row named {min(unknown)}")
    rows = [row for row in rows if not args.rows or row.name in args.rows]
    if args.seeds:
        rows = [row._replace(seeds=[seed for seed in row.seeds if seed in args.seeds]) for row in rows]
    rows = [row for row in rows if row.seeds]
    if not rows:
        raise StudyError(f"{args.study}: has no row with seed {' or '.join(map(str, args.seeds))}")
    return args, rows


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--jobs", type=arguments.positive, default=1, help="runs at a time, sharing the threads (default: 1)")
    parser.add_argument("--published", type=Path, metavar="FOLDER", help="leave out runs that have a complete log there")
    parser.add_argument("--data_dir", help="as train.py has it, for the tasks that read files")
    try:
        args, rows = parse(parser)
        failed = run(rows, args)
    except (StudyError, checkpoint.CheckpointError) as error:
        sys.exit(f"error: {error}")
    if failed:
        sys.exit(f"{len(failed)} failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
