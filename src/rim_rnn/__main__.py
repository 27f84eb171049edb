"""``python -m rim_rnn``: what a bug report needs to say of an installation, and whether its two paths agree."""

import os
import platform
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import rim_rnn
from rim_rnn import native

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10}
"""How far a result may be from that of the readable path, as a part of its largest element."""

VARIABLES = ("ATEN_", "CUDA_VISIBLE_DEVICES", "GOMP_", "KMP_", "LD_PRELOAD", "MKL_", "OMP_", "RIM_RNN_")
"""How the names begin of the variables that decide how a call runs."""


def installation() -> Iterator[tuple[str, str]]:
    """What results and speed depend on: its name and what it is here."""
    path = rim_rnn.RIM(1, 600).path(torch.zeros(1, 1, 1))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "rim-rnn", f"{rim_rnn.__version__} in {Path(__file__).parent}"
    yield "torch", torch.__version__
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "system", platform.platform()
    yield "path", path
    isa = f"{native.instruction_set()}, " if path == "native" else ""
    yield "instructions", f"{isa}torch itself {torch.backends.cpu.get_cpu_capability()}"
    yield "threads", f"{torch.get_num_threads()} on {cores} cores"
    yield from ((name, value) for name, value in sorted(os.environ.items()) if value and name.startswith(VARIABLES))


def results(rnn: Any, dtype: torch.dtype, packed: bool) -> dict[str, Tensor]:
    """The values of a call with given states, and every gradient. The same input each time."""
    torch.manual_seed(0)
    steps, batch = 9, 31  # the operator packs weights for so many rows, and takes them as they lie for fewer
    leaves = {"input": torch.randn(steps, batch, rnn.input_size, dtype=dtype)}
    for name in ("h_0", "c_0") if rnn.mode == "LSTM" else ("h_0",):
        leaves[name] = torch.randn(rnn.num_directions, batch, rnn.hidden_size, dtype=dtype)
    x, *state = (leaf.requires_grad_() for leaf in leaves.values())
    sequence: Any = pack_padded_sequence(x, torch.randint(1, steps + 1, (batch,)), enforce_sorted=False) if packed else x
    output, last = rnn(sequence, tuple(state) if rnn.mode == "LSTM" else state[0])
    values = {"output": output[0] if packed else output}
    values |= dict(zip(("h_n", "c_n"), last, strict=True)) if rnn.mode == "LSTM" else {"h_n": last}
    leaves |= dict(rnn.named_parameters())
    gradients = torch.autograd.grad([value.square().sum() for value in values.values()], list(leaves.values()))
    return {name: value.detach() for name, value in values.items()} | {
        f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
    }


def differences(rnn: Any, dtype: torch.dtype, packed: bool) -> dict[str, float]:
    """How far each value and gradient of the native path is from that of the readable one, which runs in one thread."""
    ours, threads = results(rnn, dtype, packed), torch.get_num_threads()
    torch.set_num_threads(1)  # operations so small are slow in many
    with native.readable():
        theirs = results(rnn, dtype, packed)
    torch.set_num_threads(threads)
    return {name: ((ours[name] - right).abs().max() / right.abs().max()).item() for name, right in theirs.items()}


def self_check() -> list[str]:
    """Print how far the paths are apart; a line for each layer where that is too far, or that is not native."""
    wrong = []
    print(f"\nself-check: how far values and gradients of the two paths are apart\n{'float32':>39}{'float64':>10}")
    for rnn_cell, bidirectional, packed in product(("LSTM", "GRU"), (False, True), (False, True)):
        what = rnn_cell + ", bidirectional" * bidirectional + ", packed" * packed
        largest = []
        for dtype, tolerance in TOLERANCES.items():
            torch.manual_seed(4)  # no two bids are so close that rounding could change the winners
            rnn: Any = rim_rnn.RIM(5, 66, bidirectional=bidirectional, rnn_cell=rnn_cell, dtype=dtype)
            path = rnn.path(torch.zeros(1, 1, 5, dtype=dtype))
            if path != "native":
                wrong.append(f"{what}, {dtype}: {path}")
            found = differences(rnn, dtype, packed)
            largest.append(max(found.values(), key=lambda by: (by != by, by)))  # NaN above all
            far = [name for name, by in found.items() if not by <= tolerance]
            if far:
                more = f" and {len(far) - 1} more" if far[1:] else ""
                wrong.append(f"{what}, {dtype}: {far[0]}{more}, by {largest[-1]:.0e}")
        print(f"  {what:27}" + "".join(f"{by:10.0e}" for by in largest))
    print(f"  {'allowed':27}" + "".join(f"{by:10.0e}" for by in TOLERANCES.values()))
    return wrong


def main() -> int:
    """Print everything. 1 where a result differs, or where an operator is there but not taken."""
    for name, value in installation():
        print(f"{name:15} {value}")
    reason = native._unavailable
    if reason is None:
        wrong = self_check()
    elif any(Path(__file__).parent.glob("_native.*")) and os.environ.get("RIM_RNN_NATIVE") != "0":
        wrong = [reason]
    else:
        print("\nself-check: nothing to compare without the native operator")
        return 0
    print(*(f"self-check FAILED: {line}" for line in wrong) if wrong else ["self-check: passed"], sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
