"""The fast path on a GPU: some steps of one cell in one kernel, forward and backward (``cusrc/``).

What depends on ``x`` alone is multiplied out for all steps of a chunk at once, then a kernel runs through them. For the way back
large products compute again what the kernel needs of each step, and sum up the gradients of the weights after it. All of that is
in float32, and never in TF32 unless torch.matmul is; the readable path stays the definition, and ``tests/test_cuda.py`` holds
every output and every gradient of this one against it, on a CPU. **It has not run on a GPU yet**: it is off, and
``RIM_RNN_CUDA=1`` turns it on.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
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
        parts = iter(saved.split([math.prod(shape) for shape in shapes if shape is not None]))
        return cls(*(None if shape is None else next(parts).view(shape) for shape in shapes))


class Chunk(NamedTuple):
    """Some steps in a row, and their rows in packed order."""

    first_step: int
    last_step: int
    first: int
    last: int

    def of(self, rows: Tensor | None) -> Tensor | None:
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
        x, h, c, *parameters = (t if t is None else t.contiguous() for t in tensors)
        self.query, self.query_bias, self.key, self.key_bias, self.value, self.value_bias, *rest = parameters
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
        self.bias, self.weight_talk = self._bias(), None
        if ask is not None:  # of one head after the other: Communication.stacked_weights
            by_head = (w.view(self.n, self.p, self.sizes.comm_heads, -1) for w in (ask / self.comm_root, show, tell))
            self.weight_talk = torch.cat([*by_head], -1).flatten(2)
        # The read's part of the gates is, for each head, a_input * (features W). Features are the value; or [x | 1] where it is
        # cheaper to multiply W^v and W_ih out first, or where each head has a value of its own.
        size_x, size_value, size_gates = self.x.size(1), self.value.size(0), self.n * self.sizes.gates
        self.folded = self.heads > 1 or size_x * size_gates <= size_value * (size_x + size_gates)
        by_head_ih = self.weight_ih.view(self.n, self.heads, -1, self.sizes.gates)
        self.weight_ih_by_head = by_head_ih
        folded = torch.einsum("hvx,nhvg->xnhg", self._value1(), by_head_ih) if self.folded else by_head_ih.permute(2, 0, 1, 3)
        self.weight_read = folded.flatten(1)  # (features, n*heads*G*u)

    @property
    def comm_root(self) -> float:
        return math.sqrt(self.sizes.comm_key)

    @property
    def input_root(self) -> float:
        return math.sqrt(self.key.size(0) // self.heads)

    def _bias(self) -> Tensor | None:
        """Of the gates: LSTM's i f g o, GRU's r z and n's part from h and from the input, ``(n, 4*u)``."""
        if self.bias_ih is None or self.sizes.lstm:
            return None if self.bias_ih is None else self.bias_ih + self.bias_hh
        alike = 2 * self.u
        both = self.bias_ih[:, :alike] + self.bias_hh[:, :alike]
        return torch.cat([both, self.bias_hh[:, alike:], self.bias_ih[:, alike:]], 1)

    def _value1(self) -> Tensor:
        """``[W^v | b^v]``, ``(heads, value_size, input_size + bias)``."""
        value = self.value if self.value_bias is None else torch.cat([self.value, self.value_bias.unsqueeze(1)], 1)
        return value.view(self.heads, -1, value.size(1))

    def _from_h(self, dgates: Tensor) -> Tensor:
        """Of a GRU's four parts those that W_hh makes."""
        return dgates[..., : self.sizes.gates]

    def _from_input(self, dgates: Tensor) -> Tensor:
        """Those that the read makes."""
        return dgates if self.sizes.lstm else torch.cat([dgates[..., : 2 * self.u], dgates[..., 3 * self.u :]], -1)

    def chunks(self, backwards: bool) -> Iterator[Chunk]:
        """All steps: those first that the scan comes to first, or last."""
        bounds, starts = [0], self.starts
        for t in range(1, len(starts)):
            if t == len(starts) - 1 or starts[t + 1] - starts[bounds[-1]] > ROWS_AT_ONCE:
                bounds.append(t)
        found = [Chunk(a, b, starts[a], starts[b]) for a, b in zip(bounds, bounds[1:], strict=False)]
        return iter(found if self.reverse is backwards else found[::-1])

    def time(self, chunk: Chunk) -> tuple[Any, ...]:
        starts = None if self.starts_there is None else self.starts_there[chunk.first_step :]
        return starts, self.h.size(0), chunk.last_step - chunk.first_step, self.reverse

    # Before the scan: what depends on x alone.

    def keys(self, x: Tensor) -> Tensor:
        """``(x W^e + b^e) / sqrt(key_size)``, ``(M, heads, key_size)``."""
        return F.linear(x, self.key, self.key_bias).div_(self.input_root).view(x.size(0), self.heads, -1)

    def query_by_head(self) -> Tensor:
        return self.query.view(self.n, self.p, self.heads, -1)

    def bid_weights(self, keys: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a state is multiplied with to make a score, and what is added: ``(M, n, heads, p)``, ``(M, n, heads)``."""
        z = torch.einsum("mhd,nphd->mnhp", keys, self.query_by_head()).contiguous()
        if self.query_bias is None:
            return z, None
        return z, torch.einsum("mhd,nhd->mnh", keys, self.query_bias.view(self.n, self.heads, -1)).contiguous()

    def features(self, x: Tensor) -> Tensor:
        """What the read's weights are multiplied with."""
        if not self.folded:
            return F.linear(x, self.value, self.value_bias)
        return x if self.value_bias is None else F.pad(x, (0, 1), value=1.0)

    # Forward.

    def forward(self, keep: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Outputs ``(M, n, p)``, last states, and if asked to ``keep`` them the winners ``(M, k)`` and :class:`Kept` in one tensor."""
        rows, n, s = self.x.size(0), self.n, self.sizes
        output, h, c = self.x.new_empty(rows, n, self.p), self.h.clone(), None if self.c is None else self.c.clone()
        saved = output.new_empty(Kept.size(s, rows)) if keep else None
        won = output.new_empty(rows, n, dtype=torch.bool) if keep else None
        scores, cells, tilde, attention = (None,) * 4 if saved is None else Kept.within(saved, s, rows)
        weights = padded(self.weight_hh), self.bias, *map(padded, (self.weight_hr, self.weight_talk, self.weight_output))
        for chunk in self.chunks(backwards=False):
            x, of = self.x[chunk.first : chunk.last], chunk.of
            given = *self.bid_weights(self.keys(x)), self.features(x) @ self.weight_read, of(self.keep_input), of(self.keep_comm)
            made = map(of, (output, cells, tilde, scores, attention, won))
            launch(self.machine, "forward", self.layout, [*given, *weights, h, c, *made], self.time(chunk))
        winners = None
        if won is not None:  # in the order of the units
            winners = won.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, : s.k].to(torch.int32).contiguous()
        return output, h, c, winners, saved

    # Backward.

    def backward(
        self, grads: Sequence[Tensor | None], output: Tensor, winners: Tensor, saved: Tensor, input_grad: bool
    ) -> list[Tensor | None]:
        """Gradients of the tensors of the schema but for what dropout drew, ``None`` where there is no tensor.

        Args:
            grads: Of the outputs and the last states; ``None`` counts as zero.
        """
        like = output.view(-1, self.n, self.p), self.h, self.c
        grad_output, dh, dc = (g if g is None else g.contiguous().view_as(t) for g, t in zip(grads, like, strict=True))
        dh = torch.zeros_like(self.h) if dh is None else dh.clone()
        if self.c is not None:
            dc = torch.zeros_like(self.c) if dc is None else dc.clone()
        kept, sums = Kept.within(saved, self.sizes, self.x.size(0)), dict[str, Tensor]()
        dx = torch.empty_like(self.x) if input_grad else None
        before = self.earlier(like[0], self.h)
        cells_before = None if self.c is None else self.earlier(kept.cells, self.c)
        weights = tuple(map(turned, (self.weight_output, self.weight_talk, self.weight_hr, self.weight_hh)))
        for chunk in self.chunks(backwards=True):
            old_cells = None if cells_before is None else cells_before(chunk)
            self.backward_of(
                chunk, grad_output, like[0], winners, kept, before(chunk), old_cells, weights, dh, dc, dx, sums
            )
        return [dx, dh, dc, *self.gradients(sums)]

    def earlier(self, rows: Tensor, first: Tensor) -> Callable[[Chunk], Tensor]:
        """For the steps of a chunk, what the ``rows`` of a state ``(M, n, ...)`` were a step before; ``first`` at the beginning."""
        batch, total = first.size(0), rows.size(0)
        if self.starts_there is None:
            by = batch if self.reverse else -batch

            def shifted(chunk: Chunk) -> Tensor:
                begin, end = chunk.first + by, chunk.last + by
                if 0 <= begin and end <= total:
                    return rows[begin:end]
                return torch.cat([rows[begin:], first] if self.reverse else [first, rows[:end]])

            return shifted
        starts, steps = self.starts_there, len(self.present)
        present, times = starts.diff(), torch.arange(steps, device=starts.device)
        step = torch.repeat_interleave(times, present, output_size=total)
        row, before = torch.arange(total, device=starts.device) - starts[step], step + (1 if self.reverse else -1)
        at = before.clamp(0, steps - 1)
        there = (before == at) & (row < present[at])
        index, every = torch.where(there, starts[at] + row + batch, row), torch.cat([first, rows])
        return lambda chunk: every[index[chunk.first : chunk.last]]

    def backward_of(
        self,
        chunk: Chunk,
        grad_output: Tensor | None,
        output: Tensor,
        winners: Tensor,
        kept: Kept,
        before: Tensor,
        cells_before: Tensor | None,
        weights: tuple[Tensor | None, ...],
        dh: Tensor,
        dc: Tensor | None,
        dx: Tensor | None,
        sums: dict[str, Tensor],
    ) -> None:
        """A chunk: what its steps did, once more; the kernel; and the sums over its rows that are gradients of the weights."""
        x, of, s = self.x[chunk.first : chunk.last], chunk.of, self.sizes
        scores, cells, tilde, attention = map(of, kept)
        tilde = of(output) if tilde is None else tilde
        keep_input, keep_comm = of(self.keep_input), of(self.keep_comm)
        keys, features = self.keys(x), self.features(x)
        z, _ = self.bid_weights(keys)
        gates_x = (features @ self.weight_read).view(x.size(0), self.n, self.heads, s.gates)
        a_input = torch.sigmoid(scores) if keep_input is None else torch.sigmoid(scores) * keep_input
        gates = self.gates(before, (a_input.unsqueeze(-1) * gates_x).sum(2))
        cell_output = gates[..., 3 * self.u :] * torch.tanh(cells) if s.projected else None
        talk = heard = squashed = None
        if self.weight_talk is not None:
            talk, heard, squashed = self.communication(tilde, attention if keep_comm is None else attention * keep_comm)
        dtalk, dscores = None if talk is None else torch.empty_like(talk), torch.empty_like(scores)
        dtilde = torch.empty_like(tilde) if s.projected else None
        launch(
            self.machine,
            "backward",
            self.layout,
            [of(grad_output), cells, cells_before, before, tilde, squashed, gates, talk, attention, z, gates_x, scores, of(winners),
             keep_input, keep_comm, *weights, dh, dc, dtalk, dtilde, dscores],
            self.time(chunk),
        )  # fmt: skip
        dgates, dmessage = gates, squashed  # the kernel wrote them there

        def add(name: str, value: Tensor) -> None:
            sums[name] = sums[name] + value if name in sums else value

        def add_product(name: str, a: Tensor, b: Tensor) -> None:
            """Sums over rows: ``(M, n, i)``, ``(M, n, o)`` -> ``(n, i, o)``."""
            add(name, torch.bmm(a.permute(1, 2, 0), b.transpose(0, 1)))

        add_product("weight_hh", before, self._from_h(dgates))
        if self.bias is not None:
            add("bias", dgates.sum(0))
        if s.projected:
            add_product("weight_hr", cell_output, dtilde)
        if talk is not None:
            add_product("talk", tilde, dtalk)
            add_product("output", heard, dmessage)
        # The read, with the gradient of gates_x in the place of gates_x.
        dread = torch.mul(a_input.unsqueeze(-1), self._from_input(dgates).unsqueeze(2), out=gates_x).flatten(1)
        add("read", features.t() @ dread)
        if dx is not None or not self.folded:
            dfeatures = dread @ self.weight_read.t()
        if not self.folded:
            add("value", dfeatures.t() @ x)
            if self.value_bias is not None:
                add("value_bias", dfeatures.sum(0))
        # The bids: score = query . key.
        queries = by_unit(before, self.query) if self.query_bias is None else by_unit(before, self.query) + self.query_bias
        dqueries = (dscores.unsqueeze(-1) * keys.unsqueeze(1)).flatten(2)
        dkeys = (dscores.unsqueeze(-1) * queries.view(*scores.shape, -1)).sum(1).flatten(1) / self.input_root
        add_product("query", before, dqueries)
        add("key", dkeys.t() @ x)
        if self.query_bias is not None:
            add("query_bias", dqueries.sum(0))
            add("key_bias", dkeys.sum(0))
        if dx is not None:
            through_value = dfeatures[:, : x.size(1)] if self.folded else dfeatures @ self.value
            torch.add(through_value, dkeys @ self.key, out=of(dx))

    def gates(self, before: Tensor, read: Tensor) -> Tensor:
        """After their activation, as ``csrc/problem.h`` keeps them: i f g o, or r z n and W_hn h + b_hn, ``(M, n, 4*u)``."""
        from_h, u = by_unit(before, self.weight_hh), self.u
        if self.sizes.lstm:
            gates = from_h.add_(read)
            gates = gates if self.bias is None else gates.add_(self.bias)
            return torch.cat([gates[..., : 2 * u].sigmoid(), gates[..., 2 * u : 3 * u].tanh(), gates[..., 3 * u :].sigmoid()], -1)
        if self.bias is not None:
            from_h, read = from_h.add_(self._from_h(self.bias)), read.clone()
            read[..., 2 * u :] += self.bias[:, 3 * u :]
        reset_update = torch.sigmoid(from_h[..., : 2 * u] + read[..., : 2 * u])
        candidate = torch.tanh(read[..., 2 * u :] + reset_update[..., :u] * from_h[..., 2 * u :])
        return torch.cat([reset_update, candidate, from_h[..., 2 * u :]], -1)

    def communication(self, tilde: Tensor, attention: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``(M, n, talk)``; what was heard, ``(M, n, w)``; and the message, squashed."""
        assert self.weight_talk is not None and self.weight_output is not None
        s = self.sizes
        talk = by_unit(tilde, self.weight_talk)
        value = talk.view(*talk.shape[:2], s.comm_heads, -1)[..., 2 * s.comm_key :].transpose(1, 2)
        heard = (attention @ value).transpose(1, 2).flatten(2)
        message = by_unit(heard, self.weight_output)
        return talk, heard, message.tanh_() if s.bounded else message

    def gradients(self, sums: dict[str, Tensor]) -> Iterator[Tensor | None]:
        """Of the parameters, in the order of the schema."""
        n, heads, s = self.n, self.heads, self.sizes
        yield sums["query"]
        yield sums.get("query_bias")
        yield sums["key"]
        yield sums.get("key_bias")
        read = sums["read"].view(-1, n, heads, s.gates)
        if self.folded:
            dvalue1 = torch.einsum("nhvg,xnhg->hvx", self.weight_ih_by_head, read).flatten(0, 1)
            yield dvalue1[:, : self.x.size(1)].contiguous()
            yield None if self.value_bias is None else dvalue1[:, -1].contiguous()
            yield torch.einsum("hvx,xnhg->nhvg", self._value1(), read).reshape_as(self.weight_ih)
        else:
            yield sums["value"]
            yield sums.get("value_bias")
            yield read.permute(1, 2, 0, 3).reshape_as(self.weight_ih).contiguous()
        yield sums["weight_hh"]
        bias = sums.get("bias")
        yield None if bias is None else self._from_input(bias)
        yield None if bias is None else self._from_h(bias).clone()
        yield sums.get("weight_hr")
        if self.weight_talk is None:
            yield from (None,) * 4
            return
        talk = sums["talk"].view(n, self.p, s.comm_heads, -1)
        ask, show, tell = (part.flatten(2).contiguous() for part in talk.split([s.comm_key, s.comm_key, s.comm_value], -1))
        yield ask / self.comm_root
        yield show
        yield tell
        yield sums["output"]


def check(tensors: Sequence[Any], sizes: Sequence[Any]) -> None:
    """A ``RuntimeError`` that names the first tensor, or size, that does not fit the others: the kernels take them as they are."""

    def fail(what: str) -> None:
        raise RuntimeError(f"rim_rnn: {what}")

    x, h, c, query, query_bias, key, _, value, _, weight_ih, *_ = tensors
    batch_sizes, k, heads, comm_heads, _, _ = sizes
    for name, tensor, dims, dim, by in (
        ("input_attention.query.weight", query, 3, 1, 1),
        ("input_attention.key.weight", key, 2, 0, heads),
        ("input_attention.value.weight", value, 2, 0, heads),
        ("dynamics.weight_ih", weight_ih, 3, 2, 3 if c is None else 4),
        *[(f"communication.{part}.weight", tensors[14 + i], 3, 2, comm_heads) for i, part in enumerate(("query", "key", "value"))],
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
        batch_sizes[0] != batch or min(batch_sizes) < 1 or sum(batch_sizes) != rows or list(batch_sizes) != sorted(batch_sizes)[::-1]
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
            return f"the input is on {input.device}, not on a GPU"
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
        return layout if isinstance(layout, str) else found

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


def _infer(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(arguments, keep=False)[:3]


def _scan(*arguments: Any) -> tuple[Tensor, ...]:
    return _forward(arguments, keep=True)


def _forward(arguments: Sequence[Any], keep: bool) -> Any:
    x, h, c, *_ = arguments
    with torch.autocast(x.device.type, enabled=False):
        scan = _call(arguments)
        output, h_n, c_n, *kept = scan.forward(keep)
    c_n = x.new_empty(0, scan.n * scan.u) if c_n is None else c_n.view_as(c)
    return output.view(*x.shape[:-1], -1), h_n.view_as(h), c_n, *kept


def _scan_backward(*arguments: Any) -> list[Tensor]:
    *grads, output, winners, saved, input_grad = arguments[:7]
    tensors = arguments[7 : 7 + NUM_TENSORS]
    with torch.autocast(output.device.type, enabled=False):
        found = _call(arguments[7:]).backward(grads, output, winners, saved, input_grad)
    found[0] = output.new_empty(0) if found[0] is None else found[0]
    return [g.view_as(t) if g.numel() else g for g, t in zip(found, tensors, strict=False) if g is not None]


def _define() -> None:
    for (name, schema), function in zip(OPERATOR.schemas().items(), (_infer, _scan, _scan_backward), strict=True):
        torch.library.define(f"rim_rnn::{name}", schema)
        torch.library.impl(f"rim_rnn::{name}", "CompositeExplicitAutograd", function)


OPERATOR = _Cuda()
OPERATOR.register(_define)
scan, supports = OPERATOR.scan, OPERATOR.supports
