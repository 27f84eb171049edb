"""The checkpoint contract: names, shapes and initialisation of the parameters, and files that old versions have written.

Run as a script, this file writes the fixture of the installed version (`python tests/test_checkpoint.py`). A fixture is
written once, when its version is released, and never again: what it holds has to load and to compute the same for ever.
"""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import rim_rnn
from rim_rnn import RIM, RIMCell

FIXTURES = Path(__file__).parent / "fixtures"

# ---------------------------------------------------------------- names and shapes

# By hand from these sizes: num_units n = 3, hidden_size 12 so u = 4, p = u or proj_size / n = 2; input_size 5; two input heads
# of key size 7 (d_q = 14) and value size 9 (d_v = 18); four communication heads of key size 2 (e = 8), value size 6 (w = 24).
SIZES: dict[str, Any] = {
    "num_units": 3,
    "num_input_heads": 2,
    "key_size_input": 7,
    "value_size_input": 9,
    "num_comm_heads": 4,
    "key_size_comm": 2,
    "value_size_comm": 6,
}

LSTM = {
    "input_attention.query.weight": (3, 4, 14),
    "input_attention.query.bias": (3, 14),
    "input_attention.key.weight": (14, 5),
    "input_attention.key.bias": (14,),
    "input_attention.value.weight": (18, 5),
    "input_attention.value.bias": (18,),
    "dynamics.weight_ih": (3, 18, 16),
    "dynamics.weight_hh": (3, 4, 16),
    "dynamics.bias_ih": (3, 16),
    "dynamics.bias_hh": (3, 16),
    "communication.query.weight": (3, 4, 8),
    "communication.key.weight": (3, 4, 8),
    "communication.value.weight": (3, 4, 24),
    "communication.output.weight": (3, 24, 4),
}
GRU = LSTM | {
    "dynamics.weight_ih": (3, 18, 12),
    "dynamics.weight_hh": (3, 4, 12),
    "dynamics.bias_ih": (3, 12),
    "dynamics.bias_hh": (3, 12),
}
PROJECTED = LSTM | {
    "input_attention.query.weight": (3, 2, 14),
    "dynamics.weight_hh": (3, 2, 16),
    "dynamics.weight_hr": (3, 4, 2),
    "communication.query.weight": (3, 2, 8),
    "communication.key.weight": (3, 2, 8),
    "communication.value.weight": (3, 2, 24),
    "communication.output.weight": (3, 24, 2),
}
NO_BIAS = {
    "input_attention.query.weight": (3, 4, 14),
    "input_attention.key.weight": (14, 5),
    "input_attention.value.weight": (18, 5),
    "dynamics.weight_ih": (3, 18, 16),
    "dynamics.weight_hh": (3, 4, 16),
    "communication.query.weight": (3, 4, 8),
    "communication.key.weight": (3, 4, 8),
    "communication.value.weight": (3, 4, 24),
    "communication.output.weight": (3, 24, 4),
}
NO_COMMUNICATION = {
    "input_attention.query.weight": (3, 4, 14),
    "input_attention.query.bias": (3, 14),
    "input_attention.key.weight": (14, 5),
    "input_attention.key.bias": (14,),
    "input_attention.value.weight": (18, 5),
    "input_attention.value.bias": (18,),
    "dynamics.weight_ih": (3, 18, 16),
    "dynamics.weight_hh": (3, 4, 16),
    "dynamics.bias_ih": (3, 16),
    "dynamics.bias_hh": (3, 16),
}
DEFAULTS = {  # 4 features in, 12 in all: six units of two
    "input_attention.query.weight": (6, 2, 8),
    "input_attention.query.bias": (6, 8),
    "input_attention.key.weight": (8, 4),
    "input_attention.key.bias": (8,),
    "input_attention.value.weight": (8, 4),
    "input_attention.value.bias": (8,),
    "dynamics.weight_ih": (6, 8, 8),
    "dynamics.weight_hh": (6, 2, 8),
    "dynamics.bias_ih": (6, 8),
    "dynamics.bias_hh": (6, 8),
    "communication.query.weight": (6, 2, 16),
    "communication.key.weight": (6, 2, 16),
    "communication.value.weight": (6, 2, 16),
    "communication.output.weight": (6, 16, 2),
}
STACKED = {  # the cells of the second layer read what both directions of the first say: 24 features
    **{f"cells.0.{name}": shape for name, shape in LSTM.items()},
    **{f"cells.1.{name}": shape for name, shape in LSTM.items()},
    **{f"cells.2.{name}": shape for name, shape in LSTM.items()},
    **{f"cells.3.{name}": shape for name, shape in LSTM.items()},
    "cells.2.input_attention.key.weight": (14, 24),
    "cells.2.input_attention.value.weight": (18, 24),
    "cells.3.input_attention.key.weight": (14, 24),
    "cells.3.input_attention.value.weight": (18, 24),
}
STACKED_PROJECTED = {
    **{f"cells.0.{name}": shape for name, shape in PROJECTED.items()},
    **{f"cells.1.{name}": shape for name, shape in PROJECTED.items()},
    "cells.1.input_attention.key.weight": (14, 6),
    "cells.1.input_attention.value.weight": (18, 6),
}


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def of_one_cell(table: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"cells.0.{name}": shape for name, shape in table.items()}


