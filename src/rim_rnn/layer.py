"""The RIM layer: cells over time, layers and directions, with the interface of torch.nn.LSTM."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, cast, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import Unpack, override

from rim_rnn import cuda, native
from rim_rnn.arguments import (
    check_bool,
    check_int,
    check_probability,
    check_sizes,
    choose_num_units,
    describe,
    plain_int,
)
from rim_rnn.cell import RIMCell, StateT, UnitOptions
from rim_rnn.dynamics import State
from rim_rnn.layout import Layout
from rim_rnn.recording import Record, assemble
from rim_rnn.surroundings import autocast_dtype, leaf, refuse_to_script, without_mixed_autocast


def cell_in(module: nn.Module) -> RIMCell[Any]:
    """The cell itself, where it may be wrapped in another module."""
    if isinstance(module, RIMCell):
        return module
    cell = next((inner for inner in module.modules() if isinstance(inner, RIMCell)), None)
    if cell is None:
        raise TypeError(f"each of a RIM's cells should be a RIMCell, or hold one, got: {type(module).__name__}")
    return cell


def of_cells(name: str) -> Any:
    """A property that is the cells' own, all of which are alike."""
    return property(lambda self: getattr(self._cells()[0], name))


class RIM(nn.Module, Generic[StateT]):
    r"""Recurrent Independent Mechanisms, to be written where :class:`torch.nn.LSTM` stood.

    The state of a layer is split into ``num_units`` equal, contiguous blocks. At every step each unit bids for the input,
    the ``k`` highest bids win (equal bids go to the lowest unit), winners update themselves with an LSTM or GRU of their own
    and read from every unit, and losers keep their state bit for bit:

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

    The positional arguments are those of :class:`torch.nn.LSTM`, in its order and with its defaults, and so are inputs and
    outputs. Defaults draw no random numbers in the forward pass.

    Args:
        input_size: The number of features of the input ``x``.
        hidden_size: The number of features of the whole state ``h``, all units together.
        num_layers: Number of layers, each but the first taking the outputs of the one below. Default: 1
        bias: ``False`` drops every bias. Default: ``True``
        batch_first: ``True``: input and output are ``(batch, seq, feature)`` instead of ``(seq, batch, feature)``; states
            are not concerned. Default: ``False``
        dropout: Dropout on the outputs of each layer but the last. Default: 0
        bidirectional: ``True`` adds a second direction, from the last step to the first. Default: ``False``
        proj_size: If positive, ``h`` has this many features in all and ``c`` has ``hidden_size``; LSTM only. Default: 0
        device: Of the parameters. Default: torch's default device
        dtype: Of the parameters. Default: torch's default dtype
        num_units: The number of units; divides ``hidden_size`` (and ``proj_size``). Default: the divisor that is at most 8
            and closest to 6, a tie going to the smaller one (600 gives 6, 128 gives 4), with a warning if that is 1
        k: The number of units that are active at a step. Default: two thirds of ``num_units``, rounded up (6 gives 4)
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
        - **input**: ``(L, H_in)``, ``(L, N, H_in)``, with ``batch_first=True`` ``(N, L, H_in)``, or a
          :class:`torch.nn.utils.rnn.PackedSequence`.
        - **h_0**: ``(D * num_layers, H_out)`` or ``(D * num_layers, N, H_out)``.
        - **c_0**: ``(D * num_layers, H_cell)`` or ``(D * num_layers, N, H_cell)``.

        Both states are zero if not given. With ``rnn_cell="GRU"`` the state is the tensor ``h_0`` alone.

    Outputs: output, (h_n, c_n)
        - **output**: ``(L, D * H_out)``, ``(L, N, D * H_out)``, ``(N, L, D * H_out)``, or packed as the input was.
        - **h_n**, **c_n**: The last states, in the shapes of the first ones; with ``rnn_cell="GRU"`` ``h_n`` alone.

    where:

    .. math::
        \begin{aligned}
            N ={} & \text{batch size} \\
            L ={} & \text{sequence length} \\
            D ={} & 2 \text{ if bidirectional=True otherwise } 1 \\
            H_{in} ={} & \mathrm{input\_size} \\
            H_{cell} ={} & \mathrm{hidden\_size} \\
            H_{out} ={} & \mathrm{proj\_size} \text{ if } \mathrm{proj\_size}>0 \text{ otherwise } \mathrm{hidden\_size}
        \end{aligned}

    Raises:
        TypeError: An argument, the input or a state is of the wrong type, or a lone tensor stands where ``(h_0, c_0)`` belongs.
        ValueError: A size, ``k``, a number of heads or a dropout is out of range; ``num_units`` does not divide; the input has
            the wrong number of dimensions or, if it is not packed or the units are GRUs, the wrong dtype.
        RuntimeError: A size, batch, device or a state's dtype or number of dimensions does not match; the sequence is empty.

    Attributes:
        cells: :class:`torch.nn.ModuleList` of :class:`RIMCell`, indexed ``layer * D + direction``; see there for the
            parameters, their shapes and their initialisation. What the constructor was given can be read under the same
            names, and that of the units (``num_units``, ``k`` and so on) is fixed from then on.

    .. warning::
        The parameters of one kind carry the unit as their first dimension. Initialisation by name works as it is; a slice
        such as ``bias[n // 4 : n // 2]`` or a fan-based initialiser means something else here.

    Examples:
        >>> import torch
        >>> from rim_rnn import RIM
        >>> rnn = RIM(10, 20, 2)
        >>> input = torch.randn(5, 3, 10)
        >>> h_0, c_0 = torch.randn(2, 3, 20), torch.randn(2, 3, 20)
        >>> output, (h_n, c_n) = rnn(input, (h_0, c_0))
        >>> output.shape, h_n.shape, c_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]), torch.Size([2, 3, 20]))

    Source: Goyal et al., 2021, *Recurrent Independent Mechanisms*, section 2.
    """

    _recorders: Sequence[list[Record]] = ()

    num_units: int = of_cells("num_units")
    k: int = of_cells("k")
    rnn_cell: str = of_cells("rnn_cell")
    key_size_input: int = of_cells("key_size_input")
    value_size_input: int = of_cells("value_size_input")
    query_size_input: int = of_cells("query_size_input")
    num_input_heads: int = of_cells("num_input_heads")
    input_dropout: float = of_cells("input_dropout")
    key_size_comm: int = of_cells("key_size_comm")
    value_size_comm: int = of_cells("value_size_comm")
    query_size_comm: int = of_cells("query_size_comm")
    num_comm_heads: int = of_cells("num_comm_heads")
    comm_dropout: float = of_cells("comm_dropout")
    comm_bounded: bool = of_cells("comm_bounded")

    @overload
    def __init__(
        self: "RIM[tuple[Tensor, Tensor]]",
        input_size: int,
        hidden_size: int,
        num_layers: int = ...,
        bias: bool = ...,
        batch_first: bool = ...,
        dropout: float = ...,
        bidirectional: bool = ...,
        proj_size: int = ...,
        device: Any = ...,
        dtype: torch.dtype | None = ...,
        *,
        rnn_cell: Literal["LSTM"] = ...,
        **options: Unpack[UnitOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: "RIM[Tensor]",
        input_size: int,
        hidden_size: int,
        num_layers: int = ...,
        bias: bool = ...,
        batch_first: bool = ...,
        dropout: float = ...,
        bidirectional: bool = ...,
        proj_size: int = ...,
        device: Any = ...,
        dtype: torch.dtype | None = ...,
        *,
        rnn_cell: Literal["GRU"],
        **options: Unpack[UnitOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: "RIM[Any]",
        input_size: int,
        hidden_size: int,
        num_layers: int = ...,
        bias: bool = ...,
        batch_first: bool = ...,
        dropout: float = ...,
        bidirectional: bool = ...,
        proj_size: int = ...,
        device: Any = ...,
        dtype: torch.dtype | None = ...,
        *,
        rnn_cell: str,
        **options: Unpack[UnitOptions],
    ) -> None: ...
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
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
        super().__init__()
        num_layers, proj_size = plain_int(num_layers), plain_int(proj_size)
        check_probability("dropout", dropout)
        check_int("num_layers", num_layers, 1)
        check_bool("batch_first", batch_first)
        check_bool("bidirectional", bidirectional)
        check_sizes(rnn_cell, input_size, hidden_size, bias, proj_size)
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                "dropout option adds dropout after all but last recurrent layer, so non-zero dropout expects num_layers "
                f"greater than 1, but got dropout={dropout} and num_layers={num_layers}",
                stacklevel=2,
            )
        self.mode = rnn_cell
        self.input_size, self.hidden_size, self.num_layers, self.bias = input_size, hidden_size, num_layers, bias
        self.batch_first, self.dropout, self.bidirectional = batch_first, float(dropout), bidirectional
        self.proj_size = proj_size
        self.num_directions = 2 if bidirectional else 1
        if num_units is None:
            num_units = choose_num_units(hidden_size, proj_size)
        self.cells = nn.ModuleList(
            RIMCell(
                input_size if layer == 0 else (proj_size or hidden_size) * self.num_directions,
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
                query_size_input=query_size_input,
                num_input_heads=num_input_heads,
                input_dropout=input_dropout,
                key_size_comm=key_size_comm,
                value_size_comm=value_size_comm,
                query_size_comm=query_size_comm,
                num_comm_heads=num_comm_heads,
                comm_dropout=comm_dropout,
                comm_bounded=comm_bounded,
            )
            for layer in range(num_layers)
            for _ in range(self.num_directions)
        )

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for cell in self._cells():
            cell.reset_parameters()

    def flatten_parameters(self) -> None:
        """Do nothing, as on :class:`torch.nn.LSTM` without cuDNN: there is no flat copy of the weights to bring up to date."""

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """The parameters, one list per cell."""
        return [list(cell.parameters()) for cell in self._cells()]

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle made inside :func:`record` is not recorded."""
        return {name: value for name, value in super().__getstate__().items() if name != "_recorders"}  # type: ignore[no-untyped-call]

    def path(self, input: Tensor | PackedSequence) -> str:
        """Which path a forward with this input takes, and why.

        Args:
            input: As the forward takes it.

        Returns:
            ``"native"`` on a CPU, ``"cuda"`` on a GPU, or ``"readable: "`` and the first reason why not. All give the same
            results up to rounding; the readable one is slower. ``"cuda"`` has been checked on a CPU only, so that it is off
            unless ``RIM_RNN_CUDA=1``.

        Example:
            >>> import torch
            >>> from rim_rnn import RIM
            >>> RIM(10, 20, device="meta").path(torch.zeros(5, 3, 10, device="meta"))  # doctest: +ELLIPSIS
            'readable: ...'
        """
        cells = self._cells()
        x = input.data if isinstance(input, PackedSequence) else input
        if not isinstance(x, Tensor):
            raise TypeError(f"RIM: Expected input to be a Tensor or a PackedSequence, got: {type(x).__name__}")
        if autocast_dtype(x.device):
            x = x.to(cells[0].like(x).dtype)
        fast = cuda.OPERATOR if cuda.OPERATOR.serves(x.device) else native.OPERATOR
        for index, (cell, module) in enumerate(zip(cells, self.cells, strict=True)):
            if module is not cell:
                reason: str | None = f"cells.{index} is a {type(module).__name__}"
            elif cell.is_called():
                reason = f"cells.{index} has a hook or a forward of its own"
            else:
                reason = fast.supports(cell, x, ())
            if reason is not None:
                return f"readable: {reason}"
        return fast.name

    __prepare_scriptable__ = refuse_to_script

    def _cells(self) -> list[RIMCell[Any]]:
        modules: Any = self._modules["cells"]  # without a search, as RIMCell.stages
        return [cell_in(module) for module in modules]  # list(...) would let Python collect garbage more often

    def _check_input(self, input: object, cell: RIMCell[Any]) -> Tensor:
        """What :class:`torch.nn.LSTM` demands of its input, in its words. A tensor of the parameters' dtype and device."""
        packed = isinstance(input, PackedSequence)
        x = input.data if isinstance(input, PackedSequence) else input
        if not isinstance(x, Tensor):
            raise TypeError(f"RIM: Expected input to be a Tensor or a PackedSequence, got: {type(x).__name__}")
        weight = cell.like(x)
        if x.dim() not in ((2,) if packed else (2, 3)):
            if packed:
                raise RuntimeError(f"RIM: Expected packed data to be 2D, got {x.dim()}D instead")
            raise ValueError(f"RIM: Expected input to be 2D or 3D, got {x.dim()}D instead")
        if x.dtype != weight.dtype and not autocast_dtype(x.device):
            error = RuntimeError if packed and self.mode == "LSTM" else ValueError
            raise error(
                f"RIM input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({x.dtype})"
            )
        if x.size(-1) != self.input_size:
            raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.size(-1)}")
        if not packed and x.size(1 if self.batch_first and x.dim() == 3 else 0) == 0:
            raise RuntimeError(f"Expected sequence length to be larger than 0 in RIM, got input of size {tuple(x.shape)}")
        return weight

    def _first_states(self, cells: list[RIMCell[Any]], layout: Layout, x: Tensor, weight: Tensor, hx: object) -> list[State]:
        """Each cell's, of a zero for every feature or of what was given; or the error that says what of it does not fit."""
        alone = len(cells) == 1
        if hx is None:
            return [cells[0].zero_state(x, 1, layout.batch)] if alone else [cells[0].zero_state(x, layout.batch)] * len(cells)
        # Where a packed batch lies in its order, nn.LSTM leaves the states to its operator, which raises another error.
        in_order = layout.packed and layout.sorted_indices is None
        state: State = cells[0].check_state(hx, too_few=RuntimeError if in_order else TypeError)
        dim = 3 if layout.batched else 2
        if any(s.dim() != dim for s in state):
            kind = "packed" if layout.packed else "batched 3-D" if layout.batched else "unbatched 2-D"
            got = ", ".join(f"{s.dim()}-D" for s in state)
            error = TypeError if layout.packed and self.mode == "LSTM" and any(s.dim() < 3 for s in state) else RuntimeError
            raise error(f"For {kind} input, hx should be {dim}-D but got ({got}) tensors")
        for s, (name, size) in zip(state, cells[0].state_sizes().items(), strict=True):
            expected = (len(cells), layout.batch, size) if layout.batched else (len(cells), size)
            if s.shape != expected:
                raise RuntimeError(f"Expected {name}_0 size {expected}, got {tuple(s.shape)}")
        state = layout.unpack_state(state, weight)
        return [state] if alone else list(zip(*(s.unbind(0) for s in state), strict=True))

    @overload
    def forward(self, input: Tensor, hx: StateT | list[Tensor] | None = None) -> tuple[Tensor, StateT]: ...
    @overload
    def forward(self, input: PackedSequence, hx: StateT | list[Tensor] | None = None) -> tuple[PackedSequence, StateT]: ...
    def forward(
        self, input: Tensor | PackedSequence, hx: StateT | list[Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, StateT]:
        """All steps of all layers and directions, on the inputs described above."""
        if (call := leaf(self, input, hx)) is not None:
            return cast("tuple[Tensor, StateT]", call)
        cells = self._cells()
        weight = self._check_input(input, cells[0])
        layout = Layout(input, self.batch_first)
        x = layout.unpack(input, weight)
        first = self._first_states(cells, layout, x, weight, hx)
        modules: Any = self._modules["cells"]
        modules = [*modules]
        last: list[State] = []
        traces = []
        with without_mixed_autocast(x):
            for layer in range(self.num_layers):
                outputs = []
                for direction in range(self.num_directions):
                    index = layer * self.num_directions + direction
                    cell, module = cells[index], modules[index]
                    arguments = x, first[index], layout.sizes, direction == 1, bool(self._recorders)
                    called = module is not cell or cell.is_called()
                    output, final, trace = cell.call_over_time(module, *arguments) if called else cell.run(*arguments)
                    outputs.append(output)
                    last.append(final)
                    traces.append(trace)
                x = torch.cat(outputs, dim=-1) if self.bidirectional else outputs[0]
                if self.dropout and layer < self.num_layers - 1:
                    x = F.dropout(x, self.dropout, self.training)
            state = last[0] if len(cells) == 1 else tuple([torch.stack(s) for s in zip(*last, strict=True)])
        for records in self._recorders:
            records.append(assemble(traces, layout.unsorted_indices, layout.batched))
        sequence, state = layout.pack(x, state, self.mode == "LSTM", self.proj_size > 0, self.bidirectional)
        return sequence, cast("StateT", state if self.mode == "LSTM" else state[0])

    if TYPE_CHECKING:

        @overload
        def __call__(self, input: Tensor, hx: StateT | list[Tensor] | None = None) -> tuple[Tensor, StateT]: ...
        @overload
        def __call__(self, input: PackedSequence, hx: StateT | list[Tensor] | None = None) -> tuple[PackedSequence, StateT]: ...
        def __call__(self, input: Any, hx: Any = None) -> Any: ...

    @override
    def extra_repr(self) -> str:
        return describe(
            self,
            proj_size=0,
            num_layers=1,
            bias=True,
            batch_first=False,
            dropout=0.0,
            bidirectional=False,
            num_units=None,
            k=None,
            rnn_cell="LSTM",
        )
