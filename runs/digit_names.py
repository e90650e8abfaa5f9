"""A picture of a digit becomes its name, letter after letter: conditioning a network on a vector, in three ways.

    python runs/digit_names.py [--quick]

The 1,797 pictures of scikit-learn, 8 × 8 points each, every fifth held out. A GRU says the name, forced by its letters
in training and on its own output when it is tested. The picture is read at every step (R c in every gate), in the first
state (h(0) = G c), or both; "none" does not see it. The share of held-out pictures named without a wrong letter, best
of nothing: the last update of each, three seeds. Takes half a minute.
"""

from __future__ import annotations

import torch
from kept import RESULTS, keep, options
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import elman
from elman.cells import GRUCell
from elman.combinators import Conditioned, Feedback

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
LETTERS = ["", *sorted(set("".join(NAMES)))]  # the first one ends a name
STEPS, HIDDEN, BATCH, UPDATES, SEEDS = 6, 64, 128, 500, (1, 2, 3)
WAYS = ("step", "start", "both", "none")


def digits() -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (N, 64), names (STEPS, N) as letters, and which are held out (N)."""
    data = load_digits()
    spelt = torch.tensor([[LETTERS.index(name[t : t + 1]) for name in NAMES] for t in range(STEPS)])
    pictures = torch.from_numpy(data.images).flatten(1).float() / 16
    return pictures, spelt[:, torch.from_numpy(data.target)], torch.arange(len(pictures)) % 5 == 0


def network(way: str) -> nn.Module:
    """Feedback around Conditioned: one cell, so that forced and free, with and without a picture are one object."""
    letters, points = len(LETTERS), 64
    if way == "none":
        return Feedback(GRUCell(letters, HIDDEN), nn.Linear(HIDDEN, letters), feed="argmax")
    inner = GRUCell(letters + (points if way != "start" else 0), HIDDEN)
    return Feedback(Conditioned(inner, points, where=way), nn.Linear(HIDDEN, letters), feed="argmax")


def named(way: str, seed: int, updates: int) -> float:
    """The share of held-out pictures whose whole name is right."""
    torch.manual_seed(seed)
    model = network(way)
    pictures, names, held_out = digits()
    nothing = torch.zeros(STEPS, len(pictures), 0)  # letters come back by themselves: there is no other input
    constants = None if way == "none" else pictures
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    train = (~held_out).nonzero()[:, 0]
    for _ in range(updates):
        chosen = train[torch.randint(len(train), (BATCH,))]
        given = None if constants is None else constants[chosen]
        o, _ = elman.scan(model, (nothing[:, chosen], names[:, chosen]), constants=given)
        loss = F.cross_entropy(o.flatten(0, 1), names[:, chosen].flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    with torch.no_grad():
        given = None if constants is None else constants[held_out]
        o, _ = elman.scan(model, nothing[:, held_out], constants=given)
    return (o.argmax(-1) == names[:, held_out]).all(0).double().mean().item()


def main() -> None:
    given = options(__doc__, RESULTS / "digit_names.json").parse_args()
    updates, seeds = (5, SEEDS[:1]) if given.quick else (UPDATES, SEEDS)
    rows = {}
    print(f"{'conditioned on':<16}held-out pictures named without a wrong letter, {len(seeds)} seeds")
    for way in WAYS:
        rows[way] = [round(named(way, seed, updates), 4) for seed in seeds]
        print(f"{way:<16}{'  '.join(f'{share:.1%}' for share in rows[way])}", flush=True)
    if not given.quick:
        keep(given.out, {"seeds": seeds, "updates": updates, "named": rows})


if __name__ == "__main__":
    main()
