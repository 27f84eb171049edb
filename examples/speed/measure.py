"""RIM beside the nn.LSTM (or nn.GRU) of the same sizes, in one process, taking turns.

python examples/speed/measure.py                      # everything, some eight minutes
python examples/speed/measure.py cases --cases paper  # one section, one case: the rest of the JSON stays as it is
python examples/speed/measure.py --rival PATH         # also beside the first public implementation, cloned to PATH

The sections:

cases    forward alone (no_grad) and forward with backward, each case of cases.py; and the floor, the arithmetic that the case
         needs over the rate of the machine's fastest large matrix product, measured in the same rounds
everyday the same at the sizes of policies, forecasters and small language models, with LSTM and with GRU units
scaling  the same as steps, batch, hidden size, units and active units double
calls    the same for one step of the sizes of act, of almost nothing and as its batch doubles
compiled the readable path as it comes and under torch.compile, with the time to compile; on a GPU also as a CUDA graph
lengths  the same under torch.compile with four numbers of steps, each unrolled in a graph of its own and all in one graph
memory   peak memory of a training step as the number of steps doubles, each in a process of its own; on Linux
rival    the paper's case beside dido1998/Recurrent-Independent-Mechanisms, whose RIM.py lies in the folder --rival

Each has a process of its own, for the ones before leave their traces in one that is shared. With --device cuda both layers run
on a GPU, ours on the readable path; the sections memory and rival are of a CPU alone.

Measure on a machine that does nothing else. After every measurement native.json (or readable.json, for that path of ours, or
cuda.json) in the folder --out is replaced, and what was there of other sections and cases stays; at the end the pictures are
drawn.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import platform
import runpy
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import show  # lets common be found
import torch
from cases import (
    BASE,
    CALLS,
    CASES,
    COMPILED,
    EVERYDAY,
    LENGTHS,
    MEMORY,
    PAPER,
    SCALING,
    Case,
    Data,
    build,
    calls,
    flops,
    shrink,
)
from common import cpu
from torch.nn import functional as F

import rim_rnn
from rim_rnn import native

HERE = Path(__file__).parent
SECTIONS = ("cases", "everyday", "scaling", "calls", "compiled", "lengths", "memory", "rival")
WAYS = ("forward", "train")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(SECTIONS)}; all if none is given")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="of the section cases; default: all")
    parser.add_argument("--rounds", type=int, default=11, help="turns that each layer takes; default: 11")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own choice")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--path", choices=("native", "readable"), help="which path of ours; default: what the package chooses")
    parser.add_argument("--rival", type=Path, help="a clone of dido1998/Recurrent-Independent-Mechanisms")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the JSON; default: results")
    parser.add_argument("--resume", action="store_true", help="leave out what the JSON already holds of this commit")
    parser.add_argument(
        "--keep-memory", action="store_true", help="let glibc keep the memory it has, so that none is fetched again"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing repeated: shows that everything runs")
    args = parser.parse_args(argv)
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    args.device = torch.device(args.device)
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads should be at least 1")
    if "memory" in args.sections and sys.platform != "linux":
        parser.error("the section memory reads /proc/self/status, which only Linux has")
    if args.device.type != "cpu" and (of_cpu := {"memory", "rival"} & {*args.sections, "rival" if args.rival else ""}):
        parser.error(f"the section {' and '.join(sorted(of_cpu))} is of a CPU alone")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch finds no GPU")
    if "rival" in args.sections and args.rival is None:
        parser.error("the section rival needs --rival PATH")
    if args.rival is not None and not (args.rival / "RIM.py").is_file():
        parser.error(f"--rival {args.rival}: no RIM.py there")
    return args


class Timer(Protocol):
    """What takes a turn: `timeit.Timer`, or whatever else says how many seconds so many calls take."""

    def timeit(self, number: int) -> float: ...


def take_turns(timers: Mapping[str, Timer], rounds: int, least: float) -> dict[str, list[float]]:
    """Seconds per call, one figure per round. A figure is the mean of as many calls as take `least` seconds.

    Every round times each contestant once; every other round goes through them backwards, so that nobody always comes first.
    """
    repeats = {}
    for name, timer in timers.items():
        timer.timeit(1)  # warm-up
        number = 1
        while (seconds := timer.timeit(number)) < least:
            number = max(number + 1, math.ceil(1.1 * number * least / seconds))
        repeats[name] = number
    seconds_of: dict[str, list[float]] = {name: [] for name in timers}
    for turn in range(rounds):
        for name in list(timers)[:: -1 if turn % 2 else 1]:
            seconds_of[name].append(float(f"{timers[name].timeit(repeats[name]) / repeats[name]:.5g}"))
    return seconds_of


class WaitingTimer:
    """Of calls whose work a device does later: until all of it is done."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call

    def timeit(self, number: int) -> float:
        torch.accelerator.synchronize()
        begin = time.perf_counter()
        for _ in range(number):
            self.call()
        torch.accelerator.synchronize()
        return time.perf_counter() - begin


