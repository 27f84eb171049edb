"""What existing code does with ``nn.LSTM``, ``nn.GRU`` and their cells, done to RIM as well.

Every row of the tables below is a few lines of user code. It runs on torch's module and on ours, which is made by the same
call; both have to give the same structure, shapes, dtypes and ``requires_grad``, or raise the same type of exception.
"""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from drawn import NOT_ON_THIS_PROCESSOR
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence, pad_sequence
from torch.testing import assert_close

from rim_rnn import RIM, RIMCell

T, N, F, H = 5, 3, 4, 12
"""Steps, rows, features in and out; 12 has divisors, so that RIM(4, 12) is six units, four of them active."""


class Rnn(NamedTuple):
    """How a row makes its module: ``rnn(4, 12)`` is ``nn.LSTM(4, 12)``, ``RIM(4, 12)``, ``RIM(4, 12, rnn_cell="GRU")``..."""

    cls: type[nn.Module]
    kind: str
    extra: dict[str, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.cls(*args, **kwargs, **self.extra)

    def state(self, *shape: int, **options: Any) -> Any:
        """Random states of one shape: ``(h_0, c_0)`` or ``h_0``."""
        return self.states(lambda: torch.randn(shape, **options))

    def states(self, make: Callable[[], Any]) -> Any:
        return (make(), make()) if self.kind == "LSTM" else make()


LAYERS = {
    "LSTM": (Rnn(nn.LSTM, "LSTM", {}), Rnn(RIM, "LSTM", {})),
    "GRU": (Rnn(nn.GRU, "GRU", {}), Rnn(RIM, "GRU", {"rnn_cell": "GRU"})),
}
CELLS = {
    "LSTM": (Rnn(nn.LSTMCell, "LSTM", {}), Rnn(RIMCell, "LSTM", {})),
    "GRU": (Rnn(nn.GRUCell, "GRU", {}), Rnn(RIMCell, "GRU", {"rnn_cell": "GRU"})),
}

Row = Callable[[Rnn], Any]
LAYER_ROWS: dict[str, Row] = {}
LAYER_MISTAKES: dict[str, Row] = {}
CELL_ROWS: dict[str, Row] = {}
CELL_MISTAKES: dict[str, Row] = {}


def row_of(table: dict[str, Row]) -> Callable[[Row], Row]:
    """Enter a function into a table under its own name."""

    def enter(function: Row) -> Row:
        table[function.__name__] = function
        return function

    return enter


layer_row, layer_mistake, cell_row = row_of(LAYER_ROWS), row_of(LAYER_MISTAKES), row_of(CELL_ROWS)


ACCIDENTS = (IndexError, AttributeError, KeyError)
"""What torch raises when it stumbles instead of checking; ours is a TypeError."""


def look(value: Any) -> Any:
    """What user code sees of a result, values aside."""
    if isinstance(value, PackedSequence):
        return "PackedSequence", look(value.data), *(v if v is None else v.tolist() for v in value[1:])
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device.type, value.requires_grad, value.is_inference()
    if isinstance(value, tuple | list):
        return type(value).__name__, [look(v) for v in value]
    if isinstance(value, nn.Module):
        return "module", value.training
    return value


def contiguous(value: Any) -> list[bool]:
    if isinstance(value, Tensor):
        return [value.is_contiguous()]
    return [c for v in value for c in contiguous(v)] if isinstance(value, tuple | list) else []


class Outcome(NamedTuple):
    raised: type[Exception] | None
    message: str
    warned: list[type[Warning]]
    value: Any


def run(row: Row, rnn: Rnn) -> Outcome:
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")  # torch says it once
        try:
            value, error = row(rnn), None
        except AssertionError:
            raise
        except Exception as e:
            value, error = None, e
    warned = [w.category for w in caught]
    return Outcome(error and type(error), str(error), warned, value)


def compare(row: Row, torchs: Rnn, ours: Rnn) -> Outcome:
    theirs, mine = run(row, torchs), run(row, ours)
    if NOT_ON_THIS_PROCESSOR in theirs.message:
        assert mine.raised is None, mine.message
        pytest.skip(theirs.message)
    expected = TypeError if theirs.raised in ACCIDENTS else theirs.raised
    assert mine.raised is expected, f"torch: {theirs.message} | ours: {mine.message}"
    assert mine.warned == theirs.warned
    assert look(mine.value) == look(theirs.value)
    for i, (we, they) in enumerate(zip(contiguous(mine.value), contiguous(theirs.value), strict=True)):
        assert we or not they, f"tensor {i} is contiguous in torch, not here"
    return theirs


# ---------------------------------------------------------------- constructing

ATTRIBUTES = ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size", "mode"]


def attributes(rnn: Any) -> list[Any]:
    return [getattr(rnn, name) for name in ATTRIBUTES]


@layer_row
def construct_defaults(rnn: Rnn) -> Any:
    return attributes(rnn(F, H))


@layer_row
def construct_positionally(rnn: Rnn) -> Any:
    module = rnn(F, H, 2, False, True, 0.5, True, *([6, "cpu", torch.float64] if rnn.kind == "LSTM" else []))
    return attributes(module), next(module.parameters()).dtype


@layer_row
def construct_by_keyword(rnn: Rnn) -> Any:
    module = rnn(input_size=F, hidden_size=H, num_layers=3, bias=False, batch_first=True, dropout=0.25, bidirectional=True)
    return attributes(module)


@layer_row
def construct_with_dropout_for_one_layer(rnn: Rnn) -> Any:
    return attributes(rnn(F, H, dropout=0.5))  # warns


@layer_row
def construct_with_integer_dropout(rnn: Rnn) -> Any:
    return attributes(rnn(F, H, 2, dropout=0)), attributes(rnn(F, H, 2, dropout=1))


@layer_mistake
def construct_with_truthy_bidirectional(rnn: Rnn) -> Any:
    return rnn(F, H, bidirectional=1)(torch.randn(T, N, F)), rnn(F, H, bidirectional=None)(torch.randn(T, N, F))


@layer_row
def construct_with_numpy_integers(rnn: Rnn) -> Any:
    numpy = pytest.importorskip("numpy")
    return rnn(F, H, num_layers=numpy.int64(2))(torch.randn(T, N, F))


@layer_row
def construct_with_numpy_proj_size(rnn: Rnn) -> Any:
    numpy = pytest.importorskip("numpy")
    return rnn(F, H, proj_size=numpy.int64(6))(torch.randn(T, N, F))  # GRU: ValueError


BAD_ARGUMENTS: dict[str, list[Any]] = {
    "input_size": [0, -1, "3", 3.0, None, [3], torch.tensor(3)],
    "hidden_size": [0, -1, "12", 12.0, None, [12], torch.tensor(12)],
    "num_layers": [0, -1, "2", 1.5, 2.0, None],
    "bias": [1, None, "True"],
    "batch_first": [1, None, "True"],
    "dropout": [-0.1, 1.5, True, "0.5", "much", None, [], 1j, float("nan")],
    "proj_size": [-1, H, H + 1, "3", 2.0],
    "device": ["nowhere", 3.5],
    "dtype": [torch.int64, "float32"],
    "mode": ["LSTM"],
    "nonlinearity": ["relu"],
}
for name, values in BAD_ARGUMENTS.items():
    for bad in values:
        LAYER_MISTAKES[f"construct_with_{name}={bad!r}"] = lambda rnn, name=name, bad=bad: rnn(
            **{"input_size": F, "hidden_size": H, name: bad}
        )
LAYER_MISTAKES |= {
    "construct_with_nothing": lambda rnn: rnn(),
    "construct_with_one_size": lambda rnn: rnn(F),
    "construct_with_too_many": lambda rnn: rnn(F, H, 1, True, False, 0.0, False, 0, None, None, None),
}
LAYER_ROWS |= {
    "construct_with_proj_size": lambda rnn: rnn(F, H, proj_size=6)(torch.randn(T, N, F)),  # GRU: ValueError
    "construct_with_proj_size_stacked": lambda rnn: rnn(F, H, 2, proj_size=6, bidirectional=True)(torch.randn(T, N, F)),
}

# ---------------------------------------------------------------- inputs and outputs


@layer_row
def plain(rnn: Rnn) -> Any:
    return rnn(F, H)(torch.randn(T, N, F))


@layer_row
def plain_needs_gradient(rnn: Rnn) -> Any:
    return rnn(F, H).requires_grad_(False)(torch.randn(T, N, F, requires_grad=True))


@layer_row
def frozen(rnn: Rnn) -> Any:
    return rnn(F, H).requires_grad_(False)(torch.randn(T, N, F))


@layer_row
def with_states(rnn: Rnn) -> Any:
    return rnn(F, H)(torch.randn(T, N, F), rnn.state(1, N, H))


@layer_row
def with_states_by_keyword(rnn: Rnn) -> Any:
    return rnn(F, H)(input=torch.randn(T, N, F), hx=rnn.state(1, N, H))


@layer_row
def with_none_as_states(rnn: Rnn) -> Any:
    return rnn(F, H)(torch.randn(T, N, F), None)


@layer_row
def with_a_list_of_states(rnn: Rnn) -> Any:
    return rnn(F, H)(torch.randn(T, N, F), list(rnn.state(1, N, H)))  # GRU: an accident


@layer_row
def with_strided_input_and_states(rnn: Rnn) -> Any:
    x, hx = torch.randn(F, N, 2 * T)[..., ::2].permute(2, 1, 0), rnn.states(lambda: torch.randn(H, N, 2).permute(2, 1, 0))
    return rnn(F, H, 2)(x, hx)


@layer_row
def with_expanded_states(rnn: Rnn) -> Any:
    return rnn(F, H)(torch.randn(T, N, F), rnn.states(lambda: torch.randn(H).expand(1, N, H)))


@layer_row
def with_states_made_from_a_parameter(rnn: Rnn) -> Any:
    module = rnn(F, H, 2)
    weight = next(module.parameters())
    return module(torch.randn(T, N, F), rnn.states(lambda: weight.new_zeros(2, N, H)))


@layer_row
def with_learnt_states(rnn: Rnn) -> Any:
    hx = rnn.states(lambda: nn.Parameter(torch.zeros(1, 1, H)))
    wide = tuple(h.repeat(1, N, 1) for h in hx) if rnn.kind == "LSTM" else hx.repeat(1, N, 1)
    result = rnn(F, H)(torch.randn(T, N, F), wide)
    result[0].sum().backward()
    return result, [h.grad for h in (hx if rnn.kind == "LSTM" else (hx,))]


@layer_row
def batch_first(rnn: Rnn) -> Any:
    return rnn(F, H, batch_first=True)(torch.randn(N, T, F), rnn.state(1, N, H))


@layer_row
def batch_first_stacked_both_ways(rnn: Rnn) -> Any:
    return rnn(F, H, 2, batch_first=True, bidirectional=True)(torch.randn(N, T, F), rnn.state(4, N, H))


@layer_row
def bidirectional(rnn: Rnn) -> Any:
    return rnn(F, H, bidirectional=True)(torch.randn(T, N, F))


@layer_row
def bidirectional_output_viewed_by_direction(rnn: Rnn) -> Any:
    output, _ = rnn(F, H, bidirectional=True)(torch.randn(T, N, F))
    return output.view(T, N, 2, H)


@layer_row
def states_viewed_by_layer_and_direction(rnn: Rnn) -> Any:
    _, state = rnn(F, H, 3, bidirectional=True)(torch.randn(T, N, F))
    h_n = state[0] if rnn.kind == "LSTM" else state
    assert_close(h_n.view(3, 2, N, H)[-1], h_n[-2:])
    return h_n.view(3, 2, N, H), torch.cat([h_n[-2], h_n[-1]], dim=1)


@layer_row
def last_output_is_the_last_state(rnn: Rnn) -> Any:
    output, state = rnn(F, H, 2)(torch.randn(T, N, F))
    h_n = state[0] if rnn.kind == "LSTM" else state
    assert_close(output[-1], h_n[-1], rtol=0, atol=0)
    return output[-1]


@layer_row
def reverse_direction_ends_at_the_first_step(rnn: Rnn) -> Any:
    output, state = rnn(F, H, bidirectional=True)(torch.randn(T, N, F))
    h_n = state[0] if rnn.kind == "LSTM" else state
    assert_close(output[0, :, H:], h_n[1], rtol=0, atol=0)
    return output


@layer_row
def output_viewed_flat(rnn: Rnn) -> Any:
    output, _ = rnn(F, H)(torch.randn(T, N, F))
    return output.view(T * N, H), output.view(-1, H)


@layer_row
def batch_first_output_viewed_flat(rnn: Rnn) -> Any:
    output, _ = rnn(F, H, batch_first=True)(torch.randn(N, T, F))
    return output.contiguous().view(N * T, H), output.reshape(-1, H), output[:, -1, :], output.transpose(1, 2)


@layer_row
def unbatched(rnn: Rnn) -> Any:
    return rnn(F, H, 2)(torch.randn(T, F))


@layer_row
def unbatched_with_states(rnn: Rnn) -> Any:
    return rnn(F, H, 2, bidirectional=True)(torch.randn(T, F), rnn.state(4, H))


@layer_row
def unbatched_and_batch_first(rnn: Rnn) -> Any:
    return rnn(F, H, batch_first=True)(torch.randn(T, F), rnn.state(1, H))


@layer_row
def one_step_one_row(rnn: Rnn) -> Any:
    return rnn(F, H)(torch.randn(1, 1, F), rnn.state(1, 1, H))


@layer_row
def one_feature_in(rnn: Rnn) -> Any:
    return rnn(1, H)(torch.randn(T, N, 1))


@layer_row
def without_biases(rnn: Rnn) -> Any:
    module = rnn(F, H, 2, bias=False)
    assert not any("bias" in name for name in module.state_dict())
    return module(torch.randn(T, N, F))


@layer_row
def no_rows(rnn: Rnn) -> Any:
    return rnn(F, H, 2, bidirectional=True)(torch.randn(T, 0, F))


@layer_row
def no_rows_with_states(rnn: Rnn) -> Any:
    return rnn(F, H, batch_first=True)(torch.randn(0, T, F), rnn.state(1, 0, H))


@layer_row
def no_rows_backward(rnn: Rnn) -> Any:
    x = torch.randn(T, 0, F, requires_grad=True)
    rnn(F, H)(x)[0].sum().backward()
    return x.grad


@layer_row
def results_are_not_views_of_each_other(rnn: Rnn) -> Any:
    with torch.no_grad():
        output, state = rnn(F, H)(torch.randn(T, N, F))
        before = output.clone()
        for h in state if rnn.kind == "LSTM" else (state,):
            h.zero_()
    assert_close(output, before, rtol=0, atol=0)
    return state


@layer_row
def inputs_are_left_alone(rnn: Rnn) -> Any:
    x, hx = torch.randn(T, N, F), rnn.state(1, N, H)
    before = x.clone(), copy.deepcopy(hx)
    rnn(F, H)(x, hx)
    assert_close((x, hx), before, rtol=0, atol=0)


@layer_row
def in_place_dropout_on_the_output(rnn: Rnn) -> Any:
    x = torch.randn(T, N, F, requires_grad=True)
    output, _ = rnn(F, H, bidirectional=True)(x)
    nn.Dropout(0.5, inplace=True)(output).sum().backward()
    return x.grad


@layer_row
def in_place_residual(rnn: Rnn) -> Any:
    """The input changed before backward: what was saved of a batch that comes first is a copy."""
    embed, module = nn.Linear(F, H), rnn(H, H, batch_first=True)
    x = embed(torch.randn(N, T, F))
    x += module(x)[0]
    x.sum().backward()
    return x, embed.weight.grad


@layer_row
def in_place_mask_on_the_states(rnn: Rnn) -> Any:
    module, done = rnn(F, H), torch.tensor([1.0, 0.0, 1.0]).view(1, N, 1)
    _, state = module(torch.randn(T, N, F))
    for h in state if rnn.kind == "LSTM" else (state,):
        h *= done
    output, state = module(torch.randn(T, N, F), state)
    output.sum().backward()
    return output, state


# ---------------------------------------------------------------- wrong inputs


LAYER_MISTAKES |= {
    "no_input": lambda rnn: rnn(F, H)(),
    "input_none": lambda rnn: rnn(F, H)(None),
    "input_list": lambda rnn: rnn(F, H)([[[0.0] * F]]),
    "input_numpy": lambda rnn: rnn(F, H)(torch.randn(T, N, F).numpy()),
    "input_and_states_as_one_tuple": lambda rnn: rnn(F, H)((torch.randn(T, N, F), rnn.state(1, N, H))),
    "input_three_arguments": lambda rnn: rnn(F, H)(torch.randn(T, N, F), torch.zeros(1, N, H), torch.zeros(1, N, H)),
    "input_0d": lambda rnn: rnn(F, H)(torch.tensor(1.0)),
    "input_1d": lambda rnn: rnn(F, H)(torch.randn(F)),
    "input_4d": lambda rnn: rnn(F, H)(torch.randn(1, T, N, F)),
    "input_4d_with_states": lambda rnn: rnn(F, H)(torch.randn(1, T, N, F), rnn.state(1, N, H)),
    "input_too_few_features": lambda rnn: rnn(F, H)(torch.randn(T, N, F - 1)),
    "input_too_many_features": lambda rnn: rnn(F, H, 2)(torch.randn(T, N, H)),
    "input_too_few_features_unbatched": lambda rnn: rnn(F, H)(torch.randn(T, F - 1)),
    "input_time_and_features_swapped": lambda rnn: rnn(F, H, batch_first=True)(torch.randn(N, F, T)),
    "input_float64": lambda rnn: rnn(F, H)(torch.randn(T, N, F).double()),
    "input_float64_with_states": lambda rnn: rnn(F, H)(torch.randn(T, N, F).double(), rnn.state(1, N, H)),
    "input_float32_into_float64": lambda rnn: rnn(F, H).double()(torch.randn(T, N, F)),
    "input_float32_into_half": lambda rnn: rnn(F, H).half()(torch.randn(T, N, F)),
    "input_bfloat16": lambda rnn: rnn(F, H)(torch.randn(T, N, F).bfloat16()),
    "input_int64": lambda rnn: rnn(F, H)(torch.ones(T, N, F, dtype=torch.int64)),
    "input_bool": lambda rnn: rnn(F, H)(torch.ones(T, N, F, dtype=torch.bool)),
    "input_complex": lambda rnn: rnn(F, H)(torch.randn(T, N, F, dtype=torch.complex64)),
    "input_wrong_dtype_and_features": lambda rnn: rnn(F, H)(torch.randn(T, N, F + 1).double()),
    "input_on_meta": lambda rnn: rnn(F, H)(torch.randn(T, N, F, device="meta")),
    "module_on_meta": lambda rnn: rnn(F, H, device="meta")(torch.randn(T, N, F)),
    "no_steps": lambda rnn: rnn(F, H)(torch.randn(0, N, F)),
    "no_steps_batch_first": lambda rnn: rnn(F, H, batch_first=True)(torch.randn(N, 0, F)),
    "no_steps_unbatched": lambda rnn: rnn(F, H)(torch.randn(0, F)),
    "no_steps_no_rows": lambda rnn: rnn(F, H)(torch.randn(0, 0, F)),
    "states_2d": lambda rnn: rnn(F, H)(torch.randn(T, N, F), rnn.state(N, H)),
    "states_4d": lambda rnn: rnn(F, H)(torch.randn(T, N, F), rnn.state(1, 1, N, H)),
    "states_3d_unbatched": lambda rnn: rnn(F, H)(torch.randn(T, F), rnn.state(1, 1, H)),
    "states_1d_unbatched": lambda rnn: rnn(F, H)(torch.randn(T, F), rnn.state(H)),
    "states_too_few_layers": lambda rnn: rnn(F, H, 2)(torch.randn(T, N, F), rnn.state(1, N, H)),
    "states_too_many_layers": lambda rnn: rnn(F, H)(torch.randn(T, N, F), rnn.state(2, N, H)),
    "states_of_one_direction": lambda rnn: rnn(F, H, bidirectional=True)(torch.randn(T, N, F), rnn.state(1, N, H)),
    "states_too_few_rows": lambda rnn: rnn(F, H)(torch.randn(T, N, F), rnn.state(1, N - 1, H)),
    "states_one_row_for_all": lambda rnn: rnn(F, H)(torch.randn(T, N, F), rnn.state(1, 1, H)),
    "states_too_many_rows": lambda rnn: rnn(F, H)(torch.randn(T, N, F), rnn.state(1, N + 1, H)),
    "states_too_few_features": lambda rnn: rnn(F, H)(torch.randn(T, N, F), rnn.state(1, N, H - 6)),
    "states_too_many_features": lambda rnn: rnn(F, H)(torch.randn(T, N, F), rnn.state(1, N, 2 * H)),
    "states_batch_first": lambda rnn: rnn(F, H, batch_first=True)(torch.randn(N, T, F), rnn.state(N, 1, H)),
    "states_too_few_features_unbatched": lambda rnn: rnn(F, H)(torch.randn(T, F), rnn.state(1, H - 6)),
    "states_float64": lambda rnn: rnn(F, H)(torch.randn(T, N, F), rnn.state(1, N, H, dtype=torch.float64)),
    "states_int64": lambda rnn: rnn(F, H)(torch.randn(T, N, F), rnn.states(lambda: torch.ones(1, N, H, dtype=torch.int64))),
    "states_on_meta": lambda rnn: rnn(F, H)(torch.randn(T, N, F), rnn.state(1, N, H, device="meta")),
    "states_lone_tensor": lambda rnn: rnn(F, H)(torch.randn(T, N, F), torch.zeros(1, N, H)),  # GRU: fine
    "states_lone_tensor_unbatched": lambda rnn: rnn(F, H)(torch.randn(T, F), torch.zeros(1, H)),  # GRU: fine
    "states_stacked": lambda rnn: rnn(F, H)(torch.randn(T, N, F), torch.zeros(2, 1, N, H)),
    "states_pair": lambda rnn: rnn(F, H)(torch.randn(T, N, F), (torch.zeros(1, N, H),) * 2),  # LSTM: fine
    "states_one_of_two": lambda rnn: rnn(F, H)(torch.randn(T, N, F), (torch.zeros(1, N, H),)),
    "states_three": lambda rnn: rnn(F, H)(torch.randn(T, N, F), (torch.zeros(1, N, H),) * 3),
    "states_list_of_three": lambda rnn: rnn(F, H)(torch.randn(T, N, F), [torch.zeros(1, N, H)] * 3),
    "states_empty_tuple": lambda rnn: rnn(F, H)(torch.randn(T, N, F), ()),
    "states_none_inside": lambda rnn: rnn(F, H)(torch.randn(T, N, F), (torch.zeros(1, N, H), None)),
    "states_none_first": lambda rnn: rnn(F, H)(torch.randn(T, N, F), (None, torch.zeros(1, N, H))),
    "states_two_nones": lambda rnn: rnn(F, H)(torch.randn(T, N, F), (None, None)),
    "states_dict": lambda rnn: rnn(F, H)(torch.randn(T, N, F), {"h": torch.zeros(1, N, H)}),
    "states_number": lambda rnn: rnn(F, H)(torch.randn(T, N, F), 0),
    "states_whole_result": lambda rnn: (m := rnn(F, H))(x := torch.randn(T, N, F), m(x)),
    "states_by_wrong_keyword": lambda rnn: rnn(F, H)(torch.randn(T, N, F), h_0=rnn.state(1, N, H)),
}


@layer_mistake
def only_the_cell_state_is_wrong(rnn: Rnn) -> Any:
    h, wrong = torch.zeros(1, N, H), torch.zeros(1, N, H - 6)
    return rnn(F, H)(torch.randn(T, N, F), (h, wrong) if rnn.kind == "LSTM" else wrong)


@layer_mistake
def cell_state_of_projected_size(rnn: Rnn) -> Any:
    return rnn(F, H, proj_size=6)(torch.randn(T, N, F), (torch.zeros(1, N, 6), torch.zeros(1, N, 6)))


@layer_row
def states_with_projections(rnn: Rnn) -> Any:
    return rnn(F, H, proj_size=6)(torch.randn(T, N, F), (torch.zeros(1, N, 6), torch.zeros(1, N, H)))


# ---------------------------------------------------------------- packed sequences

LENGTHS = [2, 5, 3]


def packed(features: int = F, lengths: list[int] = LENGTHS, **options: Any) -> PackedSequence:
    x = torch.randn(max(lengths), len(lengths), features, **options)
    return pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)


