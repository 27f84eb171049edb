"""The tests on both paths in clean environments, each with what pip makes of dist/: run `make wheels` before.

    python tests/matrix.py              # every cell that the log has not for these files
    python tests/matrix.py 3.10 2.15    # those of a Python or a torch

A cell is a Python, a torch, and how the package comes into the environment. Pythons are found on PATH as python3.10 and so on;
a cell without one is left out, and so is none that fails: the log tells. Beside torch and the package an environment holds
pytest, hypothesis and numpy, and sees tests/ alone, away from src. Slow tests are left out, and those of the repository itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from hostile import about

ROOT = Path(__file__).parent.parent
LOG = ROOT / "tests" / "results" / "matrix.jsonl"
OF_THE_REPOSITORY = ("docs", "examples", "mutants", "package", "speed", "typing")

BUILT = ["--no-binary=rim-rnn", "--no-cache-dir"]  # there pip would find what it has built before, of whatever kind
INSTALLS: dict[str, list[str]] = {
    "wheel": ["torch=={torch}", "--only-binary=rim-rnn"],
    "wheel without the operator": ["torch=={torch}", "{pure}"],
    "sdist": ["torch=={torch}", *BUILT],
    "sdist, torch at hand": [*BUILT, "--no-build-isolation"],
    "sdist, torch at hand, no compiler": [*BUILT, "--no-build-isolation"],
}
CELLS = [
    *((python, "2.13.0", "wheel") for python in ("3.10", "3.11", "3.12", "3.13", "3.14")),
    *(("3.11", "2.13.0", how) for how in list(INSTALLS)[1:]),
    *(("3.11", torch, "wheel") for torch in ("2.10.0", "2.11.0", "2.12.1", "2.14.1", "2.15.0")),
    ("3.10", "2.10.0", "wheel"),
]


def run(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True, check=False)


def install(folder: Path, python: str, torch: str, how: str) -> str:
    """What the environment takes, from an empty one: the interpreter's path; RuntimeError with pip's words where it fails."""
    version = re.search(r'__version__ = "(.+)"', (ROOT / "src/rim_rnn/__init__.py").read_text(encoding="utf-8"))
    assert version
    package, inside = f"rim-rnn=={version[1]}", str(folder / "venv/bin/python")
    pip = [inside, "-m", "pip", "install", "--quiet"]
    steps = [[python, "-m", "venv", "venv"], [*pip, "--upgrade", "pip"]]
    if "at hand" in how:
        steps.append([*pip, f"torch=={torch}", "setuptools>=77"])
    words = [word.format(torch=torch, pure=next((ROOT / "dist").glob("*-none-any.whl"))) for word in INSTALLS[how]]
    named = [] if any(word.endswith(".whl") for word in words) else [package]
    steps.append([*pip, "--find-links", str(ROOT / "dist"), *named, *words])
    steps.append([*pip, "hypothesis", "numpy", "pytest", "pytest-xdist"])
    variables = {"CC": "none", "CXX": "none"} if "no compiler" in how else {}
    for step in steps:
        done = run(step, folder, **variables)
        if done.returncode:
            raise RuntimeError(f"{' '.join(step[1:])}: {(done.stdout + done.stderr)[-2000:]}")
    return inside


def tested(inside: str, folder: Path, native: bool) -> dict[str, Any]:
    """How many tests pass, fail and are left out on a path, and the names of those that fail."""
    left_out = [f"--ignore=tests/test_{name}.py" for name in OF_THE_REPOSITORY]
    command = [inside, "-m", "pytest", "-n", "auto", "-q", "-p", "no:cacheprovider", "--junitxml=log.xml"]
    command += ["-m", "not tools and not slow"]
    (folder / "log.xml").unlink(missing_ok=True)
    began = time.perf_counter()
    done = run([*command, *left_out], folder, RIM_RNN_NATIVE="1" if native else "0")
    try:
        suite = next(ElementTree.parse(folder / "log.xml").iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return {"passed": 0, "failed": ["no test ran: " + (done.stdout + done.stderr)[-2000:]], "skipped": 0}
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if {"failure", "error"} & {part.tag for part in case}
    ]
    skipped = int(suite.get("skipped", 0))
    passed = int(suite.get("tests", 0)) - len(failed) - skipped
    if done.returncode and not failed:
        failed = [f"pytest ends with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}"]
    return {"passed": passed, "failed": failed, "skipped": skipped, "seconds": round(time.perf_counter() - began)}


def cell(python: str, torch: str, how: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            inside = install(folder, shutil.which(f"python{python}") or "", torch, how)
        except RuntimeError as error:
            return {"problem": str(error)}
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        checked = run([inside, "-m", "rim_rnn"], folder)
        shown = dict(line.split(maxsplit=1) for line in checked.stdout.partition("\n\n")[0].splitlines())
        found = {
            "versions": [shown.get("Python"), shown.get("torch")],
            "path": shown.get("path"),
            "self-check": checked.returncode,
        }
        if str(folder) not in shown.get("rim-rnn", ""):
            return found | {"problem": f"not the installed package: {shown}"}
        paths = [True, False] if shown["path"] == "native" else [False]
        return found | {"native" if native else "readable": tested(inside, folder, native) for native in paths}


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("only", nargs="*", help="the Pythons and torches whose cells are run")
    only = parser.parse_args(words).only
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((ROOT / "dist").iterdir())}
    lines = [json.loads(line) for line in LOG.read_text(encoding="utf-8").splitlines()] if LOG.exists() else []
    lines = [line for line in lines if line["files"] == files]
    for python, torch, how in CELLS:
        what = {"python": python, "torch": torch, "how": how}
        chosen = not only or python in only or any(torch.startswith(word) for word in only)
        if not chosen or any(line["cell"] == what for line in lines) or not shutil.which(f"python{python}"):
            continue
        print(f"Python {python}, torch {torch}, {how}: ", end="", flush=True)
        outcome = cell(python, torch, how)
        print({key: value for key, value in outcome.items() if key != "versions"}, flush=True)
        where = {key: value for key, value in about().items() if key in ("date", "commit", "cpu", "cores", "system")}
        lines.append({"cell": what, **outcome, **where, "files": files})
        lines.sort(key=lambda line: CELLS.index(tuple(line["cell"].values())))
        LOG.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return int(
        any("problem" in line or any(line.get(path, {}).get("failed") for path in ("native", "readable")) for line in lines)
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
