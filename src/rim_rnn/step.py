"""The definition: a step reads like section 2 of the paper, a scan is the step over time.

Weights apply per unit, states are unit-major ``(n, N, ...)``: see units.py. Everything else in the package is either one of the
four stages that meet here, or a faster or more convenient way to run what stands here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rim_rnn.communication import Communication
from rim_rnn.dynamics import Dynamics, GatedRecurrentDynamics, LongShortTermDynamics, State, keep_losers
from rim_rnn.input_attention import InputAttention, compete
from rim_rnn.intact import asks_stages
from rim_rnn.recording import Trace
from rim_rnn.units import divide, unite

Keep = tuple[Tensor | None, Tensor | None]
"""What dropout drew for the input attention, ``(M, n, H)``, and for the communication, ``(M, heads, n, n)``."""


class Projected(NamedTuple):
    """Everything a step needs beside the state: the input, what of it was computed for all steps at once, what dropout drew."""

    x: Tensor  # (M, input_size)
    key: Tensor | None  # (M, H*key_size): x W^e + b^e
    gates: Tensor | None  # (H, M, n, G*u): (x W^v + b^v) W_ih
    keep_input: Tensor | None  # (M, n, H)
    keep_comm: Tensor | None  # (M, heads, n, n)
    comm_weight: Tensor | None  # of all steps: Communication.stacked_weights

    def split(self, sizes: list[int]) -> list["Projected"]:
        """The rows of each step, of which there are ``sizes``."""
        *of_rows, comm_weight = self
        rows_at = (0, 0, 1, 0, 0)
        parts: Any = (
            [None] * len(sizes) if p is None else torch.split(p, sizes, d) for p, d in zip(of_rows, rows_at, strict=True)
        )
        return [Projected(*step, comm_weight) for step in zip(*parts, strict=True)]  # type: ignore[call-arg]


class Step(nn.Module):
    """The four stages of section 2 and their order; what :class:`RIMCell` is, without its interface.

    Args:
        input_size, hidden_size, bias, device, dtype: As in :class:`RIMCell`, and all that follows as well, nothing left open.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        proj_size: int,
        num_units: int,
        k: int,
        rnn_cell: str,
        key_size_input: int,
        value_size_input: int,
        num_input_heads: int,
        input_dropout: float,
        key_size_comm: int,
        value_size_comm: int,
        num_comm_heads: int,
        comm_dropout: float,
        comm_bounded: bool,
    ) -> None:
        super().__init__()
        self.num_units, self.k = num_units, k
        u, p = hidden_size // num_units, (proj_size or hidden_size) // num_units
        self.input_attention = InputAttention(
            input_size, num_units, p, num_input_heads, key_size_input, value_size_input, input_dropout, bias, device, dtype
        )
        self.dynamics = (LongShortTermDynamics if rnn_cell == "LSTM" else GatedRecurrentDynamics)(
            num_units, u, num_input_heads, value_size_input, proj_size // num_units, bias, device, dtype
        )
        self.communication = Communication(
            num_units, p, num_comm_heads, key_size_comm, value_size_comm, comm_dropout, comm_bounded, rnn_cell, device, dtype
        )

    def stages(self) -> tuple[InputAttention, Dynamics, Communication]:
        """The modules of section 2 in its order, without the search of ``nn.Module.__getattr__`` for each of them."""
        stages: Any = self._modules
        return stages["input_attention"], stages["dynamics"], stages["communication"]

    def draw(self, x: Tensor) -> Keep:
        """Dropout's draws, for one step or for all at once: ``x`` is ``(..., input_size)``, ``M`` rows in all."""
        if not self.training:
            return None, None
        input_attention, _, communication = self.stages()
        return _draw(input_attention, x), _draw(communication, x)

    def project(self, x: Tensor, keep: Keep) -> Projected:
        """What does not depend on the state, for one step or for all at once: ``x`` is ``(M, input_size)``.

        Only of stages whose calls do no more than what our classes say: of others a step asks everything by calling them.
        """
        if asks_stages(self):
            return Projected(x, None, None, *keep, None)
        input_attention, dynamics, communication = self.stages()
        gates = dynamics.project(x, input_attention.value)
        return Projected(x, input_attention.project(x), gates, *keep, communication.stacked_weights())

    def step(self, projected: Projected, state: State) -> tuple[State, Trace]:
        """One step of section 2, on unit-major states ``(n, N, ...)``."""
        input_attention, dynamics, communication = self.stages()
        x, key, gates, keep_input, keep_comm, comm_weight = projected
        # Input attention, equation 2: every unit bids for the input, and weighs it.
        score, a_input, a_kept, value = input_attention(state[0], x, key, keep_input)
        # Competition: the k highest bids win.
        active = compete(score, self.k)
        # Independent dynamics, equation 4: winners only.
        new = dynamics(a_kept, value, gates, state)
        h, *c = keep_losers(active, new, state)
        # Communication, equations 5 and 6: winners read every unit.
        h, attention = communication(h, active, comm_weight, keep_comm)
        return (h, *c), Trace(active, a_input, attention)

    def scan(
        self,
        input: Tensor,
        state: State,
        batch_sizes: list[int] | None = None,
        reverse: bool = False,
        record: bool = False,
        keep: Keep | None = None,
    ) -> tuple[Tensor, State, list[Trace]]:
        """The step over time.

        Args:
            input: ``(T, N, input_size)``, or packed ``(sum(batch_sizes), input_size)``.
            state: ``(h_0, c_0)`` or ``(h_0,)``, each ``(N, features)`` or ``(1, N, features)``.
            batch_sizes: Rows present at each step, never growing; ``None`` where the input is not packed.
            reverse: Go from the last step to the first; results stay in the input's order of time.
            record: Also return what each step did.
            keep: What :meth:`draw` returned for the input's rows in packed order; drawn here if not given.

        Returns:
            The outputs in the layout of ``input``, the last states in that of ``state``, and one trace per step if ``record``.
        """
        sizes = [input.size(1)] * input.size(0) if batch_sizes is None else batch_sizes
        x = input.reshape(-1, input.size(-1))
        steps = self.project(x, self.draw(x) if keep is None else keep).split(sizes)
        traces: list[Trace] = []

        def advance(t: int, now: State) -> State:
            now, trace = self.step(steps[t], now)
            if record:
                traces.append(Trace(*(part.detach() for part in trace)))
            return now

        output, last = over_time(advance, state, self.num_units, sizes, reverse, packed=batch_sizes is not None)
        return output, last, traces[::-1] if reverse else traces


