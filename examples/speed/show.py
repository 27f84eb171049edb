"""What measure.py and ablations.py have measured: as text, as Markdown tables of README and documentation, as pictures.

python examples/speed/show.py results/native.json                     # print the text, draw the pictures
python examples/speed/show.py results/native.json --write README.md   # put the tables between README's marks
python examples/speed/show.py results/native.json --check README.md   # fail unless what stands there is this
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullLocator

sys.path.append(str(Path(__file__).parents[1]))
from common import put

plt.switch_backend("Agg")  # needs no display

Entry = dict[str, Any]
WAYS = {"forward": "forward", "train": "forward + backward"}
SCALED = {"steps": "steps T", "batch": "batch N", "hidden_size": "hidden size", "num_units": "units", "k": "active units k"}
GROUPS = {
    "native": "without, in the native operator",
    "readable": "without, on the readable path",
    "lost": "another way, instead of what is there",
}
WRITER = "examples/speed/show.py"
NOT_YET = "Not measured yet."

INK = "#7d8590"  # to be read on a light and on a dark page, which shows through
COLOUR = {"forward": "#7fb2d9", "train": "#1f5f99", "RIM": "#1f5f99", "torch": "#d9822b"}
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.2,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "savefig.bbox": "tight",
    "savefig.transparent": True,
}


def ratios(entry: Entry, way: str, over: str = "torch", under: str = "RIM") -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the rounds' ratios, by default torch's time over ours."""
    seconds = entry["seconds"][way]
    low, middle, high = np.percentile(np.divide(seconds[over], seconds[under]), [25, 50, 75])
    return float(low), float(middle), float(high)


def milliseconds(entry: Entry, way: str, name: str) -> float:
    """The median of the rounds."""
    return float(1e3 * np.median(entry["seconds"][way][name]))


def rate(entry: Entry) -> float:
    """Floating-point operations per second of the large matrix product, in the median round of the faster library."""
    return float(entry["product"]["flops"] / min(np.median(rounds) for rounds in entry["product"]["seconds"].values()))


def floor(entry: Entry, way: str, name: str = "RIM") -> float:
    """Milliseconds that the arithmetic would take at that rate."""
    return 1e3 * entry["flops"][way][name] / rate(entry)


def figure(value: float) -> str:
    """Three digits that count, without an exponent."""
    return f"{value:,.{max(0, 2 - int(np.floor(np.log10(value))))}f}" if value > 0 else "0"


def times(value: float) -> str:
    """A ratio: two decimals, and none that mean nothing."""
    return f"{value:.2f}" if 0.1 <= value < 10 else figure(value)


def layer_name(entry: Entry) -> str:
    return f"nn.{entry['case']['rnn_cell']}"


def effect(entry: Entry) -> str:
    """One ablation in a line, as it is printed while measuring: what takes how many times as long."""
    parts = [
        f"{name} {' and '.join(times(ratios(case, way, 'without', 'with')[1]) for way in WAYS)}"
        for name, case in entry["cases"].items()
    ]
    return ", ".join(parts)


def line(entry: Entry) -> str:
    """One entry in a line, as it is printed while measuring."""
    if "bytes" in entry:
        ours, torchs = (entry["bytes"][name] / 2**20 for name in ("RIM", "torch"))
        return f"peak memory RIM {figure(ours)} MiB, {layer_name(entry)} {figure(torchs)} MiB"
    if "first_seconds" in entry:
        return ", ".join(
            f"{way} one graph {figure(ratios(entry, way, 'one graph', 'a graph each')[1])} a graph each" for way in WAYS
        )
    if "compile_seconds" in entry:
        return ", ".join(f"{way} eager {figure(ratios(entry, way, 'RIM', 'compiled')[1])} compiled" for way in WAYS)
    over = "rival" if "rival" in entry["seconds"]["forward"] else "torch"
    return ", ".join(f"{way} {figure(ratios(entry, way, over)[1])}" for way in WAYS)


