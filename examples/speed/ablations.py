"""What each optimisation brings: undo them one at a time, and time what is left beside the package as it is.

python examples/speed/ablations.py             # all of them, some ten minutes with the builds
python examples/speed/ablations.py gradients   # those whose description has this word: the rest of the JSON stays as it is
python examples/speed/ablations.py --list

Each ablation is an environment variable, or a few pieces of source text and what takes their place. It is put into a copy of
the package in a temporary directory and built there, where it touches the operator. The copy and the untouched package then
run in a process each and take turns, as in measure.py; before that they have to compute the same. Some edits do not undo
anything but stand for another way that was not taken.

Measure on a machine that does nothing else. After every ablation ablations.json in the folder --out is replaced.
"""

import argparse
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import measure
import show
import torch
from cases import CASES, shrink

import rim_rnn

HERE = Path(__file__).parent
PACKAGE = Path(rim_rnn.__file__).parent
ROOT = PACKAGE.parents[1]

STEP, PLAN, GEMM, VEC, AVX512 = (f"csrc/{name}" for name in ("step.h", "rim.cpp", "gemm.h", "vec.h", "avx512.cpp"))
FAST, DEFINITION, DYNAMICS, COMMUNICATION = "fast.py", "step.py", "dynamics.py", "communication.py"


class Ablation(NamedTuple):
    what: str
    """The optimisation, or the way not taken."""
    cases: tuple[str, ...]
    edits: tuple[tuple[str, str, str], ...] = ()
    """File, text that stands in it exactly once, text that takes its place."""
    environment: tuple[tuple[str, str], ...] = ()
    group: str = "native"
    needs: tuple[str, ...] = ()
    """What torch may call the processor's instruction set, where it matters."""
    keeps_memory: bool = True
    """Whether glibc keeps the memory it has, on both sides, so that luck with it is no difference."""


LONG, ALL = ("paper", "small", "mid"), ("paper", "small", "mid", "act16")

