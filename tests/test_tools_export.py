"""At home outside Python: ONNX and AOTInductor packages give what the layer gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import strong
from torch import Tensor, nn

from rim_rnn import RIM, RIMCell

pytestmark = pytest.mark.tools
SMALL: dict[str, Any] = {"key_size_input": 4, "key_size_comm": 3, "value_size_comm": 2, "num_comm_heads": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "LSTM": {},
    "GRU": {"rnn_cell": "GRU"},
    "no bias": {"bias": False},
    "dense": {"k": 4},
    "heads": {"num_input_heads": 2},
    "no comm": {"num_comm_heads": 0},
    "proj": {"proj_size": 4},
    "layers": {"num_layers": 2},
    "directions": {"bidirectional": True},
    "batch first": {"batch_first": True},
    "all": {"num_layers": 2, "bidirectional": True, "batch_first": True, "rnn_cell": "GRU"},
}


def layer(**options: Any) -> RIM[Any]:
    """Three inputs, four units of two, two of them active."""
    return strong(RIM(3, 8, **({"num_units": 4, "k": 2} | SMALL | options)), scale=0.4).eval()


def flat(result: Any) -> list[Tensor]:
    """Output and states as a list, as exported programs return them."""
    return [part for part in torch.utils._pytree.tree_leaves(result)]


def shape(rnn: RIM[Any], steps: int, batch: int) -> tuple[int, ...]:
    return (batch, steps, 3) if rnn.batch_first else (steps, batch, 3)


def states(rnn: RIM[Any], batch: int) -> Any:
    sizes = [rnn.proj_size or rnn.hidden_size, rnn.hidden_size][: 2 if rnn.mode == "LSTM" else 1]
    drawn = tuple(torch.randn(len(rnn.cells), batch, size) for size in sizes)
    return drawn if rnn.mode == "LSTM" else drawn[0]


# ONNX


class Session:
    """A module in onnxruntime: it is exported once, and called with tensors."""

    def __init__(self, module: nn.Module, inputs: tuple[Any, ...], dynamic_shapes: Any, path: Path) -> None:
        onnxruntime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        torch.onnx.export(module, inputs, path, dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        names = [given.name for given in self.session.get_inputs()]
        results = self.session.run(None, {n: t.numpy() for n, t in zip(names, flat(inputs), strict=True)})
        return [torch.from_numpy(result) for result in results]


def assert_near(actual: list[Tensor], expected: Any) -> None:
    torch.testing.assert_close(actual, flat(expected), rtol=1e-5, atol=1e-5)


onnx_noise = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:onnxscript",
    "ignore::FutureWarning:onnxscript",
    "ignore:.*isinstance.treespec, LeafSpec:FutureWarning",
)


@onnx_noise
@pytest.mark.parametrize("name", OPTIONS)
def test_onnx(name: str, tmp_path: Path) -> None:
    """Another batch than the one of the export, in onnxruntime; without a first state and with one."""
    rnn = layer(**OPTIONS[name])
    batch, axis = torch.export.Dim("batch", min=2, max=64), 0 if rnn.batch_first else 1
    session = Session(rnn, (torch.randn(shape(rnn, 4, 5)),), ({axis: batch},), tmp_path / "rnn.onnx")
    x = torch.randn(shape(rnn, 4, 7))
    assert_near(session(x), rnn(x))

    hx = states(rnn, 5)
    given = ({1: batch}, {1: batch}) if rnn.mode == "LSTM" else {1: batch}
    session = Session(rnn, (torch.randn(shape(rnn, 4, 5)), hx), ({axis: batch}, given), tmp_path / "given.onnx")
    hx = states(rnn, 7)
    assert_near(session(x, hx), rnn(x, hx))


@onnx_noise
@pytest.mark.parametrize("name", ["LSTM", "GRU", "all"])
def test_onnx_takes_any_number_of_steps(name: str, tmp_path: Path) -> None:
    """Time and batch both dynamic: one file for sequences of any length."""
    rnn = layer(**OPTIONS[name])
    steps, batch = torch.export.Dim("steps", min=2, max=4096), torch.export.Dim("batch", min=2, max=64)
    dims = (batch, steps) if rnn.batch_first else (steps, batch)
    session = Session(rnn, (torch.randn(shape(rnn, 4, 5)),), (dict(enumerate(dims)),), tmp_path / "rnn.onnx")
    for t, n in ((4, 5), (9, 3), (40, 2)):
        x = torch.randn(shape(rnn, t, n))
        assert_near(session(x), rnn(x))


@onnx_noise
@pytest.mark.parametrize("rnn_cell", ["LSTM", "GRU"])
def test_onnx_cell_for_streams(rnn_cell: str, tmp_path: Path) -> None:
    """A cell's step in onnxruntime, called again and again with the state it returned, is the layer over the sequence."""
    rnn = layer(rnn_cell=rnn_cell)
    cell: RIMCell[Any] = rnn.cells[0]
    hx = tuple(torch.zeros(2, 8) for _ in range(2 if rnn_cell == "LSTM" else 1))
    session = Session(cell, (torch.randn(2, 3), hx if rnn_cell == "LSTM" else hx[0]), None, tmp_path / "cell.onnx")
    x = torch.randn(6, 2, 3)
    state = list(hx)
    for t, expected in enumerate(rnn(x)[0]):
        state = session(x[t], *state)
        torch.testing.assert_close(state[0], expected, rtol=1e-5, atol=1e-5)


@onnx_noise
def test_onnx_ties_go_to_the_lowest_unit(tmp_path: Path) -> None:
    """Without biases and states all bids of the first step are 0: the file, too, lets the first units win."""
    rnn = layer(bias=False)
    x = torch.randn(1, 5, 3)
    session = Session(rnn, (x,), None, tmp_path / "rnn.onnx")
    output = session(x)[0]
    assert output.view(5, 4, 2).ne(0).any(-1).tolist() == [[True, True, False, False]] * 5
    assert_near(session(x), rnn(x))


# AOTInductor


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_aot_inductor(name: str, tmp_path: Path) -> None:
    """torch.export, compiled ahead of time into a package, loaded: eager's numbers for another batch, winners included."""
    inductor = pytest.importorskip("torch._inductor")
    rnn = layer(**OPTIONS[name])
    x, batch = torch.randn(3, 5, 3), torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(rnn, (x,), dynamic_shapes=({1: batch},))
    with torch.no_grad():
        package = inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "rnn.pt2"))
        run = inductor.aoti_load_package(package)
        for n in (5, 7):
            x = torch.randn(3, n, 3)
            torch.testing.assert_close(flat(run(x)), flat(rnn(x)), rtol=1e-4, atol=1e-5)
