"""The paper in plain loops over batch, time, unit and head.

Recurrent Independent Mechanisms, Goyal et al., ICLR 2021 (arXiv 1909.10893). Reads a `state_dict` (or any mapping of
its keys to tensors that may need gradient) and imports nothing of the package it judges. Slow on purpose: every line
is one line of an equation, for one row of the batch, one unit and one head.

n units, k of them active, u the state size of a unit, p the size of its output (u without projections).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Spec:
    """What the shapes of the parameters don't tell."""

    k: int
    rnn_cell: str = "LSTM"
    num_input_heads: int = 1
    num_comm_heads: int = 4
    comm_bounded: bool = True
    num_layers: int = 1
    bidirectional: bool = False


class Step(NamedTuple):
    """One row after one step. `scores` belongs to the competition, the last three to the record."""

    h: Tensor  # (n * p,)
    c: Tensor | None  # (n * u,), None for GRU
    scores: list[list[float]]  # [unit][head]
    active: Tensor  # (n,), bool
    input_attention: Tensor  # (n,)
    communication: Tensor  # (heads, n readers, n read)


class Result(NamedTuple):
    """A whole layer. Records are padded to the longest row: (layers * directions, time, batch, ...)."""

    rows: list[Tensor]  # per row (length, directions * n * p)
    h_n: Tensor  # (layers * directions, batch, n * p)
    c_n: Tensor | None  # (layers * directions, batch, n * u)
    active: Tensor
    input_attention: Tensor
    communication: Tensor


def winners(bids: Sequence[float], k: int) -> list[int]:
    """The k highest bids; NaN is below everything, -inf too; equal bids go to the lowest unit."""
    ranking = sorted(range(len(bids)), key=lambda j: (math.isnan(bids[j]), 0.0 if math.isnan(bids[j]) else -bids[j], j))
    return sorted(ranking[:k])


