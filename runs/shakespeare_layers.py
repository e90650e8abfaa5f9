"""Characters of Shakespeare by two layers of 512 units, in float32, with less precision, and with torch.nn.LSTM.

    python runs/shakespeare_layers.py [--text FILE] [--only NAME] [--epochs N] [--seed N] [--quick]

FILE is input.txt of github.com/karpathy/char-rnn, data/tinyshakespeare, nine tenths of it for training, the last for
validation: 32 streams, 128 steps, Adam from rate 0.003 down to 0 along a cosine over 4 epochs, gradients cut at norm 1,
dropout 0.2 of what the layers are given, 0.5 between them and of what they give. Takes 4 to 8 minutes for each rival.
The time of an epoch is measured apart from that, by turns; --epochs 0 does nothing else.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from rivals import DATA, Task, run
from torch import Tensor

EPOCHS, RATE = 4, 3e-3

TASK = Task(
    name="shakespeare_layers",
    hidden=512,
    streams=32,
    steps=128,
    epochs=EPOCHS,
    first=512**-0.5,
    dropout=(0.2, 0.5, 0.5),
    optimiser=lambda parameters: torch.optim.Adam(parameters, lr=RATE),
    rate=lambda done: RATE * (1 + math.cos(math.pi * done / EPOCHS)) / 2,
    clip=1.0,
    turn=8,
)


def read(file: Path) -> dict[str, Tensor]:
    """The characters of both parts as numbers."""
    text = file.read_text(encoding="utf-8")
    numbers = {character: number for number, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([numbers[character] for character in text])
    cut = int(len(ids) * 0.9)
    return {"train": ids[:cut], "valid": ids[cut:]}


if __name__ == "__main__":
    run(__doc__, TASK, read, DATA / "tinyshakespeare" / "input.txt")
