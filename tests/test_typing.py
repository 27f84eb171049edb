"""What a type checker knows: packed in is packed out, and the kind of cell decides the kind of state.

mypy runs once over the lines below. `assert_type` fails where the inferred type is another one, and a line that ends in
`# error: <code>` must give exactly that error.
"""

import re
from pathlib import Path

import pytest

api = pytest.importorskip("mypy.api")

RIGHT = """
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import assert_type

import rim_rnn
from rim_rnn import RIM, RIMCell, record

x: Tensor = torch.zeros(5, 3, 4)
h: Tensor = torch.zeros(1, 3, 12)
packed: PackedSequence = nn.utils.rnn.pack_sequence([torch.zeros(5, 4)])

# The layer, LSTM.
rnn = RIM(4, 12)
assert_type(rnn, RIM[tuple[Tensor, Tensor]])
assert_type(rnn(x), tuple[Tensor, tuple[Tensor, Tensor]])
assert_type(rnn(x, (h, h)), tuple[Tensor, tuple[Tensor, Tensor]])
assert_type(rnn(x, [h, h]), tuple[Tensor, tuple[Tensor, Tensor]])
assert_type(rnn(packed, [h, h]), tuple[PackedSequence, tuple[Tensor, Tensor]])
assert_type(rnn(x, None), tuple[Tensor, tuple[Tensor, Tensor]])
assert_type(rnn(input=x, hx=(h, h)), tuple[Tensor, tuple[Tensor, Tensor]])
assert_type(rnn(packed), tuple[PackedSequence, tuple[Tensor, Tensor]])
assert_type(rnn(packed, (h, h)), tuple[PackedSequence, tuple[Tensor, Tensor]])
assert_type(rnn.forward(x), tuple[Tensor, tuple[Tensor, Tensor]])
assert_type(rnn.forward(packed), tuple[PackedSequence, tuple[Tensor, Tensor]])
assert_type(RIM(4, 12, 2, True, False, 0.5, True, 6, "cpu", torch.float64, rnn_cell="LSTM"), RIM[tuple[Tensor, Tensor]])
output, (h_n, c_n) = rnn(x)
assert_type(c_n, Tensor)

# The layer, GRU.
gru = RIM(4, 12, num_layers=2, rnn_cell="GRU")
assert_type(gru, RIM[Tensor])
assert_type(gru(x), tuple[Tensor, Tensor])
assert_type(gru(x, h), tuple[Tensor, Tensor])
assert_type(gru(packed, h), tuple[PackedSequence, Tensor])

# A kind that is known at run time alone.
kind: str = "GRU"
some = RIM(4, 12, rnn_cell=kind)
assert_type(some, RIM[Any])
assert_type(some(x), tuple[Tensor, Any])

# Every keyword, and what the attributes are.
full = RIM(
    4, 12, num_units=6, k=4, rnn_cell="GRU", key_size_input=64, value_size_input=8, query_size_input=64, num_input_heads=1,
    input_dropout=0.1, key_size_comm=32, value_size_comm=32, query_size_comm=None, num_comm_heads=4, comm_dropout=0.1,
)
assert_type(full.num_units, int)
assert_type(full.k, int)
assert_type(full.rnn_cell, str)
assert_type(full.hidden_size, int)
assert_type(full.dropout, float)
assert_type(full.bidirectional, bool)
assert_type(full.input_dropout, float)
assert_type(full.value_size_comm, int)
assert_type(full.mode, str)
assert_type(full.all_weights, list[list[nn.Parameter]])
assert_type(full.eval(), RIM[Tensor])
assert_type(full.to(torch.float64), RIM[Tensor])
nn.Sequential(nn.Linear(2, 4), full)

# The cell.
cell = RIMCell(4, 12)
assert_type(cell, RIMCell[tuple[Tensor, Tensor]])
assert_type(cell(x), tuple[Tensor, Tensor])
assert_type(cell(x, (h, h)), tuple[Tensor, Tensor])
assert_type(cell(x, [h, h]), tuple[Tensor, Tensor])
assert_type(cell(input=x, hx=None), tuple[Tensor, Tensor])
assert_type(RIMCell(4, 12, False, "cpu", None, proj_size=6, num_units=3, k=2), RIMCell[tuple[Tensor, Tensor]])
gru_cell = RIMCell(4, 12, rnn_cell="GRU")
assert_type(gru_cell, RIMCell[Tensor])
assert_type(gru_cell(x, h), Tensor)
assert_type(RIMCell(4, 12, rnn_cell=kind)(x), Any)

# record.
with record(rnn) as records:
    rnn(x)
assert_type(records[0].active, Tensor)
assert_type(records[0].communication, Tensor)
with record(gru):
    pass
assert_type(rim_rnn.__version__, str)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = RIM(4, 12, batch_first=True)

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return self.rnn(x, hx)


class Wide(RIM[Tensor]):
    def __init__(self) -> None:
        super().__init__(4, 120, rnn_cell="GRU")


assert_type(Wide()(packed), tuple[PackedSequence, Tensor])
"""

WRONG = """
rnn(x, h)  # error: call-overload
rnn(x, (h, h, h))  # error: arg-type
rnn([1.0])  # error: call-overload
gru(x, (h, h))  # error: call-overload
cell(x, h)  # error: arg-type
gru_cell(x, (h, h))  # error: arg-type
RIM(4)  # error: call-overload
RIM(4, 12, units=6)  # error: call-overload
RIM(4, 12, k="4")  # error: call-overload
RIM(4, 12, 1, True, False, 0.5, False, 0, None, None, 6)  # error: call-overload
record(x)  # error: arg-type
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The code of the error that mypy found, by line."""
    folder = tmp_path_factory.mktemp("typing")
    (folder / "snippet.py").write_text(RIGHT + WRONG)
    root = Path(__file__).parents[1]  # its options and its cache, so that torch is read once for all
    options = ["--config-file", str(root / "pyproject.toml"), "--cache-dir", str(root / ".mypy_cache")]
    report, complaint, _ = api.run([*options, str(folder / "snippet.py")])
    assert not complaint
    errors = re.findall(r"snippet\.py:(\d+): error: .*\[([\w-]+)\]$", report, flags=re.MULTILINE)
    assert errors, report
    return {int(line): code for line, code in errors}


def lines(text: str, first: int) -> list[tuple[int, str]]:
    return list(enumerate(text.splitlines(), first))


def test_right_code_passes(found: dict[int, str]) -> None:
    complaints = [f"{line}: {source}  [{found[line]}]" for line, source in lines(RIGHT, 1) if line in found]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(("line", "source"), [(line, source) for line, source in lines(WRONG, 1 + RIGHT.count("\n")) if source])
def test_wrong_code_does_not(found: dict[int, str], line: int, source: str) -> None:
    assert found.get(line) == source.partition("# error: ")[2]
