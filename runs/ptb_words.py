"""Words of the Penn Treebank by two layers of 200 units, in float32, with less precision, and with torch.nn.LSTM.

    python runs/ptb_words.py [--text FOLDER] [--only NAME] [--epochs N] [--quick]

The "small" model of Zaremba et al. 2014, arXiv 1409.2329, whose test perplexity is about 115: 20 streams, 20 steps,
gradient descent from rate 1, halved after every epoch from the fifth on, gradients cut at norm 5, no dropout. Only the
recurrent layers differ between the rivals: embedding, softmax, order of the text and first weights are the same.
FOLDER holds ptb.train.txt, ptb.valid.txt and ptb.test.txt, 10,000 words among them. Takes a quarter of an hour for each
rival. The time of an epoch is measured apart from that, by turns; --epochs 0 does nothing else.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from kept import RESULTS, keep, options
from torch import Tensor, nn
from torch.nn import functional as F

import elman

STREAMS, STEPS, HIDDEN, EPOCHS, KEPT, CLIP = 20, 20, 200, 13, 4, 5.0
TURNS = (7, 40)  # how often the rivals take turns, and windows of a turn
TEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "ptb"

RIVALS = {
    "float32": (elman.LSTM, "highest", False),
    "high": (elman.LSTM, "high", False),
    "medium": (elman.LSTM, "medium", False),
    "bfloat16": (elman.LSTM, "highest", True),
    "torch.nn.LSTM": (nn.LSTM, "highest", False),
    "torch.nn.LSTM, bfloat16": (nn.LSTM, "highest", True),
}
"""Layer, precision of products in float32, and whether the layers run under autocast to bfloat16."""


TIMES = "seconds of an epoch"


class Words(nn.Module):
    """Embedding, two recurrent layers, softmax over the words."""

    def __init__(self, kind: type[nn.LSTM], words: int, autocast: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, HIDDEN)
        self.layers = kind(HIDDEN, HIDDEN, 2)
        self.readout = nn.Linear(HIDDEN, words)
        self.autocast = autocast
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)

    def forward(self, words: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x = self.embedding(words)
        narrow: AbstractContextManager[object] = (
            torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext()
        )
        with narrow:
            h, state = self.layers(x, state)
        return self.readout(h.float()), state


def read(folder: Path) -> dict[str, Tensor]:
    """The words of each part as numbers, those of the training part numbered as they come."""
    numbers: dict[str, int] = {}
    parts = {}
    for part in ("train", "valid", "test"):
        text = (folder / f"ptb.{part}.txt").read_text(encoding="utf-8")
        words = text.replace("\n", " <eos> ").split()
        parts[part] = torch.tensor([numbers.setdefault(word, len(numbers)) for word in words])
    return parts


def windows(ids: Tensor, streams: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(T, B) words and the ones after them, stream after stream from left to right."""
    length = (len(ids) - 1) // streams
    xs, ys = (ids[i : i + length * streams].view(streams, length).t() for i in (0, 1))
    for first in range(0, length, STEPS):
        yield xs[first : first + STEPS], ys[first : first + STEPS]


def loss_of(model: Words, ids: Tensor) -> float:
    """Nats per word, read in as many streams as in training."""
    total, count, state = 0.0, 0, None
    model.eval()
    with torch.no_grad():
        for xs, ys in windows(ids, STREAMS):
            logits, state = model(xs, state)
            total += float(F.cross_entropy(logits.flatten(0, 1), ys.flatten(), reduction="sum"))
            count += ys.numel()
    return total / count


class Rival:
    """A model and how it is trained."""

    def __init__(self, name: str, words: int) -> None:
        kind, self.precision, autocast = RIVALS[name]
        torch.manual_seed(1)
        self.model = Words(kind, words, autocast)

    def steps(self, text: Iterable[tuple[Tensor, Tensor]], rate: float) -> None:
        """Train on windows that follow one another."""
        torch.set_float32_matmul_precision(self.precision)
        model, state = self.model.train(), None
        for xs, ys in text:
            logits, state = model(xs, state)
            state = (state[0].detach(), state[1].detach())
            loss = F.cross_entropy(logits.flatten(0, 1), ys.flatten())
            model.zero_grad(set_to_none=True)
            (loss * STEPS).backward()  # summed over the steps, as published
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.sub_(parameter.grad, alpha=rate)


def trained(name: str, parts: dict[str, Tensor], epochs: int) -> dict[str, Any]:
    rival = Rival(name, words_of(parts))
    begun = time.perf_counter()
    for epoch in range(epochs):
        rival.steps(windows(parts["train"], STREAMS), 0.5 ** max(epoch + 1 - KEPT, 0))
        valid = loss_of(rival.model, parts["valid"])
        spent = time.perf_counter() - begun
        print(f"{name:<24} epoch {epoch + 1:>2}  {spent:6.0f} s  valid {math.exp(valid):7.2f}", flush=True)
    test = loss_of(rival.model, parts["test"])
    return {"valid": round(valid, 4), "test": round(test, 4), "test perplexity": round(math.exp(test), 2)}


def epoch_seconds(names: Iterable[str], parts: dict[str, Tensor]) -> dict[str, float]:
    """The time of an epoch of each rival, from windows in which they take turns; the least of the turns."""
    text = list(windows(parts["train"], STREAMS))
    some = text[: TURNS[1]]
    rivals = {name: Rival(name, words_of(parts)) for name in names}
    least = dict.fromkeys(rivals, math.inf)
    for turn in range(TURNS[0] + 1):
        for name, rival in rivals.items():
            begun = time.perf_counter()
            rival.steps(some, 1.0)
            if turn:  # the first one compiles
                least[name] = min(least[name], time.perf_counter() - begun)
    return {name: round(seconds * len(text) / len(some), 1) for name, seconds in least.items()}


def words_of(parts: dict[str, Tensor]) -> int:
    return 1 + max(int(ids.max()) for ids in parts.values())


def main() -> None:
    parser = options(__doc__, RESULTS / "ptb_words.json", "one epoch of few made-up words")
    parser.add_argument("--text", type=Path, default=TEXT, metavar="FOLDER", help="where the three parts are")
    parser.add_argument(
        "--only", choices=list(RIVALS), action="append", help="may be repeated; what is kept of others stays"
    )
    parser.add_argument(
        "--epochs", type=int, default=EPOCHS, help="another number keeps nothing; 0 measures the time alone"
    )
    given = parser.parse_args()
    if given.quick:
        torch.manual_seed(0)
        parts = {part: torch.randint(50, (900,)) for part in ("train", "valid", "test")}
    else:
        parts = read(given.text)
    names = given.only or list(RIVALS)
    epochs = min(given.epochs, 1) if given.quick else given.epochs
    found: dict[str, Any] = {name: trained(name, parts, epochs) for name in names} if epochs else {}
    if not (given.quick or (given.only and epochs)):
        found[TIMES] = {"threads": torch.get_num_threads(), **epoch_seconds(names, parts)}
    print(json.dumps(found, indent=1))
    if not given.quick and epochs in (0, EPOCHS):
        before = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
        keep(given.out, {**{name: before[name] for name in (*RIVALS, TIMES) if name in before}, **found})


if __name__ == "__main__":
    main()
