"""Turns the logs of a study into tables and pictures, at any moment: what is not finished is marked.

    python study_report.py study.toml                    # from runs/study, into the same folder
    python study_report.py study.toml --publish FOLDER   # the logs, too, are copied into FOLDER, and reported from there
    python study_report.py study.toml --runs FOLDER --write README.md    # puts tables between README's marks
    python study_report.py study.toml --runs FOLDER --check README.md    # fails unless what stands there is this

For each task: a table of each measure; the first measure against size and over the epochs; how often each unit was active
where. Nothing but the logs is read, `metrics.jsonl` and `activity.json` of each run.
"""

import json
import shlex
import shutil
import statistics
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from checkpoint import METRICS, CheckpointError, replace
from report import ACTIVITY, LINES, STYLE, UNITS, chosen, draw_guess, for_sizes, markdown
from study import Row, StudyError, build_parser, parse
from tasks import TASKS, Task
from tasks.task import Measure

sys.path.append(str(Path(__file__).parents[1]))
from common import put

WRITER = "examples/study/study_report.py"
TABLE = "table.md"
COLOURED = 5
"""So many rows have a colour in a picture, the first ones; more could not be told apart."""
NOTE = """\
Mean ± standard deviation over seeds. The chosen epoch is the best one on the validation examples, which are of the size of
training and not trained on; *for each size* the best one on the same examples at that size. No test example chooses anything.
Times are wall time per run, with evaluation.
"""


class Run(NamedTuple):
    """What a run has logged."""

    row: Row
    seed: int
    header: dict[str, Any]
    epochs: list[dict[str, Any]]

    @property
    def finished(self) -> bool:
        """Whether all epochs are there, and what counts has been tested, which comes last."""
        args = self.row.arguments
        if len(self.epochs) < args.epochs or (args.eval_sizes and not chosen(self.epochs)["test_loss"]):
            return False
        chosen_for, tested = self.for_sizes.get("epoch", {}), self.for_sizes.get("test_loss", {})
        return all(str(size) in tested for size in args.eval_sizes if str(size) in chosen_for)

    @property
    def for_sizes(self) -> dict[str, Any]:
        """What was chosen for each size, where something was."""
        return for_sizes(self.epochs, next(iter(TASKS[self.row.task].measures)))

    @property
    def seconds(self) -> float:
        return sum(line["seconds"] + line["evaluation_seconds"] for line in self.epochs)


class Group(NamedTuple):
    """The runs of a row that are finished, or those that are not."""

    name: str
    runs: list[Run]
    finished: bool


def collect(rows: list[Row], folder: Path) -> list[Group]:
    """For each row its finished runs, then its unfinished ones, then those without an epoch, where there are any."""
    groups = []
    for row in rows:
        logs = [(seed, row.epochs(folder, seed) or [{}]) for seed in row.seeds]
        runs = [Run(row, seed, log[0], log[1:]) for seed, log in logs]
        sizes = sorted({run.header.get("parameters", 0) for run in runs if run.header})
        if len(sizes) > 1:
            raise StudyError(
                f"{folder}: seeds of {row.name} have {' and '.join(map(str, sizes))} parameters: a default of the layer was "
                "another one when some of them ran; the row has to name it"
            )
        done = [run for run in runs if run.finished]
        begun = [run for run in runs if run.epochs and not run.finished]
        rest = [run for run in runs if not run.epochs]
        groups += [Group(row.name, done, True)] * bool(done)
        groups += [Group(f"{row.name}, *unfinished*", begun, False)] * bool(begun)
        groups += [Group(f"{row.name}, *no epoch yet*", rest, False)] * bool(rest)
    return groups


def spread(values: list[float], measure: Measure) -> str:
    mean = measure.show(statistics.fmean(values))
    return f"{mean} ± {measure.show(statistics.stdev(values))}" if len(values) > 1 else mean


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{seconds / 60:.1f} min"


def test_sizes(groups: list[Group]) -> list[int]:
    return sorted({size for group in groups for run in group.runs for size in run.row.arguments.eval_sizes})


