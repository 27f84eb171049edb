"""At home outside Python: ONNX and AOTInductor packages give what the layer gives."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import strong
from test_tools import shown
from torch import Tensor, nn

from rim_rnn import RIM

pytestmark = pytest.mark.tools
SMALL: dict[str, Any] = {"key_size_input": 4, "key_size_comm": 3, "value_size_comm": 2, "num_comm_heads": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "GRU": {"rnn_cell": "GRU", "num_input_heads": 2},
    "LSTM": {"proj_size": 4, "bias": False, "bidirectional": True, "batch_first": True, "num_comm_heads": 0},
}
"""Every option once."""


def layer(**options: Any) -> RIM[Any]:
    """Three inputs, four units of two, two of them active."""
    return strong(RIM(3, 8, **({"num_units": 4, "k": 2} | SMALL | options)), scale=0.4).eval()


def flat(result: Any) -> list[Tensor]:
    """Output and states as a list, as exported programs return them."""
    output, state = result if isinstance(result, tuple) else (result, ())
    return [output, *(state if isinstance(state, tuple) else (state,))]


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
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        torch.onnx.export(module, inputs, path, dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False)
        self.load(path)

    def load(self, path: Path) -> Session:
        """Go on with another file."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return self

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        names = [given.name for given in self.session.get_inputs()]
        results = self.session.run(None, {n: t.numpy() for n, t in zip(names, inputs, strict=True)})
        return [torch.from_numpy(result) for result in results]


def assert_near(actual: list[Tensor], expected: Any) -> None:
    torch.testing.assert_close(actual, flat(expected), rtol=1e-5, atol=1e-5)


onnx_noise = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:onnxscript",
    "ignore::FutureWarning:onnxscript",
    "ignore:.*isinstance.treespec, LeafSpec:FutureWarning",
    "ignore:# The axis name",
)


@onnx_noise
@pytest.mark.parametrize(
    "options", [{"num_layers": 2}, {"rnn_cell": "GRU", "bidirectional": True, "batch_first": True}], ids=str
)
def test_onnx(options: dict[str, Any], tmp_path: Path) -> None:
    """In onnxruntime, with other numbers and another batch than those of the export, and with a first state."""
    rnn, batch = layer(**options), torch.export.Dim("batch", min=2, max=64)
    dims = ({0 if rnn.batch_first else 1: batch}, {1: batch} if rnn.mode == "GRU" else ({1: batch}, {1: batch}))
    session = Session(rnn, (torch.randn(shape(rnn, 2, 5)), states(rnn, 5)), dims, tmp_path / "rnn.onnx")
    x, hx = torch.randn(shape(rnn, 2, 7)), states(rnn, 7)
    assert_near(session(x, *(hx if rnn.mode == "LSTM" else (hx,))), rnn(x, hx))


@onnx_noise
@pytest.mark.parametrize("name", OPTIONS)
def test_onnx_takes_any_number_of_steps(name: str, tmp_path: Path) -> None:
    """Time and batch both dynamic: one file for sequences of any length.

    Without biases and states all first bids are equal; the GRU's first states are given.
    """
    rnn = layer(**OPTIONS[name])
    steps, batch = torch.export.Dim("steps", min=2, max=4096), torch.export.Dim("batch", min=2, max=64)
    dims, given = dict(enumerate((batch, steps) if rnn.batch_first else (steps, batch))), name == "GRU"
    example = (torch.randn(4, 5, 3), *([states(rnn, 5)] if given else []))
    session = Session(rnn, example, (dims, {1: batch})[: len(example)], tmp_path / "rnn.onnx")
    for t, n in ((4, 5), (9, 3), (40, 2)):
        inputs = (torch.randn(shape(rnn, t, n)), *([states(rnn, n)] if given else []))
        assert_near(session(*inputs), rnn(*inputs))


@onnx_noise
@pytest.mark.parametrize("rnn_cell", ["LSTM", "GRU"])
def test_onnx_cell_for_streams(rnn_cell: str, tmp_path: Path) -> None:
    """A step in onnxruntime, called again with the states it returned, is the layer over the sequence; ties go the same way."""
    rnn = layer(rnn_cell=rnn_cell, bias=False)
    zeros = [torch.zeros(2, 8) for _ in range(2 if rnn_cell == "LSTM" else 1)]
    session = Session(
        rnn.cells[0], (torch.randn(2, 3), tuple(zeros) if len(zeros) == 2 else zeros[0]), None, tmp_path / "cell.onnx"
    )
    x, state = torch.randn(6, 2, 3), zeros
    for t, expected in enumerate(rnn(x)[0]):
        state = session(x[t], *state)
        torch.testing.assert_close(state[0], expected, rtol=1e-5, atol=1e-5)
        if t == 0:  # zero states and no biases: all bids are 0
            assert state[0].view(2, 4, 2).ne(0).any(-1).tolist() == [[True, True, False, False]] * 2


@onnx_noise
@pytest.mark.filterwarnings("ignore::DeprecationWarning:onnx")
def test_onnx_quantised_around_the_layer(tmp_path: Path) -> None:
    """int8 for the read-out and float32 for the layer: its output is what it was; quantised as a whole, others win."""
    quantization = pytest.importorskip("onnxruntime.quantization")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = layer(), nn.Linear(8, 16)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            output, _ = self.rnn(x)
            return output, self.head(output)

    model, x = Model().eval(), torch.randn(9, 32, 3)
    path, dims = tmp_path / "model.onnx", ({0: torch.export.Dim("steps", min=2, max=64)},)
    session = Session(model, (x,), dims, path)
    expected = model(x)
    assert_near(session(x), expected)
    for nodes in ([], shown("nodes_of_rim")(path)):
        quantization.quantize_dynamic(path, tmp_path / "int8.onnx", nodes_to_exclude=nodes)
        output, read = session.load(tmp_path / "int8.onnx")(x)
        near = (output - expected[0]).abs().max() < 1e-5
        assert near == bool(nodes)
        assert (read - expected[1]).abs().max() > 1e-4  # of either, for the read-out is quantised
    torch.testing.assert_close(read, expected[1], rtol=0.1, atol=0.1)


# AOTInductor


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="no C++ compiler")
def test_aot_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.export, compiled ahead of time into a package, loaded: eager's numbers, also for another batch."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    rnn, batch = layer(), torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(rnn, (torch.randn(2, 5, 3),), dynamic_shapes=({1: batch},))
    fast_to_build = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "rnn.pt2"), inductor_configs=fast_to_build
    )
    run = torch._inductor.aoti_load_package(path)
    for n in (5, 7):
        x = torch.randn(2, n, 3)
        assert_near(flat(run(x)), rnn(x))