def columns(rows: list[list[str]]) -> str:
    """Rows of text, the first column flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def text(document: Entry) -> str:
    """Everything, as it is printed at the end."""
    parts = [origin(document)]
    if cases := {**document.get("cases", {}), **document.get("everyday", {})}:
        rows = [["case", "way", "RIM ms", "torch ms", "torch/RIM", "quartiles", "floor ms", "RIM/floor", "winners' floor ms"]]
        for name, entry in cases.items():
            for way in WAYS:
                low, middle, high = ratios(entry, way)
                ours, least = milliseconds(entry, way, "RIM"), floor(entry, way)
                rows.append([name, way, figure(ours), figure(milliseconds(entry, way, "torch")), times(middle)])
                rows[-1] += [f"{times(low)} to {times(high)}", figure(least), f"{ours / least:.1f}"]
                rows[-1] += [figure(floor(entry, way, "RIM, winners only"))]
        products: dict[str, list[float]] = {}
        for entry in cases.values():
            for name, rounds in entry["product"]["seconds"].items():
                products.setdefault(name, []).append(entry["product"]["flops"] / np.median(rounds) / 1e9)
        rates = [f"{name} {min(rates):.0f} to {max(rates):.0f} GFLOP/s" for name, rates in products.items()]
        parts += [columns(rows), f"floor: arithmetic over the rate of a large product, the faster of {', '.join(rates)}"]
    for section in ("scaling", "calls"):
        rows = [[section, *(f"{way} {name} ms" for way in WAYS for name in ("RIM", "torch"))]]
        for size, entry in document.get(section, {}).items():
            rows.append([size, *(figure(milliseconds(entry, way, name)) for way in WAYS for name in ("RIM", "torch"))])
        if rows[1:]:
            parts.append(columns(rows))
    if compiled := document.get("compiled"):
        names = list(dict.fromkeys(name for entry in compiled.values() for name in entry["seconds"]["forward"]))
        rows = [["compiled", "way", *(f"{name} ms" for name in names), "to compile s"]]
        for case, entry in compiled.items():
            for way in WAYS:
                rows.append([case, way, *(figure(milliseconds(entry, way, name)) for name in names)])
                rows[-1].append(figure(entry["compile_seconds"][way]))
        parts.append(columns(rows))
    if "lengths" in document:
        parts.append(lengths_table(document, ""))
    if memory := document.get("memory"):
        rows = [["peak memory, training", "RIM MiB", "torch MiB", "RIM/torch"]]
        for size, entry in memory.items():
            ours, torchs = (entry["bytes"][name] / 2**20 for name in ("RIM", "torch"))
            rows.append([size, figure(ours), figure(torchs), f"{ours / torchs:.2f}" if torchs else ""])
        parts.append(columns(rows))
    for entry in document.get("rival", {}).values():
        rows = [["first public implementation", "its ms", "/RIM", "/RIM of equal sizes"]]
        for way in WAYS:
            both = [ratios(entry, way, "rival", name)[1] for name in ("RIM", "RIM, equal sizes")]
            rows.append([way, figure(milliseconds(entry, way, "rival")), *(f"{ratio:.1f}" for ratio in both)])
        parts.append(columns(rows))
    if ablations := document.get("ablations"):
        rows = [["without", "case", "way", "ms with", "ms without", "without/with", "quartiles"]]
        for what, entry in ablations.items():
            for name, case in entry["cases"].items():
                for way in WAYS:
                    low, middle, high = ratios(case, way, "without", "with")
                    both = [figure(milliseconds(case, way, side)) for side in ("with", "without")]
                    rows.append([what, name, way, *both, times(middle), f"{times(low)} to {times(high)}"])
        parts.append(columns(rows))
    return "\n\n".join(parts)


def origin(document: Entry) -> str:
    """Where the figures come from, in two sentences."""
    about, runs = document["setup"], document["runs"].values()
    commits = ", ".join(sorted({run["commit"] or "not under version control" for run in runs}))
    versions = ", ".join(sorted({run["version"] for run in runs}))
    days = sorted({run[:10] for run in document["runs"]})
    return (
        f"{'SMOKE TEST, no figures. ' if about['smoke'] else ''}{about['cpu']}, {about['threads']} of {about['cores']} cores "
        f"({about['instructions']}), {about['system']}, {about['dtype']}, torch {about['torch']}, Python {about['python']}. "
        f"rim-rnn {versions} ({about['path']} path), commit {commits}, {' to '.join(sorted({days[0], days[-1]}))}."
    )


def grid(rows: list[list[str]], right: int) -> str:
    """A Markdown table; the first row is its head, and columns from `right` on are flush right."""
    line = ["---:" if column >= right else "---" for column in range(len(rows[0]))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], line, *rows[1:]])


def commands(document: Entry) -> str:
    """The commands that made the figures, as a block of code."""
    return "\n".join(f"    {command}" for command in sorted({run["command"] for run in document["runs"].values()}))


def in_short(document: Entry, stem: str) -> str:
    """How the two layers compare on this machine, in a sentence or two: what a reader wants to know before any table."""

    def beside(entry: Entry, way: str) -> str:
        middle = ratios(entry, way)[1]
        return f"**{times(middle)} times as fast**" if middle >= 1 else f"**1/{1 / middle:.0f} as fast**"

    about, paper = document["setup"], document["cases"]["paper"]
    gpu = "capability" in about["instructions"]
    name = about["cpu"].split(" (")[0].split(",")[0]
    where = f"GPU ({name})" if gpu else f"CPU ({name}, {about['threads']} cores)"
    sentence = (
        f"On a {where}, at the paper's size ({paper['sizes']}), `RIM` is {beside(paper, 'forward')} as `nn.LSTM` forward and "
        f"{beside(paper, 'train')} in training."
    )
    parts = []
    for cell in ("LSTM", "GRU"):
        entries = [entry for entry in document.get("everyday", {}).values() if entry["case"]["rnn_cell"] == cell]
        if entries:
            middles = [ratios(entry, "train")[1] for entry in entries]
            parts.append(f"{times(min(middles))} to {times(max(middles))} times as fast as `nn.{cell}`")
    return sentence + f" At everyday sizes, in training: {', '.join(parts)}." * bool(parts)


def cases_table(document: Entry, stem: str) -> str:
    """Each case beside torch's layer, with its origin and its picture below: README and documentation."""
    rows = [["case", "sizes", *(cell for title in WAYS.values() for cell in (f"`RIM`, {title}", "`nn.LSTM` / `RIM`"))]]
    cases = document["cases"]
    for name, entry in cases.items():
        row = [name, entry["sizes"]]
        for way in WAYS:
            low, middle, high = ratios(entry, way)
            row += [f"{figure(milliseconds(entry, way, 'RIM'))} ms", f"**{times(middle)}** ({times(low)} to {times(high)})"]
        rows.append(row)
    rounds = sorted({len(entry["seconds"]["forward"]["RIM"]) for entry in cases.values()})
    below = [
        "Above 1 `RIM` is the faster one; the row `gru` is beside `nn.GRU`. "
        f"Medians of {' to '.join(map(str, sorted({rounds[0], rounds[-1]})))} rounds in turns, in brackets the quartiles. "
        + origin(document)
    ]
    if memory := document.get("memory"):
        entry = list(memory.values())[-1]
        ours, torchs = (entry["bytes"][which] / 2**20 for which in ("RIM", "torch"))
        below.append(
            f"A training step of {entry['sizes']} needs {figure(ours)} MiB at its peak, "
            f"with `{layer_name(entry)}` {figure(torchs)} MiB."
        )
    for entry in document.get("rival", {}).values():
        low, high = (ratios(entry, way, "rival")[1] for way in WAYS)
        below.append(
            "The first public implementation (dido1998/Recurrent-Independent-Mechanisms) takes "
            f"{low:.1f} times as long as `RIM` forward and {high:.1f} times forward + backward, at {entry['sizes']}."
        )
    picture = f"![For each case, the time of nn.LSTM over the time of RIM]({stem}-ratios.png)"
    return "\n\n".join([grid(rows, 2), *below, commands(document), picture])


