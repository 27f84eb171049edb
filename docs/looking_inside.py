"""Draw docs/_static/looking_inside.svg: which unit takes which step, after training on two interleaved sources.

Each step shows a value from one of two sources; the model is asked for the value that this source showed the time before.
`RIM_RNN_NATIVE=0 python docs/looking_inside.py` trains five seeds, some minutes on one core, writes what it measured to
docs/looking_inside.json and draws that. The readable path, so that the same commit gives the same runs with and without the
native operator.
"""

import json
import platform
import subprocess
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.nn import functional as F

from rim_rnn import RIM, record

HERE = Path(__file__).parent
SOURCES, VALUES, LENGTH, BATCH, STEPS, SEEDS = 2, 4, 20, 64, 3000, 5
COLOURS = ["#c2570c", "#2f6fd0"]


def draw_batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs ``(LENGTH, size, SOURCES + VALUES)``, the source of each step and the value to name, ``(LENGTH, size)``."""
    source, value = torch.randint(SOURCES, (LENGTH, size)), torch.randint(VALUES, (LENGTH, size))
    shown, target = torch.zeros(SOURCES, size, dtype=torch.long), []
    for s, v in zip(source.split(1), value.split(1), strict=True):
        target.append(shown.gather(0, s))
        shown = shown.scatter(0, s, v)
    return torch.cat([F.one_hot(source, SOURCES), F.one_hot(value, VALUES)], dim=-1).float(), source, torch.cat(target)


def train(seed: int) -> dict[str, object]:
    """Train one layer; what it got right, how often each unit took a step of each source, and one sequence."""
    torch.manual_seed(seed)
    rnn, head = RIM(SOURCES + VALUES, 32, num_units=4, k=1), nn.Linear(32, VALUES)
    parameters = [*rnn.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=5e-3)
    for _ in range(STEPS):
        input, _, target = draw_batch(BATCH)
        loss = F.cross_entropy(head(rnn(input)[0]).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    input, source, target = draw_batch(1024)
    with torch.no_grad(), record(rnn) as records:
        named = head(rnn(input)[0]).argmax(-1)
    active = records[0].active[0]
    return {
        "seed": seed,
        "accuracy": (named == target).double().mean().item(),
        "share": [active[source == s].double().mean(0).tolist() for s in range(SOURCES)],
        "source": source[:, 0].tolist(),
        "unit": active[:, 0].int().argmax(-1).tolist(),
    }


def draw(runs: list[dict]) -> None:
    """Above one sequence of seed 1, below every run's share of the steps by unit and source."""
    ink = "#7d8590"
    plt.rcParams.update({"font.size": 9, "svg.hashsalt": "rim-rnn", "axes.edgecolor": ink, "axes.spines.right": False})
    plt.rcParams.update({f"{name}.color": ink for name in ("text", "xtick", "ytick")} | {"axes.labelcolor": ink})
    plt.rcParams.update({"axes.spines.top": False, "axes.titlesize": 9, "axes.titlecolor": ink})
    figure = plt.figure(figsize=(4.6, 4.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1])

    axes = above.subplots()
    for t, (source, unit) in enumerate(zip(runs[1]["source"], runs[1]["unit"], strict=True)):
        axes.add_patch(plt.Rectangle((t + 0.06, unit + 0.1), 0.88, 0.8, color=COLOURS[source]))
    axes.set(xlim=(0, LENGTH), ylim=(4, 0), xlabel="step", ylabel="unit", title="the unit that won, one sequence, seed 1")
    axes.set_yticks([0.5, 1.5, 2.5, 3.5], ["0", "1", "2", "3"])
    axes.set_xticks([0.5, 4.5, 9.5, 14.5, 19.5], ["0", "4", "9", "14", "19"])
    axes.tick_params(length=0)

    for column, (axes, run) in enumerate(zip(below.subplots(1, len(runs), sharey=True), runs, strict=True)):
        for source, share in enumerate(run["share"]):
            places = [unit + 0.3 + 0.4 * source for unit in range(4)]
            axes.barh(places, share, 0.36, color=COLOURS[source], label=f"source {source}")
        axes.set(xlim=(0, 1), ylim=(4, 0), title=f"seed {run['seed']}")
        axes.set_xticks([0, 1])
        axes.tick_params(length=0)
        if column == 0:
            axes.set_ylabel("unit")
            axes.set_yticks([0.5, 1.5, 2.5, 3.5], ["0", "1", "2", "3"])
            handles = axes.get_legend_handles_labels()
    below.supxlabel("share of the source's steps that the unit won", fontsize=9, color=ink)
    below.legend(*handles, loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(HERE / "_static" / "looking_inside.svg", transparent=True, metadata={"Date": None})


def main() -> None:
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=True)
    log = {
        "command": "RIM_RNN_NATIVE=0 python docs/looking_inside.py",
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, 1 thread",
        "torch": torch.__version__,
        "runs": [train(seed) for seed in range(SEEDS)],
    }
    (HERE / "looking_inside.json").write_text(json.dumps(log, indent=1) + "\n")
    draw(log["runs"])


if __name__ == "__main__":
    main()
