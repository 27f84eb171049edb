"""A run in a table and two pictures: measures over the epochs; what the units did, step by step.

python report.py LOG PICTURE             # table and first picture once more, from metrics.jsonl alone
"""

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

import checkpoint
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib import colors
from model import Model
from tasks import TASKS, Task
from torch import Tensor

from rim_rnn import record

plt.switch_backend("Agg")  # needs no display

CURVES, UNITS, ACTIVITY = "curves.png", "units.png", "activity.json"
FILES = (checkpoint.CHECKPOINT, checkpoint.METRICS, checkpoint.WEIGHTS, CURVES, UNITS, ACTIVITY)
AVERAGED, AT_ONCE = 500, 100  # sequences over which activity is averaged, and recorded at a time

INK, PAPER, FAINT, WRONG = "#22252a", "#ffffff", "#8b9098", "#c0392b"
LINES = "#7d8590"  # to be read on a light and on a dark page, which shows through
STYLE = {
    "font.size": 10,
    "text.color": LINES,
    "axes.edgecolor": LINES,
    "axes.labelcolor": LINES,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "xtick.color": LINES,
    "ytick.color": LINES,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "savefig.bbox": "tight",
    "savefig.transparent": True,
}


def chosen(epochs: list[dict[str, Any]]) -> dict[str, Any]:
    """The line of the epoch that validation has chosen; without validation, the last one."""
    return epochs[epochs[-1].get("chosen", len(epochs)) - 1]


def for_sizes(epochs: list[dict[str, Any]], measure: str) -> dict[str, Any]:
    """What is best at each size by `measure` on the validation examples of that size; nothing without several sizes.

    Each measure at each size, as a line has its tests; `epoch` has after how many epochs that was, a whole number or not.
    """
    validations = [validation for line in epochs for validation in line.get("held_out", [])]
    if not validations:
        return {}
    best, by = max if measure == "accuracy" else min, f"valid_{measure}"
    measured = validations[0].keys() - {"step"}
    names = ["epoch", *measured, *(name.replace("valid_", "test_") for name in measured)]
    result: dict[str, Any] = {name: {} for name in names}
    for size in validations[0][by]:
        chosen = best(validations, key=lambda validation, size=size: validation[by][size])  # the earliest of equal ones
        result["epoch"][size] = len(epochs) * chosen["step"] / validations[-1]["step"]
        for name in chosen.keys() - {"step"}:
            if size in chosen[name]:
                result[name][size] = chosen[name][size]
    return result


