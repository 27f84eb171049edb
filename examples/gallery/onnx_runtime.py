"""
A layer in onnxruntime
======================

A filter for a noisy signal is trained in PyTorch, written as ONNX with a batch and a
number of steps that are left open, and run by onnxruntime: on a signal of any length at
once, and step by step as samples arrive. It needs ``pip install 'rim-rnn[tools]'``.
"""

import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import onnxruntime
import torch
from torch import nn

from rim_rnn import RIM

# %%
# The signal jumps between levels and is seen through noise. The filter knows the past
# alone.


def draw(rows, steps):
    levels = torch.randn(steps, rows, 1)
    jumps = torch.rand(steps, rows, 1) < 0.05
    jumps[0] = True
    places = torch.where(jumps, torch.arange(steps).view(-1, 1, 1), 0).cummax(0).values
    clean = levels.gather(0, places)
    return clean + 0.5 * torch.randn_like(clean), clean


class Filter(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = RIM(1, 48), nn.Linear(48, 1)

    def forward(self, signal, h, c):
        output, (h, c) = self.rnn(signal, (h, c))
        return self.head(output), h, c


torch.manual_seed(0)
model = Filter()
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
zeros = torch.zeros(1, 32, 48)
for _ in range(300):
    noisy, clean = draw(32, 60)
    loss = nn.functional.mse_loss(model(noisy, zeros, zeros)[0], clean)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
model.eval()

# %%
# The states are inputs and outputs of their own, so that whoever runs the file can
# carry them.

warnings.filterwarnings("ignore", module="torch|copyreg")  # the exporter's own
folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "filter.onnx"
steps, batch = torch.export.Dim("steps", min=2), torch.export.Dim("batch", min=2)
example = draw(3, 8)[0], torch.zeros(1, 3, 48), torch.zeros(1, 3, 48)
torch.onnx.export(
    model,
    example,
    path,
    dynamo=True,
    dynamic_shapes=({0: steps, 1: batch}, {1: batch}, {1: batch}),
    input_names=["signal", "h_0", "c_0"],
    output_names=["filtered", "h_n", "c_n"],
    verbose=False,
)
options = onnxruntime.SessionOptions()
options.log_severity_level = 3  # errors alone
session = onnxruntime.InferenceSession(
    path, options, providers=["CPUExecutionProvider"]
)
for given in (*session.get_inputs(), *session.get_outputs()):
    print(f"{given.name}: {given.shape}")

# %%
# Other lengths and batches than those of the export, against PyTorch:


def run(signal, h, c):
    given = {"signal": signal.numpy(), "h_0": h.numpy(), "c_0": c.numpy()}
    return [torch.from_numpy(result) for result in session.run(None, given)]


for length, rows in ((10, 2), (100, 5), (1000, 1)):
    noisy, clean = draw(rows, length)
    states = torch.zeros(2, 1, rows, 48)
    with torch.no_grad():
        expected = model(noisy, *states)[0]
    difference = (run(noisy, *states)[0] - expected).abs().max()
    print(f"{length:4} steps, {rows} rows: largest difference {difference:.0e}")

# %%
# As a stream: one sample in, one out, and the states go round.

torch.manual_seed(1)
noisy, clean = draw(1, 150)
h, c = torch.zeros(2, 1, 1, 48)
stream = []
for sample in noisy:
    filtered, h, c = run(sample[None], h, c)
    stream.append(filtered)
stream = torch.cat(stream)
before, after = ((signal - clean).square().mean() for signal in (noisy, stream))
print(f"mean square error: {before:.3f} before, {after:.3f} after")

plt.figure(figsize=(8, 4))
plt.plot(noisy.flatten(), ".", markersize=3, color="gray", label="seen")
plt.plot(clean.flatten(), linewidth=1, label="there")
plt.plot(stream.flatten(), label="filtered by onnxruntime")
plt.xlabel("step")
plt.legend()
plt.show()
