"""What a blank in a text was: a network that reads from both sides knows best, a window ahead is better than none.

    python runs/fill_in_the_blank.py [--quick]

Characters of the documentation that comes with the interpreter (pydoc_data.topics), in pieces of 48; one in eight is
blanked, and named at its place from what the network has read by then. Forward: a GRU. Window: a GRU that also reads
the next character. Bidirectional: two GRUs. Widths are such that all have about as many parameters. Accuracy is on
the last tenth of the text, which is not trained on. Takes about three minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
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
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="a few updates, to see that it runs")
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fill_in_the_blank.json")
    given = options.parse_args()
    rows = []
    print(f"{'network':>14}{'parameters':>12}  accuracy, by seed")
    for kind in HIDDEN:
        runs = [accuracy(kind, seed, 3 if given.quick else UPDATES) for seed in SEEDS]
        rows.append({"network": kind, "parameters": runs[0][1], "accuracy": [round(right, 4) for right, _ in runs]})
        print(f"{kind:>14}{runs[0][1]:>12}  " + "  ".join(f"{right:.1%}" for right, _ in runs), flush=True)
    if not given.quick:
        result = {"command": " ".join(["python", *sys.argv]), "seeds": SEEDS, "updates": UPDATES, "rows": rows}
        given.out.parent.mkdir(exist_ok=True)
        given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
