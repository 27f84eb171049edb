"""What is timed: sizes, the layers and calls that a size stands for, and the arithmetic it needs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from rim_rnn import RIM


@dataclass(frozen=True)
class Case:
    """Sizes of one comparison. With `shortest`, the batch is packed: lengths evenly spread from there to `steps`."""

    steps: int
    batch: int
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bidirectional: bool = False
    rnn_cell: str = "LSTM"
    shortest: int = 0
    num_units: int | None = None
    k: int | None = None
    value_size_comm: int | None = None
    dtype: str = "float32"
    last: bool = False
    """Only the last output is read, so that the gradient vanishes towards the first step."""

    @property
    def lengths(self) -> list[int]:
        """The steps of each row, longest first."""
        spread = (self.steps - (self.shortest or self.steps)) / max(1, self.batch - 1)
        return [round(self.steps - spread * row) for row in range(self.batch)]

    @property
    def learned_input(self) -> bool:
        """Whether the input asks for a gradient: a single pixel is data, anything wider comes from a layer below."""
        return self.input_size > 1

    def __str__(self) -> str:
        extra = [f"{self.num_layers} layers"] * (self.num_layers > 1)
        extra += ["both directions"] * self.bidirectional + [self.rnn_cell] * (self.rnn_cell != "LSTM")
        extra += [f"packed, lengths {self.shortest} to {self.steps}"] * (self.shortest > 0)
        extra += [self.dtype] * (self.dtype != "float32") + ["the last output read"] * self.last
        sizes = f"T={self.steps}, N={self.batch}, {self.input_size} → {self.hidden_size}"
        return ", ".join([sizes, *extra])


PAPER = Case(196, 64, 1, 600)
CASES = {
    "paper": PAPER,
    "embed": Case(196, 64, 64, 600),
    "small": Case(196, 64, 1, 120),
    "mid": Case(100, 32, 64, 256, num_layers=2),
    "big": Case(64, 256, 128, 1024),
    "packed": Case(196, 64, 64, 300, shortest=19),
    "act": Case(1, 1, 64, 256),
    "act16": Case(1, 16, 64, 256),
    "bidirectional": replace(PAPER, bidirectional=True),
    "gru": replace(PAPER, rnn_cell="GRU"),
    "bfloat16": Case(196, 64, 64, 600, dtype="bfloat16"),
    "last": Case(400, 64, 16, 128, last=True),
}

# Recurrent policies, forecasters, small language models: with LSTM and with GRU units.
EVERYDAY = {
    f"{name}, {rnn_cell}": replace(case, rnn_cell=rnn_cell)
    for name, case in {
        "policy": Case(32, 64, 64, 64),
        "one step": Case(1, 64, 64, 128),
        "sensors": Case(50, 128, 32, 128),
        "forecast": Case(128, 16, 64, 128),
        "long": Case(400, 8, 16, 64),
        "words": Case(20, 64, 128, 128, num_layers=2),
        "text": Case(35, 20, 200, 200, num_layers=2),
        "many": Case(16, 256, 64, 256),
    }.items()
    for rnn_cell in ("LSTM", "GRU")
}

# Everything is doubled from here, one size at a time.
BASE = Case(100, 32, 64, 512, num_units=8, k=4)
SCALING = {
    "steps": [25, 50, 100, 200, 400],
    "batch": [8, 16, 32, 64, 128],
    "hidden_size": [128, 256, 512, 1024],
    "num_units": [4, 8, 16, 32],
    "k": [1, 2, 4, 8],
}
# What a call costs before any arithmetic (the least that takes the way of act), what each row adds to the weights' way to the
# processor, and the same at the paper's size, whose units do not fill vectors.
CALLS = {
    "nothing": Case(1, 1, 1, 16, num_units=1),
    **{f"batch={rows}": replace(CASES["act"], batch=rows) for rows in (1, 2, 4, 8, 16, 32)},
    **{f"paper, batch={rows}": Case(1, rows, 64, 600) for rows in (1, 16, 64, 256)},
}
COMPILED = {name: CASES[name] for name in ("paper", "small", "act16")}
LENGTHS = {"policy": Case(8, 16, 64, 128)}
MEMORY = {"steps": [100, 200, 400, 800, 1600]}  # of the paper's case


def shrink(case: Case) -> Case:
    """The same kind of case in a size that takes no time, to see that everything runs."""
    return replace(case, steps=min(case.steps, 3), batch=min(case.batch, 2), hidden_size=32, shortest=min(case.shortest, 1))


def build(name: str, case: Case) -> nn.Module:
    """`"RIM"`, or `"torch"`: the `nn.LSTM` or `nn.GRU` of the same sizes."""
    shared = {"num_layers": case.num_layers, "bidirectional": case.bidirectional, "dtype": getattr(torch, case.dtype)}
    if name == "RIM":
        own = {"num_units": case.num_units, "k": case.k, "value_size_comm": case.value_size_comm}
        return RIM(case.input_size, case.hidden_size, **shared, rnn_cell=case.rnn_cell, **own)
    return getattr(nn, case.rnn_cell)(case.input_size, case.hidden_size, **shared)


class Data:
    """The input of a case, and the gradient that its output gets."""

    def __init__(self, case: Case, device: torch.device | str = "cpu") -> None:
        random = torch.Generator().manual_seed(0)
        x = torch.randn(case.steps, case.batch, case.input_size, generator=random).to(device, getattr(torch, case.dtype))
        features = case.hidden_size * (2 if case.bidirectional else 1)
        self.gradient = torch.randn(case.steps, case.batch, features, generator=random).to(x)
        self.gradient[: case.steps - 1] *= not case.last
        self.input: Tensor | PackedSequence = x
        self.leaf = x
        if case.shortest:
            packed = pack_padded_sequence(x, torch.tensor(case.lengths))
            self.leaf = packed.data
            self.input = packed._replace(data=self.leaf)
            self.gradient = pack_padded_sequence(self.gradient, torch.tensor(case.lengths)).data
        self.leaf.requires_grad_(case.learned_input)


def calls(layer: Callable[..., Any], parameters: list[Tensor], data: Data) -> dict[str, Callable[[], None]]:
    """The two things that are timed: forward without gradients, and forward and backward as a training step does them."""

    def forward() -> None:
        with torch.no_grad():
            layer(data.input)

    def train() -> None:
        for leaf in (data.leaf, *parameters):
            leaf.grad = None
        output = layer(data.input)[0]
        (output.data if isinstance(data.input, PackedSequence) else output).backward(data.gradient)

    return {"forward": forward, "train": train}


def flops(name: str, case: Case, train: bool, winners_only: bool = False) -> int:
    """Floating-point operations of a case's matrix products; a multiplication and an addition count as two.

    For a RIM: keys and gates of the input, for all steps at once and with `W^v W_ih` multiplied in the cheaper order; then
    per step one product from `h` (query and recurrent gates), one from `h~` (query, key and value), the attention among
    the units, and the output. `winners_only` counts what the `k` winners need of those per step.

    A backward pass has two products for each, one for either factor, but none for what asks for no gradient: the first
    state, and the input where it is data. Biases, gates and softmax are not products, and not counted.
    """
    cell = _rim if name == "RIM" else _torch
    directions = 2 if case.bidirectional else 1
    total = 0
    for layer in range(case.num_layers):
        input_size = case.hidden_size * directions if layer else case.input_size
        total += directions * cell(case, input_size, train, layer > 0 or case.learned_input, winners_only)
    return total


def _product(rows: int, inner: int, outer: int, train: bool, gradient_rows: int | None = None) -> int:
    """`(rows, inner) @ (inner, outer)`; in backward the right factor's gradient, and the left one's for `gradient_rows`."""
    gradient_rows = rows if gradient_rows is None else gradient_rows
    return 2 * inner * outer * (rows + train * (rows + gradient_rows))


def _torch(case: Case, input_size: int, train: bool, input_gradient: bool, winners_only: bool) -> int:
    rows, hidden = sum(case.lengths), case.hidden_size
    gates = hidden * (4 if case.rnn_cell == "LSTM" else 3)
    return _product(rows, input_size, gates, train, rows * input_gradient) + _product(
        rows, hidden, gates, train, rows - case.batch
    )


def _rim(case: Case, input_size: int, train: bool, input_gradient: bool, winners_only: bool) -> int:
    with torch.device("meta"):
        cell = build("RIM", replace(case, num_layers=1, bidirectional=False)).cells[0]
    rows, later = sum(case.lengths), sum(case.lengths) - case.batch
    n, winners = cell.num_units, cell.k if winners_only else cell.num_units
    unit, gates = cell.hidden_size // n, cell.hidden_size // n * cell.dynamics.num_gates
    value, heads = cell.value_size_input, cell.num_comm_heads
    query, key, comm = cell.key_size_input, heads * cell.key_size_comm, heads * cell.value_size_comm

    total = _product(rows, input_size, query, train, rows * input_gradient)
    total += min(
        _product(input_size, value, n * gates, train) + _product(rows, input_size, n * gates, train, rows * input_gradient),
        _product(rows, input_size, value, train, rows * input_gradient) + _product(rows, value, n * gates, train),
    )
    total += n * _product(rows, unit, query, train, later) + winners * _product(rows, unit, gates, train, later)
    total += winners * _product(rows, unit, key, train) + n * _product(rows, unit, key + comm, train)
    total += rows * winners * (_product(1, key, n, train) + _product(1, n, comm, train))
    total += winners * _product(rows, comm, unit, train)
    return total
