"""Writes the digits that ship with this example: the first ones of each class, in the order of MNIST.

python make_digits.py            # from a download of MNIST, or from --data_dir
"""

import argparse
import gzip
import struct
from pathlib import Path

import torch
from tasks.sequential_mnist import Digits, load

PER_CLASS = {"train": 1000, "t10k": 200}


def first_of_each_class(digits: Digits, count: int) -> Digits:
    kept = torch.cat([(digits.labels == label).nonzero().flatten()[:count] for label in range(10)]).sort().values
    return Digits(digits.images[kept], digits.labels[kept])


def write_idx(path: Path, tensor: torch.Tensor) -> None:
    header = bytes([0, 0, 8, tensor.dim()]) + struct.pack(f">{tensor.dim()}I", *tensor.shape)
    path.write_bytes(gzip.compress(header + tensor.contiguous().numpy().tobytes(), compresslevel=9, mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="folder with MNIST's idx files (default: download them)")
    parser.add_argument("--out_dir", type=Path, default=Path(__file__).parent / "digits")
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    for (prefix, count), digits in zip(PER_CLASS.items(), load(args.data_dir), strict=True):
        images, labels = first_of_each_class(digits, count)
        write_idx(args.out_dir / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(args.out_dir / f"{prefix}-labels-idx1-ubyte.gz", labels)


if __name__ == "__main__":
    main()
