"""A run in a table and two pictures: accuracy and loss over the epochs; what the units did, pixel by pixel.

python report.py LOG PICTURE             # table and first picture once more, from metrics.jsonl alone
"""

import argparse
from pathlib import Path
from typing import Any

import checkpoint
import matplotlib.pyplot as plt
import numpy as np
import torch
from data import Digits
from matplotlib import colors
from model import Classifier
from torch import Tensor

from rim_rnn import record

plt.switch_backend("Agg")  # needs no display

CURVES, UNITS = "curves.png", "units.png"
FILES = (checkpoint.CHECKPOINT, checkpoint.METRICS, CURVES, UNITS)

INK, PAPER, FAINT, WRONG = "#22252a", "#ffffff", "#8b9098", "#c0392b"
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "savefig.bbox": "tight",
}


def table(name: str, results: dict[str, Any]) -> str:
    """Accuracy and loss at each size, as a table in Markdown."""
    sizes = list(results["test_accuracy"])
    rows = [
        [name, *(f"{size}x{size}" for size in sizes)],
        ["---", *("---:" for _ in sizes)],
        ["test accuracy, %", *(f"{100 * results['test_accuracy'][size]:.1f}" for size in sizes)],
        ["test loss", *(f"{results['test_loss'][size]:.3f}" for size in sizes)],
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw_curves(path: Path, header: dict[str, Any], epochs: list[dict[str, Any]]) -> None:
    """Accuracy and loss over the epochs, on the training digits and at each size of test."""
    args = header["arguments"]
    sizes = list(epochs[0]["test_accuracy"])
    shades = plt.get_cmap("viridis")(np.linspace(0.1, 0.85, len(sizes)))
    steps = [line["epoch"] for line in epochs]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
        for axis, name, factor in zip(axes, ("accuracy", "loss"), (100, 1), strict=True):
            train = [factor * line[f"train_{name}"] for line in epochs]
            axis.plot(steps, train, color=FAINT, ls="--", marker=".", label=f"training, {args['size']}x{args['size']}")
            for size, shade in zip(sizes, shades, strict=True):
                test = [factor * line[f"test_{name}"][size] for line in epochs]
                axis.plot(steps, test, color=shade, marker=".", label=f"test, {size}x{size}")
            axis.set_xlabel("epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(axis="y", color="#e6e8eb", linewidth=0.8)
        axes[0].set(title="accuracy, %", ylim=(0, 100))
        axes[0].axhline(10, color=FAINT, linewidth=0.8, linestyle=":")
        axes[0].annotate("chance", (steps[0], 10), (0, -10), textcoords="offset points", color=FAINT, fontsize=8)
        axes[1].set(title="cross-entropy", ylim=(0, None))
        axes[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
        plural = "s" * (args["input_size"] > 1)
        figure.suptitle(
            f"{args['model']}, {args['hidden_size']} hidden, {args['input_size']} pixel{plural} per step, seed {args['seed']}",
            x=0.01, ha="left",
        )  # fmt: skip
        figure.savefig(path)
        plt.close(figure)


@torch.no_grad()
def activity(model: Classifier, inputs: Tensor, size: int) -> np.ndarray:
    """Which unit was active at which pixel: bool `(digits, units, size, size)`, from what `Digits.sequences` gave."""
    model.eval()
    with record(model.rnn) as records:
        model(inputs.to(next(model.parameters()).device))
    active = records[0].active[0].cpu()  # (steps, digits, units)
    pixels = active.repeat_interleave(inputs.shape[2], dim=0)[: size * size]
    return pixels.permute(1, 2, 0).unflatten(2, (size, size)).numpy()


@torch.no_grad()
def draw_units(path: Path, model: Classifier, test: Digits, size: int, input_size: int) -> None:
    """For the first test digit of each class: the digit, and for each unit the pixels at which it was active."""
    chosen = [int((test.labels == label).nonzero()[0]) for label in test.labels.unique()]
    digits = Digits(test.images[chosen], test.labels[chosen])
    inputs = digits.sequences(size, input_size)
    active = activity(model, inputs, size)
    guesses = model(inputs.to(next(model.parameters()).device)).argmax(1).tolist()
    pixels = inputs.flatten(1)[:, : size * size].view(-1, size, size).bool().numpy()
    units, share = active.shape[1], active.mean((0, 2, 3))

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(chosen), 1 + units, figsize=(0.95 * (1 + units), 0.95 * len(chosen)), squeeze=False,
            gridspec_kw={"wspace": 0.08, "hspace": 0.08},
        )  # fmt: skip
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(visible=True, color="#d5d8dc", linewidth=0.6)
        for row, (label, guess) in enumerate(zip(digits.labels.tolist(), guesses, strict=True)):
            axes[row, 0].imshow(np.where(pixels[row, ..., None], colors.to_rgb(INK), colors.to_rgb(PAPER)))
            axes[row, 0].set_ylabel(f"{label}\n", rotation=0, ha="right", va="center", fontsize=13)
            shade = FAINT if guess == label else WRONG
            place = {"ha": "right", "transform": axes[row, 0].transAxes, "fontsize": 7}
            axes[row, 0].text(-0.06, 0.12, f"read as {guess}", color=shade, **place)
            for unit in range(units):
                axes[row, 1 + unit].imshow(paint(pixels[row], active[row, unit], colors.to_rgb(f"C{unit}")))
        axes[0, 0].set_title("digit", fontsize=9, loc="center")
        for unit in range(units):
            axes[0, 1 + unit].set_title(f"unit {unit}\n{share[unit]:.0%}", fontsize=9, color=f"C{unit}", loc="center")
        figure.savefig(path)
        plt.close(figure)


def paint(ink: np.ndarray, active: np.ndarray, color: tuple[float, float, float]) -> np.ndarray:
    """An image of one unit: in `color` where it was active, grey elsewhere, and darker where the digit has ink."""
    color = np.array(color)
    image = np.full((*ink.shape, 3), 1.0)
    image[~active & ink] = 0.8
    image[active & ~ink] = 1 - 0.3 * (1 - color)
    image[active & ink] = 0.75 * color
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="the metrics.jsonl of a run")
    parser.add_argument("picture", type=Path, help="the file to draw accuracy and loss into")
    args = parser.parse_args()
    header, *epochs = checkpoint.read_metrics(args.log)
    print(table(header["arguments"]["model"], epochs[-1]))
    draw_curves(args.picture, header, epochs)


if __name__ == "__main__":
    main()
