"""The fast path on a GPU: some steps of one cell in one kernel, forward and backward (``cusrc/``).

What depends on ``x`` alone is multiplied out for all steps of a chunk at once, then a kernel runs through them. For the way
back large products compute again what the kernel needs of each step, and sum up the gradients of the weights after it. All of
that is in float32, and not in TF32 unless torch.matmul is. The readable path stays the definition: ``tests/test_cuda.py`` holds
every output and every gradient of this one against it, on a CPU. **It has not run on a GPU yet**, so that it is off unless
``RIM_RNN_CUDA=1``.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rim_rnn.driver import Driver, Layout, Machine, Sizes, launch, lay_out, pad4
from rim_rnn.dynamics import State
from rim_rnn.fast import NARROW, FastPath, is_switched_off
from rim_rnn.operator import NUM_TENSORS, PARAMETERS, sizes_of

ROWS_AT_ONCE = 2048
"""A chunk has as many steps as have about so many rows, for what is computed for all of them takes memory."""


def scan_sizes(tensors: Sequence[Any], sizes: Sequence[Any]) -> Sizes:
    """What the kernels of a call are compiled for, from the arguments of the operator."""
    _, _, c, query, *_ = tensors
    weight_ih, weight_hr, (_, show, tell, _) = tensors[9], tensors[13], tensors[14:18]
    _, k, heads, comm_heads, bounded, _ = sizes
    key, value = (show.size(2) // comm_heads, tell.size(2) // comm_heads) if comm_heads else (1, 1)
    u = weight_ih.size(2) // (3 if c is None else 4)
    n, p, _ = query.shape
    return Sizes(n, k, u, p, heads, comm_heads, key, value, c is not None, weight_hr is not None, bounded)


class Kept(NamedTuple):
    """What backward needs beside inputs and outputs, of the ``M`` rows of all steps."""

    scores: Tensor  # (M, n, heads)
    cells: Tensor | None  # c after each step, (M, n, u); LSTM only
    tilde: Tensor | None  # h~, (M, n, p); with communication only, else it is the output
    attention: Tensor | None  # of the communication before dropout, (M, heads, n readers, n read)

    @classmethod
    def shapes(cls, s: Sizes, rows: int) -> list[tuple[int, ...] | None]:
        """Of its members."""
        return [
            (rows, s.n, s.heads),
            (rows, s.n, s.u) if s.lstm else None,
            (rows, s.n, s.p) if s.comm_heads else None,
            (rows, s.comm_heads, s.n, s.n) if s.comm_heads else None,
        ]

    @classmethod
    def size(cls, s: Sizes, rows: int) -> int:
        """Number of elements of all."""
        return sum(math.prod(shape) for shape in cls.shapes(s, rows) if shape is not None)

    @classmethod
    def within(cls, saved: Tensor, s: Sizes, rows: int) -> "Kept":
        """Views of one tensor that holds all."""
        shapes = cls.shapes(s, rows)
        parts = iter(torch.split(saved, [math.prod(shape) for shape in shapes if shape is not None]))
        views: list[Any] = [None if shape is None else next(parts).view(shape) for shape in shapes]
        return cls(*views)


class Chunk(NamedTuple):
    """Some steps in a row, and their rows in packed order."""

    first_step: int
    last_step: int
    first: int
    last: int

    def of(self, rows: Any) -> Any:
        return None if rows is None else rows[self.first : self.last]


def by_unit(a: Tensor, weight: Tensor) -> Tensor:
    """``(M, n, i)``, ``(n, i, o)`` -> ``(M, n, o)``."""
    out = a.new_empty(a.size(0), a.size(1), weight.size(2))
    torch.bmm(a.transpose(0, 1), weight, out=out.transpose(0, 1))
    return out


def padded(weight: Tensor | None) -> Tensor | None:
    """With rows at multiples of 16 bytes, as the kernels read it."""
    return None if weight is None else F.pad(weight, (0, pad4(weight.size(-1)) - weight.size(-1))).contiguous()


def turned(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else padded(weight.transpose(1, 2))


class Scan:
    """One call of the operator: its tensors in the order of the schema, in float32, and its sizes.

    Axes are those of the readable path, but rows come first: ``M`` rows of all steps, or of a chunk of them.
    """

    def __init__(self, machine: Machine, tensors: Sequence[Any], sizes: Sequence[Any]) -> None:
        rest: list[Any] = [t if t is None else t.contiguous() for t in tensors]
        x, h, c, self.query, self.query_bias, self.key, self.key_bias, self.value, self.value_bias, *rest = rest
        self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, self.weight_hr, *rest = rest
        ask, show, tell, self.weight_output, self.keep_input, self.keep_comm = rest
        self.machine, self.sizes = machine, scan_sizes(tensors, sizes)
        self.n, self.u, self.p, self.heads = self.sizes.n, self.sizes.u, self.sizes.p, self.sizes.heads
        self.x, self.h = x.view(-1, x.size(-1)), h.view(-1, self.n, self.p)
        self.c = None if c is None else c.view(-1, self.n, self.u)
        batch_sizes, *_, self.reverse = sizes
        self.present = list(batch_sizes) or [self.h.size(0)] * x.size(0)  # rows at each step
        self.starts = [*accumulate(self.present, initial=0)]
        self.starts_there = x.new_tensor(self.starts, dtype=torch.int64) if batch_sizes else None
        layout = lay_out(self.sizes, self.h.size(0), machine.limits(x.device))
        if isinstance(layout, str):
            raise RuntimeError(f"rim_rnn: {layout}")
        self.layout: Layout = layout
        self.input_root, self.comm_root = math.sqrt(self.key.size(0) // self.heads), math.sqrt(self.sizes.comm_key)
        self.weight_talk: Any = None
        if ask is not None:  # of one head after the other: Communication.stacked_weights
            by_head = (w.view(self.n, self.p, self.sizes.comm_heads, -1) for w in (ask / self.comm_root, show, tell))
            self.weight_talk = torch.cat([*by_head], -1).flatten(2)
        self.bias = self._bias()
        # The read's part of the gates is, for each head, a_input * (features W). Features are the value; or [x | 1] where it is
        # cheaper to multiply W^v and W_ih out first, or where each head has a value of its own.
        size_x, size_value, size_gates = self.x.size(1), self.value.size(0), self.n * self.sizes.gates
        self.folded = self.heads > 1 or size_x * size_gates <= size_value * (size_x + size_gates)
        value1 = self.value if self.value_bias is None else torch.cat([self.value, self.value_bias.unsqueeze(1)], 1)
        self.value1 = value1.view(self.heads, -1, value1.size(1))  # [W^v | b^v] of each head
        self.weight_ih_by_head = by_head_ih = self.weight_ih.view(self.n, self.heads, -1, self.sizes.gates)
        folded = torch.einsum("hvx,nhvg->xnhg", self.value1, by_head_ih) if self.folded else by_head_ih.permute(2, 0, 1, 3)
        self.weight_read = folded.flatten(1)  # (features, n*heads*G*u)

    def _bias(self) -> Any:
        """Of the gates: LSTM's i f g o, GRU's r z and n's part from h and from the input, ``(n, 4*u)``; or ``None``."""
        if self.bias_ih is None or self.sizes.lstm:
            return None if self.bias_ih is None else self.bias_ih + self.bias_hh
        alike = 2 * self.u
        both = self.bias_ih[:, :alike] + self.bias_hh[:, :alike]
        return torch.cat([both, self.bias_hh[:, alike:], self.bias_ih[:, alike:]], 1)

    def from_h(self, gates: Tensor) -> Tensor:
        """Of a GRU's four parts those that W_hh makes."""
        return gates[..., : self.sizes.gates]

    def from_input(self, gates: Tensor) -> Tensor:
        """Those that the read makes."""
        return gates if self.sizes.lstm else torch.cat([gates[..., : 2 * self.u], gates[..., 3 * self.u :]], -1)

    def chunks(self, backwards: bool) -> list[Chunk]:
        """All steps: those first that the scan comes to first, or last."""
        bounds, starts = [0], self.starts
        for t in range(1, len(starts)):
            if t == len(starts) - 1 or starts[t + 1] - starts[bounds[-1]] > ROWS_AT_ONCE:
                bounds.append(t)
        found = [Chunk(a, b, starts[a], starts[b]) for a, b in pairwise(bounds)]
        return found if self.reverse is backwards else found[::-1]

    def time(self, chunk: Chunk) -> tuple[Any, ...]:
        """What the kernels are told of it."""
        starts = None if self.starts_there is None else self.starts_there[chunk.first_step :]
        return starts, self.h.size(0), chunk.last_step - chunk.first_step, self.reverse

    # What depends on x alone.

    def keys(self, x: Tensor) -> Tensor:
        """``(x W^e + b^e) / sqrt(key_size)``, ``(M, heads, key_size)``."""
        return F.linear(x, self.key, self.key_bias).div_(self.input_root).view(x.size(0), self.heads, -1)

    def bid_weights(self, keys: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a state is multiplied with to make a score, and what is added: ``(M, n, heads, p)``, ``(M, n, heads)``."""
        z = torch.einsum("mhd,nphd->mnhp", keys, self.query.view(self.n, self.p, self.heads, -1)).contiguous()
        if self.query_bias is None:
            return z, None
        return z, torch.einsum("mhd,nhd->mnh", keys, self.query_bias.view(self.n, self.heads, -1)).contiguous()

    def features(self, x: Tensor) -> Tensor:
        """What the read's weights are multiplied with."""
        if not self.folded:
            return F.linear(x, self.value, self.value_bias)
        return x if self.value_bias is None else F.pad(x, (0, 1), value=1.0)

    def forward(self, keep: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Outputs ``(M, n, p)``, last states, and to ``keep`` for backward winners ``(M, k)`` and :class:`Kept` as a tensor."""
        rows, n, s = self.x.size(0), self.n, self.sizes
        output, h, c = self.x.new_empty(rows, n, self.p), self.h.clone(), None if self.c is None else self.c.clone()
        saved = output.new_empty(Kept.size(s, rows)) if keep else None
        won = output.new_empty(rows, n, dtype=torch.bool) if keep else None
        scores, cells, tilde, attention = (None,) * 4 if saved is None else Kept.within(saved, s, rows)
        weights = padded(self.weight_hh), self.bias, *map(padded, (self.weight_hr, self.weight_talk, self.weight_output))
        for chunk in self.chunks(backwards=False):
            x, of = chunk.of(self.x), chunk.of
            given = (
                *self.bid_weights(self.keys(x)),
                self.features(x) @ self.weight_read,
                of(self.keep_input),
                of(self.keep_comm),
            )
            made = map(of, (output, cells, tilde, scores, attention, won))
            launch(self.machine, "forward", self.layout, [*given, *weights, h, c, *made], self.time(chunk))
        winners = None
        if won is not None:  # in the order of the units
            winners = (
                won.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, : s.k].to(torch.int32).contiguous()
            )
        return output, h, c, winners, saved


class Backward:
    """The gradients of a scan: d<name> is the gradient of <name>, of which the weights' are sums over the rows of all chunks.

    Args:
        scan: The scan.
        grads: Of the outputs and the last states; ``None`` counts as zero.
        output, winners, saved: What :meth:`Scan.forward` returned.
        input_grad: Whether the input's is wanted.
    """

    def __init__(
        self, scan: Scan, grads: Sequence[Any], output: Tensor, winners: Tensor, saved: Tensor, input_grad: bool
    ) -> None:
        self.scan, self.output, self.winners = scan, output.view(-1, scan.n, scan.p), winners.contiguous()
        self.kept = Kept.within(saved.contiguous(), scan.sizes, scan.x.size(0))
        grad_output, grad_h, grad_c = grads
        self.grad_output = None if grad_output is None else grad_output.contiguous().view_as(self.output)
        self.dh = torch.zeros_like(scan.h) if grad_h is None else grad_h.reshape(scan.h.shape).clone()
        self.dc: Any = None
        if scan.c is not None:
            self.dc = torch.zeros_like(scan.c) if grad_c is None else grad_c.reshape(scan.c.shape).clone()
        self.dx = torch.empty_like(scan.x) if input_grad else None
        self.sums: dict[str, Any] = {}
        self.weights = [turned(w) for w in (scan.weight_output, scan.weight_talk, scan.weight_hr, scan.weight_hh)]

    def run(self) -> list[Tensor | None]:
        """For each tensor of the schema but what dropout drew, ``None`` where there is none."""
        before, no_cells = self.earlier(self.output, self.scan.h), lambda chunk: None
        cells_before = no_cells if self.scan.c is None else self.earlier(self.kept.cells, self.scan.c)
        for chunk in self.scan.chunks(backwards=True):
            self.add_chunk(chunk, before(chunk), cells_before(chunk))
        return [self.dx, self.dh, self.dc, *self.parameters()]

    def earlier(self, rows: Any, first: Tensor) -> Callable[[Chunk], Any]:
        """For the steps of a chunk, what the ``rows`` of a state ``(M, n, ...)`` were a step before; at first, ``first``."""
        batch, total, reverse = first.size(0), rows.size(0), self.scan.reverse
        if self.scan.starts_there is None:
            by = batch if reverse else -batch

            def shifted(chunk: Chunk) -> Tensor:
                begin, end = chunk.first + by, chunk.last + by
                if begin >= 0 and end <= total:
                    return rows[begin:end]  # type: ignore[no-any-return]
                return torch.cat([rows[begin:], first] if reverse else [first, rows[:end]])

            return shifted
        starts, steps = self.scan.starts_there, len(self.scan.present)
        present, times = starts.diff(), torch.arange(steps, device=starts.device)
        step = torch.repeat_interleave(times, present, output_size=total)
        row, before = torch.arange(total, device=starts.device) - starts[step], step + (1 if reverse else -1)
        at = before.clamp(0, steps - 1)
        there = (before == at) & (row < present[at])
        index, every = torch.where(there, starts[at] + row + batch, row), torch.cat([first, rows])
        return lambda chunk: every[index[chunk.first : chunk.last]]

    def add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def add_product(self, name: str, a: Tensor, b: Tensor) -> None:
        """Of rows: ``(M, n, i)``, ``(M, n, o)`` -> ``(n, i, o)``."""
        self.add(name, torch.bmm(a.permute(1, 2, 0), b.transpose(0, 1)))

    def add_chunk(self, chunk: Chunk, before: Tensor, cells_before: Tensor | None) -> None:
        """What its steps did, once more; the kernel, which goes back through them; and products to weights' gradients."""
        scan, s, of = self.scan, self.scan.sizes, chunk.of
        x, keep_input, keep_comm = map(of, (scan.x, scan.keep_input, scan.keep_comm))
        scores, cells, tilde, attention = map(of, self.kept)
        tilde = of(self.output) if tilde is None else tilde
        keys, features = scan.keys(x), scan.features(x)
        z, _ = scan.bid_weights(keys)
        gates_x = (features @ scan.weight_read).view(x.size(0), scan.n, scan.heads, s.gates)
        a_input = torch.sigmoid(scores) if keep_input is None else torch.sigmoid(scores) * keep_input
        gates = self.gates(before, (a_input.unsqueeze(-1) * gates_x).sum(2))
        cell_output: Any = gates[..., 3 * scan.u :] * torch.tanh(cells) if s.projected else None
        talk: Any = None
        heard: Any = None
        message: Any = None
        if s.comm_heads:
            talk, heard, message = self.communication(tilde, attention if keep_comm is None else attention * keep_comm)
            message = message.tanh_() if s.bounded else message
        dtalk, dscores = torch.empty_like(talk) if s.comm_heads else None, torch.empty_like(scores)
        dtilde: Any = torch.empty_like(tilde) if s.projected else None
        given = of(self.grad_output), cells, cells_before, before, tilde, message, gates, talk, attention, z, gates_x, scores
        made = self.dh, self.dc, dtalk, dtilde, dscores
        words = [*given, of(self.winners), keep_input, keep_comm, *self.weights, *made]
        launch(scan.machine, "backward", scan.layout, words, scan.time(chunk))
        dgates, dmessage = gates, message  # the kernel wrote them there

        self.add_product("weight_hh", before, scan.from_h(dgates))
        if scan.bias is not None:
            self.add("bias", dgates.sum(0))
        if s.projected:
            self.add_product("weight_hr", cell_output, dtilde)
        if dtalk is not None:
            self.add_product("talk", tilde, dtalk)
            self.add_product("output", heard, dmessage)
        # The read. The gradient of gates_x takes its place.
        dread = torch.mul(a_input.unsqueeze(-1), scan.from_input(dgates).unsqueeze(2), out=gates_x).flatten(1)
        self.add("read", features.t() @ dread)
        dfeatures = dread @ scan.weight_read.t() if self.dx is not None or not scan.folded else None
        if dfeatures is not None and not scan.folded:
            self.add("value", dfeatures.t() @ x)
            self.add("value_bias", dfeatures.sum(0))
        # The bids: score = query . key.
        queries = by_unit(before, scan.query) if scan.query_bias is None else by_unit(before, scan.query) + scan.query_bias
        dqueries = (dscores.unsqueeze(-1) * keys.unsqueeze(1)).flatten(2)
        dkeys = (dscores.unsqueeze(-1) * queries.view(*scores.shape, -1)).sum(1).flatten(1) / scan.input_root
        self.add_product("query", before, dqueries)
        self.add("query_bias", dqueries.sum(0))
        self.add("key", dkeys.t() @ x)
        self.add("key_bias", dkeys.sum(0))
        if self.dx is not None and dfeatures is not None:
            through_value = dfeatures[:, : x.size(1)] if scan.folded else dfeatures @ scan.value
            torch.add(through_value, dkeys @ scan.key, out=of(self.dx))

    def gates(self, before: Tensor, read: Tensor) -> Tensor:
        """After their activation, as ``csrc/problem.h`` keeps them: i f g o, or r z n and W_hn h + b_hn, ``(M, n, 4*u)``."""
        from_h, u, bias = by_unit(before, self.scan.weight_hh), self.scan.u, self.scan.bias
        if self.scan.sizes.lstm:
            gates = from_h.add_(read)
            gates = gates if bias is None else gates.add_(bias)
            return torch.cat(
                [gates[..., : 2 * u].sigmoid(), gates[..., 2 * u : 3 * u].tanh(), gates[..., 3 * u :].sigmoid()], -1
            )
        if bias is not None:
            from_h.add_(self.scan.from_h(bias))
            read[..., 2 * u :] += bias[:, 3 * u :]
        reset_update = torch.sigmoid(from_h[..., : 2 * u] + read[..., : 2 * u])
        candidate = torch.tanh(read[..., 2 * u :] + reset_update[..., :u] * from_h[..., 2 * u :])
        return torch.cat([reset_update, candidate, from_h[..., 2 * u :]], -1)

    def communication(self, tilde: Tensor, attention: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``(M, n, talk)``; what was heard, ``(M, n, w)``; and the message, ``(M, n, p)``."""
        talk, s = by_unit(tilde, self.scan.weight_talk), self.scan.sizes
        value = talk.view(*talk.shape[:2], s.comm_heads, -1)[..., 2 * s.comm_key :].transpose(1, 2)
        heard = (attention @ value).transpose(1, 2).flatten(2)
        return talk, heard, by_unit(heard, self.scan.weight_output)

    def parameters(self) -> Iterator[Tensor | None]:
        """Their gradients, in the order of the schema."""
        scan, s, sums = self.scan, self.scan.sizes, self.sums
        with_bias = scan.query_bias is not None
        yield sums["query"]
        yield sums["query_bias"] if with_bias else None
        yield sums["key"]
        yield sums["key_bias"] if with_bias else None
        read = sums["read"].view(-1, scan.n, scan.heads, s.gates)
        if scan.folded:
            dvalue1 = torch.einsum("nhvg,xnhg->hvx", scan.weight_ih_by_head, read).flatten(0, 1)
            yield dvalue1[:, : scan.x.size(1)].contiguous()
            yield dvalue1[:, -1].contiguous() if with_bias else None
            yield torch.einsum("hvx,xnhg->nhvg", scan.value1, read).reshape(scan.weight_ih.shape).contiguous()
        else:
            yield sums["value"]
            yield sums["value_bias"] if with_bias else None
            yield read.permute(1, 2, 0, 3).reshape(scan.weight_ih.shape).contiguous()
        yield sums["weight_hh"]
        yield scan.from_input(sums["bias"]) if with_bias else None
        yield scan.from_h(sums["bias"]).clone() if with_bias else None
        yield sums.get("weight_hr")
        if not s.comm_heads:
            yield from (None,) * 4
            return
        talk = torch.split(sums["talk"].view(scan.n, scan.p, s.comm_heads, -1), [s.comm_key, s.comm_key, s.comm_value], -1)
        ask, show, tell = (part.flatten(2).contiguous() for part in talk)
        yield ask / scan.comm_root
        yield show
        yield tell
        yield sums["output"]


def check(tensors: Sequence[Any], sizes: Sequence[Any]) -> None:
    """A ``RuntimeError`` that names the first tensor or size that does not fit the others: a kernel would not notice."""

    def fail(what: str) -> None:
        raise RuntimeError(f"rim_rnn: {what}")

    x, h, c, query, query_bias, key, _, value, _, weight_ih, *_ = tensors
    batch_sizes, k, heads, comm_heads, _, _ = sizes
    for name, tensor, dims, dim, by in (
        ("input_attention.query.weight", query, 3, 1, 1),
        ("input_attention.key.weight", key, 2, 0, heads),
        ("input_attention.value.weight", value, 2, 0, heads),
        ("dynamics.weight_ih", weight_ih, 3, 2, 3 if c is None else 4),
        *[
            (f"communication.{part}.weight", tensors[14 + i], 3, 2, comm_heads)
            for i, part in enumerate(("query", "key", "value"))
        ],
    ):
        if name.startswith("c") and not comm_heads:
            continue
        if tensor is None or tensor.dim() != dims or not tensor.numel() or by < 1 or tensor.size(dim) % by:
            got = None if tensor is None else tuple(tensor.shape)
            fail(f"{name} should have {dims} dimensions, of which number {dim} is a multiple of {by}, got {got}")
    s = scan_sizes(tensors, sizes)
    if not 1 <= k <= s.n:
        fail(f"k should be from 1 to {s.n}, got {k}")
    packed, bias, talks, layered = bool(batch_sizes), query_bias is not None, comm_heads > 0, h.shape[:-2]
    batch, size, rows = h.size(-2), key.size(1), x.numel() // max(1, x.size(-1))
    if packed and (
        batch_sizes[0] != batch
        or min(batch_sizes) < 1
        or sum(batch_sizes) != rows
        or list(batch_sizes) != sorted(batch_sizes)[::-1]
    ):
        fail(f"batch_sizes should begin at {batch}, never grow, and sum to {rows}, got {list(batch_sizes)}")
    if not s.projected and s.u != s.p:
        fail(f"unit sizes of h and c should be equal without projections, got {s.p} and {s.u}")
    input_shape = (rows, size) if packed else (x.size(0), batch, size)
    query_size, value_size, e = key.size(0), value.size(0), s.comm_heads * s.comm_key
    shapes: list[tuple[bool | None, tuple[int, ...]]] = [  # whether it has to be there, or None where it may
        *((True, input_shape), (True, (*layered, batch, s.n * s.p)), (s.lstm, (*layered, batch, s.n * s.u))),
        *((True, (s.n, s.p, query_size)), (bias, (s.n, query_size)), (True, (query_size, size)), (bias, (query_size,))),
        *((True, (value_size, size)), (bias, (value_size,)), (True, (s.n, value_size, s.gates)), (True, (s.n, s.p, s.gates))),
        *((bias, (s.n, s.gates)), (bias, (s.n, s.gates)), (s.projected, (s.n, s.u, s.p))),
        *((talks, (s.n, s.p, e)), (talks, (s.n, s.p, e)), (talks, (s.n, s.p, s.w)), (talks, (s.n, s.w, s.p))),
        *((None, (rows, s.n, s.heads)), (None if talks else False, (rows, s.comm_heads, s.n, s.n))),
    ]
    names = "input", "h_0", "c_0", *PARAMETERS, "keep_input", "keep_comm"
    for name, tensor, (there, shape) in zip(names, tensors, shapes, strict=True):
        if there is not None and there is (tensor is None):
            fail(f"{name} should be {'a tensor, got None' if there else 'None'}")
        if tensor is not None and tensor.shape != shape:
            fail(f"{name} should have shape {shape}, got {tuple(tensor.shape)}")
        if tensor is not None and (tensor.dtype is not torch.float32 or tensor.device != x.device):
            fail(f"{name} should be torch.float32 on {x.device}, got {tensor.dtype} on {tensor.device}")


# The operators.

machines: dict[str, Machine] = {"cuda": Driver()}
"""What runs the kernels on each type of device. Tests put threads of a CPU there."""


def _is_on() -> bool:
    wanted = os.environ.get("RIM_RNN_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise ImportError(f"RIM_RNN_CUDA should be 0, 1 or empty, got {wanted!r}")
    return wanted == "1"


IS_ON = _is_on()


class _Cuda(FastPath):
    name = "cuda"
    names = "cuda_infer", "cuda_scan", "cuda_scan_backward"
    options = ""

    def serves(self, device: torch.device) -> bool:
        return device.type in machines

    def declines(self, input: Tensor) -> str | None:
        if not self.serves(input.device):
            return "the input is not on a GPU"
        if not IS_ON:
            return "the kernels for GPUs have been checked on a CPU only, and RIM_RNN_CUDA=1 turns them on"
        if is_switched_off():
            return "switched off"
        if torch.compiler.is_compiling():
            return "torch.compile is at work, which the kernels for GPUs leave to the readable path"
        if input.dtype not in (torch.float32, *NARROW):
            return f"the input is {input.dtype}, and the kernels compute in float32"
        return machines[input.device.type].unavailable(input.device)

    def parameters(self, cell: Any, input: Tensor, state: State) -> list[Tensor | None] | str:
        found = super().parameters(cell, input, state)
        if isinstance(found, str):
            return found
        c = None if cell.rnn_cell == "GRU" else input
        sizes = scan_sizes([input, input, c, *found, None, None], sizes_of(cell, None, False))
        layout = lay_out(sizes, 1, machines[input.device.type].limits(input.device))
        if isinstance(layout, str):
            return layout
        _register()
        return found

    def told(self, input: Tensor) -> tuple[Any, ...]:
        return ()

    def size_saved(self, rows: int, n: int, p: int, u: int, lstm: bool, k: int, heads: int, talk: int, bounded: bool) -> int:
        return Kept.size(Sizes(n, k, u, p, heads, talk, 1, 1, lstm, p != u, bounded), rows)

    def heard(self, saved: Tensor, winners: Tensor, n: int, talk: int) -> Tensor:
        rows, k = winners.shape
        attention = saved[saved.numel() - rows * talk * n * n :].view(rows, talk, n, n)  # the last of Kept
        return attention.gather(2, winners.long().view(rows, 1, k, 1).expand(rows, talk, k, n))


def _call(arguments: Sequence[Any]) -> Scan:
    tensors, sizes = arguments[:NUM_TENSORS], arguments[NUM_TENSORS:]
    check(tensors, sizes)
    return Scan(machines[tensors[0].device.type], tensors, sizes)


def _infer(*arguments: Any) -> tuple[Any, ...]:
    return _forward(arguments, keep=False)[:3]


def _scan(*arguments: Any) -> tuple[Any, ...]:
    return _forward(arguments, keep=True)


def _forward(arguments: Sequence[Any], keep: bool) -> tuple[Any, ...]:
    x, h, c, *_ = arguments
    with torch.autocast(x.device.type, enabled=False):
        scan = _call(arguments)
        output, h_n, c_n, *kept = scan.forward(keep)
    c_n = x.new_empty(0, scan.n * scan.u) if c_n is None else c_n.view(c.shape)
    return output.view(*x.shape[:-1], -1), h_n.view(h.shape), c_n, *kept


def _scan_backward(*arguments: Any) -> list[Tensor]:
    *grads, output, winners, saved, input_grad = arguments[:7]
    tensors = arguments[7 : 7 + NUM_TENSORS]
    with torch.autocast(output.device.type, enabled=False):
        found = Backward(_call(arguments[7:]), grads, output, winners, saved, input_grad).run()
    found[0] = output.new_empty(0) if found[0] is None else found[0]
    return [g.view_as(t) if g.numel() else g for g, t in zip(found, tensors, strict=False) if g is not None]


def _define() -> None:
    for (name, schema), function in zip(OPERATOR.schemas().items(), (_infer, _scan, _scan_backward), strict=True):
        torch.library.define(f"rim_rnn::{name}", schema)
        torch.library.impl(f"rim_rnn::{name}", "CompositeExplicitAutograd", function)


@cache
def _register() -> None:
    """When a call first needs it: it makes torch import more of itself."""
    OPERATOR.register(_define)


OPERATOR = _Cuda()
scan, supports = OPERATOR.scan, OPERATOR.supports
