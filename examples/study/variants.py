"""Other readings of the method, beside the layer's: parts of a RIM are replaced from outside, the package is as it is."""

from functools import partial
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
        h, attention = communication(self.shown(h, active), active, comm_weight, keep_comm)
        return keep_losers(active, (h, *c), state), Trace(active, a_input, attention)

    def shown(self, h: Tensor, active: Tensor) -> Tensor:
        return h


class ShowsUpdatesBlocked(ShowsUpdates):
    """A silent unit learns nothing from what others make of the update that it shows: so, too, do both implementations."""

    def shown(self, h: Tensor, active: Tensor) -> Tensor:
        return torch.where(active.unsqueeze(-1), h, h.detach())


class GatedOutput(nn.Module):
    """``sigmoid(gate) * tanh(message)`` for what a unit hears."""

    def __init__(self, message: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.message, self.gate = message, gate

    def forward(self, context: Tensor) -> Tensor:
        return torch.sigmoid(self.gate(context)) * torch.tanh(self.message(context))


def with_cell(cell: type[RIMCell[Any]], input_size: int, hidden_size: int, **given: Any) -> RIM[Any]:
    rnn = RIM(input_size, hidden_size, batch_first=True, **given)
    rnn.cells[0] = cell(input_size, hidden_size, **given)
    return rnn


def gated(input_size: int, hidden_size: int, **given: Any) -> RIM[Any]:
    """With a gate of each unit's own."""
    rnn = RIM(input_size, hidden_size, batch_first=True, **given | {"comm_bounded": False})
    for cell in rnn.cells:
        output = cell.communication.output
        cell.communication.output = GatedOutput(output, UnitProjection(*output.weight.shape, bias=True))
    return rnn


def share_gate(rnn: RIM[Any]) -> RIM[Any]:
    """One message and one gate for all units, with biases: so does the authors' released code."""
    for cell in rnn.cells:
        _, heard, size = cell.communication.output.weight.shape
        cell.communication.output = GatedOutput(nn.Linear(heard, size), nn.Linear(heard, size))
    return rnn


def shared_gate(input_size: int, hidden_size: int, **given: Any) -> RIM[Any]:
    return share_gate(RIM(input_size, hidden_size, batch_first=True, **given | {"comm_bounded": False}))


def as_released(input_size: int, hidden_size: int, **given: Any) -> RIM[Any]:
    """Updates that are shown, their gradients blocked, and the shared gate, all three as in the authors' released code."""
    return share_gate(with_cell(ShowsUpdatesBlocked, input_size, hidden_size, **given | {"comm_bounded": False}))


VARIANTS = {
    "shows-updates": partial(with_cell, ShowsUpdates),
    "shows-updates-blocked": partial(with_cell, ShowsUpdatesBlocked),
    "gated": gated,
    "shared-gate": shared_gate,
    "as-released": as_released,
}
