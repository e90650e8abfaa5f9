"""Words of the Penn Treebank by two layers of 200 units, in float32, with less precision, and with torch.nn.LSTM.

    python runs/ptb_words.py [--text FOLDER] [--only NAME] [--epochs N] [--seed N] [--quick]

The "small" model of Zaremba et al. 2014, arXiv 1409.2329, whose test perplexity is about 115: 20 streams, 20 steps,
gradient descent from rate 1, halved after every epoch from the fifth on, gradients cut at norm 5, no dropout. FOLDER
holds ptb.train.txt, ptb.valid.txt and ptb.test.txt, 10,000 words among them. Takes a quarter of an hour for each rival.
The time of an epoch is measured apart from that, by turns; --epochs 0 does nothing else.
"""

from __future__ import annotations

from pathlib import Path

import torch
from rivals import DATA, Task, run
from torch import Tensor

STEPS, KEPT = 20, 4

TASK = Task(
    name="ptb_words",
    hidden=200,
    streams=20,
    steps=STEPS,
    epochs=13,
    first=0.1,
    dropout=(0.0, 0.0, 0.0),
    optimiser=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
    rate=lambda done: 0.5 ** max(int(done) + 1 - KEPT, 0),
    clip=5.0,
    scale=STEPS,  # summed over the steps, as published
)


def read(folder: Path) -> dict[str, Tensor]:
    """The words of each part as numbers, those of the training part numbered as they come."""
    numbers: dict[str, int] = {}
    parts = {}
    for part in ("train", "valid", "test"):
        text = (folder / f"ptb.{part}.txt").read_text(encoding="utf-8")
        words = text.replace("\n", " <eos> ").split()
        parts[part] = torch.tensor([numbers.setdefault(word, len(numbers)) for word in words])
    return parts


if __name__ == "__main__":
    run(__doc__, TASK, read, DATA / "ptb")