def markdown(rows: list[list[str]]) -> str:
    """Rows of cells as a table; the first one is its head."""
    rows = [rows[0], ["---", *("---:" for _ in rows[0][1:])], *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def table(header: dict[str, Any], results: dict[str, Any]) -> str:
    """Each measure on the validation examples, where there are any, and at each size of test."""
    task = TASKS[header["task"]]
    sizes = list(results[f"test_{next(iter(task.measures))}"])
    title = header["arguments"]["model"] + (f", epoch {results['epoch']}" if "chosen" in results else "")
    rows = [[title, *["validation"] * ("valid_loss" in results), *map(task.label, sizes)]]
    for name, measure in task.measures.items():
        values = [results[f"valid_{name}"]] if "valid_loss" in results else []
        values += [results[f"test_{name}"][size] for size in sizes]
        rows.append([measure.title, *map(measure.show, values)])
    return markdown(rows)


def table_for_sizes(header: dict[str, Any], results: dict[str, Any]) -> str:
    """Each measure at each size, by the weights that are chosen for that size: on the validation examples and in tests."""
    task = TASKS[header["task"]]
    sizes = list(results["valid_loss"])
    rows = [[f"{header['arguments']['model']}, chosen for each size", *map(task.label, sizes)]]
    for name, measure in task.measures.items():
        for kind, title in (("valid", "validation"), ("test", "test")):
            values = results[f"{kind}_{name}"]
            if values:
                shown = [measure.show(values[size]) if size in values else "" for size in sizes]
                rows.append([f"{measure.title}, {title}", *shown])
    return markdown(rows)


def draw_curves(path: Path, header: dict[str, Any], epochs: list[dict[str, Any]]) -> None:
    """Each measure over the epochs, on the training examples, the held-out ones, and at each size of test."""
    args, task = header["arguments"], TASKS[header["task"]]
    validations = [validation for line in epochs for validation in line.get("held_out", [])]
    larger = list(validations[-1]["valid_loss"].keys() - {str(args["size"])}) if validations else []
    sizes = sorted({*epochs[-1]["test_loss"], *larger}, key=int)
    shades = plt.get_cmap("viridis")(np.linspace(0.1, 0.85, len(sizes)))
    steps = [line["epoch"] for line in epochs]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
        for axis, (name, measure) in zip(axes, task.measures.items(), strict=True):
            train = [measure.factor * line[f"train_{name}"] for line in epochs]
            axis.plot(steps, train, color=FAINT, ls="--", marker=".", label=f"training, {task.label(args['size'])}")
            if args["valid"]:
                valid = [measure.factor * line[f"valid_{name}"] for line in epochs]
                axis.plot(steps, valid, color=LINES, ls=":", marker=".", label=f"validation, {task.label(args['size'])}")
            for size, shade in zip(sizes, shades, strict=True):
                if size in larger:
                    where = [validation["step"] / validations[-1]["step"] * len(epochs) for validation in validations]
                    valid = [measure.factor * validation[f"valid_{name}"][size] for validation in validations]
                    axis.plot(where, valid, color=shade, ls=":", marker=".", label=f"validation, {task.label(size)}")
                tested = [line for line in epochs if size in line[f"test_{name}"]]
                test = [measure.factor * line[f"test_{name}"][size] for line in tested]
                if tested:
                    where = [line["epoch"] for line in tested]
                    axis.plot(where, test, color=shade, marker=".", label=f"test, {task.label(size)}")
            axis.set(xlabel="epoch", title=measure.title, ylim=(0, 100) if name == "accuracy" else (0, None))
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(axis="y", color="#e6e8eb", linewidth=0.8)
        draw_guess(axes[0], task)
        axes[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
        figure.suptitle(f"{args['model']}, {args['hidden_size']} hidden, seed {args['seed']}", x=0.01, ha="left")
        content = io.BytesIO()
        figure.savefig(content, format=path.suffix[1:] or None)
        checkpoint.replace(path, content.getvalue())
        plt.close(figure)


def draw_guess(axis: Any, task: type[Task]) -> None:
    """A line for who knows nothing of the input, where the first measure of the task is drawn."""
    title, value = task.guess
    value *= next(iter(task.measures.values())).factor
    axis.axhline(value, color=FAINT, linewidth=0.8, linestyle=":")
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right"}
    axis.annotate(title, (1, value), (0, 3), color=FAINT, fontsize=8, **place)


@torch.no_grad()
def activity(model: Model, inputs: Tensor) -> Tensor:
    """Which unit was active at which step: bool `(N, units, steps)`."""
    model.eval()
    active = []
    for part in inputs.split(AT_ONCE):
        with record(model.rnn) as records:
            model(part.to(next(model.parameters()).device))
        active.append(records[0].active[0].cpu().permute(1, 2, 0))
    return torch.cat(active)


@torch.no_grad()
def draw_units(folder: Path, task: Task, model: Model) -> None:
    """For a few examples not trained on: the example, and for each unit where it was active. Averages over more go to a file.

    They are validation examples where there are any, else test examples.
    """
    examples = (task.valid if task.args.valid else task.test)(task.args.size)
    inputs = examples.inputs[:AVERAGED]
    share = activity(model, inputs).double().mean(0)
    content = {"sequences": len(inputs), "active": [[round(value, 3) for value in unit] for unit in share.tolist()]}
    checkpoint.replace(folder / ACTIVITY, (json.dumps(content) + "\n").encode())

    inputs, targets = task.samples(examples)
    active, ink = task.places(activity(model, inputs), task.args).numpy(), task.ink(inputs).numpy()
    wanted = task.spell(targets)
    read = task.spell(task.answer(model(inputs.to(next(model.parameters()).device)).cpu()))
    samples, units, height, _ = active.shape
    images = height > 1  # side by side, units below each other; a sequence is long and has a line of its own
    rows, columns, wide, high = (1 + units, samples, 0.95, 0.95) if images else (samples, 1 + units, 1.9, 0.3)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            rows, columns, figsize=(wide * columns, high * rows), squeeze=False,
            gridspec_kw={"wspace": 0.08, "hspace": 0.08 if images else 0.5},
        )  # fmt: skip
        for axis in grid.flat:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(visible=True, color="#d5d8dc", linewidth=0.6)
        axes = grid.T if images else grid  # sample and unit
        aspect = "equal" if images else "auto"
        for sample in range(samples):
            axis, shade = axes[sample, 0], FAINT if read[sample] == wanted[sample] else WRONG
            axis.imshow(np.where(ink[sample, ..., None], colors.to_rgb(INK), colors.to_rgb(PAPER)), aspect=aspect)
            place = {"ha": "center" if images else "right", "transform": axis.transAxes}
            x, y, below = (0.5, 1.24, 1.06) if images else (-0.06, 0.5, -0.2)
            axis.text(x, y, wanted[sample], fontsize=13 if images else 8, **place)
            axis.text(x, below, f"read as {read[sample]}", color=shade, fontsize=7, **place)
            for unit in range(units):
                image = paint(ink[sample], active[sample, unit], colors.to_rgb(f"C{unit}"))
                axes[sample, 1 + unit].imshow(image, aspect=aspect)
        titles = [("input", LINES), *((f"unit {unit}\n{share[unit].mean():.0%}", f"C{unit}") for unit in range(units))]
        for axis, (title, color) in zip(axes[0], titles, strict=True):
            if images:
                place = {"ha": "right", "va": "center", "transform": axis.transAxes}
                axis.text(-0.1, 0.5, title, fontsize=9, fontweight="bold", color=color, **place)
            else:
                axis.set_title(title, fontsize=9, color=color, loc="center")
        figure.savefig(folder / UNITS)
        plt.close(figure)


def paint(ink: np.ndarray, active: np.ndarray, color: tuple[float, float, float]) -> np.ndarray:
    """An image of one unit: in `color` where it was active, grey elsewhere, and darker where the input has ink."""
    color = np.array(color)
    image = np.full((*ink.shape, 3), 1.0)
    image[~active & ink] = 0.8
    image[active & ~ink] = 1 - 0.3 * (1 - color)
    image[active & ink] = 0.75 * color
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="the metrics.jsonl of a run")
    parser.add_argument("picture", type=Path, help="the file to draw the curves into")
    args = parser.parse_args()
    header, *epochs = checkpoint.read_metrics(args.log)
    if not epochs:
        sys.exit(f"error: {args.log}: no epoch is in it yet")
    print(table(header, chosen(epochs)))
    draw_curves(args.picture, header, epochs)


if __name__ == "__main__":
    main()
