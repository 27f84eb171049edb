"""`python -m rim_rnn`: it names what a bug report needs, and fails where the two paths differ."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rim_rnn
import rim_rnn.__main__ as program
from rim_rnn import native

needs_native = pytest.mark.skipif(native._unavailable is not None, reason=str(native._unavailable))


@pytest.mark.slow
def test_the_command() -> None:
    """In a process of its own, as it is typed; nothing is warned of."""
    environment = os.environ | {"PYTHONPATH": str(Path(program.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-m", "rim_rnn"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    shown = dict(line.split(maxsplit=1) for line in done.stdout.partition("\n\n")[0].splitlines())
    assert shown["rim-rnn"].startswith(rim_rnn.__version__)
    assert shown["torch"] == torch.__version__
    assert shown["Python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert shown["path"] == rim_rnn.RIM(1, 600).path(torch.zeros(1, 1, 1))
    assert {"system", "instructions", "threads"} <= shown.keys()
    assert shown["OMP_NUM_THREADS"] == "1"
    last = "passed" if native._unavailable is None else "nothing to compare without the native operator"
    assert done.stdout.splitlines()[-1] == f"self-check: {last}"


@pytest.mark.slow
@needs_native
@pytest.mark.parametrize("part", ["output", "c_n", "gradient of cells.0.dynamics.weight_hh"])
def test_a_difference_fails(part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one element in a thousandth of the largest; the line says where."""
    right, calls = program.results, 0

    def wrong(*args: Any) -> dict[str, torch.Tensor]:
        nonlocal calls
        values, calls = right(*args), calls + 1
        if part in values and calls % 2:  # the native path's turn
            values[part].view(-1)[0] += values[part].abs().max() * 1e-3
        return values

    monkeypatch.setattr(program, "results", wrong)
    assert program.main() == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("self-check FAILED: ")]
    assert f"self-check FAILED: LSTM, bidirectional, packed, torch.float64: {part}, by 1e-03" in failed
    assert len(failed) == (8 if part == "c_n" else 16)


@needs_native
def test_nan_is_a_difference(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(program, "differences", lambda *_: {"output": 1.0, "h_n": float("nan")})
    assert program.main() == 1
    assert "self-check FAILED: GRU, torch.float32: output and 1 more, by nan" in capsys.readouterr().out


@needs_native
def test_a_layer_that_is_not_native_fails(capsys: pytest.CaptureFixture[str]) -> None:
    """The readable path is not compared with itself."""
    with native.readable():
        assert program.main() == 1
    assert "self-check FAILED: LSTM, torch.float32: readable: switched off" in capsys.readouterr().out


def test_an_operator_that_is_there_and_not_taken_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that was never built, or that is switched off, does not."""
    monkeypatch.delenv("RIM_RNN_NATIVE", raising=False)
    monkeypatch.setattr(native, "_unavailable", "the native operator does not load")
    monkeypatch.setattr(program, "__file__", str(tmp_path / "__main__.py"))
    assert program.main() == 0
    assert "\npath            readable: the native operator does not load\n" in capsys.readouterr().out
    (tmp_path / "_native.abi3.so").touch()
    assert program.main() == 1
    assert capsys.readouterr().out.endswith("self-check FAILED: the native operator does not load\n")
    monkeypatch.setenv("RIM_RNN_NATIVE", "0")
    assert program.main() == 0


@needs_native
def test_the_number_of_threads_is_left_as_it_was() -> None:
    torch.set_num_threads(2)
    try:
        program.differences(rim_rnn.RIM(5, 66), torch.float32, packed=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
