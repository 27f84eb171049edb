"""Layers drawn by hypothesis: tiny sizes, every option, parameters far from zero; and the oracle's view of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import oracle
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from rim_rnn import RIM

CELL_OPTIONS = ("bias", "proj_size", "num_units", "k", "rnn_cell", "key_size_input", "value_size_input", "num_input_heads")
CELL_OPTIONS += ("key_size_comm", "value_size_comm", "num_comm_heads", "comm_bounded")


@st.composite
def options(draw: st.DrawFn, **fixed: Any) -> dict[str, Any]:
    """Keywords of a `RIM` without dropouts; those in `fixed` are not drawn."""

    def pick(name: str, strategy: st.SearchStrategy[Any]) -> Any:
        return fixed[name] if name in fixed else draw(strategy, label=name)

    n = pick("num_units", st.integers(1, 4))
    k = pick("k", st.integers(1, n))
    rnn_cell = pick("rnn_cell", st.sampled_from(["LSTM", "GRU"]))
    unit_size = draw(st.integers(1, 3), label="u")
    proj = draw(st.integers(0, unit_size - 1), label="p") if rnn_cell == "LSTM" else 0
    small = st.integers(1, 3)
    return {
        "input_size": pick("input_size", small),
        "hidden_size": n * unit_size,
        "num_layers": pick("num_layers", st.integers(1, 2)),
        "bias": pick("bias", st.booleans()),
        "bidirectional": pick("bidirectional", st.booleans()),
        "proj_size": pick("proj_size", st.just(n * proj)),
        "num_units": n,
        "k": k,
        "rnn_cell": rnn_cell,
        "key_size_input": pick("key_size_input", small),
        "value_size_input": pick("value_size_input", small),
        "num_input_heads": pick("num_input_heads", st.integers(1, 2)),
        "key_size_comm": pick("key_size_comm", small),
        "value_size_comm": pick("value_size_comm", small),
        "num_comm_heads": pick("num_comm_heads", st.integers(0, 2)),
        "comm_bounded": pick("comm_bounded", st.booleans()),
    }


def cell_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those of a layer's keywords that a `RIMCell` takes, with the two sizes."""
    return {name: options[name] for name in ("input_size", "hidden_size", *CELL_OPTIONS)}


def spec(options: dict[str, Any]) -> oracle.Spec:
    """What the oracle has to be told besides the parameters."""
    names = ("k", "rnn_cell", "num_input_heads", "num_comm_heads", "comm_bounded", "num_layers", "bidirectional")
    return oracle.Spec(**{name: options[name] for name in names if name in options})


def strong(module: nn.Module, seed: int = 0, scale: float = 0.8) -> Any:
    """The module with parameters drawn from a wide normal distribution, so that no equation is nearly linear."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(scale * drawn)
    return module


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@dataclass
class Inputs:
    """The rows of a batch, each of its own length, and the first states where the case has them."""

    rows: list[Tensor]
    state: tuple[Tensor, ...] | None

    def leaves(self) -> list[Tensor]:
        return [*self.rows, *(self.state or ())]

    def hx(self, rnn_cell: str) -> Any:
        return self.state[0] if self.state is not None and rnn_cell == "GRU" else self.state


@st.composite
def inputs(draw: st.DrawFn, options: dict[str, Any], lengths: st.SearchStrategy[list[int]] | None = None) -> Inputs:
    """One to three rows of up to four steps, with or without first states; all of them want gradients."""
    if lengths is None:
        lengths = st.lists(st.integers(1, 4), min_size=1, max_size=3)
    steps = draw(lengths, label="lengths")
    rows = [normal(t, options["input_size"], seed=10 + b).requires_grad_() for b, t in enumerate(steps)]
    state = None
    if draw(st.booleans(), label="states given"):
        cells = options["num_layers"] * (1 + options["bidirectional"])
        sizes = [options["proj_size"] or options["hidden_size"], options["hidden_size"]]
        sizes = sizes if options["rnn_cell"] == "LSTM" else sizes[:1]
        state = tuple(normal(cells, len(steps), size, seed=30 + i).requires_grad_() for i, size in enumerate(sizes))
    return Inputs(rows, state)


def run_rows(rnn: RIM[Any], inputs: Inputs) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """The layer on a list of rows: packed where their lengths differ, a plain tensor where they agree."""
    hx = inputs.hx(rnn.rnn_cell)
    if len({len(row) for row in inputs.rows}) == 1:
        output, state = rnn(torch.stack(inputs.rows, dim=0 if rnn.batch_first else 1), hx)
        rows = list(output.unbind(0 if rnn.batch_first else 1))
    else:
        output, state = rnn(pack_sequence(inputs.rows, enforce_sorted=False), hx)
        rows = unpack_sequence(output)
    return rows, state if isinstance(state, tuple) else (state,)


def gradients(outputs: Iterable[Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a fixed random weighing of all outputs, zero where there is no path."""
    loss = sum((out * normal(*out.shape, seed=100 + i, dtype=out.dtype)).sum() for i, out in enumerate(outputs))
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def assert_same(actual: Any, expected: Any, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    """Equal up to the rounding of float64."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def assert_identical(actual: Any, expected: Any) -> None:
    """Equal bit for bit, NaN included."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


NOT_ON_THIS_PROCESSOR = "could not create a primitive descriptor"
"""In torch's words where `nn.LSTM` is under autocast and oneDNN has none of bfloat16: without AVX-512, for one."""


@contextmanager
def or_not_on_this_processor() -> Iterator[None]:
    """Around a call of torch's own layer: leaves the test out where torch cannot run it."""
    try:
        yield
    except RuntimeError as error:
        if NOT_ON_THIS_PROCESSOR in str(error):
            pytest.skip(str(error))
        raise