def everyday_table(document: Entry, stem: str) -> str:
    """The sizes that people use: ratios, and how far from the floor both ways are."""
    needed = "RIM, winners only"
    head = ["case", "sizes", "arithmetic of `RIM` / `nn`"]
    rows = [[*head, *(cell for title in WAYS.values() for cell in (f"`RIM`, {title}", "`nn` / `RIM`", "`RIM` / floor"))]]
    for name, entry in document.get("everyday", {}).items():
        row = [name, entry["sizes"], times(entry["flops"]["forward"][needed] / entry["flops"]["forward"]["torch"])]
        for way in WAYS:
            ours, least = milliseconds(entry, way, "RIM"), floor(entry, way, needed)
            row += [f"{figure(ours)} ms", f"**{times(ratios(entry, way)[1])}**", f"{ours / least:.1f}"]
        rows.append(row)
    return "\n\n".join([grid(rows, 2), origin(document)]) if rows[1:] else NOT_YET


def floor_table(document: Entry, stem: str) -> str:
    """How much arithmetic each case needs, and how long that would take at the rate of a large product."""
    needed = "RIM, winners only"
    head = ["case", "arithmetic of `RIM` / `nn.LSTM`"]
    rows = [[*head, *(cell for title in WAYS.values() for cell in (f"`RIM`, {title}", "floor", "`RIM` / floor"))]]
    for name, entry in document["cases"].items():
        row = [name, times(entry["flops"]["forward"][needed] / entry["flops"]["forward"]["torch"])]
        for way in WAYS:
            ours, least = milliseconds(entry, way, "RIM"), floor(entry, way, needed)
            row += [f"{figure(ours)} ms", f"{figure(least)} ms", f"{ours / least:.1f}"]
        rows.append(row)
    return grid(rows, 1)


