"""The tables of some pages, counted from tests/ and read from logs, whenever the pages are built."""

import ast
import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from statistics import mean, stdev
from typing import Any

TESTS = Path(__file__).parent.parent / "tests"
PACKAGE = TESTS.parent / "src" / "rim_rnn"
PAGES = ("compatibility", "how_a_step_works", "reliability")
OUTCOMES = ("equal", "refused", "stricter", "near tie", "failed")


def table(header: list[str], rows: list[list[object]]) -> str:
    """In Markdown, columns after the first to the right if they hold numbers."""
    right = [i > 0 and all(isinstance(row[i], int) for row in rows) for i in range(len(header))]
    lines = [header, ["---:" if r else "---" for r in right]]
    lines += [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def tests() -> str:
    """How many test functions each file has, and its first sentence."""
    rows: list[list[object]] = []
    for path in sorted(TESTS.glob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
        first = " ".join((ast.get_docstring(tree) or "").partition("\n\n")[0].split())
        rows.append([f"`{path.name}`", len(found), first.replace("|", r"\|")])
    total = sum(int(str(row[1])) for row in rows)
    return table(["file", "tests", "what it holds"], [*rows, ["together", total, ""]])


def mutants() -> str:
    """How many ways to break each file are tried."""
    spec: Any = importlib.util.spec_from_file_location("mutants", TESTS / "mutants.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    counts = Counter(mutant.file for mutant in module.MUTANTS)
    return table(["file", "mutants"], [*([f"`{name}`", n] for name, n in counts.items()), ["together", counts.total()]])


def hostile() -> str:
    """How the cases of the last run that was kept ended."""
    path = TESTS / "results" / "hostile.json"
    if not path.exists():
        return "*No log of a run is kept yet.*"
    log = json.loads(path.read_text(encoding="utf-8"))
    kinds = {**log["kinds"], "together": sum(map(Counter, log["kinds"].values()), Counter())}
    rows = [[name.replace("_", " "), *(outcomes.get(o, 0) for o in OUTCOMES)] for name, outcomes in kinds.items()]
    paths = ", ".join(f"{n:,} {name}" for name, n in log["paths"].items())
    return f"{table(['kind of case', *OUTCOMES], rows)}\n\nCalls by path: {paths}. {origin(log)}"


def in_short(name: str) -> str:
    """The same of another run that is kept, in a sentence."""
    path = TESTS / "results" / f"{name}.json"
    if not path.exists():
        return "*No log of a run is kept yet.*"
    log = json.loads(path.read_text(encoding="utf-8"))
    outcomes = sum(map(Counter, log["kinds"].values()), Counter())
    return f"{outcomes.total():,} cases, {outcomes['failed']} failed. {origin(log)}"


def readable() -> str:
    return in_short("hostile-readable")


def sanitized() -> str:
    return in_short("sanitize")


def soak() -> str:
    """What the last run that was kept says of memory and graphs."""
    path = TESTS / "results" / "soak.jsonl"
    if not path.exists():
        return "*No log of a run is kept yet.*"
    log, *samples, end = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    if "passed" not in end:
        return "*The log that is kept has no verdict.*"
    rows: list[list[object]] = [
        ["time", f"{end['seconds'] / 60:.0f} minutes"],
        ["steps of training", f"{end['steps']:,}"],
        ["memory in use, least and most after the first quarter", memory(samples, end["seconds"] / 4)],
        ["growth, by the line fitted to it", f"{end['growth'] / 2**20:.1f} MiB"],
        ["compiled graphs", f"{end['graphs']}, {end['graphs_in_second_half']} of them in the second half"],
        ["passed", "yes" if end["passed"] else "no"],
    ]
    return f"{table(['what', 'result'], rows)}\n\n{origin(log)}"


def memory(samples: list[dict[str, Any]], begin: float) -> str:
    sizes = [sample["resident"] / 2**20 for sample in samples if sample["seconds"] >= begin]
    return f"{min(sizes):.0f} and {max(sizes):.0f} MiB"


def matrix() -> str:
    """How the tests ended in each clean environment."""
    path = TESTS / "results" / "matrix.jsonl"
    if not path.exists():
        return "*No log of a run is kept yet.*"

    def outcome(tests: dict[str, Any]) -> str:
        return "" if not tests else f"{tests['passed']:,}" + f", {len(tests['failed'])} failed" * bool(tests["failed"])

    logs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows: list[list[object]] = []
    for log in logs:
        python, torch = log.get("versions") or (log["cell"]["python"], log["cell"]["torch"])
        ends = (
            [outcome(log.get(path, {})) for path in ("native", "readable")] if "problem" not in log else ["not installed", ""]
        )
        rows.append([python.split()[0], torch, log["cell"]["how"], *ends])
    dates, commits = sorted({log["date"][:10] for log in logs}), sorted({str(log["commit"])[:12] for log in logs})
    where = f"{logs[0]['cpu']}, {logs[0]['cores']} cores, {logs[0]['system']}"
    header = ["Python", "torch", "installed from", "native path: passed", "readable path: passed"]
    return f"{table(header, rows)}\n\n`python tests/matrix.py`, {' and '.join(dates)}, commit {' and '.join(commits)}, {where}."


def first_weights() -> str:
    """Mean and standard deviation over seeds, for each range of the first values and each measure."""
    runs = json.loads((Path(__file__).parent / "initialisation.json").read_text(encoding="utf-8"))
    scales = sorted({run["scale"] for run in runs})
    measured = [("loss", "text, LSTM units", "loss", 1.0, 3), ("loss", "text, GRU units", "loss", 1.0, 3)]
    measured += [(f"digits at {size}, %", "digits", size, 100.0, 1) for size in ("14x14", "16x16", "19x19", "24x24")]
    rows: list[list[object]] = []
    for name, task, measure, unit, digits in measured:
        row: list[object] = [f"{task}: {name}" if name == "loss" else name]
        for scale in scales:
            found = [unit * run[measure] for run in runs if (run["task"], run["scale"]) == (task, scale)]
            row.append(f"{mean(found):.{digits}f} ± {stdev(found):.{digits}f}")
        rows.append(row)
    seeds = ", ".join(sorted({str(run["seed"]) for run in runs}))
    cpus, commits = (" and ".join(sorted({run[what] for run in runs})) for what in ("cpu", "commit"))
    end = f"`{runs[0]['command']}`, seeds {seeds}, {runs[0]['date']}, commit {commits}, torch {runs[0]['torch']}, {cpus}."
    return f"{table(['measure', *(f'times {scale}' for scale in scales)], rows)}\n\n{end}"


def origin(log: dict[str, Any]) -> str:
    """Of what and where a log is."""
    took = f", {log['seconds']:,.0f} s" if "seconds" in log else ""
    return (
        f"`{log['command']}`, {log['date'][:10]}, commit {str(log['commit'])[:12]}, native operator: {log['native']}, "
        f"torch {log['torch']}, Python {log['python']}, {log['cpu']}, {log['cores']} cores, {log['system']}{took}."
    )


TABLES = {
    f"<!-- table: {make.__name__} -->": make
    for make in (tests, mutants, hostile, readable, sanitized, soak, matrix, first_weights)
}


def fill(text: str) -> str:
    """The page with its tables; an error if it names a file that is not there."""
    names = re.findall(r"`(?:tests/)?(\w+\.(?:py|sh))`", text)
    missing = [name for name in names if not any((folder / name).exists() for folder in (TESTS, PACKAGE))]
    if missing:
        raise FileNotFoundError(f"a page names {', '.join(missing)}")
    for place, make in TABLES.items():
        text = text.replace(place, make())
    return text
