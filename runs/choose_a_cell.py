"""Every cell on three tasks at equal budget: as many parameters, as many updates, the better of two learning rates.

    python runs/choose_a_cell.py [--quick] [--jobs 2]

adding  The sum of the two marked numbers among 60 (Hochreiter and Schmidhuber 1997): mean squared error; 0.167 is what
        the mean gets.
copy    Five of eight symbols, to be said again after 30 blank steps: the share that is right; 0.125 is chance.
text    Characters of Python's own manual: bits per character on held-out text, after about nine passes.

Errors are of fresh sequences, or of the last twentieth of the text. The table, results/choose_a_cell.json, and the
picture docs/pictures/choose_a_cell.svg. Takes about half an hour on two cores.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from kept import PICTURES, RESULTS, keep, options, significant
from torch import Tensor, nn
from torch.nn import functional as F

import elman
from elman.combinators import output_size
from elman.spec import make_cell

SPECS = (
    "elman",
    "irnn",
    "leaky(elman, alpha=sampled)",
    "clockwork(elman, [1, 2, 4, 8, 16])",
    "time_skip(elman, 8)",
    "deep(elman, transition=2, skip)",
    "mgu",
    "gru",
    "gru(reset_after=false)",
    "lstm(forget_gate=false)",
    "lstm",
    "lstm(forget_bias=1)",
    "lstm(peepholes)",
    "lstm(coupled)",
    "lstm(layer_norm)",
    "slstm",
    "qrnn",
    "sru",
    "mingru",
    "minlstm",
    "lru",
)
PARAMETERS, FEATURES, BATCH, RATES, SEED = 20_000, 48, 64, (2e-3, 1e-2), 1
UPDATES = {"adding": 1000, "copy": 1200, "text": 600}
UNITS = {"adding": "squared error", "copy": "share right", "text": "bits per character"}
LENGTH, SYMBOLS, SHOWN, BLANKS, WINDOW = 60, 8, 5, 30, 100

Batch = tuple[Tensor, Tensor]


def adding(batch: int) -> Batch:
    """xs (60, B, 2): numbers in [0, 1) and marks; targets (B) the sum of the marked ones, one in each half."""
    xs = torch.zeros(LENGTH, batch, 2)
    xs[:, :, 0] = torch.rand(LENGTH, batch)
    marked = torch.stack([torch.randint(LENGTH // 2, (batch,)), torch.randint(LENGTH // 2, LENGTH, (batch,))])
    xs[:, :, 1].scatter_(0, marked, 1.0)
    return xs, (xs[:, :, 0] * xs[:, :, 1]).sum(0)


def copy(batch: int) -> Batch:
    """xs (T, B, 10) one-hot: symbols, blanks, and a mark at every step at which one is to be said; targets (5, B)."""
    shown = torch.randint(SYMBOLS, (SHOWN, batch))
    blank, say = torch.full((BLANKS, batch), SYMBOLS), torch.full((SHOWN, batch), SYMBOLS + 1)
    return F.one_hot(torch.cat([shown, blank, say]), SYMBOLS + 2).float(), shown


def manual() -> tuple[Tensor, int]:
    """The text as numbers, and how many different characters it has."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    known = {character: at for at, character in enumerate(sorted(set(text)))}
    return torch.tensor([known[character] for character in text]), len(known)


class Reader(nn.Module):
    """A map of what is read to 48 features, a cell, and a linear map of its output."""

    def __init__(self, spec: str, write: nn.Module, outputs: int) -> None:
        super().__init__()
        self.write, self.cell = write, make_cell(spec, FEATURES, units(spec))
        self.read = nn.Linear(output_size(self.cell), outputs)

    def forward(self, xs: Tensor, state: object = None) -> tuple[Tensor, object]:
        ys, state = elman.scan(self.cell, self.write(xs), state)
        return self.read(ys), state


