"""Train for an hour with shapes that change at every step, and see that neither memory nor compiled graphs grow.

    python tests/soak.py --log soak.jsonl              # 60 minutes on one core
    python tests/soak.py --minutes 5 --every 5

A step draws a layer (LSTM or GRU units, layers, directions, dtype, heads), a number of steps and rows, packed or not, states
given or carried on from the step before, and trains on it: forward, backward, Adam. Some layers are compiled, some are thrown
away and made anew. Every so often a line of JSON: the memory in use after collecting garbage and giving the allocator's free
pages back, the number of Python objects, the number of compiled graphs.

The first quarter warms up. Exits with 1 if a line fitted to the memory of the rest climbs by more than 16 MB in all, or if
the second half compiles a graph; torch's limit of graphs for one function is an error. SIGTERM and SIGINT end the run early;
what there is by then is judged and written.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import resource
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from hostile import about
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from rim_rnn import RIM
from rim_rnn.readable import UNROLLED

MOST_GROWTH = 16 << 20
INPUT, HIDDEN = 7, 24


class Model:
    """A layer, its optimiser, and the state of the step before."""

    def __init__(self, draw: random.Random, compiled: bool) -> None:
        cell = draw.choice(["LSTM", "GRU"])
        self.dtype = torch.float32 if compiled else draw.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
        self.compiled = compiled
        self.rnn = RIM(
            INPUT,
            HIDDEN,
            draw.randint(1, 2),
            bidirectional=draw.random() < 0.3,
            dtype=self.dtype,
            num_units=draw.choice([3, 4, 6]),
            rnn_cell=cell,
            num_comm_heads=draw.choice([0, 2, 4]),
            input_dropout=draw.choice([0.0, 0.1]),
            comm_dropout=draw.choice([0.0, 0.1]),
        )
        self.call: Any = torch.compile(self.rnn, dynamic=True) if compiled else self.rnn
        self.optimizer = torch.optim.Adam(self.rnn.parameters(), 1e-3)
        self.carried: Any = None

    def train(self, draw: random.Random) -> None:
        steps = draw.randint(UNROLLED + 1, 40) if self.compiled else draw.randint(1, 40)
        rows, wanted = draw.randint(2, 24), not self.compiled and draw.random() < 0.3
        x: Tensor | PackedSequence = torch.randn(steps, rows, INPUT, dtype=self.dtype, requires_grad=wanted)
        if not self.compiled and draw.random() < 0.3:
            lengths = [draw.randint(1, steps) for _ in range(rows)]
            x = pack_padded_sequence(x, lengths, enforce_sorted=False)
        hx = self.carried if self.carried is not None and draw.random() < 0.5 else None
        if hx is not None:
            hx = fitted(hx, rows)
        output, state = self.call(x, hx)
        output = output.data if isinstance(x, PackedSequence) else output
        loss = output.float().square().mean()
        self.optimizer.zero_grad(set_to_none=draw.random() < 0.5)
        loss.backward()
        nn.utils.clip_grad_norm_(self.rnn.parameters(), 1.0)
        self.optimizer.step()
        self.carried = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        if not torch.isfinite(loss):
            raise SystemExit(f"the loss is {loss.item()} of {self.rnn}")


def fitted(state: Any, rows: int) -> Any:
    """A state for this number of rows: some of its own, again where they do not suffice."""
    if isinstance(state, tuple):
        return tuple(fitted(s, rows) for s in state)
    return state[:, torch.arange(rows) % state.size(1)]


def resident() -> int:
    """Bytes of memory in use, once garbage is collected and the allocator has given back what is free."""
    gc.collect()
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def slope(samples: list[dict[str, Any]]) -> float:
    """Bytes a second, by least squares."""
    times, sizes = ([s[name] for s in samples] for name in ("seconds", "resident"))
    middle, mean = sum(times) / len(times), sum(sizes) / len(sizes)
    spread = sum((t - middle) ** 2 for t in times)
    return sum((t - middle) * (size - mean) for t, size in zip(times, sizes, strict=True)) / spread if spread else 0.0


def judge(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """What the samples say: memory after the first quarter, graphs in the second half."""
    end = samples[-1]["seconds"]
    warm = [s for s in samples if s["seconds"] >= end / 4]
    rate = slope(warm)
    growth = rate * (end - warm[0]["seconds"])
    late = end and samples[-1]["graphs"] - next(s for s in samples if s["seconds"] >= end / 2)["graphs"]
    return {
        "seconds": end,
        "steps": samples[-1]["steps"],
        "bytes_per_hour": round(3600 * rate),
        "bytes_per_step": round(growth / max(1, samples[-1]["steps"] - warm[0]["steps"]), 2),
        "growth": round(growth),
        "graphs": samples[-1]["graphs"],
        "graphs_in_second_half": late,
        "passed": growth <= MOST_GROWTH and not late,
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=30, help="seconds from line to line")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="a file of JSON lines to write")
    args = parser.parse_args(arguments)

    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stopped.append(number))
    warnings.simplefilter("ignore")
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    draw = random.Random(args.seed)
    log = args.log.open("w", encoding="utf-8") if args.log else None

    def write(**entry: Any) -> None:
        line = json.dumps(entry)
        print(line, flush=True)
        if log:
            print(line, file=log, flush=True)

    command = f"python tests/soak.py --minutes {args.minutes:g} --every {args.every:g} --seed {args.seed}"
    write(command=command, **about())
    models = [Model(draw, compiled=i < 2) for i in range(16)]
    samples: list[dict[str, Any]] = []
    began = time.monotonic()
    steps, due = 0, began

    def sample() -> None:
        graphs = counters["stats"]["unique_graphs"]
        seconds = round(time.monotonic() - began, 1)
        samples.append(
            {"seconds": seconds, "steps": steps, "resident": resident(), "objects": len(gc.get_objects()), "graphs": graphs}
        )
        write(**samples[-1])

    while not stopped and time.monotonic() - began < 60 * args.minutes:
        index = draw.randrange(len(models))
        models[index].train(draw)
        steps += 1
        if not models[index].compiled and draw.random() < 0.02:
            models[index] = Model(draw, compiled=False)
        if time.monotonic() >= due:
            sample()
            due = time.monotonic() + args.every
    sample()
    verdict = judge(samples)
    write(**verdict, stopped_by=signal.Signals(stopped[0]).name if stopped else None)
    return int(not verdict["passed"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
