"""Numbers between 0 and 1, two of them marked: their sum is to be given at the end.

Goyal et al., 2021, appendix D.2. A step has a number and a second channel, which is 1 at two steps, one in each half of the
sequence, and 0 elsewhere.
"""

from argparse import Namespace
from typing import ClassVar

import torch
from torch import Tensor

from tasks.task import Drawn, Examples, Measure


class Adding(Drawn):
    size, size_title = 50, "steps"
    eval_sizes: ClassVar = [50, 200, 1000]
    measures: ClassVar = {
        "loss": Measure("mean squared error", digits=4),
        "constant": Measure("the same of always guessing 1", digits=4),
    }
    guess = ("always 1", 1 / 6)
    input_size, outputs, read_steps = 2, 1, 1

    def __init__(self, args: Namespace) -> None:
        super().__init__(args)
        if min([args.size, *args.eval_sizes]) < 2:
            raise ValueError("--size and --eval_sizes have to be at least 2: each half of a sequence has a marked step")

    def draw(self, source: torch.Generator, count: int, size: int) -> Examples:
        numbers, marks = torch.rand(count, size, generator=source), torch.zeros(count, size)
        for begin, end in ((0, size // 2), (size // 2, size)):
            marks.scatter_(1, torch.randint(begin, end, (count, 1), generator=source), 1.0)
        return Examples(torch.stack([numbers, marks], 2), (numbers * marks).sum(1, keepdim=True))

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": (outputs[:, 0] - targets).square().mean(1), "constant": (1 - targets).square().mean(1)}

    def answer(self, outputs: Tensor) -> Tensor:
        return outputs[:, 0]

    def spell(self, targets: Tensor) -> list[str]:
        return [f"{value:.1f}" for value in targets[:, 0].tolist()]

    def ink(self, inputs: Tensor) -> Tensor:
        return self.places(inputs[..., 1] == 1, self.args)
