"""Use the layer in hostile ways drawn from seeds: every result equals the oracle's, or the mistake is refused as torch does.

    python tests/hostile.py                                  # 10,000 cases, some minutes on one core
    python tests/hostile.py --log hostile.json               # the same, kept as JSON
    python tests/hostile.py --seed 3 --first 712 --cases 1   # one case again

A case is its seed and number. What it may do: odd sizes, layouts, aliases, networks of calls, derivatives of derivatives,
packed sequences, NaN and infinity, other defaults for new tensors, fake tensors, traces run on other sizes, wrong checkpoints,
wrong arguments, wrong calls of the operators. Results, states and gradients are compared with tests/oracle.py in float64; a
mistake has to raise what nn.LSTM or nn.GRU raise for it. Cases run in subprocesses, so that a crash is told with its number
too. Exits with 1 if a case fails.

A case ends as one of:
    equal      what the oracle says
    refused    the error that torch raises, or a clear one
    stricter   a clear error where torch takes it
    near tie   two bids closer than rounding: the winners are not decided, nothing is compared; or, in bfloat16, the oracle's
               own results move as far when what it is given is rounded
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import functools
import inspect
import json
import math
import os
import platform
import random
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import oracle
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, unpack_sequence

from rim_rnn import RIM, RIMCell, native, record
from rim_rnn.operator import PARAMETERS

ROOT = Path(__file__).resolve().parent.parent
CHUNK, PATIENCE = 500, 120  # cases of one subprocess, seconds that one case may take
SIZES = [*range(1, 10), *range(1, 10), 15, 16, 17, 32, 33]
BOUNDED = "comm_bounded" in inspect.signature(RIM).parameters
INPUTS = ("input", "h_0", "c_0")
CLEAR = (RuntimeError, ValueError, TypeError)
EQUAL, REFUSED, STRICTER, NEAR_TIE = "equal", "refused", "stricter", "near tie"
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 2e-2}
UNDECIDED = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 1e-3}  # of two bids, relative to the largest
LEAST = 0.01  # of a largest number that an error is a part of
HALF = 2.0**-9  # of a number in bfloat16, what rounding takes or adds at most
ROUNDED = 10, 100  # times as much for bfloat16 rounded on the way: between layers, at every step, in products of many rows

paths: Counter[str] = Counter()


class WrongError(AssertionError):
    """A result that differs, or a mistake that passes."""


class Draw(random.Random):
    """Everything that a case draws."""

    def __new__(cls, *_: int) -> Draw:
        return super().__new__(cls)  # with two arguments Python 3.10 refuses

    def __init__(self, seed: int, number: int) -> None:
        super().__init__(f"{seed} {number}")
        self.generator = torch.Generator().manual_seed(self.getrandbits(32))

    def flip(self, p: float = 0.5) -> bool:
        return self.random() < p

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)


# Layers and what they take


def options(draw: Draw, most_units: int = 6, sizes: Sequence[int] = SIZES, most_heads: int = 3, **fixed: Any) -> dict[str, Any]:
    """Keywords of a `RIM`."""
    n, rnn_cell = draw.randint(1, most_units), draw.choice(["LSTM", "GRU"])
    u = draw.choice(sizes)
    p = draw.randint(1, u - 1) if rnn_cell == "LSTM" and u > 1 and draw.flip(0.3) else 0
    drawn = {
        "input_size": draw.choice(sizes),
        "hidden_size": n * u,
        "num_layers": draw.choice([1, 1, 2]),
        "bias": draw.flip(0.7),
        "batch_first": draw.flip(),
        "bidirectional": draw.flip(0.3),
        "proj_size": n * p,
        "num_units": n,
        "k": draw.randint(1, n),
        "rnn_cell": rnn_cell,
        "key_size_input": draw.choice(sizes),
        "value_size_input": draw.choice(sizes),
        "num_input_heads": draw.randint(1, most_heads),
        "key_size_comm": draw.choice(sizes),
        "value_size_comm": draw.choice(sizes),
        "num_comm_heads": draw.randint(0, most_heads),
    }
    if BOUNDED:
        drawn["comm_bounded"] = draw.flip()
    return drawn | fixed


def cell_options(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name in inspect.signature(RIMCell.__init__).parameters}


def spec(given: dict[str, Any], **changed: Any) -> oracle.Spec:
    fields = oracle.Spec.__dataclass_fields__
    return oracle.Spec(**{name: value for name, value in (given | changed).items() if name in fields})


def state_sizes(given: dict[str, Any]) -> list[int]:
    return [given["proj_size"] or given["hidden_size"], given["hidden_size"]][: 2 if given["rnn_cell"] == "LSTM" else 1]


def strong(draw: Draw, module: nn.Module, scale: float = 0.7) -> None:
    """Parameters from a wide normal distribution; where they multiply many numbers, less wide."""
    for parameter in module.parameters():
        many = parameter.size(1 if parameter.dim() == 3 else -1) if parameter.dim() > 1 else 1
        parameter.data.copy_(scale * draw.normal(*parameter.shape) / max(1, math.sqrt(many / 4)))


def odd_layout(draw: Draw, t: Tensor) -> Tensor:
    """The same numbers lying in memory in another way; what lies between them is NaN."""
    nan = torch.full_like(t, math.nan)
    ways: list[Callable[[], Tensor]] = [
        lambda: t,
        lambda: t.transpose(0, -1).contiguous().transpose(0, -1),
        lambda: torch.stack([t, nan], -1)[..., 0],
        lambda: torch.cat([nan, t])[len(t) :],
        lambda: torch.stack([nan, t], 1)[:, 1],
        lambda: torch.cat([nan.flatten()[:3], t.flatten()])[min(3, t.numel()) :].view(t.shape),
        lambda: torch._neg_view(-t),
        lambda: torch._neg_view(torch.stack([nan, -t], -1))[..., 1],
    ]
    if t.dtype != torch.bfloat16:
        ways += [lambda: torch.complex(t, nan).real, lambda: torch.complex(nan, -t).conj().imag]
    return draw.choice(ways)()


class Twins:
    """The leaves of the layer in its dtype, and leaves of the same values in float64 for the oracle."""

    def __init__(self, draw: Draw, dtype: torch.dtype) -> None:
        self.draw, self.dtype = draw, dtype
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}

    def leaf(self, name: str, value: Tensor, wanted: bool, odd: bool) -> tuple[Tensor, Tensor]:
        value = value.to(self.dtype)
        ours = (odd_layout(self.draw, value) if odd else value).detach().requires_grad_(wanted)
        self.pairs[name] = ours, value.double().requires_grad_(wanted)
        return self.pairs[name]

    def parameters(self, module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
        """The oracle's parameters; those that are one for the layer are one for it too."""
        theirs: dict[int, Tensor] = {id(ours): other for ours, other in self.pairs.values()}
        for name, p in module.named_parameters():
            if id(p) not in theirs:
                theirs[id(p)] = p.detach().clone().double().requires_grad_(p.requires_grad)
                self.pairs[prefix + name] = p, theirs[id(p)]
        return {name: theirs[id(p)] for name, p in module.named_parameters(remove_duplicate=False)}

    def wanted(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: pair for name, pair in self.pairs.items() if pair[0].requires_grad}


class Bids:
    """Watches the oracle's competitions: how close the last winner and the first loser came. Equal bids are decided."""

    def __init__(self) -> None:
        self.closest = math.inf

    def winners(self, bids: Sequence[float], k: int) -> list[int]:
        won = self.plain(bids, k)
        numbers = [b for b in bids if math.isfinite(b)]
        last = min((bids[j] for j in won if math.isfinite(bids[j])), default=None)
        first = max((bids[j] for j in range(len(bids)) if j not in won and math.isfinite(bids[j])), default=None)
        if last is not None and first is not None and last != first:
            self.closest = min(self.closest, (last - first) / max(1.0, *map(abs, numbers)))
        return won

    def __enter__(self) -> Bids:
        self.plain, oracle.winners = oracle.winners, self.winners
        return self

    def __exit__(self, *error: object) -> None:
        oracle.winners = self.plain


