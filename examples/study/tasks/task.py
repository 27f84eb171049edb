"""What every task has: its data, what is read out of a layer's outputs, and how that is measured."""

import argparse
import hashlib
from argparse import Namespace
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


class DataError(ValueError):
    """A data file is missing or is not what it should be; the message names it."""


class Examples(NamedTuple):
    """Inputs `(N, steps, input_size)`, and what should be read out, `(N, read_steps)`."""

    inputs: Tensor
    targets: Tensor


class Measure(NamedTuple):
    """How a measure is shown: `factor` times its value, with so many `digits`."""

    title: str
    factor: float = 1
    digits: int = 3

    def show(self, value: float) -> str:
        return f"{self.factor * value:.{self.digits}f}"


class Task:
    """A task at one size of training and several of test.

    A size is what the task makes of it: a width in pixels, a number of blank steps.
    """

    size: ClassVar[int]
    eval_sizes: ClassVar[list[int]]
    size_title: ClassVar[str]
    measures: ClassVar[dict[str, Measure]]
    """What `measure` returns. By the first one an epoch is chosen: the highest accuracy, or the lowest of anything else."""
    guess: ClassVar[tuple[str, float]]
    """A name for who knows nothing of the input, and what the first measure is for them."""

    input_size: int
    outputs: int
    """Numbers read out at a step."""
    read_steps: int
    """So many steps at the end are read out."""
    examples: int
    """Sequences in an epoch of training."""

    def __init__(self, args: Namespace) -> None:
        self.args = args

    @staticmethod
    def add_arguments(add: Callable[..., Any]) -> None:
        """Adds the arguments that belong to this task alone."""
        raise NotImplementedError

    @staticmethod
    def label(size: int | str) -> str:
        return str(size)

    def train(self, epoch: int) -> Examples:
        """The sequences of an epoch, the same whenever they are asked for."""
        raise NotImplementedError

    def valid(self, size: int) -> Examples:
        """`args.valid` sequences at a size, which `train` never has."""
        raise NotImplementedError

    def test(self, size: int) -> Examples:
        raise NotImplementedError

    def identity(self) -> dict[str, str]:
        """What tells the data from any other, as far as the arguments do not."""
        return {}

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Of outputs `(N, read_steps, outputs)`, each of `measures` per sequence; the training descends `loss`."""
        raise NotImplementedError

    def answer(self, outputs: Tensor) -> Tensor:
        """What outputs say, in the form of targets."""
        return outputs.argmax(2)

    def spell(self, targets: Tensor) -> list[str]:
        return ["".join(map(str, row)) for row in targets.tolist()]

    def samples(self, examples: Examples) -> Examples:
        """A few of them, to be drawn."""
        return Examples(examples.inputs[:10], examples.targets[:10])

    def ink(self, inputs: Tensor) -> Tensor:
        """Where an input is more than background: bool `(N, rows, columns)`, as `places` has it."""
        raise NotImplementedError

    @staticmethod
    def places(steps: Tensor, args: Namespace) -> Tensor:
        """Values per step of the size of training `(..., steps)` as a picture `(..., rows, columns)`."""
        return steps.unsqueeze(-2)


class Drawn(Task):
    """A task whose sequences are drawn: anew for every epoch, the same ones for every test."""

    @staticmethod
    def add_arguments(add: Callable[..., Any]) -> None:
        add("--examples", type=positive, default=10_000, help="sequences in an epoch, drawn anew (default: %(default)s)")
        add("--test_examples", type=positive, default=1_000, help="sequences to test at each size (default: %(default)s)")

    def __init__(self, args: Namespace) -> None:
        super().__init__(args)
        self.examples = args.examples

    def train(self, epoch: int) -> Examples:
        return self.draw(generator("train", self.args.seed, epoch), self.args.examples, self.args.size)

    def valid(self, size: int) -> Examples:
        return self.draw(generator("valid"), self.args.valid, size)

    def test(self, size: int) -> Examples:
        return self.draw(generator("test", size), self.args.test_examples, size)

    def draw(self, source: torch.Generator, count: int, size: int) -> Examples:
        raise NotImplementedError


def classify(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Cross-entropy and accuracy, averaged over the steps that are read out."""
    return {
        "accuracy": (outputs.argmax(2) == targets).double().mean(1),
        "loss": cross_entropy(outputs.transpose(1, 2), targets, reduction="none").mean(1),
    }


def generator(*name: object) -> torch.Generator:
    """A generator of its own for each name."""
    digest = hashlib.sha256(repr(name).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return int(text)
