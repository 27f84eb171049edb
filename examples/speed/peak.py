"""Peak memory of one training step in a process of its own: what the resident set grows by, in bytes.

python peak.py RIM '{"steps": 400, "batch": 64, "input_size": 1, "hidden_size": 600}' 2
"""

import ctypes
import json
import sys
from dataclasses import replace

import torch
from cases import Case, Data, build, calls


def resident(field: str) -> int:
    """`VmRSS`, what the process holds now, or `VmHWM`, the most that it ever held."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))


def peak(name: str, case: Case) -> int:
    """Bytes that one training step needs at its peak, beyond parameters, input and what libraries keep for themselves."""
    layer = build(name, case)
    parameters = list(layer.parameters())
    calls(layer, parameters, Data(replace(case, steps=2)))["train"]()  # starts threads, fills the libraries' buffers
    for parameter in parameters:
        parameter.grad = None
    train = calls(layer, parameters, Data(case))["train"]
    ctypes.CDLL(None).malloc_trim(0)  # gives back what the step before has freed
    before = resident("VmRSS")
    train()
    return resident("VmHWM") - before


if __name__ == "__main__":
    name, case, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(peak(name, Case(**json.loads(case))))
