"""RIM in a process of its own that computes when it is told to, so that two builds of the package can take turns.

Reads lines of JSON and answers each with one:

["case", {"steps": 3, ...}]  builds the case: the package in use, and norms by which to see that two workers compute the same
["forward", 12]              seconds that twelve calls take; "train" likewise
"""

import json
import sys
import timeit
from pathlib import Path
from typing import Any

import torch
from cases import Case, Data, build, calls

import rim_rnn


def main() -> None:
    for line in sys.stdin:
        what, argument = json.loads(line)
        answer: Any
        if what == "case":
            torch.manual_seed(0)
            case = Case(**argument)
            layer, data = build("RIM", case), Data(case)
            call = calls(layer, list(layer.parameters()), data)
            call["train"]()
            norms = [layer(data.input)[0].norm().item(), *(p.grad.norm().item() for p in layer.parameters())]
            answer = {"package": str(Path(rim_rnn.__file__).parent), "norms": norms}
        else:
            answer = timeit.timeit(call[what], number=argument)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