def scaling_table(document: Entry, stem: str) -> str:
    """Peak memory, and time as each size doubles."""
    parts = []
    if memory := document.get("memory"):
        rows = [["peak memory of a training step", "`RIM`", "`nn.LSTM`", "`RIM` / `nn.LSTM`"]]
        for entry in memory.values():
            ours, torchs = (entry["bytes"][name] / 2**20 for name in ("RIM", "torch"))
            rows.append([entry["sizes"], f"{figure(ours)} MiB", f"{figure(torchs)} MiB", times(ours / torchs)])
        parts.append(grid(rows, 1))
    if scaling := document.get("scaling"):
        rows = [["size", *(cell for title in WAYS.values() for cell in (f"`RIM`, {title}", "`nn.LSTM` / `RIM`"))]]
        for entry in scaling.values():
            sizes = f"{entry['sizes']}, {entry['case']['num_units']} units, k={entry['case']['k']}"
            ways = [(f"{figure(milliseconds(entry, way, 'RIM'))} ms", times(ratios(entry, way)[1])) for way in WAYS]
            rows.append([sizes, *(cell for way in ways for cell in way)])
        parts.append(grid(rows, 1))
    if parts:
        parts.append(f"![Time and peak memory as each size doubles, RIM and nn.LSTM]({stem}-scaling.png)")
    return "\n\n".join(parts) or NOT_YET


def calls_table(document: Entry, stem: str) -> str:
    """One step: of almost nothing, and as its rows double; and what is left where the rest of a forward cost no time."""
    parts = []
    for way, title in WAYS.items():
        rows = [[f"one step, {title}", "`RIM`", "`nn.LSTM`", "`nn.LSTM` / `RIM`"]]
        rows[0] += ["nothing + floor", "`nn.LSTM` / that"] * (way == "forward")
        for entry in document.get("calls", {}).values():
            ours, torchs = (milliseconds(entry, way, name) for name in ("RIM", "torch"))
            row = [entry["sizes"], f"{figure(1e3 * ours)} μs", f"{figure(1e3 * torchs)} μs", times(ratios(entry, way)[1])]
            if way == "forward":
                nothing = milliseconds(document["calls"]["nothing"], way, "RIM")
                least = nothing + floor(entry, way, "RIM, winners only")
                row += [f"{figure(1e3 * least)} μs", times(torchs / least)]
            rows.append(row)
        parts.append(grid(rows, 1))
    return "\n\n".join(parts) if "calls" in document else NOT_YET


