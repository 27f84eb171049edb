"""
A forecast of sunspots
======================

Three centuries of yearly sunspot numbers, which come with statsmodels. The layer reads
the past as one sequence; its last state then goes on into years that it has not seen.
Beside it stand an autoregression and the guess that nothing changes.
"""

import matplotlib.pyplot as plt
import torch
from statsmodels.datasets import sunspots
from statsmodels.tsa.ar_model import AutoReg
from torch import nn

from rim_rnn import RIM

# %%
# The root brings the peaks closer to each other. The last 60 years are held out.

data = sunspots.load_pandas().data
years, numbers = data["YEAR"].astype(int).to_numpy(), data["SUNACTIVITY"].to_numpy()
series = torch.tensor(numbers, dtype=torch.float32).sqrt().div(10)
series = series.view(-1, 1, 1)  # steps, rows, features
first = len(series) - 60


class Forecaster(nn.Module):
    """Each output is a forecast of the next year, as a change from this one."""

    def __init__(self):
        super().__init__()
        self.rnn = RIM(1, 32, input_dropout=0.1, comm_dropout=0.1)
        self.head = nn.Linear(32, 1)

    def forward(self, input, state=None):
        output, state = self.rnn(input, state)
        return input + self.head(output), state


# %%
# One sequence is all there is, and five models of different seeds are fitted to it.
# Their mean is the forecast.


def fit(seed):
    torch.manual_seed(seed)
    model = Forecaster()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)
    for _ in range(150):
        predicted, _ = model(series[: first - 1])
        loss = nn.functional.mse_loss(predicted, series[1:first])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


models = [fit(seed) for seed in range(5)]


def to_numbers(predicted):
    return predicted.clamp(min=0).mul(10).square().flatten().numpy()


# %%
# The next year, from all that is known by then: the state after the years of training
# goes on into the others.

with torch.no_grad():
    forecasts = []
    for model in models:
        _, state = model(series[: first - 1])
        predicted, _ = model(series[first - 1 : -1], state)
        forecasts.append(predicted)
    rim = to_numbers(torch.stack(forecasts).mean(0))

held_out = numbers[first:]
fitted = AutoReg(numbers[:first], lags=9).fit().append(held_out)
guesses = {
    "as the year before": numbers[first - 1 : -1],
    "autoregression, 9 years": fitted.predict(first, len(numbers) - 1),
    "RIM": rim,
}
for name, guess in guesses.items():
    error = ((guess - held_out) ** 2).mean() ** 0.5
    print(f"{name:>23}: off by {error:.1f} (root of the mean square)")

# %%
# Further ahead a model has to read its own forecasts. The thin lines start from what
# was known in 1976, 1986 and 1996.

plt.figure(figsize=(8, 4))
plt.plot(years[first - 40 :], numbers[first - 40 :], color="gray", label="observed")
plt.plot(years[first:], rim, label="a year ahead")
with torch.no_grad():
    for start in (1976, 1986, 1996):
        place = int(start - years[0]) + 1
        ahead = []
        for model in models:
            predicted, state = model(series[:place])
            steps = [predicted[-1:]]
            for _ in range(10):
                predicted, state = model(steps[-1], state)
                steps.append(predicted)
            ahead.append(torch.cat(steps))
        line = [numbers[place - 1], *to_numbers(torch.stack(ahead).mean(0))]
        label = "eleven years ahead" if start == 1976 else None
        plt.plot(range(start, start + 12), line, color="C1", linewidth=1, label=label)
plt.axvline(years[first], color="gray", linewidth=0.5)
plt.ylabel("sunspot number")
plt.legend()
plt.show()
