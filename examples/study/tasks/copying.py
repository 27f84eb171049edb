"""Ten symbols, a span of blanks, a marker: then the symbols are to be given back.

Goyal et al., 2021, appendix D.1. An input is one of the eight symbols, a blank or the marker, one-hot. Ten blanks follow the
marker, and at each of them a symbol is read out.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from tasks.task import Drawn, Examples, Measure, classify

SYMBOLS, COUNT = 8, 10
BLANK, MARKER = SYMBOLS, SYMBOLS + 1


class Copying(Drawn):
    size, size_title = 50, "blank steps"
    eval_sizes: ClassVar = [50, 100, 200, 400]
    measures: ClassVar = {"loss": Measure("cross-entropy"), "accuracy": Measure("accuracy, %", 100, 1)}
    guess = ("chance", math.log(SYMBOLS))
    input_size, outputs, read_steps = SYMBOLS + 2, SYMBOLS, COUNT

    def draw(self, source: torch.Generator, count: int, size: int) -> Examples:
        symbols = torch.randint(SYMBOLS, (count, COUNT), generator=source)
        rest = torch.full((count, size + 1 + COUNT), BLANK)
        rest[:, size] = MARKER
        return Examples(one_hot(torch.cat([symbols, rest], 1), SYMBOLS + 2).float(), symbols)

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return classify(outputs, targets)

    def ink(self, inputs: Tensor) -> Tensor:
        return self.places(inputs[..., BLANK] == 0, self.args)