def compiled_table(document: Entry, stem: str) -> str:
    """The readable path as it comes and compiled, beside torch's layer."""
    parts = []
    for way, title in WAYS.items():
        rows = [[f"readable path, {title}", "eager", "compiled", "eager / compiled", "`nn.LSTM` / compiled", "time to compile"]]
        for entry in document.get("compiled", {}).values():
            row = [entry["sizes"], *(f"{figure(milliseconds(entry, way, name))} ms" for name in ("RIM", "compiled"))]
            row += [times(ratios(entry, way, over, "compiled")[1]) for over in ("RIM", "torch")]
            rows.append([*row, f"{figure(entry['compile_seconds'][way])} s"])
        parts.append(grid(rows, 1))
    return "\n\n".join(parts) if "compiled" in document else NOT_YET


def lengths_table(document: Entry, stem: str) -> str:
    """The readable path compiled for several numbers of steps: a graph for each of them, or one for all."""
    rows = [
        [
            "readable path",
            "steps",
            "all compiled, a graph each",
            "one graph",
            "a call: eager / a graph each",
            "eager / one graph",
        ]
    ]
    for entry in document["lengths"].values():
        for way, title in WAYS.items():
            last, seconds = entry["case"]["steps"], entry["first_seconds"][way]
            row = [f"{entry['sizes']}, {title}", f"{last - entry['lengths'] + 1} to {last}"]
            row += [f"{figure(seconds[name])} s" for name in ("a graph each", "one graph")]
            rows.append([*row, *(times(ratios(entry, way, "RIM", name)[1]) for name in ("a graph each", "one graph"))])
    return "\n\n".join([grid(rows, 2), origin(document), commands(document)])


def ablations_table(document: Entry, stem: str) -> str:
    """What takes how many times as long without each optimisation: a table for each group, a column for each case."""
    parts = []
    rounds: set[int] = set()
    for group, title in GROUPS.items():
        entries = {what: entry for what, entry in document["ablations"].items() if entry["group"] == group}
        names = list(dict.fromkeys(name for entry in entries.values() for name in entry["cases"]))
        rows = [[title, *names]]
        for what, entry in entries.items():
            row = [what]
            for name in names:
                cells = []
                for way in WAYS if name in entry["cases"] else ():
                    case = entry["cases"][name]
                    low, middle, high = ratios(case, way, "without", "with")
                    cells.append(f"**{times(middle)}**" if low > 1 or high < 1 else times(middle))
                    rounds.add(len(case["seconds"][way]["with"]))
                row.append(",\N{NO-BREAK SPACE}".join(cells))
            rows.append(row)
        if entries:
            parts.append(grid(rows, 1))
    below = (
        "Time without the optimisation (in the last table: of the other way) over time with it, forward, then forward + "
        f"backward: medians of {' to '.join(map(str, sorted({min(rounds), max(rounds)})))} rounds in turns, bold where both "
        f"quartiles are on one side of 1. {origin(document)}"
    )
    return "\n\n".join([*parts, below, commands(document)])


def terms_table(document: Entry, stem: str) -> str:
    """The cases again, on other terms, and what was also timed as a CUDA graph: times and ratios, and where they come from."""
    graphs = {
        name: entry for name, entry in document.get("compiled", {}).items() if "RIM, graph" in entry["seconds"]["forward"]
    }
    parts = []
    for title, suffix, entries in (
        ("case", "", {**document["cases"], **document.get("everyday", {})}),
        ("as CUDA graphs", ", graph", graphs),
    ):
        rows = [[title, *(cell for title in WAYS.values() for cell in (f"`RIM`, {title}", "`nn.LSTM` / `RIM`"))]]
        for name, entry in entries.items():
            ours, torchs = f"RIM{suffix}", f"torch{suffix}"
            ways = [
                (f"{figure(milliseconds(entry, way, ours))} ms", times(ratios(entry, way, torchs, ours)[1])) for way in WAYS
            ]
            rows.append([name, *(cell for way in ways for cell in way)])
        parts += [grid(rows, 1)] * bool(entries)
    return "\n\n".join([*parts, origin(document), commands(document)])