def time_in_turns(contestants: Mapping[str, Callable[[], object]], args: argparse.Namespace) -> dict[str, list[float]]:
    timer: Callable[[Callable[[], object]], Timer] = timeit.Timer if args.device.type == "cpu" else WaitingTimer
    return take_turns({name: timer(call) for name, call in contestants.items()}, args.rounds, args.least)


def compare(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """One case, both ways, RIM and torch's layer and a large matrix product in turns."""
    torch.manual_seed(0)
    data = Data(case, args.device)
    contestants: dict[str, Callable[[], object]] = {}
    for name in ("RIM", "torch"):
        layer = build(name, case).to(args.device)
        if name == "RIM" and (taken := layer.path(data.input).split(":")[0]) != args.path:
            raise RuntimeError(f"{case} takes the path {taken}, not {args.path}")
        for way, call in calls(layer, list(layer.parameters()), data).items():
            contestants[f"{name} {way}"] = call
    size = 32 if args.smoke else 1024
    products = large_products(size, args.device)
    contestants.update(products)
    seconds = time_in_turns(contestants, args)
    return {
        "case": dataclasses.asdict(case),
        "sizes": str(case),
        "seconds": {way: {name: seconds[f"{name} {way}"] for name in ("RIM", "torch")} for way in WAYS},
        "flops": {
            way: {
                "RIM": flops("RIM", case, way == "train"),
                "RIM, winners only": flops("RIM", case, way == "train", winners_only=True),
                "torch": flops("torch", case, way == "train"),
            }
            for way in WAYS
        },
        "product": {"flops": 2 * size**3, "seconds": {name: seconds[name] for name in products}},
    }


def large_products(size: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """A large matrix product by each library that torch has: the machine's rate is that of the faster one.

    On some processors one has twice the rate of the other; `torch.mm` takes MKL or OpenBLAS, `nn.LSTM` takes oneDNN.
    """
    a, b, c = (torch.randn(size, size, device=device) for _ in range(3))
    products: dict[str, Callable[[], object]] = {"torch.mm": lambda: torch.mm(a, b, out=c)}
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        a_there, b_there = a.to_mkldnn(), b.to_mkldnn()
        products["oneDNN"] = lambda: F.linear(a_there, b_there)
    return products


def compare_compiled(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """The readable path as it comes and compiled, and torch's layer; on a GPU both layers also as a CUDA graph."""
    torch.manual_seed(0)
    data = Data(case, args.device)
    layers = {name: build(name, case).to(args.device) for name in ("RIM", "torch")}
    compiled: Any = torch.compile(layers["RIM"], backend="eager" if args.smoke else "inductor")
    contestants = {}
    for name, module, call in (
        *((name, layer, layer) for name, layer in layers.items()),
        ("compiled", layers["RIM"], compiled),
    ):
        for way, run in calls(call, list(module.parameters()), data).items():
            contestants[f"{name} {way}"] = run
            if args.device.type == "cuda" and name != "compiled":
                contestants[f"{name}, graph {way}"] = graphed(run)
    with native.readable():
        taken = {}
        for way in WAYS:
            begin = time.perf_counter()
            contestants[f"compiled {way}"]()
            taken[way] = round(time.perf_counter() - begin, 2)
        seconds = time_in_turns(contestants, args)
    names = dict.fromkeys(name.rpartition(" ")[0] for name in contestants)
    return {
        "case": dataclasses.asdict(case),
        "sizes": str(case),
        "compile_seconds": taken,
        "seconds": {way: {name: seconds[f"{name} {way}"] for name in names} for way in WAYS},
    }


def compare_lengths(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """The readable path compiled for several numbers of steps, the case's and fewer: a graph for each, or one for all."""
    torch.manual_seed(0)
    datas = [
        Data(dataclasses.replace(case, steps=steps), args.device) for steps in range(max(2, case.steps - 3), case.steps + 1)
    ]
    layers = {name: build(name, case).to(args.device) for name in ("RIM", "torch")}
    backend = "eager" if args.smoke else "inductor"
    named: dict[str, Any] = {name: (layer, layer) for name, layer in layers.items()}
    for name, dynamic in (("a graph each", False), ("one graph", True)):
        named[name] = layers["RIM"], torch.compile(layers["RIM"], backend=backend, dynamic=dynamic)
    contestants: dict[str, Callable[[], object]] = {}
    taken: dict[str, dict[str, float]] = {way: {} for way in WAYS}
    with (
        native.readable(),
        torch._dynamo.config.patch(recompile_limit=64),
    ):  # of eight else: all of these graphs are of one forward
        for name, (module, call) in named.items():
            ways = [calls(call, list(module.parameters()), data) for data in datas]
            for way in WAYS:
                begin = time.perf_counter()
                for each in ways:
                    each[way]()
                taken[way][name] = round(time.perf_counter() - begin, 2)
                contestants[f"{name} {way}"] = ways[-1][way]
        seconds = time_in_turns(contestants, args)
    return {
        "case": dataclasses.asdict(case),
        "sizes": str(case),
        "lengths": len(datas),
        "first_seconds": {way: {name: taken[way][name] for name in ("a graph each", "one graph")} for way in WAYS},
        "seconds": {way: {name: seconds[f"{name} {way}"] for name in named} for way in WAYS},
    }


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """All kernels of a call, recorded once and then started together."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), native.readable():
        for _ in range(3):  # what is made at a first call is not recorded
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def compare_memory(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of a training step of RIM and of torch's layer, in bytes."""
    sizes = json.dumps(dataclasses.asdict(case))
    command = [sys.executable, str(HERE / "peak.py")]
    as_users_have_it = {name: value for name, value in os.environ.items() if name not in KEEPS_MEMORY}
    return {
        "case": dataclasses.asdict(case),
        "sizes": str(case),
        "bytes": {
            name: int(subprocess.check_output([*command, name, sizes, str(args.threads)], text=True, env=as_users_have_it))
            for name in ("RIM", "torch")
        },
    }


def compare_rival(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """The first public implementation, our layer as it comes, and our layer with the value size that the other one imposes."""
    torch.manual_seed(0)
    data = Data(case)
    ours = build("RIM", case)
    cell = ours.cells[0]
    n, unit = cell.num_units, cell.hidden_size // cell.num_units
    equal = build("RIM", dataclasses.replace(case, value_size_comm=unit))
    theirs = runpy.run_path(str(args.rival / "RIM.py"))["RIM"](  # hidden_size is that of one unit
        "cpu",
        case.input_size,
        unit,
        n,
        cell.k,
        "LSTM",
        1,
        False,
        input_value_size=4 * unit,
        input_dropout=0.0,
        comm_dropout=0.0,
    )
    first = torch.zeros(1, case.batch, case.hidden_size)  # else it draws a random one
    contestants: dict[str, Callable[[], object]] = {}
    layers = {"RIM": ours, "RIM, equal sizes": equal, "rival": lambda x: theirs(x, first, first)}
    for name, layer in layers.items():
        module = theirs if name == "rival" else layer
        for way, call in calls(layer, list(module.parameters()), data).items():
            contestants[f"{name} {way}"] = call
    seconds = take_turns({name: timeit.Timer(call) for name, call in contestants.items()}, args.rounds, args.least)
    return {
        "case": dataclasses.asdict(case),
        "sizes": str(case),
        "seconds": {way: {name: seconds[f"{name} {way}"] for name in layers} for way in WAYS},
    }


MEASURES = {
    "cases": compare,
    "everyday": compare,
    "scaling": compare,
    "calls": compare,
    "compiled": compare_compiled,
    "lengths": compare_lengths,
    "memory": compare_memory,
    "rival": compare_rival,
}


def here(section: str, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """One measurement in this process, on the threads and the path asked for."""
    torch.set_num_threads(args.threads)
    with native.readable() if args.path == "readable" else contextlib.nullcontext():
        return MEASURES[section](case, args)


KEEPS_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_MMAP_MAX_": "0"}
"""The environment in which glibc keeps the memory it has. Else it gives large pieces back and fetches them again: page faults,
which cost small calls as much as their arithmetic, or not, by the luck of where things lie."""


def apart(section: str, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """One measurement of time in a process of its own, for the cases before leave their traces in one that is shared."""
    if args.keep_memory:
        os.environ.update(KEEPS_MEMORY)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(here, section, case, args).result()


def points() -> dict[str, dict[str, Case]]:
    """Everything that can be measured, by section and name."""
    return {
        "cases": CASES,
        "everyday": EVERYDAY,
        "scaling": {f"{field}={v}": dataclasses.replace(BASE, **{field: v}) for field, vs in SCALING.items() for v in vs},
        "calls": CALLS,
        "compiled": COMPILED,
        "lengths": LENGTHS,
        "memory": {f"{field}={v}": dataclasses.replace(PAPER, **{field: v}) for field, vs in MEMORY.items() for v in vs},
        "rival": {"paper": PAPER},
    }


def git(*command: str) -> str | None:
    """What git says about the measured package's source, `None` where it is not under version control."""
    folder = Path(rim_rnn.__file__).parent
    result = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else None


def commit() -> str | None:
    """The commit of the package that is measured; `+` where its files differ from it."""
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return f"{git('rev-parse', '--short=12', 'HEAD')}{'+' if git('status', '--porcelain', '.') else ''}"


ISA_VARIABLES = ("RIM_RNN_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""With all of them at AVX2, both layers and the products run as on a processor without AVX-512."""


def instructions(path: str, device: torch.device) -> str:
    """The instruction set that our path takes, and torch's if that is another."""
    if device.type == "cuda":
        return "compute capability {}.{}".format(*torch.cuda.get_device_capability(device))
    torchs = torch.backends.cpu.get_cpu_capability()
    ours = native.instruction_set().upper() if path == "native" else torchs
    return ours if ours == torchs else f"{ours}, torch {torchs}"


def choose_path(asked: str | None, device: torch.device) -> str:
    """The path to measure: the one asked for, or the package's own choice."""
    chosen = rim_rnn.RIM(2, 12, device=device).path(torch.zeros(1, 1, 2, device=device))
    if asked == "native" and chosen != "native":
        sys.exit(f"--path native: RIM takes the path {chosen}")
    return asked or ("native" if chosen == "native" else "readable")


def setup(args: argparse.Namespace) -> dict[str, Any]:
    """What all figures of one JSON share."""
    return {
        "path": args.path,
        "cpu": cpu() if args.device.type != "cuda" else f"{torch.cuda.get_device_name(args.device)}, {cpu()}",
        "cores": os.cpu_count(),
        "instructions": instructions(args.path, args.device),
        "threads": args.threads,
        "dtype": "float32",
        "seed": 0,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "smoke": args.smoke,
    }


def command(args: argparse.Namespace) -> str:
    """The command as a reader would give it again."""
    words = [f"{name}={os.environ[name]}" for name in ISA_VARIABLES if name in os.environ]
    words += ["python examples/speed/measure.py", *args.sections, f"--rounds {args.rounds} --path {args.path}"]
    words += [f"--device {args.device}"] * (args.device.type != "cpu")
    words += ["--keep-memory"] * args.keep_memory
    words += [f"--cases {' '.join(args.cases)}"] * (args.cases != list(CASES)) + ["--rival PATH"] * bool(args.rival)
    return " ".join(words)


def this_run(command: str) -> dict[str, Any]:
    """What the figures of one command share."""
    return {
        "command": command,
        "commit": commit(),
        "version": rim_rnn.__version__,
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def write(path: Path, document: dict[str, Any]) -> None:
    """Replace the file in one go: whoever reads it, or is cut off, finds the old figures or the new ones."""
    sections = [entries for name, entries in document.items() if name not in ("setup", "runs")]
    used = {entry["run"] for entries in sections for entry in entries.values()}
    document = {**document, "runs": {run: about for run, about in document["runs"].items() if run in used}}
    partial = path.with_suffix(".partial")
    partial.write_text(show.dump(document))
    partial.replace(path)


def begin(path: Path, setup: dict[str, Any]) -> dict[str, Any]:
    """What the file holds, or an empty document where there is none yet. Exits if it is of another machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return {"setup": setup, "runs": {}}
    document: dict[str, Any] = json.loads(path.read_text())
    if differing := [name for name, value in setup.items() if document["setup"].get(name) != value]:
        sys.exit(f"{path} holds figures of another machine or setup ({', '.join(differing)}): give another folder with --out")
    return document


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    args.path = choose_path(args.path, args.device)
    args.least = 0.0 if args.smoke else 0.05
    args.rounds = 1 if args.smoke else args.rounds

    path = args.out / f"{args.path if args.device.type == 'cpu' else args.device.type}.json"
    document = begin(path, setup(args))
    run(args, path, document)


def run(args: argparse.Namespace, path: Path, document: dict[str, Any]) -> None:
    """Measure what is planned, write after every measurement, and show everything that the document then holds."""
    now, about = datetime.now(timezone.utc).isoformat(timespec="milliseconds"), this_run(command(args))
    if about["load"][0] > 0.5:
        print(f"other processes are running (load {about['load'][0]}): layers whose threads wait for each other look slow")
    document["runs"][now] = about
    on_cpu = args.device.type == "cpu"
    possible = {"memory": sys.platform == "linux" and on_cpu, "rival": args.rival and on_cpu}
    for section in args.sections or [section for section in SECTIONS if possible.get(section, True)]:
        entries = document.get(section, {})
        for name, case in points()[section].items():
            if section == "cases" and name not in args.cases:
                continue
            if args.resume and name in entries and document["runs"][entries[name]["run"]]["commit"] == about["commit"]:
                continue
            take = here if args.smoke or section == "memory" else apart  # memory has processes of its own
            entries[name] = {"run": now, **take(section, shrink(case) if args.smoke else case, args)}
            document[section] = {known: entries[known] for known in points()[section] if known in entries}
            write(path, document)
            print(f"{section} {name}: {show.line(entries[name])}", flush=True)
    print()
    print(show.text(document))
    for picture in show.draw(document, path.with_suffix("")):
        print(f"wrote {picture}")


if __name__ == "__main__":
    main()