def units(spec: str) -> int:
    """The number of units with which the cell has the number of parameters that all have."""
    low, high = 4, 2000
    while high - low > 1:
        middle = (low + high) // 2
        try:
            count = sum(p.numel() for p in make_cell(spec, FEATURES, middle).parameters())
        except elman.errors.OptionError:  # a width that does not fall into groups
            count = sum(p.numel() for p in make_cell(spec, FEATURES, 5 * (middle // 5) or 5).parameters())
        low, high = (middle, high) if count <= PARAMETERS else (low, middle)
    return 5 * (low // 5)


def run_adding(spec: str, rate: float, updates: int) -> float:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.mse_loss(model(batch[0])[0][-1, :, 0], batch[1])

    model = Reader(spec, nn.Linear(2, FEATURES), 1)
    _fit(model, (loss(model, adding(BATCH)) for _ in range(updates)), rate, updates)
    return loss(model, adding(2000)).item()


def run_copy(spec: str, rate: float, updates: int) -> float:
    model = Reader(spec, nn.Linear(SYMBOLS + 2, FEATURES), SYMBOLS)

    def losses() -> Iterator[Tensor]:
        for _ in range(updates):
            xs, shown = copy(BATCH)
            yield F.cross_entropy(model(xs)[0][-SHOWN:].flatten(0, 1), shown.flatten())

    _fit(model, losses(), rate, updates)
    xs, shown = copy(2000)
    return (model(xs)[0][-SHOWN:].argmax(-1) == shown).double().mean().item()


def run_text(spec: str, rate: float, updates: int) -> float:
    ids, size = manual()
    held_out = ids[-len(ids) // 20 :]
    ids = ids[: -len(ids) // 20]
    streams = ids[: len(ids) // BATCH * BATCH].view(BATCH, -1).T
    model = Reader(spec, nn.Embedding(size, FEATURES), size)

    def losses() -> Iterator[Tensor]:
        state, at = None, 0
        for _ in range(updates):
            if at + WINDOW + 1 > len(streams):
                state, at = None, 0
            part = streams[at : at + WINDOW + 1]
            o, state = model(part[:-1], state)
            state = torch.utils._pytree.tree_map(Tensor.detach, state)
            at += WINDOW
            yield F.cross_entropy(o.flatten(0, 1), part[1:].flatten())

    _fit(model, losses(), rate, updates)
    rows = held_out[: (len(held_out) - 1) // 16 * 16 + 1]
    xs, targets = rows[:-1].view(16, -1).T, rows[1:].view(16, -1).T
    o, _ = model(xs)
    return F.cross_entropy(o.flatten(0, 1), targets.flatten()).item() / math.log(2)


def _fit(model: nn.Module, losses: Iterator[Tensor], rate: float, updates: int) -> None:
    """Adam, the rate falling to nothing along a cosine, gradients of norm 1 at most; then no gradients any more."""
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, updates)
    for loss in losses:
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.requires_grad_(False)


TASKS: dict[str, Callable[[str, float, int], float]] = {"adding": run_adding, "copy": run_copy, "text": run_text}


def one(job: tuple[str, str, float], quick: bool) -> tuple[float, float]:
    """The result of one cell, task and rate, and the seconds it took."""
    spec, task, rate = job
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    begun = time.perf_counter()
    return TASKS[task](spec, rate, 3 if quick else UPDATES[task]), time.perf_counter() - begun


def draw(rows: dict[str, dict[str, float]], path: Path) -> None:
    """One panel for each task, the cells in the order of the table."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "elman"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(TASKS), figsize=(11, 5.2), sharey=True, layout="constrained")
    for panel, task in zip(panels, TASKS, strict=True):
        values = [row[task] for row in rows.values()]
        best = (max if task == "copy" else min)(values)
        colours = ["#1b6ca8" if value == best else "#9dbad0" for value in values]
        panel.barh(list(rows), values, color=colours)
        panel.set_title(f"{task}: {UNITS[task]}", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        if task == "text":
            panel.set_xlim(min(values) * 0.9, max(values) * 1.02)
    panels[0].invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = options(__doc__, RESULTS / "choose_a_cell.json", quick="three cells, a few updates")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, each on one core (default 2)")
    parser.add_argument("--picture", type=Path, default=PICTURES / "choose_a_cell.svg", help="where it is drawn")
    given = parser.parse_args()
    specs = SPECS[::10] if given.quick else SPECS
    jobs = [(spec, task, rate) for spec in specs for task in TASKS for rate in RATES]
    rows: dict[str, dict[str, float]] = {}
    print(f"{'cell':<36}{'units':>6}" + "".join(f"{task:>10}" for task in TASKS) + f"{'seconds':>10}")
    with multiprocessing.get_context("spawn").Pool(given.jobs) as pool:
        found = pool.imap(partial(one, quick=given.quick), jobs)
        for spec in specs:
            row: dict[str, float] = {"units": units(spec), "seconds": 0.0}
            for task in TASKS:
                results = [next(found) for _ in RATES]
                row[task] = significant((max if task == "copy" else min)(value for value, _ in results))
                row["seconds"] = round(row["seconds"] + sum(seconds for _, seconds in results), 1)
            rows[spec] = row
            figures = "".join(f"{row[task]:>10.4g}" for task in TASKS)
            print(f"{spec:<36}{row['units']:>6}{figures}{row['seconds']:>10.0f}", flush=True)
    if not given.quick:
        keep(given.out, {"threads": 1, "parameters": PARAMETERS, "updates": UPDATES, "cells": rows})
        draw(rows, given.picture)


if __name__ == "__main__":
    main()