def packed_sorted(**options: Any) -> PackedSequence:
    return pack_padded_sequence(torch.randn(T, N, F, **options), torch.tensor([5, 3, 2]))


LAYER_ROWS |= {
    "packed_sorted": lambda rnn: rnn(F, H)(packed_sorted()),
    "packed_sorted_with_states": lambda rnn: rnn(F, H)(packed_sorted(), rnn.state(1, N, H)),
    "packed_unsorted": lambda rnn: rnn(F, H)(packed()),
    "packed_unsorted_with_states": lambda rnn: rnn(F, H)(packed(), rnn.state(1, N, H)),
    "packed_with_a_list_of_states": lambda rnn: rnn(F, H)(packed(), list(rnn.state(1, N, H))),
    "packed_stacked_both_ways": lambda rnn: rnn(F, H, 2, bidirectional=True)(packed(), rnn.state(4, N, H)),
    "packed_batch_first": lambda rnn: rnn(F, H, batch_first=True)(packed()),
    "packed_projected": lambda rnn: rnn(F, H, proj_size=6)(packed()),
    "packed_equal_lengths": lambda rnn: rnn(F, H)(packed(lengths=[4, 4, 4])),
    "packed_one_row": lambda rnn: rnn(F, H)(packed(lengths=[4])),
    "packed_one_step": lambda rnn: rnn(F, H)(packed(lengths=[1, 1])),
    "packed_by_pack_sequence": lambda rnn: rnn(F, H)(pack_sequence([torch.randn(n, F) for n in (5, 3, 2)])),
    "packed_keeps_gradient": lambda rnn: rnn(F, H).requires_grad_(False)(packed(requires_grad=True)),
    "packed_float64": lambda rnn: rnn(F, H).double()(packed(dtype=torch.float64)),
}
LAYER_MISTAKES |= {
    "packed_too_few_features": lambda rnn: rnn(F + 1, H)(packed()),
    "packed_wrong_dtype": lambda rnn: rnn(F, H)(packed(dtype=torch.float64)),
    "packed_module_on_meta": lambda rnn: rnn(F, H, device="meta")(packed()),
    "packed_data_1d": lambda rnn: rnn(F, H)(PackedSequence(torch.randn(6), torch.tensor([3, 2, 1]))),
    "packed_data_3d": lambda rnn: rnn(F, H)(PackedSequence(torch.randn(6, 2, F), torch.tensor([3, 2, 1]))),
    "packed_states_2d": lambda rnn: rnn(F, H)(packed_sorted(), rnn.state(N, H)),
    "packed_unsorted_states_2d": lambda rnn: rnn(F, H)(packed(), rnn.state(N, H)),
    "packed_unsorted_states_4d": lambda rnn: rnn(F, H)(packed(), rnn.state(1, 1, N, H)),
    "packed_states_too_few_rows": lambda rnn: rnn(F, H)(packed_sorted(), rnn.state(1, N - 1, H)),
    "packed_unsorted_states_too_few_rows": lambda rnn: rnn(F, H)(packed(), rnn.state(1, N - 1, H)),
    "packed_states_too_few_layers": lambda rnn: rnn(F, H, 2)(packed_sorted(), rnn.state(1, N, H)),
    "packed_states_too_few_features": lambda rnn: rnn(F, H)(packed_sorted(), rnn.state(1, N, H - 6)),
    "packed_states_wrong_dtype": lambda rnn: rnn(F, H)(packed_sorted(), rnn.state(1, N, H, dtype=torch.float64)),
    "packed_states_on_meta": lambda rnn: rnn(F, H)(packed_sorted(), rnn.state(1, N, H, device="meta")),
    "packed_states_lone_tensor": lambda rnn: rnn(F, H)(packed_sorted(), torch.zeros(1, N, H)),
    "packed_unsorted_states_lone_tensor": lambda rnn: rnn(F, H)(packed(), torch.zeros(1, N, H)),
    "packed_states_pair": lambda rnn: rnn(F, H)(packed(), (torch.zeros(1, N, H),) * 2),
    "packed_states_three": lambda rnn: rnn(F, H)(packed_sorted(), (torch.zeros(1, N, H),) * 3),
    "packed_states_none_inside": lambda rnn: rnn(F, H)(packed(), (torch.zeros(1, N, H), None)),
}


