"""A GPU's kernels: how they lay a call out, what compiles them for a layer's sizes, and what starts them.

Nothing here is loaded or compiled before a layer first asks for it.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

SOURCES = {path.name: path for path in (Path(__file__).parent / "cusrc").glob("*.cu*")}
"""``forward.cu``, ``backward.cu`` and what they include, but for ``sizes.h``, which :meth:`Layout.text` writes."""


class Limits(NamedTuple):
    """What a device can do, as far as the kernels ask."""

    architecture: int  # 90 where the compute capability is 9.0
    shared: int  # bytes of shared memory that a block may have
    multiprocessors: int
    threads: int = 256  # of a block: so many as we give it

    @property
    def clusters(self) -> bool:
        """Whether blocks can read each other's shared memory."""
        return self.architecture >= 90


@dataclass(frozen=True)
class Sizes:
    """What the kernels are compiled for, in the symbols of ``csrc/problem.h``. Without heads a cell has no communication."""

    n: int
    k: int
    u: int
    p: int
    heads: int
    comm_heads: int
    comm_key: int
    comm_value: int
    lstm: bool
    projected: bool
    bounded: bool

    @property
    def gates(self) -> int:
        return (4 if self.lstm else 3) * self.u

    @property
    def w(self) -> int:
        return self.comm_heads * self.comm_value

    @property
    def talk(self) -> int:
        return self.comm_heads * (2 * self.comm_key + self.comm_value)


@dataclass(frozen=True)
class Layout:
    """How the kernels lay a call out on a device."""

    sizes: Sizes
    rows: int  # of a tile
    threads: int  # of a block
    cluster: bool  # are the blocks of a tile one, or do they meet in global memory?
    kept: tuple[str, ...] = ()  # which weights are copied to shared memory

    def words(self, backward: bool) -> list[int]:
        """The members of ``ForwardMemory`` or ``BackwardMemory`` of ``cusrc/``, in words of shared memory."""
        s, rows = self.sizes, self.rows
        matrices = {"hh": (s.p, s.gates), "hr": (s.u, s.projected * s.p), "talk": (s.p, s.talk), "output": (s.w, s.p)}
        if backward:
            matrices = {"hh": (s.gates, s.p), "hr": (s.p, s.projected * s.u), "talk": (s.talk, s.p), "output": (s.p, s.w)}
        weights = [some(a * pad4(b)) if name in self.kept else 1 for name, (a, b) in matrices.items()]
        cell, cell_output = s.u * rows if s.lstm else 1, s.u * rows if s.projected else 4
        pairs = some(s.comm_heads * s.n) * rows
        both = [2 * s.p * rows, cell, cell_output, s.gates * rows, pairs, s.heads * rows, s.heads * self.threads]
        own = [some(s.talk) * rows] if backward else [4 * s.u, some(s.comm_heads * s.comm_key) * rows, some(s.w) * rows]
        return [*weights, self.said(backward), *both, *own]

    def bytes(self, backward: bool) -> int:
        """Of shared memory, where each member begins at a multiple of 16."""
        return sum(4 * pad4(words) for words in self.words(backward))

    def said(self, backward: bool) -> int:
        """How many words a block says to others, in shared memory or in global."""
        s = self.sizes
        if backward:
            return 2 * (some(s.w) + some(s.comm_heads * s.n)) * self.rows
        return (2 + some(s.comm_heads * (s.comm_key + s.comm_value))) * self.rows

    def text(self) -> str:
        """``sizes.h``."""
        s = self.sizes
        numbers = {name: getattr(s, name) for name in ("n", "k", "u", "p", "heads", "comm_heads", "comm_key", "comm_value")}
        numbers |= {"R": self.rows, "threads": self.threads}
        numbers |= {"forward_bytes": self.bytes(False), "backward_bytes": self.bytes(True)}
        flags = {"lstm": s.lstm, "projected": s.projected, "bounded": s.bounded, "cluster": self.cluster}
        flags |= {f"keep_{name}": name in self.kept for name in WEIGHTS}
        lines = ["#pragma once", *(f"constexpr int {name} = {value};" for name, value in numbers.items())]
        return "\n".join([*lines, *(f"constexpr bool {name} = {str(value).lower()};" for name, value in flags.items()), ""])


WEIGHTS = ("hh", "output", "talk", "hr")
"""In the order in which they are given shared memory: those that a step waits for come first."""


def pad4(size: int) -> int:
    return -(-size // 4) * 4


def some(size: int) -> int:
    return max(1, size)


def lay_out(sizes: Sizes, batch: int, limits: Limits) -> Layout | str:
    """The layout for so many rows, or why there is none.

    A tile has few rows, as long as every block has a multiprocessor to itself; then as many weights as fit are kept.
    """
    cluster = limits.clusters and sizes.n <= 8  # as many blocks as every cluster may have
    if not cluster and sizes.n > limits.multiprocessors:
        return f"{sizes.n} units are more than the device has multiprocessors"

    def fits(layout: Layout) -> bool:
        return max(layout.bytes(False), layout.bytes(True)) <= limits.shared

    rows = next((rows for rows in (4, 8) if sizes.n * -(-batch // rows) <= limits.multiprocessors), 16)
    layout = Layout(sizes, rows, limits.threads, cluster)
    while not fits(layout):
        if layout.rows == 4:
            return f"a unit needs more than the {limits.shared} bytes of shared memory that the device gives a block"
        layout = replace(layout, rows=layout.rows // 2)
    for name in WEIGHTS:
        more = replace(layout, kept=(*layout.kept, name))
        layout = more if fits(more) else layout
    return layout


class Machine(Protocol):
    """What runs the kernels: CUDA's driver, or in tests the threads of a CPU."""

    def limits(self, device: torch.device) -> Limits: ...

    def kernel(self, name: str, layout: Layout, device: torch.device) -> Any:
        """``forward`` or ``backward``, compiled for this layout."""

    def resident(self, kernel: Any, layout: Layout, shared: int, device: torch.device) -> int:
        """How many blocks of it the device runs at one time."""

    def launch(
        self, kernel: Any, layout: Layout, blocks: int, shared: int, arguments: "ctypes.Array[ctypes.c_uint64]", device: torch.device
    ) -> None:
        """Start so many blocks of it, on the device's current stream."""


def launch(machine: Machine, name: str, layout: Layout, arguments: Sequence[Any], time: Sequence[Any]) -> None:
    """Run a kernel over the tiles of the batch.

    Args:
        arguments: Of ``ForwardArguments`` or ``BackwardArguments``, those before ``said``; ``None`` is a null pointer.
        time: Of ``Steps``, those before ``tiles``: starts, batch, steps, reverse.
    """
    device = next(argument.device for argument in arguments if argument is not None)
    kernel, n = machine.kernel(name, layout, device), layout.sizes.n
    shared, tiles = layout.bytes(name == "backward"), -(-time[1] // layout.rows)
    circles, said, met = tiles, None, None
    if not layout.cluster:  # those that wait for each other have to be there at one time
        circles = min(tiles, machine.resident(kernel, layout, shared, device) // n)
        said = torch.empty(circles * n * layout.said(name == "backward"), device=device)
        met = torch.zeros(circles, dtype=torch.int32, device=device)
    words = [*arguments, said, met, *time, tiles]
    numbers = [0 if word is None else word.data_ptr() if isinstance(word, torch.Tensor) else int(word) for word in words]
    machine.launch(kernel, layout, circles * n, shared, (ctypes.c_uint64 * len(numbers))(*numbers), device)
