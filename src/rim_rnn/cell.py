"""RIMCell: a step with the interface of torch.nn.LSTMCell, run over time by whatever path takes it."""

from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, Literal, cast, overload

import torch
from torch import Tensor, nn
from typing_extensions import TypedDict, TypeVar, Unpack, override

from rim_rnn import cuda, native, readable
from rim_rnn.arguments import (
    check_bool,
    check_int,
    check_num_units,
    check_probability,
    check_query_size,
    check_sizes,
    choose_k,
    choose_num_units,
    choose_sizes,
    describe,
    plain_int,
)
from rim_rnn.dynamics import State
from rim_rnn.intact import does_more, is_any_hooked, oddity
from rim_rnn.recording import Trace
from rim_rnn.step import Step, over_time
from rim_rnn.surroundings import autocast_result_dtype, check_alike, leaf, refuse_to_script, without_mixed_autocast
from rim_rnn.units import divide, reset, unite

PATHS = (cuda.scan, native.scan, readable.scan, readable.loop, readable.unrolled)
"""Other ways to run :meth:`Step.scan`. Each returns ``None`` for a call that it does not take; the first that does has it."""

StateT = TypeVar("StateT", default=tuple[Tensor, Tensor])
"""What a user passes and gets as state: ``(h, c)`` for LSTM, ``h`` for GRU."""


class UnitOptions(TypedDict, total=False):
    """The keywords that :class:`RIM` and :class:`RIMCell` share."""

    num_units: int | None
    k: int | None
    key_size_input: int | None
    value_size_input: int | None
    query_size_input: int | None
    num_input_heads: int
    input_dropout: float
    key_size_comm: int | None
    value_size_comm: int | None
    query_size_comm: int | None
    num_comm_heads: int
    comm_dropout: float
    comm_bounded: bool


