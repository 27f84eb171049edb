"""The kernels of ``cusrc/`` on a CPU, a thread for each of a GPU's: for tests of what they compute, and of their barriers."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rim_rnn.driver import SOURCES, Layout, Limits, packed

HERE = Path(__file__).parent
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", "-Wl,-Bsymbolic", "-Wall", "-Wextra", "-Werror")
FLAGS += ("-Wno-type-limits", "-Wno-unknown-pragmas")
RUN = 'extern "C" void run(const void* arguments) {{ {name}(*static_cast<const {kind}Arguments*>(arguments)); }}'
SANITIZERS = {"thread": ("-g", "-fsanitize=thread"), "address": ("-g", "-fsanitize=address")}
"""ThreadSanitizer, which knows what a barrier orders and reports what none does; AddressSanitizer, for what lies outside."""


@cache
def folder() -> Path:
    """Where what was compiled is kept: for a run of the tests, or for longer where RIM_RNN_GPU_ON_CPU names a folder."""
    kept = Path(os.environ.get("RIM_RNN_GPU_ON_CPU") or tempfile.mkdtemp(prefix="gpu-on-cpu-"))
    kept.mkdir(parents=True, exist_ok=True)
    return kept


def compiled(texts: Mapping[str, str], main: str, *flags: str) -> Path:
    """A shared library, or a program, of the text named ``main``, which includes the others."""
    key = hashlib.sha256(repr((sorted(texts.items()), main, flags, COMPILER)).encode()).hexdigest()[:24]
    made = folder() / f"{key}.so"
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=folder()) as work:
            for name, text in texts.items():
                Path(work, name).write_text(text)
            command = [COMPILER, "-x", "c++", main, "-o", "made", *flags]
            done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr[:4000])
            Path(work, "made").replace(made)
    return made


@cache
def grid(*flags: str) -> Path:
    """What a kernel runs in."""
    return compiled({name: (HERE / name).read_text() for name in ("device.cuh", "grid.cpp")}, "grid.cpp", *FLAGS, *flags)


@cache
def loaded(library: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL if library == grid() else ctypes.RTLD_LOCAL)


class ThreadsOfACPU:
    """A machine as :mod:`rim_rnn.driver` wants it.

    Args:
        limits: What it says of itself. Many multiprocessors make tiles of few rows.
        at_once: How many blocks run at one time, where they are no clusters.
        sources: What stands in the place of files of ``cusrc/``: mutants.
        sanitizer: One of :data:`SANITIZERS`. Kernels run in a process of their own then, where each tensor is an allocation.
            By default what RIM_RNN_SANITIZER names.
    """

    def __init__(
        self,
        limits: Limits = Limits(90, 1 << 17, 64, threads=8),  # noqa: B008 (it never changes)
        at_once: int = 64,
        sources: Mapping[str, str] | None = None,
        sanitizer: str | None = None,
    ) -> None:
        sanitizer = sanitizer or os.environ.get("RIM_RNN_SANITIZER")
        self._limits, self.at_once, self.flags = limits, at_once, SANITIZERS[sanitizer] if sanitizer else ()
        self.sources = {name: path.read_text() for name, path in SOURCES.items()} | dict(sources or {})
        self.launches: list[tuple[str, Layout, int]] = []

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def limits(self, device: torch.device) -> Limits:
        return self._limits

    def kernel(self, name: str, layout: Layout, device: torch.device) -> tuple[str, Path]:
        run = RUN.format(name=name, kind=name.capitalize())
        texts = {
            "sizes.h": layout.text(),
            "common.cuh": self.sources["common.cuh"],
            "device.cuh": (HERE / "device.cuh").read_text(),
        }
        texts["kernel.cu"] = self.sources[f"{name}.cu"] + run
        return name, compiled(texts, "kernel.cu", *FLAGS, *self.flags)

    def resident(self, kernel: Any, layout: Layout, shared: int, device: torch.device) -> int:
        return self.at_once

    def launch(
        self, kernel: tuple[str, Path], layout: Layout, blocks: int, shared: int, words: Sequence[Any], device: torch.device
    ) -> None:
        name, library = kernel
        self.launches.append((name, layout, blocks))
        numbers = blocks, layout.threads, shared, layout.sizes.n if layout.cluster else 1
        if not self.flags:
            loaded(grid()).launch(loaded(library).run, *numbers, packed(words))
            return
        with tempfile.NamedTemporaryFile() as file:
            for word in (*numbers, *words):
                file.write(struct.pack("qq", *(word.nbytes, 1) if isinstance(word, Tensor) else (int(word or 0), 0)))
                if isinstance(word, Tensor):
                    file.write(ctypes.string_at(word.data_ptr(), word.nbytes))
            file.flush()
            program = compiled(
                {name: (HERE / name).read_text() for name in ("device.cuh", "grid.cpp")},
                *("grid.cpp", "-std=c++20", "-O1", "-pthread", "-rdynamic", "-DPROGRAM", *self.flags, "-ldl"),
            )
            still = (
                ["setarch", "-R"] if shutil.which("setarch") else []
            )  # ThreadSanitizer wants addresses where they always are
            done = subprocess.run([*still, program, library, file.name], capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr[:4000] or f"{name} ended with {done.returncode}")
            left = memoryview(Path(file.name).read_bytes())
        for word in (word for word in words if isinstance(word, Tensor)):
            ctypes.memmove(word.data_ptr(), bytes(left[: word.nbytes]), word.nbytes)
            left = left[word.nbytes :]
