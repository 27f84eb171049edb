"""The arguments of `train.py`, and where those that are not given come from."""

import argparse
from pathlib import Path
from typing import Any

import checkpoint
import torch
from model import RIM_ARGUMENTS


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return int(text)


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = argparse.BooleanOptionalAction
    add = parser.add_argument_group("the run").add_argument
    add("--train", action=flag, default=True, help="train; --no-train evaluates what log_dir holds")
    add("--loadsaved", action="store_true", help="go on with the run in log_dir, with its arguments; begin if there is none")
    add("--log_dir", default="runs/sequential_mnist", help="for log, checkpoint and pictures (default: %(default)s)")
    add("--checkpoint_minutes", type=float, default=10, help="saved so often, and after each epoch (default: %(default)s)")
    add("--cuda", action=flag, default=torch.cuda.is_available(), help="compute on a GPU (default: if there is one)")
    add("--seed", type=int, default=0, help="for parameters, order of digits and dropout (default: %(default)s)")
    add = parser.add_argument_group("the digits").add_argument
    add("--data_dir", help="folder with the four idx files of MNIST, plain or gzip (default: download them once)")
    add("--size", type=positive, default=14, help="trained on digits of size x size pixels (default: %(default)s)")
    add("--eval_sizes", type=positive, nargs="+", default=[14, 16, 19, 24], help="tested on these (default: 14 16 19 24)")
    add("--input_size", type=positive, default=1, help="pixels per step; zeros fill up the last one (default: %(default)s)")
    add = parser.add_argument_group("the training").add_argument
    add("--epochs", type=positive, default=100, help="(default: %(default)s)")
    add("--batch_size", type=positive, default=64, help="over all processes together (default: %(default)s)")
    add("--lr", type=float, default=1e-4, help="of Adam (default: %(default)s)")
    add("--lr_schedule", choices=["constant", "cosine"], default="constant", help="cosine ends at 0 (default: %(default)s)")
    add = parser.add_argument_group("the model").add_argument
    add("--model", choices=["RIM", "LSTM"], default="RIM", help="(default: %(default)s)")
    add("--hidden_size", type=positive, default=600, help="of the state, all units together (default: %(default)s)")
    add = parser.add_argument_group("the RIM (default where none is given: that of rim_rnn.RIM)").add_argument
    add("--num_units", type=int, help="number of units; 6 for a hidden_size of 600")
    add("--k", type=int, help="active units per step; 4 of 6 units")
    add("--rnn_cell", choices=["LSTM", "GRU"], help="what each unit is")
    add("--key_size_input", type=int, help="input attention: size of a key")
    add("--value_size_input", type=int, help="input attention: size of a value")
    add("--query_size_input", type=int, help="input attention: size of a query, equal to that of a key")
    add("--num_input_heads", type=int, help="input attention: heads")
    add("--input_dropout", type=float, default=0.1, help="input attention: dropout (default: %(default)s, the paper's)")
    add("--key_size_comm", type=int, help="communication: size of a key")
    add("--value_size_comm", type=int, help="communication: size of a value")
    add("--query_size_comm", type=int, help="communication: size of a query, equal to that of a key")
    add("--num_comm_heads", type=int, help="communication: heads; 0 for none at all")
    add("--comm_dropout", type=float, default=0.1, help="communication: dropout (default: %(default)s, the paper's)")
    return parser


def parse(description: str | None, argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """The arguments, and the checkpoint of the run in `log_dir` where they go on with it or evaluate it.

    What is not given is then as it was in that run.
    """
    parser = build_parser(description)
    args = parser.parse_args(argv)
    saved = None
    if not args.train or (args.loadsaved and Path(args.log_dir, checkpoint.CHECKPOINT).exists()):
        saved = checkpoint.load(Path(args.log_dir))
        parser.set_defaults(**saved["header"]["arguments"])
        args = parser.parse_args(argv)
    plain = build_parser()
    without_meaning = [name for name in RIM_ARGUMENTS if getattr(args, name) != plain.get_default(name)]
    if args.model == "LSTM" and without_meaning:
        parser.error(f"--{without_meaning[0]} belongs to a RIM, and the model is an LSTM")
    if args.cuda and not torch.cuda.is_available():
        parser.error("--cuda: torch finds no GPU here; --no-cuda computes on the CPU")
    if args.lr <= 0 or args.checkpoint_minutes < 0:
        parser.error("--lr has to be positive, --checkpoint_minutes not negative")
    return args, saved