def ways_table(document: Entry, stem: str) -> str:
    """On a GPU: the layer call by call, compiled, and as a CUDA graph, timed in turns."""
    rows = [["`RIM`", "call by call", "`torch.compile`", "as a CUDA graph", "call by call / graph"]]
    for entry in document["compiled"].values():
        for way, title in WAYS.items():
            row = [f"{entry['sizes']}, {title}"]
            row += [f"{figure(milliseconds(entry, way, name))} ms" for name in ("RIM", "compiled", "RIM, graph")]
            rows.append([*row, times(ratios(entry, way, "RIM", "RIM, graph")[1])])
    return "\n\n".join([grid(rows, 1), f"Medians of rounds in turns. {origin(document)}"])


def tables(document: Entry, stem: str) -> dict[str, str]:
    """Every table of a document under the name of its marks. `stem`: the JSON without its ending, as a page refers to it.

    A log in a folder of results/ has the folder's name.
    """
    folder = Path(stem).parent.name
    short = {"in short": in_short(document, stem)} if "paper" in document.get("cases", {}) else {}
    if "lengths" in document:
        return {folder: lengths_table(document, stem)}
    if folder not in ("", "results"):
        if any("RIM, graph" in entry["seconds"]["forward"] for entry in document.get("compiled", {}).values()):
            short["ways"] = ways_table(document, stem)
        return {folder: terms_table(document, stem)} | {f"{folder}, {name}": table for name, table in short.items()}
    makers = {
        "speed": cases_table,
        "everyday": everyday_table,
        "floor": floor_table,
        "scaling": scaling_table,
        "calls": calls_table,
        "compiled": compiled_table,
    }
    if "ablations" in document:
        makers = {"ablations": ablations_table}
    return {name: maker(document, stem) for name, maker in makers.items()} | {f"speed, {name}": t for name, t in short.items()}


def filled(page: Path, json_file: Path, document: Entry) -> str:
    """The page's text with the document's tables."""
    stem = os.path.relpath(json_file.with_suffix(""), page.parent)
    return put(page.read_text(), tables(document, Path(stem).as_posix()), WRITER)


def draw_ratios(document: Entry, path: Path) -> None:
    """How many times as fast as torch's layer, each case and both ways."""
    cases = document["cases"]
    places = np.arange(len(cases))[::-1]
    with plt.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(8, 0.9 + 0.56 * len(cases)))
        for offset, (way, label) in zip((0.19, -0.19), WAYS.items(), strict=True):
            low, middle, high = np.array([ratios(entry, way) for entry in cases.values()]).T
            y = places + offset
            ax.barh(y, middle - 1, 0.36, left=1, color=COLOUR[way], label=label)
            ax.hlines(y, low, high, color=INK, linewidth=1)
            for place, value, end in zip(y, middle, np.where(middle < 1, low, high), strict=True):
                inward = value < 1
                ax.annotate(
                    times(value),
                    (end, place),
                    (-4 if inward else 4, 0),
                    textcoords="offset points",
                    va="center",
                    ha="right" if inward else "left",
                    fontsize=8.5,
                )
        ax.axvline(1, color=INK, linewidth=1)
        ax.set_xscale("log", base=2)
        least, most = ax.get_xlim()
        ax.set_xlim(min(least, 0.5) / 1.25, max(most, 2) * 1.25)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x > 1 else f"{x:.2g}")
        ax.xaxis.grid(True)
        ax.set_yticks(places, [f"{name}\n" for name in cases], fontweight="bold")
        for place, entry in zip(places, cases.values(), strict=True):
            ax.annotate(
                entry["sizes"],
                (0, place),
                (-6, -6),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                va="center",
                ha="right",
                fontsize=7.5,
                color=INK,
            )
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.set_title("Time of nn.LSTM (gru: nn.GRU) / time of RIM", pad=24)
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, handlelength=1)
        ax.set_xlabel("slower than nn.LSTM  ←  1  →  faster")
        fig.savefig(path)
        plt.close(fig)


