"""A recurrent layer and a linear read-out of its last output."""

from argparse import Namespace

from torch import Tensor, nn

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
)
MODEL_ARGUMENTS = ("model", "input_size", "hidden_size", *RIM_ARGUMENTS)


class Classifier(nn.Module):
    """Sequences `(N, steps, input_size)` in, scores of the ten digits `(N, 10)` out."""

    def __init__(self, args: Namespace) -> None:
        super().__init__()
        if args.model == "RIM":
            given = {name: getattr(args, name) for name in RIM_ARGUMENTS if getattr(args, name) is not None}
            self.rnn = RIM(args.input_size, args.hidden_size, batch_first=True, **given)
        else:
            self.rnn = nn.LSTM(args.input_size, args.hidden_size, batch_first=True)
        self.readout = nn.Linear(args.hidden_size, 10)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.rnn(x)
        return self.readout(output[:, -1])
