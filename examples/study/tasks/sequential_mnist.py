"""MNIST digits as sequences of binary pixels: learnt at one resolution, tested at larger ones.

Goyal et al., 2021, appendix D.3. A digit is resized from 28x28 to `size` x `size` by nearest neighbour (row and column `i` of
the result are row and column `i * 28 // size` of the original, as in OpenCV's `INTER_NEAREST`), a pixel brighter than
`THRESHOLD` becomes 1 and any other 0, and the pixels are read line by line, `input_size` of them per step. The output of the
last step says which digit it was.
"""

import gzip
import hashlib
import math
import struct
import zlib
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pooch
import torch
from torch import Tensor

from tasks.task import DataError, Examples, Measure, Task, classify, positive

THRESHOLD = 120

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)

SHA256 = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}


class Digits(NamedTuple):
    """Grey images `(N, 28, 28)` and labels `(N,)`, both uint8."""

    images: Tensor
    labels: Tensor

    def sequences(self, size: int, input_size: int) -> Tensor:
        """The binarised digits at `size` x `size`: float `(N, steps, input_size)`.

        Where `input_size` does not divide the number of pixels, zeros fill up the last step.
        """
        rows = torch.arange(size) * self.images.shape[1] // size
        columns = torch.arange(size) * self.images.shape[2] // size
        pixels = (self.images[:, rows][:, :, columns] > THRESHOLD).flatten(1).float()
        steps = math.ceil(pixels.shape[1] / input_size)
        pixels = torch.nn.functional.pad(pixels, (0, steps * input_size - pixels.shape[1]))
        return pixels.view(-1, steps, input_size)

    def examples(self, size: int, input_size: int) -> Examples:
        return Examples(self.sequences(size, input_size), self.labels.long().unsqueeze(1))

    def sha256(self) -> str:
        """What tells this set of digits from any other."""
        digest = hashlib.sha256(self.images.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


class SequentialMNIST(Task):
    size, size_title = 14, "pixels per side"
    eval_sizes: ClassVar = [14, 16, 19, 24]
    measures: ClassVar = {"accuracy": Measure("accuracy, %", 100, 1), "loss": Measure("cross-entropy")}
    guess = ("chance", 0.1)
    outputs, read_steps = 10, 1

    @staticmethod
    def add_arguments(add: Callable[..., Any]) -> None:
        add("--data_dir", help="folder with the four idx files of MNIST, plain or gzip (default: download them once)")
        add("--examples", type=positive, help="train on the first so many digits (default: all that are not held out)")
        add("--input_size", type=positive, default=1, help="pixels per step; zeros fill up the last one (default: %(default)s)")

    def __init__(self, args: Namespace) -> None:
        super().__init__(args)
        self.input_size = args.input_size
        self.digits, self.test_digits = load(args.data_dir)
        self.rest = len(self.digits.labels) - args.valid
        if self.rest < 1:
            raise DataError(f"--valid {args.valid} leaves none of {len(self.digits.labels)} digits to train")
        self.examples = args.examples or self.rest
        if self.examples > self.rest:
            raise DataError(f"--examples {self.examples}: there are {self.rest} digits to train")
        self.trained = Digits(*(part[: self.examples] for part in self.digits)).examples(args.size, self.input_size)

    @staticmethod
    def label(size: int | str) -> str:
        return f"{size}x{size}"

    def train(self, epoch: int) -> Examples:
        return self.trained

    def valid(self, size: int) -> Examples:
        """The last training digits."""
        return Digits(*(part[self.rest :] for part in self.digits)).examples(size, self.input_size)

    def test(self, size: int) -> Examples:
        return self.test_digits.examples(size, self.input_size)

    def identity(self) -> dict[str, str]:
        return {"train": self.digits.sha256(), "test": self.test_digits.sha256()}

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return classify(outputs, targets)

    def samples(self, examples: Examples) -> Examples:
        """The first digit of each class."""
        inputs, targets = examples
        first = [int((targets[:, 0] == label).nonzero()[0]) for label in targets.unique()]
        return Examples(inputs[first], targets[first])

    def ink(self, inputs: Tensor) -> Tensor:
        size = self.args.size
        return inputs.flatten(1)[:, : size * size].unflatten(1, (size, size)).bool()

    @staticmethod
    def places(steps: Tensor, args: Namespace) -> Tensor:
        pixels = steps.repeat_interleave(args.input_size, -1)[..., : args.size**2]
        return pixels.unflatten(-1, (args.size, args.size))


def load(data_dir: str | None) -> tuple[Digits, Digits]:
    """The training and the test digits, from the four idx files in `data_dir`, each plain or gzip.

    Without `data_dir` they are MNIST's, downloaded once into the user's cache.
    """
    return read_digits(data_dir, "train"), read_digits(data_dir, "t10k")


def read_digits(data_dir: str | None, prefix: str) -> Digits:
    paths = [find(data_dir, f"{prefix}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")]
    images, labels = read_idx(paths[0], dims=3), read_idx(paths[1], dims=1)
    if images.shape[1:] != (28, 28):
        raise DataError(f"{paths[0]}: images are {images.shape[1]}x{images.shape[2]}, expected 28x28")
    if len(images) != len(labels):
        raise DataError(f"{paths[1]}: {len(labels)} labels, but {paths[0]} holds {len(images)} images")
    if labels.max() > 9:
        raise DataError(f"{paths[1]}: holds the label {labels.max()}, expected 0 to 9")
    return Digits(images, labels)


def find(data_dir: str | None, name: str) -> Path:
    """The file `name` or `name.gz` in `data_dir`, or the downloaded one."""
    if data_dir is None:
        return download(f"{name}.gz")
    for path in (Path(data_dir, name), Path(data_dir, f"{name}.gz")):
        if path.is_file():
            return path
    raise DataError(f"{path}: no such file, neither with .gz nor without")


def download(name: str) -> Path:
    failures = []
    for mirror in MIRRORS:
        try:
            cache = pooch.os_cache("rim_rnn") / "mnist"
            return Path(pooch.retrieve(mirror + name, known_hash=f"sha256:{SHA256[name]}", fname=name, path=cache))
        except (OSError, ValueError) as error:  # no network, no such file; wrong checksum
            failures.append(f"{mirror}: {error}")
    raise DataError("\n  ".join([f"{name}: could not be downloaded; --data_dir names a folder to read", *failures]))


def read_idx(path: Path, dims: int) -> Tensor:
    """An idx file of unsigned bytes with `dims` dimensions as a uint8 tensor of its shape."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: not a gzip file, or a damaged one: {error}") from error
    magic, header = bytes([0, 0, 8, dims]), 4 + 4 * dims  # 8: unsigned bytes
    if content[:4] != magic:
        raise DataError(
            f"{path}: not the expected idx file: begins with {content[:4].hex() or 'nothing'}, not with {magic.hex()}"
        )
    if len(content) < header:
        raise DataError(f"{path}: truncated within its {header} bytes of header")
    shape = struct.unpack(f">{dims}I", content[4:header])
    if len(content) - header != math.prod(shape) or not shape[0]:
        raise DataError(
            f"{path}: truncated or too long: its header promises {' x '.join(map(str, shape))} bytes, "
            f"{len(content) - header} follow"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).view(shape)