def draw_scaling(document: Entry, path: Path) -> None:
    """Time as each size doubles, and peak memory as the number of steps does; both axes logarithmic."""
    panels = [(field, [(k, e) for k, e in document.get("scaling", {}).items() if k.split("=")[0] == field]) for field in SCALED]
    panels = [(field, points) for field, points in panels if points]
    memory = document.get("memory", {})
    count = len(panels) + bool(memory)
    with plt.rc_context(STYLE):
        rows, across = -(-count // 3), min(count, 3)
        fig, axes = plt.subplots(rows, across, figsize=(3.6 * across, 3.2 * rows), squeeze=False, layout="constrained")
        for ax in axes.flat[count:]:
            ax.set_visible(False)
        for ax, (field, points) in zip(axes.flat, panels, strict=False):
            x = [int(key.split("=")[1]) for key, _ in points]
            for name, label in (("RIM", "RIM"), ("torch", "nn.LSTM")):
                for way, style in (("forward", "--"), ("train", "-")):
                    y = [milliseconds(entry, way, name) for _, entry in points]
                    ax.plot(x, y, style, marker="o", markersize=4, color=COLOUR[name], label=f"{label}, {WAYS[way]}")
            label_axes(ax, x, SCALED[field], "milliseconds")
        if memory:
            ax = axes.flat[len(panels)]
            x = [int(key.split("=")[1]) for key in memory]
            for name in ("RIM", "torch"):
                ax.plot(x, [e["bytes"][name] / 2**20 for e in memory.values()], marker="o", markersize=4, color=COLOUR[name])
            label_axes(ax, x, "steps T, paper's case", "peak memory of training, MiB")
        if panels:
            fig.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
        fig.savefig(path)
        plt.close(fig)


def label_axes(ax: plt.Axes, x: list[int], below: str, beside: str) -> None:
    """Logarithmic axes with plain numbers, a tick at every measured size."""
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(x, [str(value) for value in x])
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.grid(True, which="major")
    ax.set_xlabel(below)
    ax.set_ylabel(beside)


def draw(document: Entry, stem: Path) -> list[Path]:
    """The pictures that the measured sections allow, named after `stem`."""
    drawn = []
    for section, ending, picture in (
        (document.get("cases"), "ratios", draw_ratios),
        (document.get("scaling") or document.get("memory"), "scaling", draw_scaling),
    ):
        if section:
            drawn.append(stem.with_name(f"{stem.name}-{ending}.png"))
            picture(document, drawn[-1])
    return drawn


def dump(document: Entry) -> str:
    """JSON for people: indented, but a list of numbers on one line."""
    indented = json.dumps(document, indent=1, ensure_ascii=False)
    return re.sub(r"\[[^\[\]{}]*\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), indented) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--write", type=Path, nargs="+", default=[], metavar="PAGE", help="put the tables into these pages")
    parser.add_argument(
        "--check", type=Path, nargs="+", default=[], metavar="PAGE", help="fail unless these pages have the tables"
    )
    args = parser.parse_args(argv)
    document = json.loads(args.json.read_text())
    for page in args.write:
        page.write_text(filled(page, args.json, document))
    if stale := [str(page) for page in args.check if filled(page, args.json, document) != page.read_text()]:
        sys.exit(f"{', '.join(stale)}: not the tables of {args.json}; --write puts them there")
    if not (args.write or args.check):
        print(text(document))
        for picture in draw(document, args.json.with_suffix("")):
            print(f"wrote {picture}")


if __name__ == "__main__":
    main()
