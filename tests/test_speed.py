"""The speed example: what it counts, what its JSON keeps, what its table says. Nothing here looks at a measured time."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import timeit
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rim_rnn import RIM, native

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "speed"

sys.path[:0] = [str(EXAMPLE), str(EXAMPLE.parent)]

import ablations  # noqa: E402
import cases  # noqa: E402
import measure  # noqa: E402
import show  # noqa: E402
from ablations import ABLATIONS, Ablation  # noqa: E402
from cases import Case, flops  # noqa: E402
from common import marks  # noqa: E402

ACT = ["cases", "--cases", "act"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command in tiny sizes, with two points where it has many; the JSON that it leaves."""
    monkeypatch.setattr(measure, "SCALING", {"steps": [25, 50], "k": [4]})
    monkeypatch.setattr(measure, "CALLS", {name: cases.CALLS[name] for name in ("nothing", "batch=1")})
    monkeypatch.setattr(measure, "MEMORY", {"steps": [100]})

    def run(*argv: str) -> dict[str, Any]:
        measure.main([*argv, "--smoke", "--threads", "1", "--path", "readable", "--out", str(tmp_path)])
        return json.loads((tmp_path / "readable.json").read_text())

    return run


# The arithmetic.


class NoTracker(contextlib.nullcontext[None]):
    parents = frozenset({"Global"})


def test_flops_of_a_rim_by_hand() -> None:
    case = Case(2, 3, 5, 8, num_units=2, k=1)  # 6 rows, units of 4, values of 16, a key of 8, 4 heads of 4
    key = 2 * 6 * 5 * 8
    gates_of_x = 2 * 5 * 16 * (2 * 16) + 2 * 6 * 5 * (2 * 16)
    from_h = 2 * 6 * 4 * (8 + 16) * 2
    from_new_h = 2 * 6 * 4 * (3 * 16) * 2
    attention = 6 * (2 * 2 * 2 * 16 + 2 * 2 * 2 * 16)
    output = 2 * 6 * 16 * 4 * 2
    forward = key + gates_of_x + from_h + from_new_h + attention + output
    assert forward == 17_504
    assert flops("RIM", case, train=False) == forward
    # Backward is twice that, less the gradient of h_0 for 3 of the 6 rows.
    assert flops("RIM", case, train=True) == 3 * forward - from_h // 2
    # One winner of two: half the recurrent gates, half the queries, half the attention, half the output.
    spared = 2 * 6 * 4 * 16 + 2 * 6 * 4 * 16 + attention // 2 + output // 2
    assert flops("RIM", case, train=False, winners_only=True) == forward - spared


def test_flops_of_an_lstm_by_hand() -> None:
    case = Case(2, 3, 1, 8)
    assert flops("torch", case, train=False) == 2 * 6 * (1 + 8) * 32
    # No gradient for a pixel, nor for h_0.
    assert flops("torch", case, train=True) == 2 * 6 * (1 + 8) * 32 * 2 + 2 * 3 * 8 * 32


def test_flops_of_the_paper_are_those_of_the_design() -> None:
    a_step = {name: flops(name, cases.PAPER, train=False) / cases.PAPER.steps for name in ("RIM", "torch")}
    assert a_step["RIM"] == pytest.approx(76.5e6, rel=0.01)
    assert a_step["torch"] == pytest.approx(184.6e6, rel=0.001)


@pytest.mark.parametrize("train", [False, True], ids=["forward", "train"])
@pytest.mark.parametrize(
    "case",
    [
        Case(3, 2, 1, 12),
        Case(30, 4, 3, 24, num_units=4, k=2, rnn_cell="GRU"),
        Case(3, 2, 40, 12, value_size_comm=7),
        Case(9, 4, 6, 24, num_layers=2, bidirectional=True),
        Case(9, 4, 6, 24, shortest=2),
    ],
    ids=str,
)
def test_flops_are_those_that_torch_counts(case: Case, train: bool) -> None:
    """Of the readable path, without biases, whose one product is not counted."""
    layer = RIM(
        case.input_size,
        case.hidden_size,
        case.num_layers,
        bias=False,
        bidirectional=case.bidirectional,
        rnn_cell=case.rnn_cell,
        num_units=case.num_units,
        k=case.k,
        value_size_comm=case.value_size_comm,
    )
    data = cases.Data(case)
    data.leaf.requires_grad_(train and case.learned_input)  # the counter fails on a leaf inside no_grad
    call = cases.calls(layer, list(layer.parameters()), data)["train" if train else "forward"]
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoTracker()  # whose hooks on all modules would have each projection called at each step
    with native.readable(), counter:
        call()
    assert flops("RIM", case, train) == counter.get_total_flops()


