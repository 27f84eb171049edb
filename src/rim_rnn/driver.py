"""A GPU's kernels: how they lay a call out, what compiles them for a layer's sizes, and what starts them.

Nothing here is loaded or compiled before a layer first asks for it.
"""

import ctypes
import hashlib
import importlib.util
import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

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

    def unavailable(self, device: torch.device) -> str | None:
        """Why it can not, or ``None``."""

    def limits(self, device: torch.device) -> Limits: ...

    def kernel(self, name: str, layout: Layout, device: torch.device) -> Any:
        """``forward`` or ``backward``, compiled for this layout."""

    def resident(self, kernel: Any, layout: Layout, shared: int, device: torch.device) -> int:
        """How many blocks of it the device runs at one time, with so many bytes of ``shared`` memory each."""

    def launch(self, kernel: Any, layout: Layout, blocks: int, shared: int, words: Sequence[Any], device: torch.device) -> None:
        """Start so many blocks of it on the device's current stream, with these members of its only argument."""


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
    machine.launch(kernel, layout, circles * n, shared, [*arguments, said, met, *time, tiles], device)


def packed(words: Sequence[Any]) -> "ctypes.Array[ctypes.c_uint64]":
    """The members of a kernel's argument, 8 bytes each: tensors, of which it is given the address, ``None`` and numbers."""
    numbers = (0 if word is None else word.data_ptr() if isinstance(word, torch.Tensor) else int(word) for word in words)
    return (ctypes.c_uint64 * len(words))(*numbers)


class Compiler:
    """NVRTC, which torch for CUDA brings, and the kernels that it compiled, on disk.

    They are kept where torch keeps its own: in ``PYTORCH_KERNEL_CACHE_PATH``, or ``torch/kernels`` in the user's folder for
    caches, unless ``USE_PYTORCH_KERNEL_CACHE=0``.

    Raises:
        OSError: There is no NVRTC.
    """

    def __init__(self) -> None:
        of_torch = (torch.version.cuda or "").partition(".")[0]  # where there are several: a newer one needs a newer driver
        found = sorted(libraries(), key=lambda path: (path.name.endswith(f".{of_torch}"), path.name))
        if not found:
            raise OSError("NVRTC was not found, which torch for CUDA brings on Linux")
        library = found[-1]
        for builtins in library.parent.glob("libnvrtc-builtins.so*"):
            ctypes.CDLL(str(builtins))  # NVRTC looks for it by its name alone
        self.library = ctypes.CDLL(str(library))
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def _call(self, name: str, *arguments: Any) -> None:
        failed = getattr(self.library, name)(*arguments)
        if failed:
            raise RuntimeError(f"rim_rnn: {name} failed: {self.library.nvrtcGetErrorString(failed).decode()}")

    def architectures(self) -> list[int]:
        """Those that it can compile for."""
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", found)
        return list(found)

    def compile(self, name: str, layout: Layout, architecture: int, *options: str) -> tuple[bytes, str]:
        """A kernel as a cubin, and what NVRTC says of it."""
        texts = {"sizes.h": layout.text()} | {file: path.read_text() for file, path in SOURCES.items()}
        source = texts.pop(f"{name}.cu").encode()
        named, written = list(texts), [text.encode() for text in texts.values()]
        given = [f"--gpu-architecture=sm_{architecture}", "--std=c++17", *options]

        def strings(values: Sequence[Any]) -> Any:
            return (ctypes.c_char_p * len(values))(*(v if isinstance(v, bytes) else v.encode() for v in values))

        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        self._call(
            *("nvrtcCreateProgram", ctypes.byref(program), source, f"{name}.cu".encode()),
            *(len(named), strings(written), strings(named)),
        )
        try:
            failed = self.library.nvrtcCompileProgram(program, len(given), strings(given))
            self._call("nvrtcGetProgramLogSize", program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            self._call("nvrtcGetProgramLog", program, log)
            if failed:
                raise RuntimeError(f"rim_rnn: nvrtcCompileProgram failed:\n{log.value.decode()}")
            self._call("nvrtcGetCUBINSize", program, ctypes.byref(size))
            cubin = ctypes.create_string_buffer(size.value)
            self._call("nvrtcGetCUBIN", program, cubin)
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))
        return cubin.raw, log.value.decode()

    def cubin(self, name: str, layout: Layout, architecture: int) -> bytes:
        """The same from disk, if it was compiled before."""
        folder = cache_folder()
        if folder is None:
            return self.compile(name, layout, architecture)[0]
        texts = [path.read_text() for _, path in sorted(SOURCES.items())]
        key = hashlib.sha256(repr((name, layout.text(), architecture, self.version, texts)).encode()).hexdigest()
        kept = folder / f"rim_rnn_{key[:40]}.cubin"
        try:
            digest, cubin = kept.read_bytes()[:32], kept.read_bytes()[32:]
            if hashlib.sha256(cubin).digest() == digest:
                return cubin
        except OSError:
            pass
        cubin = self.compile(name, layout, architecture)[0]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                file.write(hashlib.sha256(cubin).digest() + cubin)
            Path(file.name).replace(kept)  # whole, or not at all
        except OSError:  # a folder that nobody can write to
            pass
        return cubin