def table(task: type[Task], groups: list[Group], name: str) -> str:
    """One measure: for each group of runs a line for the chosen epoch and one for the last, or one for both."""
    measure, sizes = task.measures[name], test_sizes(groups)
    rows = [[measure.title, "seeds", "epoch", "validation", *map(task.label, sizes), "time"]]
    for group in groups:
        runs, seeds = group.runs, ", ".join(str(run.seed) for run in group.runs)
        if not runs[0].epochs:
            rows.append([group.name, seeds, *[""] * (len(sizes) + 3)])
            continue
        kinds = {"last": [run.epochs[-1] for run in runs]}
        if runs[0].row.arguments.valid:
            best = [chosen(run.epochs) for run in runs]
            kinds = {"chosen, last": best} if best == kinds["last"] else {"chosen": best} | kinds
        if runs[0].for_sizes:
            kinds = {"for each size": [as_line(run) for run in runs]} | kinds
        time = duration(statistics.fmean(run.seconds for run in runs))
        for kind, lines in kinds.items():
            epochs = f"{kind}: {', '.join(str(line['epoch']) for line in lines)}"
            epochs += f" of {runs[0].row.arguments.epochs}" * (not group.finished)
            rows.append([group.name, seeds, epochs, *cells(lines, name, sizes, measure), time])
    lines = [run.epochs[-1] for group in groups for run in group.runs if run.epochs]
    if name == "loss" and "constant" in task.measures and lines:
        rows.append([task.guess[0], "", "", *cells(lines[:1], "constant", sizes, measure), ""])
    return markdown(rows)


def as_line(run: Run) -> dict[str, Any]:
    """What was chosen for each size, in the form of an epoch's line."""
    values, size = run.for_sizes, str(run.row.arguments.size)
    line = {name: value[size] if name.startswith("valid_") else value for name, value in values.items()}
    return line | {"epoch": epochs_of(values)}


def epochs_of(values: dict[str, Any]) -> str:
    """Those that were chosen for each size, in the order of sizes."""
    return "/".join(f"{values['epoch'][size]:.3g}" for size in sorted(values["epoch"], key=int))


def held_out_table(task: type[Task], groups: list[Group]) -> str:
    """The first measure on the validation examples of several sizes, and its mean over them: chosen for each, and by one."""
    (name, measure), groups = next(iter(task.measures.items())), [group for group in groups if group.runs[0].for_sizes]
    sizes = sorted({size for group in groups for size in group.runs[0].for_sizes["epoch"]}, key=int)
    rows = [[f"{measure.title}, held out", "seeds", "chosen", *map(task.label, sizes), "mean", "time"]]
    for group in groups:
        best = [chosen(run.epochs) for run in group.runs]
        kinds = {
            f"for each size: {', '.join(epochs_of(run.for_sizes) for run in group.runs)}": [
                run.for_sizes[f"valid_{name}"] for run in group.runs
            ],
            f"by {task.label(group.runs[0].row.arguments.size)}: {', '.join(str(line['epoch']) for line in best)}": [
                line["held_out"][-1][f"valid_{name}"] for line in best
            ],
        }
        for kind, values in kinds.items():
            columns = [[value.get(size) for value in values] for size in sizes]
            means = [statistics.fmean(value.values()) for value in values]
            shown = ["" if None in column else spread(column, measure) for column in [*columns, means]]
            of = f" of {group.runs[0].row.arguments.epochs}" * (not group.finished)
            time = duration(statistics.fmean(run.seconds for run in group.runs))
            rows.append([group.name, ", ".join(str(run.seed) for run in group.runs), kind + of, *shown, time])
    return markdown(rows)


def cells(lines: list[dict[str, Any]], name: str, sizes: list[int], measure: Measure) -> list[str]:
    """What `lines` say of a measure, on the validation examples and at each size; nothing where one of them says nothing."""
    columns = [[line.get(f"valid_{name}") for line in lines]]
    columns += [[line[f"test_{name}"].get(str(size)) for line in lines] for size in sizes]
    return ["" if None in values else spread(values, measure) for values in columns]


def curves(group: Group, pick: Any, factor: float) -> np.ndarray:
    """What `pick` takes from a line, `(runs, epochs)`, as far as all runs of the group have come."""
    shortest = min(len(run.epochs) for run in group.runs)
    return factor * np.array([[pick(line) for line in run.epochs[:shortest]] for run in group.runs])


def at_end(line: dict[str, Any], name: str, size: str) -> float:
    """Of the validation examples of a size, at the end of an epoch."""
    return line["held_out"][-1][name].get(size, np.nan) if "held_out" in line else np.nan


