"""
Who does the work?
==================

Two ways to see how units share out a task: :func:`~rim_rnn.record` says which of them
took which step, and letting one unit forget says which answers depended on what it
held.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F

from rim_rnn import RIM, record

# %%
# Three lamps. At most steps nothing happens, at the others somebody turns one of them
# on or off, which it may have been before. At every step the answer asked for is which
# lamps are on.

LAMPS, UNITS, SIZE = 3, 6, 6  # features of one unit's state


def draw(rows, steps=40):
    happens = torch.rand(steps, rows) < 0.3
    lamp = torch.where(happens, torch.randint(LAMPS, (steps, rows)), LAMPS)
    on = torch.randint(2, (steps, rows))
    burns, now = [], torch.zeros(rows, LAMPS + 1)
    for turned, to in zip(lamp, on, strict=True):
        now = now.scatter(1, turned[:, None], to[:, None].float())
        burns.append(now[:, :LAMPS])
    codes = torch.where(happens, 2 * lamp + on, 2 * LAMPS)
    return F.one_hot(codes, 2 * LAMPS + 1).float(), lamp, torch.stack(burns)


# %%
# Three of six units act at a step. Without communication no unit can keep for itself
# what another one has heard.

torch.manual_seed(0)
rnn = RIM(2 * LAMPS + 1, UNITS * SIZE, num_units=UNITS, k=3, num_comm_heads=0)
head = nn.Linear(UNITS * SIZE, LAMPS)
parameters = [*rnn.parameters(), *head.parameters()]
optimizer = torch.optim.Adam(parameters, lr=1e-2)
for _ in range(500):
    input, _, burns = draw(32)
    loss = F.binary_cross_entropy_with_logits(head(rnn(input)[0]), burns)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()

# %%
# ``record`` appends what the forward pass did. ``active`` is ``(layers, steps, rows,
# units)``; its mean over the steps at which a lamp was turned is how often each unit
# took part.

input, lamp, burns = draw(256)
with torch.no_grad(), record(rnn) as records:
    right = (head(rnn(input)[0]) > 0) == burns.bool()
active = records[0].active[0]
shares = [active[lamp == which].float().mean(0) for which in range(LAMPS + 1)]
took_part = torch.stack(shares)
print(f"right answers: {right.float().mean():.1%}")

# %%
# A record shows who acted, not who matters. So let one unit forget: its block of the
# state, in ``h`` and in ``c``, is zeroed after every step, and the answers that get
# worse are those which it remembered.


def right_without(unit):
    state, answers = None, []
    with torch.no_grad():
        for step in input:
            output, state = rnn(step[None], state)
            for part in state:
                part[..., unit * SIZE : (unit + 1) * SIZE] = 0
            answers.append(head(output) > 0)
    return torch.cat(answers) == burns.bool()


share = right.float().mean((0, 1))
without = [right_without(unit).float().mean((0, 1)) for unit in range(UNITS)]
lost = torch.stack([share - other for other in without], dim=1)

# %%
# A column is a unit. Compare the two: which lamps are lost without a unit need not be
# those at which it took part most often. Competition makes a division of labour
# possible, and leaves open which one.

figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
tables = {
    "took part, share of steps": took_part,
    "right answers lost without its memory": lost.clamp(min=0),
}
for axes, (title, table) in zip(panels, tables.items(), strict=True):
    axes.imshow(table, vmin=0, vmax=1, cmap="Blues")
    for row, values in enumerate(table.tolist()):
        for unit, value in enumerate(values):
            color = "white" if value > 0.5 else "black"
            axes.text(unit, row, f"{value:.2f}", ha="center", va="center", color=color)
    axes.set(title=title, xlabel="unit", xticks=range(UNITS))
    labels = ["lamp 0", "lamp 1", "lamp 2", "nothing"]
    axes.set_yticks(range(len(table)), labels[: len(table)])
plt.show()