# The cases.


def test_packed_lengths_are_evenly_spread() -> None:
    lengths = cases.CASES["packed"].lengths
    steps = Counter(longer - shorter for longer, shorter in pairwise(lengths))
    assert (lengths[0], lengths[-1], len(lengths)) == (196, 19, 64)
    assert set(steps) == {2, 3}


@pytest.mark.parametrize("name", cases.CASES)
def test_both_layers_have_the_sizes_of_the_case(name: str) -> None:
    case = cases.CASES[name]
    with torch.device("meta"):
        ours, torchs = cases.build("RIM", case), cases.build("torch", case)
    for attribute in ("mode", "input_size", "hidden_size", "num_layers", "bidirectional"):
        assert getattr(ours, attribute) == getattr(torchs, attribute)


@pytest.mark.parametrize("name", ["paper", "packed", "bidirectional", "gru"])
def test_a_training_step_leaves_the_gradients_of_one_pass(name: str) -> None:
    case = cases.shrink(cases.CASES[name])
    layer, data = cases.build("RIM", case), cases.Data(case)
    parameters = list(layer.parameters())
    train = cases.calls(layer, parameters, data)["train"]
    train()
    first = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    train()
    assert len(first) == len(parameters)
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(parameters, first, strict=True))
    assert (data.leaf.grad is not None) == (case.input_size > 1)


# The measurement.


def test_everybody_takes_a_turn_in_every_round_and_nobody_is_always_first() -> None:
    order: list[str] = []
    timers = {name: timeit.Timer(lambda name=name: order.append(name)) for name in "abc"}
    seconds = measure.take_turns(timers, rounds=4, least=0.0)
    assert {name: len(turns) for name, turns in seconds.items()} == dict.fromkeys("abc", 4)
    assert "".join(order[-12:]) == "abccbaabccba"


def test_a_short_call_is_repeated() -> None:
    asked = []

    class Timer:
        """A clock of our own: a call takes 1/1024 of a second."""

        def timeit(self, number: int) -> float:
            asked.append(number)
            return number / 1024

    assert measure.take_turns({"a": Timer()}, rounds=2, least=0.05) == {"a": [0.00097656, 0.00097656]}
    assert asked[-1] == asked[-2]
    assert 0.05 <= asked[-1] / 1024 < 0.06


