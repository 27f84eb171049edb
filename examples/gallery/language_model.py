"""
A swap in a language model
==========================

A character model whose state is carried from one piece of the text to the next, first
with :class:`torch.nn.LSTM`, then with :class:`~rim_rnn.RIM`. No line but the one that
makes the layer knows which of them it is.

It shows the swap, and no gain: with one seed, three epochs and no search, the RIM ends
behind the LSTM on this text, and with more parameters; both figures are printed below.
What a RIM is for is on the page :doc:`/reproduction`. It trains on a GPU if there is
one, where a RIM is :doc:`far slower </on_a_gpu>` than the LSTM; the figures below are
of a CPU.
"""

import math
from pydoc_data.topics import topics

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F

from rim_rnn import RIM

# %%
# The text is what Python's own ``help()`` says about the language. It is cut into rows
# that are read side by side, so that each piece of a row goes on where the piece before
# it ended. The last tenth is held out.

device = "cuda" if torch.cuda.is_available() else "cpu"
text = "".join(topics.values())[:120_000]
alphabet = sorted(set(text))
codes = torch.tensor([alphabet.index(character) for character in text], device=device)
held_out = codes[len(codes) * 9 // 10 :]
train = codes[: -len(held_out)]


def rows(codes, count):
    return codes[: len(codes) // count * count].view(count, -1).T


class Characters(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.embedding = nn.Embedding(len(alphabet), 64)
        self.rnn = layer(64, 128)
        self.head = nn.Linear(128, len(alphabet))

    def forward(self, input, state=None):
        output, state = self.rnn(self.embedding(input), state)
        return self.head(output), state


def loss_of(model, data, start, state):
    """The loss on 32 steps, and the state after them without its history."""
    logits, state = model(data[start : start + 32], state)
    loss = F.cross_entropy(logits.flatten(0, 1), data[start + 1 : start + 33].flatten())
    return loss, tuple(part.detach() for part in state)


# %%
# Training. ``state`` is ``None`` at the start of an epoch and carried on from there;
# ``detach`` is all that truncated backpropagation through time asks for.


def bits(loss):
    return loss.item() / math.log(2)


def fit(layer):
    torch.manual_seed(0)
    model = Characters(layer).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    data, curve = rows(train, 32), []
    for _ in range(3):
        state = None
        for start in range(0, len(data) - 33, 32):
            loss, state = loss_of(model, data, start, state)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            curve.append(bits(loss))
    return model, curve


models = {}
for layer in (nn.LSTM, RIM):
    model, curve = fit(layer)
    models[layer] = model
    smooth = torch.tensor(curve).unfold(0, 50, 1).mean(1)
    plt.plot(range(50, len(curve) + 1), smooth, label=layer.__name__)

plt.xlabel("training step")
plt.ylabel("bits per character, mean of 50 steps")
plt.legend()
plt.show()

# %%
# On the text held out, read from its beginning to its end with the state carried on:
# fewer bits are better, and here the LSTM has fewer. The layers have the same input and
# state sizes, and not the same number of parameters.

with torch.no_grad():
    for layer, model in models.items():
        data, state, losses = rows(held_out, 1), None, []
        for start in range(0, len(data) - 33, 32):
            loss, state = loss_of(model, data, start, state)
            losses.append(bits(loss))
        mean, size = (
            sum(losses) / len(losses),
            sum(p.numel() for p in model.rnn.parameters()),
        )
        print(
            f"{layer.__name__:>4}: {mean:.2f} bits per character, {size:,} parameters"
        )

# %%
# And in use: one character at a time, the state handed back at every step.

model, written = models[RIM], "The "
with torch.no_grad():
    logits, state = model(
        torch.tensor(
            [[alphabet.index(character)] for character in written], device=device
        )
    )
    for _ in range(300):
        code = torch.multinomial(F.softmax(logits[-1, 0] / 0.6, dim=-1), 1)
        written += alphabet[code]
        logits, state = model(code[None], state)
print(written)