class RIMCell(Step, Generic[StateT]):
    r"""One step of a Recurrent Independent Mechanisms layer, with the interface of :class:`torch.nn.LSTMCell`.

    The state is split into ``num_units`` equal, contiguous blocks. At every step each unit bids for the input, the ``k``
    highest bids win, winners update themselves and read from every unit, losers keep their state bit for bit:

    .. math::
        \begin{array}{ll}
            s_j = (h_j W^q_j + b^q_j) \cdot (x W^e + b^e) / \sqrt{d} & \text{bid} \\
            a_j = \mathrm{softmax}([0, s_j])_2 = \sigma(s_j) & \text{input attention, eq. 2} \\
            \tilde h_j, c'_j = \mathrm{LSTM}_j(a_j (x W^v + b^v), h_j, c_j) & \text{winners, eq. 4} \\
            \tilde h_j, c'_j = h_j, c_j & \text{losers} \\
            h'_j = \tilde h_j + \tanh(\mathrm{attention}_j(\tilde h_1, \dots, \tilde h_n) W^o_j) & \text{winners, eqs. 5 and 6}
        \end{array}

    :math:`W^e` and :math:`W^v` are shared by the units, every weight with an index is a unit's own, and :math:`d` is
    ``key_size_input``. :math:`\mathrm{attention}_j` is a softmax over the keys of all units, its scores divided by the root of
    ``key_size_comm``. With several input heads a bid is the mean of their scores.

    The :math:`\tanh` is not in the printed equation 6, which has no bound. With it ``|h'|`` is at most ``max(2, |h_0|)``,
    whatever the input, the length and the weights (without projections); GRU units, which add
    :math:`\max(0, 1 - |\tilde h_j|)` times it, stay within ``max(1, |h_0|)``. ``comm_bounded=False`` adds what is printed.

    Args:
        input_size: The number of features of the input ``x``.
        hidden_size: The number of features of the whole state, all units together.
        bias: ``False`` drops every bias. Default: ``True``
        device: Of the parameters. Default: torch's default device
        dtype: Of the parameters. Default: torch's default dtype
        proj_size: If positive, ``h`` has this many features in all and ``c`` has ``hidden_size``; LSTM only. Default: 0
        num_units: The number of units; divides ``hidden_size`` (and ``proj_size``). Default: the divisor that is at most 8
            and closest to 6, a tie going to the smaller one
        k: The number of units that are active at a step. Default: two thirds of ``num_units``, rounded up
        rnn_cell: ``"LSTM"`` or ``"GRU"``. Default: ``"LSTM"``
        key_size_input: Size of a key of the input attention, per head. Default: ``8 * e``, where units have a state of size
            ``u``, which is ``e = min(max(round(8 * u / 100), 1), 8)`` eighths of the paper's: 64 from ``u = 94`` on
        value_size_input: Size of a value of the input attention, per head. Default: ``4 * u``
        query_size_input: ``None`` or ``key_size_input``. Default: ``None``
        num_input_heads: Heads of the input attention. Default: 1
        input_dropout: Dropout on the input attention's probabilities. Default: 0 (the paper: 0.1)
        key_size_comm: Size of a key of the communication, per head. Default: ``4 * e``: 32 from ``u = 94`` on
        value_size_comm: Size of a value of the communication, per head. Default: ``4 * e``
        query_size_comm: ``None`` or ``key_size_comm``. Default: ``None``
        num_comm_heads: Heads of the communication; 0 switches it off. Default: 4
        comm_dropout: Dropout on the communication's probabilities. Default: 0 (the paper: 0.1)
        comm_bounded: ``False`` adds the message itself, as equation 6 is printed; no parameter depends on it. Default: ``True``

    Inputs: input, (h_0, c_0)
        - **input**: ``(N, input_size)`` or ``(input_size)``.
        - **h_0**: ``(N, hidden_size)`` or ``(hidden_size)``; ``proj_size`` features with projections.
        - **c_0**: ``(N, hidden_size)`` or ``(hidden_size)``.

        Both states are zero if not given. With ``rnn_cell="GRU"`` the state is the tensor ``h_0`` alone.

    Outputs: (h_1, c_1)
        The next states, in the shapes of the ones before; with ``rnn_cell="GRU"`` the tensor ``h_1`` alone.

    Raises:
        TypeError: An argument, the input or a state is of the wrong type.
        ValueError: A size, ``k``, a number of heads or a dropout is out of range, or ``num_units`` does not divide; an input
            or state has the wrong number of dimensions.
        RuntimeError: A size, batch, dtype or device does not match.

    Attributes:
        input_attention: ``query.weight`` ``(n, p, H*key_size_input)``, ``query.bias``; ``key.weight`` ``(H*key_size_input,
            input_size)``, ``key.bias``; ``value.weight`` ``(H*value_size_input, input_size)``, ``value.bias``, for ``n`` units,
            ``H`` input heads and units of output size ``p``. A bias has its weight's shape without the dimension before the
            last (``query``) or the last one. Drawn from :math:`\mathcal{U}(\pm 1/\sqrt{\mathrm{fan\_in}})`, ``value.weight``
            from twice that range: a unit begins by taking half of a value, so that what it reads is then as large as what an
            ``nn.Linear`` gives.
        dynamics: ``weight_ih`` ``(n, H*value_size_input, G*u)``, ``weight_hh`` ``(n, p, G*u)``, ``bias_ih`` and ``bias_hh``
            ``(n, G*u)``, ``weight_hr`` ``(n, u, p)`` with projections; ``G`` is 4 for LSTM and 3 for GRU, ``u`` is
            ``hidden_size // n``. Drawn from :math:`\mathcal{U}(\pm 1/\sqrt{u})`.
        communication: ``query.weight``, ``key.weight``, ``value.weight`` ``(n, p, heads*size)`` and ``output.weight``
            ``(n, heads*size, p)``, ``size`` being ``key_size_comm`` or ``value_size_comm``. Drawn from
            :math:`\mathcal{U}(\pm 1/\sqrt{\mathrm{fan\_in}})`.

    Examples:
        >>> import torch
        >>> from rim_rnn import RIMCell
        >>> cell = RIMCell(10, 24, num_units=4, k=2)
        >>> h, c = torch.zeros(3, 24), torch.zeros(3, 24)
        >>> for x in torch.randn(6, 3, 10):
        ...     h, c = cell(x, (h, c))
        >>> h.shape
        torch.Size([3, 24])

    Source: Goyal et al., 2021, *Recurrent Independent Mechanisms*, section 2.
    """

    _traces: list[Trace] | None = None
    """What its steps did, while a layer calls it that is recorded."""

    key_size_input: int = property(attrgetter("input_attention.key_size"))  # type: ignore[assignment]
    value_size_input: int = property(attrgetter("input_attention.value_size"))  # type: ignore[assignment]
    query_size_input: int = property(attrgetter("input_attention.key_size"))  # type: ignore[assignment]
    num_input_heads: int = property(attrgetter("input_attention.num_heads"))  # type: ignore[assignment]
    input_dropout: float = property(attrgetter("input_attention.dropout_probability"))  # type: ignore[assignment]
    key_size_comm: int = property(attrgetter("communication.key_size"))  # type: ignore[assignment]
    value_size_comm: int = property(attrgetter("communication.value_size"))  # type: ignore[assignment]
    query_size_comm: int = property(attrgetter("communication.key_size"))  # type: ignore[assignment]
    num_comm_heads: int = property(attrgetter("communication.num_heads"))  # type: ignore[assignment]
    comm_dropout: float = property(attrgetter("communication.dropout_probability"))  # type: ignore[assignment]
    comm_bounded: bool = property(attrgetter("communication.bounded"))  # type: ignore[assignment]

    @overload
    def __init__(
        self: "RIMCell[tuple[Tensor, Tensor]]",
        input_size: int,
        hidden_size: int,
        bias: bool = ...,
        device: Any = ...,
        dtype: torch.dtype | None = ...,
        *,
        proj_size: int = ...,
        rnn_cell: Literal["LSTM"] = ...,
        **options: Unpack[UnitOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: "RIMCell[Tensor]",
        input_size: int,
        hidden_size: int,
        bias: bool = ...,
        device: Any = ...,
        dtype: torch.dtype | None = ...,
        *,
        proj_size: int = ...,
        rnn_cell: Literal["GRU"],
        **options: Unpack[UnitOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: "RIMCell[Any]",
        input_size: int,
        hidden_size: int,
        bias: bool = ...,
        device: Any = ...,
        dtype: torch.dtype | None = ...,
        *,
        proj_size: int = ...,
        rnn_cell: str,
        **options: Unpack[UnitOptions],
    ) -> None: ...
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        proj_size: int = 0,
        num_units: int | None = None,
        k: int | None = None,
        rnn_cell: str = "LSTM",
        key_size_input: int | None = None,
        value_size_input: int | None = None,
        query_size_input: int | None = None,
        num_input_heads: int = 1,
        input_dropout: float = 0.0,
        key_size_comm: int | None = None,
        value_size_comm: int | None = None,
        query_size_comm: int | None = None,
        num_comm_heads: int = 4,
        comm_dropout: float = 0.0,
        comm_bounded: bool = True,
    ) -> None:
        input_size, hidden_size, proj_size = plain_int(input_size), plain_int(hidden_size), plain_int(proj_size)
        check_sizes(rnn_cell, input_size, hidden_size, bias, proj_size)
        if num_units is None:
            num_units = choose_num_units(hidden_size, proj_size)
        check_num_units(num_units, hidden_size, proj_size)
        k = choose_k(num_units) if k is None else k
        sizes = choose_sizes(hidden_size // num_units)
        key_size_input = sizes["key_size_input"] if key_size_input is None else key_size_input
        value_size_input = sizes["value_size_input"] if value_size_input is None else value_size_input
        key_size_comm = sizes["key_size_comm"] if key_size_comm is None else key_size_comm
        value_size_comm = sizes["value_size_comm"] if value_size_comm is None else value_size_comm
        check_int("k", k, 1, num_units)
        check_int("key_size_input", key_size_input, 1)
        check_int("value_size_input", value_size_input, 1)
        check_query_size("input", query_size_input, key_size_input)
        check_int("num_input_heads", num_input_heads, 1)
        check_probability("input_dropout", input_dropout)
        check_int("key_size_comm", key_size_comm, 1)
        check_int("value_size_comm", value_size_comm, 1)
        check_query_size("comm", query_size_comm, key_size_comm)
        check_int("num_comm_heads", num_comm_heads, 0)
        check_probability("comm_dropout", comm_dropout)
        check_bool("comm_bounded", comm_bounded)

        super().__init__(
            input_size,
            hidden_size,
            bias,
            device,
            dtype,
            proj_size=proj_size,
            num_units=num_units,
            k=k,
            rnn_cell=rnn_cell,
            key_size_input=key_size_input,
            value_size_input=value_size_input,
            num_input_heads=num_input_heads,
            input_dropout=input_dropout,
            key_size_comm=key_size_comm,
            value_size_comm=value_size_comm,
            num_comm_heads=num_comm_heads,
            comm_dropout=comm_dropout,
            comm_bounded=comm_bounded,
        )
        self.input_size, self.hidden_size, self.bias, self.proj_size = input_size, hidden_size, bias, proj_size
        self.rnn_cell = rnn_cell

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        reset(*self.stages())

    def run(
        self,
        input: Tensor,
        state: State,
        batch_sizes: list[int] | None = None,
        reverse: bool = False,
        record: bool = False,
    ) -> tuple[Tensor, State, list[Trace]]:
        """:meth:`scan`, by the first of :data:`PATHS` that takes it."""
        for path in PATHS:
            done = path(self, input, state, batch_sizes, reverse, record)
            if done is not None:
                return done
        return self.scan(input, state, batch_sizes, reverse, record)

    def is_called(self) -> bool:
        """Whether a layer calls the cell at each step, for that does more than :meth:`run`: a hook, a forward of its own."""
        kind = type(self)
        if kind.forward is not RIMCell.forward or kind.__call__ is not nn.Module.__call__:
            return True
        return does_more(self) or is_any_hooked()

    def call_over_time(
        self, module: nn.Module, input: Tensor, state: State, batch_sizes: list[int] | None, reverse: bool, record: bool
    ) -> tuple[Tensor, State, list[Trace]]:
        """:meth:`scan` by calls of the cell itself, or of the ``module`` that it is wrapped in."""
        sizes = [input.size(1)] * input.size(0) if batch_sizes is None else batch_sizes
        rows = torch.split(input.reshape(-1, input.size(-1)), sizes)

        def advance(t: int, now: State) -> State:
            state: Any = tuple(unite(s) for s in now)
            state = module(rows[t], state if self.rnn_cell == "LSTM" else state[0])
            return tuple(divide(s, self.num_units) for s in (state if self.rnn_cell == "LSTM" else (state,)))

        if record:
            self._traces = []
        try:
            output, last = over_time(advance, state, self.num_units, sizes, reverse, packed=batch_sizes is not None)
        finally:
            traces = self.__dict__.pop("_traces", [])
        if record and len(traces) != len(sizes):
            raise RuntimeError("record() does not see into a cell whose own forward does not go through that of RIMCell")
        return output, last, traces[::-1] if reverse else traces

    __prepare_scriptable__ = refuse_to_script

    def state_sizes(self) -> dict[str, int]:
        """The features of each state by its name."""
        sizes = {"h": self.proj_size or self.hidden_size, "c": self.hidden_size}
        return sizes if self.rnn_cell == "LSTM" else {"h": self.hidden_size}

    def like(self, input: Tensor) -> Tensor:
        """A tensor of the parameters' dtype and device."""
        dynamics = self.stages()[1]
        weight: Any = next(iter(dynamics._parameters.values()), None)
        if weight is None:  # all are computed from others, or were put elsewhere
            weight = getattr(dynamics, "weight_hh", None)
            weight = next(self.parameters()) if weight is None else weight
        if (
            weight.is_meta and not input.is_meta and oddity(self) is not None
        ):  # loaded for each call of its module, to the input
            weight = input.new_empty(0, dtype=weight.dtype)
        return cast("Tensor", weight)

    def zero_state(self, x: Tensor, *batch: int) -> State:
        """The states of a beginning, ``(*batch, features)``, which nobody writes to: the same tensor where sizes agree."""
        h = x.new_zeros(*batch, self.proj_size or self.hidden_size)
        if self.rnn_cell == "GRU":
            return (h,)
        return (h, x.new_zeros(*batch, self.hidden_size) if self.proj_size else h)

    def check_state(self, hx: object, too_few: type[Exception] = RuntimeError) -> State:
        """``hx`` as a tuple of tensors, or the ``TypeError`` of a wrong structure, the ``RuntimeError`` of a wrong number."""
        if self.rnn_cell == "GRU":
            if not isinstance(hx, Tensor):
                raise TypeError(f'with rnn_cell="GRU" hx should be the tensor h_0, got: {type(hx).__name__}')
            return (hx,)
        if not isinstance(hx, tuple | list) or not all(isinstance(s, Tensor) for s in hx):
            got = type(hx).__name__
            if isinstance(hx, tuple | list):
                got += f" of ({', '.join(type(s).__name__ for s in hx)})"
            raise TypeError(f'with rnn_cell="LSTM" hx should be a tuple of two tensors (h_0, c_0), got: {got}')
        if len(hx) != 2:
            error = too_few if len(hx) < 2 else RuntimeError
            raise error(f'with rnn_cell="LSTM" hx should hold two states (h_0, c_0), got {len(hx)}')
        return tuple(hx)

    def forward(self, input: Tensor, hx: StateT | list[Tensor] | None = None) -> StateT:
        """One step from the input and state described above."""
        if (call := leaf(self, input, hx)) is not None:
            return cast("StateT", call)
        if not isinstance(input, Tensor):
            raise TypeError(f"RIMCell: Expected input to be a Tensor, got: {type(input).__name__}")
        if input.dim() not in (1, 2):
            raise ValueError(f"RIMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        if input.size(-1) != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {input.size(-1)}, expected {self.input_size}")
        given, weight = input.dtype, self.like(input)
        input = check_alike("input", input, weight)
        batched = input.dim() == 2
        x = input if batched else input.unsqueeze(0)
        if hx is None:
            state = self.zero_state(x, x.size(0))
        else:
            state = self.check_state(hx)
            given = state[0].dtype
            for s, (name, size) in zip(state, self.state_sizes().items(), strict=True):
                if s.dim() not in (1, 2):
                    raise ValueError(f"RIMCell: Expected {name}_0 to be 1D or 2D, got {s.dim()}D instead")
                if s.shape != (*input.shape[:-1], size):
                    raise RuntimeError(f"Expected {name}_0 size {(*input.shape[:-1], size)}, got {tuple(s.shape)}")
            state = tuple(check_alike(f"{name}_0", s, weight) for s, name in zip(state, "hc", strict=False))
            state = state if batched else tuple(s.unsqueeze(0) for s in state)
        with without_mixed_autocast(x):
            _, state, traces = self.run(x.unsqueeze(0), state, record=self._traces is not None)
        if self._traces is not None:
            self._traces += traces
        dtype = autocast_result_dtype(given, x.device)
        state = tuple(s.to(dtype) for s in state)
        state = state if batched else tuple(s.squeeze(0) for s in state)
        return cast("StateT", state if self.rnn_cell == "LSTM" else state[0])

    if TYPE_CHECKING:

        @override
        def __call__(self, input: Tensor, hx: StateT | list[Tensor] | None = None) -> StateT: ...

    @override
    def extra_repr(self) -> str:
        return describe(
            self,
            bias=True,
            proj_size=0,
            num_units=None,
            k=None,
            rnn_cell="LSTM",
            num_input_heads=1,
            input_dropout=0.0,
            **choose_sizes(self.hidden_size // self.num_units),
            num_comm_heads=4,
            comm_dropout=0.0,
            comm_bounded=True,
        )
