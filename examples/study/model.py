"""A recurrent layer between an embedding, where one is asked for, and a linear read-out of its last outputs."""

from argparse import Namespace
from functools import partial

import torch
from tasks import Task
from torch import Tensor, nn
from variants import VARIANTS

from rim_rnn import RIM

RIM_ARGUMENTS = (
    "num_units",
    "k",
    "rnn_cell",
    "key_size_input",
    "value_size_input",
    "query_size_input",
    "num_input_heads",
    "input_dropout",
    "key_size_comm",
    "value_size_comm",
    "query_size_comm",
    "num_comm_heads",
    "comm_dropout",
    "comm_bounded",
)
MODEL_ARGUMENTS = ("model", "input_size", "embed", "hidden_size", *RIM_ARGUMENTS, "variant")


class Model(nn.Module):
    """Sequences `(N, steps, input_size)` in, what is read out `(N, read_steps, outputs)` out."""

    def __init__(self, args: Namespace, task: Task) -> None:
        super().__init__()
        self.read_steps = task.read_steps
        self.embed = nn.Linear(task.input_size, args.embed) if args.embed else nn.Identity()
        input_size = args.embed or task.input_size
        if args.model == "RIM":
            given = {name: getattr(args, name) for name in RIM_ARGUMENTS if getattr(args, name) is not None}
            make = VARIANTS[args.variant] if args.variant else partial(RIM, batch_first=True)
            self.rnn = make(input_size, args.hidden_size, **given)
        else:
            self.rnn = nn.LSTM(input_size, args.hidden_size, batch_first=True)
        self.readout = nn.Linear(args.hidden_size, task.outputs)
        self.embed_dropout, self.output_dropout = nn.Dropout(args.embed_dropout), nn.Dropout(args.output_dropout)
        self.initial_state_std = args.initial_state_std
        if args.forget_bias:
            remember(self.rnn, args.forget_bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed_dropout(self.embed(x))
        output, _ = self.rnn(x, self.initial_state(x))
        return self.readout(self.output_dropout(output[:, -self.read_steps :]))

    def initial_state(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor] | None:
        """None, which is zeros; in training, where it has a standard deviation, drawn from a normal distribution."""
        if not self.training or not self.initial_state_std:
            return None
        h, c = self.initial_state_std * torch.randn(2, 1, len(x), self.rnn.hidden_size, device=x.device)
        return h if self.rnn.mode == "GRU" else (h, c)


@torch.no_grad()
def remember(rnn: nn.Module, bias: float) -> None:
    """Adds `bias` to the gate that keeps the old state, in an LSTM and in a GRU the second one."""
    gates = 3 if rnn.mode == "GRU" else 4
    for name, parameter in rnn.named_parameters():
        if "bias_hh" in name:
            parameter.chunk(gates, -1)[1].add_(bias)