@pytest.mark.parametrize(
    ("options", "table"),
    [
        (SIZES, LSTM),
        (SIZES | {"rnn_cell": "GRU"}, GRU),
        (SIZES | {"proj_size": 6}, PROJECTED),
        (SIZES | {"bias": False}, NO_BIAS),
        (SIZES | {"num_comm_heads": 0}, NO_COMMUNICATION),
    ],
    ids=["LSTM", "GRU", "projected", "no bias", "no communication"],
)
def test_names_and_shapes(options: dict[str, Any], table: dict[str, tuple[int, ...]]) -> None:
    assert shapes(RIMCell(5, 12, **options)) == table
    assert shapes(RIM(5, 12, **options)) == of_one_cell(table)


def test_names_and_shapes_by_default() -> None:
    assert shapes(RIMCell(4, 12)) == DEFAULTS
    assert shapes(RIM(4, 12)) == of_one_cell(DEFAULTS)


def test_names_and_shapes_of_layers_and_directions() -> None:
    assert shapes(RIM(5, 12, 2, bidirectional=True, **SIZES)) == STACKED
    assert shapes(RIM(5, 12, 2, proj_size=6, **SIZES)) == STACKED_PROJECTED


def test_every_tensor_is_a_parameter() -> None:
    rnn = RIM(5, 12, 2, bidirectional=True, proj_size=6, **SIZES)
    assert list(rnn.state_dict()) == [name for name, _ in rnn.named_parameters()]


def test_k_and_dropouts_are_no_part_of_a_checkpoint() -> None:
    """A layer may be trained with one k and dropout and go on with others."""
    RIM(5, 12, **SIZES, k=1, input_dropout=0.1).load_state_dict(RIM(5, 12, **SIZES, k=3, comm_dropout=0.1).state_dict())


# ---------------------------------------------------------------- initialisation

# num_units 4, hidden_size 100 (u = 25), proj_size 64 (p = 16), input_size 9, w = 4 * 64: every fan_in has a whole root.
BOUNDS = {
    "input_attention.query.weight": 1 / 4,
    "input_attention.query.bias": 1 / 4,
    "input_attention.key.weight": 1 / 3,
    "input_attention.key.bias": 1 / 3,
    "input_attention.value.weight": 2 / 3,
    "input_attention.value.bias": 1 / 3,
    "dynamics.weight_ih": 1 / 5,
    "dynamics.weight_hh": 1 / 5,
    "dynamics.bias_ih": 1 / 5,
    "dynamics.bias_hh": 1 / 5,
    "dynamics.weight_hr": 1 / 5,
    "communication.query.weight": 1 / 4,
    "communication.key.weight": 1 / 4,
    "communication.value.weight": 1 / 4,
    "communication.output.weight": 1 / 16,
}


@pytest.mark.parametrize("again", [False, True], ids=["constructed", "reset_parameters"])
def test_initialisation(again: bool) -> None:
    """Uniform between the bounds: nothing beyond, something near each of them, and the variance of a uniform draw."""
    cell = RIMCell(9, 100, proj_size=64, num_units=4, value_size_comm=64)
    if again:
        for parameter in cell.parameters():
            torch.nn.init.constant_(parameter, 100.0)
        cell.reset_parameters()
    assert {name for name, _ in cell.named_parameters()} == set(BOUNDS)
    for name, parameter in cell.named_parameters():
        bound, values = BOUNDS[name], parameter.detach()
        assert values.abs().max() <= bound, name
        near = 1 - 20 / values.numel()  # one chance in 22,000 to draw nothing beyond, whatever the size
        assert values.max() > near * bound, name
        assert values.min() < -near * bound, name
        if values.numel() > 1000:
            assert float(values.var()) == pytest.approx(bound**2 / 3, rel=0.15), name


@pytest.mark.parametrize("rnn_cell", ["LSTM", "GRU"])
def test_one_seed_gives_one_model(rnn_cell: str) -> None:
    def make(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return RIM(5, 12, 2, bidirectional=True, rnn_cell=rnn_cell, **SIZES).state_dict()

    first, again, other = make(1), make(1), make(2)
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name]), name
        assert not torch.equal(parameter, other[name]), name


