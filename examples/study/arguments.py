"""The arguments of `train.py`, and where those that are not given come from."""

import argparse
import math
from pathlib import Path
from typing import Any

import checkpoint
import torch
from model import RIM_ARGUMENTS
from tasks import TASKS
from tasks.task import positive
from variants import VARIANTS

SCHEDULES = ("constant", "cosine", "one-cycle")


def build_parser(task: str, description: str | None = None) -> argparse.ArgumentParser:
    """The parser for a task: some arguments belong to it alone, and sizes have its defaults."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    flag = argparse.BooleanOptionalAction
    add = parser.add_argument_group("the run").add_argument
    add("--train", action=flag, default=True, help="train; --no-train evaluates what log_dir holds")
    add("--loadsaved", action="store_true", help="go on with the run in log_dir, with its arguments; begin if there is none")
    add("--log_dir", default=f"runs/{task}", help="for log, checkpoint and pictures (default: %(default)s)")
    add("--checkpoint_minutes", type=float, default=10, help="saved so often, and after each epoch (default: %(default)s)")
    add("--cuda", action=flag, default=torch.cuda.is_available(), help="compute on a GPU (default: if there is one)")
    add("--seed", type=int, default=0, help="for parameters, order of examples and dropout (default: %(default)s)")
    kind = TASKS[task]
    add = parser.add_argument_group(f"the task (the rest of this help is for {task})").add_argument
    add("--task", choices=list(TASKS), default=task, help="(default: %(default)s)")
    add("--size", type=positive, default=kind.size, help=f"trained at this size, in {kind.size_title} (default: %(default)s)")
    sizes = " ".join(map(str, kind.eval_sizes))
    add("--eval_sizes", type=positive, nargs="*", default=kind.eval_sizes, help=f"tested at these (default: {sizes})")
    add(
        "--test_every",
        type=positive,
        default=1,
        help="epochs from test to test; the last one and the chosen one always (default: 1)",
    )
    kind.add_arguments(add)
    add = parser.add_argument_group("the training").add_argument
    add("--epochs", type=positive, default=100, help="(default: %(default)s)")
    add("--valid", type=int, default=0, help="examples held out of training, to choose an epoch; 0: the last (default: 0)")
    add(
        "--valid_sizes",
        type=positive,
        nargs="*",
        default=[],
        help="held-out examples at these sizes, too: for each size the weights are kept that were best at it (default: none)",
    )
    add("--valid_every", type=int, default=0, help="and so many batches apart within an epoch; 0: at its end (default: 0)")
    add("--batch_size", type=positive, default=64, help="over all processes together (default: %(default)s)")
    add("--lr", type=float, default=1e-4, help="of Adam (default: %(default)s)")
    add("--lr_schedule", choices=SCHEDULES, default="constant", help="the others end at 0 (default: %(default)s)")
    add("--warmup_steps", type=int, default=0, help="so many batches lead up to lr (default: %(default)s)")
    add("--clip_grad", type=float, default=0.0, help="the largest norm of all gradients; 0: any (default: 0)")
    add("--ema", type=float, default=0.0, help="decay of averaged weights, which are then evaluated; 0: none (default: 0)")
    add = parser.add_argument_group("the model").add_argument
    add("--model", choices=["RIM", "LSTM"], default="RIM", help="(default: %(default)s)")
    add("--hidden_size", type=positive, default=600, help="of the state, all units together (default: %(default)s)")
    add("--embed", type=int, default=0, help="size of a linear embedding of each input; 0: none (default: 0)")
    add("--embed_dropout", type=float, default=0.0, help="of the embedding, per step and feature (default: 0)")
    add("--output_dropout", type=float, default=0.0, help="of the state that is read out, per feature (default: 0)")
    add(
        "--initial_state_std",
        type=float,
        default=0.0,
        help="in training a sequence begins with a state drawn with this standard deviation; 0: with zeros (default: 0)",
    )
    add("--forget_bias", type=float, default=0.0, help="added to the forget gates' bias at the start; GRU: update (default: 0)")
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
    add("--comm_bounded", action=flag, help="communication: what a unit hears passes a tanh")
    add("--variant", choices=list(VARIANTS), help="another reading of the method, for comparison; on the readable path")
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with a message where arguments do not make sense, or not together."""
    plain = build_parser(args.task)
    without_meaning = [name for name in (*RIM_ARGUMENTS, "variant") if getattr(args, name) != plain.get_default(name)]
    if args.model == "LSTM" and without_meaning:
        parser.error(f"--{without_meaning[0]} belongs to a RIM, and the model is an LSTM")
    if args.cuda and not torch.cuda.is_available():
        parser.error("--cuda: torch finds no GPU here; --no-cuda computes on the CPU")
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            parser.error(f"--{name} has to be a finite number, got {value}")
    if args.lr <= 0:
        parser.error("--lr has to be positive")
    for name in ("checkpoint_minutes", "valid", "valid_every", "warmup_steps", "clip_grad", "embed", "initial_state_std"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} must not be negative")
    for name in ("ema", "embed_dropout", "output_dropout"):
        if not 0 <= getattr(args, name) < 1:
            parser.error(f"--{name} has to be at least 0 and less than 1")
    for name, needed in (("embed_dropout", "embed"), ("valid_sizes", "valid"), ("valid_every", "valid_sizes")):
        if getattr(args, name) and not getattr(args, needed):
            parser.error(f"--{name} needs --{needed}")


def parse(description: str | None, argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """The arguments, and the checkpoint of the run in `log_dir` where they go on with it or evaluate it.

    What is not given is then as it was in that run.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task", choices=list(TASKS))
    task = first.parse_known_args(argv)[0].task
    parser = build_parser(task or "sequential_mnist", description)
    args, _ = parser.parse_known_args(argv)
    saved = None
    if not args.train or (args.loadsaved and Path(args.log_dir, checkpoint.CHECKPOINT).exists()):
        whole = args.train or Path(args.log_dir, checkpoint.CHECKPOINT).exists()
        saved = checkpoint.load(Path(args.log_dir), checkpoint.CHECKPOINT if whole else checkpoint.WEIGHTS)
        there = saved["header"]["task"]
        if there not in TASKS or task not in (None, there):
            raise checkpoint.CheckpointError(f"{args.log_dir} holds a run of another task: {there}")
        parser = build_parser(there, description)
        given = saved["header"]["arguments"]
        # an evaluation computes on what is here, wherever the model was trained
        parser.set_defaults(**{name: value for name, value in given.items() if args.train or name != "cuda"})
    args = parser.parse_args(argv)
    check(parser, args)
    return args, saved
