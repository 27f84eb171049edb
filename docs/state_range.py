"""Draw docs/_static/state_range.svg: how large the state becomes over 10,000 steps, with the bound and as printed.

One layer, `RIM(10, 120)`, 6 units of which 4 are active, reads 8 rows of standard normal numbers; its weights are those it
begins with, then the same with those of the communication times 5. `RIM_RNN_NATIVE=0 python docs/state_range.py` runs five
seeds, some minutes on one core, writes what it measured to docs/state_range.json and draws that. The readable path, so that the
same commit gives the same runs with and without the native operator.
"""

import json
import platform
import subprocess
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import torch
from matplotlib import pyplot as plt

from rim_rnn import RIM

HERE = Path(__file__).parent
STEPS, ROWS, SEEDS, SCALES = 10_000, 8, 5, (1, 5)
SHOWN = sorted({round(10 ** (i / 20)) for i in range(81)})
COLOURS = {True: "#2f6fd0", False: "#c2570c"}


@torch.no_grad()
def run(seed: int, rnn_cell: str, bounded: bool, scale: int) -> dict[str, object]:
    """The largest ``|h|`` so far at some steps, up to the last at which all are finite."""
    torch.manual_seed(seed)
    rnn = RIM(10, 120, rnn_cell=rnn_cell, comm_bounded=bounded)
    for parameter in rnn.cells[0].communication.parameters():
        parameter.mul_(scale)
    largest = rnn(torch.randn(STEPS, ROWS, 10))[0].abs().amax(dim=(1, 2))
    finite = int(largest.isfinite().int().cumprod(0).sum())
    so_far = largest[:finite].cummax(0).values.tolist()
    steps = sorted({step for step in (*SHOWN, finite) if step <= finite})
    found = {"step": steps, "largest": [float(f"{so_far[step - 1]:.4g}") for step in steps]}
    return {"seed": seed, "rnn_cell": rnn_cell, "comm_bounded": bounded, "times": scale, "finite_steps": finite} | found


def draw(runs: list[dict]) -> None:
    """LSTM and GRU units side by side: linear up to 2, logarithmic above."""
    ink = "#7d8590"
    plt.rcParams.update({"font.size": 9, "svg.hashsalt": "rim-rnn", "axes.edgecolor": ink, "axes.spines.right": False})
    plt.rcParams.update({f"{name}.color": ink for name in ("text", "xtick", "ytick")} | {"axes.labelcolor": ink})
    plt.rcParams.update({"axes.spines.top": False, "axes.titlesize": 9, "axes.titlecolor": ink})
    figure, both = plt.subplots(1, 2, figsize=(6.4, 3.4), sharey=True, layout="constrained")
    for axes, rnn_cell in zip(both, ("LSTM", "GRU"), strict=True):
        for each in (r for r in runs if r["rnn_cell"] == rnn_cell):
            style = {"color": COLOURS[each["comm_bounded"]], "lw": 1.1, "ls": "-" if each["times"] > 1 else (0, (2, 2))}
            if each["comm_bounded"] and each["times"] == 1:
                style |= {"ls": (2, (2, 2))}  # between the dashes of the printed equation, which is as small there
            axes.plot(each["step"], each["largest"], **style)
            if each["finite_steps"] < STEPS:
                axes.plot(each["step"][-1:], each["largest"][-1:], "x", color=style["color"], ms=5)
        axes.axhline(2 if rnn_cell == "LSTM" else 1, color=ink, lw=0.8, ls=":")
        axes.set(xscale="log", xlim=(1, STEPS), ylim=(0, 3e38), xlabel="step", title=f"{rnn_cell} units")
        axes.set_yscale("symlog", linthresh=2, linscale=16)
        axes.set_yticks([0, 1, 2, 1e10, 1e20, 1e30], ["0", "1", "2", "$10^{10}$", "$10^{20}$", "$10^{30}$"])
        axes.set_xticks([1, 10, 100, 1000, 10000], ["1", "10", "100", "1,000", "10,000"])
        axes.minorticks_off()
        axes.tick_params(length=0)
    both[0].set_ylabel("largest $|h|$ so far")
    for (bounded, scale), words in {
        (False, 5): "as printed, weights of the communication times 5",
        (True, 5): "bounded, the same weights",
        (False, 1): "as printed, weights as initialised",
        (True, 1): "bounded, the same weights",
    }.items():
        both[0].plot([], [], color=COLOURS[bounded], lw=1.1, ls="-" if scale > 1 else (0, (2, 2)), label=words)
    figure.get_layout_engine().set(wspace=0.06)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(HERE / "_static" / "state_range.svg", transparent=True, metadata={"Date": None})


def main() -> None:
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=True)
    runs = [
        run(seed, rnn_cell, bounded, scale)
        for rnn_cell in ("LSTM", "GRU")
        for scale in SCALES
        for bounded in (True, False)
        for seed in range(SEEDS)
    ]
    log = {
        "command": "RIM_RNN_NATIVE=0 python docs/state_range.py",
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, 1 thread",
        "torch": torch.__version__,
    }
    lines = ",\n".join(json.dumps(each) for each in runs)
    (HERE / "state_range.json").write_text(f'{json.dumps(log, indent=1)[:-2]},\n "runs": [\n{lines}\n]}}\n')
    draw(runs)


if __name__ == "__main__":
    main()