def check_close(name: str, ours: Tensor, theirs: Tensor, tolerance: float, least: float = LEAST) -> None:
    """Up to a part of the largest number, or of `least` if that is more; NaN in the same places."""
    if ours.shape != theirs.shape:
        raise WrongError(f"{name} has shape {tuple(ours.shape)}, not {tuple(theirs.shape)}")
    ours, theirs = ours.detach().double(), theirs.detach().double()
    if not torch.equal(ours.isnan(), theirs.isnan()):
        raise WrongError(
            f"{name}: NaN {int(ours.isnan().sum())} times, not {int(theirs.isnan().sum())} times or in other places"
        )
    ours, theirs = ours.nan_to_num(), theirs.nan_to_num()
    if theirs.numel():
        error = ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=least)).item()
        if not error <= tolerance:
            raise WrongError(f"{name} differs by {error:.1e} of its largest number")


def rounding_decides(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], again: Callable[[Callable[[Tensor], Tensor]], dict[str, Tensor]]
) -> bool:
    """Whether the oracle's results move as far as ours are off, or half as far, when what it is given is rounded in bfloat16 by
    chance, a few times: a recurrence may amplify that a thousandfold."""
    chance = torch.Generator().manual_seed(0)

    def moved(number: Tensor) -> Tensor:
        part = torch.rand(number.shape, generator=chance, dtype=number.dtype).mul_(2).sub_(1)
        return (number * (1 + HALF * part)).detach()

    def furthest(results: dict[str, Tensor]) -> dict[str, float]:
        return {name: (results[name].detach().double() - theirs[name].detach()).abs().max().item() for name in theirs}

    off, samples = furthest(ours), [furthest(again(moved)) for _ in range(16)]
    return all(off[name] <= 2 * max(sample[name] for sample in samples) for name in theirs if theirs[name].numel())


def compare(
    twins: Twins,
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    bids: Bids,
    second: bool = False,
    rounded: tuple[int, int] = (1, 1),
    spoiled: bool = False,
    again: Callable[[Callable[[Tensor], Tensor]], dict[str, Tensor]] | None = None,
) -> str:
    """Results, gradients of a weighing of some of them, and with `second` the gradients of those.

    Where a result is NaN, so may be gradients that the oracle does not know to be: zero times NaN. Those of other rows may not,
    unless weights are `spoiled`, and a path computes what losers would have become.
    """
    draw, dtype = twins.draw, twins.dtype
    tolerance = TOLERANCE[dtype] * rounded[0]
    for name, result in ours.items():
        if result.dtype != dtype or result.shape != theirs[name].shape:
            raise WrongError(f"{name}: {result.dtype}, {tuple(result.shape)} instead of {dtype}, {tuple(theirs[name].shape)}")
    if bids.closest < UNDECIDED[dtype] * rounded[1]:
        return NEAR_TIE
    least = LEAST * rounded[0]  # a small result may be a sum of larger numbers, each rounded
    try:
        for name, result in ours.items():
            check_close(name, result, theirs[name], tolerance, least)
    except WrongError:
        if dtype == torch.bfloat16 and again and rounding_decides(ours, theirs, again):
            return NEAR_TIE
        raise
    nan_rows = {name for name, result in theirs.items() if bool(result.isnan().any())}
    nan_rows |= {
        f"row {b}"
        for s in ("h_n", "c_n")
        if s in theirs
        for b, row in enumerate(theirs[s].unbind(1))
        if bool(row.isnan().any())
    }
    wanted = twins.wanted()
    names = [name for name in ours if draw.flip(0.7)] or list(ours)
    names = [name for name in names if theirs[name].requires_grad]
    for name, result in ours.items():
        if theirs[name].requires_grad and not result.requires_grad:
            raise WrongError(f"{name} has no gradient")
    if not names or not wanted:
        return EQUAL
    leaves = [pair[0] for pair in wanted.values()], [pair[1] for pair in wanted.values()]
    weights = [draw.normal(*ours[name].shape).to(dtype) for name in names]
    for order in ("", "second ")[: 1 + second]:
        sides = []
        for results, side in ((ours, leaves[0]), (theirs, leaves[1])):
            given = [w.to(results[name].dtype) for name, w in zip(names, weights, strict=True)]
            outputs = [results[name] for name in names]
            sides.append(torch.autograd.grad(outputs, side, given, create_graph=second, allow_unused=True))
        found: tuple[dict[str, Tensor], ...] = ({}, {})
        for name, one, other, leaf in zip(wanted, *sides, leaves[0], strict=True):
            zero = torch.zeros(leaf.shape, dtype=dtype)
            found[0][name], found[1][name] = zero if one is None else one, zero.double() if other is None else other
        for name, gradient in found[0].items():
            if gradient.dtype != dtype:
                raise WrongError(f"{order}gradient of {name} is {gradient.dtype}")
        for name, gradient in found[0].items():
            expected = found[1][name]
            if nan_rows or spoiled:
                spread = gradient.isnan()
                if name in INPUTS and not spoiled:
                    spread[:, [b for b in range(spread.size(1)) if f"row {b}" not in nan_rows]] = False
                expected = torch.where(spread, math.nan, expected)
            check_close(f"{order}gradient of {name}", gradient, expected, 10 * tolerance)
        ours, theirs = found
        names = [name for name in found[0] if found[0][name].requires_grad and found[1][name].requires_grad]
        weights = [draw.normal(*ours[name].shape).to(dtype) for name in names]
        if not names:
            break
    return EQUAL


@contextmanager
def a_path(draw: Draw) -> Iterator[None]:
    """The path that the layer chooses, or one time in six the readable one; on one thread, or one time in four on two."""
    torch.set_num_threads(2 if draw.flip(0.25) else 1)
    with native.readable() if draw.flip(1 / 6) else nullcontext():
        yield
    torch.set_num_threads(1)


@contextmanager
def other_defaults(draw: Draw) -> Iterator[None]:
    """One time in four torch makes new tensors elsewhere, or of another dtype, unless it is told where."""
    dtype = torch.get_default_dtype()
    with torch.device("meta") if draw.flip(0.25) else nullcontext():
        try:
            if draw.flip(0.25):
                torch.set_default_dtype(draw.choice([torch.float64, torch.bfloat16]))
            yield
        finally:
            torch.set_default_dtype(dtype)


def count_path(cell: RIMCell[Any], x: Tensor) -> str:
    path = "readable" if native.supports(cell, x, ()) else "native"
    paths[path] += 1
    return path


