"""Break every equation on purpose and see which test notices.

    python tests/mutants.py            # all of them, some minutes on one core
    python tests/mutants.py dropout    # those whose description has this word
    python tests/mutants.py --list

Each mutant is one piece of text in the readable path and what takes its place. It is put into a copy of the package in a
temporary directory, and the tests of the equations run on that copy. The script prints which test failed first, and exits
with 1 if a mutant survives, if its text is not there exactly once, or if the tests fail without a mutation.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "rim_rnn"
TESTS = ["test_equations.py", "test_scan.py", "test_lstm_limits.py", "test_record.py"]


class Mutant(NamedTuple):
    what: str
    file: str
    old: str
    new: str


ATTENTION, DYNAMICS, COMMUNICATION = "input_attention.py", "dynamics.py", "communication.py"
STEP, LAYER, LAYOUT, UNITS, RECORDING = "step.py", "layer.py", "layout.py", "units.py", "recording.py"

MUTANTS = [
    # How a state is divided
    Mutant(
        "units own interleaved features instead of contiguous blocks",
        UNITS,
        "return state.view(state.size(-2), num_units, state.size(-1) // num_units).transpose(0, 1)",
        "return state.view(state.size(-2), state.size(-1) // num_units, num_units).permute(2, 0, 1)",
    ),
    # Input attention, equation 2
    Mutant(
        "the null row's key goes through the biased projection",
        ATTENTION,
        "return (query * key).view(",
        "null = 0 if self.key.bias is None else self.key.bias.to(key.dtype) / math.sqrt(self.key_size)\n"
        "        return (query * (key - null)).view(",
    ),
    Mutant(
        "the null row's value goes through the biased projection",
        STEP,
        "new = dynamics(a_kept, value, gates, state)",
        "null = dynamics.project(torch.zeros_like(x), input_attention.value)\n"
        "        null = ((1 - a_input).to(null.dtype).permute(2, 1, 0)[..., None] * null).sum(0).transpose(0, 1)\n"
        "        read = dynamics.read(a_kept, dynamics.project(x, input_attention.value))\n"
        "        new = dynamics.update(read + null, state)",
    ),
    Mutant(
        "input scores without 1/sqrt(d)",
        ATTENTION,
        "self._wide(self.key, x) / math.sqrt(self.key_size)",
        "self._wide(self.key, x)",
    ),
    Mutant(
        "softmax over the units instead of over null and input", ATTENTION, "torch.sigmoid(score)", "torch.softmax(score, 0)"
    ),
    Mutant(
        "all units ask with the query of the first",
        ATTENTION,
        "query = self._wide(self.query, h)",
        "query = self._wide(self.query, h)[:1].expand(h.size(0), -1, -1)",
    ),
    Mutant(
        "the read of every head is that of the first head's attention",
        DYNAMICS,
        "total, a[:, :, head], other",
        "total, a[:, :, 0], other",
    ),
    Mutant("the first head only is read", DYNAMICS, "in enumerate(others, 1)", "in enumerate(others[:0], 1)"),
    Mutant(
        "the value's bias is lost where W^v W_ih is multiplied out",
        DYNAMICS,
        "(shared.view(heads, 1, -1) @ weight_ih).flatten()",
        "None",
    ),
    Mutant(
        "the value's bias is lost where it is not",
        DYNAMICS,
        "values: Tensor = value(x).view(",
        "values: Tensor = (x @ value.weight.t()).view(",
    ),
    # Dropout
    Mutant(
        "input dropout does not scale",
        ATTENTION,
        "return a_input if keep is None else a_input * keep.transpose(0, 1)",
        "return a_input if keep is None else a_input * keep.transpose(0, 1) * (1 - self.dropout_probability)",
    ),
    Mutant("the attentions' dropouts in eval mode", STEP, "if not self.training:", "if False:"),
    Mutant(
        "one draw of input dropout for all units",
        ATTENTION,
        "a_input * keep.transpose(0, 1)",
        "a_input * keep.transpose(0, 1)[:1]",
    ),
    Mutant(
        "dropout before the competition",
        STEP,
        "compete(score, self.k)",
        "compete(input_attention.drop(score, keep_input), self.k)",
    ),
    Mutant(
        "communication dropout does not scale",
        COMMUNICATION,
        "attention * keep.reshape(attention.shape)",
        "attention * keep.reshape(attention.shape) * (1 - self.dropout_probability)",
    ),
    Mutant(
        "communication dropout on the values instead of the probabilities",
        COMMUNICATION,
        "context = torch.bmm(dropped, value)",
        "context = torch.bmm(attention, value if keep is None else value * keep.reshape(attention.shape)[..., :1])",
    ),
    Mutant("dropout after the last layer too", LAYER, "if self.dropout and layer < self.num_layers - 1:", "if self.dropout:"),
    Mutant(
        "dropout between layers in eval mode",
        LAYER,
        "F.dropout(x, self.dropout, self.training)",
        "F.dropout(x, self.dropout, True)",
    ),
    # Competition
    Mutant("the lowest bids win", ATTENTION, "torch.sort(-bids, dim=0", "torch.sort(bids, dim=0"),
    Mutant(
        "ties go to the highest unit",
        ATTENTION,
        "winners = torch.sort(-bids, dim=0, stable=True).indices[:k]",
        "winners = bids.size(0) - 1 - torch.sort(-bids.flip(0), dim=0, stable=True).indices[:k]",
    ),
    Mutant("NaN wins", ATTENTION, "torch.sort(-bids, dim=0, stable", "torch.sort(bids, dim=0, descending=True, stable"),
    Mutant(
        "NaN ties with -inf",
        ATTENTION,
        "bids = score.detach().mean(-1)",
        'bids = score.detach().mean(-1)\n    bids = torch.where(bids.isnan(), float("-inf"), bids)',
    ),
    Mutant(
        "everyone who ties with the last winner wins",
        ATTENTION,
        "winners = torch.sort(-bids, dim=0, stable=True).indices[:k]",
        "return bids >= bids.sort(dim=0, descending=True).values[k - 1]\n        winners = bids",
    ),
    Mutant("exported, the lowest bids win", ATTENTION, "(one > bids)", "(one < bids)"),
    Mutant("exported, ties go to the highest unit", ATTENTION, ".triu(1)", ".tril(-1)"),
    Mutant("exported, NaN ties with -inf", ATTENTION, "torch.finfo(bids.dtype).min", "-math.inf"),
    Mutant("exported, NaN wins", ATTENTION, "nan_to_num(-math.inf,", "nan_to_num(math.inf,"),
    Mutant("exported, everyone who ties with the last winner wins", ATTENTION, " | (first & (one == bids))", ""),
    Mutant("bids are attentions and saturate", ATTENTION, "bids = score.detach()", "bids = torch.sigmoid(score.detach())"),
    Mutant("a bid is the best head's score", ATTENTION, "score.detach().mean(-1)", "score.detach().amax(-1)"),
    Mutant(
        "one competition for the whole batch",
        ATTENTION,
        "score.detach().mean(-1)",
        "score.detach().mean((1, 2))[:, None].expand(score.shape[:2])",
    ),
    Mutant(
        "bids in the dtype of a bfloat16 layer",
        ATTENTION,
        "wide = torch.promote_types(x.dtype, torch.float32)",
        "wide = x.dtype",
    ),
    Mutant(
        "bids in autocast's dtype",
        ATTENTION,
        "return torch.autocast(device.type, enabled=False) if autocast_dtype(device) else nullcontext()",
        "return nullcontext()",
    ),
    # Independent dynamics, equation 4
    Mutant("losers are updated too", DYNAMICS, "torch.where(active.unsqueeze(-1), after, before)", "after"),
    Mutant("losers forget", DYNAMICS, "unsqueeze(-1), after, before)", "unsqueeze(-1), after, 0.9 * before)"),
    Mutant("no gradient through losers", DYNAMICS, "unsqueeze(-1), after, before)", "unsqueeze(-1), after, before.detach())"),
    Mutant(
        "losers keep h but not c",
        STEP,
        "h, *c = keep_losers(active, new, state)",
        "h, *c = (*keep_losers(active, new[:1], state[:1]), *new[1:])",
    ),
    Mutant("LSTM gates i and f swapped", DYNAMICS, "i, f, g, o = torch.baddbmm", "f, i, g, o = torch.baddbmm"),
    Mutant("LSTM gates g and o swapped", DYNAMICS, "i, f, g, o = torch.baddbmm", "i, f, o, g = torch.baddbmm"),
    Mutant("LSTM without its second bias", DYNAMICS, "return bias_ih + bias_hh", "return bias_ih"),
    Mutant("LSTM output without tanh", DYNAMICS, "torch.sigmoid(o) * torch.tanh(c)", "torch.sigmoid(o) * c"),
    Mutant("GRU gate z the other way round", DYNAMICS, "((1 - z) * n + z * h,)", "(z * n + (1 - z) * h,)"),
    Mutant("GRU gates r and z swapped", DYNAMICS, "r, z = torch.sigmoid", "z, r = torch.sigmoid"),
    Mutant(
        "GRU reset gate before the product",
        DYNAMICS,
        "n = torch.tanh(x_n + r * h_n)",
        "n = torch.tanh(x_n + h_n - (h - r * h) @ self.weight_hh.chunk(3, dim=-1)[2])",
    ),
    # Communication, equations 5 and 6
    Mutant("no residual", COMMUNICATION, "h + message, h)", "message, h)"),
    Mutant("the printed equation in any case", COMMUNICATION, "if self.bounded:", "if False:"),
    Mutant("bounded in any case", COMMUNICATION, "if self.bounded:", "if True:"),
    Mutant("a message that is not squashed", COMMUNICATION, "message = torch.tanh(message)", "pass"),
    Mutant("a squash of another slope", COMMUNICATION, "torch.tanh(message)", "2 * torch.sigmoid(message) - 1"),
    Mutant("a GRU has room for 1", COMMUNICATION, "torch.relu(1 - h.abs()) * message", "message"),
    Mutant("an LSTM has the room of a GRU", COMMUNICATION, 'if self.rnn_cell == "GRU":', "if True:"),
    Mutant("room below 0", COMMUNICATION, "torch.relu(1 - h.abs())", "(1 - h.abs())"),
    Mutant("room on one side only", COMMUNICATION, "torch.relu(1 - h.abs())", "torch.relu(1 - h)"),
    Mutant("no gradient through the room", COMMUNICATION, "1 - h.abs())", "1 - h.detach().abs())"),
    Mutant(
        "silent units read",
        COMMUNICATION,
        "torch.where(active.unsqueeze(-1), h + message, h)",
        "h + message",
    ),
    Mutant(
        "winners read winners only",
        COMMUNICATION,
        "attention = torch.softmax(torch.bmm(key, query.transpose(1, 2)), dim=1).transpose(1, 2)",
        "readable = active.t().repeat_interleave(heads, 0).unsqueeze(1)\n"
        "        attention = torch.bmm(query, key.transpose(1, 2))\n"
        '        attention = torch.softmax(attention.masked_fill(~readable, float("-inf")), dim=-1)',
    ),
    Mutant(
        "a unit does not read itself",
        COMMUNICATION,
        "attention = torch.softmax(torch.bmm(key, query.transpose(1, 2)), dim=1).transpose(1, 2)",
        "attention = torch.bmm(query, key.transpose(1, 2))\n"
        "        attention = torch.softmax(attention - 1e9 * torch.eye(n, dtype=h.dtype), dim=-1)",
    ),
    Mutant("communication scores without 1/sqrt(d)", COMMUNICATION, "query / math.sqrt(self.key_size), key", "query, key"),
    Mutant("softmax over the readers", COMMUNICATION, "query.transpose(1, 2)), dim=1)", "query.transpose(1, 2)), dim=2)"),
    Mutant(
        "queries and keys swapped",
        COMMUNICATION,
        "torch.bmm(key, query.transpose(1, 2))",
        "torch.bmm(query, key.transpose(1, 2))",
    ),
    Mutant(
        "heads averaged instead of concatenated",
        COMMUNICATION,
        "context = context.view(batch, heads, n, self.value_size).permute(2, 0, 1, 3)",
        "context = context.view(batch, heads, n, self.value_size).mean(1, True).expand(-1, heads, -1, -1).permute(2, 0, 1, 3)",
    ),
    Mutant(
        "all units project what they read with the first unit's weight",
        COMMUNICATION,
        "self.output(context)",
        "context @ self.output.weight[:1]",
    ),
    Mutant(
        "communication touches c",
        STEP,
        "h, attention = communication(h, active, comm_weight, keep_comm)",
        "before = h\n"
        "        h, attention = communication(h, active, comm_weight, keep_comm)\n"
        "        c = [s + (h - before).mean(-1, keepdim=True) for s in c]",
    ),
    Mutant(
        "communication among the states from before the step",
        STEP,
        "h, attention = communication(h, active, comm_weight, keep_comm)",
        "read, attention = communication(state[0], active, comm_weight, keep_comm)\n        h = h + read - state[0]",
    ),
    # Time, directions, layers, packing
    Mutant("the reverse direction runs forward", STEP, "range(len(sizes) - 1, -1, -1) if reverse else range", "range"),
    Mutant(
        "reverse outputs are not flipped back",
        STEP,
        "outputs[t] = now[0]",
        "outputs[len(sizes) - 1 - t if reverse else t] = now[0]",
    ),
    Mutant(
        "packed rows that begin take the first rows' states", STEP, "s_0[:, present : sizes[t]]", "s_0[:, : sizes[t] - present]"
    ),
    Mutant("last states of packed rows in the order of their ends", STEP, "*reversed(ended)", "*ended"),
    Mutant(
        "packed first states stay in the caller's order",
        LAYOUT,
        "return state if self.sorted_indices is None else tuple(s.index_select(1, self.sorted_indices) for s in state)",
        "return state",
    ),
    Mutant(
        "packed last states stay in the sorted order",
        LAYOUT,
        "state = tuple(s.index_select(1, self.unsorted_indices) for s in state)",
        "pass",
    ),
    Mutant(
        "every cell starts from the first cell's state", LAYER, "arguments = x, first[index], ", "arguments = x, first[0], "
    ),
    Mutant("directions in the wrong order", LAYER, "torch.cat(outputs, dim=-1)", "torch.cat(outputs[::-1], dim=-1)"),
    # Records
    Mutant(
        "input attention recorded after dropout",
        STEP,
        "Trace(active, a_input, attention)",
        "Trace(active, a_kept, attention)",
    ),
    Mutant("what the reverse direction did, last step first", STEP, "traces[::-1] if reverse else traces", "traces"),
    Mutant("records keep the graph", STEP, "part.detach() for part in trace", "part for part in trace"),
    Mutant(
        "records in the sorted order of a packed batch", RECORDING, "whole = whole.index_select(2, unsorted_indices)", "pass"
    ),
    Mutant(
        "silent readers' rows are shown",
        RECORDING,
        "return torch.where(readers, step.communication.to(step.input_attention.dtype), 0.0)",
        "return step.communication.to(step.input_attention.dtype)",
    ),
    Mutant("the communication of a bfloat16 layer stays rounded", RECORDING, ".to(step.input_attention.dtype)", ""),
    Mutant(
        "the first head's input attention is recorded",
        RECORDING,
        "step.input_attention.mean(-1)",
        "step.input_attention[..., 0]",
    ),
]


def occurrences(mutant: Mutant) -> int:
    """How often the text to replace stands in its file; anything but once is a mistake in the list above."""
    return (PACKAGE / mutant.file).read_text(encoding="utf-8").count(mutant.old)


def run_tests(mutant: Mutant | None) -> tuple[int, str]:
    """The tests on a copy of the package, mutated or not: pytest's exit code and the end of its output."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "rim_rnn"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("csrc", "__pycache__", "*.so"))
        if mutant:
            file = copy / mutant.file
            file.write_text(file.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8")
        environment = os.environ | {
            "PYTHONPATH": folder,
            "PYTHONDONTWRITEBYTECODE": "1",
            "HYPOTHESIS_PROFILE": "ci",
            "RIM_RNN_NATIVE": "0",
            "OMP_NUM_THREADS": "1",
        }
        where = [sys.executable, "-c", "import rim_rnn; print(rim_rnn.__file__)"]
        seen = subprocess.run(where, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout.strip()
        if Path(seen).resolve().parent != copy.resolve():
            raise SystemExit(f"the tests would run on {seen}, not on the copy")
        options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-W", "default"]
        tests = [str(ROOT / "tests" / name) for name in TESTS]
        command = [sys.executable, "-m", "pytest", *options, *tests]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout[-2000:]


def main(arguments: list[str]) -> int:
    chosen = [m for m in MUTANTS if all(word in m.what for word in arguments if not word.startswith("-"))]
    if "--list" in arguments:
        print(*(f"{m.file:20} {m.what}" for m in chosen), sep="\n")
        return 0
    wrong = [f"{m.what}: its text stands {occurrences(m)} times in {m.file}" for m in chosen if occurrences(m) != 1]
    if wrong:
        print(*wrong, sep="\n")
        return 1
    code, output = run_tests(None)
    if code:
        print("the tests fail without any mutation:", output, sep="\n")
        return 1
    width, survivors = max(len(m.what) for m in chosen), 0
    print(f"{'mutation':{width}}    caught by")
    for mutant in chosen:
        code, output = run_tests(mutant)
        failed = re.search(r"^FAILED tests/(.+?)(?: - |$)", output, re.MULTILINE)
        survivors += not (code == 1 and failed)
        caught = failed[1] if code == 1 and failed else "NOTHING: it survives" if code == 0 else f"pytest broke: {output}"
        print(f"{mutant.what:{width}}    {caught}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants caught")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