def test_reset_parameters_draws_as_the_constructor_does() -> None:
    torch.manual_seed(1)
    rnn = RIM(5, 12, 2, **SIZES)
    first = {name: parameter.clone() for name, parameter in rnn.state_dict().items()}
    torch.manual_seed(1)
    rnn.reset_parameters()
    assert_close(dict(rnn.state_dict()), first, rtol=0, atol=0)


# ---------------------------------------------------------------- files of old versions

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "LSTM": {
        **{"input_size": 3, "hidden_size": 6, "num_layers": 2, "bidirectional": True, "proj_size": 3},
        **{"num_units": 3, "k": 2, "num_input_heads": 2, "key_size_input": 2, "value_size_input": 2},
        **{"num_comm_heads": 2, "key_size_comm": 2, "value_size_comm": 2},
    },
    "GRU": {
        **{"input_size": 3, "hidden_size": 6, "num_layers": 2, "bidirectional": True, "rnn_cell": "GRU"},
        **{"num_units": 3, "k": 2, "key_size_input": 2, "value_size_input": 3, "bias": False},
        **{"num_comm_heads": 2, "key_size_comm": 2, "value_size_comm": 3},
    },
    "printed": {
        **{"input_size": 3, "hidden_size": 6, "num_units": 3, "k": 2, "rnn_cell": "GRU", "comm_bounded": False},
        **{"key_size_input": 2, "value_size_input": 3, "num_comm_heads": 2, "key_size_comm": 2, "value_size_comm": 3},
    },
    "pickled": {
        **{"input_size": 3, "hidden_size": 6, "batch_first": True, "num_units": 3, "k": 2},
        **{"key_size_input": 2, "value_size_input": 2, "num_comm_heads": 1, "key_size_comm": 2, "value_size_comm": 2},
    },
}


def tensors(nested: Any) -> list[Tensor]:
    return [nested] if isinstance(nested, Tensor) else [tensor for part in nested for tensor in tensors(part)]


def views_of_one_tensor(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in one storage, which takes one record in a file."""
    parts = torch.cat([t.flatten() for t in state_dict.values()]).split([t.numel() for t in state_dict.values()])
    return {name: part.view_as(t) for part, (name, t) in zip(parts, state_dict.items(), strict=True)}


def write_fixture(path: Path) -> None:
    """All that a later version needs to prove that it computes the same; beside it the last of the layers, pickled whole."""
    torch.manual_seed(0)
    content = {}
    for name, arguments in CONFIGURATIONS.items():
        rnn = RIM(**arguments, dtype=torch.float64)
        with torch.no_grad():
            for parameter in rnn.parameters():
                parameter.mul_(3)  # bids well apart, gates well bent
            output, state = rnn(x := torch.randn(4, 2, 3, dtype=torch.float64))
        content[name] = {
            "arguments": arguments,
            "state_dict": views_of_one_tensor(rnn.state_dict()),
            "input": x,
            "output": output,
            "state": tensors(state),
        }
    torch.save(content, path)
    path.with_suffix(".pickle").write_bytes(pickle.dumps(rnn))


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.pt")), ids=lambda path: path.stem)
def test_replay(path: Path, name: str) -> None:
    """What an old version computed from these parameters is what this one computes."""
    old = torch.load(path, weights_only=True)[name]
    rnn = RIM(**old["arguments"], dtype=torch.float64)
    rnn.load_state_dict(old["state_dict"])
    output, state = rnn(old["input"])
    assert_close(output, old["output"], rtol=1e-12, atol=1e-12)
    assert_close(tensors(state), old["state"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.pickle")), ids=lambda path: path.stem)
def test_unpickle(path: Path) -> None:
    """A module pickled whole under an old version loads and computes the same."""
    old = torch.load(path.with_suffix(".pt"), weights_only=True)["pickled"]
    rnn = pickle.loads(path.read_bytes())
    assert isinstance(rnn, RIM)
    assert rnn.batch_first
    output, state = rnn(old["input"])
    assert_close(output, old["output"], rtol=1e-12, atol=1e-12)
    assert_close(tensors(state), old["state"], rtol=1e-12, atol=1e-12)


def test_there_are_fixtures() -> None:
    assert {"0.1.0.pt", "0.1.0.pickle"} <= {path.name for path in FIXTURES.iterdir()}


if __name__ == "__main__":
    target = FIXTURES / f"{rim_rnn.__version__}.pt"
    if target.exists():
        raise SystemExit(f"{target} exists, and a fixture is never written again")
    write_fixture(target)