@pytest.mark.skipif(sys.platform != "linux", reason="memory is one of the sections")
def test_every_section_is_in_the_json(run: Any, tmp_path: Path) -> None:
    document = run("--rounds", "2")
    assert list(document["cases"]) == list(cases.CASES)
    assert list(document["scaling"]) == ["steps=25", "steps=50", "k=4"]
    assert list(document["memory"]) == ["steps=100"]
    (about,) = document["runs"].values()
    assert about["command"] == "python examples/speed/measure.py --rounds 1 --path readable"
    assert {"commit", "version", "load"} <= about.keys()
    assert {"cpu", "cores", "threads", "torch", "python", "seed"} <= document["setup"].keys()
    assert (document["setup"]["path"], document["setup"]["smoke"]) == ("readable", True)
    assert list(document["calls"]) == ["nothing", "batch=1"]
    for entry in [*document["cases"].values(), *document["scaling"].values(), *document["calls"].values()]:
        assert entry["run"] in document["runs"]
        case = Case(**entry["case"])
        for way in ("forward", "train"):
            assert {name: len(rounds) for name, rounds in entry["seconds"][way].items()} == {"RIM": 1, "torch": 1}
            assert entry["flops"][way]["RIM"] == flops("RIM", case, way == "train")
            assert entry["flops"][way]["torch"] == flops("torch", case, way == "train")
        assert all(len(rounds) == 1 for rounds in entry["product"]["seconds"].values())
    assert all(size >= 0 for size in document["memory"]["steps=100"]["bytes"].values())
    for picture in ("readable-ratios.png", "readable-scaling.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_a_section_measured_again_leaves_the_others(run: Any) -> None:
    before = run("cases", "--cases", "act", "act16")
    after = run("scaling")
    assert after["cases"] == before["cases"]
    assert len(after["runs"]) == 2
    last = run(*ACT)
    assert last["cases"]["act16"] == before["cases"]["act16"]
    assert last["cases"]["act"]["run"] != before["cases"]["act"]["run"]
    assert set(last["runs"]) == {entry["run"] for part in ("cases", "scaling") for entry in last[part].values()}
    assert len(run("cases", "--cases", "act", "act16")["runs"]) == 2  # the first run has no figure left


def test_resume_measures_what_is_missing(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "commit", lambda: "one")
    before = run(*ACT)
    after = run("cases", "--cases", "act16", "act", "small", "--resume")
    assert after["cases"]["act"] == before["cases"]["act"]
    assert list(after["cases"]) == ["small", "act", "act16"]
    monkeypatch.setattr(measure, "commit", lambda: "another")
    assert run(*ACT, "--resume")["cases"]["act"]["run"] != before["cases"]["act"]["run"]


def test_what_is_measured_before_an_interruption_is_kept(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run(*ACT)

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setitem(measure.MEASURES, "memory", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("scaling", "memory")
    kept = json.loads((tmp_path / "readable.json").read_text())
    assert kept["cases"] == before["cases"]
    assert set(kept["scaling"]) == {"steps=25", "steps=50", "k=4"}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(*ACT)
    assert json.loads((tmp_path / "readable.json").read_text()) == kept


def test_figures_of_different_machines_do_not_mix(run: Any, tmp_path: Path) -> None:
    document = run(*ACT)
    document["setup"].update(cpu="another", torch="2.10.0")
    (tmp_path / "readable.json").write_text(show.dump(document))
    with pytest.raises(SystemExit, match=r"another machine or setup \(cpu, torch\): give another folder with --out"):
        run(*ACT)
    assert json.loads((tmp_path / "readable.json").read_text()) == document


def test_the_command_runs_as_a_script(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(EXAMPLE / "measure.py"), *ACT, "--smoke", "--threads", "1"]
    result = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "SMOKE TEST, no figures." in result.stdout
    path = RIM(2, 12).path(torch.zeros(1, 1, 2)).split(":")[0]
    assert json.loads((tmp_path / f"{path}.json").read_text())["setup"]["path"] == path


def test_native_can_be_demanded(tmp_path: Path) -> None:
    with native.readable(), pytest.raises(SystemExit, match=r"--path native: RIM takes the path readable: \w"):
        measure.main([*ACT, "--path", "native", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["speed"], "no section speed; there are cases, everyday, scaling, calls, compiled, lengths, memory, rival"),
        (["--cases", "tiny"], "invalid choice: 'tiny'"),
        (["--rounds", "0"], "at least 1"),
        (["rival"], "needs --rival PATH"),
        (["--rival", "nowhere"], "no RIM.py there"),
        (["memory", "--device", "cuda"], "the section memory is of a CPU alone"),
        (["--device", "nowhere"], "invalid choice: 'nowhere'"),
    ],
)
def test_wrong_arguments_are_told(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        measure.main(argv)
    assert message in capsys.readouterr().err


RIVAL = """
import torch

class RIM(torch.nn.Module):
    def __init__(self, device, input_size, hidden_size, num_units, k, rnn_cell, n_layers, bidirectional,
                 input_value_size=400, input_dropout=0.1, comm_dropout=0.1):
        super().__init__()
        given = (device, input_size, hidden_size, num_units, k, rnn_cell, n_layers, bidirectional)
        assert given == ("cpu", 1, 8, 4, 3, "LSTM", 1, False)
        assert (input_value_size, input_dropout, comm_dropout) == (32, 0.0, 0.0)
        self.lstm = torch.nn.LSTM(input_size, hidden_size * num_units)

    def forward(self, x, h, c):
        output, (h, c) = self.lstm(x, (h, c))
        return output, h, c
"""


def test_the_rival_gets_equal_sizes(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rival").mkdir()
    (tmp_path / "rival" / "RIM.py").write_text(RIVAL)
    document = run("rival", "--rival", str(tmp_path / "rival"))
    assert list(document["rival"]["paper"]["seconds"]["train"]) == ["RIM", "RIM, equal sizes", "rival"]
    assert str(tmp_path) not in json.dumps(document)
    assert sorted(path.name for path in (tmp_path / "rival").iterdir()) == ["RIM.py"]
    assert "first public implementation" in capsys.readouterr().out


# The ablations.


@pytest.mark.parametrize("ablation", ABLATIONS, ids=lambda ablation: ablation.what)
def test_an_ablation_s_text_stands_exactly_once(ablation: Ablation, tmp_path: Path) -> None:
    for name, old, new in ablation.edits:
        assert (ablations.PACKAGE / name).read_text().count(old) == 1, old
        assert old != new
    package = ablations.copy(ablation, tmp_path / "copy") / "src" / "rim_rnn"
    changed = {
        file.relative_to(package).as_posix()
        for file in package.rglob("*.*")
        if file.read_bytes() != (ablations.PACKAGE / file.relative_to(package)).read_bytes()
    }
    assert changed == {name for name, *_ in ablation.edits}
    for name in changed:
        if name.endswith(".py"):
            ast.parse((package / name).read_text())


def test_ablations_have_names_of_their_own_and_known_cases() -> None:
    assert len({ablation.what for ablation in ABLATIONS}) == len(ABLATIONS)
    assert {name for ablation in ABLATIONS for name in ablation.cases} <= set(cases.CASES)
    assert {ablation.group for ablation in ABLATIONS} == set(show.GROUPS)


@pytest.fixture
def ablate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run given ablations of the readable path, which need no build, in tiny sizes; the JSON that it leaves."""

    def ablate(*chosen: Ablation, resume: bool = False) -> dict[str, Any]:
        monkeypatch.setattr(ablations, "ABLATIONS", list(chosen))
        ablations.main(["--smoke", "--threads", "1", "--out", str(tmp_path), *["--resume"] * resume])
        return json.loads((tmp_path / "ablations.json").read_text())

    return ablate


ONE_PRODUCT = next(ablation for ablation in ABLATIONS if ablation.what == "one product for queries, keys and values")


def test_both_sides_of_an_ablation_take_turns(ablate: Any, capsys: pytest.CaptureFixture[str]) -> None:
    document = ablate(ONE_PRODUCT)
    (entry,) = document["ablations"].values()
    assert list(entry["cases"]) == ["paper", "small"]
    for case in entry["cases"].values():
        for way in ("forward", "train"):
            assert {side: len(rounds) for side, rounds in case["seconds"][way].items()} == {"with": 1, "without": 1}
    (run,) = document["runs"].values()
    assert run["command"] == "python examples/speed/ablations.py --rounds 1"
    assert (document["setup"]["smoke"], document["setup"]["seed"]) == (True, 0)
    assert f"{ONE_PRODUCT.what}: paper " in capsys.readouterr().out


def test_resume_ablates_what_is_missing(ablate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablations, "compare", lambda ablation, *_: {"group": ablation.group, "cases": {}})
    monkeypatch.setattr(measure, "commit", lambda: "one")
    first, second = (ONE_PRODUCT._replace(what=what) for what in ("first", "second"))
    before = ablate(first)["ablations"]
    after = ablate(second, first, resume=True)["ablations"]
    assert list(after) == ["second", "first"]
    assert after["first"] == before["first"]
    assert ablate(second, first)["ablations"]["first"]["run"] != before["first"]["run"]
    monkeypatch.setattr(measure, "commit", lambda: "another")
    assert ablate(second, first, resume=True)["ablations"]["first"]["run"] != before["first"]["run"]


def test_a_case_has_a_process_of_its_own_that_may_keep_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in measure.KEEPS_MEMORY:
        monkeypatch.setenv(name, "")
    args = measure.arguments(["--rounds", "1", "--threads", "1", "--keep-memory"])
    args.path, args.least = "readable", 0.0
    case = cases.shrink(cases.CASES["act"])
    found, expected = measure.apart("cases", case, args), measure.here("cases", case, args)
    assert found.keys() == expected.keys()
    assert found["flops"] == expected["flops"]
    assert os.environ.items() >= measure.KEEPS_MEMORY.items()


@pytest.mark.parametrize("section", measure.SECTIONS)
def test_every_case_is_measured_in_its_own_size(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And in a tiny one only where --smoke asks for that."""
    measured: list[Case] = []

    def note(case: Case, args: Any) -> dict[str, Any]:
        measured.append(case)
        raise KeyboardInterrupt

    monkeypatch.setitem(measure.MEASURES, section, note)
    monkeypatch.setattr(measure, "apart", measure.here)
    planned = next(iter(measure.points()[section].values()))
    for smoke in ([], ["--smoke"]):
        argv = [
            section,
            *smoke,
            "--rival",
            str(tmp_path),
            "--threads",
            "1",
            "--path",
            "readable",
            "--out",
            str(tmp_path / str(smoke)),
        ]
        (tmp_path / "RIM.py").touch()
        with pytest.raises(KeyboardInterrupt):
            measure.main(argv)
    assert measured == [planned, cases.shrink(planned)]


def test_an_ablation_has_to_compute_the_same(ablate: Any) -> None:
    cheat = ONE_PRODUCT._replace(edits=(("communication.py", "/ math.sqrt(self.key_size)", "/ self.key_size"),))
    with pytest.raises(RuntimeError, match=r"one product .*: paper does not compute the same without it"):
        ablate(cheat)


def test_an_ablation_s_package_is_the_copy(ablate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Path(ablations.compare.__code__.co_filename).parents[2] / "src"
    answer = ablations.ask

    def elsewhere(worker: Any, what: str, argument: Any) -> Any:
        answered = answer(worker, what, argument)
        return {**answered, "package": str(other / "rim_rnn")} if what == "case" else answered

    monkeypatch.setattr(ablations, "ask", elsewhere)
    with pytest.raises(RuntimeError, match="not the copy"):
        ablate(ONE_PRODUCT)


def test_what_a_machine_does_not_have_is_not_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    args = ablations.arguments(["--threads", "1"])
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    left_out = {ablation.what for ablation in ABLATIONS if not ablations.makes_sense(ablation, args)}
    assert left_out == {ablation.what for ablation in ABLATIONS if ablation.needs == ("AVX512",) or "thread" in ablation.what}
    assert len(left_out) == 4


def test_words_choose_ablations(capsys: pytest.CaptureFixture[str]) -> None:
    ablations.main(["--list", "weight", "gradients", "64"])
    words = "native paper, small, mid weight gradients collected into products of 64 rows and more"
    assert " ".join(capsys.readouterr().out.split()) == words
    with pytest.raises(SystemExit):
        ablations.main(["nonsense"])
    assert "no ablation has the words nonsense" in capsys.readouterr().err


def test_the_ablations_table(document: dict[str, Any]) -> None:
    run = next(iter(document["runs"]))
    slower, same = {"with": [1.0] * 4, "without": [1.5, 2.0, 2.0, 3.0]}, {"with": [1.0] * 4, "without": [0.9, 1.1, 0.94, 1.2]}
    case = {"sizes": "", "seconds": {"forward": slower, "train": same}}
    del document["cases"], document["memory"]
    document["ablations"] = {
        "an edit": {"run": run, "group": "native", "cases": {"paper": case}},
        "another": {"run": run, "group": "lost", "cases": {"small": case}},
        "the last": {"run": run, "group": "lost", "cases": {"paper": case}},
    }
    table = show.tables(document, "")
    assert list(table) == ["ablations"]
    lines = table["ablations"].splitlines()
    assert lines[:3] == [
        "| without, in the native operator | paper |",
        "| --- | ---: |",
        "| an edit | **2.00**,\N{NO-BREAK SPACE}1.02 |",
    ]
    assert lines[4] == "| another way, instead of what is there | small | paper |"
    assert lines[6] == "| another | **2.00**,\N{NO-BREAK SPACE}1.02 |  |"
    assert "medians of 4 rounds" in table["ablations"]
    assert "commit abc" in table["ablations"]
    assert lines[-1] == "    python examples/speed/measure.py"
    row = next(line for line in show.text(document).splitlines() if line.startswith("an edit"))
    assert row.split() == ["an", "edit", "paper", "forward", "1,000", "2,000", "2.00", "1.88", "to", "2.25"]


# The table.


@pytest.fixture
def document() -> dict[str, Any]:
    """A measurement with figures that one can check by eye."""
    seconds = {"RIM": [0.1, 0.2, 0.1, 0.1, 0.1], "torch": [0.2, 0.3, 0.1, 0.3, 0.4]}
    entry = {
        "run": "2026-01-02T03:04:05.678+00:00",
        "case": {"rnn_cell": "LSTM"},
        "sizes": "T=7, N=8, 1 → 9",
        "seconds": {"forward": seconds, "train": {"RIM": seconds["torch"], "torch": seconds["torch"]}},
        "flops": {way: {"RIM": 4 * 10**9, "RIM, winners only": 2 * 10**9, "torch": 8 * 10**9} for way in show.WAYS},
        "product": {"flops": 10**9, "seconds": {"torch.mm": [0.01, 0.01, 0.3], "oneDNN": [0.02, 0.001, 0.02]}},
    }
    return {
        "setup": {
            "path": "native",
            "cpu": "A processor",
            "cores": 4,
            "instructions": "AVX2",
            "threads": 2,
            "dtype": "float32",
            "seed": 0,
            "torch": "2.13.0",
            "python": "3.12.0",
            "system": "Linux x86_64",
            "smoke": False,
        },
        "runs": {
            entry["run"]: {"command": "python examples/speed/measure.py", "commit": "abc", "version": "1.2.3", "load": [0]}
        },
        "cases": {"paper": entry},
        "memory": {
            "steps=100": {
                "run": entry["run"],
                "case": entry["case"],
                "sizes": "T=100",
                "bytes": {"RIM": 3 << 20, "torch": 4 << 20},
            }
        },
    }


def test_the_table_shows_the_median_of_the_rounds_ratios(document: dict[str, Any]) -> None:
    lines = show.tables(document, "../results/native")["speed"].splitlines()
    assert lines[0] == "| case | sizes | `RIM`, forward | `nn.LSTM` / `RIM` | `RIM`, forward + backward | `nn.LSTM` / `RIM` |"
    assert lines[2] == "| paper | T=7, N=8, 1 → 9 | 100 ms | **2.00** (1.50 to 3.00) | 300 ms | **1.00** (1.00 to 1.00) |"
    text = "\n".join(lines)
    assert "Medians of 5 rounds" in text
    assert "A processor, 2 of 4 cores (AVX2), Linux x86_64, float32, torch 2.13.0, Python 3.12.0." in text
    assert "rim-rnn 1.2.3 (native path), commit abc, 2026-01-02." in text
    assert "A training step of T=100 needs 3.00 MiB at its peak, with `nn.LSTM` 4.00 MiB." in text
    assert lines[-3] == "    python examples/speed/measure.py"
    assert lines[-1].endswith("(../results/native-ratios.png)")


def test_a_machine_has_its_factors_in_a_sentence(document: dict[str, Any]) -> None:
    short = show.tables(document, "native")["speed, in short"]
    paper = "at the paper's size (T=7, N=8, 1 → 9), `RIM` is"
    factors = "**2.00 times as fast** as `nn.LSTM` forward and **1.00 times as fast** in training."
    assert short == f"On a CPU (A processor, 2 cores), {paper} {factors}"
    document["everyday"] = {"words, GRU": {**document["cases"]["paper"], "case": {"rnn_cell": "GRU"}}}
    everyday = show.tables(document, "native")["speed, in short"].removeprefix(short)
    assert everyday == " At everyday sizes, in training: 1.00 to 1.00 times as fast as `nn.GRU`."
    document["setup"] |= {"cpu": "A GPU, A processor", "instructions": "compute capability 9.0"}
    document["cases"]["paper"]["seconds"]["forward"] = {"RIM": [4.0], "torch": [0.1]}
    short = show.tables(document, "results/gpu/cuda")["gpu, in short"]
    assert short.startswith(f"On a GPU (A GPU), {paper} **1/40 as fast** as `nn.LSTM` forward and ")


def test_the_text_shows_the_floor(document: dict[str, Any]) -> None:
    """4 GFLOP at the 100 GFLOP/s of the faster library's median round are 40 ms, two and a half times less than we take."""
    row = next(line for line in show.text(document).splitlines() if line.startswith("paper  forward"))
    assert row.split()[2:] == ["100", "300", "2.00", "1.50", "to", "3.00", "40.0", "2.5", "20.0"]


def test_the_floor_counts_the_winners_arithmetic(document: dict[str, Any]) -> None:
    """2 GFLOP at 100 GFLOP/s; a quarter of what the LSTM needs."""
    row = show.tables(document, "")["floor"].splitlines()[2]
    assert row == "| paper | 0.25 | 100 ms | 20.0 ms | 5.0 | 300 ms | 20.0 ms | 15.0 |"


def test_the_everyday_table_has_ratios_and_the_floor(document: dict[str, Any]) -> None:
    assert show.tables(document, "native")["everyday"] == "Not measured yet."
    document["everyday"] = {"words, LSTM": document["cases"]["paper"]}
    row = show.tables(document, "native")["everyday"].splitlines()[2]
    assert row == "| words, LSTM | T=7, N=8, 1 → 9 | 0.25 | 100 ms | **2.00** | 5.0 | 300 ms | **1.00** | 15.0 |"
    table = show.tables(document, "../results/avx2/native")["avx2"]
    assert "\n| words, LSTM | " in table


def test_the_scaling_table_has_what_was_measured(document: dict[str, Any]) -> None:
    memory = show.tables(document, "native")["scaling"]
    assert memory.splitlines()[2] == "| T=100 | 3.00 MiB | 4.00 MiB | 0.75 |"
    assert memory.endswith("(native-scaling.png)")
    case = {"num_units": 8, "k": 4}
    document["scaling"] = {"batch=8": {**document["cases"]["paper"], "case": case}}
    both = show.tables(document, "native")["scaling"]
    assert "| T=7, N=8, 1 → 9, 8 units, k=4 | 100 ms | 2.00 | 300 ms | 1.00 |" in both.splitlines()
    del document["scaling"], document["memory"]
    assert show.tables(document, "native")["scaling"] == "Not measured yet."


def test_the_calls_table_has_microseconds(document: dict[str, Any]) -> None:
    assert show.tables(document, "native")["calls"] == "Not measured yet."
    document["calls"] = {"nothing": document["cases"]["paper"]}
    forward, train = show.tables(document, "native")["calls"].split("\n\n")
    assert forward.splitlines()[2:] == ["| T=7, N=8, 1 → 9 | 100,000 μs | 300,000 μs | 2.00 | 120,000 μs | 2.50 |"]
    assert train.splitlines()[2:] == ["| T=7, N=8, 1 → 9 | 300,000 μs | 300,000 μs | 1.00 |"]


def test_the_compiled_table_has_what_compiling_took_and_brought(document: dict[str, Any]) -> None:
    assert show.tables(document, "native")["compiled"] == "Not measured yet."
    seconds = {"RIM": [0.3, 0.3], "torch": [0.2, 0.2], "compiled": [0.1, 0.1]}
    entry = {"seconds": {"forward": seconds, "train": seconds}, "compile_seconds": {"forward": 5.0, "train": 12.5}}
    document["compiled"] = {"paper": {**document["cases"]["paper"], **entry}}
    forward, train = show.tables(document, "native")["compiled"].split("\n\n")
    assert forward.splitlines()[2:] == ["| T=7, N=8, 1 → 9 | 300 ms | 100 ms | 3.00 | 2.00 | 5.00 s |"]
    assert train.splitlines()[2:] == ["| T=7, N=8, 1 → 9 | 300 ms | 100 ms | 3.00 | 2.00 | 12.5 s |"]
    assert "paper     forward     300       200          100          5.00" in show.text(document)


def test_the_table_of_lengths_has_what_a_graph_for_each_takes_and_brings(document: dict[str, Any]) -> None:
    seconds = {"RIM": [0.3, 0.3], "torch": [0.2, 0.2], "a graph each": [0.1, 0.1], "one graph": [0.2, 0.2]}
    first = {"a graph each": 50.0, "one graph": 2.5}
    entry = {
        "seconds": dict.fromkeys(("forward", "train"), seconds),
        "first_seconds": dict.fromkeys(("forward", "train"), first),
    }
    entry |= {"case": {"steps": 7}, "lengths": 3}
    document["lengths"] = {"paper": {**document["cases"]["paper"], **entry}}
    lines = show.tables(document, "results/lengths/native")["lengths"].splitlines()
    assert lines[2] == "| T=7, N=8, 1 → 9, forward | 5 to 7 | 50.0 s | 2.50 s | 3.00 | 1.50 |"
    assert lines[2] in show.text(document)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
def test_a_gpu_is_measured_and_has_graphs(tmp_path: Path) -> None:
    measure.main(["cases", "compiled", "--cases", "act", "--device", "cuda", "--smoke", "--out", str(tmp_path)])
    document = json.loads((tmp_path / "cuda.json").read_text())
    assert document["setup"]["path"] == "readable"
    assert {"RIM", "RIM, graph", "torch", "torch, graph", "compiled"} == document["compiled"]["act16"]["seconds"][
        "train"
    ].keys()


def test_a_log_on_other_terms_has_one_table(document: dict[str, Any]) -> None:
    table = show.tables(document, "../results/avx2/native")["avx2"]
    assert table.splitlines()[2] == "| paper | 100 ms | 2.00 | 300 ms | 1.00 |"
    assert "A processor, 2 of 4 cores (AVX2)" in table
    assert table.endswith("    python examples/speed/measure.py")
    assert list(show.tables(document, "../results/avx2/native")) == ["avx2", "avx2, in short"]
    assert "graphs" not in table
    seconds = {"RIM": [2.0, 2.0], "compiled": [3.0, 3.0], "RIM, graph": [0.4, 0.4], "torch, graph": [0.01, 0.01]}
    document["compiled"] = {"paper": {**document["cases"]["paper"], "seconds": {"forward": seconds, "train": seconds}}}
    ways = show.tables(document, "../results/gpu/cuda")["gpu, ways"].splitlines()
    assert ways[2].endswith(" | 2,000 ms | 3,000 ms | 400 ms | 5.00 |")
    table = show.tables(document, "../results/gpu/cuda")["gpu"]
    assert "| as CUDA graphs |" in table
    assert "\n| paper | 400 ms | 0.0250 | 400 ms | 0.0250 |\n" in table


def test_a_page_is_written_and_checked(document: dict[str, Any], tmp_path: Path) -> None:
    figures, page = tmp_path / "results" / "native.json", tmp_path / "README.md"
    figures.parent.mkdir()
    figures.write_text(show.dump(document))
    (begin, end), (floor, floor_end) = marks("speed", show.WRITER), marks("floor", show.WRITER)
    page.write_text(f"# Title\n\n{begin}\nold\n{end}\n\nThe rest.\n{floor}\n{floor_end}\n")
    with pytest.raises(SystemExit, match=r"README\.md: not the tables of .*native\.json"):
        show.main([str(figures), "--check", str(page)])
    show.main([str(figures), "--write", str(page)])
    show.main([str(figures), "--check", str(page)])
    written = page.read_text()
    table = show.tables(document, "results/native")
    expected = f"# Title\n\n{begin}\n{table['speed']}\n{end}\n\nThe rest.\n{floor}\n{table['floor']}\n{floor_end}\n"
    assert written == expected
    page.write_text(written.replace("2.00", "2.01"))
    with pytest.raises(SystemExit):
        show.main([str(figures), "--check", str(page)])
    for without in ("# Title\n", f"{end}\n{begin}\n", f"{begin}\n{begin}\n{end}\n"):
        page.write_text(without)
        with pytest.raises(ValueError, match="expected one line <!-- speed"):
            show.main([str(figures), "--write", str(page)])
        assert page.read_text() == without


@pytest.mark.parametrize(
    ("log", "page"),
    [
        *((log, page) for log in ("native", "gpu/cuda") for page in ("README.md", "docs/from_lstm.md")),
        *((log, "docs/performance.md") for log in ("native", "ablations")),
        *((f"{folder}/native", "docs/performance.md") for folder in ("avx2", "kept-memory", "last", "last-avx2")),
        ("gpu/cuda", "docs/performance.md"),
        ("gpu/cuda", "docs/on_a_gpu.md"),
    ],
)
def test_a_page_has_the_figures_of_the_committed_log(log: str, page: str) -> None:
    figures = EXAMPLE / "results" / f"{log}.json"
    if figures.exists():
        show.main([str(figures), "--check", str(ROOT / page)])
        assert not json.loads(figures.read_text())["setup"]["smoke"]
    else:
        begin, end = marks(log, show.WRITER)
        assert f"\n{begin}\n{show.NOT_YET}\n{end}\n" in (ROOT / page).read_text()


def test_the_json_survives_its_own_layout(document: dict[str, Any]) -> None:
    document["setup"]["cpu"] = 'odd "name" [with] {brackets},  and spaces'
    assert json.loads(show.dump(document)) == document
    assert "[ 0.1, 0.2, 0.1, 0.1, 0.1 ]" in show.dump(document)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_peak_memory_is_that_of_the_step_and_not_of_what_remains() -> None:
    """An nn.LSTM that trains keeps at least its gates; they are gone when the step is over."""
    case = Case(400, 64, 8, 128)
    sizes = json.dumps(dataclasses.asdict(case))
    result = subprocess.check_output([sys.executable, str(EXAMPLE / "peak.py"), "torch", sizes, "1"], text=True)
    gates = 4 * case.steps * case.batch * 4 * case.hidden_size
    assert gates < int(result) < 8 * gates
