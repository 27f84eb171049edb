"""Wrong arguments of RIM's own: the message names the argument, what was given and what was expected. And the defaults."""

import linecache
import re
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from rim_rnn import RIM, RIMCell, native, record

SIZES: dict[str, Any] = {"input_size": 4, "hidden_size": 12}

OWN_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rnn_cell": "lstm"}, ValueError, """rnn_cell should be "LSTM" or "GRU", got rnn_cell='lstm'"""),
    ({"rnn_cell": "RNN_TANH"}, ValueError, """rnn_cell should be "LSTM" or "GRU", got rnn_cell='RNN_TANH'"""),
    ({"rnn_cell": None}, ValueError, """rnn_cell should be "LSTM" or "GRU", got rnn_cell=None"""),
    ({"rnn_cell": ["GRU"]}, ValueError, """rnn_cell should be "LSTM" or "GRU", got rnn_cell=['GRU']"""),
    ({"rnn_cell": nn.LSTM}, ValueError, """rnn_cell should be "LSTM" or "GRU", got rnn_cell=<class"""),
    ({"rnn_cell": "GRU", "proj_size": 6}, ValueError, 'proj_size is only supported for rnn_cell="LSTM", got proj_size=6'),
    ({"proj_size": 12}, ValueError, "proj_size should be smaller than hidden_size, got proj_size=12 and hidden_size=12"),
    ({"proj_size": -1}, ValueError, "proj_size should be at least 0, got proj_size=-1"),
    ({"proj_size": "6"}, TypeError, "proj_size should be of type int, got: str"),
    ({"num_units": 0}, ValueError, "num_units should be at least 1, got num_units=0"),
    ({"num_units": -6}, ValueError, "num_units should be at least 1, got num_units=-6"),
    ({"num_units": 6.0}, TypeError, "num_units should be of type int, got: float"),
    ({"num_units": "6"}, TypeError, "num_units should be of type int, got: str"),
    ({"num_units": True}, TypeError, "num_units should be of type int, got: bool"),
    ({"num_units": 5}, ValueError, "num_units=5 does not divide hidden_size=12; nearest divisors are 4 and 6"),
    ({"num_units": 8}, ValueError, "num_units=8 does not divide hidden_size=12; nearest divisors are 6 and 12"),
    ({"num_units": 24}, ValueError, "num_units=24 does not divide hidden_size=12; nearest divisor is 12"),
    (
        {"num_units": 6, "hidden_size": 128},
        ValueError,
        "num_units=6 does not divide hidden_size=128; nearest divisors are 4 and 8",
    ),
    (
        {"num_units": 6, "hidden_size": 13},
        ValueError,
        "num_units=6 does not divide hidden_size=13; nearest divisors are 1 and 13",
    ),
    ({"num_units": 6, "proj_size": 8}, ValueError, "num_units=6 does not divide proj_size=8; nearest divisor is 4"),
    ({"num_units": 3, "proj_size": 8}, ValueError, "num_units=3 does not divide proj_size=8; nearest divisors are 2 and 4"),
    ({"num_units": 5, "proj_size": 10}, ValueError, "num_units=5 does not divide hidden_size=12; nearest divisor is 2"),
    ({"k": 0}, ValueError, "k should be from 1 to 6, got k=0"),
    ({"k": 7}, ValueError, "k should be from 1 to 6, got k=7"),
    ({"k": 3, "num_units": 2}, ValueError, "k should be from 1 to 2, got k=3"),
    ({"k": -1}, ValueError, "k should be from 1 to 6, got k=-1"),
    ({"k": 4.0}, TypeError, "k should be of type int, got: float"),
    ({"k": True}, TypeError, "k should be of type int, got: bool"),
    ({"key_size_input": 0}, ValueError, "key_size_input should be at least 1, got key_size_input=0"),
    ({"key_size_input": 8.0}, TypeError, "key_size_input should be of type int, got: float"),
    ({"value_size_input": 0}, ValueError, "value_size_input should be at least 1, got value_size_input=0"),
    ({"value_size_input": 8.5}, TypeError, "value_size_input should be of type int, got: float"),
    (
        {"query_size_input": 32},
        ValueError,
        "query_size_input should be None or equal to key_size_input=8, because queries and keys meet in a dot product, "
        "got query_size_input=32",
    ),
    ({"query_size_input": "64"}, ValueError, "query_size_input should be None or equal to key_size_input=8"),
    ({"num_input_heads": 0}, ValueError, "num_input_heads should be at least 1, got num_input_heads=0"),
    ({"num_input_heads": 2.0}, TypeError, "num_input_heads should be of type int, got: float"),
    ({"input_dropout": -0.1}, ValueError, "input_dropout should be a number in range [0, 1]"),
    ({"input_dropout": 1.1}, ValueError, "got input_dropout=1.1"),
    ({"input_dropout": True}, ValueError, "got input_dropout=True"),
    ({"input_dropout": None}, TypeError, "input_dropout should be a number in range [0, 1]"),
    ({"key_size_comm": 0}, ValueError, "key_size_comm should be at least 1, got key_size_comm=0"),
    ({"key_size_comm": "32"}, TypeError, "key_size_comm should be of type int, got: str"),
    ({"value_size_comm": -32}, ValueError, "value_size_comm should be at least 1, got value_size_comm=-32"),
    ({"value_size_comm": "32"}, TypeError, "value_size_comm should be of type int, got: str"),
    ({"query_size_comm": 16}, ValueError, "query_size_comm should be None or equal to key_size_comm=4"),
    ({"num_comm_heads": -1}, ValueError, "num_comm_heads should be at least 0, got num_comm_heads=-1"),
    ({"num_comm_heads": None}, TypeError, "num_comm_heads should be of type int, got: NoneType"),
    ({"comm_dropout": 2}, ValueError, "got comm_dropout=2"),
    ({"comm_dropout": float("nan")}, ValueError, "got comm_dropout=nan"),
    ({"comm_dropout": "0.1"}, ValueError, "got comm_dropout='0.1'"),
    ({"input_size": 0}, ValueError, "input_size should be at least 1, got input_size=0"),
    ({"hidden_size": -12}, ValueError, "hidden_size should be at least 1, got hidden_size=-12"),
    ({"hidden_size": "12"}, TypeError, "hidden_size should be of type int, got: str"),
    ({"bias": 1}, TypeError, "bias should be of type bool, got: int"),
    ({"units": 6}, TypeError, "unexpected keyword argument 'units'"),
]


@pytest.mark.parametrize("module", [RIM, RIMCell])
@pytest.mark.parametrize(("arguments", "error", "message"), OWN_ARGUMENTS, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_wrong_argument(module: type[nn.Module], arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)) as raised:
        module(**(SIZES | arguments))
    assert type(raised.value) is error


LAYER_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_layers": 0}, ValueError, "num_layers should be at least 1, got num_layers=0"),
    ({"num_layers": 1.5}, TypeError, "num_layers should be of type int, got: float"),
    ({"batch_first": "yes"}, TypeError, "batch_first should be of type bool, got: str"),
    ({"bidirectional": 2}, TypeError, "bidirectional should be of type bool, got: int"),
    ({"dropout": 1.5}, ValueError, "dropout should be a number in range [0, 1]"),
    ({"dropout": 1.5}, ValueError, "got dropout=1.5"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), LAYER_ARGUMENTS)
def test_wrong_argument_of_the_layer(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        RIM(**(SIZES | arguments))


X, H0 = torch.zeros(5, 3, 4), torch.zeros(1, 3, 12)

CALLS: list[tuple[str, Any, type[Exception], str]] = [
    ("a list", lambda: RIM(4, 12)([1.0]), TypeError, "Expected input to be a Tensor or a PackedSequence, got: list"),  # type: ignore
    ("path of a list", lambda: RIM(4, 12).path([1.0]), TypeError, "a Tensor or a PackedSequence, got: list"),  # type: ignore
    ("4-D", lambda: RIM(4, 12)(X[None]), ValueError, "Expected input to be 2D or 3D, got 4D"),
    ("features", lambda: RIM(5, 12)(X), RuntimeError, "must be equal to input_size. Expected 5, got 4"),
    (
        "dtype",
        lambda: RIM(4, 12)(X.double()),
        ValueError,
        "Convert input: input.to(torch.float32), or convert model: model.to(t",
    ),
    ("device", lambda: RIM(4, 12)(X.to("meta")), RuntimeError, "Move it: input.to('cpu'), or the model: model.to('meta')"),
    ("no step", lambda: RIM(4, 12)(X[:0]), RuntimeError, "larger than 0 in RIM, got input of size (0, 3, 4)"),
    ("lone state", lambda: RIM(4, 12)(X, H0), TypeError, "hx should be a tuple of two tensors (h_0, c_0), got: Tensor"),  # type: ignore
    ("None in it", lambda: RIM(4, 12)(X, (H0, None)), TypeError, "got: tuple of (Tensor, NoneType)"),  # type: ignore
    ("one state", lambda: RIM(4, 12)(X, (H0,)), TypeError, "hx should hold two states (h_0, c_0), got 1"),  # type: ignore
    ("three", lambda: RIM(4, 12)(X, (H0,) * 3), RuntimeError, "hx should hold two states (h_0, c_0), got 3"),  # type: ignore
    ("rank", lambda: RIM(4, 12)(X, (H0[0], H0)), RuntimeError, "For batched 3-D input, hx should be 3-D but got (2-D, 3-D)"),
    ("unbatched", lambda: RIM(4, 12)(X[:, 0], (H0, H0)), RuntimeError, "For unbatched 2-D input, hx should be 2-D"),
    ("rows", lambda: RIM(4, 12)(X[:, 1:], (H0, H0)), RuntimeError, "Expected h_0 size (1, 2, 12), got (1, 3, 12)"),
    ("c_0", lambda: RIM(4, 12)(X, (H0, H0[..., :6])), RuntimeError, "Expected c_0 size (1, 3, 12), got (1, 3, 6)"),
    ("projected", lambda: RIM(4, 12, proj_size=6)(X, (H0, H0)), RuntimeError, "Expected h_0 size (1, 3, 6), got (1, 3, 12)"),
    ("layers", lambda: RIM(4, 12, 2)(X, (H0, H0)), RuntimeError, "Expected h_0 size (2, 3, 12), got (1, 3, 12)"),
    ("c_0 dtype", lambda: RIM(4, 12)(X, (H0, H0.double())), RuntimeError, "Convert it: c_0.to(torch.float32), or the model"),
    ("GRU", lambda: RIM(4, 12, rnn_cell="GRU")(X, (H0, H0)), TypeError, "hx should be the tensor h_0, got: tuple"),  # type: ignore
    ("cell, 3-D", lambda: RIMCell(4, 12)(X), ValueError, "RIMCell: Expected input to be 1D or 2D, got 3D"),
    ("cell, features", lambda: RIMCell(5, 12)(X[0]), RuntimeError, "inconsistent input_size: got 4, expected 5"),
    ("cell, rank", lambda: RIMCell(4, 12)(X[0], (H0, H0)), ValueError, "RIMCell: Expected h_0 to be 1D or 2D, got 3D"),
    ("cell, rows", lambda: RIMCell(4, 12)(X[0], (H0[0], H0[0, :2])), RuntimeError, "Expected c_0 size (3, 12), got (2, 12)"),
    ("cell, one", lambda: RIMCell(4, 12)(X[0], (H0[0],)), RuntimeError, "hx should hold two states (h_0, c_0), got 1"),  # type: ignore
]


@pytest.mark.parametrize(("call", "error", "message"), [row[1:] for row in CALLS], ids=[row[0] for row in CALLS])
def test_wrong_call(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.parametrize("other", [nn.LSTM(4, 12), RIMCell(4, 12), RIM, None, nn.Sequential(RIM(4, 12)), "rnn"])
def test_record_of_something_else(other: Any) -> None:
    name, remedy = type(other).__name__, "pass the layer, for example record(model.rnn)"
    with pytest.raises(TypeError, match=re.escape(f"record() expects a rim_rnn.RIM, got: {name}; {remedy}")), record(other):
        pass


# ---------------------------------------------------------------- defaults

NUM_UNITS = {
    600: 6, 128: 4, 256: 4, 512: 4, 64: 4, 100: 5, 7: 7, 300: 6, 120: 6, 1024: 4, 510: 6, 8: 4, 4: 4, 2: 2, 3: 3, 50: 5, 49: 7,
    77: 7, 200: 5, 768: 6, 10: 5,
}  # fmt: skip


@pytest.mark.parametrize(("hidden_size", "num_units"), NUM_UNITS.items())
def test_default_num_units(hidden_size: int, num_units: int) -> None:
    """The divisor that is at most 8 and closest to 6, a tie going to the smaller one."""
    assert RIM(4, hidden_size, num_layers=2, device="meta").num_units == num_units
    assert RIMCell(4, hidden_size, device="meta").num_units == num_units


@pytest.mark.parametrize(
    ("hidden_size", "proj_size", "num_units"), [(600, 100, 5), (128, 96, 4), (12, 6, 6), (24, 14, 2), (120, 7 * 12, 6)]
)
def test_default_num_units_with_projections(hidden_size: int, proj_size: int, num_units: int) -> None:
    assert RIM(4, hidden_size, proj_size=proj_size, device="meta").num_units == num_units
    assert RIMCell(4, hidden_size, proj_size=proj_size, device="meta").num_units == num_units


@pytest.mark.parametrize(("num_units", "k"), {1: 1, 2: 2, 3: 2, 4: 3, 5: 4, 6: 4, 7: 5, 8: 6, 9: 6, 12: 8}.items())
def test_default_k(num_units: int, k: int) -> None:
    """Two thirds, rounded up."""
    assert RIM(4, 2520, num_units=num_units, device="meta").k == k
    assert RIMCell(4, 2520, num_units=num_units, device="meta").k == k


def test_other_defaults() -> None:
    for module in (RIM(4, 12), RIMCell(4, 12)):
        assert (module.num_units, module.k, module.rnn_cell) == (6, 4, "LSTM")
        assert (module.key_size_input, module.query_size_input, module.value_size_input) == (8, 8, 4 * 2)
        assert (module.num_input_heads, module.input_dropout) == (1, 0.0)
        assert (module.key_size_comm, module.query_size_comm, module.value_size_comm) == (4, 4, 4)
        assert (module.num_comm_heads, module.comm_dropout) == (4, 0.0)
    assert RIM(4, 12, num_units=2).value_size_input == 24


@pytest.mark.parametrize(
    ("unit", "key_size_input", "comm"),
    [
        (1, 8, 4),
        (16, 8, 4),
        (20, 16, 8),
        (32, 24, 12),
        (50, 32, 16),
        (64, 40, 20),
        (93, 56, 28),
        (94, 64, 32),
        (100, 64, 32),
        (200, 64, 32),
    ],
)
def test_default_sizes_go_by_the_unit(unit: int, key_size_input: int, comm: int) -> None:
    """The paper's at its unit of 100, whatever the input; smaller keys, and values of the communication, below."""
    for module in (RIM(4, 6 * unit, device="meta"), RIM(300, 6 * unit, rnn_cell="GRU", device="meta")):
        assert (module.key_size_input, module.value_size_input) == (key_size_input, 4 * unit)
        assert (module.key_size_comm, module.value_size_comm, module.num_comm_heads) == (comm, comm, 4)


