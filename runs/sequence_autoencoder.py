"""A sequence autoencoder rebuilds strings that it has never read from one vector, the better the wider the vector.

    python runs/sequence_autoencoder.py [--quick]

Strings of one to six digits: a GRU reads them, its last output becomes a code of 2, 8 or 32 numbers, and from the code
alone another GRU says the string again, forced by it in training, on its own output when it is tested. One string in
ten (by its value) is kept from training. The share that is rebuilt whole, by length. Takes about a minute.
"""

from __future__ import annotations

import torch
from kept import RESULTS, keep, options
from torch import Tensor, nn
from torch.nn import functional as F

from elman.cells import GRUCell
from elman.combinators.feedback import Feedback
from elman.networks.autoencoder import SequenceAutoencoder
from elman.networks.summary import Summary

DIGITS, LONGEST, HIDDEN, BATCH, UPDATES, CODES, SEED = 10, 6, 96, 128, 1200, (2, 8, 32), 1


def strings(count: int, held_out: bool) -> tuple[Tensor, Tensor]:
    """Digits (T, B) and lengths (B); the sum of those whose weights are 1, 2, 3, … tells what is held out."""
    digits, lengths = torch.randint(DIGITS, (LONGEST, 12 * count)), torch.randint(1, LONGEST + 1, (12 * count,))
    place = torch.arange(LONGEST)[:, None]
    digits = digits.masked_fill(place >= lengths, 0)
    kept = ((((digits + 1) * (place + 1) * (place < lengths)).sum(0) * 7 % 10 == 0) == held_out).nonzero()[:count, 0]
    return digits[:, kept], lengths[kept]


def one_hot(digits: Tensor) -> Tensor:
    return F.one_hot(digits, DIGITS).float()


def rebuilt(code: int, updates: int) -> tuple[dict[int, float], list[tuple[str, str]]]:
    """The share of held-out strings that are rebuilt whole, by length, and some of them with what became of them."""
    torch.manual_seed(SEED)
    encoder = Summary(GRUCell(DIGITS, HIDDEN), nn.Linear(HIDDEN, code))
    decoder = Feedback(GRUCell(code + DIGITS, HIDDEN), nn.Linear(HIDDEN, DIGITS), feed="argmax")
    model = SequenceAutoencoder(encoder, decoder)
    optimiser = torch.optim.Adam(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=updates + 1)
    for _ in range(updates):
        digits, lengths = strings(BATCH, held_out=False)
        o = model(one_hot(digits), digits, lengths)
        inside = torch.arange(LONGEST)[:, None] < lengths
        loss = F.cross_entropy(o[inside], digits[inside])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    digits, lengths = strings(2000, held_out=True)
    with torch.no_grad():
        found = model(one_hot(digits), lengths=lengths).argmax(-1)
    wrong = (found != digits) & (torch.arange(LONGEST)[:, None] < lengths)
    right = ~wrong.any(0)
    shares = {n: round(right[lengths == n].double().mean().item(), 4) for n in range(1, LONGEST + 1)}
    pairs = [(digits[:n, b], found[:n, b]) for b, n in enumerate(lengths[:5])]
    return shares, [(spelt(before), spelt(after)) for before, after in pairs]


def spelt(digits: Tensor) -> str:
    return "".join(map(str, digits.tolist()))


def main() -> None:
    given = options(__doc__, RESULTS / "sequence_autoencoder.json").parse_args()
    rows = []
    print("  code  " + "".join(f"{f'length {n}':>10}" for n in range(1, LONGEST + 1)))
    for code in CODES:
        shares, shown = rebuilt(code, 3 if given.quick else UPDATES)
        rows.append({"code": code, "rebuilt": shares, "examples": shown})
        print(f"{code:>6}  " + "".join(f"{share:>10.1%}" for share in shares.values()), flush=True)
        print("        " + ", ".join(f"{before} → {after}" for before, after in shown), flush=True)
    if not given.quick:
        keep(given.out, {"seed": SEED, "updates": UPDATES, "rows": rows})


if __name__ == "__main__":
    main()