ABLATIONS = [
    Ablation("nothing: the same build twice", ALL),
    # The operator as a whole
    Ablation("the native operator", ALL, environment=(("RIM_RNN_NATIVE", "0"),)),
    Ablation("more than one thread, each with its part of the batch", LONG, environment=(("OMP_NUM_THREADS", "1"),)),
    Ablation("AVX-512 instead of AVX2", ALL, environment=(("RIM_RNN_ISA", "avx2"),), needs=("AVX512",)),
    Ablation("AVX-512 or AVX2 instead of SSE2", ALL, environment=(("RIM_RNN_ISA", "baseline"),), needs=("AVX512", "AVX2")),
    # Arithmetic
    Ablation(
        "gate arithmetic by the vector instead of the C library's `exp` and `tanh`",
        ALL,
        (
            (
                VEC,
                "const Vec<T> result = x < Exponent<T>::least ? Vec<T>{} : power + power * rest;\n"
                "  return x > Exponent<T>::most ? fill<T>(T(1) / T(0)) : result;",
                "for (int i = 0; i < WIDTH<T>; ++i)\n"
                "    x[i] = sizeof(T) == 4 ? T(__builtin_expf(x[i])) : T(__builtin_exp(x[i]));\n"
                "  return x;",
            ),
            (
                VEC,
                "return minus_one / (minus_one + T(2));",
                "for (int i = 0; i < WIDTH<T>; ++i)\n"
                "    x[i] = sizeof(T) == 4 ? T(__builtin_tanhf(x[i])) : T(__builtin_tanh(x[i]));\n"
                "  return x;",
            ),
        ),
    ),
    Ablation("several rows of a product at a time, held in registers", ALL, ((GEMM, "MR = RIM_TILE_ROWS;", "MR = 1;"),)),
    Ablation(
        "`W^q W^e` and `W^v W_ih` multiplied out where that is less work",
        LONG,
        (
            (PLAN, "fold_key = folded_key < apart_key, ", "fold_key = false, "),
            (PLAN, "fold_value = folded_value < apart_value;", "fold_value = false;"),
        ),
    ),
    Ablation(
        "only winners run their dynamics",
        LONG,
        (
            (
                STEP,
                "multiply(count, operand, ld_operand, W.unit[j].gates, gates, ld_gates);",
                "for (int r = count; r < rows; ++r)  // any rows will do\n"
                "        gather(r, j, state_of(r, j), a_input + (r * n + j) * H, operand + int64_t(r) * ld_operand);\n"
                "      multiply(rows, operand, ld_operand, W.unit[j].gates, gates, ld_gates);\n"
                "      for (int r = count; r < rows; ++r) {\n"
                "        zero(state + r * ld_state, u);\n"
                "        lstm(gates + r * ld_gates, state + r * ld_state, projected + r * ld_state, nullptr, nullptr);\n"
                "      }",
            ),
            (
                STEP,
                "multiply(count, panel.b(0), panel.ld_b, W.unit_t[j].gates, doperand, ld_operand);",
                "for (int r = count; r < rows; ++r) {  // in the end losers add zeros\n"
                "        const int64_t at = position(r) * k;\n"
                "        gather(r, j, before[r] + j * p, problem.saved.attention + at * H, panel.a(r));\n"
                "        zero(state + r * ld_state, u), zero(dasked + r * ld_state, u);\n"
                "        lstm_backward(problem.saved.gates + at * 4 * u, problem.saved.cell + at * u, state + r * ld_state,\n"
                "                      dasked + r * ld_state, panel.b(r), nullptr);\n"
                "        zero(panel.b(r), 4 * u), zero(query_panel[j].b(r), H * s.S());\n"
                "      }\n"
                "      multiply(rows, panel.b(0), panel.ld_b, W.unit_t[j].gates, doperand, ld_operand);",
            ),
            (
                STEP,
                "panel.rows += count;\n      query_panel[j].rows += count;",
                "panel.rows += rows;\n      query_panel[j].rows += rows;",
            ),
        ),
    ),
    Ablation(
        "only winners have queries in the communication",
        LONG,
        (
            (
                STEP,
                "multiply(count, state, ld_state, W.unit[j].ask, of_unit(ask, j, ld_ask), ld_ask);",
                "for (int r = count; r < rows; ++r) copy(state + r * ld_state, state_of(r, j), p);  // any rows will do\n"
                "      multiply(rows, state, ld_state, W.unit[j].ask, of_unit(ask, j, ld_ask), ld_ask);",
            ),
            (
                STEP,
                "multiply(won[j], talk.a(0), talk.ld_a, W.unit[j].ask",
                "multiply(rows, talk.a(0), talk.ld_a, W.unit[j].ask",
            ),
            (STEP, "multiply(won[j], talk.b(0) + e + w, talk.ld_b", "multiply(rows, talk.b(0) + e + w, talk.ld_b"),
        ),
    ),
    Ablation(
        "heads whose length the compiler knows",
        LONG,
        ((STEP, "switch (s.comm_heads % TOGETHER<T>(size) ? 0 : (size))", "switch ((size) * 0)"),),
    ),
    Ablation(
        "weight gradients collected into products of 64 rows and more",
        LONG,
        ((STEP, "MOST_IN_PLACE : 63) + most;", "MOST_IN_PLACE : 0) + most;"),),
    ),
    # Calls of few rows
    Ablation(
        "weights used as they lie where there are few rows",
        ("act16",),
        ((PLAN, "s.in_place = s.total <= MOST_IN_PLACE &&", "s.in_place = s.total <= 0 &&"),),
    ),
    Ablation(
        "the fewest rows divided by units, so that a core fetches the weights of its own alone",
        ("act",),
        ((PLAN, "const bool by_units = s.in_place &&", "const bool by_units = false &&"),),
    ),
    Ablation(
        "few rows divided among all cores in the backward pass",
        ("act16",),
        ((PLAN, "blocks = std::min({threads,", "blocks = std::min({s.in_place && backward ? 1. : threads,"),),
    ),
    Ablation(
        "dot products of four rows at a time in the backward pass of few rows",
        ("act16",),
        ((GEMM, "for (; rows >= 4;", "for (; rows >= INT32_MAX;"),),
    ),
    # Around the operator
    Ablation(
        "memory for results by the C functions of the ABI instead of an operator found by its name",
        ("act", "act16"),
        (
            (
                PLAN,
                "Tensor empty(const char* what, const AnyShape& shape, int32_t dtype) {",
                "Tensor empty(const char*, const AnyShape& shape, int32_t dtype) {\n"
                "  const ScalarType type = dtype == aoti_torch_dtype_int32()   ? ScalarType::Int\n"
                "                          : dtype == aoti_torch_dtype_uint8() ? ScalarType::Byte\n"
                "                          : dtype == dtype_of<float>()        ? ScalarType::Float\n"
                "                                                              : ScalarType::Double;\n"
                "  return torch::stable::empty({&*shape.begin(), shape.size()}, type);\n"
                '  const char* what = "";',
            ),
        ),
    ),
    Ablation(
        "working memory kept from one call to the next",
        (*LONG, "act16"),
        ((PLAN, "MOST_KEPT = 64 << 20;", "MOST_KEPT = 0;"),),
    ),
    Ablation(
        "memory that comes fresh from the system in pages of 2 MB",
        LONG,
        ((PLAN, "#if defined(MADV_HUGEPAGE)", "#if 0"),),
        keeps_memory=False,
    ),
    Ablation(
        "numbers below the smallest normal one count as 0, also where a gradient vanishes",
        (*LONG, "last"),
        ((PLAN, "_mm_setcsr(before_ | 0x8040);", ""),),
        needs=("AVX512", "AVX2"),
    ),
    Ablation(
        "nothing kept for a backward pass that will not come",
        ALL,
        (
            (
                FAST,
                "output, h_n, c_n = self._infer(*tensors, *sizes)",
                "output, h_n, c_n, *_ = self._scan(*tensors, *sizes)",
            ),
        ),
    ),
    Ablation(
        "an `autograd.Function` instead of the autograd of `torch.library`",
        ("small", "act16"),
        ((FAST, "self._differentiable if ours else ", ""),),
    ),
    Ablation(
        "products of bfloat16, where the processor has them",
        ("bfloat16",),
        ((PLAN, "s.rounded = rounded && ", "s.rounded = false && "),),
        needs=("AVX512",),
    ),
    Ablation(
        "the operator for a bfloat16 layer instead of the readable path",
        ("bfloat16",),
        (
            (
                FAST,
                "        traces: list[Trace] = []\n",
                "        traces: list[Trace] = []\n        if input.dtype in NARROW:\n            return None\n",
            ),
        ),
    ),
    # The readable path
    Ablation(
        "what depends on `x` alone computed for all steps before the first",
        ("paper", "small"),
        (
            (
                DEFINITION,
                "steps = self.project(x, self.draw(x) if keep is None else keep).split(sizes)",
                "steps = [self.project(row, (None,) * 2) for row in torch.split(x, sizes)]",
            ),
        ),
        group="readable",
    ),
    Ablation(
        "`W^v W_ih` multiplied out where that is less work",
        ("paper", "small"),
        ((DYNAMICS, "if size_x * size_gates * (1 + size_value / rows) < ", "if size_x < 0 * "),),
        group="readable",
    ),
    Ablation(
        "all heads' part of `x` in the gates as one product, its bias within",
        ("paper", "small"),
        (
            (
                DYNAMICS,
                "F.linear(x, weight.transpose(1, 2).reshape(-1, size_x), bias)",
                "(x @ weight + bias.view(heads, 1, -1)).transpose(0, 1)",
            ),
        ),
        group="readable",
    ),
    Ablation(
        "both biases of an LSTM added with the read",
        ("paper", "small"),
        (
            (DYNAMICS, "return bias_ih + bias_hh", "return bias_ih"),
            (
                DYNAMICS,
                "torch.baddbmm(gates_x, h, self.weight_hh).chunk(4, dim=-1)",
                "(torch.baddbmm(gates_x, h, self.weight_hh) + self.bias_hh.unsqueeze(1)).chunk(4, dim=-1)",
            ),
        ),
        group="readable",
    ),
    Ablation(
        "one product for queries, keys and values",
        ("paper", "small"),
        (
            (
                COMMUNICATION,
                "if weight is None:",
                "if True:",
            ),
        ),
        group="readable",
    ),
    Ablation(
        "a softmax over the second of three axes instead of the last and shortest",
        ("paper", "small"),
        (
            (
                COMMUNICATION,
                "torch.softmax(torch.bmm(key, query.transpose(1, 2)), dim=1).transpose(1, 2)",
                "torch.softmax(torch.bmm(query, key.transpose(1, 2)), dim=-1)",
            ),
        ),
        group="readable",
    ),
    Ablation(
        "steps split once instead of cut out one by one, whose backward pass grows with `T²`",
        ("paper", "small"),
        ((DEFINITION, "torch.split(p, sizes, d)", "[p.narrow(d, t * size, size) for t, size in enumerate(sizes)]"),),
        group="readable",
    ),
    # Other ways, tried and not taken
    Ablation(
        "weight gradients as one product over all steps",
        LONG,
        ((STEP, "MOST_IN_PLACE : 63) + most;", "MOST_IN_PLACE : 0) + all;"),),
        group="lost",
    ),
    Ablation(
        "AVX-512 tiles of 14 rows by 2 vectors, not 8 by 3",
        ALL,
        ((AVX512, "RIM_TILE_ROWS 8", "RIM_TILE_ROWS 14"), (AVX512, "RIM_TILE_VECTORS 3", "RIM_TILE_VECTORS 2")),
        group="lost",
        needs=("AVX512",),
    ),
]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="word", help="only ablations whose description has all of these words")
    parser.add_argument("--rounds", type=int, default=7, help="turns that each of the two takes; default: 7")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own choice")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the JSON; default: results")
    parser.add_argument("--resume", action="store_true", help="leave out what the JSON already holds of this commit")
    parser.add_argument("--list", action="store_true", help="say which there are, and measure nothing")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing repeated: shows that everything runs")
    args = parser.parse_args(argv)
    args.path, args.device = "native and readable", torch.device("cpu")
    args.chosen = [ablation for ablation in ABLATIONS if all(word in ablation.what for word in args.words)]
    if not args.chosen:
        parser.error(f"no ablation has the words {' '.join(args.words)}; --list shows them")
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads should be at least 1")
    return args