def test_query_sizes_equal_to_key_sizes_are_accepted() -> None:
    module = RIM(4, 12, key_size_input=7, query_size_input=7, key_size_comm=5, query_size_comm=5)
    assert (module.query_size_input, module.query_size_comm) == (7, 5)


@pytest.mark.parametrize("make", [RIM, RIMCell])
@pytest.mark.parametrize(
    ("hidden_size", "proj_size", "message"),
    [
        (13, 0, "hidden_size=13 has no divisor from 2 to 8, so num_units=1"),
        (11 * 13, 0, "hidden_size=143 has no divisor from 2 to 8"),
        (1, 0, "hidden_size=1 has no divisor"),
        (12, 7, "hidden_size=12 and proj_size=7 have no common divisor from 2 to 8, so num_units=1"),
    ],
)
def test_a_single_unit_warns_at_the_callers_line(make: Any, hidden_size: int, proj_size: int, message: str) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        module = make(4, hidden_size, proj_size=proj_size)  # the caller's line
    assert module.num_units == module.k == 1
    (warning,) = caught
    assert warning.filename == __file__
    assert linecache.getline(warning.filename, warning.lineno).rstrip().endswith("# the caller's line")


def test_a_single_unit_that_was_asked_for_does_not_warn() -> None:
    assert RIM(4, 13, num_units=1).num_units == 1
    assert RIM(4, 13, num_units=13).num_units == 13


