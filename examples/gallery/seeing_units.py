"""
Seeing the units
================

A function to copy. It draws what a forward pass did with one row of the batch: which
units were active, how much of its read each took from the input, and who read from
whom. Here the layer has learnt to keep a symbol until the next one is shown.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F

from rim_rnn import RIM, record

# %%
# In a record a layer comes first, then time, then the batch, also where the layer has
# ``batch_first=True``, and for packed input. With two directions ``layer`` counts both:
# 0 and 1 are those of the first layer.


def plot(record, row=0, layer=0):
    active, attention, communication = (part[layer, :, row] for part in record)
    steps_active = active.sum(0).clamp(min=1)[:, None]
    reads = communication.mean(1).nan_to_num().sum(0) / steps_active  # mean of heads
    figure, axes = plt.subplots(
        1, 3, figsize=(10, 2.6), width_ratios=[2, 2, 1], layout="constrained"
    )
    panels = {
        "active": active.float().T,
        "share of its read from the input": attention.T,
        "who reads from whom": reads,
    }
    for ax, (title, values) in zip(axes, panels.items(), strict=True):
        image = ax.imshow(
            values.cpu().numpy(), vmin=0, vmax=1, aspect="auto", cmap="Blues"
        )
        ax.set(title=title, xlabel="step", ylabel="unit", yticks=range(len(values)))
    axes[2].set(xlabel="unit that is read", ylabel="reader", xticks=range(len(reads)))
    figure.colorbar(image, ax=axes)
    return figure


# %%
# Some steps show one of four symbols, the others a blank. The answer asked for at each
# step is the symbol that was shown last.

SYMBOLS = 4


def draw(rows, steps=40):
    shown = torch.rand(rows, steps) < 0.2
    shown[:, 0] = True
    symbol = torch.randint(SYMBOLS, (rows, steps))
    last = torch.where(shown, torch.arange(steps), 0).cummax(1).values
    codes = torch.where(shown, symbol, SYMBOLS)
    return F.one_hot(codes, SYMBOLS + 1).float(), symbol.gather(1, last), shown


torch.manual_seed(0)
rnn = RIM(SYMBOLS + 1, 60, num_units=6, k=3, batch_first=True)
head = nn.Linear(60, SYMBOLS)
parameters = [*rnn.parameters(), *head.parameters()]
optimizer = torch.optim.Adam(parameters, lr=5e-3)
for _ in range(300):
    input, answer, _ = draw(32)
    loss = F.cross_entropy(head(rnn(input)[0]).flatten(0, 1), answer.flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()

# %%
# A line through a step says that a symbol was shown there.

input, answer, shown = draw(256)
with torch.no_grad(), record(rnn) as records:
    right = head(rnn(input)[0]).argmax(-1) == answer
print(f"right answers: {right.float().mean():.1%}")

figure = plot(records[0])
marks = shown[0].nonzero().flatten()
for ax in figure.axes[:2]:
    ax.vlines(marks, -0.5, 5.5, color="C1", linewidth=1)
plt.show()