@layer_row
def packed_then_padded(rnn: Rnn) -> Any:
    output, state = rnn(F, H)(packed())
    padded, lengths = pad_packed_sequence(output, padding_value=-7.0)
    assert lengths.tolist() == LENGTHS
    assert (padded[2:, 0] == -7).all()
    return padded, state


@layer_row
def packed_then_padded_to_a_total_length(rnn: Rnn) -> Any:
    output, _ = rnn(F, H, 2, batch_first=True)(packed())
    return pad_packed_sequence(output, batch_first=True, total_length=9)


@layer_row
def packed_rows_equal_rows_alone(rnn: Rnn) -> Any:
    module, x = rnn(F, H, 2, bidirectional=True).double(), torch.randn(T, N, F, dtype=torch.float64)
    output, state = module(pack_padded_sequence(x, torch.tensor(LENGTHS), enforce_sorted=False))
    padded, _ = pad_packed_sequence(output)
    for row, length in enumerate(LENGTHS):
        alone, last = module(x[:length, row])
        assert_close(padded[:length, row], alone)
        assert_close(state[0][:, row] if rnn.kind == "LSTM" else state[:, row], last[0] if rnn.kind == "LSTM" else last)
    return padded


@layer_row
def packed_to_loss(rnn: Rnn) -> Any:
    x = torch.randn(T, N, F, requires_grad=True)
    output, _ = rnn(F, H)(pack_padded_sequence(x, torch.tensor(LENGTHS), enforce_sorted=False))
    output.data.square().mean().backward()
    assert x.grad is not None
    assert (x.grad[2:, 0] == 0).all()  # padding
    return x.grad