def makes_sense(ablation: Ablation, args: argparse.Namespace) -> bool:
    """Whether this machine has what the ablation takes away."""
    threads = int(dict(ablation.environment).get("OMP_NUM_THREADS", "0"))
    return threads < args.threads and (not ablation.needs or torch.backends.cpu.get_cpu_capability() in ablation.needs)


def copy(ablation: Ablation, folder: Path) -> Path:
    """The source tree with the ablation's edits, the operator not built."""
    shutil.copytree(PACKAGE, folder / "src" / "rim_rnn", ignore=shutil.ignore_patterns("_native.*", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name, old, new in ablation.edits:
        file = folder / "src" / "rim_rnn" / name
        source = file.read_text()
        if source.count(old) != 1:
            sys.exit(f"{ablation.what}: its text stands {source.count(old)} times in {name}: {old}")
        file.write_text(source.replace(old, new))
    return folder


def compile_operator(folder: Path) -> None:
    """Build the operator in a copy, with the package's own setup.py."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, env=os.environ | {"RIM_RNN_NATIVE": "1"}, capture_output=True, text=True)
    if done.returncode or not list(folder.glob("src/rim_rnn/_native.*")):
        sys.exit(f"the operator can not be built: {done.stderr}")


def prepare(chosen: list[Ablation], folder: Path) -> dict[str, Path]:
    """The copies that the ablations need, each under its ablation's name; `""` is the untouched one."""
    untouched = Ablation("", ())
    copies = {a.what: copy(a, folder / str(i)) for i, a in enumerate([untouched, *chosen]) if a.edits or a is untouched}
    if all(ablation.group == "readable" for ablation in chosen):
        return copies
    own = [a for a in chosen if any(name.startswith("csrc/") for name, *_ in a.edits)]
    print(f"building the operator {1 + len(own)} times", flush=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_operator, [copies[a.what] for a in [untouched, *own]]))
    for ablation in chosen:
        if ablation.edits and ablation not in own:
            for library in copies[""].glob("src/rim_rnn/_native.*"):
                shutil.copy(library, copies[ablation.what] / "src" / "rim_rnn")
    return copies


def ask(worker: subprocess.Popen[str], what: str, argument: object) -> Any:
    """The worker's answer, see worker.py."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    print(json.dumps([what, argument]), file=worker.stdin, flush=True)
    if not (answer := worker.stdout.readline()):
        raise RuntimeError(f"the worker ended with {worker.wait()} when asked for {what}")
    return json.loads(answer)


class Turn(NamedTuple):
    """What a worker does when it has its turn."""

    worker: subprocess.Popen[str]
    way: str
    pause: float

    def timeit(self, number: int) -> float:
        time.sleep(self.pause)  # threads of the other worker look for more work for some milliseconds before they sleep
        return float(ask(self.worker, self.way, number))


def compare(ablation: Ablation, copies: dict[str, Path], args: argparse.Namespace) -> dict[str, Any]:
    """The package with and without the optimisation, taking turns: seconds of each case, both ways."""
    sides = {"with": (copies[""], ()), "without": (copies.get(ablation.what, copies[""]), ablation.environment)}
    base = {"OMP_NUM_THREADS": str(args.threads), "RIM_RNN_ISA": "", "RIM_RNN_NATIVE": "01"[ablation.group != "readable"]}
    workers = {}
    for side, (folder, environment) in sides.items():
        memory = measure.KEEPS_MEMORY if ablation.keeps_memory else {}
        variables = os.environ | memory | base | dict(environment) | {"PYTHONPATH": str(folder / "src")}
        command = [sys.executable, str(HERE / "worker.py")]
        workers[side] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables)
    cases: dict[str, Any] = {}
    with workers["with"], workers["without"]:
        for name in ablation.cases:
            case = shrink(CASES[name]) if args.smoke else CASES[name]
            about = {side: ask(worker, "case", dataclasses.asdict(case)) for side, worker in workers.items()}
            for side, (folder, _) in sides.items():
                if Path(about[side]["package"]).resolve() != (folder / "src" / "rim_rnn").resolve():
                    raise RuntimeError(f"the worker would time {about[side]['package']}, not the copy")
            norms = zip(about["with"]["norms"], about["without"]["norms"], strict=True)
            rounding = 1e-3 if case.dtype == "float32" else 0.05
            if not all(math.isclose(a, b, rel_tol=rounding) for a, b in norms):
                raise RuntimeError(f"{ablation.what}: {name} does not compute the same without it")
            turns = {f"{side} {way}": Turn(workers[side], way, 0.4 * args.least) for way in measure.WAYS for side in sides}
            seconds = measure.take_turns(turns, args.rounds, args.least)
            ways = {way: {side: seconds[f"{side} {way}"] for side in sides} for way in measure.WAYS}
            cases[name] = {"sizes": str(case), "seconds": ways}
    return {"group": ablation.group, "cases": cases}


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    if args.list:
        print(*(f"{a.group:10} {', '.join(a.cases):25} {a.what}" for a in args.chosen), sep="\n")
        return
    if not (ROOT / "setup.py").is_file():
        sys.exit(f"{PACKAGE} is not in a source tree: pip install --no-build-isolation --editable . in a clone")
    args.least = 0.0 if args.smoke else 0.05
    args.rounds = 1 if args.smoke else args.rounds
    path = args.out / "ablations.json"
    document = measure.begin(path, measure.setup(args))
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    command = " ".join(["python examples/speed/ablations.py", *args.words, f"--rounds {args.rounds}"])
    document["runs"][now] = about = measure.this_run(command)
    if about["load"][0] > 0.5:
        print(f"other processes are running (load {about['load'][0]}): what they disturb counts as an optimisation")
    entries = document.get("ablations", {})
    runs = document["runs"]
    known = {what for what, entry in entries.items() if args.resume and runs[entry["run"]]["commit"] == about["commit"]}
    chosen = [ablation for ablation in args.chosen if makes_sense(ablation, args) and ablation.what not in known]
    with tempfile.TemporaryDirectory() as folder:
        copies = prepare(chosen, Path(folder))
        for ablation in chosen:
            entries[ablation.what] = {"run": now, **compare(ablation, copies, args)}
            document["ablations"] = {a.what: entries[a.what] for a in ABLATIONS if a.what in entries}
            measure.write(path, document)
            print(f"{ablation.what}: {show.effect(entries[ablation.what])}", flush=True)
    print()
    print(show.text(document))


if __name__ == "__main__":
    main()