def test_dropout_of_one_layer_warns_at_the_callers_line() -> None:
    with pytest.warns(UserWarning, match="num_layers greater than 1, but got dropout=0.5 and num_layers=1") as caught:
        RIM(4, 12, dropout=0.5)  # the caller's line
    (warning,) = caught
    assert linecache.getline(warning.filename, warning.lineno).rstrip().endswith("# the caller's line")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RIM(4, 12, 2, dropout=0.5)


def test_no_parameter_is_drawn_before_every_argument_is_checked() -> None:
    """A wrong call does not move the random generator."""
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="comm_dropout"):
        RIM(4, 12, comm_dropout=3)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", [RIM, RIMCell])
def test_numbers_that_no_step_can_compare_are_refused(kind: type[Any]) -> None:
    """Complex ones have no order, so that no bid could win; nn.LSTM takes them. Nor does torch's take sparse ones."""
    x = torch.randn(3, 4)
    with pytest.raises(
        RuntimeError, match=r"input should be strided and of real numbers, got torch\.strided and torch\.complex64"
    ):
        kind(4, 12, dtype=torch.complex64)(x.to(torch.complex64))
    with pytest.raises(RuntimeError, match=r"input should be strided and of real numbers, got torch\.sparse_coo"):
        kind(4, 12)(x.to_sparse())


@pytest.mark.parametrize("k", [0, 7, -1])
@pytest.mark.parametrize("path", [nullcontext, native.readable])
def test_a_k_that_was_assigned_is_checked_when_it_is_used(k: int, path: Any) -> None:
    rnn = RIM(4, 12)
    rnn.cells[0].k = k
    with path(), pytest.raises((ValueError, RuntimeError), match=f"k should be from 1 to 6, got {k}"):
        rnn(X)
