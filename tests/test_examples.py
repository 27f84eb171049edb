"""The study: its tasks, its runs, what becomes of a run that is killed, and a whole table of runs."""

from __future__ import annotations

import gzip
import http.server
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rim_rnn import RIM, record

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "study"
MNIST = ROOT.parent / "shared" / "mnist"
SHIPPED = EXAMPLE / "digits"
FILES = [f"{part}-ubyte.gz" for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")]

sys.path[:0] = [str(EXAMPLE), str(EXAMPLE.parent)]

import arguments  # noqa: E402
import checkpoint  # noqa: E402
import make_digits  # noqa: E402
import model as models  # noqa: E402
import report  # noqa: E402
import study  # noqa: E402
import study_report  # noqa: E402
import train  # noqa: E402
import trainer  # noqa: E402
from common import cpu, marks  # noqa: E402
from model import Model  # noqa: E402
from processes import Processes  # noqa: E402
from tasks import TASKS, Task  # noqa: E402
from tasks import sequential_mnist as mnist  # noqa: E402
from tasks.task import DataError  # noqa: E402
from variants import VARIANTS  # noqa: E402

SMALL = [
    "--no-cuda",
    "--hidden_size",
    "12",
    "--num_units",
    "3",
    "--input_size",
    "14",
    "--batch_size",
    "8",
    "--eval_sizes",
    "14",
    "15",
]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """41 digits to train, so that the last batch of 8 holds a single one, and 20 to test."""
    folder = tmp_path_factory.mktemp("digits")
    for prefix, whole, count in zip(("train", "t10k"), mnist.load(str(SHIPPED)), (41, 20), strict=True):
        make_digits.write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", whole.images[:count])
        make_digits.write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", whole.labels[:count])
    return folder


@pytest.fixture
def run(digits: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs `train.py` in this process, on small digits unless it goes on with a run."""

    def run(*args: object, small: bool = True) -> None:
        given = ["--data_dir", digits, *SMALL, *args] if small else args
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, given)])
        train.main()

    return run


@pytest.fixture
def refused(run: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `train.py`, demands that it refuses, and returns what it says."""

    def refused(*args: object, small: bool = True) -> str:
        with pytest.raises(SystemExit) as exit:
            run(*args, small=small)
        assert exit.value.code not in (0, None)
        return capsys.readouterr().err if exit.value.code == 2 else str(exit.value.code)

    return refused


def prepared(header: dict[str, Any]) -> tuple[Task, Model]:
    """The task and a fresh model of a run."""
    args = Namespace(**header["arguments"])
    task = TASKS[header["task"]](args)
    return task, Model(args, task)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read_log(log_dir: Path) -> list[dict[str, Any]]:
    return checkpoint.read_metrics(log_dir / checkpoint.METRICS)


def essence(log_dir: Path) -> list[dict[str, Any]]:
    """The log, without when, by which command and at which commit it was written: the checkout may change meanwhile."""
    apart = ("seconds", "evaluation_seconds", "began", "command", "commit", "resumed")
    return [{name: value for name, value in line.items() if name not in apart} for line in read_log(log_dir)]


def assert_same_run(one: Path, other: Path) -> None:
    """The same log and, bit for bit, the same parameters, moments and generators."""
    assert essence(one) == essence(other)
    a, b = (checkpoint.load(folder) for folder in (one, other))
    for part in ("model", "average", "best", "sizes", "optimizer", "scheduler", "generators"):
        assert_equal(a[part], b[part], part)


def assert_equal(a: Any, b: Any, where: str) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{where}.{index}")
    else:
        assert a == b, where


# --- The digits


@pytest.mark.parametrize("size", [1, 14, 16, 19, 24, 28, 40])
def test_pixels_are_the_nearest_ones_binarised_and_read_line_by_line(size: int) -> None:
    images = torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8)
    sequences = mnist.Digits(images, torch.zeros(3)).sequences(size, 1)
    expected = [
        [[float(image[row * 28 // size, column * 28 // size] > 120)] for row in range(size) for column in range(size)]
        for image in images.tolist() and images
    ]
    assert sequences.tolist() == expected


def test_a_pixel_of_120_is_black_and_one_of_121_is_white() -> None:
    images = torch.full((1, 28, 28), 120, dtype=torch.uint8)
    images[0, 0, 0] = 121
    sequence = mnist.Digits(images, torch.zeros(1)).sequences(28, 28)[0]
    assert sequence[0, 0] == 1
    assert sequence.sum() == 1


def test_zeros_fill_up_the_last_step() -> None:
    digits = mnist.Digits(torch.full((2, 28, 28), 255, dtype=torch.uint8), torch.zeros(2))
    sequences = digits.sequences(3, 4)
    assert sequences.shape == (2, 3, 4)
    assert sequences[1].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]]


def test_the_shipped_digits_are_balanced_and_small() -> None:
    train_digits, test_digits = mnist.load(str(SHIPPED))
    assert train_digits.labels.bincount().tolist() == [1000] * 10
    assert test_digits.labels.bincount().tolist() == [200] * 10
    assert sum(len(content) for content in contents(SHIPPED).values()) <= 2_000_000


@pytest.mark.skipif(not MNIST.exists(), reason="MNIST is not here")
def test_the_shipped_digits_are_what_the_script_makes_of_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["make_digits.py", "--data_dir", str(MNIST), "--out_dir", str(tmp_path)])
    make_digits.main()
    for name in FILES:
        assert gzip.decompress((tmp_path / name).read_bytes()) == gzip.decompress((SHIPPED / name).read_bytes())


def test_plain_files_are_read_like_gzip_ones(digits: Path, tmp_path: Path) -> None:
    for name in FILES:
        (tmp_path / name.removesuffix(".gz")).write_bytes(gzip.decompress((digits / name).read_bytes()))
    for plain, packed in zip(mnist.load(str(tmp_path)), mnist.load(str(digits)), strict=True):
        assert plain.sha256() == packed.sha256()


def idx(content: bytes, *shape: int) -> bytes:
    header = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
    return gzip.compress(header + content)


IMAGES, LABELS = FILES[2:]
BROKEN_FILES = {
    "missing": (IMAGES, lambda old: None, "no such file"),
    "empty": (IMAGES, lambda old: b"", "begins with nothing, not with 00000803"),
    "not gzip": (IMAGES, gzip.decompress, "not a gzip file, or a damaged one"),
    "gzip cut short": (IMAGES, lambda old: old[:-100], "not a gzip file, or a damaged one"),
    "gzip with a wrong byte": (
        IMAGES,
        lambda old: old[:500] + bytes([old[500] ^ 1]) + old[501:],
        "not a gzip file, or a damaged",
    ),
    "no header": (IMAGES, lambda old: gzip.compress(b""), "begins with nothing"),
    "header cut short": (
        IMAGES,
        lambda old: gzip.compress(gzip.decompress(old)[:9]),
        "truncated within its 16 bytes of header",
    ),
    "pixels cut short": (
        IMAGES,
        lambda old: gzip.compress(gzip.decompress(old)[:-1]),
        "promises 20 x 28 x 28 bytes, 15679 follow",
    ),
    "too long": (IMAGES, lambda old: gzip.compress(gzip.decompress(old) + b"0"), "promises 20 x 28 x 28 bytes, 15681 follow"),
    "other magic": (
        IMAGES,
        lambda old: gzip.compress(b"\x00\x00\x0d\x03" + bytes(100)),
        "begins with 00000d03, not with 00000803",
    ),
    "labels for images": (IMAGES, lambda old: idx(bytes(20), 20), "begins with 00000801, not with 00000803"),
    "images for labels": (LABELS, lambda old: idx(bytes(20 * 784), 20, 28, 28), "begins with 00000803, not with 00000801"),
    "other image size": (IMAGES, lambda old: idx(bytes(20 * 27 * 28), 20, 27, 28), "images are 27x28, expected 28x28"),
    "no images": (IMAGES, lambda old: idx(b"", 0, 28, 28), "promises 0 x 28 x 28 bytes"),
    "too few labels": (LABELS, lambda old: idx(bytes(19), 19), "19 labels, but .* holds 20 images"),
    "no such digit": (LABELS, lambda old: idx(bytes([10] * 20), 20), "holds the label 10, expected 0 to 9"),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_a_broken_file_is_named(case: str, digits: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    name, breaks, says = BROKEN_FILES[case]
    folder = shutil.copytree(digits, tmp_path / "digits")
    broken = breaks((folder / name).read_bytes())
    (folder / name).unlink()
    if broken is not None:
        (folder / name).write_bytes(broken)
    message = refused("--data_dir", folder, "--log_dir", tmp_path / "run")
    assert message.startswith(f"error: {folder / name}: ")
    assert re.search(says, message)
    assert not (tmp_path / "run").exists()


class Quiet(http.server.SimpleHTTPRequestHandler):
    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(self.path)
        super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def mirror(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A local mirror behind one that has nothing, with the checksums of what it serves; the requests it got."""
    handler = type("Handler", (Quiet,), {"requests": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(digits))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(mnist, "MIRRORS", (f"{address}/nothing/", f"{address}/"))
        monkeypatch.setattr(mnist, "SHA256", {name: mnist.pooch.file_hash(str(digits / name)) for name in FILES})
        monkeypatch.setattr(mnist.pooch, "os_cache", lambda project: tmp_path / project)
        yield handler.requests
        server.shutdown()


def test_digits_are_downloaded_once_from_the_first_mirror_that_has_them(digits: Path, mirror: list[str]) -> None:
    first = mnist.load(None)
    assert mirror == [f"{folder}/{name}" for name in FILES for folder in ("/nothing", "")]
    mirror.clear()
    for loaded, again, expected in zip(first, mnist.load(None), mnist.load(str(digits)), strict=True):
        assert loaded.sha256() == again.sha256() == expected.sha256()
    assert mirror == []


@pytest.mark.usefixtures("mirror")
def test_a_download_that_is_not_the_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(mnist.SHA256, IMAGES, "0" * 64)
    with pytest.raises(DataError, match=rf"(?s)^{IMAGES}: could not be downloaded; --data_dir .* hash"):
        mnist.load(None)
    assert not list(tmp_path.rglob(IMAGES))


# --- The other tasks


def task_of(name: str, text: str = "") -> Task:
    return TASKS[name](arguments.build_parser(name).parse_args(text.split()))


def test_copying_has_symbols_a_span_of_blanks_and_a_marker() -> None:
    inputs, symbols = task_of("copying", "--examples 20").test(7)
    assert inputs.shape == (1000, 10 + 7 + 1 + 10, 10)
    assert (inputs.sum(2) == 1).all()
    steps = inputs.argmax(2)
    assert torch.equal(steps[:, :10], symbols)
    assert (steps[:, 10:17] == 8).all()
    assert (steps[:, 17] == 9).all()
    assert (steps[:, 18:] == 8).all()
    assert symbols.flatten().bincount().tolist() == pytest.approx([1250] * 8, rel=0.1)


def test_adding_marks_one_number_in_each_half() -> None:
    inputs, sums = task_of("adding").test(9)
    numbers, marks = inputs.unbind(2)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert (marks[:, :4].sum(1) == 1).all()
    assert (marks[:, 4:].sum(1) == 1).all()
    assert (marks.sum(0) > 0).all()
    assert torch.equal(sums, (numbers * marks).sum(1, keepdim=True))


@pytest.mark.parametrize("name", ["copying", "adding"])
def test_sequences_are_drawn_anew_for_every_epoch_and_once_for_tests(name: str) -> None:
    a, b = (task_of(name, f"--examples 50 --test_examples 50 --valid 50 --seed {seed}") for seed in (0, 1))
    drawn = [a.train(0), a.train(1), b.train(0), a.valid(50), a.test(50)]
    for index, one in enumerate(drawn):
        assert not any(torch.equal(one.targets, other.targets) for other in drawn[:index])
    for one, again in ((a.train(1), a.train(1)), (a.valid(50), b.valid(50)), (a.test(60), b.test(60))):
        assert torch.equal(one.inputs, again.inputs)
        assert torch.equal(one.targets, again.targets)


def test_the_measures_of_each_task() -> None:
    scores = torch.zeros(1, 10, 8)
    scores[0, :4, 3] = 1e3
    measured = task_of("copying").measure(scores, torch.full((1, 10), 3))
    assert measured["accuracy"].item() == pytest.approx(0.4)
    assert measured["loss"].item() == pytest.approx(0.6 * torch.tensor(8.0).log().item())
    measured = task_of("adding").measure(torch.tensor([[[0.5]], [[2.0]]]), torch.tensor([[1.5], [1.0]]))
    assert measured["loss"].tolist() == [1, 1]
    assert measured["constant"].tolist() == [0.25, 0]


LEARNS = {
    "copying": ("--size 1 --eval_sizes 1 4 --hidden_size 48 --epochs 5 --lr_schedule cosine", "accuracy", (0.22, 1)),
    "adding": ("--size 6 --eval_sizes 6 12 --hidden_size 24 --epochs 3 --lr_schedule one-cycle", "loss", (0, 0.04)),
}


@pytest.mark.parametrize("name", LEARNS)
def test_the_other_tasks_are_learnt_and_go_on(
    name: str, run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, measure, (low, high) = LEARNS[name]
    text += " --no-cuda --num_units 3 --input_dropout 0 --comm_dropout 0 --lr 1e-2 --clip_grad 1 --batch_size 32"
    run("--task", name, *text.split(), "--examples", 2000, "--test_examples", 200, "--log_dir", tmp_path, small=False)
    header, *epochs = read_log(tmp_path)
    assert header["task"] == name
    value = epochs[-1][f"test_{measure}"][str(header["arguments"]["size"])]
    assert low < value < high
    task, model = prepared(header)
    model.load_state_dict(checkpoint.load(tmp_path)["model"])
    with torch.no_grad():
        size = header["arguments"]["eval_sizes"][1]
        measured = task.measure(model.eval()(task.test(size).inputs), task.test(size).targets)
    for other, values in measured.items():
        assert epochs[-1][f"test_{other}"][str(size)] == pytest.approx(values.double().mean().item(), rel=1e-4, abs=1e-6)
    for picture in (report.CURVES, report.UNITS):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    share = torch.tensor(json.loads((tmp_path / report.ACTIVITY).read_text())["active"])
    assert share.shape == (3, task.test(task.size).inputs.shape[1] - task.size + header["arguments"]["size"])
    torch.testing.assert_close(share.sum(0), torch.full(share.shape[1:], 2.0), rtol=0, atol=0.01)
    before = capsys.readouterr().out
    run("--loadsaved", "--log_dir", tmp_path, small=False)
    assert before.splitlines()[-5:] == capsys.readouterr().out.splitlines()[-5:]
    assert read_log(tmp_path) == [header, *epochs]


def test_a_sequence_to_add_has_two_halves(refused: Callable[..., str], tmp_path: Path) -> None:
    message = refused("--task", "adding", "--size", 1, "--log_dir", tmp_path / "run", small=False)
    assert "--size and --eval_sizes have to be at least 2" in message


# --- A run


def test_a_run_leaves_table_log_checkpoint_and_pictures(
    run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log_dir = tmp_path / "run"
    run("--epochs", 2, "--log_dir", log_dir, "--seed", 3)
    header, *epochs = read_log(log_dir)
    assert header["arguments"]["seed"] == 3
    assert header["arguments"]["hidden_size"] == 12
    assert header["torch"] == str(torch.__version__)
    assert {"commit", "device", "began", "command", "platform"} <= header.keys()
    task, model = prepared(header)
    model.load_state_dict(checkpoint.load(log_dir)["model"])
    assert header["parameters"] == sum(p.numel() for p in model.parameters())

    assert [line["epoch"] for line in epochs] == [1, 2]
    for line in epochs:
        assert line["train_loss"] > 0
        assert list(line["test_accuracy"]) == list(line["test_loss"]) == ["14", "15"]
        assert line["seconds"] > 0
    inputs, labels = task.test(15)
    with torch.no_grad():
        scores = model.eval()(inputs)[:, 0]
    assert epochs[-1]["test_accuracy"]["15"] == (scores.argmax(1) == labels[:, 0]).double().mean().item()
    loss = torch.nn.functional.cross_entropy(scores, labels[:, 0]).item()
    assert epochs[-1]["test_loss"]["15"] == pytest.approx(loss)

    printed = capsys.readouterr().out
    assert f"{header['parameters']} parameters" in printed
    assert "| RIM | 14x14 | 15x15 |\n" in printed
    assert "| accuracy, % | " + " | ".join(f"{100 * x:.1f}" for x in epochs[-1]["test_accuracy"].values()) in printed
    for name in (report.CURVES, report.UNITS):
        assert (log_dir / name).read_bytes().startswith(b"\x89PNG")
    if trainer.SummaryWriter:
        assert list((log_dir / "tensorboard").iterdir())


def test_the_lstm_runs_too_and_has_no_units(run: Callable[..., None], refused: Callable[..., str], tmp_path: Path) -> None:
    args = ["--model", "LSTM", "--no-cuda", "--input_size", 14, "--hidden_size", 5, "--epochs", 1, "--data_dir", SHIPPED]
    run(*args, "--eval_sizes", 14, "--batch_size", 1000, "--log_dir", tmp_path / "run", small=False)
    assert (tmp_path / "run" / report.CURVES).exists()
    assert not (tmp_path / "run" / report.UNITS).exists()
    state = checkpoint.load(tmp_path / "run")["model"]
    assert {name for name in state if name.startswith("rnn")} == {
        f"rnn.{name}" for name, _ in torch.nn.LSTM(14, 5).named_parameters()
    }
    message = refused(*args, "--k", 2, "--log_dir", tmp_path / "other", small=False)
    assert "--k belongs to a RIM" in message


def test_it_learns(run: Callable[..., None], tmp_path: Path) -> None:
    """A few digits by heart, in seven steps of two lines each."""
    args = ["--input_size", 28, "--hidden_size", 24, "--input_dropout", 0, "--comm_dropout", 0, "--eval_sizes", 14]
    run(*args, "--epochs", 60, "--lr", 0.01, "--lr_schedule", "cosine", "--log_dir", tmp_path)
    _, first, *_, last = read_log(tmp_path)
    assert first["train_accuracy"] < 0.4
    assert last["train_accuracy"] > 0.9


@pytest.mark.parametrize("test_every", [1, 3])
def test_the_last_training_digits_choose_the_epoch_and_are_not_trained_on(
    test_every: int, run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Here with accuracies that are made up, so that it is the second of four epochs; it has its tests in any case."""
    made_up, real = iter((0.2, 0.6, 0.4, 0.6)), trainer.Trainer.measure

    def measure(self: trainer.Trainer, examples: Any, title: str, *model: Any) -> dict[str, float]:
        return real(self, examples, title, *model) | ({"accuracy": next(made_up)} if title == "validation" else {})

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "measure", measure)
        args = ["--valid", 9, "--epochs", 4, "--lr", 0.03, "--eval_sizes", 15, "--test_every", test_every]
        run(*args, "--log_dir", tmp_path)
    header, *epochs = read_log(tmp_path)
    assert [bool(line["test_accuracy"]) for line in epochs] == [test_every == 1, True, True, True]
    task, model = prepared(header)
    whole = mnist.load(header["arguments"]["data_dir"])[0].sequences(14, 14)
    assert torch.equal(task.train(0).inputs, whole[:-9])
    assert torch.equal(task.valid(14).inputs, whole[-9:])
    fewer, _ = prepared(header | {"arguments": header["arguments"] | {"examples": 5}})
    assert torch.equal(fewer.train(0).inputs, whole[:5])
    assert torch.equal(fewer.valid(14).inputs, whole[-9:])

    assert [line["valid_accuracy"] for line in epochs] == [0.2, 0.6, 0.4, 0.6]
    assert [line["chosen"] for line in epochs] == [1, 2, 2, 2]
    saved, best = checkpoint.load(tmp_path), epochs[1]
    assert saved["best"]["epoch"] == 2
    assert report.chosen(epochs) == best
    model.eval().load_state_dict(saved["best"]["model"])
    with torch.no_grad():
        hits = model(task.test(15).inputs).argmax(2) == task.test(15).targets
    assert hits.double().mean().item() == best["test_accuracy"]["15"]
    accuracy = f"{100 * best['test_accuracy']['15']:.1f}"
    expected = f"| RIM, epoch 2 | validation | 15x15 |\n| --- | ---: | ---: |\n| accuracy, % | 60.0 | {accuracy} |\n"
    assert expected in capsys.readouterr().out
    assert epochs == saved["metrics"]
    with torch.no_grad():
        hits = model(task.valid(14).inputs).argmax(2) == task.valid(14).targets
    validated = f"{100 * hits.double().mean():.1f}"  # now it is not made up
    expected = [f"| {validated} | {accuracy} |", f"| 60.0 | {accuracy} |"]
    run("--no-train", "--log_dir", tmp_path, small=False)
    assert_evaluated(expected, capsys)
    alone = tmp_path / "elsewhere"
    alone.mkdir()
    weights = checkpoint.load(tmp_path, checkpoint.WEIGHTS)
    weights["header"]["arguments"]["cuda"] = not torch.cuda.is_available()  # trained where another device was
    checkpoint.save(alone, weights, checkpoint.WEIGHTS)
    run("--no-train", "--log_dir", alone, "--data_dir", header["arguments"]["data_dir"], small=False)
    assert_evaluated(expected, capsys)


def test_each_size_has_the_weights_that_were_best_on_its_own_held_out_digits(
    run: Callable[..., None], refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Here with accuracies that are made up: 14x14 is best after the first epoch, 15x15 in the middle of the second."""
    made_up = {"validation": [0.1, 0.6, 0.2, 0.6], "validation 15x15": [0.5, 0.3, 0.7, 0.7]}
    left, seen, real = {title: iter(values) for title, values in made_up.items()}, [], trainer.Trainer.measure

    def measure(self: trainer.Trainer, examples: Any, title: str, *model: Any) -> dict[str, float]:
        if title not in left:
            return real(self, examples, title, *model)
        if title == "validation":
            seen.append({name: value.clone() for name, value in self.evaluated.state_dict().items()})
        return real(self, examples, title, *model) | {"accuracy": next(left[title])}

    args = ["--valid", 9, "--valid_sizes", 15, "--valid_every", 2, "--epochs", 2, "--lr", 0.03, "--eval_sizes", 15, 16]
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "measure", measure)
        run(*args, "--test_every", 5, "--log_dir", tmp_path)
    header, *epochs = read_log(tmp_path)
    validations = [validation for line in epochs for validation in line["held_out"]]
    assert [validation["step"] for validation in validations] == [2, 4, 6, 8]
    for size, values in zip(("14", "15"), made_up.values(), strict=True):
        assert [validation["valid_accuracy"][size] for validation in validations] == values
    assert [line["valid_accuracy"] for line in epochs] == [0.6, 0.6]
    assert [line["chosen"] for line in epochs] == [1, 1]
    saved = checkpoint.load(tmp_path)
    for size, step in (("14", 4), ("15", 6)):
        assert saved["sizes"][size]["step"] == step
        assert_equal(dict(saved["sizes"][size]["model"]), seen[step // 2 - 1], size)
    assert_equal(dict(saved["best"]["model"]), seen[1], "best")

    task, model = prepared(header)
    model.eval().load_state_dict(saved["sizes"]["15"]["model"])
    with torch.no_grad():
        tested, held_out = (
            (model(examples.inputs).argmax(2) == examples.targets).double().mean().item()
            for examples in (task.test(15), task.valid(15))
        )
    assert [validation.get("test_accuracy") for validation in validations] == [None, None, {"15": tested}, None]
    assert list(epochs[0]["test_accuracy"]) == ["15", "16"]
    assert epochs == saved["metrics"]
    printed = capsys.readouterr().out
    title = "| RIM, chosen for each size | 14x14 | 15x15 |\n| --- | ---: | ---: |\n"
    tests = f"| accuracy, %, test |  | {100 * tested:.1f} |\n"
    assert f"{title}| accuracy, %, validation | 60.0 | 70.0 |\n{tests}" in printed

    (tmp_path / checkpoint.CHECKPOINT).unlink()  # the weights alone serve, too
    again = ["--no-train", "--log_dir", tmp_path, "--data_dir", header["arguments"]["data_dir"]]
    run(*again, small=False)
    evaluated, logged = capsys.readouterr().out.split("in the log:")
    assert re.search(rf"validation \| [0-9.]+ \| {100 * held_out:.1f} \|\n{re.escape(tests)}", evaluated)
    assert f"| 60.0 | 70.0 |\n{tests}" in logged
    weights = tmp_path / checkpoint.WEIGHTS
    weights.write_bytes(edited(lambda s: s["sizes"]["15"].clear())(weights.read_bytes()))
    assert f"{weights}: sizes.15.model is of type NoneType" in refused(*again, small=False)


def test_validation_at_other_sizes_leaves_the_training_as_it_is(run: Callable[..., None], tmp_path: Path) -> None:
    args = ["--valid", 9, "--epochs", 2, "--lr", 0.03, "--eval_sizes", 14, "--embed", 5, "--embed_dropout", 0.5]
    run(*args, "--log_dir", tmp_path / "one")
    run(*args, "--valid_sizes", 15, 17, "--valid_every", 1, "--log_dir", tmp_path / "several")
    one, several = (checkpoint.load(tmp_path / name) for name in ("one", "several"))
    for part in ("model", "best", "optimizer", "generators"):
        assert_equal(several[part], one[part], part)
    for line, more in zip(read_log(tmp_path / "one")[1:], read_log(tmp_path / "several")[1:], strict=True):
        assert line.keys() == more.keys() - {"held_out"}
        assert more["held_out"][-1]["valid_loss"]["14"] == more["valid_loss"] == line["valid_loss"]


def test_weights_that_several_sizes_have_chosen_are_in_a_file_once(run: Callable[..., None], tmp_path: Path) -> None:
    length = {}
    for name, sizes in (("two", [15]), ("four", [15, 16, 17])):
        wide = "--hidden_size", 48
        run("--valid", 9, "--valid_sizes", *sizes, "--epochs", 1, "--eval_sizes", "--log_dir", tmp_path / name, *wide)
        length[name] = [(tmp_path / name / file).stat().st_size for file in (checkpoint.WEIGHTS, checkpoint.CHECKPOINT)]
    parameters = 4 * read_log(tmp_path / "two")[0]["parameters"]
    for two, four, copies in zip(length["two"], length["four"], (1, 4), strict=True):  # the last, two moments, the chosen ones
        assert four - two < parameters / 10
        assert four < 1.3 * copies * parameters


def assert_evaluated(endings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The table of what was evaluated, and below it that of the log."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| accuracy")]
    assert all(line.endswith(ending) for line, ending in zip(lines, endings, strict=True))


def test_no_size_of_test_at_all(run: Callable[..., None], tmp_path: Path) -> None:
    run("--epochs", 1, "--valid", 9, "--eval_sizes", "--log_dir", tmp_path)
    assert read_log(tmp_path)[1]["test_accuracy"] == {}


def test_averaged_weights_are_what_is_evaluated(run: Callable[..., None], tmp_path: Path) -> None:
    """With one batch an epoch, each checkpoint has the weights after one more step."""
    weights, averages = [], []
    for epochs in (1, 2, 3):
        run("--ema", 0.75, "--batch_size", 41, "--lr", 0.01, "--epochs", epochs, "--log_dir", tmp_path, "--loadsaved")
        saved = checkpoint.load(tmp_path)
        weights.append(saved["model"]["readout.weight"])
        averages.append(saved["average"]["module.readout.weight"])
    torch.testing.assert_close(averages[0], weights[0])
    torch.testing.assert_close(averages[1], 0.75 * averages[0] + 0.25 * weights[1])
    torch.testing.assert_close(averages[2], 0.75 * averages[1] + 0.25 * weights[2])
    header, *lines = read_log(tmp_path)
    task, model = prepared(header)
    model.load_state_dict({name.removeprefix("module."): p for name, p in saved["average"].items() if name != "n_averaged"})
    inputs, labels = task.test(15)
    with torch.no_grad():
        loss = task.measure(model.eval()(inputs), labels)["loss"].mean().item()
    assert lines[-1]["test_loss"]["15"] == pytest.approx(loss)


def test_gradients_are_clipped_to_a_norm(run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    step = torch.optim.Adam.step

    def watched(self: torch.optim.Adam, *args: Any) -> Any:
        norms.append(torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]).norm().item())
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    run("--epochs", 1, "--clip_grad", 0.01, "--log_dir", tmp_path / "clipped")
    assert norms == pytest.approx([0.01] * 6, rel=1e-3)
    norms.clear()
    run("--epochs", 1, "--log_dir", tmp_path / "free")
    assert min(norms) > 0.02


def test_an_embedding_comes_before_the_layer() -> None:
    model = model_of("--hidden_size 12 --num_units 3 --embed 5")
    assert model.embed.weight.shape == (5, 10)
    assert model.rnn.input_size == 5
    lstm = model_of("--model LSTM --hidden_size 12 --embed 5")
    assert (lstm.embed.weight.shape, lstm.rnn.input_size) == ((5, 10), 5)
    assert not list(model_of("--hidden_size 12").embed.parameters())


@pytest.mark.parametrize("kind", ["", "--model LSTM", "--rnn_cell GRU"])
def test_half_of_the_embedding_and_of_what_is_read_out_is_dropped_in_training(kind: str) -> None:
    model = model_of(f"--hidden_size 60 --embed 50 --embed_dropout 0.5 --output_dropout 0.25 {kind}")
    given: dict[str, torch.Tensor] = {}
    model.rnn.register_forward_pre_hook(lambda _, args: given.update(x=args[0], state=args[1]))
    model.rnn.register_forward_hook(lambda _, args, result: given.update(output=result[0]))
    model.readout.register_forward_pre_hook(lambda _, args: given.update(read=args[0]))
    x = torch.randn(40, 12, 10)
    for share, mode in ((0.5, True), (0, False)):
        model.train(mode)(x)
        assert given["state"] is None
        for whole, kept, part in (
            (model.embed(x), given["x"], share),
            (given["output"][:, -10:], given["read"], share / 2),
        ):
            dropped = kept == 0
            assert dropped.double().mean().item() == pytest.approx(part, abs=0.02)
            torch.testing.assert_close(kept[~dropped], whole[~dropped] / (1 - part))
            if part:  # drawn for each feature at each step
                assert dropped.double().mean((0, 1)).std() < 0.1
                assert not torch.equal(dropped[:, 0], dropped[:, 1])


@pytest.mark.parametrize(("kind", "states"), [("", 2), ("--model LSTM", 2), ("--rnn_cell GRU", 1)])
def test_first_states_are_drawn_in_training_alone(kind: str, states: int) -> None:
    model = model_of(f"--hidden_size 60 --initial_state_std 3 {kind}")
    given: list[Any] = []
    model.rnn.register_forward_pre_hook(lambda _, args: given.append(args[1]))
    x = torch.randn(200, 12, 10)
    for _ in range(2):
        model.train()(x)
    drawn = [torch.stack(state) if states == 2 else state.unsqueeze(0) for state in given]
    assert not torch.equal(*drawn)
    for state in drawn:
        assert state.shape == (states, 1, 200, 60)
        assert state.std().item() == pytest.approx(3, rel=0.03)
        assert state.mean().item() == pytest.approx(0, abs=0.1)
    model.eval()(x)
    assert given[-1] is None


def test_without_the_noise_a_model_computes_and_draws_as_without_a_place_for_it() -> None:
    model, x = model_of("--hidden_size 24 --embed 5"), torch.randn(3, 12, 10)
    torch.manual_seed(0)
    expected = model.readout(model.rnn(model.embed(x))[0][:, -10:])
    state = torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(model(x), expected)
    assert torch.equal(torch.get_rng_state(), state)


def model_of(text: str, task: str = "copying") -> Model:
    args = arguments.build_parser(task).parse_args(text.split())
    return Model(args, TASKS[task](args))


def test_every_rim_argument_reaches_the_rim() -> None:
    given = {
        "num_units": 5, "k": 2, "rnn_cell": "GRU", "key_size_input": 7, "value_size_input": 9, "query_size_input": 7,
        "num_input_heads": 2, "input_dropout": 0.25, "key_size_comm": 6, "value_size_comm": 8, "query_size_comm": 6,
        "num_comm_heads": 3, "comm_dropout": 0.75,
    }  # fmt: skip
    text = " ".join(f"--{name} {value}" for name, value in given.items())
    cell = model_of(f"--hidden_size 20 --embed 3 {text}").rnn.cells[0]
    shapes = {name: tuple(p.shape) for name, p in cell.named_parameters()}
    assert shapes["input_attention.key.weight"] == (2 * 7, 3)
    assert shapes["input_attention.value.weight"] == (2 * 9, 3)
    assert shapes["dynamics.weight_hh"] == (5, 4, 3 * 4)
    assert shapes["communication.key.weight"] == (5, 4, 3 * 6)
    assert shapes["communication.value.weight"] == (5, 4, 3 * 8)
    assert (cell.k, cell.input_dropout, cell.comm_dropout) == (2, 0.25, 0.75)
    assert model_of("--hidden_size 60").rnn.cells[0].input_dropout == 0.1


@pytest.mark.parametrize(
    "kind", ["--model LSTM", "--num_units 3 --num_comm_heads 0", "--num_units 3 --num_comm_heads 0 --rnn_cell GRU"]
)
def test_a_forget_bias_makes_a_state_stay_and_changes_nothing_else(kind: str) -> None:
    built, kept = [], []
    for text in (f"--hidden_size 12 {kind}", f"--hidden_size 12 {kind} --forget_bias 30"):
        torch.manual_seed(0)
        built.append(model_of(text))
        h_0, c_0 = torch.full((1, 1, 12), 0.5), torch.full((1, 1, 12), 7.0)
        gru = built[-1].rnn.mode == "GRU"
        with torch.no_grad():
            _, last = built[-1].rnn(torch.ones(1, 1, 10), h_0 if gru else (h_0, c_0))
        kept.append((last - h_0 if gru else last[1] - c_0).abs().max().item())
    pairs = zip(built[0].named_parameters(), built[1].parameters(), strict=True)
    (name,) = (name for (name, plain), biased in pairs if not torch.equal(plain, biased))
    assert "bias_hh" in name
    assert kept[1] < (1e-6 if gru else 1)  # an LSTM adds up to 1 to what it has kept
    assert kept[0] > (0.01 if gru else 1)


def test_a_variant_differs_from_the_layer_in_what_its_name_says() -> None:
    x, sizes = torch.randn(2, 5, 10), {"num_units": 4, "k": 2}
    torch.manual_seed(0)
    rnn = RIM(10, 24, batch_first=True, **sizes)
    showing, gated = (VARIANTS[name](10, 24, **sizes) for name in ("shows-updates", "gated"))
    showing.load_state_dict(rnn.state_dict())
    with record(rnn) as ours, record(showing) as others:
        plain, shown = rnn(x)[0], showing(x)[0]
    assert torch.equal(ours[0].active[0, 0], others[0].active[0, 0])
    for state, active in ((plain, ours[0].active[0]), (shown, others[0].active[0])):
        silent = ~active[1:].transpose(0, 1)
        before, after = (part.unflatten(-1, (4, 6)) for part in (state[:, :-1], state[:, 1:]))
        assert torch.equal(after[silent], before[silent])  # neither shows in its own state
    assert not torch.allclose(plain[:, 0], shown[:, 0])
    assert plain[:, 0].count_nonzero() == shown[:, 0].count_nonzero() == 2 * 2 * 6

    blocked = VARIANTS["shows-updates-blocked"](10, 24, **sizes)
    blocked.load_state_dict(rnn.state_dict())
    assert torch.equal(blocked(x)[0], shown)
    learns = []
    for make in (showing, blocked):
        make.zero_grad()
        make(x[:1, :1])[0].sum().backward()
        silent = ~others[0].active[0, 0, 0]
        learns.append(make.cells[0].dynamics.weight_ih.grad[silent].abs().sum() > 0)
    assert learns == [True, False]

    alone = [make(10, 24, **sizes, num_comm_heads=0) for make in (partial(RIM, batch_first=True), VARIANTS["shows-updates"])]
    alone[1].load_state_dict(alone[0].state_dict())
    torch.testing.assert_close(alone[1](x)[0], alone[0](x)[0])

    output = gated.cells[0].communication.output
    gated.load_state_dict(rnn.state_dict(), strict=False)
    output.message.load_state_dict(rnn.cells[0].communication.output.state_dict())
    torch.nn.init.constant_(output.gate.bias, 50)  # an open gate, and it is the bound of the layer
    torch.testing.assert_close(gated(x)[0], plain)
    torch.nn.init.constant_(output.gate.bias, -50)  # a closed one, and nothing is heard
    without = VARIANTS["shows-updates"](10, 24, **sizes, num_comm_heads=0)
    without.load_state_dict({name: p for name, p in rnn.state_dict().items() if "communication" not in name})
    torch.testing.assert_close(gated(x)[0][:, 0], without(x)[0][:, 0])


def test_whether_communication_is_bounded_is_said_only_where_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    keywords: dict[str, Any] = {}
    monkeypatch.setattr(models, "RIM", lambda *sizes, **given: keywords.update(given) or torch.nn.Identity())
    for text, expected in (("", None), ("--comm_bounded", True), ("--no-comm_bounded", False)):
        keywords.clear()
        model_of(text)
        assert keywords.get("comm_bounded") is expected


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--num_units", 5], "num_units"),
        (["--k", 4], "k"),
        (["--query_size_input", 5], "query_size_input"),
        (["--input_dropout", 2], "input_dropout"),
        (["--batch_size", 0], "--batch_size: expected at least 1, got 0"),
        (["--lr", 0], "--lr has to be positive"),
        (["--checkpoint_minutes", -1], "--checkpoint_minutes"),
        (["--model", "GRU"], "--model"),
        (["--valid", -1], "--valid must not be negative"),
        (["--valid", 41], "error: --valid 41 leaves none of 41 digits to train"),
        (["--clip_grad", -1], "--clip_grad must not be negative"),
        (["--ema", 1], "--ema has to be at least 0 and less than 1"),
        (["--lr", "nan"], "--lr has to be a finite number, got nan"),
        (["--forget_bias", "inf"], "--forget_bias has to be a finite number, got inf"),
        (["--embed", 5, "--embed_dropout", 1], "--embed_dropout has to be at least 0 and less than 1"),
        (["--output_dropout", -0.5], "--output_dropout has to be at least 0 and less than 1"),
        (["--embed_dropout", 0.5], "--embed_dropout needs --embed"),
        (["--initial_state_std", -1], "--initial_state_std must not be negative"),
        (["--valid_sizes", 15], "--valid_sizes needs --valid"),
        (["--valid", 9, "--valid_every", 2], "--valid_every needs --valid_sizes"),
        (["--valid", 9, "--valid_sizes", 15, "--valid_every", -1], "--valid_every must not be negative"),
        (["--valid", 9, "--valid_sizes", 0], "--valid_sizes: expected at least 1, got 0"),
        (["--examples", 42], "error: --examples 42: there are 41 digits to train"),
        (["--test_examples", 5], "unrecognized arguments: --test_examples 5"),
    ],
)
def test_an_argument_out_of_range_is_named(args: list[object], says: str, refused: Callable[..., str], tmp_path: Path) -> None:
    assert says in refused(*args, "--log_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_cuda_without_a_gpu_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "--cuda: torch finds no GPU" in refused("--cuda", "--log_dir", tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run_and_spares_the_checkpoint(refused: Callable[..., str], tmp_path: Path) -> None:
    message = refused("--lr", "1e30", "--checkpoint_minutes", 0, "--epochs", 3, "--log_dir", tmp_path)
    assert re.match(r"error: the loss is (nan|inf) at epoch \d, batch \d; try a smaller --lr than 1e\+30", message)
    assert checkpoint.load(tmp_path)["progress"]["sums"]["loss"] < float("inf")


def test_schedules_of_the_learning_rate() -> None:
    assert [trainer.schedule("constant", 10)(step) for step in (0, 7, 10)] == [1, 1, 1]
    cosine = trainer.schedule("cosine", 10)
    assert [cosine(step) for step in (0, 5, 10)] == pytest.approx([1, 0.5, 0])
    one_cycle = trainer.schedule("one-cycle", 100)
    assert [one_cycle(step) for step in (0, 15, 30, 65, 100)] == pytest.approx([0.04, 0.52, 1, 0.5, 0])
    assert [trainer.schedule("constant", 10, warmup_steps=3)(step) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]


def test_activity_has_each_pixel_with_the_step_that_read_it(digits: Path) -> None:
    text = f"--data_dir {digits} --hidden_size 12 --num_units 3 --k 2 --input_size 4 --size 5"
    args = arguments.build_parser("sequential_mnist").parse_args(text.split())
    task = TASKS["sequential_mnist"](args)
    model, inputs = Model(args, task).eval(), task.test(5).inputs[:6]
    activity = task.places(report.activity(model, inputs), args)
    assert activity.shape == (6, 3, 5, 5)
    assert (activity.sum(1) == 2).all()
    with record(model.rnn) as records, torch.no_grad():
        model(inputs)
    for pixel in range(25):
        active = records[0].active[0, pixel // 4]
        assert torch.equal(activity[:, :, pixel // 5, pixel % 5], active)


def test_a_unit_is_painted_in_four_shades() -> None:
    ink, active = torch.tensor([[True, False], [True, False]]).numpy(), torch.tensor([[True, True], [False, False]]).numpy()
    image = report.paint(ink, active, (1.0, 0.0, 0.0))
    assert image.tolist() == [[[0.75, 0, 0], [1, 0.7, 0.7]], [[0.8] * 3, [1] * 3]]


# --- Stopping and going on


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


KILLABLE = ["--epochs", 2, "--checkpoint_minutes", 0, "--eval_sizes", 14, "--batch_size", 11, "--input_dropout", 0.3]
KILLABLE += ["--valid", 8, "--ema", 0.5, "--clip_grad", 1, "--warmup_steps", 2, "--lr", 0.01, "--valid_sizes", 15]
KILLABLE += ["--valid_every", 2, "--embed", 5, "--embed_dropout", 0.3, "--output_dropout", 0.3, "--initial_state_std", 0.5]


def test_killed_at_any_write_and_resumed_it_ends_as_if_never_stopped(
    run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dies before and after each write of each file and in the middle of a line of the log, each time in a new run."""
    monkeypatch.setattr(trainer, "SummaryWriter", None)
    monkeypatch.setattr(report, "draw_curves", lambda *args: None)
    monkeypatch.setattr(report, "draw_units", lambda *args: None)
    run(*KILLABLE, "--log_dir", tmp_path / "whole")
    real_replace, real_append = os.replace, checkpoint.append_metrics

    for point in range(100):
        countdown = iter(range(point, -1, -1))

        def may_die(half: Callable[[], None] = lambda: None, countdown: Iterator[int] = countdown) -> None:
            if next(countdown, None) == 0:
                half()
                raise Killed

        def dying_replace(temporary: Path, path: Path) -> None:
            may_die(lambda: temporary.write_bytes(temporary.read_bytes()[:100]))
            real_replace(temporary, path)
            may_die()

        def dying_append(log_dir: Path, line: dict[str, Any]) -> None:
            log = log_dir / checkpoint.METRICS
            may_die(lambda: log.write_text(log.read_text() + json.dumps(line)[:20]))
            real_append(log_dir, line)
            may_die()

        log_dir = tmp_path / str(point)
        with monkeypatch.context() as dying:
            dying.setattr(os, "replace", dying_replace)
            dying.setattr(checkpoint, "append_metrics", dying_append)
            try:
                run(*KILLABLE, "--log_dir", log_dir)
            except Killed:
                pass
            else:
                break
        run(*KILLABLE, "--log_dir", log_dir, "--loadsaved")
        assert_same_run(tmp_path / "whole", log_dir)
    assert point > 20


@pytest.mark.parametrize(("where", "call", "batch"), [("step", 3, 3), ("measure", 2, 2), ("measure", 3, 3)])
def test_asked_to_stop_it_saves_its_state_and_goes_on_bit_for_bit(
    where: str, call: int, batch: int, run: Callable[..., None], refused: Callable[..., str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In the middle of an epoch, of a validation within it, or of that at its end."""
    args = [*KILLABLE, "--checkpoint_minutes", 100]
    run(*args, "--log_dir", tmp_path / "whole")
    real, countdown = getattr(trainer.Trainer, where), iter([*[False] * (call - 1), True])

    def signalled(*given: Any) -> Any:
        if next(countdown, False):
            signal.raise_signal(signal.SIGTERM if where == "step" else signal.SIGINT)
        return real(*given)

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, where, signalled)
        message = refused(*args, "--log_dir", tmp_path / "stopped")
    assert message == f"stopped; --loadsaved --log_dir {tmp_path / 'stopped'} goes on"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert checkpoint.load(tmp_path / "stopped")["progress"]["batch"] == batch
    run("--loadsaved", "--log_dir", tmp_path / "stopped", small=False)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.skipif(os.name != "posix", reason="needs locks of files")
def test_two_processes_do_not_work_on_one_run(finished: Path, run: Callable[..., None], refused: Callable[..., str]) -> None:
    before = contents(finished)
    with checkpoint.locked(finished):
        assert "another process is at work on this run" in refused("--loadsaved", "--epochs", 2, "--log_dir", finished)
    assert contents(finished) == before
    run("--loadsaved", "--epochs", 2, "--log_dir", finished)


def test_a_run_that_another_process_went_on_with_meanwhile_goes_on_from_there(
    finished: Path,
    run: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The other one begins and ends while this one reads its data and builds its model."""
    run("--epochs", 3, "--log_dir", tmp_path / "whole")
    real = train.prepare

    def late(*args: Any) -> Any:
        monkeypatch.setattr(train, "prepare", real)
        run("--loadsaved", "--epochs", 2, "--log_dir", finished, small=False)
        return real(*args)

    monkeypatch.setattr(train, "prepare", late)
    run("--loadsaved", "--epochs", 3, "--log_dir", finished, small=False)
    assert "going on after 2 epochs and 0 batches" in capsys.readouterr().out
    assert_same_run(tmp_path / "whole", finished)


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes to kill in /proc")


def start(script: list[object], **environment: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen([sys.executable, *map(str, script)], env=environment)


def kill_in_the_middle(process: subprocess.Popen[bytes], log_dir: Path, epoch: int) -> None:
    """SIGKILL to `process` and its children as soon as a checkpoint lies within `epoch`."""
    while process.poll() is None:
        if (log_dir / checkpoint.CHECKPOINT).exists():
            progress = checkpoint.load(log_dir)["progress"]
            if progress["epoch"] == epoch and progress["batch"] > 0:
                break
        time.sleep(0.02)
    children = [int(pid) for task in Path(f"/proc/{process.pid}/task").glob("*/children") for pid in task.read_text().split()]
    for pid in (process.pid, *children):
        os.kill(pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"


@needs_proc
def test_sigkill_and_resume_end_bit_for_bit_as_an_uninterrupted_run(
    run: Callable[..., None], digits: Path, tmp_path: Path
) -> None:
    args = ["--data_dir", digits, *SMALL, "--epochs", 3, "--batch_size", 2, "--input_dropout", 0.3]
    args += ["--comm_dropout", 0.3, "--checkpoint_minutes", 0, "--lr_schedule", "one-cycle", "--log_dir"]
    run(*args, tmp_path / "whole", small=False)
    killed = tmp_path / "killed"
    kill_in_the_middle(start([EXAMPLE / "train.py", *args, killed]), killed, epoch=0)
    resume = ["--loadsaved", "--log_dir", killed]
    kill_in_the_middle(start([EXAMPLE / "train.py", *resume]), killed, epoch=2)
    run(*resume, small=False)
    assert_same_run(tmp_path / "whole", killed)
    assert len(read_log(killed)) == 1 + 3


def test_dropout_draws_depend_on_the_saved_generator(run: Callable[..., None], tmp_path: Path) -> None:
    """What makes the two tests above sharp: another generator state gives other parameters."""
    run(*KILLABLE, "--epochs", 1, "--log_dir", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    state = checkpoint.load(tmp_path / "b")
    state["generators"]["cpu"] = [torch.Generator().manual_seed(99).get_state()]
    checkpoint.save(tmp_path / "b", state)
    for name in "ab":
        run("--loadsaved", "--epochs", 2, "--log_dir", tmp_path / name, small=False)
    a, b = (checkpoint.load(tmp_path / name)["model"]["readout.weight"] for name in "ab")
    assert not torch.equal(a, b)


@pytest.fixture(scope="session")
def one_epoch(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    log_dir = tmp_path_factory.mktemp("one_epoch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", "--data_dir", str(digits), *SMALL, "--epochs", "1", "--log_dir", str(log_dir)])
        train.main()
    return log_dir


@pytest.fixture
def finished(one_epoch: Path, tmp_path: Path) -> Path:
    """The `log_dir` of a small run of one epoch, to be changed at will."""
    return shutil.copytree(one_epoch, tmp_path / "run")


def test_epochs_may_be_added(run: Callable[..., None], finished: Path, tmp_path: Path) -> None:
    run("--loadsaved", "--epochs", 2, "--log_dir", finished, small=False)
    run("--epochs", 2, "--log_dir", tmp_path / "whole")
    assert_same_run(tmp_path / "whole", finished)


def test_a_run_with_epochs_to_go_is_not_finished(
    run: Callable[..., None], refused: Callable[..., str], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it ended before, and wherever it is stopped: here between its last epoch and its pictures."""
    row = study.Row("run", "sequential_mnist", [0], [], Namespace(**read_log(finished)[0]["arguments"] | {"epochs": 2}))
    monkeypatch.setattr(study.Row, "log_dir", lambda row, runs, seed: finished)
    with monkeypatch.context() as patch:

        def stopped(self: trainer.Trainer) -> None:
            raise trainer.Stopped

        patch.setattr(trainer.Trainer, "test_chosen", stopped)
        refused("--loadsaved", "--epochs", 2, "--log_dir", finished, small=False)
    assert len(read_log(finished)) == 3
    assert not row.finished(finished, 0)
    run("--loadsaved", "--log_dir", finished, small=False)
    assert row.finished(finished, 0)


def test_a_run_from_before_there_were_weights_for_sizes_goes_on(
    run: Callable[..., None], finished: Path, tmp_path: Path
) -> None:
    path = finished / checkpoint.CHECKPOINT
    path.write_bytes(edited(lambda s: s.pop("sizes"))(path.read_bytes()))
    run("--loadsaved", "--epochs", 2, "--log_dir", finished, small=False)
    run("--epochs", 2, "--log_dir", tmp_path / "whole")
    assert_same_run(tmp_path / "whole", finished)


def test_epochs_may_not_be_taken_away(run: Callable[..., None], refused: Callable[..., str], finished: Path) -> None:
    run("--loadsaved", "--epochs", 2, "--log_dir", finished, small=False)
    before = contents(finished)
    assert "holds 2 epochs, more than --epochs 1" in refused("--loadsaved", "--epochs", 1, "--log_dir", finished, small=False)
    assert contents(finished) == before


def test_epochs_may_not_be_added_to_a_cosine(run: Callable[..., None], refused: Callable[..., str], tmp_path: Path) -> None:
    run("--epochs", 1, "--lr_schedule", "cosine", "--log_dir", tmp_path)
    assert "epochs 1, not 2" in refused("--loadsaved", "--epochs", 2, "--log_dir", tmp_path, small=False)


def test_another_commit_or_machine_is_noted_when_a_run_goes_on(
    run: Callable[..., None], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "commit", lambda: "another")
    for epochs in (2, 3):
        run("--loadsaved", "--epochs", epochs, "--log_dir", finished, small=False)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    run("--loadsaved", "--epochs", 4, "--log_dir", finished, small=False)
    header = read_log(finished)[0]
    assert header["commit"] != "another"
    now = {"commit": "another", "torch": str(torch.__version__)}
    more = f"{cpu()}, {threads + 1} threads"
    assert header["resumed"] == [{"epochs": 1, **now, "device": header["device"]}, {"epochs": 3, **now, "device": more}]


def test_other_examples_than_those_of_the_log_are_told_of(
    run: Callable[..., None], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for others in ([], ["--data_dir", SHIPPED]):
        capsys.readouterr()
        run("--no-train", *others, "--log_dir", finished, small=False)
        assert ("these are other examples than those of the log" in capsys.readouterr().out) is bool(others)


@pytest.mark.parametrize("place", ["a file", "a file/below it"])
def test_a_folder_that_cannot_be_is_named(place: str, refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    assert "a file" in refused("--log_dir", tmp_path / place)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (
            [],
            "checkpoint.pt, metrics.jsonl, weights.pt, curves.png, units.png, activity.json of an earlier run; .*--loadsaved",
        ),
        (["--seed", 1], "of an earlier run"),
        (["--loadsaved", "--seed", 1], "holds a run with other arguments: seed 0, not 1"),
        (["--loadsaved", "--task", "sequential_mnist", "--size", 13], "size 14, not 13"),
        (["--loadsaved", "--hidden_size", 24, "--lr", 0.5], "hidden_size 12, not 24; lr 0.0001, not 0.5"),
        (["--loadsaved", "--data_dir", SHIPPED], "other arguments: data "),
        (["--loadsaved", "--task", "copying"], "holds a run of another task: sequential_mnist"),
        (["--loadsaved", "--model", "LSTM"], "--num_units belongs to a RIM"),
        (["--loadsaved", "--valid", 5], "valid 0, not 5"),
        (["--loadsaved", "--ema", 0.9], "ema 0.0, not 0.9"),
        (["--no-train", "--hidden_size", 24], "hidden_size 12, not 24"),
    ],
)
def test_a_second_run_that_does_not_fit_loses_nothing(
    args: list[object], says: str, finished: Path, refused: Callable[..., str]
) -> None:
    before = contents(finished)
    assert re.search(says, refused("--epochs", 1, *args, "--log_dir", finished))
    assert contents(finished) == before


@pytest.mark.parametrize("flags", [[], ["--loadsaved"]])
def test_a_log_without_its_checkpoint_is_not_overwritten(flags: list[str], finished: Path, refused: Callable[..., str]) -> None:
    (finished / checkpoint.CHECKPOINT).unlink()
    before = contents(finished)
    assert "metrics.jsonl, weights.pt, curves.png, units.png, activity.json of an earlier run" in refused(
        *flags, "--log_dir", finished
    )
    assert contents(finished) == before


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def edit(content: bytes) -> bytes:
        state = torch.load(io.BytesIO(content), weights_only=True)
        change(state)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        return buffer.getvalue()

    return edit


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def pickled(content: bytes) -> bytes:
    buffer = io.BytesIO()
    torch.save({"header": Path("code")}, buffer)
    return buffer.getvalue()


VALIDATION = {"step": 4, **{f"valid_{name}": {"14": 0.5, "15": 0.5} for name in ("accuracy", "loss")}}
QUERY = "rnn.cells.0.input_attention.query.weight"
BROKEN_CHECKPOINTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda old: b"", "not a checkpoint, or a damaged one"),
    "truncated": (lambda old: old[: len(old) // 2], "not a checkpoint, or a damaged one"),
    "one bit wrong": (flip, "not a checkpoint, or a damaged one"),
    "text": (lambda old: b"hello", "not a checkpoint, or a damaged one"),
    "code in it": (pickled, "not a checkpoint, or a damaged one: Weights only load failed"),
    "a tensor": (edited(lambda s: s.clear()), "it has no dict named header"),
    "part missing": (edited(lambda s: s.pop("generators")), "it has no dict named generators"),
    "no task": (edited(lambda s: s["header"].pop("task")), "its header has no task"),
    "no arguments": (edited(lambda s: s["header"].pop("arguments")), "its header has no arguments"),
    "a best epoch without validation": (edited(lambda s: s["best"].update(epoch=1)), "best.epoch is unexpected"),
    "parameter missing": (edited(lambda s: s["model"].pop(QUERY)), rf"model.{QUERY} is missing"),
    "parameter too many": (edited(lambda s: s["model"].update(x=torch.ones(1))), "model.x is unexpected"),
    "parameter of another shape": (
        edited(lambda s: s["model"].update({QUERY: torch.ones(2, 3)})),
        rf"model.{QUERY} is torch.float32 \(2, 3\), expected torch.float32 \(3, 4, 8\)",
    ),
    "parameter of another dtype": (edited(lambda s: s["model"].update({QUERY: s["model"][QUERY].double()})), "torch.float64"),
    "moment of another shape": (
        edited(lambda s: s["optimizer"]["state"][2].update(exp_avg=torch.ones(5))),
        r"optimizer.state.2.exp_avg is torch.float32 \(5,\)",
    ),
    "moments of one parameter missing": (edited(lambda s: s["optimizer"]["state"].pop(3)), "optimizer.state.3 is missing"),
    "moments of all missing": (edited(lambda s: s["optimizer"].update(state={})), "optimizer.state.0 is missing"),
    "generator cut short": (
        edited(lambda s: s["generators"].update(order=s["generators"]["order"][:7])),
        r"generators.order is torch.uint8 \(7,\)",
    ),
    "generator of another process": (
        edited(lambda s: s["generators"]["cpu"].append(torch.ones(1))),
        "cpu has 2 entries, expected 1",
    ),
    "nonsense for a generator": (edited(lambda s: s["generators"]["cpu"][0].fill_(255)), "generators"),
    "position of another type": (
        edited(lambda s: s["progress"].update(batch="2")),
        "progress.batch is of type str, expected int",
    ),
    "position out of range": (edited(lambda s: s["progress"].update(batch=7)), "progress"),
    "log of another length": (edited(lambda s: s["metrics"].pop()), "progress"),
}


@pytest.mark.parametrize("case", BROKEN_CHECKPOINTS)
def test_a_broken_checkpoint_is_refused_before_anything_is_overwritten(
    case: str, finished: Path, refused: Callable[..., str]
) -> None:
    breaks, says = BROKEN_CHECKPOINTS[case]
    path = finished / checkpoint.CHECKPOINT
    path.write_bytes(breaks(path.read_bytes()))
    before = contents(finished)
    message = refused("--loadsaved", "--epochs", 2, "--log_dir", finished)
    assert message.startswith(f"error: {path}: ")
    assert re.search(says, message)
    assert contents(finished) == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s["best"].clear(), "best.epoch is missing"),
        (lambda s: s["best"]["model"].update({QUERY: torch.ones(2)}), f"best.model.{QUERY} is torch.float32"),
        (lambda s: s["average"].pop(f"module.{QUERY}"), f"average.module.{QUERY} is missing"),
        (lambda s: s.pop("best"), "it has no dict named best"),
        (lambda s: s.pop("sizes"), "sizes.14 is missing"),
        (lambda s: s["sizes"].update({"15": {}}), "sizes.15.model is missing"),
        (
            lambda s: s["sizes"]["14"].update(model=s["sizes"]["14"]["model"] | {QUERY: torch.ones(2)}),
            f"sizes.14.model.{QUERY} is torch.float32",
        ),
        (lambda s: s["sizes"]["15"].update(step=3), "sizes.15.step is 3, and the log has no validation there"),
        (lambda s: s["progress"].update(held_out=3), "progress.held_out is of type int, expected list"),
        (lambda s: s["progress"].update(held_out=[{"step": 3}]), "progress.held_out.0.valid_accuracy is missing"),
        (lambda s: s["progress"].update(held_out=[VALIDATION]), "does not fit 1 epochs in the log"),
    ],
)
def test_best_and_averaged_weights_are_checked_too(
    change: Callable[[dict[str, Any]], object], says: str, run: Callable[..., None], refused: Callable[..., str], tmp_path: Path
) -> None:
    run("--valid", 9, "--valid_sizes", 15, "--ema", 0.5, "--epochs", 1, "--log_dir", tmp_path)
    path = tmp_path / checkpoint.CHECKPOINT
    path.write_bytes(edited(change)(path.read_bytes()))
    before = contents(tmp_path)
    assert says in refused("--loadsaved", "--epochs", 2, "--log_dir", tmp_path, small=False)
    assert contents(tmp_path) == before


def test_no_train_evaluates_the_saved_model_and_leaves_the_run_alone(
    run: Callable[..., None], refused: Callable[..., str], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for picture in (report.CURVES, report.UNITS):  # neither made nor made anew: they show the run as it was trained
        (finished / picture).unlink()
    before = contents(finished)
    capsys.readouterr()
    run("--no-train", "--eval_sizes", 15, 20, "--log_dir", finished, small=False)
    accuracy = read_log(finished)[-1]["test_accuracy"]["15"]
    assert f"| RIM | 15x15 | 20x20 |\n| --- | ---: | ---: |\n| accuracy, % | {100 * accuracy:.1f} | " in capsys.readouterr().out
    assert contents(finished) == before
    (finished / checkpoint.CHECKPOINT).unlink()
    weights = finished / checkpoint.WEIGHTS
    weights.write_bytes(edited(lambda s: s["best"]["model"].pop(QUERY))(weights.read_bytes()))
    assert f"{weights}: best.model.{QUERY} is missing" in refused("--no-train", "--log_dir", finished)
    assert "weights.pt: no such file" in refused("--no-train", "--log_dir", tmp_path / "nothing")


def test_table_and_curves_come_from_the_log_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log, picture = EXAMPLE / "results/demo/sequential_mnist/RIM/seed-0/metrics.jsonl", tmp_path / "curves.png"
    monkeypatch.setattr(sys, "argv", ["report.py", str(log), str(picture)])
    report.main()
    assert picture.read_bytes().startswith(b"\x89PNG")
    accuracies = json.loads(log.read_text().splitlines()[-1])["test_accuracy"].values()
    cells = " | ".join(f"{100 * accuracy:.1f}" for accuracy in accuracies)
    assert f"| RIM | 14x14 | 16x16 | 19x19 | 24x24 |\n| --- | ---: | ---: | ---: | ---: |\n| accuracy, % | {cells} |" in (
        capsys.readouterr().out
    )


# --- Several processes


def torchrun(*args: object) -> list[object]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, EXAMPLE / "train.py", *args]


@needs_proc
def test_two_processes_have_the_losses_of_one_and_go_on_after_sigkill(
    run: Callable[..., None], digits: Path, tmp_path: Path
) -> None:
    args = ["--data_dir", digits, *SMALL, "--input_dropout", 0, "--comm_dropout", 0, "--epochs", 2, "--lr", 0.01]
    args += ["--checkpoint_minutes", 0, "--log_dir"]
    run(*args, tmp_path / "one", small=False)
    kill_in_the_middle(start(torchrun(*args, tmp_path / "two")), tmp_path / "two", epoch=1)
    assert start(torchrun("--loadsaved", "--log_dir", tmp_path / "two")).wait() == 0
    one, two = (read_log(tmp_path / name)[1:] for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
        assert a["test_loss"] == pytest.approx(b["test_loss"], rel=1e-5)
        assert (a["train_accuracy"], a["test_accuracy"]) == (b["train_accuracy"], b["test_accuracy"])
    models = [checkpoint.load(tmp_path / name)["model"] for name in ("one", "two")]
    for name, parameter in models[0].items():
        torch.testing.assert_close(models[1][name], parameter, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(os.name != "posix", reason="needs locks of files")
def test_two_processes_end_where_the_first_one_alone_is_refused(finished: Path) -> None:
    before = contents(finished)
    with checkpoint.locked(finished):
        command = [sys.executable, *map(str, torchrun("--loadsaved", "--log_dir", finished))]
        ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120)
    assert ended.returncode == 1
    assert f"error: {finished}: another process is at work on this run\n" in ended.stderr
    assert contents(finished) == before


def test_each_process_goes_on_with_its_own_dropout(finished: Path) -> None:
    saved = checkpoint.load(finished)
    saved["generators"]["cpu"] = [torch.Generator().manual_seed(seed).get_state() for seed in (1, 2)]
    saved["generators"]["cuda"] = [None, None]

    class Second(Processes):
        rank, count = 1, 2

        def __init__(self) -> None:
            self.device = torch.device("cpu")

        def parallel(self, model: torch.nn.Module) -> torch.nn.Module:
            return model

        def gather(self, value: Any) -> list[Any]:
            return [value, value]

    args = Namespace(**saved["header"]["arguments"], log_dir=str(finished))
    task, model = prepared(saved["header"])
    second = trainer.Trainer(args, saved["header"], model, task, Second())
    second.load_state(saved)
    assert torch.equal(torch.get_rng_state(), saved["generators"]["cpu"][1])


# --- A whole study

STUDY = """
[copying]
seeds = [0, 1]
cuda = false
size = 3
eval_sizes = [3, 5]
hidden_size = 12
epochs = 2
batch_size = 16
examples = 400
test_examples = 40
valid = 40
lr = 1e-2

[[rows]]
name = "RIM 3/2"
task = "copying"
num_units = 3

[[rows]]
name = "LSTM"
task = "copying"
model = "LSTM"
seeds = [0]
"""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Runs study.py or study_report.py on `STUDY`, or on another text, in this process."""

    def command(module: Any, *args: object, text: str = STUDY) -> None:
        (tmp_path / "tiny.toml").write_text(text)
        given = [f"{module.__name__}.py", tmp_path / "tiny.toml", "--runs", tmp_path / "runs", *args]
        monkeypatch.setattr(sys, "argv", [*map(str, given)])
        module.main()

    return command


def test_a_study_is_stopped_goes_on_and_is_reported(
    command: Callable[..., None], run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    log_dirs = [runs / "copying" / name for name in ("RIM-3-2/seed-0", "RIM-3-2/seed-1", "LSTM/seed-0")]
    (tmp_path / "tiny.toml").write_text(STUDY)
    process = start([EXAMPLE / "study.py", tmp_path / "tiny.toml", "--runs", runs])
    while process.poll() is None and not (log_dirs[0] / checkpoint.METRICS).exists():
        time.sleep(0.01)
    process.terminate()
    assert process.wait() == 1
    checkpoint.load(log_dirs[0])
    with checkpoint.locked(log_dirs[0]):  # nobody is at work on it any more
        pass
    assert not log_dirs[2].exists()
    command(study_report)
    printed = capsys.readouterr().out
    assert "| LSTM, *no epoch yet* | 0 |" in printed

    command(study, "--jobs", 2)
    printed = capsys.readouterr().out
    assert re.search("3 runs, [23] of them not finished", printed)
    assert all(f"copying, {name} is finished" in printed for name in ("RIM 3/2, seed 1", "LSTM, seed 0"))
    assert "copying, LSTM, seed 0: epoch 2/2  train loss" in printed
    text = "--task copying --no-cuda --size 3 --eval_sizes 3 5 --hidden_size 12 --epochs 2 --batch_size 16 --examples 400"
    text += " --test_examples 40 --valid 40 --lr 1e-2 --num_units 3"
    run(*text.split(), "--log_dir", tmp_path / "alone", small=False)
    assert_same_run(tmp_path / "alone", log_dirs[0])
    command(study)
    assert "3 runs, 0 of them not finished" in capsys.readouterr().out
    (tmp_path / "published").mkdir()
    (log_dirs[0].parents[1]).rename(tmp_path / "published" / "copying")
    command(study, "--rows", "RIM 3/2", "--published", tmp_path / "published")
    assert "2 runs, 0 of them not finished" in capsys.readouterr().out
    (tmp_path / "published" / "copying").rename(log_dirs[0].parents[1])
    command(study, "--seeds", 1)
    assert "1 runs, 0 of them not finished" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has no row with seed 2 or 3"):
        command(study, "--seeds", 2, 3)

    command(study_report)
    printed = capsys.readouterr().out
    assert (runs / study_report.TABLE).read_text() + "\n" == printed
    assert re.search(r"\| RIM 3/2 \| 0, 1 \| (chosen, )?last: 2, 2 \|", printed)
    assert "| LSTM | 0 | last: 2 |" in printed
    assert "unfinished" not in printed
    for name in ("sizes", "curves", "units"):
        assert (runs / "copying" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_study_goes_on_past_a_run_that_fails(
    command: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stand-ins for the runs: the one of the RIM with seed 1 fails."""

    def stand_in(row: study.Row, seed: int, args: Namespace) -> subprocess.Popen[bytes]:
        log_dir = row.log_dir(args.runs, seed)
        log_dir.mkdir(parents=True, exist_ok=True)
        with open(log_dir / study.OUTPUT, "w") as output:
            output.write("begins\nerror: no space\n")
        return subprocess.Popen([sys.executable, "-S", "-c", f"raise SystemExit({seed})"])

    monkeypatch.setattr(study, "start", stand_in)
    with pytest.raises(SystemExit, match="1 failed: copying, RIM 3/2, seed 1"):
        command(study)
    printed = capsys.readouterr().out
    assert "copying, RIM 3/2, seed 1 failed: error: no space" in printed
    assert "copying, LSTM, seed 0 is finished" in printed


HEADER = {
    "commit": f"{'0123456789' * 4}-dirty", "torch": "2.99", "python": "3.99", "platform": "Linux-1", "device": "a processor",
    "began": "2026-01-01T00:00:00+00:00",
}  # fmt: skip


def fake_log(row: study.Row, runs: Path, seed: int, accuracies: list[float], chosen: int) -> None:
    """A log with the same accuracy in validation and tests, and its tenth for a loss."""
    log_dir = row.log_dir(runs, seed)
    log_dir.mkdir(parents=True)
    lines: list[dict[str, Any]] = [HEADER | {"task": row.task, "arguments": vars(row.arguments) | {"seed": seed}}]
    for epoch, accuracy in enumerate(accuracies, 1):
        line: dict[str, Any] = {"epoch": epoch, "seconds": 50.0, "evaluation_seconds": 10.0, "chosen": min(chosen, epoch)}
        for name, value in (("accuracy", accuracy), ("loss", accuracy / 10)):
            line |= {f"train_{name}": value, f"valid_{name}": value, f"test_{name}": {"3": value, "5": value / 2}}
        lines.append(line)
    (log_dir / checkpoint.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"epoch": ')


def test_the_table_has_mean_and_spread_of_the_chosen_epoch_and_the_last(
    command: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.toml").write_text(STUDY)
    rim, lstm = study.read(tmp_path / "tiny.toml")
    fake_log(rim, tmp_path / "runs", 0, [0.8, 0.6], chosen=1)
    fake_log(rim, tmp_path / "runs", 1, [0.5, 0.7], chosen=2)
    fake_log(lstm, tmp_path / "runs", 0, [0.9], chosen=1)
    command(study_report)
    assert (
        "| accuracy, % | seeds | epoch | validation | 3 | 5 | time |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| RIM 3/2 | 0, 1 | chosen: 1, 2 | 75.0 ± 7.1 | 75.0 ± 7.1 | 37.5 ± 3.5 | 2.0 min |\n"
        "| RIM 3/2 | 0, 1 | last: 2, 2 | 65.0 ± 7.1 | 65.0 ± 7.1 | 32.5 ± 3.5 | 2.0 min |\n"
        "| LSTM, *unfinished* | 0 | chosen, last: 1 of 2 | 90.0 | 90.0 | 45.0 | 1.0 min |\n"
    ) in capsys.readouterr().out
    begin, end = marks("tiny, copying, epoch by epoch", study_report.WRITER)
    (tmp_path / "page.md").write_text(f"{begin}\n{end}\n")
    command(study_report, "--rows", "LSTM", "RIM 3/2", "--write", tmp_path / "page.md")
    assert (
        "| cross-entropy | seed | epoch | validation | 3 | 5 |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| RIM 3/2 | 0 | 1 | 0.080 | 0.080 | 0.040 |\n"
        "| RIM 3/2 | 0 | 2 | 0.060 | 0.060 | 0.030 |\n"
        "| RIM 3/2 | 1 | 1 | 0.050 | 0.050 | 0.025 |\n"
        "| RIM 3/2 | 1 | 2 | 0.070 | 0.070 | 0.035 |\n"
        "| LSTM | 0 | 1 | 0.090 | 0.090 | 0.045 |\n"
    ) in (tmp_path / "page.md").read_text()
    with pytest.raises(SystemExit, match=r"is of a run with other arguments: lr 0\.01, not 0\.02"):
        command(study_report, text=STUDY.replace("1e-2", "2e-2"))
    with pytest.raises(SystemExit, match="other arguments: epochs 2, not 4; lr_schedule constant, not cosine"):
        command(study_report, text=STUDY.replace("epochs = 2", 'epochs = 4\nlr_schedule = "cosine"'))
    log = rim.log_dir(tmp_path / "runs", 0) / checkpoint.METRICS
    text = log.read_text()
    log.write_text(text.replace('"task"', '"parameters": 5, "task"', 1))
    with pytest.raises(SystemExit, match="seeds of RIM 3/2 have 0 and 5 parameters: a default of the layer was another one"):
        command(study_report)
    log.write_text(text.replace('"ema": 0.0, ', ""))  # from before there was that argument
    command(study_report)
    with pytest.raises(SystemExit, match=r"other arguments: ema 0\.0, not 0\.9"):
        command(study_report, text=STUDY.replace("epochs = 2", "epochs = 2\nema = 0.9"))


def test_both_ways_to_choose_stand_side_by_side(
    command: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At size 3 two seeds are best after the second epoch, at 5 one after half an epoch, one after the first: least entropy."""
    text = STUDY.replace("valid = 40", "valid = 40\nvalid_sizes = [5]\nvalid_every = 13")
    (tmp_path / "tiny.toml").write_text(text)
    rim, lstm = study.read(tmp_path / "tiny.toml")
    for seed, at_5 in ((0, (0.3, 0.5, 0.6, 0.7)), (1, (0.9, 0.5, 0.6, 0.5))):
        fake_log(rim, tmp_path / "runs", seed, [0.8, 0.6], chosen=2)
        log = rim.log_dir(tmp_path / "runs", seed)
        header, *lines = checkpoint.read_metrics(log / checkpoint.METRICS)
        validations = [
            {"step": step, "valid_loss": {"3": at_3, "5": value}, "valid_accuracy": {"3": 1 - at_3, "5": 1 - value}}
            for step, at_3, value in zip((13, 25, 38, 50), (0.09, 0.08, 0.07, 0.06), at_5, strict=True)
        ]
        validations[0 if seed == 0 else 1] |= {"test_loss": {"5": 0.2}, "test_accuracy": {"5": 0.8}}
        validations[3] |= {"test_loss": {"3": 0.04}, "test_accuracy": {"3": 0.96}}
        lines[0]["held_out"], lines[1]["held_out"] = validations[:2], validations[2:]
        checkpoint.write_metrics(log, [header, *lines])
    fake_log(lstm, tmp_path / "runs", 0, [0.9], chosen=1)
    command(study_report, text=text)
    assert (
        "| cross-entropy | seeds | epoch | validation | 3 | 5 | time |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| RIM 3/2 | 0, 1 | for each size: 2/0.52, 2/1 | 0.060 ± 0.000 | 0.040 ± 0.000 | 0.200 ± 0.000 | 2.0 min |\n"
        "| RIM 3/2 | 0, 1 | chosen, last: 2, 2 | 0.060 ± 0.000 | 0.060 ± 0.000 | 0.030 ± 0.000 | 2.0 min |\n"
    ) in capsys.readouterr().out
    page = tmp_path / "page.md"
    page.write_text("".join("{}\n{}\n".format(*marks(f"tiny, copying, {kind}", study_report.WRITER)) for kind in KINDS))
    command(study_report, "--write", page, text=text)
    assert (
        "| cross-entropy | seeds | chosen | 3 | 5 |\n| --- | ---: | ---: | ---: | ---: |\n"
        "| RIM 3/2 | 0, 1 | for each size | 0.040 ± 0.000 | 0.200 ± 0.000 |\n"
        "| RIM 3/2 | 0, 1 | by 3 | 0.060 ± 0.000 | 0.030 ± 0.000 |\n"
        "| LSTM, *unfinished* | 0 | by 3 | 0.090 | 0.045 |\n"
    ) in page.read_text()
    assert (
        "| cross-entropy, held out | seeds | chosen | 3 | 5 | mean | time |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| RIM 3/2 | 0, 1 | for each size: 2/0.52, 2/1 | 0.060 ± 0.000 | 0.400 ± 0.141 | 0.230 ± 0.071 | 2.0 min |\n"
        "| RIM 3/2 | 0, 1 | by 3: 2, 2 | 0.060 ± 0.000 | 0.600 ± 0.141 | 0.330 ± 0.071 | 2.0 min |\n"
    ) in page.read_text()
    validations[1].pop("test_loss")  # it was stopped before the last of its tests
    checkpoint.write_metrics(log, [header, *lines])
    command(study_report, text=text)
    assert "| RIM 3/2, *unfinished* | 1 | for each size: 2/1 of 2 |" in capsys.readouterr().out


KINDS = ("in short", "held out")


@pytest.mark.parametrize("content", ["", "{}", '{"active": 5}', '{"active": []}', '{"active": [[1], [1, 2]]}', "[[1]]"])
def test_a_damaged_file_of_activity_is_named(content: str, command: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(STUDY)
    rim = study.read(tmp_path / "tiny.toml")[0]
    fake_log(rim, tmp_path / "runs", 0, [0.8, 0.6], chosen=1)
    file = rim.log_dir(tmp_path / "runs", 0) / report.ACTIVITY
    file.write_text(content)
    with pytest.raises(SystemExit, match=f"^error: {re.escape(str(file))}: not what a run says of its units, or damaged"):
        command(study_report)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[copying]", "[copyng]", "copyng is no task; there are sequential_mnist, copying, adding"),
        ("[copying]", "[copying", "tiny.toml: "),
        ('task = "copying"\nmodel', 'task = "sorting"\nmodel', "a row needs a name and a task"),
        ("seeds = [0]", "seeds = 0", "LSTM needs a list of seeds"),
        ("seeds = [0]", "seeds = [0, 3, 0]", "LSTM has a seed twice"),
        ('name = "LSTM"', 'name = "RIM 3-2"', "two rows of copying have the name RIM 3"),
        ("num_units", "num_unts", "tiny.toml: RIM 3/2: error: unrecognized arguments: --num_unts 3"),
        ('model = "LSTM"', 'model = "LSTM"\nk = 2', "tiny.toml: LSTM: error: --k belongs to a RIM"),
        (STUDY[STUDY.index("[[rows]]") :], "", "has no rows"),
        (STUDY[STUDY.index("[[rows]]") :], "[rows]\nname = 'LSTM'", "rows should be an array of tables"),
        (STUDY, "rows = [3]", "expected a table of arguments for a task or a row, got 3"),
        ("[copying]", "adding = 5\n[copying]", "expected a table of arguments for a task or a row, got 5"),
        ('task = "copying"\nmodel', 'task = ["copying"]\nmodel', "a row needs a name"),
        ('name = "LSTM"', 'name = ".."', "a row needs a name"),
        ('name = "LSTM"', 'name = "a | b"', "no | in the name: a | b, copying"),
        ("seeds = [0]", "seeds = [true]", "LSTM needs a list of seeds, numbers from 0 on"),
        ("seeds = [0]", "seeds = [0]\nlog_dir = 'here'", "LSTM: log_dir is not for a study to say"),
        ("seeds = [0]", "seeds = [0]\nhelp = true", "LSTM: help is not for a study to say"),
    ],
)
def test_a_study_that_cannot_be_run_is_refused_at_once(
    old: str, new: str, says: str, command: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        command(study, text=STUDY.replace(old, new, 1))
    assert says in (capsys.readouterr().err if exit.value.code == 2 else str(exit.value.code))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "damage", [lambda text: text[:-60] + "\n", lambda text: "{}\n", lambda text: text.replace(": 2,", ": 3,")]
)
@pytest.mark.parametrize("program", [study, study_report])
def test_a_damaged_log_is_named(
    program: Any, damage: Callable[[str], str], command: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "tiny.toml").write_text(STUDY)
    rim = study.read(tmp_path / "tiny.toml")[0]
    fake_log(rim, tmp_path / "runs", 0, [0.8, 0.6], chosen=1)
    log = rim.log_dir(tmp_path / "runs", 0) / checkpoint.METRICS
    log.write_text(damage(log.read_text().removesuffix('{"epoch": ')))
    with pytest.raises(SystemExit, match=f"{re.escape(str(log))}: not a log, or a damaged one"):
        command(program)


def test_a_row_whose_chosen_epoch_was_not_tested_is_not_finished(
    command: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.toml").write_text(STUDY)
    rim = study.read(tmp_path / "tiny.toml")[0]
    fake_log(rim, tmp_path / "runs", 0, [0.8, 0.6], chosen=1)
    log = rim.log_dir(tmp_path / "runs", 0) / checkpoint.METRICS
    header, *lines = checkpoint.read_metrics(log)
    lines[0] |= {"test_accuracy": {}, "test_loss": {}}  # it was stopped after its last epoch
    checkpoint.write_metrics(log.parent, [header, *lines])
    command(study_report)
    assert "| RIM 3/2, *unfinished* | 0 | chosen: 1 of 2 |" in capsys.readouterr().out


def test_a_study_is_published_and_its_tables_put_into_a_page(
    command: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.toml").write_text(STUDY)
    rim = study.read(tmp_path / "tiny.toml")[0]
    fake_log(rim, tmp_path / "runs", 0, [0.8, 0.6], chosen=1)
    fake_log(rim, tmp_path / "runs", 1, [0.5, 0.7], chosen=2)
    (rim.log_dir(tmp_path / "runs", 0) / report.UNITS).write_bytes(b"a picture")
    log = rim.log_dir(tmp_path / "runs", 0) / checkpoint.METRICS
    header, *lines = checkpoint.read_metrics(log)
    header["arguments"]["data_dir"], header["command"] = "my files", "python train.py --data_dir 'my files' --seed 0"
    checkpoint.write_metrics(log.parent, [header, *lines])
    for args in (["--rows", "RIM 3/2"], ["--seeds", 0], ["--runs", tmp_path / "results"]):
        with pytest.raises(SystemExit, match="--publish takes a study as a whole"):
            command(study_report, *args, "--publish", tmp_path / "results")
    command(study_report, "--publish", tmp_path / "results")
    assert capsys.readouterr().out == (tmp_path / "results" / study_report.TABLE).read_text() + "\n"
    assert (rim.log_dir(tmp_path / "results", 0) / report.UNITS).read_bytes() == b"a picture"
    published = [rim.epochs(tmp_path / folder, 1) for folder in ("runs", "results")]
    assert published[0] == published[1]
    header = rim.epochs(tmp_path / "results", 0)[0]
    assert "data_dir" not in header["arguments"]
    assert header["command"] == "python train.py --seed 0"

    checkpoint.write_metrics(log.parent, [header, lines[0] | {"train_loss": 9.0}])  # begun again, and not as far yet
    command(study_report, "--publish", tmp_path / "results")
    assert rim.epochs(tmp_path / "results", 0)[1:] == lines
    checkpoint.write_metrics(log.parent, [header, *lines])
    capsys.readouterr()

    page = tmp_path / "page.md"
    begin, end = marks("tiny, copying, in short", study_report.WRITER)
    page.write_text(f"# Title\n{begin}\n{end}\nThe rest.\n")
    command(study_report, "--rows", "RIM 3/2", "--write", page)
    assert page.read_text() == (
        f"# Title\n{begin}\n| cross-entropy | seeds | 3 | 5 |\n| --- | ---: | ---: | ---: |\n"
        f"| RIM 3/2 | 0, 1 | 0.075 ± 0.007 | 0.037 ± 0.004 |\n{end}\nThe rest.\n"
    )
    command(study_report, "--rows", "RIM 3/2", "--check", page)
    with pytest.raises(SystemExit, match="not the tables of"):
        command(study_report, "--check", page)  # the LSTM is missing
    assert capsys.readouterr().out == ""


STUDIES = ("study", "full", "by_epoch", "search", "search_pixel", "search_sizes", "search_copying", "methods")


@pytest.mark.parametrize(
    ("name", "args", "page"),
    [
        ("study", ["--rows", "RIM 6/4", "LSTM"], "README.md"),
        ("full", [], "README.md"),
        ("full", [], "docs/reproduction.md"),
        ("demo", ["--seeds", 0], "README.md"),
        ("demo", [], "README.md"),
        ("study", [], "docs/reproduction.md"),
        *((name, [], "docs/every_run.md") for name in STUDIES),
    ],
)
def test_a_page_has_the_tables_of_the_committed_logs(
    name: str, args: list[object], page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [EXAMPLE / f"{name}.toml", "--runs", EXAMPLE / "results" / name, *args, "--check", ROOT / page]
    monkeypatch.setattr(sys, "argv", ["study_report.py", *map(str, given)])
    study_report.main()


@pytest.mark.parametrize("name", [*STUDIES, "demo"])
def test_every_row_of_the_studies_can_be_built_and_is_in_the_table(name: str, tmp_path: Path) -> None:
    rows = study.read(EXAMPLE / f"{name}.toml")
    text = study_report.write(Namespace(runs=tmp_path, study=Path("x.toml"), seeds=None), rows)
    for row in rows:
        assert f"| {row.name}, *no epoch yet* |" in text
        args = Namespace(**vars(row.arguments) | {"comm_bounded": None})  # no size depends on it
        with torch.device("meta"):
            model = Model(args, Namespace(input_size=1, outputs=10, read_steps=1))
        assert isinstance(model.rnn, torch.nn.LSTM if args.model == "LSTM" else RIM)
        assert args.valid > 0 or name == "demo"
        assert "search" not in name or args.eval_sizes == [], "a search that looks at test examples"


def test_the_error_of_a_sum_is_beside_that_of_a_constant_guess(tmp_path: Path) -> None:
    text = STUDY.replace("copying", "adding").replace("valid = 40\n", "")
    (tmp_path / "tiny.toml").write_text(text)
    rows = study.read(tmp_path / "tiny.toml")
    log_dir = rows[1].log_dir(tmp_path, 0)
    log_dir.mkdir(parents=True)
    lines: list[dict[str, Any]] = [HEADER | {"arguments": vars(rows[1].arguments)}]
    for epoch in (1, 2):
        line = {"epoch": epoch, "seconds": 9.0, "evaluation_seconds": 3.0}
        lines.append(line | {"test_loss": {"3": 0.1, "5": 0.2}, "test_constant": {"3": 0.16, "5": 0.17}})
    (log_dir / checkpoint.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = study_report.write(Namespace(runs=tmp_path, study=Path("x.toml"), seeds=None), rows)
    assert "| LSTM | 0 | last: 2 |  | 0.1000 | 0.2000 | 0.4 min |\n| always 1 |  |  |  | 0.1600 | 0.1700 |  |\n" in table
    assert "![curves](adding/curves.png)" in table
    assert "\n\na processor, Linux; torch 2.99; Python 3.99; commit 012345678901-dirty; begun 2026-01-01.\n" in table
    assert not (tmp_path / "adding" / "units.png").exists()