def _draw(stage: nn.Module, x: Tensor) -> Tensor | None:
    """What dropout draws for a stage, which may be wrapped in another module."""
    draw: Any = getattr(stage, "draw", None)
    if draw is None:
        draw = next((inner.draw for inner in stage.modules() if hasattr(inner, "draw")), lambda x: None)
    drawn: Tensor | None = draw(x)
    return drawn


def over_time(
    advance: Callable[[int, State], State], state: State, num_units: int, sizes: list[int], reverse: bool, packed: bool
) -> tuple[Tensor, State]:
    """``advance(t, now)`` at each step, on the unit-major states of the ``sizes[t]`` rows that are present then.

    Args:
        advance: Returns the states after step ``t``.
        state: The first states, ``(N, features)`` or ``(1, N, features)``.
        num_units: By how many to :func:`divide` them.
        sizes: Rows present at each step, never growing.
        reverse: Go from the last step to the first.
        packed: Return the outputs as ``(sum(sizes), features)``, not as ``(T, N, features)``.

    Returns:
        The outputs in order of time, and each row's last states in the layout of ``state``.
    """
    first = tuple(divide(s, num_units) for s in state)
    times = range(len(sizes) - 1, -1, -1) if reverse else range(len(sizes))
    present = sizes[times[0]]
    now, ended = tuple(s[:, :present] for s in first), []
    outputs: list[Tensor] = [state[0]] * len(sizes)
    for t in times:
        if sizes[t] < present:  # rows whose sequence has ended
            ended.append(tuple(s[:, sizes[t] :] for s in now))
            now = tuple(s[:, : sizes[t]] for s in now)
        elif sizes[t] > present:  # rows whose sequence begins, seen from its end
            now = tuple(torch.cat([s, s_0[:, present : sizes[t]]], dim=1) for s, s_0 in zip(now, first, strict=True))
        present = sizes[t]
        now = advance(t, now)
        outputs[t] = now[0]
    output = unite(torch.cat(outputs, dim=1) if packed else torch.stack(outputs, dim=1))
    last = [torch.cat(rows, dim=1) for rows in zip(now, *reversed(ended), strict=True)]
    # Of one tensor, so that a gradient of c alone is one of h as well, of zeros: no parameter goes without one.
    parts = torch.split(torch.cat(last, dim=-1), [s.size(-1) for s in last], dim=-1)
    return output, tuple(unite(s.unsqueeze(1) if state[0].dim() == 3 else s) for s in parts)
