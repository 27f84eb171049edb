"""Measure how large the values of the input should be at first: this writes docs/initialisation.json.

`input_attention.value.weight` is drawn from uniform(-s/sqrt(input_size), s/sqrt(input_size)) for several s. Two
tasks that have little in common: characters of this package's own source in order, with the state carried on, and the digits
that ship with the examples, four pixels per step. As many runs
at once as there are cores; what is in the file is not run again.
"""

import json
import math
import platform
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rim_rnn import RIM

HERE = Path(__file__).parent
ROOT = HERE.parent
LOG = HERE / "initialisation.json"
sys.path += [str(ROOT / "examples"), str(ROOT / "examples" / "study")]

SCALES = (1, 2, 4)
TASKS = ("text, LSTM units", "text, GRU units", "digits")
RUNS = [(task, scale, seed) for seed in range(3) for task in TASKS for scale in SCALES]


def draw(rnn: RIM[Any], scale: float) -> None:
    for cell in rnn.cells:
        weight = cell.input_attention.value.weight
        bound = scale / math.sqrt(weight.size(1))
        nn.init.uniform_(weight, -bound, bound)


def text(rnn_cell: str, scale: float) -> dict[str, float]:
    """Two layers of 96 units' states, five epochs, 40 characters at a time: the mean loss of the last epoch."""
    written = "".join(path.read_text() for path in sorted((ROOT / "src" / "rim_rnn").glob("*.py")))
    alphabet = sorted(set(written))
    characters = torch.tensor([alphabet.index(character) for character in written])
    rows, span = 16, 40
    data = characters[: len(characters) // rows * rows].view(rows, -1).t()
    embedding, rnn, out = nn.Embedding(len(alphabet), 96), RIM(96, 96, 2, rnn_cell=rnn_cell), nn.Linear(96, len(alphabet))
    draw(rnn, scale)
    parameters = [*embedding.parameters(), *rnn.parameters(), *out.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=2e-3)
    for _ in range(5):
        state, losses = None, []
        for start in range(0, len(data) - 1 - span, span):
            output, state = rnn(embedding(data[start : start + span]), state)
            loss = F.cross_entropy(out(output).flatten(0, 1), data[start + 1 : start + 1 + span].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            state = state.detach() if isinstance(state, Tensor) else tuple(part.detach() for part in state)
            losses.append(loss.item())
    return {"loss": sum(losses) / len(losses)}


def digits(scale: float) -> dict[str, float]:
    """The demo's setting for RIM: accuracy on the test digits at each size."""
    from tasks.sequential_mnist import load

    train, test = load(str(ROOT / "examples" / "study" / "digits"))
    inputs, targets = train.examples(14, 4)
    rnn, out = RIM(4, 120, batch_first=True), nn.Linear(120, 10)
    draw(rnn, scale)
    parameters = [*rnn.parameters(), *out.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    steps = 12 * math.ceil(len(inputs) / 64)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(12):
        for rows in torch.randperm(len(inputs)).split(64):
            loss = F.cross_entropy(out(rnn(inputs[rows])[0][:, -1]), targets[rows, 0])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            scheduler.step()
    results = {}
    with torch.no_grad():
        for size in (14, 16, 19, 24):
            inputs, targets = test.examples(size, 4)
            results[f"{size}x{size}"] = (out(rnn(inputs)[0][:, -1]).argmax(1) == targets[:, 0]).double().mean().item()
    return results


def one(task: str, scale: float, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    result = digits(scale) if task == "digits" else text(task[6:].split()[0], scale)
    return {"task": task, "scale": scale, "seed": seed, **result}


def main() -> None:
    from common import cpu

    where = {
        "command": "python docs/initialisation.py",
        "commit": subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=HERE, text=True).strip(),
        "date": f"{date.today()}",
        "cpu": cpu(),
        "system": platform.system(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
    runs = json.loads(LOG.read_text()) if LOG.exists() else []
    done = {(run["task"], run["scale"], run["seed"]) for run in runs}
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for run in as_completed([pool.submit(one, *run) for run in RUNS if run not in done]):
            runs.append(run.result() | where)
            print(runs[-1], flush=True)
            runs.sort(key=lambda run: RUNS.index((run["task"], run["scale"], run["seed"])))
            LOG.write_text("[\n" + ",\n".join(json.dumps(run) for run in runs) + "\n]\n")


if __name__ == "__main__":
    main()
