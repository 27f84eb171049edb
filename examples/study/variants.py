"""Other readings of the method, beside the layer's: parts of a RIM are replaced from outside, the package is as it is."""

from typing import Any

import torch
from torch import Tensor, nn

from rim_rnn import RIM, RIMCell
from rim_rnn.dynamics import State, keep_losers
from rim_rnn.input_attention import compete
from rim_rnn.recording import Trace
from rim_rnn.step import Projected
from rim_rnn.units import UnitProjection


class ShowsUpdates(RIMCell[Any]):
    """Silent units show the update that they would have made, then discard it: so do both public implementations.

    In the paper's text, and in the layer, they show the state that they keep. Only the order of the last two stages differs.
    """

    def step(self, projected: Projected, state: State) -> tuple[State, Trace]:
        x, key, gates, keep_input, keep_comm, comm_weight = projected
        input_attention, dynamics, communication = self.stages()
        score, a_input, a_kept, value = input_attention(state[0], x, key, keep_input)
        active = compete(score, self.k)
        h, *c = dynamics(a_kept, value, gates, state)
        h, attention = communication(h, active, comm_weight, keep_comm)
        return keep_losers(active, (h, *c), state), Trace(active, a_input, attention)


class GatedOutput(nn.Module):
    """``sigmoid(gate) * tanh(message)`` for what a unit hears: so does the authors' released code."""

    def __init__(self, output: UnitProjection) -> None:
        super().__init__()
        self.message, self.gate = output, UnitProjection(*output.weight.shape, bias=True)

    def forward(self, context: Tensor) -> Tensor:
        return torch.sigmoid(self.gate(context)) * torch.tanh(self.message(context))


def shows_updates(input_size: int, hidden_size: int, **given: Any) -> RIM[Any]:
    rnn = RIM(input_size, hidden_size, batch_first=True, **given)
    rnn.cells[0] = ShowsUpdates(input_size, hidden_size, **given)
    return rnn


def gated(input_size: int, hidden_size: int, **given: Any) -> RIM[Any]:
    rnn = RIM(input_size, hidden_size, batch_first=True, **given | {"comm_bounded": False})
    for cell in rnn.cells:
        cell.communication.output = GatedOutput(cell.communication.output)
    return rnn


VARIANTS = {"shows-updates": shows_updates, "gated": gated}
