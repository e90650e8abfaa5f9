"""What a blank in a text was: a network that reads from both sides knows best, a window ahead is better than none.

    python runs/fill_in_the_blank.py [--quick]

Characters of the documentation that comes with the interpreter (pydoc_data.topics), in pieces of 48; one in eight is
blanked, and named at its place from what the network has read by then. Forward: a GRU. Window: a GRU that also reads
the next character. Bidirectional: two GRUs. Widths are such that all have about as many parameters. Accuracy is on
the last tenth of the text, which is not trained on. Takes two minutes.
"""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from kept import RESULTS, keep, options
from torch import Tensor, nn
from torch.nn import functional as F

from elman.cells import GRUCell
from elman.networks.bidirectional import Bidirectional
from elman.networks.window import Window

PIECE, EVERY, EMBEDDING, BATCH, UPDATES, SEEDS = 48, 8, 32, 32, 700, (1, 2)
HIDDEN = {"forward": 124, "window": 112, "bidirectional": 84}


def text() -> tuple[Tensor, int]:
    """The characters as numbers, and how many kinds there are; a blank is one more."""
    joined = "\n".join(topics[name] for name in sorted(topics))
    number = {character: i for i, character in enumerate(sorted(set(joined)))}
    return torch.tensor([number[character] for character in joined]), len(number)


class Reader(nn.Module):
    """Embedding, one of the three networks, and the logits of each character."""

    def __init__(self, kind: str, symbols: int) -> None:
        super().__init__()
        hidden = HIDDEN[kind]
        self.embedding = nn.Embedding(symbols + 1, EMBEDDING)
        if kind == "bidirectional":
            self.network: nn.Module = Bidirectional(GRUCell(EMBEDDING, hidden), GRUCell(EMBEDDING, hidden))
            hidden *= 2
        else:
            ahead = 1 if kind == "window" else 0
            self.network = Window(GRUCell((1 + ahead) * EMBEDDING, hidden), 0, ahead)
        self.readout = nn.Linear(hidden, symbols)

    def forward(self, characters: Tensor, at: Tensor) -> Tensor:
        """Logits at the blanks, of characters (T, B) and where the blanks are (T, B)."""
        ys, _ = self.network(self.embedding(characters))
        return self.readout(ys[at])


def pieces(characters: Tensor, starts: Tensor, symbols: int) -> tuple[Tensor, Tensor, Tensor]:
    """(T, B) with blanks, where these are, and what stood there."""
    whole = characters[starts + torch.arange(PIECE)[:, None]]
    at = torch.rand(whole.shape) < 1 / EVERY
    return whole.masked_fill(at, symbols), at, whole[at]


def accuracy(kind: str, seed: int, updates: int) -> tuple[float, int]:
    """Share of held-out blanks filled rightly after training, and the number of parameters."""
    characters, symbols = text()
    cut = len(characters) * 9 // 10
    torch.manual_seed(seed)
    model = Reader(kind, symbols)
    optimiser = torch.optim.Adam(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=updates + 1)
    torch.manual_seed(seed)  # all three see the same pieces and blanks
    for _ in range(updates):
        given, at, wanted = pieces(characters, torch.randint(cut - PIECE, (BATCH,)), symbols)
        loss = F.cross_entropy(model(given, at), wanted)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    torch.manual_seed(0)
    given, at, wanted = pieces(characters, torch.arange(cut, len(characters) - PIECE, PIECE), symbols)
    with torch.no_grad():
        right = (model(given, at).argmax(-1) == wanted).double().mean().item()
    return right, sum(p.numel() for p in model.parameters())


def main() -> None:
    given = options(__doc__, RESULTS / "fill_in_the_blank.json").parse_args()
    updates, seeds = (3, SEEDS[:1]) if given.quick else (UPDATES, SEEDS)
    rows = []
    print(f"{'network':>14}{'parameters':>12}  accuracy, by seed")
    for kind in HIDDEN:
        runs = [accuracy(kind, seed, updates) for seed in seeds]
        rows.append({"network": kind, "parameters": runs[0][1], "accuracy": [round(right, 4) for right, _ in runs]})
        print(f"{kind:>14}{runs[0][1]:>12}  " + "  ".join(f"{right:.1%}" for right, _ in runs), flush=True)
    if not given.quick:
        keep(given.out, {"seeds": seeds, "updates": updates, "rows": rows})


if __name__ == "__main__":
    main()