def draw_band(axis: Any, x: list[int], values: np.ndarray, group: Group, color: Any) -> None:
    """Mean and spread over seeds, each seed a point; without a colour, a thin line among those of other rows."""
    mean, style = values.mean(0), "-" if group.finished else "--"
    if color is None:
        axis.plot(x, mean, color=LINES, alpha=0.5, ls=style, linewidth=0.8, zorder=1)
        return
    deviation = values.std(0, ddof=1) if len(values) > 1 else 0 * values[0]
    label = f"{group.name.replace('*', '')}, {len(values)} seed{'s' * (len(values) > 1)}"
    axis.plot(x, mean, color=color, ls=style, marker="." if len(x) < 10 else None, label=label)
    axis.fill_between(x, mean - deviation, mean + deviation, color=color, alpha=0.15, linewidth=0)
    if len(x) < 10:
        axis.plot(x, values.T, ".", color=color, markersize=4)


def draw_lines(folder: Path, task: type[Task], groups: list[Group]) -> None:
    """The first measure against the size, of the chosen epochs; and over the epochs, at each size."""
    name, measure = next(iter(task.measures.items()))
    sizes = test_sizes(groups)
    runs = [run for group in groups for run in group.runs]
    panels: list[tuple[str, Any]] = [("training", lambda line: line.get(f"train_{name}", np.nan))]
    if any(run.row.arguments.valid for run in runs):
        panels.append(("validation", lambda line: line.get(f"valid_{name}", np.nan)))
    larger = {size for run in runs for size in run.for_sizes.get("epoch", {}) if size != str(run.row.arguments.size)}
    for size in sorted(larger, key=int):
        panels.append((f"validation, {task.label(size)}", lambda line, size=size: at_end(line, f"valid_{name}", size)))
    if any(sum(bool(line[f"test_{name}"]) for line in run.epochs) > 2 for run in runs):  # more than chosen and last
        panels += [
            (f"test, {task.label(size)}", lambda line, size=size: line[f"test_{name}"].get(str(size), np.nan)) for size in sizes
        ]
    figures = {
        "curves": plt.subplots(1, len(panels), figsize=(3.4 * len(panels) + 2, 3.6), squeeze=False, layout="constrained"),
        "sizes": plt.subplots(1, 1, figsize=(7, 4), squeeze=False, layout="constrained"),
    }
    against_size = figures["sizes"][1][0, 0]
    for index, group in enumerate(groups):
        color = f"C{index}" if index < COLOURED else None
        for axis, (_, pick) in zip(figures["curves"][1][0], panels, strict=True):
            values = curves(group, pick, measure.factor)
            epochs = np.flatnonzero(~np.isnan(values).any(0))  # those of which all runs have it
            draw_band(axis, list(epochs + 1), values[:, epochs], group, color)
        results = [chosen(run.epochs)[f"test_{name}"] for run in group.runs]
        if not any(results):  # not tested yet
            continue
        values = measure.factor * np.array([[result.get(str(size), np.nan) for size in sizes] for result in results])
        draw_band(against_size, sizes, values, group, color)
    for axis, (title, _) in zip(figures["curves"][1][0], panels, strict=True):
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
    against_size.set(title="test", xlabel=task.size_title, xticks=sizes)
    for trained in {run.row.arguments.size for run in runs} & set(sizes):
        against_size.axvline(trained, color=LINES, linewidth=0.8, linestyle=":", zorder=0)
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "rotation": 90}
        against_size.annotate("trained", (trained, 0.02), (3, 0), color=LINES, fontsize=8, va="bottom", **place)
    for kind, (figure, axes) in figures.items():
        for axis in axes[0]:
            draw_guess(axis, task)
            axis.set_ylim((0, 100) if name == "accuracy" else (0, None))
            axis.grid(axis="y", color=LINES, alpha=0.2, linewidth=0.8)
            if len(groups) > COLOURED and axis.get_legend_handles_labels()[0]:
                axis.plot([], [], color=LINES, alpha=0.5, linewidth=0.8, label="other rows")
        axes[0, 0].set_ylabel(measure.title)
        if axes[0, -1].get_legend_handles_labels()[0]:  # nothing may have been tested yet
            axes[0, -1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8)
            figure.savefig(folder / f"{kind}.png")
        plt.close(figure)


