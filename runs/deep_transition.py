"""A deep transition trains with skip connections inside it, and stalls without.

    python runs/deep_transition.py [--quick]

Recall: symbols out of 8 come one at a time, and at every step the one LAG steps ago must be named. The transition of an
Elman cell gets an MLP of 0 to 6 layers, with and without the identity around it; beside the accuracy stand the lengths
of the ways from x(t - LAG) to y(t), counted in the compiled program. The control draws the MLP orthogonal instead of as
nn.Linear does: a start that keeps norms does part of what the skip does. Takes about five minutes.
"""

from __future__ import annotations

import torch
from kept import RESULTS, keep, options
from torch import nn
from torch.nn import functional as F

import elman
from elman.cells import ElmanCell
from elman.combinators.deep import Deep
from elman.paths import path_lengths

SYMBOLS, LAG, STEPS, BATCH, HIDDEN = 8, 10, 40, 64, 64
CASES = [
    (0, False, False),
    *((layers, skip, False) for layers in (2, 4, 6) for skip in (False, True)),
    *((6, skip, True) for skip in (False, True)),
]


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symbols (T, B) as indicators, and the symbols to name; the first LAG steps have none."""
    symbols = torch.randint(SYMBOLS, (STEPS, size))
    return F.one_hot(symbols, SYMBOLS).float(), symbols[:-LAG]


def trained(layers: int, skip: bool, orthogonal: bool, seed: int, updates: int) -> tuple[nn.Module, float]:
    """The cell, and the share of symbols of new sequences that it names after training."""
    torch.manual_seed(seed)
    cell: nn.Module = ElmanCell(SYMBOLS, HIDDEN, init="orthogonal")
    if layers:
        cell = Deep(cell, transition=layers, skip=skip)
        for name, parameter in cell.transition.named_parameters() if orthogonal else ():
            nn.init.orthogonal_(parameter) if name.endswith("weight") else nn.init.zeros_(parameter)
    readout = nn.Linear(HIDDEN, SYMBOLS)
    parameters = [*cell.parameters(), *readout.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=1e-3)
    for _ in range(updates):
        xs, targets = batch(BATCH)
        loss = F.cross_entropy(readout(elman.scan(cell, xs)[0][LAG:]).flatten(0, 1), targets.flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
    xs, targets = batch(512)
    with torch.no_grad():
        named = readout(elman.scan(cell, xs)[0][LAG:]).argmax(-1)
    return cell, (named == targets).float().mean().item()


def main() -> None:
    given = options(__doc__, RESULTS / "deep_transition.json").parse_args()
    seeds, updates = ([1], 2) if given.quick else ([1, 2, 3], 600)
    print(f"accuracy after {updates} updates, chance {1 / SYMBOLS:.3f}; operations from x(t - {LAG}) to y(t)")
    print(f"{'transition':<28}{'shortest':>9}{'longest':>9}   accuracy, seeds {seeds}")
    rows = []
    for layers, skip, orthogonal in CASES:
        cells, accuracies = zip(*(trained(layers, skip, orthogonal, seed, updates) for seed in seeds), strict=True)
        path = path_lengths(cells[0], torch.zeros(2, 1, SYMBOLS)).over(LAG)
        assert path is not None
        name = f"{layers} layers{', skip' if skip else ''}{', orthogonal' if orthogonal else ''}"
        print(
            f"{name:<28}{path.shortest:>9}{path.longest:>9}   " + "  ".join(f"{a:.3f}" for a in accuracies), flush=True
        )
        rows.append({"transition": name, "path": path._asdict(), "accuracy": [round(a, 4) for a in accuracies]})
    if not given.quick:
        keep(given.out, {"seeds": seeds, "updates": updates, "rows": rows})


if __name__ == "__main__":
    main()
