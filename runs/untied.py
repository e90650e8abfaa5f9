"""Weights of its own at every step: an untied network needs many more examples for the same error.

    python runs/untied.py [--quick]

A learning curve: how often symbol 0 is followed by symbol 1, in sequences of sixteen out of three symbols, is to be
learned from N examples, by an Elman network and by an untied one of the same width. What one has learned anywhere it
knows everywhere; the other must see it at every place. Error is the mean squared error on 2000 new sequences over the
variance of the count (1: as good as always saying the mean), where the error on 500 others was least during training;
mean of two seeds. The last line is for sequences of one step more. Takes half a minute.
"""

from __future__ import annotations

import torch
from kept import RESULTS, keep, options
from torch import Tensor, nn
from torch.nn import functional as F

import elman
from elman import ElmanCell
from elman.errors import InputError
from elman.networks.untied import Untied

STEPS, SYMBOLS, HIDDEN, UPDATES, BATCH, SEEDS = 16, 3, 16, 800, 64, (1, 2)
EXAMPLES = (30, 100, 300, 1000, 3000)


class Counter(nn.Module):
    """Reads with one cell for all steps, or with one for each, and says a number after the last."""

    def __init__(self, untied: bool) -> None:
        super().__init__()
        cells = [ElmanCell(SYMBOLS, HIDDEN) for _ in range(STEPS if untied else 1)]
        self.untied, self.cell = untied, Untied(cells) if untied else cells[0]
        self.readout = nn.Linear(HIDDEN, 1)

    def forward(self, xs: Tensor) -> Tensor:
        ys, _ = self.cell(xs) if self.untied else elman.scan(self.cell, xs)
        return self.readout(ys[-1])[:, 0]


def examples(count: int, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    symbols = torch.randint(SYMBOLS, (steps, count))
    return F.one_hot(symbols, SYMBOLS).float(), ((symbols[:-1] == 0) & (symbols[1:] == 1)).sum(0).float()


def learned(untied: bool, count: int, seed: int, updates: int) -> tuple[float, nn.Module]:
    """Test error relative to the variance, after training on ``count`` examples; and the network at the end."""
    torch.manual_seed(100 + seed)
    (xs, ys), valid, test = examples(count), examples(500), examples(2000)
    torch.manual_seed(seed)
    model = Counter(untied)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    best = found = float("inf")
    for update in range(updates):
        some = torch.randint(count, (min(count, BATCH),))
        loss = F.mse_loss(model(xs[:, some]), ys[some])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if update % 20 == 19:
            now = error(model, *valid)
            if now < best:
                best, found = now, error(model, *test)
    return found, model


def error(model: nn.Module, xs: Tensor, ys: Tensor) -> float:
    with torch.no_grad():
        return (F.mse_loss(model(xs), ys) / ys.var()).item()


def longer(model: nn.Module) -> str:
    """What becomes of sequences that are one step longer."""
    torch.manual_seed(0)
    try:
        return f"{error(model, *examples(2000, STEPS + 1)):.3f}"
    except InputError as refused:
        return f"refused ({str(refused).split(',')[0]})"


def main() -> None:
    given = options(__doc__, RESULTS / "untied.json").parse_args()
    updates, seeds = (20, SEEDS[:1]) if given.quick else (UPDATES, SEEDS)
    rows, last = [], {}
    print(f"{'examples':>10}{'shared':>10}{'untied':>10}")
    for count in EXAMPLES:
        row: dict[str, float] = {"examples": count}
        for name, untied in (("shared", False), ("untied", True)):
            found = [learned(untied, count, seed, updates) for seed in seeds]
            row[name] = round(sum(value for value, _ in found) / len(found), 4)
            last[name] = found[0][1]
        rows.append(row)
        print(f"{count:>10}{row['shared']:>10.3f}{row['untied']:>10.3f}", flush=True)
    unseen = {name: longer(model) for name, model in last.items()}
    print(f"{STEPS + 1} steps: shared {unseen['shared']}, untied {unseen['untied']}")
    if not given.quick:
        keep(given.out, {"seeds": seeds, "updates": updates, "rows": rows, "one step more": unseen})


if __name__ == "__main__":
    main()