def read_activity(log: Path, task: type[Task], args: Namespace) -> np.ndarray:
    """How often each unit was active at each place, `(units, rows, columns)`."""
    try:
        active = torch.tensor(json.loads(log.read_text())["active"])
        if active.dim() != 2 or not len(active):
            raise ValueError(f"expected a share for each unit and step, got {tuple(active.shape)}")
        return task.places(active, args).numpy()
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{log}: not what a run says of its units, or damaged: {error!r}") from error


def draw_activity(folder: Path, runs: list[tuple[Run, np.ndarray]]) -> None:
    """For the first run of each RIM that there is, how often each unit was active at each place."""
    pictures = [picture for _, picture in runs]
    height = 1.3 if pictures[0].shape[1] > 1 else 0.5
    figure, axes = plt.subplots(
        len(runs), max(map(len, pictures)), figsize=(1.2 * max(map(len, pictures)) + 1.5, height * len(runs) + 0.8),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for row, (run, units) in enumerate(runs):
        for column, axis in enumerate(axes[row]):
            axis.set(xticks=[], yticks=[])
            if column >= len(units):
                axis.set_axis_off()
                continue
            image = axis.imshow(units[column], vmin=0, vmax=1, cmap="magma", aspect="equal" if units.shape[1] > 1 else "auto")
            title = f"unit {column}\n" * (row == 0) + f"{units[column].mean():.0%}"
            axis.set_title(title, fontsize=7, color=LINES, loc="center")
        label = f"{run.row.name}\nseed {run.seed}" + "\nunfinished" * (not run.finished)
        axes[row, 0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle("how often each unit was active", x=0.01, ha="left")
    figure.colorbar(image, ax=axes, shrink=0.6)
    figure.savefig(folder / "units.png")
    plt.close(figure)


def short_table(task: type[Task], groups: list[Group]) -> str:
    """The first measure at each size, for each group of runs: in the epoch that counts, and as chosen for each size."""
    (name, measure), sizes = next(iter(task.measures.items())), test_sizes(groups)
    both = any(run.for_sizes for group in groups for run in group.runs)
    rows = [[measure.title, "seeds", *["chosen"] * both, *map(task.label, sizes)]]
    for group in groups:
        runs, seeds = [run for run in group.runs if run.epochs], ", ".join(str(run.seed) for run in group.runs)
        kinds = {f"by {task.label(group.runs[0].row.arguments.size)}": [chosen(run.epochs) for run in runs]}
        if runs and runs[0].for_sizes:
            kinds = {"for each size": [as_line(run) for run in runs]} | kinds
        for kind, lines in kinds.items():
            results = cells(lines, name, sizes, measure)[1:] if lines else [""] * len(sizes)
            rows.append([group.name, seeds, *[kind] * both, *results])
    return markdown(rows)


def epochs_table(task: type[Task], groups: list[Group]) -> str:
    """The first measure after every epoch of each run that was tested after every one."""
    (name, measure), sizes = next(iter(task.measures.items())), test_sizes(groups)
    rows = [[measure.title, "seed", "epoch", "validation", *map(task.label, sizes)]]
    for run in (run for group in groups for run in group.runs):
        if all(line[f"test_{name}"] for line in run.epochs):
            rows += [
                [run.row.name, str(run.seed), str(line["epoch"]), *cells([line], name, sizes, measure)] for line in run.epochs
            ]
    return markdown(rows)


def origin(headers: list[dict[str, Any]]) -> str:
    """Where the figures come from."""
    places = [header | place for header in headers for place in ({}, *header.get("resumed", []))]
    commits = {place["commit"] for place in places}
    days = sorted(header["began"][:10] for header in headers)
    kinds = [
        {f"{place['device']}, {place['platform'].split('-')[0]}" for place in places},
        {f"torch {place['torch']}" for place in places},
        {f"Python {header['python']}" for header in headers},
        {f"commit {commit[:12]}{commit[40:]}" for commit in commits if commit},  # and whether it was -dirty
        {f"begun {' to '.join(sorted({days[0], days[-1]}))}"},
    ]
    return "; ".join(", ".join(sorted(kind)) for kind in kinds if kind) + "."


def tables(args: Namespace, rows: list[Row]) -> dict[str, str]:
    """Every table under the name of its marks: for each task all measures, and the first of them in short and by epoch."""
    result = {}
    for task_name in dict.fromkeys(row.task for row in rows):
        task, name = TASKS[task_name], f"{args.study.stem}, {task_name}"
        groups = collect([row for row in rows if row.task == task_name], args.runs)
        headers = [run.header for group in groups for run in group.runs if run.header]
        parts = [table(task, groups, measure) for measure in task.measures if measure != "constant"]
        result[name] = "\n\n".join([*parts, origin(headers)] if headers else parts)
        seeds = f", seed {' '.join(map(str, args.seeds))}" if args.seeds else ""
        result[f"{name}, in short{seeds}"] = short_table(task, groups)
        held_out = held_out_table(task, groups)
        result[f"{name}, held out"] = "\n\n".join([held_out, origin(headers)] if headers else [held_out])
        result[f"{name}, epoch by epoch"] = epochs_table(task, groups)
    return result


def write(args: Namespace, rows: list[Row]) -> str:
    """Draws the pictures, and returns the tables."""
    parts = [NOTE]
    for task_name in dict.fromkeys(row.task for row in rows):
        task, mine = TASKS[task_name], [row for row in rows if row.task == task_name]
        groups = collect(mine, args.runs)
        begun = [group for group in groups if group.runs[0].epochs]
        parts += [f"## {task_name}\n", tables(args, mine)[f"{args.study.stem}, {task_name}"] + "\n"]
        if not begun:
            continue
        folder = args.runs / task_name
        with plt.rc_context(STYLE):
            draw_lines(folder, task, begun)
            active: dict[str, tuple[Run, np.ndarray]] = {}
            for run in (run for group in begun for run in group.runs):
                log = run.row.log_dir(args.runs, run.seed) / ACTIVITY
                if log.exists():
                    active.setdefault(run.row.name, (run, read_activity(log, task, run.row.arguments)))
            if active:
                draw_activity(folder, list(active.values()))
        names = [name for name in ("sizes", "curves", "units") if (folder / f"{name}.png").exists()]
        parts += [f"![{name}]({task_name}/{name}.png)\n" for name in names]
    return "\n".join(parts)


def publish(rows: list[Row], runs: Path, folder: Path) -> None:
    """Copies what the report needs of each run, and of the first run of each row the picture of its units.

    A log in `folder` that has come further stays: its row may be carried on elsewhere, from the beginning.
    """
    for row in rows:
        for seed in row.seeds:
            there, here = row.log_dir(runs, seed), row.log_dir(folder, seed)
            lines = row.epochs(runs, seed)
            if len(lines) <= 1 or len(lines) < len(row.epochs(folder, seed)):
                continue
            here.mkdir(parents=True, exist_ok=True)
            if data_dir := lines[0]["arguments"].pop("data_dir", None):  # others have the data elsewhere
                lines[0]["command"] = lines[0]["command"].replace(f" --data_dir {shlex.quote(data_dir)}", "")
            replace(here / METRICS, "".join(json.dumps(line) + "\n" for line in lines).encode())
            for name in (ACTIVITY, *[UNITS] * (seed == row.seeds[0])):
                if (there / name).exists():
                    shutil.copyfile(there / name, here / name)


def main() -> None:
    parser = build_parser(__doc__)
    add = parser.add_argument
    add("--publish", type=Path, metavar="FOLDER", help="copy the logs there, and report there")
    add("--write", type=Path, nargs="+", default=[], metavar="PAGE", help="put the tables into these pages")
    add("--check", type=Path, nargs="+", default=[], metavar="PAGE", help="fail unless these pages have the tables")
    try:
        args, rows = parse(parser)
        if args.publish:
            if args.rows or args.seeds or args.publish.resolve() == args.runs.resolve():
                raise StudyError("--publish takes a study as a whole, into a folder other than --runs")
            publish(rows, args.runs, args.publish)
            args.runs = args.publish
        for page in args.write:
            page.write_text(put(page.read_text(), tables(args, rows), WRITER))
        for page in args.check:
            if put(page.read_text(), tables(args, rows), WRITER) != page.read_text():
                raise StudyError(f"{page}: not the tables of {args.runs}; --write puts them there")
        if args.write or args.check:
            return
        text = write(args, rows)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(text)
    args.runs.mkdir(parents=True, exist_ok=True)
    (args.runs / TABLE).write_text(text)


if __name__ == "__main__":
    main()
