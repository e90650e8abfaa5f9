"""Several time scales: what each combinator for them gains over the plain recurrent net, and what only a gate can do.

    python runs/time_scales.py [--quick]

Two rates: x(t) is a fast sine plus a level that changes every 16 steps; asked for is the mean of the level over the
last 64 steps, so the fast part must be averaged away and the slow one kept. All cells have about the same number of
weights and see the same sequences. Forgetting: numbers arrive one at a time, asked for is their sum; and the sum since
the last reset, which a second input marks. Figures are the share of the target's variance that is left unexplained on
new sequences. Takes about ten minutes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from kept import RESULTS, keep, options
from torch import Tensor, nn

import elman
from elman.cells import ElmanCell, GRUCell, LSTMCell
from elman.combinators import Stack, output_size
from elman.combinators.clockwork import Clockwork
from elman.combinators.delay import Delay
from elman.combinators.leaky import Leaky
from elman.combinators.masked import Masked
from elman.combinators.time_skip import TimeSkip

HOLD, WINDOW, BATCH = 16, 64, 32


def plain(reads: int, units: int = 32, init: str = "orthogonal") -> ElmanCell:
    return ElmanCell(reads, units, init=init)


def sparse(units: int, share: float) -> Tensor:
    """A mask: every unit reads itself, and about that share of the others."""
    others = torch.rand(units, units, generator=torch.Generator().manual_seed(0)) < share
    return others | torch.eye(units, dtype=torch.bool)


CLOCKS = [1, 2, 4, 8]
TWO_RATES: dict[str, Callable[[], nn.Module]] = {
    "Elman": lambda: plain(1),
    "Elman, two layers": lambda: Stack([plain(1, 20), plain(20, 20)]),
    "Delay 1 and 16 stacked": lambda: Stack([plain(1, 20), Delay(plain(20, 20), HOLD)]),
    "TimeSkip 16": lambda: TimeSkip(plain(1 + 22, 22), HOLD),
    "Leaky 0.9": lambda: Leaky(plain(1), 0.9),
    "Leaky sampled": lambda: Leaky(plain(1), "sampled"),
    "Leaky learned": lambda: Leaky(plain(1), "learned"),
    "Clockwork 1, 2, 4, 8": lambda: Clockwork(plain(1), CLOCKS),
    "Clockwork, triangular": lambda: Clockwork(plain(1, 40), CLOCKS, triangular=True),
    "Elman, identity": lambda: plain(1, init="identity"),
    "Masked to a tenth, identity": lambda: Masked(plain(1, 88, "identity"), sparse(88, 0.1)),
    "GRU": lambda: GRUCell(1, 18),
}
FORGETTING: dict[str, Callable[[], nn.Module]] = {
    "Elman": lambda: plain(2),
    "Leaky 0.9": lambda: Leaky(plain(2), 0.9),
    "Leaky 0.99": lambda: Leaky(plain(2), 0.99),
    "Leaky learned": lambda: Leaky(plain(2), "learned"),
    "GRU": lambda: GRUCell(2, 18),
    "LSTM": lambda: LSTMCell(2, 15, forget_bias=1.0),
}


def two_rates(size: int) -> tuple[Tensor, Tensor, int]:
    """x (T, B, 1), the targets (T, B), and the first step that has one."""
    steps = 2 * WINDOW
    t = torch.arange(steps)[:, None]
    fast = torch.sin(2 * math.pi * t / 5 + 2 * math.pi * torch.rand(size))
    levels = 2 * torch.rand(steps // HOLD + 1, size) - 1
    slow = levels.gather(0, (t + torch.randint(HOLD, (size,))) // HOLD)
    mean = slow.unfold(0, WINDOW, 1).mean(-1)
    return (fast + slow).unsqueeze(-1), 3 * torch.cat([slow[: WINDOW - 1], mean]), WINDOW - 1


def sums(size: int, resets: float) -> tuple[Tensor, Tensor, int]:
    """Numbers and marks (T, B, 2), the sums since the last mark (T, B), and 0."""
    steps = 100
    numbers, marks = torch.randn(steps, size), (torch.rand(steps, size) < resets).float()
    total, found = torch.zeros(size), []
    for number, mark in zip(numbers, marks, strict=True):
        total = total * (1 - mark) + number
        found.append(total)
    return torch.stack([numbers, marks], -1), torch.stack(found) / 5, 0


def unexplained(
    make: Callable[[], nn.Module],
    batch: Callable[[int], tuple[Tensor, Tensor, int]],
    lr: float,
    seed: int,
    updates: int,
) -> float:
    """The share of the target's variance that a trained cell with a linear readout leaves."""
    torch.manual_seed(seed)
    cell = make()
    readout = nn.Linear(output_size(cell), 1)
    parameters = [*cell.parameters(), *readout.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=lr)
    torch.manual_seed(1000 + seed)  # the same sequences for all cells

    def loss(size: int) -> Tensor:
        xs, targets, first = batch(size)
        error = readout(elman.scan(cell, xs)[0]).squeeze(-1) - targets
        return error[first:].square().mean() / targets[first:].square().mean()

    for _ in range(updates):
        optimiser.zero_grad()
        loss(BATCH).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
    with torch.no_grad():
        return loss(512).item()


def weights(cell: nn.Module) -> int:
    """Learned numbers; what a mask removed is none."""
    removed = sum(int((~mask).sum()) for name, mask in cell.named_buffers() if "mask_" in name)
    return sum(parameter.numel() for parameter in cell.parameters()) - removed


def table(
    title: str,
    cells: dict[str, Callable[[], nn.Module]],
    tasks: dict[str, Callable[[int], tuple[Tensor, Tensor, int]]],
    lr: float,
    seeds: list[int],
    updates: int,
) -> dict[str, dict[str, object]]:
    print(f"{title}: unexplained after {updates} updates, seeds {seeds}")
    print(f"  {'':<28}{'weights':>8}  " + "".join(f"{task:<25}" for task in tasks))
    rows: dict[str, dict[str, object]] = {}
    for name, make in cells.items():
        found = {task: [unexplained(make, batch, lr, s, updates) for s in seeds] for task, batch in tasks.items()}
        count = weights(make())
        figures = ["  ".join(f"{figure:.3f}" for figure in column) for column in found.values()]
        print(f"  {name:<28}{count:>8}  " + "".join(f"{text:<25}" for text in figures), flush=True)
        rows[name] = {"weights": count} | {task: [round(f, 4) for f in column] for task, column in found.items()}
    return rows


def main() -> None:
    given = options(__doc__, RESULTS / "time_scales.json", quick="every third cell, one update").parse_args()
    seeds, every = ([1], 3) if given.quick else ([1, 2, 3], 1)
    averaging, accumulating = (dict(list(cells.items())[::every]) for cells in (TWO_RATES, FORGETTING))
    slow = table("two rates", averaging, {"mean level": two_rates}, 2e-3, seeds, 1 if given.quick else 300)
    tasks = {"sum": lambda size: sums(size, 0), "sum since reset": lambda size: sums(size, 1 / 25)}
    forgetting = table("forgetting", accumulating, tasks, 5e-3, seeds, 1 if given.quick else 500)
    if not given.quick:
        keep(given.out, {"seeds": seeds, "two rates": slow, "forgetting": forgetting})


if __name__ == "__main__":
    main()
