"""Forced by its targets, the Jordan network trains all steps at once, and it remembers only what its targets tell.

    python runs/jordan.py [--quick]

Speed: one training step (forward, backward, Adam) at T = 1000 of a Jordan network under teacher forcing and of an Elman
network of the same size, both compiled by the same engine, taking turns in every repeat. Memory: two tasks of bits,
each network trained alike. Recall asks for the first bit after the last step, and for 0 before: the targets carry no
memory. In running parity every target tells all that is to be remembered. Both run free when they are tested: the
Jordan network then reads its own outputs. Takes about two minutes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from kept import RESULTS, keep, options
from torch import Tensor, nn
from torch.nn import functional as F

import elman
from elman.networks.jordan import jordan

STEPS, FEATURES, OUTPUTS, THREADS = 1000, 32, 32, 2
SHAPES = [(1, 128), (8, 128), (32, 128), (8, 512)]  # B, H
LENGTH, HIDDEN, BATCH = 10, 32, 128


class Elman(nn.Module):
    """An Elman cell with a linear readout, a cell itself."""

    def __init__(self, features: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.cell, self.readout = elman.ElmanCell(features, hidden), nn.Linear(hidden, outputs)
        self.initial_state = self.cell.initial_state

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h, state = self.cell(x, state)
        return self.readout(h), state


def train_step(model: nn.Module, xs: Tensor, ys: Tensor, forced: bool) -> Callable[[], float]:
    """A function that takes one step and gives its loss."""
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)

    def one() -> float:
        o, _ = elman.scan(model, (xs, ys) if forced else xs)
        loss = F.cross_entropy(o.flatten(0, 1), ys.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return loss.item()

    return one


def speed(batch: int, hidden: int, steps: int, repeats: int) -> dict[str, float]:
    """Milliseconds of a training step of either network: minimum and median."""
    torch.manual_seed(0)
    xs, ys = torch.randn(steps, batch, FEATURES), torch.randint(OUTPUTS, (steps, batch))
    updates = {
        "Elman": train_step(Elman(FEATURES, hidden, OUTPUTS), xs, ys, forced=False),
        "Jordan": train_step(jordan(FEATURES, hidden, OUTPUTS), xs, ys, forced=True),
    }
    taken: dict[str, list[float]] = {name: [] for name in updates}
    for repeat in range(repeats + 2):
        for name, one in updates.items():
            begun = time.perf_counter()
            one()
            if repeat > 1:  # the first ones compile and warm up
                taken[name].append(1000 * (time.perf_counter() - begun))
    found = {"B": batch, "H": hidden}
    for name, times in taken.items():
        found |= {f"{name} min ms": min(times), f"{name} median ms": statistics.median(times)}
    found["ratio of minima"] = found["Elman min ms"] / found["Jordan min ms"]
    found["ratio of medians"] = found["Elman median ms"] / found["Jordan median ms"]
    return {key: round(value, 2) for key, value in found.items()}


def recall(batch: int) -> tuple[Tensor, Tensor]:
    """Bits (T, B, 1), and 0 at every step but the last, which asks for the first bit."""
    bits = torch.randint(2, (LENGTH, batch))
    ys = torch.zeros_like(bits)
    ys[-1] = bits[0]
    return 2.0 * bits[..., None] - 1, ys


def parity(batch: int) -> tuple[Tensor, Tensor]:
    """Bits (T, B, 1), and the parity of those that have come."""
    bits = torch.randint(2, (LENGTH, batch))
    return 2.0 * bits[..., None] - 1, bits.cumsum(0) % 2


def accuracy(model: nn.Module, task: Callable[[int], tuple[Tensor, Tensor]], forced: bool, updates: int) -> float:
    """Share of right answers at the last step, running free, after training."""
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(updates):
        xs, ys = task(BATCH)
        o, _ = elman.scan(model, (xs, ys) if forced else xs)
        loss = F.cross_entropy(o.flatten(0, 1), ys.flatten()) + F.cross_entropy(o[-1], ys[-1])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    xs, ys = task(4000)
    with torch.no_grad():
        return (elman.scan(model, xs)[0][-1].argmax(-1) == ys[-1]).double().mean().item()


def memory(seed: int, updates: int) -> dict[str, float]:
    """Accuracies of both networks on both tasks."""
    found: dict[str, float] = {"seed": seed}
    for name, task in (("recall", recall), ("parity", parity)):
        torch.manual_seed(seed)
        found[f"{name}, Elman"] = accuracy(Elman(1, HIDDEN, 2), task, forced=False, updates=updates)
        torch.manual_seed(seed)
        model = jordan(1, HIDDEN, 2, feed="argmax")
        found[f"{name}, Jordan"] = accuracy(model, task, forced=True, updates=updates)
    return found


def show(rows: list[dict[str, float]]) -> None:
    """A table."""
    print("  ".join(f"{name:>17}" for name in rows[0]))
    for row in rows:
        print("  ".join(f"{value:>17g}" for value in row.values()), flush=True)


def main() -> None:
    given = options(__doc__, RESULTS / "jordan.json", quick="one small case of each").parse_args()
    torch.set_num_threads(THREADS)
    shapes, steps, repeats = (SHAPES[:1], 20, 1) if given.quick else (SHAPES, STEPS, 9)
    speeds = [speed(*shape, steps, repeats) for shape in shapes]
    show(speeds)
    torch.set_num_threads(1)  # tensors of a few numbers: a second thread only waits
    memories = [memory(seed, updates=3 if given.quick else 600) for seed in range(1 if given.quick else 2)]
    show(memories)
    if not given.quick:
        keep(given.out, {"threads of the timings": THREADS, "T": STEPS, "speed": speeds, "memory": memories})


if __name__ == "__main__":
    main()