@layer_row
def packed_output_into_the_next_layer(rnn: Rnn) -> Any:
    output, state = rnn(F, H)(packed())
    return rnn(H, H)(output, state)


@layer_row
def data_loader_to_padded_batch(rnn: Rnn) -> Any:
    def collate(batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        return pad_sequence(batch, batch_first=True), torch.tensor([len(sequence) for sequence in batch])

    rows: list[Any] = [torch.randn(length, F) for length in (3, 7, 1, 4, 2)]
    module, results = rnn(F, H, 2, batch_first=True, bidirectional=True), []
    for x, lengths in torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=collate):
        output, state = module(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
        output, lengths = pad_packed_sequence(output, batch_first=True)
        results.append((output, lengths, state, output[torch.arange(len(lengths)), lengths - 1]))
    return results


# ---------------------------------------------------------------- sequences in pieces


def detached(hidden: Any) -> Any:
    """Of PyTorch's word language model."""
    return hidden.detach() if isinstance(hidden, Tensor) else tuple(detached(h) for h in hidden)


@layer_row
def chunks_equal_the_whole(rnn: Rnn) -> Any:
    module, x, state, outputs = rnn(F, H, 2).double(), torch.randn(9, N, F, dtype=torch.float64), None, []
    for chunk in x.split(4):
        output, state = module(chunk, state)
        outputs.append(output)
    whole, last = module(x)
    assert_close(torch.cat(outputs), whole)
    assert_close(state, last)
    return state


@layer_row
def steps_equal_the_whole(rnn: Rnn) -> Any:
    module, x, state, outputs = rnn(F, H, 2, batch_first=True).double(), torch.randn(N, T, F).double(), None, []
    with torch.no_grad():
        for t in range(T):
            output, state = module(x[:, t : t + 1], state)
            outputs.append(output)
        assert_close(torch.cat(outputs, dim=1), module(x)[0])
    return outputs[-1], state


@layer_row
def truncated_backpropagation(rnn: Rnn) -> Any:
    module, head, hidden = rnn(F, H, 2), nn.Linear(H, 2), rnn.states(lambda: torch.zeros(2, N, H))
    optimiser = torch.optim.SGD([*module.parameters(), *head.parameters()], lr=0.1)
    for chunk in torch.randn(12, N, F).split(4):
        hidden = detached(hidden)
        optimiser.zero_grad()
        output, hidden = module(chunk, hidden)
        head(output).square().mean().backward()
        optimiser.step()
    return hidden


@layer_row
def backward_twice_through_carried_states(rnn: Rnn) -> Any:
    module = rnn(F, H)
    output, state = module(torch.randn(T, N, F))
    output.sum().backward(retain_graph=True)
    output, state = module(torch.randn(T, N, F), state)
    output.sum().backward()
    return all(p.grad is not None for p in module.parameters()), state


@layer_mistake
def backward_twice_without_retain_graph(rnn: Rnn) -> Any:
    output, _ = rnn(F, H)(torch.randn(T, N, F))
    output.sum().backward()
    output.sum().backward()  # RuntimeError


@layer_row
def greedy_decoding(rnn: Rnn) -> Any:
    embed, module, head = nn.Embedding(7, F), rnn(F, H, 2), nn.Linear(H, 7)
    token, state, tokens = torch.zeros(1, N, dtype=torch.int64), None, []
    for _ in range(4):
        output, state = module(embed(token), state)
        token = head(output).argmax(-1)
        tokens.append(token)
    return torch.cat(tokens), state


@layer_row
def encoder_to_decoder(rnn: Rnn) -> Any:
    encoder, decoder = rnn(F, H, 2, batch_first=True), rnn(2, H, 2, batch_first=True)
    _, state = encoder(torch.randn(N, T, F))
    return decoder(torch.randn(N, 3, 2), state)


@layer_row
def states_of_some_rows(rnn: Rnn) -> Any:
    module, beams = rnn(F, H), torch.tensor([0, 0, 2, 1])
    _, state = module(torch.randn(T, N, F))
    state = tuple(h[:, beams] for h in state) if rnn.kind == "LSTM" else state[:, beams]
    return module(torch.randn(1, 4, F), state)


# ---------------------------------------------------------------- training


def trained(rnn: Rnn, optimiser: Callable[..., torch.optim.Optimizer], **options: Any) -> Any:
    module, x, y = rnn(F, H), torch.randn(T, N, F), torch.randn(T, N, H)
    step, before = optimiser(module.parameters(), **options), [p.detach().clone() for p in module.parameters()]

    def loss() -> Tensor:
        step.zero_grad()
        error = (module(x)[0] - y).square().mean()
        error.backward()
        return error

    first = float(step.step(loss).detach())
    last = first
    for _ in range(10):
        last = float(step.step(loss).detach())
    assert last < first
    assert not any(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


LAYER_ROWS |= {
    "sgd": lambda rnn: trained(rnn, torch.optim.SGD, lr=0.5, momentum=0.5, nesterov=True, weight_decay=1e-4),
    "adam": lambda rnn: trained(rnn, torch.optim.Adam, lr=1e-2, amsgrad=True),
    "adam_fused": lambda rnn: trained(rnn, torch.optim.Adam, lr=1e-2, fused=True),
    "adamw_foreach": lambda rnn: trained(rnn, torch.optim.AdamW, lr=1e-2, foreach=True),
    "rmsprop": lambda rnn: trained(rnn, torch.optim.RMSprop, lr=1e-3),
    "lbfgs": lambda rnn: trained(rnn, torch.optim.LBFGS, lr=0.5, max_iter=4, line_search_fn="strong_wolfe"),
}


@layer_row
def clip_gradients(rnn: Rnn) -> Any:
    module = rnn(F, H, 2)
    module(torch.randn(T, N, F))[0].square().sum().mul(1e4).backward()
    norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    total = sum(float(p.grad.square().sum()) for p in module.parameters())
    assert norm > 1
    assert total == pytest.approx(1, rel=1e-4)
    nn.utils.clip_grad_value_(module.parameters(), 1e-3)
    return norm


@layer_row
def zero_gradients(rnn: Rnn) -> Any:
    module = rnn(F, H)
    module(torch.randn(T, N, F))[0].sum().backward()
    module.zero_grad(set_to_none=False)
    zeros = all((p.grad == 0).all() for p in module.parameters())
    module.zero_grad()
    return zeros, all(p.grad is None for p in module.parameters())


@layer_row
def accumulate_gradients(rnn: Rnn) -> Any:
    module, x = rnn(F, H).double(), torch.randn(T, N, F, dtype=torch.float64)
    module(x)[0].sum().backward()
    whole = [p.grad for p in module.parameters()]
    module.zero_grad()
    for row in x.unbind(1):
        module(row.unsqueeze(1))[0].sum().backward()
    assert_close([p.grad for p in module.parameters()], whole)


@layer_row
def gradients_by_autograd_grad(rnn: Rnn) -> Any:
    x, hx = torch.randn(T, N, F, requires_grad=True), rnn.state(1, N, H, requires_grad=True)
    output, _ = rnn(F, H)(x, hx)
    return torch.autograd.grad(output.sum(), [x, *(hx if rnn.kind == "LSTM" else (hx,))])


@layer_row
def gradient_from_the_states_alone(rnn: Rnn) -> Any:
    x = torch.randn(T, N, F, requires_grad=True)
    _, state = rnn(F, H, 2, bidirectional=True)(x)
    (sum(h.sum() for h in state) if rnn.kind == "LSTM" else state.sum()).backward()
    return x.grad


@layer_row
def gradient_checkpointing(rnn: Rnn) -> Any:
    module, x = rnn(F, H), torch.randn(T, N, F, requires_grad=True)
    output, state = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    output.sum().backward()
    return output, state, x.grad


@layer_mistake
def weight_changed_before_backward(rnn: Rnn) -> Any:
    module = rnn(F, H)
    output, _ = module(torch.randn(T, N, F, requires_grad=True))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    output.sum().backward()  # RuntimeError: an optimiser's step came too early


@layer_mistake
def input_changed_before_backward(rnn: Rnn) -> Any:
    x = torch.randn(T, N, F)
    output, _ = rnn(F, H)(x)
    x.zero_()
    output.sum().backward()  # RuntimeError


@layer_row
def anomaly_detection(rnn: Rnn) -> Any:
    with torch.autograd.detect_anomaly(check_nan=True):
        module = rnn(F, H, 2, bidirectional=True)
        output, state = module(packed())
        output.data.sum().backward()
    return state


@layer_row
def deterministic_algorithms(rnn: Rnn) -> Any:
    torch.use_deterministic_algorithms(True)
    try:
        output, state = rnn(F, H, 2, bidirectional=True)(packed())
        output.data.sum().backward()
        return state
    finally:
        torch.use_deterministic_algorithms(False)


@layer_row
def saved_tensors_on_hooks(rnn: Rnn) -> Any:
    x = torch.randn(T, N, F, requires_grad=True)
    with torch.autograd.graph.save_on_cpu():
        output, _ = rnn(F, H)(x)
    output.sum().backward()
    return x.grad


@layer_row
def double_backward(rnn: Rnn) -> Any:
    x = torch.randn(T, N, F, requires_grad=True)
    output, _ = rnn(F, H)(x)
    (grad,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    return x.grad, grad


@layer_row
def gradient_in_evaluation_mode(rnn: Rnn) -> Any:
    x = torch.randn(T, N, F, requires_grad=True)
    rnn(F, H).eval()(x)[0].sum().backward()
    return x.grad


@layer_row
def training_mode_is_deterministic(rnn: Rnn) -> Any:
    module, x = rnn(F, H, 2), torch.randn(T, N, F)
    generator = torch.get_rng_state()
    first, again = module(x), module(x)
    assert_close(first, again, rtol=0, atol=0)
    assert torch.equal(generator, torch.get_rng_state())
    return first, module.eval()(x)


@layer_row
def dropout_between_layers(rnn: Rnn) -> Any:
    module, x = rnn(F, H, 2, dropout=0.5), torch.randn(T, N, F)
    random = not torch.equal(module(x)[0], module(x)[0])
    module.eval()
    calm = torch.equal(module(x)[0], module(x)[0])
    return random, calm, module.training


@layer_row
def dropout_changed_later(rnn: Rnn) -> Any:
    module, x = rnn(F, H, 2, dropout=0.5), torch.randn(T, N, F)
    module.dropout = 0.0
    assert_close(module(x), module(x), rtol=0, atol=0)
    return module.dropout


@layer_row
def dropout_of_everything(rnn: Rnn) -> Any:
    module, x = rnn(F, H, 2, dropout=1.0), torch.randn(T, N, F, requires_grad=True)
    module(x)[0].sum().backward()
    return bool((x.grad == 0).all())


@layer_row
def dropout_spares_the_last_layer(rnn: Rnn) -> Any:
    x = torch.randn(T, N, F)
    return bool(rnn(F, H, 2, dropout=1.0)(x)[0].any()), bool(rnn(F, H, 1, dropout=1.0)(x)[0].any())  # the second warns


@layer_row
def batch_first_changed_later(rnn: Rnn) -> Any:
    module = rnn(F, H)
    module.batch_first = True
    return module(torch.randn(N, T + 1, F))


@layer_row
def no_gradient_mode(rnn: Rnn) -> Any:
    with torch.no_grad():
        return rnn(F, H)(torch.randn(T, N, F))


@layer_row
def inference_mode(rnn: Rnn) -> Any:
    module = rnn(F, H)
    with torch.inference_mode():
        return module(torch.randn(T, N, F))


@layer_row
def sequential_with_extractor(rnn: Rnn) -> Any:
    class Last(nn.Module):
        def forward(self, result: Any) -> Tensor:
            return result[0][:, -1]

    model = nn.Sequential(nn.Linear(2, F), rnn(F, H, batch_first=True), Last(), nn.Linear(H, 3))
    return model(torch.randn(N, T, 2))


@layer_row
def subclass(rnn: Rnn) -> Any:
    class Classifier(rnn.cls):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__(F, H, batch_first=True, **rnn.extra)
            self.head = nn.Linear(H, 3)

        def forward(self, input: Tensor, hx: Any = None) -> Tensor:
            output, _ = super().forward(input, hx)
            return self.head(output.mean(1))

    module = Classifier()
    return isinstance(module, nn.Module), module(torch.randn(N, T, F))


# ---------------------------------------------------------------- parameters


@layer_row
def initialise_by_name(rnn: Rnn) -> Any:
    module, seen = rnn(F, H, 2, bidirectional=True), set()
    for name, parameter in module.named_parameters():
        for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            if part in name:
                seen.add(part)
        if "weight_ih" in name:
            nn.init.xavier_uniform_(parameter.data)
        elif "weight_hh" in name:
            nn.init.orthogonal_(parameter.data)
        elif "bias" in name:
            nn.init.zeros_(parameter)
    return sorted(seen), module(torch.randn(T, N, F))


@layer_row
def initialise_the_forget_gate(rnn: Rnn) -> Any:
    module = rnn(F, H)
    for name, bias in module.named_parameters():
        if "bias" in name:
            n = bias.size(0)
            bias.data[n // 4 : n // 2].fill_(1.0)  # runs; what it means here is for the docs to say
    return module(torch.randn(T, N, F))


@layer_row
def initialise_by_apply(rnn: Rnn) -> Any:
    def init(module: nn.Module) -> None:
        if isinstance(module, rnn.cls):
            for parameter in module.parameters():
                nn.init.uniform_(parameter, -0.1, 0.1)

    model = nn.Sequential(rnn(F, H))
    model.apply(init)
    return max(float(p.detach().abs().max()) for p in model.parameters()) <= 0.1


@layer_row
def initialise_anew(rnn: Rnn) -> Any:
    module = rnn(F, H)
    before = [p.detach().clone() for p in module.parameters()]
    returned = module.reset_parameters()
    return returned, any(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


@layer_row
def all_weights(rnn: Rnn) -> Any:
    module = rnn(F, H, 2, bidirectional=True)
    lists = module.all_weights
    flat = [weight for weights in lists for weight in weights]
    for weight in flat:
        nn.init.normal_(weight, std=0.1)
    return type(lists), len(lists), {type(w) for w in flat}, {id(w) for w in flat} == {id(p) for p in module.parameters()}


@layer_row
def flatten_parameters(rnn: Rnn) -> Any:
    module = rnn(F, H)
    return module.flatten_parameters(), module(torch.randn(T, N, F))


@layer_row
def parameters_are_leaves(rnn: Rnn) -> Any:
    module = rnn(F, H, 2)
    return {(p.dtype, p.device.type, p.requires_grad, p.is_leaf, p.is_contiguous(), type(p)) for p in module.parameters()}


@layer_row
def no_buffers(rnn: Rnn) -> Any:
    return list(rnn(F, H).buffers())


@layer_row
def parameters_as_a_vector(rnn: Rnn) -> Any:
    module = rnn(F, H)
    vector = nn.utils.parameters_to_vector(module.parameters())
    nn.utils.vector_to_parameters(torch.zeros_like(vector), module.parameters())
    return vector.dim(), all((p == 0).all() for p in module.parameters())


@layer_row
def same_seed_same_module(rnn: Rnn) -> Any:
    first = torch.manual_seed(3) and rnn(F, H).state_dict()
    again = torch.manual_seed(3) and rnn(F, H).state_dict()
    return all(torch.equal(first[name], again[name]) for name in first)


def recurrent_weight(module: Any, layer: int = 0) -> tuple[nn.Module, str]:
    """Where the recurrent weights live: the names are the one thing that a swap has to change."""
    return (module.cells[layer].dynamics, "weight_hh") if isinstance(module, RIM) else (module, f"weight_hh_l{layer}")


@layer_row
def parametrise_a_weight(rnn: Rnn) -> Any:
    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    module, x = rnn(F, H), torch.randn(T, N, F)
    before, _ = module(x)
    parametrize.register_parametrization(*recurrent_weight(module), Half())
    during, state = module(x)
    assert not torch.allclose(before, during)
    during.sum().backward()
    parametrize.remove_parametrizations(*recurrent_weight(module), leave_parametrized=False)
    assert_close(module(x)[0], before, rtol=0, atol=0)
    return during, state


@layer_row
def tie_a_weight(rnn: Rnn) -> Any:
    module = rnn(H, H, 2)
    (first, name), (second, name_2) = recurrent_weight(module), recurrent_weight(module, 1)
    before = len(list(module.parameters()))
    setattr(second, name_2, getattr(first, name))
    module(torch.randn(T, N, H))[0].sum().backward()
    return before - len(list(module.parameters())), getattr(first, name).grad is not None


@layer_row
def prune_a_weight(rnn: Rnn) -> Any:
    module = rnn(F, H)
    prune.l1_unstructured(*recurrent_weight(module), amount=0.5)
    owner, name = recurrent_weight(module)
    return float((getattr(owner, name) == 0).float().mean()), module(torch.randn(T, N, F))


@layer_row
def replace_flatten_parameters(rnn: Rnn) -> Any:
    module = rnn(F, H)
    module.flatten_parameters = lambda: None  # as weight-dropping wrappers do
    return module(torch.randn(T, N, F))


@layer_row
def edit_a_weight_in_place(rnn: Rnn) -> Any:
    module, x = rnn(F, H), torch.randn(T, N, F)
    before, _ = module(x)
    with torch.no_grad():
        getattr(*recurrent_weight(module)).mul_(2)
    return torch.allclose(before, module(x)[0])


@layer_row
def replace_a_weight(rnn: Rnn) -> Any:
    module, x = rnn(F, H), torch.randn(T, N, F)
    before, _ = module(x)
    owner, name = recurrent_weight(module)
    setattr(owner, name, nn.Parameter(getattr(owner, name).detach() * 2))
    after, _ = module(x)
    after.sum().backward()
    return torch.allclose(before, after), getattr(owner, name).grad is not None


@layer_row
def functional_call(rnn: Rnn) -> Any:
    module, x = rnn(F, H), torch.randn(T, N, F)
    zeros = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    output, state = torch.func.functional_call(module, zeros, (x,))
    assert (output == 0).all()
    return output, state, torch.func.functional_call(module, dict(module.named_parameters()), (x, None))


@layer_row
def averaged_model(rnn: Rnn) -> Any:
    module = rnn(F, H)
    average = torch.optim.swa_utils.AveragedModel(module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    average.update_parameters(module)
    average.update_parameters(module)
    return average(torch.randn(T, N, F))


# ---------------------------------------------------------------- saving and copying


@layer_row
def state_dict_round_trip(rnn: Rnn) -> Any:
    x, first, second = torch.randn(T, N, F), rnn(F, H, 2), rnn(F, H, 2)
    report = second.load_state_dict(first.state_dict())
    assert_close(second(x), first(x), rtol=0, atol=0)
    return str(report), type(first.state_dict())


LAYER_MISTAKES |= {
    "meta_to_cpu": lambda rnn: rnn(F, H, device="meta").to("cpu"),  # NotImplementedError
    "load_state_dict_of_more_layers": lambda rnn: rnn(F, H).load_state_dict(rnn(F, H, 2).state_dict()),
    "load_state_dict_of_fewer_layers": lambda rnn: rnn(F, H, 2).load_state_dict(rnn(F, H).state_dict()),
    "load_state_dict_of_other_sizes": lambda rnn: rnn(F, H).load_state_dict(rnn(F, 2 * H).state_dict()),
    "load_state_dict_without_biases": lambda rnn: rnn(F, H).load_state_dict(rnn(F, H, bias=False).state_dict()),
    "load_state_dict_of_nothing": lambda rnn: rnn(F, H).load_state_dict({}),
}
LAYER_ROWS |= {
    "load_state_dict_of_float64": lambda rnn: str(rnn(F, H).load_state_dict(rnn(F, H).double().state_dict())),
    "load_state_dict_by_assignment": lambda rnn: str(rnn(F, H).load_state_dict(rnn(F, H).state_dict(), assign=True)),
    "load_state_dict_not_strictly": lambda rnn: bool(rnn(F, H, 2).load_state_dict(rnn(F, H).state_dict(), False).missing_keys),
}


@layer_row
def load_state_dict_onto_meta(rnn: Rnn) -> Any:
    with torch.device("meta"):
        module = rnn(F, H)
    module.load_state_dict(rnn(F, H).state_dict(), assign=True)
    return module(torch.randn(T, N, F))


@layer_row
def save_and_load_weights_only(rnn: Rnn) -> Any:
    file, x, first, second = io.BytesIO(), torch.randn(T, N, F), rnn(F, H), rnn(F, H)
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert_close(second(x), first(x), rtol=0, atol=0)


@layer_row
def save_and_load_whole(rnn: Rnn) -> Any:
    file, x, module = io.BytesIO(), torch.randn(T, N, F), rnn(F, H, 2, bidirectional=True)
    torch.save(module, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert_close(again(x), module(x), rtol=0, atol=0)
    return attributes(again)


@layer_mistake
def load_whole_weights_only(rnn: Rnn) -> Any:
    file = io.BytesIO()
    torch.save(rnn(F, H), file)
    file.seek(0)
    torch.load(file, weights_only=True)  # UnpicklingError


@layer_row
def pickle_round_trip(rnn: Rnn) -> Any:
    module, x = rnn(F, H, 2).eval(), torch.randn(T, N, F)
    again = pickle.loads(pickle.dumps(module))
    assert_close(again(x), module(x), rtol=0, atol=0)
    return attributes(again)


@layer_row
def deep_copy(rnn: Rnn) -> Any:
    module, x = rnn(F, H), torch.randn(T, N, F)
    other = copy.deepcopy(module)
    assert_close(other(x), module(x), rtol=0, atol=0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert (module(x)[0] != 0).any()
    return other(x)


@pytest.mark.slow
def test_a_copy_of_a_compiled_layer_is_one_of_its_own() -> None:
    """After `rnn.compile()`, in which nn.LSTM's copy goes on with the weights of the first (torch 2.13)."""
    rnn, x = RIM(F, H), torch.randn(T, N, F)
    rnn.compile(backend="eager")
    other, again = copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))
    assert_close(again(x), rnn(x))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other(x)[0].any()
    assert rnn(x)[0].any()


@layer_row
def shallow_copy(rnn: Rnn) -> Any:
    module, x = rnn(F, H), torch.randn(T, N, F)
    other = copy.copy(module)
    assert_close(other(x), module(x), rtol=0, atol=0)
    return all(a is b for a, b in zip(other.parameters(), module.parameters(), strict=True))


@layer_row
def share_memory(rnn: Rnn) -> Any:
    module = rnn(F, H).share_memory()
    return {p.is_shared() for p in module.parameters()}, module(torch.randn(T, N, F))


@layer_row
def repr_names_what_is_unusual(rnn: Rnn) -> Any:
    shown = repr(rnn(F, H, 2, False, True, 0.5, True))
    usual = repr(rnn(F, H))
    parts = ("num_layers=2", "bias=False", "batch_first=True", "dropout=0.5", "bidirectional=True")
    return [part in shown for part in ("4, 12", *parts)], [part in usual for part in ("4, 12", *parts)]


# ---------------------------------------------------------------- dtypes and devices

LAYER_ROWS |= {
    "double": lambda rnn: rnn(F, H, 2).double()(torch.randn(T, N, F).double()),
    "half": lambda rnn: rnn(F, H).half()(torch.randn(T, N, F).half(), rnn.state(1, N, H, dtype=torch.float16)),
    "bfloat16": lambda rnn: rnn(F, H).bfloat16()(torch.randn(T, N, F).bfloat16()),
    "to_dtype": lambda rnn: rnn(F, H).to(torch.float64)(torch.randn(T, N, F, dtype=torch.float64)),
    "to_dtype_of_a_tensor": lambda rnn: rnn(F, H).to(x := torch.randn(T, N, F, dtype=torch.float64))(x),
    "to_returns_itself": lambda rnn: (m := rnn(F, H)).to("cpu") is m,
    "type_and_back": lambda rnn: rnn(F, H).type(torch.float64).float()(torch.randn(T, N, F)),
    "dtype_argument": lambda rnn: rnn(F, H, dtype=torch.bfloat16)(torch.randn(T, N, F, dtype=torch.bfloat16)),
    "device_argument": lambda rnn: rnn(F, H, device=torch.device("cpu"))(torch.randn(T, N, F)),
    "meta_forward": lambda rnn: rnn(F, H, 2, device="meta")(torch.randn(T, N, F, device="meta")),
    "meta_forward_with_states": lambda rnn: rnn(F, H, device="meta")(
        torch.randn(T, N, F, device="meta"), rnn.state(1, N, H, device="meta")
    ),
    "half_backward": lambda rnn: rnn(F, H).half()(torch.randn(T, N, F).half())[0].sum().backward(),
}


@layer_row
def meta_construction_then_to_empty(rnn: Rnn) -> Any:
    with torch.device("meta"):
        module = rnn(F, H, 2)
    assert all(p.is_meta for p in module.parameters())
    module.to_empty(device="cpu")
    module.reset_parameters()
    return module(torch.randn(T, N, F))


@layer_row
def default_dtype_float64(rnn: Rnn) -> Any:
    torch.set_default_dtype(torch.float64)
    try:
        return rnn(F, H)(torch.randn(T, N, F))
    finally:
        torch.set_default_dtype(torch.float32)


@layer_row
def default_dtype_is_not_asked_later(rnn: Rnn) -> Any:
    module, x = rnn(F, H), torch.randn(T, N, F)
    torch.set_default_dtype(torch.float64)
    try:
        return module(x)
    finally:
        torch.set_default_dtype(torch.float32)


def autocast(rnn: Rnn, module: Any, *inputs: Any) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = module(*inputs)
    output = result[0].data if isinstance(result[0], PackedSequence) else result[0]
    output.float().sum().backward()
    return result, {p.grad.dtype for p in module.parameters()}


LAYER_ROWS |= {
    "autocast_plain": lambda rnn: autocast(rnn, rnn(F, H), torch.randn(T, N, F)),
    "autocast_with_states": lambda rnn: autocast(rnn, rnn(F, H, 2), torch.randn(T, N, F), rnn.state(2, N, H)),
    "autocast_bfloat16_input": lambda rnn: autocast(rnn, rnn(F, H), torch.randn(T, N, F).bfloat16()),
    "autocast_batch_first": lambda rnn: autocast(rnn, rnn(F, H, batch_first=True, bidirectional=True), torch.randn(N, T, F)),
    "autocast_packed": lambda rnn: autocast(rnn, rnn(F, H, 2), packed()),
    "autocast_unbatched": lambda rnn: autocast(rnn, rnn(F, H), torch.randn(T, F)),
    "autocast_packed_projected": lambda rnn: autocast(rnn, rnn(F, H, proj_size=6), packed()),
    "autocast_bfloat16_states": lambda rnn: autocast(
        rnn, rnn(F, H), torch.randn(T, N, F), rnn.state(1, N, H, dtype=torch.bfloat16)
    ),
    "autocast_projected": lambda rnn: autocast(rnn, rnn(F, H, proj_size=6), torch.randn(T, N, F)),
}


@layer_row
def autocast_behind_a_linear(rnn: Rnn) -> Any:
    model, module = nn.Linear(2, F), rnn(F, H, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = module(model(torch.randn(T, N, 2)))
        output, state = module(model(torch.randn(T, N, 2)), state)
    return output, state


@layer_row
def autocast_without_gradient(rnn: Rnn) -> Any:
    module = rnn(F, H)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        return module(torch.randn(T, N, F))


# ---------------------------------------------------------------- hooks


@layer_row
def forward_hooks(rnn: Rnn) -> Any:
    module, seen = rnn(F, H), []
    module.register_forward_pre_hook(lambda m, args: seen.append(look(args)))
    handle = module.register_forward_hook(lambda m, args, result: seen.append(look(result)))
    module(torch.randn(T, N, F), rnn.state(1, N, H))
    handle.remove()
    module(torch.randn(T, N, F))
    return seen


@layer_row
def forward_hook_replaces_the_result(rnn: Rnn) -> Any:
    module = rnn(F, H)
    module.register_forward_hook(lambda m, args, result: (result[0] * 2, result[1]))
    return module(torch.randn(T, N, F))


@layer_row
def full_backward_hook(rnn: Rnn) -> Any:
    module, seen = rnn(F, H), []
    module.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append(look(grad_in)))
    module(torch.randn(T, N, F, requires_grad=True))[0].sum().backward()
    return seen


@layer_row
def parameter_hook(rnn: Rnn) -> Any:
    module, seen = rnn(F, H), []
    for parameter in module.parameters():
        parameter.register_hook(lambda grad: seen.append(grad.dtype))
    module(torch.randn(T, N, F))[0].sum().backward()
    return set(seen), len(seen) == len(list(module.parameters()))


@layer_row
def is_a_module(rnn: Rnn) -> Any:
    module = nn.ModuleDict({"rnn": rnn(F, H)})
    module.eval()
    return isinstance(module["rnn"], nn.Module), module["rnn"].training, module.train()["rnn"].training


# ---------------------------------------------------------------- cells


@cell_row
def cell_attributes(rnn: Rnn) -> Any:
    cell = rnn(F, H)
    return cell.input_size, cell.hidden_size, cell.bias, cell.training


@cell_row
def cell_positionally(rnn: Rnn) -> Any:
    cell = rnn(F, H, False, "cpu", torch.float64)
    return cell.bias, cell(torch.randn(N, F, dtype=torch.float64))


@cell_row
def cell_loop(rnn: Rnn) -> Any:
    cell, state, seen = rnn(F, H), rnn.states(lambda: torch.zeros(N, H)), []
    for x in torch.randn(T, N, F):
        state = cell(x, state)
        seen.append(state[0] if rnn.kind == "LSTM" else state)
    torch.stack(seen).sum().backward()
    return state, torch.stack(seen)


@cell_row
def cell_state_is_left_alone(rnn: Rnn) -> Any:
    x, hx = torch.randn(N, F), rnn.state(N, H)
    before = copy.deepcopy(hx)
    new = rnn(F, H)(x, hx)
    assert_close(hx, before, rtol=0, atol=0)
    for h in new if rnn.kind == "LSTM" else (new,):
        h.detach().zero_()
    assert_close(hx, before, rtol=0, atol=0)


@cell_row
def cell_in_place_mask_on_the_states(rnn: Rnn) -> Any:
    cell, state, done, total = rnn(F, H), rnn.state(N, H), torch.tensor([[1.0], [0.0], [1.0]]), torch.zeros(())
    for x in torch.randn(T, N, F):
        state = cell(x, state)
        for h in state if rnn.kind == "LSTM" else (state,):
            h *= done
        total = total + (state[0] if rnn.kind == "LSTM" else state).sum()
    total.backward()
    return state


@cell_row
def cell_in_place_activation(rnn: Rnn) -> Any:
    new = rnn(F, H)(torch.randn(N, F))
    h = new[0] if rnn.kind == "LSTM" else new
    h.relu_().sum().backward()
    return h


@cell_row
def cell_gradients(rnn: Rnn) -> Any:
    x, hx = torch.randn(N, F, requires_grad=True), rnn.state(N, H, requires_grad=True)
    new = rnn(F, H)(x, hx)
    states = hx if rnn.kind == "LSTM" else (hx,)
    return torch.autograd.grad(sum(h.sum() for h in (new if rnn.kind == "LSTM" else (new,))), [x, *states])


@cell_row
def cell_initialise_by_name(rnn: Rnn) -> Any:
    cell, seen = rnn(F, H), set()
    for name, parameter in cell.named_parameters():
        for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            if part in name:
                seen.add(part)
                (nn.init.orthogonal_ if "weight" in part else nn.init.zeros_)(parameter)
    return sorted(seen), cell(torch.randn(N, F))


@cell_row
def cell_state_dict_round_trip(rnn: Rnn) -> Any:
    x, first, second = torch.randn(N, F), rnn(F, H), rnn(F, H)
    second.load_state_dict(first.state_dict())
    assert_close(second(x), first(x), rtol=0, atol=0)


@cell_row
def cell_copies(rnn: Rnn) -> Any:
    x, cell = torch.randn(N, F), rnn(F, H)
    for other in (copy.deepcopy(cell), copy.copy(cell), pickle.loads(pickle.dumps(cell))):
        assert_close(other(x), cell(x), rtol=0, atol=0)


@cell_row
def cell_initialise_anew(rnn: Rnn) -> Any:
    cell = rnn(F, H)
    before = [p.detach().clone() for p in cell.parameters()]
    return cell.reset_parameters(), any(torch.equal(p, b) for p, b in zip(cell.parameters(), before, strict=True))


@cell_row
def cell_on_meta_then_to_empty(rnn: Rnn) -> Any:
    cell = rnn(F, H, device="meta").to_empty(device="cpu")
    cell.reset_parameters()
    return cell(torch.randn(N, F))


@cell_row
def cell_repr(rnn: Rnn) -> Any:
    return "4, 12" in repr(rnn(F, H)), "bias=False" in repr(rnn(F, H, bias=False)), "bias" in rnn(F, H).extra_repr()


@cell_row
def cell_no_gradient(rnn: Rnn) -> Any:
    with torch.no_grad():
        return rnn(F, H)(torch.randn(N, F))


@cell_row
def cell_without_biases(rnn: Rnn) -> Any:
    cell = rnn(F, H, bias=False)
    return [name for name, _ in cell.named_parameters() if "bias" in name], cell(torch.randn(N, F))


def cell_autocast(rnn: Rnn, *inputs: Any) -> Any:
    cell = rnn(F, H)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return cell(*inputs)


BAD_CELL_ARGUMENTS: dict[str, list[Any]] = {
    "input_size": ["3", 3.0, None],
    "hidden_size": ["12", 12.5, None],
    "device": ["nowhere", 3.5],
    "dtype": [torch.int64, "float32"],
    "num_layers": [2],
}
for name, values in BAD_CELL_ARGUMENTS.items():
    for bad in values:
        CELL_MISTAKES[f"cell_with_{name}={bad!r}"] = lambda rnn, name=name, bad=bad: rnn(
            **{"input_size": F, "hidden_size": H, name: bad}
        )


@cell_row
def construct_cell_with_numpy_sizes(rnn: Rnn) -> Any:
    """As a product of the shape of an observation has them."""
    numpy = pytest.importorskip("numpy")
    return rnn(numpy.prod((2, F)), numpy.int64(H))(torch.randn(N, 2 * F))


CELL_ROWS |= {
    "cell": lambda rnn: rnn(F, H)(torch.randn(N, F)),
    "cell_with_states": lambda rnn: rnn(F, H)(torch.randn(N, F), rnn.state(N, H)),
    "cell_by_keyword": lambda rnn: rnn(F, H)(input=torch.randn(N, F), hx=rnn.state(N, H)),
    "cell_list_of_states": lambda rnn: rnn(F, H)(torch.randn(N, F), list(rnn.state(N, H))),
    "cell_unbatched": lambda rnn: rnn(F, H)(torch.randn(F)),
    "cell_unbatched_with_states": lambda rnn: rnn(F, H)(torch.randn(F), rnn.state(H)),
    "cell_no_rows": lambda rnn: rnn(F, H)(torch.randn(0, F), rnn.state(0, H)),
    "cell_strided": lambda rnn: rnn(F, H)(torch.randn(F, N).t(), rnn.states(lambda: torch.randn(H, N).t())),
    "cell_expanded": lambda rnn: rnn(F, H)(torch.randn(N, F), rnn.states(lambda: torch.randn(1, H).expand(N, H))),
    "cell_frozen": lambda rnn: rnn(F, H).requires_grad_(False)(torch.randn(N, F)),
    "cell_double": lambda rnn: rnn(F, H).double()(torch.randn(N, F).double()),
    "cell_half": lambda rnn: rnn(F, H).half()(torch.randn(N, F).half()),
    "cell_bfloat16": lambda rnn: rnn(F, H, dtype=torch.bfloat16)(torch.randn(N, F).bfloat16()),
    "cell_meta": lambda rnn: rnn(F, H, device="meta")(torch.randn(N, F, device="meta")),
    "cell_autocast": lambda rnn: cell_autocast(rnn, torch.randn(N, F)),
    "cell_autocast_with_states": lambda rnn: cell_autocast(rnn, torch.randn(N, F), rnn.state(N, H)),
}
CELL_MISTAKES |= {
    "cell_nothing": lambda rnn: rnn(),
    "cell_no_input": lambda rnn: rnn(F, H)(),
    "cell_input_none": lambda rnn: rnn(F, H)(None),
    "cell_input_list": lambda rnn: rnn(F, H)([0.0] * F),
    "cell_input_packed": lambda rnn: rnn(F, H)(packed()),
    "cell_input_0d": lambda rnn: rnn(F, H)(torch.tensor(1.0)),
    "cell_input_3d": lambda rnn: rnn(F, H)(torch.randn(T, N, F)),
    "cell_input_too_few_features": lambda rnn: rnn(F, H)(torch.randn(N, F - 1)),
    "cell_input_too_few_features_unbatched": lambda rnn: rnn(F, H)(torch.randn(F - 1)),
    "cell_input_float64": lambda rnn: rnn(F, H)(torch.randn(N, F).double()),
    "cell_input_int64": lambda rnn: rnn(F, H)(torch.ones(N, F, dtype=torch.int64)),
    "cell_input_on_meta": lambda rnn: rnn(F, H)(torch.randn(N, F, device="meta")),
    "cell_module_on_meta": lambda rnn: rnn(F, H, device="meta")(torch.randn(N, F)),
    "cell_states_3d": lambda rnn: rnn(F, H)(torch.randn(N, F), rnn.state(1, N, H)),
    "cell_states_0d": lambda rnn: rnn(F, H)(torch.randn(N, F), rnn.state()),
    "cell_states_too_few_rows": lambda rnn: rnn(F, H)(torch.randn(N, F), rnn.state(N - 1, H)),
    "cell_states_one_row_for_all": lambda rnn: rnn(F, H)(torch.randn(N, F), rnn.state(1, H)),
    "cell_states_too_few_features": lambda rnn: rnn(F, H)(torch.randn(N, F), rnn.state(N, H - 6)),
    "cell_states_batched_input_not": lambda rnn: rnn(F, H)(torch.randn(F), rnn.state(N, H)),
    "cell_states_float64": lambda rnn: rnn(F, H)(torch.randn(N, F), rnn.state(N, H, dtype=torch.float64)),
    "cell_states_on_meta": lambda rnn: rnn(F, H)(torch.randn(N, F), rnn.state(N, H, device="meta")),
    "cell_states_lone_tensor": lambda rnn: rnn(F, H)(torch.randn(N, F), torch.zeros(N, H)),  # GRU: fine
    "cell_states_pair": lambda rnn: rnn(F, H)(torch.randn(N, F), (torch.zeros(N, H),) * 2),  # LSTM: fine
    "cell_states_one_of_two": lambda rnn: rnn(F, H)(torch.randn(N, F), (torch.zeros(N, H),)),
    "cell_states_three": lambda rnn: rnn(F, H)(torch.randn(N, F), (torch.zeros(N, H),) * 3),
    "cell_states_none_inside": lambda rnn: rnn(F, H)(torch.randn(N, F), (torch.zeros(N, H), None)),
    "cell_states_number": lambda rnn: rnn(F, H)(torch.randn(N, F), 0),
}


kinds = pytest.mark.parametrize("kind", ["LSTM", "GRU"])


@kinds
@pytest.mark.parametrize("row", LAYER_ROWS)
def test_layer(row: str, kind: str) -> None:
    theirs = compare(LAYER_ROWS[row], *LAYERS[kind])
    assert theirs.raised is None or kind == "GRU", f"the row itself is wrong: {theirs.message}"


SINCE_2_11 = ("construct_with_input_size=", "construct_with_bias=", "construct_with_batch_first=")
"""Mistakes of which torch 2.10 lets some pass, or fails at later; newer ones refuse them, and so do we everywhere."""


@kinds
@pytest.mark.parametrize("row", LAYER_MISTAKES)
def test_layer_mistake(row: str, kind: str) -> None:
    torchs, ours = LAYERS[kind]
    if torch.__version__.startswith("2.10.") and row.startswith(SINCE_2_11):
        assert run(LAYER_MISTAKES[row], ours).raised in (TypeError, ValueError)
    else:
        compare(LAYER_MISTAKES[row], torchs, ours)


@kinds
@pytest.mark.parametrize("row", CELL_ROWS)
def test_cell(row: str, kind: str) -> None:
    theirs = compare(CELL_ROWS[row], *CELLS[kind])
    assert theirs.raised is None or kind == "GRU", f"the row itself is wrong: {theirs.message}"


@kinds
@pytest.mark.parametrize("row", CELL_MISTAKES)
def test_cell_mistake(row: str, kind: str) -> None:
    compare(CELL_MISTAKES[row], *CELLS[kind])


# ---------------------------------------------------------------- where torch lets a mistake pass

STRICTER: dict[str, tuple[type[Exception], str, Row]] = {
    "bool_as_size": (TypeError, "input_size should be of type int", lambda rnn: rnn(True, H)),
    "bool_as_number_of_layers": (TypeError, "num_layers should be of type int", lambda rnn: rnn(F, H, True)),
    "no_features_in_a_cell": (ValueError, "input_size=0", lambda rnn: (RIMCell if rnn.cls is RIM else nn.LSTMCell)(0, H)),
    "third_state_unbatched": (RuntimeError, "two states", lambda rnn: rnn(F, H)(torch.randn(T, F), (torch.zeros(1, H),) * 3)),
    "third_state_packed": (RuntimeError, "two states", lambda rnn: rnn(F, H)(packed(), (torch.zeros(1, N, H),) * 3)),
    "states_of_more_rows_packed": (
        RuntimeError,
        r"h_0 size \(1, 3, 12\), got \(1, 4, 12\)",
        lambda rnn: rnn(F, H)(packed(), rnn.state(1, N + 1, H)),
    ),
    "both_states_in_one_tensor": (
        TypeError,
        "tuple of two tensors",
        lambda rnn: rnn(F, H)(torch.randn(T, F), torch.zeros(2, 1, H)),
    ),
}


@pytest.mark.parametrize("row", STRICTER)
def test_stricter_than_torch(row: str) -> None:
    error, message, call = STRICTER[row]
    torchs, ours = LAYERS["LSTM"]
    call(torchs)
    with pytest.raises(error, match=message):
        call(ours)


@pytest.mark.parametrize("rnn", LAYERS["GRU"], ids=["torch", "ours"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_gru_output_changed_in_place_before_backward(rnn: Rnn, batch_first: bool) -> None:
    """As nn.GRU on a CPU allows it; nn.LSTM, which is one operator there, raises RuntimeError, and RIM may."""
    module, x = rnn(F, H, batch_first=batch_first), torch.randn(N, T, F)
    keep = torch.ones(N, T, 1)
    keep[0, 2:] = 0
    gradients = []
    for in_place in (False, True):
        leaf = x.clone().requires_grad_()
        output, _ = module(leaf)
        output = output.mul_(keep) if in_place else output * keep
        nn.ReLU(in_place)(output).sum().backward()
        gradients.append(leaf.grad)
    assert_close(gradients[1], gradients[0])


def test_lone_tensor_for_two_layers() -> None:
    """torch takes the tensor's layers for the two states and finds them of the wrong rank; the mistake is one of type."""
    x, h_0 = torch.randn(T, N, F), torch.zeros(2, N, H)
    with pytest.raises(RuntimeError, match="should also be 3-D but got"):
        nn.LSTM(F, H, 2)(x, h_0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"tuple of two tensors \(h_0, c_0\), got: Tensor"):
        RIM(F, H, 2)(x, h_0)  # type: ignore[arg-type]


def test_4d_states_for_packed_input() -> None:
    """nn.LSTM ends the process with a segmentation fault, so it does not take part."""
    with pytest.raises(RuntimeError, match="For packed input, hx should be 3-D but got \\(4-D, 4-D\\)"):
        RIM(F, H)(packed_sorted(), (torch.zeros(1, 1, N, H), torch.zeros(1, 1, N, H)))
