"""The kernels of ``cusrc/`` on a CPU, a thread for each of a GPU's: for tests of what they compute, and of their barriers."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rim_rnn.driver import SOURCES, Layout, Limits

HERE = Path(__file__).parent
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", "-Wl,-Bsymbolic", "-Wall", "-Wextra", "-Werror", "-Wno-type-limits", "-Wno-unknown-pragmas"]
FLAGS += os.environ.get("RIM_RNN_SHIM_FLAGS", "").split()
COMPILER = os.environ.get("CXX", "g++")
RUN = 'extern "C" void run(const void* arguments) {{ {name}(*static_cast<const {kind}Arguments*>(arguments)); }}'


@cache
def folder() -> Path:
    """Where compiled kernels are kept, from one run of the tests to the next if RIM_RNN_SHIM_CACHE names a folder."""
    kept = os.environ.get("RIM_RNN_SHIM_CACHE") or tempfile.mkdtemp(prefix="gpu-on-cpu-")
    Path(kept).mkdir(parents=True, exist_ok=True)
    return Path(kept)


def compiled(texts: Mapping[str, str], main: str, *more: str) -> ctypes.CDLL:
    """A shared library of the text named ``main``, which includes the others."""
    key = hashlib.sha256(repr((sorted(texts.items()), main, more, FLAGS, COMPILER)).encode()).hexdigest()[:24]
    library = folder() / f"{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder()) as work:
            for name, text in texts.items():
                Path(work, name).write_text(text)
            command = [COMPILER, *FLAGS, "-x", "c++", main, "-o", "made.so", *more]
            done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr[:4000])
            Path(work, "made.so").replace(library)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL if main == "grid.cpp" else ctypes.RTLD_LOCAL)


@cache
def grid() -> ctypes.CDLL:
    texts = {name: (HERE / name).read_text() for name in ("device.cuh", "grid.cpp")}
    return compiled(texts, "grid.cpp")


class ThreadsOfACPU:
    """A machine as :mod:`rim_rnn.driver` wants it.

    Args:
        limits: What it says of itself. Sizes with many multiprocessors take tiles of few rows.
        sources: What stands in the place of files of ``cusrc/``, in tests of mutants.
        at_once: How many blocks run at one time, where they are no clusters.
    """

    def __init__(
        self,
        limits: Limits = Limits(90, 1 << 17, 64, threads=16),  # noqa: B008 (immutable)
        sources: Mapping[str, str] | None = None,
        at_once: int = 64,
    ) -> None:
        self._limits, self.at_once = limits, at_once
        self.sources = {name: path.read_text() for name, path in SOURCES.items()} | dict(sources or {})
        self.launches: list[tuple[str, Layout, int]] = []

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def limits(self, device: torch.device) -> Limits:
        return self._limits

    def kernel(self, name: str, layout: Layout, device: torch.device) -> Any:
        grid()
        run = RUN.format(name=name, kind=name.capitalize())
        texts = {"sizes.h": layout.text(), "common.cuh": self.sources["common.cuh"], "device.cuh": (HERE / "device.cuh").read_text()}
        return compiled(texts | {"kernel.cu": self.sources[f"{name}.cu"] + run}, "kernel.cu").run

    def resident(self, kernel: Any, layout: Layout, shared: int, device: torch.device) -> int:
        return self.at_once

    def launch(self, kernel: Any, layout: Layout, blocks: int, shared: int, arguments: Any, device: torch.device) -> None:
        self.launches.append((kernel.__name__, layout, blocks))
        cluster = layout.sizes.n if layout.cluster else 1
        grid().launch(kernel, blocks, layout.threads, shared, cluster, arguments)
