"""What a run leaves in its `log_dir`, written so that a kill at any moment loses nothing.

`checkpoint.pt` is the whole state of the run, `metrics.jsonl` its log: a line that says what ran, then a line per epoch.
The checkpoint repeats the log, so that a run that continues writes again what it had written then, no more and no less.
`weights.pt` comes at the end, and is all that an evaluation needs: the log, the weights of the epoch that counts, and for each
size those chosen for it. Weights that several sizes have chosen are in a file once.
"""

import io
import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HEADER = ("task", "arguments", "processes", "data", "commit", "torch")
CHECKPOINT, WEIGHTS = "checkpoint.pt", "weights.pt"
METRICS = "metrics.jsonl"
PARTS = {
    WEIGHTS: {"header": dict, "metrics": list, "best": dict, "sizes": dict},
    CHECKPOINT: {
        "header": dict, "metrics": list, "progress": dict, "model": dict, "average": dict, "best": dict,
        "sizes": dict, "optimizer": dict, "scheduler": dict, "generators": dict,
    },
}  # fmt: skip


class CheckpointError(ValueError):
    """A `log_dir` does not hold what it should; the message names it."""


def save(log_dir: Path, state: dict[str, Any], name: str = CHECKPOINT) -> None:
    buffer = io.BytesIO()
    torch.save({part: state[part] for part in PARTS[name]}, buffer)
    replace(log_dir / name, buffer.getvalue())


def load(log_dir: Path, name: str = CHECKPOINT) -> dict[str, Any]:
    """The whole state of the run, or what `WEIGHTS` holds of it, on the CPU, each byte checked."""
    path = log_dir / name
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything on its way through the unpickler
        raise CheckpointError(f"{path}: not a checkpoint, or a damaged one: {error}") from error
    if isinstance(state, dict):
        state.setdefault("sizes", {})  # from before there were any
    for part, kind in PARTS[name].items():
        if not isinstance(state, dict) or not isinstance(state.get(part), kind):
            raise CheckpointError(f"{path}: not a checkpoint of this example: it has no {kind.__name__} named {part}")
    for entry in HEADER:
        if entry not in state["header"]:
            raise CheckpointError(f"{path}: not a checkpoint of this example: its header has no {entry}")
    return state


def write_metrics(log_dir: Path, metrics: list[dict[str, Any]]) -> None:
    replace(log_dir / METRICS, "".join(json.dumps(line) + "\n" for line in metrics).encode())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines but one that is still being written, or was when the run was killed."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if lines and ["arguments" in lines[0], *(line["epoch"] for line in lines[1:])] != [True, *range(1, len(lines))]:
            raise ValueError("expected a line that says what ran, then one for each epoch")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not a log, or a damaged one: {error!r}; without it, a run goes on from its {CHECKPOINT}, which has it too"
        ) from error
    return lines


def append_metrics(log_dir: Path, line: dict[str, Any]) -> None:
    with open(log_dir / METRICS, "a") as file:
        file.write(json.dumps(line) + "\n")


def replace(path: Path, content: bytes) -> None:
    """`path` holds the old content or the new at any moment, even through a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":  # the new name, too, has to reach the disk
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)


@contextmanager
def locked(log_dir: Path) -> Iterator[None]:
    """Keeps every other process from running this run meanwhile, where the system can."""
    if os.name != "posix":
        yield
        return
    import fcntl

    directory = os.open(log_dir, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise CheckpointError(f"{log_dir}: another process is at work on this run") from error
    finally:
        os.close(directory)


def differences(expected: Any, found: Any, name: str = "") -> Iterator[str]:
    """Where `found` is built otherwise than `expected`: keys, lengths, types, shapes; values may differ."""
    here = f"{name}." if name else ""
    if type(expected) is not type(found):
        yield f"{name} is of type {type(found).__name__}, expected {type(expected).__name__}"
    elif isinstance(expected, dict):
        for key in sorted(expected.keys() ^ found.keys(), key=str):
            yield f"{here}{key} is {'unexpected' if key in found else 'missing'}"
        for key in sorted(expected.keys() & found.keys(), key=str):
            yield from differences(expected[key], found[key], f"{here}{key}")
    elif isinstance(expected, (list, tuple)):
        if len(expected) != len(found):
            yield f"{name} has {len(found)} entries, expected {len(expected)}"
        for index, pair in enumerate(zip(expected, found, strict=False)):
            yield from differences(*pair, f"{here}{index}")
    elif isinstance(expected, Tensor) and (expected.shape, expected.dtype) != (found.shape, found.dtype):
        yield f"{name} is {found.dtype} {tuple(found.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