def lstm(read: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> tuple[Tensor, Tensor]:
    """The equations of nn.LSTM for one row of one unit: (h', c')."""
    i, f, g, o = (read @ w_ih + b_ih + h @ w_hh + b_hh).chunk(4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru(read: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    """The equations of nn.GRU for one row of one unit: h'."""
    i_r, i_z, i_n = (read @ w_ih + b_ih).chunk(3)
    h_r, h_z, h_n = (h @ w_hh + b_hh).chunk(3)
    r = torch.sigmoid(i_r + h_r)
    z = torch.sigmoid(i_z + h_z)
    new = torch.tanh(i_n + r * h_n)
    return (1 - z) * new + z * h


def step(
    params: Params,
    spec: Spec,
    x: Tensor,
    h: Tensor,
    c: Tensor | None = None,
    input_scale: Tensor | None = None,
    comm_scale: Tensor | None = None,
) -> Step:
    """One row, one time step: x (input_size,), h (n * p,), c (n * u,).

    Dropout enters as what it multiplies the probabilities with, 0 or 1 / (1 - p): `input_scale` (n, input heads) for
    the input's own, `comm_scale` (comm heads, n readers, n read).
    """
    n, p, _ = params["input_attention.query.weight"].shape
    zero = x.new_zeros(())
    units_h = list(h.reshape(n, p))
    units_c = [None] * n if c is None else list(c.reshape(n, -1))

    # Input attention, eq. 2: every unit looks at the input and at a null row that is zero after projection.
    heads = spec.num_input_heads
    key = params["input_attention.key.weight"] @ x + params.get("input_attention.key.bias", zero)
    value = params["input_attention.value.weight"] @ x + params.get("input_attention.value.bias", zero)
    scores, attention, reads = [], [], []
    for j in range(n):
        query = units_h[j] @ params["input_attention.query.weight"][j]
        if "input_attention.query.bias" in params:
            query = query + params["input_attention.query.bias"][j]
        unit_scores, unit_attention, unit_reads = [], [], []
        for head in range(heads):
            query_h, key_h, value_h = query.chunk(heads)[head], key.chunk(heads)[head], value.chunk(heads)[head]
            score = torch.dot(query_h, key_h) / math.sqrt(len(key_h))
            null_score = torch.dot(query_h, torch.zeros_like(key_h)) / math.sqrt(len(key_h))
            a_null, a_input = torch.softmax(torch.stack([null_score, score]), 0)
            unit_scores.append(score.item())
            unit_attention.append(a_input.detach())
            if input_scale is not None:
                a_input = a_input * input_scale[j, head]
            unit_reads.append(a_null * torch.zeros_like(value_h) + a_input * value_h)
        scores.append(unit_scores)
        attention.append(sum(unit_attention) / heads)
        reads.append(torch.cat(unit_reads))

    # Competition: a unit's bid is its score, averaged over heads.
    active = winners([sum(unit_scores) / heads for unit_scores in scores], spec.k)

    # Independent dynamics, eq. 4: winners only; a loser keeps its state.
    tilde_h, tilde_c = list(units_h), list(units_c)
    for j in active:
        weights = params["dynamics.weight_ih"][j], params["dynamics.weight_hh"][j]
        biased = "dynamics.bias_ih" in params
        biases = [params[f"dynamics.bias_{which}"][j] if biased else zero for which in ("ih", "hh")]
        if spec.rnn_cell == "LSTM":
            tilde_h[j], tilde_c[j] = lstm(reads[j], units_h[j], units_c[j], *weights, *biases)
        else:
            tilde_h[j] = gru(reads[j], units_h[j], *weights, *biases)
        if "dynamics.weight_hr" in params:
            tilde_h[j] = tilde_h[j] @ params["dynamics.weight_hr"][j]

    # Communication, eqs. 5 and 6: winners read every unit, themselves included.
    heads = spec.num_comm_heads
    new_h = list(tilde_h)
    communication = x.new_zeros(heads, n, n)
    for j in active if heads else []:
        query = tilde_h[j] @ params["communication.query.weight"][j]
        unit_reads = []
        for head in range(heads):
            query_h = query.chunk(heads)[head]
            head_scores, head_values = [], []
            for m in range(n):
                key_h = (tilde_h[m] @ params["communication.key.weight"][m]).chunk(heads)[head]
                head_values.append((tilde_h[m] @ params["communication.value.weight"][m]).chunk(heads)[head])
                head_scores.append(torch.dot(query_h, key_h) / math.sqrt(len(key_h)))
            probabilities = torch.softmax(torch.stack(head_scores), 0)
            communication[head, j] = probabilities.detach()
            if comm_scale is not None:
                probabilities = probabilities * comm_scale[head, j]
            unit_reads.append(sum(probabilities[m] * head_values[m] for m in range(n)))
        message = torch.cat(unit_reads) @ params["communication.output.weight"][j]
        if spec.comm_bounded:
            message = torch.tanh(message)
            if spec.rnn_cell == "GRU":
                room = [(1 - abs(s) if abs(s) < 1 else zero) for s in tilde_h[j]]
                message = torch.stack([r * m for r, m in zip(room, message, strict=True)])
        new_h[j] = tilde_h[j] + message

    return Step(
        torch.cat(new_h),
        None if c is None else torch.cat(tilde_c),
        scores,
        torch.tensor([j in active for j in range(n)]),
        torch.stack(attention),
        communication,
    )


def cell(params: Params, spec: Spec, x: Tensor, h: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor | None, list[Step]]:
    """One step of a batch: x (N, input_size), h (N, n * p), c (N, n * u)."""
    steps = [step(params, spec, x[b], h[b], None if c is None else c[b]) for b in range(len(x))]
    return torch.stack([s.h for s in steps]), None if c is None else torch.stack([s.c for s in steps]), steps


def rim(params: Params, spec: Spec, rows: Sequence[Tensor], h_0: Tensor | None = None, c_0: Tensor | None = None) -> Result:
    """A whole layer on a list of rows, each (its own length, input_size); h_0 and c_0 as nn.LSTM takes them."""
    directions = 2 if spec.bidirectional else 1
    num_cells = spec.num_layers * directions
    longest = max(len(row) for row in rows)
    n, p, _ = params["cells.0.input_attention.query.weight"].shape
    u = params["cells.0.dynamics.weight_ih"].shape[-1] // (4 if spec.rnn_cell == "LSTM" else 3)
    zeros = rows[0].new_zeros
    h_0 = zeros(num_cells, len(rows), n * p) if h_0 is None else h_0
    if spec.rnn_cell == "LSTM" and c_0 is None:
        c_0 = zeros(num_cells, len(rows), n * u)
    active = torch.zeros(num_cells, longest, len(rows), n, dtype=torch.bool)
    input_attention = zeros(num_cells, longest, len(rows), n)
    communication = zeros(num_cells, longest, len(rows), spec.num_comm_heads, n, n)

    rows, h_n, c_n = list(rows), [], []
    for layer in range(spec.num_layers):
        layer_outputs = [[] for _ in rows]
        for direction in range(directions):
            index = layer * directions + direction
            prefix = f"cells.{index}."
            cell_params = {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}
            last_h, last_c = [], []
            for b, row in enumerate(rows):
                h, c = h_0[index, b], None if c_0 is None else c_0[index, b]
                outputs = [None] * len(row)
                times = range(len(row)) if direction == 0 else reversed(range(len(row)))
                for t in times:
                    s = step(cell_params, spec, row[t], h, c)
                    outputs[t] = h = s.h
                    c = s.c
                    active[index, t, b] = s.active
                    input_attention[index, t, b] = s.input_attention
                    communication[index, t, b] = s.communication
                layer_outputs[b].append(torch.stack(outputs))
                last_h.append(h)
                last_c.append(c)
            h_n.append(torch.stack(last_h))
            c_n.append(None if c_0 is None else torch.stack(last_c))
        rows = [torch.cat(both, -1) for both in layer_outputs]
    return Result(rows, torch.stack(h_n), None if c_0 is None else torch.stack(c_n), active, input_attention, communication)
