"""The fast path on a CPU: a whole sequence of one cell, forward and backward, in one native operator (``csrc/``).

It is equal to :meth:`Step.scan` because it computes the same four stages from the same parameters: ``csrc/step.h`` has them
by name and in order, and only multiplies the weights that meet ``x`` out first, which changes rounding and nothing else. (On
x86, numbers below the smallest normal one count as 0.) The readable path stays the definition; ``tests/test_native.py``
holds every output and every gradient of this one against it.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rim_rnn.fast import NARROW, FastPath, is_switched_off
from rim_rnn.fast import readable as readable

ISAS = ("baseline", "avx2", "avx512")
"""The instruction sets that the operator is built for, in the order of ``csrc/rim.cpp``."""


class _Native(FastPath):
    name = "native"
    names = "infer", "scan", "scan_backward"
    options = ", bool rounded"

    def serves(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def declines(self, input: Tensor) -> str | None:
        if _unavailable is not None:
            return _unavailable
        if is_switched_off():
            return "switched off"
        if not input.is_cpu:
            return f"the input is on {input.device}, not on the CPU"
        if input.dtype not in (torch.float32, torch.float64, *NARROW):
            return f"the input is {input.dtype}, not of a floating-point type"
        return None

    def told(self, input: Tensor) -> tuple[Any, ...]:
        """Whether also what the gates, the projection and the communication multiply is rounded to bfloat16, where rows are
        many and the processor has products of it."""
        return (input.dtype is torch.bfloat16,)

    def size_saved(self, rows: int, n: int, p: int, u: int, lstm: bool, k: int, heads: int, talk: int, bounded: bool) -> int:
        return rows * k * (heads + (5 if lstm else 4) * u + (2 if bounded and talk else 1) * p + talk * n)

    def heard(self, saved: Tensor, winners: Tensor, n: int, talk: int) -> Tensor:
        rows, k = winners.shape
        # The end of `saved`, (row, unit that is read, winner, head): csrc/problem.h.
        return saved[saved.numel() - rows * n * k * talk :].view(rows, n, k, talk).permute(0, 3, 2, 1)


OPERATOR = _Native()
scan, supports = OPERATOR.scan, OPERATOR.supports


def _load() -> str | None:
    """Load the operator. The reason why there is none, or ``None``."""
    wanted, isa = os.environ.get("RIM_RNN_NATIVE", ""), os.environ.get("RIM_RNN_ISA", "")
    if wanted not in ("", "0", "1"):
        raise ImportError(f"RIM_RNN_NATIVE should be 0, 1 or empty, got {wanted!r}")
    if isa and isa not in ISAS:
        raise ImportError(f"RIM_RNN_ISA should be {', '.join(ISAS)} or empty, got {isa!r}")
    if wanted == "0":
        return "switched off by RIM_RNN_NATIVE=0"
    here = Path(__file__).parent
    library = next((path for path in here.glob("_native.*") if path.suffix in (".so", ".pyd")), None)
    if library is None:
        reason = "the native operator is not installed (the page Installing says where it is, and how to build it)"
    elif library.stat().st_mtime < max((path.stat().st_mtime for path in here.glob("csrc/*")), default=0):  # in a checkout
        reason = "the native operator is older than its sources (make setup builds it again)"
    else:
        try:
            OPERATOR.register(lambda: torch.ops.load_library(str(library)))  # type: ignore[no-untyped-call]
            torch.ops.rim_rnn.isa()  # or the error of one that the processor does not have
        except OSError as error:
            reason = f"the native operator does not load: {error}"
        except RuntimeError as error:
            raise ImportError(str(error)) from error
        else:
            return None
    if wanted == "1":
        raise ImportError(f"RIM_RNN_NATIVE=1, but {reason}")
    return reason


def instruction_set() -> str:
    """The one that the operator runs on here: the best that the processor has, or what RIM_RNN_ISA names."""
    return ISAS[torch.ops.rim_rnn.isa()]


def empty_cache() -> int:
    """Give back the working memory that the operator keeps from one call to the next: at most 64 MiB, by all layers together.

    Returns:
        How many bytes it had; 0 without the operator.

    Example:
        >>> from rim_rnn import native
        >>> bytes_given_back = native.empty_cache()
        >>> native.empty_cache()
        0
    """
    given_back: int = torch.ops.rim_rnn.release() if _unavailable is None else 0
    return given_back


_unavailable = _load()