def run_layer(
    draw: Draw,
    *,
    sizes: Sequence[int] = SIZES,
    layouts: bool = False,
    frozen: bool = False,
    packed: bool = False,
    many: bool = False,
    memory: bool = False,
    tied: bool = False,
    prepare: Callable[[RIM[Any], list[Tensor]], Any] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float64, torch.float32, torch.float32, torch.bfloat16),
    **fixed: Any,
) -> str:
    """One forward and backward of a layer, called in one of the ways that it can be called, beside the oracle's.

    `many` repeats rows until weights are packed before the first step; `memory` takes input and states from one piece of
    memory; `prepare` changes the parameters and the values of the input and the states.
    """
    given = options(draw, sizes=sizes, **fixed)
    dtype = draw.choice(dtypes)
    rnn = RIM(**given, dtype=dtype)
    strong(draw, rnn)
    cells = len(rnn.cells)
    budget = max(1, 40 // (cells * given["num_units"]))
    steps = draw.randint(1, min(5, budget))
    rows = draw.randint(1, max(1, min(4, budget // steps)))
    unbatched = not (packed or many or memory) and draw.flip(0.2)
    rows = 1 if unbatched else rows
    lengths = [steps] * rows
    if packed:
        style = draw.choice(["any", "ones", "equal"])
        lengths = [draw.randint(1, steps) if style == "any" else 1 if style == "ones" else steps for _ in range(rows)]
        steps = max(lengths)
    copies = draw.choices(range(rows), k=draw.randint(60, 400)) if many else list(range(rows))
    shapes = [(steps, rows, given["input_size"]), *((cells, rows, size) for size in state_sizes(given))]
    shapes = shapes if memory or prepare or draw.flip(0.7) else shapes[:1]

    # Values: leaves of their own, leaves that are expanded, or views of one leaf.
    twins = Twins(draw, dtype)
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    if memory:
        total = [math.prod(shape) for shape in shapes]
        starts = [draw.randint(0, max(total) - size) for size in total]
        base = twins.leaf("memory", draw.normal(max(total)), True, odd=draw.flip(0.3))
        for side, leaf in zip((ours, theirs), base, strict=True):
            parts = [leaf[at : at + size].view(shape) for at, size, shape in zip(starts, total, shapes, strict=True)]
            side += parts
    else:
        values = [draw.normal(*shape) for shape in shapes]
        if prepare:
            prepare(rnn, values)
        for name, value in zip(INPUTS, values, strict=False):
            stretched = layouts and draw.flip(0.25)
            if stretched:
                value = value[tuple(slice(0, 1) if draw.flip() else slice(None) for _ in range(3))]
            pair = twins.leaf(name, value, wanted=draw.flip(0.6), odd=layouts)
            shape = shapes[INPUTS.index(name)]
            ours.append(pair[0].expand(shape) if stretched else pair[0])
            theirs.append(pair[1].expand(shape) if stretched else pair[1])
            if layouts and not stretched and draw.flip(0.3):
                ours[-1] = odd_layout(draw, ours[-1])
    if tied:
        rnn.cells[1] = rnn.cells[0]
    for parameter in rnn.parameters():
        if layouts:
            parameter.data = odd_layout(draw, parameter.data)
        if frozen and draw.flip():
            parameter.requires_grad_(False)
    params = twins.parameters(rnn)

    def by_oracle(params: dict[str, Tensor], values: list[Tensor]) -> tuple[oracle.Result, dict[str, Tensor]]:
        their_rows = [values[0][:length, b] for b, length in enumerate(lengths)]
        expected = oracle.rim(params, spec(given), their_rows, *values[1:])
        results = {f"row {b}": expected.rows[row] for b, row in enumerate(copies)} | {"h_n": expected.h_n[:, copies]}
        return expected, results | ({} if expected.c_n is None else {"c_n": expected.c_n[:, copies]})

    def again(change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        return by_oracle({name: change(p) for name, p in params.items()}, list(map(change, theirs)))[1]

    with Bids() as bids:
        expected, results = by_oracle(params, theirs)

    x, *state = (t[:, copies] if many else t for t in ours)
    if unbatched:
        x, *state = (t.squeeze(1) for t in (x, *state))
    elif rnn.batch_first and not packed:
        x = x.transpose(0, 1)
    hx = None if not state else state[0] if len(state) == 1 else draw.choice([tuple, list])(state)
    argument: Any = x
    if packed:
        argument = draw_packed(draw, x, lengths)
        if layouts:
            argument = argument._replace(data=odd_layout(draw, argument.data))
    recorded = draw.flip(0.3)
    with a_path(draw):
        path = count_path(rnn.cells[0], argument.data if packed else argument)
        with record(rnn) if recorded else nullcontext([]) as records, other_defaults(draw):
            output, last = rnn(argument, hx)
        if packed:
            check_packed(argument, output)
            out_rows = unpack_sequence(output)
        else:
            out_rows = [output] if unbatched else list(output.unbind(0 if rnn.batch_first else 1))
        last = [s.unsqueeze(1) if unbatched else s for s in flat(last)]
        got = {f"row {b}": row for b, row in enumerate(out_rows)} | dict(zip(("h_n", "c_n"), last, strict=False))
        if got.keys() != results.keys():
            raise WrongError(f"results {list(got)} instead of {list(results)}")
        rounded = ROUNDED if dtype == torch.bfloat16 and (path == "readable" or cells > 1 or many) else (1, 1)
        spoiled = path == "readable" and any(bool(p.isnan().any()) for p in rnn.parameters())
        outcome = compare(twins, got, results, bids, rounded=rounded, spoiled=spoiled, again=again)
    if recorded and outcome == EQUAL:
        check_record(records[0], expected, copies, unbatched, rounded[0] * TOLERANCE[dtype])
    return outcome


def draw_packed(draw: Draw, x: Tensor, lengths: list[int]) -> PackedSequence:
    """Rows of these lengths, packed in one of torch's ways."""
    ordered = lengths == sorted(lengths, reverse=True)
    enforce_sorted = ordered and draw.flip()
    if draw.flip():
        return pack_sequence([x[:length, b] for b, length in enumerate(lengths)], enforce_sorted=enforce_sorted)
    batch_first = draw.flip()
    return pack_padded_sequence(
        x.transpose(0, 1) if batch_first else x,
        torch.tensor(lengths) if draw.flip() else lengths,
        batch_first=batch_first,
        enforce_sorted=enforce_sorted,
    )


def check_packed(given: PackedSequence, output: PackedSequence) -> None:
    for name, one, other in zip(given._fields[1:], given[1:], output[1:], strict=True):
        if (one is None) != (other is None) or (one is not None and not torch.equal(one, other)):
            raise WrongError(f"{name} of the packed output is not the input's")


def check_record(seen: Any, expected: oracle.Result, copies: list[int], unbatched: bool, tolerance: float) -> None:
    for name in ("active", "input_attention", "communication"):
        theirs = getattr(expected, name)[:, :, copies]
        ours = getattr(seen, name)
        check_close(f"record.{name}", ours.unsqueeze(2) if unbatched else ours, theirs, tolerance)


# Kinds of case. Each returns how it ended, or raises.


def sizes(draw: Draw) -> str:
    return run_layer(draw)


def layouts(draw: Draw) -> str:
    return run_layer(draw, layouts=True, packed=draw.flip(0.2), sizes=range(1, 10))


def frozen(draw: Draw) -> str:
    return run_layer(draw, frozen=True, layouts=draw.flip(0.3), sizes=range(1, 10))


def shared_memory(draw: Draw) -> str:
    return run_layer(draw, memory=True, sizes=range(1, 10))


def tied_layers(draw: Draw) -> str:
    size = draw.randint(1, 4) * 2
    return run_layer(
        draw, tied=True, num_layers=2, bidirectional=False, num_units=2, k=1, hidden_size=size, input_size=size, proj_size=0
    )


def packing(draw: Draw) -> str:
    return run_layer(draw, packed=True, sizes=range(1, 10))


def many_rows(draw: Draw) -> str:
    return run_layer(draw, many=True, num_layers=1)


def ties(draw: Draw) -> str:
    """Zeros and equal units: the lowest of equal bids wins."""

    def equalise(rnn: RIM[Any], values: list[Tensor]) -> None:
        for value in values:
            if draw.flip():
                value.zero_()
        if draw.flip():
            for p in rnn.parameters():
                if p.dim() == 3 or (p.dim() == 2 and p.size(0) == rnn.num_units):
                    p.data.copy_(p.data[:1].expand_as(p).clone() if draw.flip(0.8) else torch.zeros_like(p))

    return run_layer(draw, prepare=equalise, bias=draw.flip(0.3))


def nans(draw: Draw) -> str:
    """NaN in input, states or weights: where the oracle has it, and nowhere else."""

    def spoil(rnn: RIM[Any], values: list[Tensor]) -> None:
        target = draw.choice(["input", "state", "weight"])
        t = {"input": values[0], "state": draw.choice(values[1:]), "weight": draw.choice(list(rnn.parameters())).data}[target]
        t.view(-1)[draw.randrange(t.numel())] = math.nan

    return run_layer(draw, prepare=spoil, dtypes=(torch.float64, torch.float32), num_layers=1, sizes=range(1, 6))


def extremes(draw: Draw) -> str:
    """Huge and denormal numbers, in the dtype that holds what the equations make of them."""
    dtype = draw.choice([torch.float64, torch.float32])

    def stretch(rnn: RIM[Any], values: list[Tensor]) -> None:
        tiny = draw.flip()
        factor = 1e30 if not tiny else 1e-310 if dtype == torch.float64 else 1e-41
        chosen = values[:1] if dtype == torch.float32 and not tiny else draw.sample(values, draw.randint(1, len(values)))
        for value in chosen:
            value.mul_(torch.where(torch.rand(value.shape, generator=draw.generator) < 0.5, factor, 1.0))

    return run_layer(draw, prepare=stretch, dtypes=(dtype,), num_layers=1, bidirectional=False)


def infinities(draw: Draw) -> str:
    """Infinity in one row, or in the weights: other rows are as without it, and k units are active."""
    given = options(draw, num_layers=1, proj_size=0, batch_first=False, sizes=range(1, 10))
    dtype = draw.choice([torch.float64, torch.float32])
    rnn = RIM(**given, dtype=dtype)
    strong(draw, rnn)
    steps, rows = draw.randint(1, 4), draw.randint(2, 5)
    cells = len(rnn.cells)
    x, *state = (draw.normal(steps, rows, given["input_size"]), *(draw.normal(cells, rows, s) for s in state_sizes(given)))
    x, state = x.to(dtype), [s.to(dtype) for s in state]
    clean = rnn(x, state[0] if len(state) == 1 else tuple(state))
    bad, target = draw.randrange(rows), draw.choice(["input", "state", "weight"])
    infinite = draw.choice([math.inf, -math.inf])
    if target == "weight":
        parameter = draw.choice(list(rnn.parameters()))
        parameter.data.view(-1)[draw.randrange(parameter.numel())] = infinite
    else:
        row = (x if target == "input" else draw.choice(state))[:, bad]
        row[draw.randrange(len(row)), draw.randrange(row.size(1))] = infinite
    with a_path(draw), record(rnn) as records:
        count_path(rnn.cells[0], x)
        results = rnn(x, state[0] if len(state) == 1 else tuple(state))
    if not bool((records[0].active.sum(-1) == given["k"]).all()):
        raise WrongError("not k units are active")
    if target != "weight":
        others = [b for b in range(rows) if b != bad]
        for name, ours, theirs in zip(("output", "h_n", "c_n"), flat(results), flat(clean), strict=False):
            check_close(f"{name} of the other rows", ours[:, others], theirs[:, others], 10 * TOLERANCE[dtype])
    sum(t.sum() for t in flat(results)).backward()
    return EQUAL


def flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [t for part in results for t in flat(part)]


def no_rows(draw: Draw) -> str:
    """An empty batch: the shapes of nn.LSTM, and gradients that are zero."""
    given = options(draw, sizes=range(1, 10))
    rnn, like = RIM(**given), like_torch(given)
    x = torch.zeros(draw.randint(1, 4), 0, given["input_size"])
    x = x.transpose(0, 1) if given["batch_first"] else x
    state = [torch.zeros(len(rnn.cells), 0, size) for size in state_sizes(given)]
    hx = None if draw.flip() else state[0] if len(state) == 1 else tuple(state)
    with a_path(draw):
        count_path(rnn.cells[0], x)
        results = rnn(x, hx)
    for ours, theirs in zip(flat(results), flat(like(x, hx)), strict=True):
        if ours.shape != theirs.shape:
            raise WrongError(f"shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}")
    sum(t.sum() for t in flat(results)).backward()
    for name, p in rnn.named_parameters():
        if p.grad is not None and bool(p.grad.ne(0).any()):
            raise WrongError(f"gradient of {name} from no rows")
    return EQUAL


# Without values, and on other values than those of the call


def padded(draw: Draw, rnn: RIM[Any], given: dict[str, Any], stated: bool) -> list[Tensor]:
    """Input of a few steps and rows, and first states or none."""
    steps, rows = draw.randint(1, 4), draw.randint(1, 4)
    x = draw.normal(*((rows, steps) if rnn.batch_first else (steps, rows)), given["input_size"])
    state = [draw.normal(len(rnn.cells), rows, size) for size in state_sizes(given)] if stated else []
    return [t.to(next(rnn.parameters()).dtype) for t in (x, *state)]


def call(rnn: RIM[Any], x: Tensor, *state: Tensor) -> list[Tensor]:
    return flat(rnn(x) if not state else rnn(x, state[0] if len(state) == 1 else state))


def fakes(draw: Draw) -> str:
    """Tensors that are a shape alone: shapes, dtypes and devices of results and gradients are those of a call."""
    given = options(draw, sizes=range(1, 10))
    dtype = draw.choice([torch.float64, torch.float32, torch.bfloat16])
    rnn = RIM(**given, dtype=dtype)
    data, wanted, twice = padded(draw, rnn, given, stated=draw.flip()), draw.flip(0.8), draw.flip(0.2)
    about = []
    with a_path(draw):
        count_path(rnn.cells[0], data[0])
        for mode in (nullcontext(), FakeTensorMode()):
            with mode:
                rnn = RIM(**given, dtype=dtype).requires_grad_(wanted)
                tensors = [torch.zeros(t.shape, dtype=dtype, requires_grad=wanted) for t in data]
                found = call(rnn, *tensors)
                if wanted:
                    found += torch.autograd.grad(sum(t.sum() for t in found), [*tensors, *rnn.parameters()], create_graph=twice)
            about.append([(t.shape, t.dtype, t.device, t.requires_grad) for t in found])
    if about[0] != about[1]:
        raise WrongError(f"{about[1]} of fake tensors, {about[0]} of others")
    return EQUAL


class OfTensors(nn.Module):
    """A layer that is given tensors alone, as a trace wants it: input and states, or the parts of a packed sequence."""

    def __init__(self, rnn: RIM[Any], packed: bool) -> None:
        super().__init__()
        self.rnn, self.packed = rnn, packed

    def forward(self, *data: Tensor) -> list[Tensor]:
        if not self.packed:
            return call(self.rnn, *data)
        output, last = self.rnn(PackedSequence(*data))
        return flat((output.data, last))


def traces(draw: Draw) -> str:
    """A trace, run on other numbers, then on other sizes or lengths than its example has: what the layer gives, or an error."""
    given = options(draw, most_units=3, sizes=range(1, 6))
    rnn = RIM(**given, dtype=torch.float64)
    strong(draw, rnn)
    by = draw.choice(["jit", "real", "fake", "symbolic"])
    packed, stated = by in ("jit", "real") and draw.flip(), draw.flip()
    module = OfTensors(rnn, packed)

    def data() -> list[Tensor]:
        x, *state = padded(draw, rnn, given, stated)
        if not packed:
            return [x, *state]
        x = x.transpose(0, 1) if rnn.batch_first else x
        lengths = [len(x), *(draw.randint(1, len(x)) for _ in range(x.size(1) - 1))]
        draw.shuffle(lengths)
        return [*pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)]

    example, other = data(), data()
    with a_path(draw):
        count_path(rnn.cells[0], example[0])
        if by == "jit":
            graph: Any = torch.jit.trace(module, tuple(example), check_trace=False)  # type: ignore[no-untyped-call]
        else:
            parameters = dict(module.named_parameters())
            whole = make_fx(lambda p, *d: torch.func.functional_call(module, p, d), tracing_mode=by)(parameters, *example)
            graph = functools.partial(whole, parameters)
        for inputs in ([torch.flip(example[0], [-1]), *example[1:]], other):
            try:
                found = graph(*inputs)
            except (RuntimeError, AssertionError) as error:
                if inputs is not other:
                    raise WrongError(f"a trace by {by} is refused what it was made for: {error}") from error
                return REFUSED
            for i, (ours, theirs) in enumerate(zip(found, module(*inputs), strict=True)):
                check_close(f"result {i} of a trace by {by}", ours, theirs, 1e-9)
    return EQUAL


# Networks of calls


def network(draw: Draw, calls: int, second: bool, dtype: torch.dtype = torch.float64) -> str:
    """Cells and layers called on tensors of a pool, which their results join: states carried on, outputs fed back, aliases,
    cells used twice, cells that share modules; beside the same network of the oracle's calls."""
    few = {"most_units": 3, "sizes": range(1, 4), "most_heads": 2}
    n = draw.randint(1, 3)
    size = n * draw.randint(1, 3)
    fixed = {"input_size": size, "hidden_size": size, "num_units": n, "k": draw.randint(1, n), "proj_size": 0}
    fixed |= {"num_layers": 1, "bidirectional": False, "batch_first": False, "bias": draw.flip(0.7)}
    given = options(draw, **few, **fixed)
    modules: list[Any] = [RIMCell(**cell_options(given), dtype=dtype) for _ in range(draw.randint(1, 2))]
    if draw.flip(0.3):
        modules.append(RIM(**given, dtype=dtype))
    for module in modules:
        strong(draw, module)
    first, last = modules[0], modules[-1]
    if draw.flip(0.4):
        tie(draw, first, last.cells[0] if isinstance(last, RIM) else last)
    if draw.flip(0.3):
        for module in modules:
            for p in module.parameters():
                p.requires_grad_(draw.flip())
    twins = Twins(draw, dtype)
    params = [twins.parameters(module, f"{i}.") for i, module in enumerate(modules)]
    batch = draw.randint(1, 2)
    pool = [
        twins.leaf(f"leaf {i}", draw.normal(batch, size), draw.flip(0.8), draw.flip(0.3)) for i in range(draw.randint(1, 3))
    ]
    results: dict[str, tuple[Tensor, Tensor]] = {}
    lstm = given["rnn_cell"] == "LSTM"
    with Bids() as bids, a_path(draw):
        for call in range(calls):
            index = draw.randrange(len(modules))
            module, cell_params = modules[index], params[index]
            x, *state = (draw.choice(pool) for _ in range(3 if lstm else 2))
            hx = tuple(s[0] for s in state)
            count_path(module.cells[0] if isinstance(module, RIM) else module, x[0])
            if isinstance(module, RIM):
                more = draw.choice(pool)
                hx = tuple(s[None] for s in hx)
                pair = torch.stack([x[0], more[0]])
                with other_defaults(draw):
                    output, new = module(pair, hx if lstm else hx[0])
                rows = list(torch.stack([x[1], more[1]], 1))
                expected = oracle.rim(cell_params, spec(given), rows, *(s[1][None] for s in state))
                pairs = [(output[0], torch.stack([row[0] for row in expected.rows]))]
                pairs += [(s[0], t[0]) for s, t in zip(flat(new), (expected.h_n, expected.c_n), strict=False)]
            else:
                with other_defaults(draw):
                    new = module(x[0], hx if lstm else hx[0])
                pairs = list(
                    zip(flat(new), oracle.cell(cell_params, spec(given), x[1], *(s[1] for s in state))[:2], strict=False)
                )
            results |= {f"result {call}.{i}": pair for i, pair in enumerate(pairs)}
            pool += pairs
            if draw.flip(0.2):
                one, other = draw.choice(pool), draw.choice(pool)
                pool.append((one[0] + torch.tanh(other[0]), one[1] + torch.tanh(other[1])))
        ours, theirs = ({name: pair[side] for name, pair in results.items()} for side in (0, 1))
        return compare(twins, ours, theirs, bids, second)


def tie(draw: Draw, one: RIMCell[Any], other: RIMCell[Any]) -> None:
    """One module or parameter for two cells, or within one."""
    if one is not other:
        name = draw.choice(["input_attention", "dynamics", "communication"])
        setattr(other, name, getattr(one, name))
    elif one.num_comm_heads and draw.flip():
        one.communication.key.weight = one.communication.query.weight
    elif one.key_size_input == one.value_size_input:
        one.input_attention.value = one.input_attention.key


def aliases(draw: Draw) -> str:
    return network(draw, draw.randint(1, 2), second=False, dtype=draw.choice([torch.float64, torch.float32]))


def networks(draw: Draw) -> str:
    return network(draw, draw.randint(2, 5), second=False)


def second_derivatives(draw: Draw) -> str:
    return network(draw, draw.randint(1, 3), second=True)


def edits(draw: Draw) -> str:
    """A tensor of the call edited in place before backward: torch's error, or the gradient at the values of the call."""
    given = options(draw, sizes=range(1, 10), num_layers=1, batch_first=False, bidirectional=False)
    rnn = RIM(**given, dtype=torch.float64)
    strong(draw, rnn)
    leaf = draw.normal(draw.randint(1, 3), draw.randint(1, 2), given["input_size"]).requires_grad_()
    state = [draw.normal(1, leaf.size(1), size).requires_grad_() for size in state_sizes(given)]
    wanted = [leaf, *state, *rnn.parameters()]

    def call() -> tuple[list[Tensor], list[Tensor]]:
        inputs = [t * 1 for t in (leaf, *state)]
        return inputs, flat(rnn(inputs[0], inputs[1] if len(state) == 1 else tuple(inputs[1:])))

    with a_path(draw):
        count_path(rnn.cells[0], leaf)
        target = draw.choice(["input", "state", "parameter", "result"])
        inputs, results = call()
        if target == "result":  # an edit that counts
            which, factor = draw.randrange(len(results)), draw.normal(1)
            expected = torch.autograd.grad(
                sum((r * (factor if i == which else 1)).sum() for i, r in enumerate(results)), wanted
            )
            _, results = call()
            try:
                results[which].mul_(factor)
                gradients = torch.autograd.grad(sum(r.sum() for r in results), wanted)
            except RuntimeError:
                return REFUSED
        else:
            expected = torch.autograd.grad(sum(r.sum() for r in results), wanted)
            inputs, results = call()
            pick = {"input": inputs[:1], "state": inputs[1:], "parameter": list(rnn.parameters())}[target]
            with torch.no_grad():
                draw.choice(pick).mul_(2)
            try:
                gradients = torch.autograd.grad(sum(r.sum() for r in results), wanted)
            except RuntimeError as error:
                if "inplace" not in str(error):
                    raise
                return REFUSED
    for ours, theirs in zip(gradients, expected, strict=True):
        check_close(f"a gradient after an edit of {target}", ours, theirs, 1e-8)
    return EQUAL


# Mistakes


def like_torch(given: dict[str, Any], cell: bool = False) -> nn.Module:
    """torch's own layer of these sizes."""
    names = (
        ("input_size", "hidden_size", "bias")
        if cell
        else ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "bidirectional", "proj_size")
    )
    shared = {name: given[name] for name in names}
    if given["rnn_cell"] == "GRU":
        shared.pop("proj_size", None)
    return getattr(nn, given["rnn_cell"] + ("Cell" if cell else ""))(**shared)


def error_of(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def judge(what: str, ours: Exception | None, theirs: Exception | None) -> str:
    """Of our error and torch's for the same mistake."""
    if ours is None:
        if theirs is None:
            return EQUAL
        raise WrongError(f"{what}: taken, where torch raises {type(theirs).__name__}: {theirs}")
    if not isinstance(ours, CLEAR) or not str(ours):
        raise WrongError(f"{what}: {type(ours).__name__}: {ours}")
    if theirs is None:
        return STRICTER
    accident = not isinstance(theirs, CLEAR)
    if not accident and not any(isinstance(ours, kind) and isinstance(theirs, kind) for kind in CLEAR):
        raise WrongError(f"{what}: {type(ours).__name__} ({ours}), where torch raises {type(theirs).__name__} ({theirs})")
    return REFUSED


def wrong_tensor(draw: Draw, right: Tensor) -> tuple[str, Any]:
    """Something that is not what belongs there, and what it is."""
    dim = draw.randrange(right.dim())
    ways: dict[str, Callable[[], Any]] = {
        "a size too large": lambda: torch.cat([right, right.narrow(dim, 0, 1)], dim),
        "a size zero": lambda: right.narrow(dim, 0, 0),
        "a dimension more": lambda: right.unsqueeze(dim),
        "a dimension less": lambda: right.select(dim, 0),
        "no dimension": lambda: right.sum(),
        "float64": right.double,
        "float16": right.half,
        "int64": right.long,
        "bool": right.bool,
        "complex": lambda: right.to(torch.complex64),
        "meta": lambda: right.to("meta"),
        "a list": right.tolist,
        "an array": right.numpy,
        "a string": lambda: "zeros",
        "a number": lambda: 0.0,
        "a dict": lambda: {"h": right},
        "a tuple": lambda: (right,),
    }
    name = draw.choice(list(ways))
    return name, ways[name]()


def wrong_calls(draw: Draw) -> str:
    """A wrong input or state, for a layer or a cell and torch's own."""
    cell = draw.flip(0.3)
    given = options(draw, most_units=3, sizes=range(1, 5), **({"proj_size": 0} if cell else {}))
    ours: Any = RIMCell(**cell_options(given)) if cell else RIM(**given)
    theirs = like_torch(given, cell)
    rows, lead = draw.randint(1, 3), [] if cell else [draw.randint(1, 3)]
    batched = draw.flip(0.8)
    middle = [rows] if batched else []
    x = draw.normal(*lead, *middle, given["input_size"]).float()
    if given["batch_first"] and not cell and batched:
        x = x.transpose(0, 1).contiguous()
    cells = [] if cell else [given["num_layers"] * (1 + given["bidirectional"])]
    state = [draw.normal(*cells, *middle, size).float() for size in state_sizes(given)]
    hx: Any = tuple(state) if len(state) == 2 else state[0]
    argument: Any = x
    packed = not cell and batched and draw.flip(0.2)
    if packed:
        argument = pack_padded_sequence(x, [x.size(1 if given["batch_first"] else 0)] * rows, given["batch_first"], draw.flip())
    what = draw.choice(["input", "state", "states"])
    if what == "input":
        how, wrong = wrong_tensor(draw, argument.data if packed else x)
        if packed:
            if not isinstance(wrong, Tensor):
                return wrong_calls(draw)
            argument = argument._replace(data=wrong)
        else:
            argument = wrong
        hx = None if draw.flip() else hx
    elif what == "state":
        which = draw.randrange(len(state))
        how, wrong = wrong_tensor(draw, state[which])
        hx = wrong if len(state) == 1 else tuple(wrong if i == which else s for i, s in enumerate(state))
    else:
        ways = {
            "a lone tensor": state[0],
            "a tuple of one": (state[0],),
            "a tuple of three": (state[0],) * 3,
            "an empty tuple": (),
            "a list": state,
            "None in a tuple": (state[0], None),
            "a dict": {"h": state[0]},
            "a string": "zeros",
            "a number": 0,
            "states the other way round": tuple(state[::-1]),
            "a tuple of tuples": (tuple(state), tuple(state)),
        }
        how = draw.choice(list(ways))
        hx = ways[how]
    with a_path(draw):
        errors = [error_of(lambda module=module: module(argument, hx)) for module in (ours, theirs)]
    if how == "a lone tensor" and isinstance(errors[0], TypeError):
        return REFUSED  # so it is documented; torch's depends on the tensor's sizes
    kind = f"{type(ours).__name__}, {given['rnn_cell']}{', packed' if packed else '' if batched else ', unbatched'}"
    return judge(f"{kind}: {what} is {how}", *errors)


WRONG_SIZES = [[1, 2, 3], [3, 1, 2], [3, 2, 2], [3, 2], [7], [], [3, 3, 0], [6, 0], [0, 3, 3], [3, 4, -1], [-3, 9], [2**40, 1]]


def wrong_packs(draw: Draw) -> str:
    """A PackedSequence made by hand, of sizes that do not fit."""
    given = options(draw, most_units=3, sizes=range(1, 5))
    rnn, like, rows = RIM(**given), like_torch(given), 6
    sizes = draw.choice(WRONG_SIZES)
    packed = PackedSequence(
        draw.normal(rows, given["input_size"]).float().requires_grad_(draw.flip()), torch.tensor(sizes).long()
    )
    with a_path(draw):
        path = count_path(rnn.cells[0], packed.data)
        errors = [error_of(lambda module=module: module(packed)) for module in (rnn, like)]
    return judge(f"{path}: batch_sizes {sizes} of {rows} rows", *errors)


SHARED = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")
SHARED += ("device", "dtype")
OWN = tuple(name for name in inspect.signature(RIM.__init__).parameters if name not in ("self", *SHARED))
NONSENSE = [None, -1, 0, 1, 2, 5, 1.5, -0.5, 2.0, "2", "", b"2", True, False, math.nan, math.inf, 1j, [], (2,), {}, object]
NONSENSE += [2**70, -(2**70)]


def wrong_arguments(draw: Draw) -> str:
    """A constructor's argument that is nonsense. What torch's layer has too raises what torch raises."""
    rnn_cell = draw.choice(["LSTM", "GRU"])
    right: dict[str, Any] = {"input_size": 3, "hidden_size": 12}
    name, value = draw.choice(SHARED + OWN), draw.choice(NONSENSE)
    if value == 2**70 and name in ("num_layers", *OWN):
        value = 2  # right, and more than a machine holds
    if name == "rnn_cell" and value is None:
        value = "RNN"
    arguments = right | {name: value}
    with a_path(draw):
        ours = error_of(lambda: RIM(**{"rnn_cell": rnn_cell, **arguments}))
        if name in SHARED:
            if rnn_cell == "GRU" and name == "proj_size":
                return judge(f"GRU({name}={value!r})", ours, ValueError() if value else None)
            if isinstance(value, bool) and isinstance(ours, TypeError):
                return STRICTER  # torch takes a bool for a number
            return judge(f"{rnn_cell}({name}={value!r})", ours, error_of(lambda: getattr(nn, rnn_cell)(**arguments)))
    if ours is None:
        RIM(**{"rnn_cell": rnn_cell, **arguments})(torch.zeros(2, 1, 3))
        return EQUAL
    if type(ours) not in (ValueError, TypeError) or name not in str(ours):
        raise WrongError(f"{name}={value!r}: {type(ours).__name__}: {ours}")
    return REFUSED


def checkpoints(draw: Draw) -> str:
    """A state_dict that does not fit: torch's error, which names what is wrong, and torch's habit of what it loads before."""
    given = options(draw, most_units=4, sizes=range(1, 5))
    rnn = RIM(**given)
    before = {name: p.clone() for name, p in rnn.state_dict().items()}
    new: dict[str, Any] = {name: torch.randn_like(p) for name, p in before.items()}
    way = draw.choice(["missing", "unexpected", "shape", "units", "torch's", "not tensors", "empty", "not a dict"])
    names = list(new)
    if way == "missing":
        for name in draw.sample(names, draw.randint(1, min(3, len(names)))):
            del new[name]
    elif way == "unexpected":
        new["cells.0.dynamics.weight_ih_l0"] = torch.zeros(1)
    elif way == "shape":
        name = draw.choice(names)
        new[name] = torch.cat([new[name], new[name]], draw.randrange(new[name].dim()))
    elif way == "units":
        n = given["num_units"] + 1
        size = n * 2
        new = dict(RIM(**given | {"num_units": n, "k": 1, "hidden_size": size, "proj_size": 0}).state_dict())
    elif way == "torch's":
        new = dict(like_torch(given).state_dict())
    elif way == "not tensors":
        new[draw.choice(names)] = draw.choice([None, 1.5, "weights", [1.0]])
    elif way == "empty":
        new = {}
    wrong: Any = 5 if way == "not a dict" else new
    error = error_of(lambda: rnn.load_state_dict(wrong))
    kind = TypeError if way == "not a dict" else RuntimeError
    if not isinstance(error, kind):
        raise WrongError(f"{way}: {error!r} instead of {kind.__name__}")
    for name, p in rnn.state_dict().items():
        fits = way != "not a dict" and isinstance(new.get(name), Tensor) and new[name].shape == p.shape
        if not torch.equal(p, new[name] if fits else before[name]):
            raise WrongError(f"{way}: {name} is neither as it was nor what was loaded")
    return REFUSED


# Direct calls of the operators

OPERATORS = () if native._unavailable else ("infer", "scan", "scan_backward")
SCHEMAS = {name: [a.name for a in getattr(torch.ops.rim_rnn, name).default._schema.arguments] for name in OPERATORS}
INTS = [-(2**63), -(2**31) - 1, -5, -1, 0, 1, 2, 3, 4, 5, 7, 2**31 - 1, 2**31, 2**33 + 1, 2**62, 2**63 - 1]


def operator_arguments(draw: Draw) -> tuple[dict[str, Any], dict[str, str]]:
    """A right call by the names of the schema, and which parameter each of them is."""
    given = options(draw, most_units=4, sizes=range(1, 5), most_heads=2)
    dtype = draw.choice([torch.float64, torch.float32])
    cell = RIMCell(**cell_options(given), dtype=dtype)
    strong(draw, cell)
    steps, batch, n = draw.randint(1, 3), draw.randint(1, 3), given["num_units"]
    batch_sizes: list[int] = sorted((draw.randint(1, batch) for _ in range(steps - 1)), reverse=True) if draw.flip() else []
    batch_sizes = [batch, *batch_sizes] if batch_sizes or draw.flip(0.2) else []
    total = sum(batch_sizes) or steps * batch
    x = draw.normal(*((total,) if batch_sizes else (steps, batch)), given["input_size"]).to(dtype)
    state = [draw.normal(batch, size).to(dtype) for size in state_sizes(given)]

    def keep(*shape: int) -> Tensor | None:
        return 2 * (draw.normal(*shape) > 0).to(dtype) if math.prod(shape) and draw.flip() else None

    names = SCHEMAS["scan"]
    of_cell = dict(zip(names[3 : names.index("keep_input")], PARAMETERS, strict=True))
    held = {name: p.detach() for name, p in cell.named_parameters()}
    arguments: dict[str, Any] = {
        "input": x,
        "h": state[0],
        "c": state[1] if len(state) == 2 else None,
        **{short: held.get(name) for short, name in of_cell.items()},
        "keep_input": keep(total, n, given["num_input_heads"]),
        "keep_comm": keep(total, given["num_comm_heads"], n, n),
        "batch_sizes": batch_sizes,
        "k": given["k"],
        "heads": given["num_input_heads"],
        "comm_heads": given["num_comm_heads"],
        "bounded": given.get("comm_bounded"),
        "reverse": draw.flip(),
        "rounded": draw.flip(),
    }
    return {name: arguments[name] for name in names}, of_cell


def operator_oracle(a: dict[str, Any], of_cell: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, Tensor], Bids]:
    """What the arguments say, in the oracle's loops: leaves, results, and how close bids came."""
    leaves = {
        n: v.detach().double().requires_grad_() for n, v in a.items() if isinstance(v, Tensor) and not n.startswith("keep")
    }
    params = {of_cell[name]: leaf for name, leaf in leaves.items() if name in of_cell}
    options = {"k": a["k"], "rnn_cell": "GRU" if a["c"] is None else "LSTM", "comm_bounded": a.get("bounded")}
    what = spec(options, num_input_heads=a["heads"], num_comm_heads=a["comm_heads"])
    x, batch = leaves["input"], len(leaves["h"])
    sizes = a["batch_sizes"] or [x.size(1)] * x.size(0)
    rows = x.reshape(-1, x.size(-1))
    if sum(sizes) != len(rows) or sizes != sorted(sizes, reverse=True) or sizes[0] != batch or sizes[-1] < 1:
        raise ValueError("batch_sizes")
    offsets = [sum(sizes[:t]) for t in range(len(sizes))]
    h, c = list(leaves["h"].unbind(0)), [None] * batch if a["c"] is None else list(leaves["c"].unbind(0))
    output: list[Any] = [None] * len(rows)
    scales = [None if a[name] is None else a[name].double() for name in ("keep_input", "keep_comm")]
    with Bids() as bids:
        for t in reversed(range(len(sizes))) if a["reverse"] else range(len(sizes)):
            for b in range(sizes[t]):
                at = offsets[t] + b
                step = oracle.step(params, what, rows[at], h[b], c[b], *(None if s is None else s[at] for s in scales))
                output[at] = h[b] = step.h
                c[b] = step.c
    results = {"output": torch.stack(output).view(*x.shape[:-1], -1), "h_n": torch.stack(h)}
    if a["c"] is not None:
        results["c_n"] = torch.stack(c)
    return leaves, results, bids


def wrong_operand(draw: Draw, value: Any) -> Any:
    """Something else than this argument of an operator."""
    if isinstance(value, bool):
        return draw.choice([not value, None, 2, "yes"])
    if isinstance(value, int):
        return draw.choice([*INTS, None, 1.5, 2**64])
    if isinstance(value, list):
        few = [[], [1], [2, 1], [3, 2, 1], [1, 2], [2, 0], [2, -1], [0], [-1], [1] * 5]
        return draw.choice([*few, [2**62] * 4, [2**63 - 1, 1], [1.5], None, 3])
    if value is None:
        return draw.choice([torch.zeros(1), torch.zeros(0), torch.zeros(2, 2, dtype=torch.float64), 1.0])
    ways: list[Callable[[], Any]] = [
        lambda: wrong_tensor(draw, value)[1],
        lambda: odd_layout(draw, value) if value.is_floating_point() else value.t().contiguous().t(),
        lambda: None,
        lambda: value.to_sparse(),
        lambda: value[:1].expand(2**50, *value.shape[1:]),
        lambda: value.new_empty([0] * value.dim()),
        lambda: value.flip(0),
        lambda: torch.zeros_like(value),
    ]
    return draw.choice(ways)()


def operators(draw: Draw) -> str:
    """A call of an operator with up to three wrong arguments: RuntimeError (of wrong types torch's TypeError), or the result
    of the arguments that it was given."""
    if not SCHEMAS:
        return STRICTER
    operator = draw.choice(list(SCHEMAS))
    call = getattr(torch.ops.rim_rnn, operator).default
    arguments, of_cell = operator_arguments(draw)
    torch.set_num_threads(2 if draw.flip(0.25) else 1)
    paths["operator"] += 1
    results = torch.ops.rim_rnn.scan.default(*arguments.values())
    if operator == "scan_backward":
        output, h_n, c_n, winners, saved = results
        grads = [draw.normal(*r.shape).to(r.dtype) if draw.flip(0.8) else None for r in (output, h_n, c_n)]
        grads[2] = grads[2] if arguments["c"] is not None else None
        extra = (*grads, output, winners, saved, draw.flip())
        arguments = dict(zip(SCHEMAS[operator], (*extra, *arguments.values()), strict=True))
    changed = draw.sample(list(arguments), draw.choice([0, 1, 1, 1, 2, 3]))
    for name in changed:
        arguments[name] = wrong_operand(draw, arguments[name])
    with torch.no_grad():
        try:
            results = call(*arguments.values())
        except (RuntimeError, TypeError, ValueError) as error:
            if not changed or not str(error):
                raise WrongError(f"{operator}: a right call raises {error!r}") from error
            return REFUSED
    if any(isinstance(a, Tensor) and a.is_meta for a in arguments.values()) and all(r.is_meta for r in results):
        return EQUAL  # shapes alone were asked for
    plain = {name: arguments[name] for name in SCHEMAS["scan"]}
    what = f"{operator} with another {', '.join(changed) or 'nothing'}"
    try:
        leaves, expected, bids = operator_oracle(plain, of_cell)
    except Exception as error:
        raise WrongError(f"{what}: taken, but {error!r}") from error
    dtype = plain["input"].dtype
    if bids.closest < UNDECIDED[dtype]:
        return NEAR_TIE
    if operator != "scan_backward":
        for (name, theirs), ours in zip(expected.items(), results, strict=False):
            check_close(f"{what}: {name}", ours, theirs, TOLERANCE[dtype])
        return EQUAL
    given = [(expected[r], arguments[g]) for r, g in zip(expected, ("grad_output", "grad_h", "grad_c"), strict=False)]
    given = [(r, g.double()) for r, g in given if g is not None]
    wanted = [leaf for name, leaf in leaves.items() if name in ("input", "h", "c", *of_cell)]
    if len(results) != len(wanted):
        raise WrongError(f"{what}: {len(results)} gradients instead of {len(wanted)}")
    # What forward kept is taken at its word: other numbers there, or other arguments than forward's, give other gradients.
    if set(changed) - {"grad_output", "grad_h", "grad_c", "input_grad"} or not given:
        return EQUAL
    gradients = torch.autograd.grad([r for r, _ in given], wanted, [g for _, g in given], allow_unused=True)
    for ours, theirs, leaf, name in zip(results, gradients, wanted, leaves, strict=True):
        if name == "input" and not arguments["input_grad"]:
            continue
        check_close(
            f"{what}: gradient of {name}", ours, torch.zeros_like(leaf) if theirs is None else theirs, 10 * TOLERANCE[dtype]
        )
    return EQUAL


KINDS: dict[Callable[[Draw], str], int] = {  # and how many of a round of cases are of it
    sizes: 5,
    layouts: 5,
    frozen: 2,
    shared_memory: 2,
    tied_layers: 1,
    packing: 4,
    many_rows: 1,
    ties: 2,
    nans: 2,
    extremes: 2,
    infinities: 1,
    no_rows: 1,
    fakes: 1,
    traces: 1,
    aliases: 2,
    networks: 2,
    second_derivatives: 2,
    edits: 1,
    wrong_calls: 2,
    wrong_packs: 1,
    wrong_arguments: 1,
    checkpoints: 1,
    operators: 4,
}
ROUND = [kind for kind, times in KINDS.items() for _ in range(times)]


# Running them


def run(seed: int, number: int) -> dict[str, Any]:
    """One case: its kind, how it ended or what is wrong, which paths it took, how long it took."""
    kind, began = ROUND[number % len(ROUND)], time.perf_counter()
    paths.clear()
    entry: dict[str, Any] = {"number": number, "kind": kind.__name__}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            entry["outcome"] = kind(Draw(seed, number))
    except WrongError as error:
        entry |= {"outcome": "failed", "problem": str(error)}
    except Exception as error:
        entry |= {"outcome": "failed", "problem": f"{type(error).__name__}: {error}", "trace": traceback.format_exc(limit=-6)}
    finally:
        torch.set_num_threads(1)
    return entry | {"paths": dict(paths), "seconds": round(time.perf_counter() - began, 4)}


def work(seed: int, first: int, cases: int) -> None:
    """In a subprocess: one line before each case and one after it."""
    faulthandler.enable()
    for number in range(first, first + cases):
        print(json.dumps({"begin": number}), flush=True)
        print(json.dumps(run(seed, number)), flush=True)


def watch(seed: int, first: int, cases: int) -> Iterator[dict[str, Any]]:
    """The cases of one subprocess, up to the one in which it dies or hangs."""
    command = [sys.executable, __file__, "--work", *map(str, (seed, first, cases))]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        said: list[str] = []
        assert process.stdout
        assert process.stderr
        listener = threading.Thread(target=lambda pipe: said.extend(pipe), args=(process.stderr,))
        listener.start()
        number, begun = None, first
        while number != first + cases - 1:
            clock = threading.Timer(PATIENCE, process.kill)
            clock.start()
            line = process.stdout.readline()
            clock.cancel()
            if not line:
                break
            entry = json.loads(line)
            if "begin" in entry:
                begun = entry["begin"]
            else:
                number = entry["number"]
                yield entry
        code = process.wait()
        listener.join()
        if code or number != first + cases - 1:
            problem = f"the process ends with {code}: {''.join(said)[:3000]}"
            kind = ROUND[begun % len(ROUND)].__name__
            yield {"number": begun, "kind": kind, "outcome": "failed", "problem": problem, "paths": {}, "seconds": 0.0}


def run_all(seed: int, first: int, cases: int) -> Iterator[dict[str, Any]]:
    number, end = first, first + cases
    while number < end:
        for entry in watch(seed, number, min(CHUNK, end - number)):
            yield entry
            number = entry["number"] + 1


def about() -> dict[str, Any]:
    """Where and of what the cases ran."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    try:
        processor = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "native": native._unavailable or "built",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": processor.partition(":")[2].strip() or processor,
        "cores": os.cpu_count(),
    }


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--work"]:
        work(*map(int, arguments[1:]))
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--log", type=Path, help="a JSON file to write")
    args = parser.parse_args(arguments)

    what = about()
    began, done, took = time.perf_counter(), Counter[str](), Counter[str]()
    kinds = {kind.__name__: Counter[str]() for kind in KINDS}
    failures = []
    for entry in run_all(args.seed, args.first, args.cases):
        kinds[entry["kind"]][entry["outcome"]] += 1
        took[entry["kind"]] += entry["seconds"]
        done.update(entry["paths"])
        if entry["outcome"] == "failed":
            failures.append({name: entry[name] for name in ("number", "kind", "problem", "trace") if name in entry})
            print(f"--seed {args.seed} --first {entry['number']} --cases 1: {entry['kind']}: {entry['problem']}", flush=True)
            if args.cases == 1:
                print(entry.get("trace", ""))
    columns = [EQUAL, REFUSED, STRICTER, NEAR_TIE, "failed"]
    print(f"{'':20}" + "".join(f"{column:>10}" for column in columns) + f"{'seconds':>10}")
    for name, outcomes in kinds.items():
        print(f"{name:20}" + "".join(f"{outcomes[column]:10}" for column in columns) + f"{took[name]:10.1f}")
    print(f"{args.cases} cases, {len(failures)} failed; calls by path: {dict(done)}")
    if args.log:
        document = {
            "command": f"python tests/hostile.py --seed {args.seed} --first {args.first} --cases {args.cases}",
            **what,
            "seconds": round(time.perf_counter() - began, 1),
            "kinds": {name: dict(outcomes) for name, outcomes in kinds.items()},
            "paths": dict(done),
            "failures": failures,
        }
        args.log.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
