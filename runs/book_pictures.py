"""Draws the pictures of chapter 10 of Goodfellow, Bengio and Courville from real networks, into docs/pictures.

About 20 seconds on 2 cores. Nothing is trained, and nothing is random: the files are the same at every run.

    python runs/book_pictures.py            all pictures as SVG
    python runs/book_pictures.py --quick    the first two, not written
    python runs/book_pictures.py --out FOLDER --png
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from kept import PICTURES, options
from torch import Tensor, nn

import elman
from elman.cells import ElmanCell, LSTMCell
from elman.combinators import Stack
from elman.combinators.conditioned import Conditioned
from elman.combinators.deep import Deep
from elman.combinators.feedback import Feedback
from elman.drawing import Picture, draw
from elman.networks.autoencoder import SequenceAutoencoder
from elman.networks.bidirectional import Bidirectional
from elman.networks.jordan import jordan
from elman.networks.summary import Summary

FEATURES, UNITS, OUTPUTS, CODE = 3, 4, 2, 5


class Read(nn.Module):
    """A cell with a linear output: o(t) = V y(t) + c."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.readout, self.input_size = cell, nn.Linear(UNITS, OUTPUTS), FEATURES

    def initial_state(self, batch: int, **options: object) -> object:
        return self.cell.initial_state(batch, **options)  # type: ignore[operator]

    def forward(self, x: Tensor, state: object) -> tuple[Tensor, object]:
        y, state = self.cell(x, state)
        return self.readout(y), state


class BothWays(nn.Module):
    """A bidirectional layer with a linear output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.readout = (
            Bidirectional(ElmanCell(FEATURES, UNITS), ElmanCell(FEATURES, UNITS)),
            nn.Linear(2 * UNITS, OUTPUTS),
        )

    def forward(self, xs: Tensor) -> Tensor:
        return self.readout(self.layer(xs)[0])


class Tree(nn.Module):
    """A recursive network over a balanced binary tree: one composition with the same weights at every node."""

    def __init__(self) -> None:
        super().__init__()
        self.leaf = nn.Linear(FEATURES, UNITS)
        self.left, self.right = nn.Linear(UNITS, UNITS, bias=False), nn.Linear(UNITS, UNITS)
        self.readout = nn.Linear(UNITS, OUTPUTS)

    def forward(self, xs: Tensor) -> Tensor:
        level = [torch.tanh(self.leaf(x)) for x in xs]
        while len(level) > 1:
            pairs = zip(level[::2], level[1::2], strict=True)
            level = [torch.tanh(self.left(a) + self.right(b)) for a, b in pairs]
        return self.readout(level[0])


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


def _sequence(width: int = FEATURES, steps: int = 3) -> Tensor:
    return _zeros(steps, 1, width)


def hidden_recurrence(steps: int = 0) -> Picture:
    return draw(Read(ElmanCell(FEATURES, UNITS)), unroll=steps, loss=True)


def output_recurrence(steps: int = 0) -> Picture:
    return draw(jordan(FEATURES, UNITS, OUTPUTS), unroll=steps, loss=True)


def single_output() -> Picture:
    return draw(Summary(ElmanCell(FEATURES, UNITS), nn.Linear(UNITS, OUTPUTS)), _sequence(), unroll=4, loss=True)


def teacher_forcing(steps: int = 0) -> Picture:
    pair = (_sequence(), _sequence(OUTPUTS))
    return draw(jordan(FEATURES, UNITS, OUTPUTS), pair, names=["x", "y"], unroll=steps, loss=True)


def conditioned() -> Picture:
    """A vector x to a sequence y: R x at every step, and y(t-1) fed back."""
    cell = Feedback(Conditioned(ElmanCell(OUTPUTS + CODE, UNITS), CODE, key="x"), nn.Linear(UNITS, OUTPUTS))
    pair = (_sequence(0), _sequence(OUTPUTS))
    return draw(cell, pair, constants={"x": _zeros(1, CODE)}, names=["", "y"], unroll=3, loss=True)


def bidirectional() -> Picture:
    return draw(BothWays(), _sequence(), unroll=3, loss=True)


def encoder_decoder() -> Picture:
    encoder = Summary(ElmanCell(FEATURES, UNITS), nn.Linear(UNITS, CODE))
    return draw(
        SequenceAutoencoder(encoder, Feedback(ElmanCell(CODE + OUTPUTS, UNITS), nn.Linear(UNITS, OUTPUTS))),
        _sequence(),
        unroll=3,
    )


def deep_states() -> Picture:
    return draw(Read(Stack([ElmanCell(FEATURES, UNITS), ElmanCell(UNITS, UNITS)])))


def deep_blocks() -> Picture:
    return draw(Read(Deep(ElmanCell(FEATURES, UNITS), input=1, transition=1, output=1)))


def deep_skip() -> Picture:
    return draw(Read(Deep(ElmanCell(FEATURES, UNITS), transition=1, skip=True)))


def tree() -> Picture:
    return draw(Tree(), _sequence(), unroll=4, loss=True)


def lstm_block() -> Picture:
    return draw(LSTMCell(FEATURES, UNITS), detail=True)


BOOK: dict[str, Callable[[], Picture]] = {
    "hidden-recurrence": hidden_recurrence,
    "hidden-recurrence-unrolled": lambda: hidden_recurrence(3),
    "output-recurrence": output_recurrence,
    "output-recurrence-unrolled": lambda: output_recurrence(3),
    "single-output": single_output,
    "teacher-forcing": teacher_forcing,
    "teacher-forcing-unrolled": lambda: teacher_forcing(3),
    "conditioned": conditioned,
    "bidirectional": bidirectional,
    "encoder-decoder": encoder_decoder,
    "deep-states": deep_states,
    "deep-blocks": deep_blocks,
    "deep-skip": deep_skip,
    "tree": tree,
    "lstm-block": lstm_block,
}


def main() -> None:
    parser = options(__doc__, PICTURES, quick="only the first two")
    parser.add_argument("--png", action="store_true", help="PNG instead of SVG")
    given = parser.parse_args()
    print(f"{'picture':<28} {'nodes':>5} {'edges':>5} {'loops':>5} {'bytes':>7}   elman {elman.__version__}")
    for name, make in list(BOOK.items())[: 2 if given.quick else None]:
        picture = make()
        drawn = picture.png() if given.png else picture.svg().encode()
        if not given.quick:
            given.out.mkdir(parents=True, exist_ok=True)
            (given.out / f"{name}.{'png' if given.png else 'svg'}").write_bytes(drawn)
        found = picture.diagram
        loops = "-" if found.loops is None else found.loops
        print(f"{name:<28} {len(found.nodes):>5} {len(found.edges):>5} {loops:>5} {len(drawn):>7}")


if __name__ == "__main__":
    main()