def libraries() -> list[Path]:
    """Every NVRTC among the packages of NVIDIA."""
    nvidia = importlib.util.find_spec("nvidia")
    places = [Path(place) for place in nvidia.submodule_search_locations or ()] if nvidia else []
    return [path for place in places for path in place.glob("*/lib/libnvrtc.so.*")]


def cache_folder() -> Path | None:
    """Where torch keeps kernels that it compiles; ``None`` where it keeps none."""
    if os.environ.get("USE_PYTORCH_KERNEL_CACHE") == "0":
        return None
    if named := os.environ.get("PYTORCH_KERNEL_CACHE_PATH"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch" / "kernels"


class LaunchAttribute(ctypes.Structure):
    _fields_: ClassVar = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint * 16)]


class LaunchConfig(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("count", ctypes.c_uint),
    ]


COOPERATIVE, CLUSTER_DIMENSION = 2, 4  # CUlaunchAttributeID
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute


class Driver:
    """The machine of ``torch.cuda``. Libraries are loaded when it is first asked, a kernel compiled when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._kernels: dict[tuple[int, str, Layout], ctypes.c_void_p] = {}

    @cached_property
    def compiler(self) -> Compiler | str:
        try:
            return Compiler()
        except OSError as error:
            return str(error)

    @cached_property
    def library(self) -> ctypes.CDLL:
        return ctypes.CDLL("libcuda.so.1")

    def _call(self, name: str, *arguments: Any) -> None:
        failed = getattr(self.library, name)(*arguments)
        if failed:
            what = ctypes.c_char_p()
            self.library.cuGetErrorString(failed, ctypes.byref(what))
            text = (what.value or b"unknown error").decode()
            kind = torch.OutOfMemoryError if failed == 2 else torch.AcceleratorError
            raise kind(f"rim_rnn: {name} failed with CUDA error {failed}: {text}")

    @cache  # noqa: B019 (there is one, and it stays)
    def unavailable(self, device: torch.device) -> str | None:
        if torch.version.hip is not None:
            return "the kernels are for CUDA, and this torch is for ROCm"
        if sys.platform != "linux":
            return "the kernels have been built for Linux alone"
        with self._lock:
            compiler = self.compiler
        if isinstance(compiler, str):
            return compiler
        architecture = self.limits(device).architecture
        if architecture < 80:
            return f"the device has compute capability {architecture / 10}, the kernels need 8.0"
        if architecture not in compiler.architectures():
            return f"NVRTC {compiler.version} does not know compute capability {architecture / 10}"
        return None

    @cache  # noqa: B019
    def limits(self, device: torch.device) -> Limits:
        of: Any = torch.cuda.get_device_properties(device)
        return Limits(of.major * 10 + of.minor, of.shared_memory_per_block_optin, of.multi_processor_count)

    def kernel(self, name: str, layout: Layout, device: torch.device) -> Any:
        key = (torch.cuda.current_device() if device.index is None else device.index, name, layout)
        with self._lock:
            if key not in self._kernels:
                compiler = self.compiler
                if isinstance(compiler, str):
                    raise RuntimeError(f"rim_rnn: {compiler}")
                cubin = compiler.cubin(name, layout, self.limits(device).architecture)
                module, function = ctypes.c_void_p(), ctypes.c_void_p()
                with torch.cuda.device(device):
                    self._call("cuModuleLoadData", ctypes.byref(module), cubin)
                    self._call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
                    shared = layout.bytes(name == "backward")
                    self._call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
                self._kernels[key] = function
            return self._kernels[key]

    def resident(self, kernel: Any, layout: Layout, shared: int, device: torch.device) -> int:
        count = ctypes.c_int()
        with torch.cuda.device(device):
            self._call(
                *("cuOccupancyMaxActiveBlocksPerMultiprocessor", ctypes.byref(count), kernel),
                *(layout.threads, ctypes.c_size_t(shared)),
            )
        return count.value * self.limits(device).multiprocessors

    def launch(self, kernel: Any, layout: Layout, blocks: int, shared: int, words: Sequence[Any], device: torch.device) -> None:
        arguments, attribute = packed(words), LaunchAttribute(CLUSTER_DIMENSION if layout.cluster else COOPERATIVE)
        for i, value in enumerate((layout.sizes.n, 1, 1) if layout.cluster else (1,)):
            attribute.value[i] = value
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            config = LaunchConfig(blocks, 1, 1, layout.threads, 1, 1, shared, stream, ctypes.pointer(attribute), 1)
            parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
            self._call("cuLaunchKernelEx", ctypes.byref(config), kernel, parameters, None)
