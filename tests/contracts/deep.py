"""Rows of the contract table: depth inside a step."""

from __future__ import annotations

from elman.cells import ElmanCell, GRUCell, LSTMCell
from elman.combinators import Stack
from elman.combinators.deep import Deep

from .row import D, Row

__all__ = ["ROWS"]

ROWS = {
    "deep input": Row(lambda: Deep(GRUCell(D, 4), input=2), loops=1),
    "deep transition": Row(lambda: Deep(ElmanCell(D, 4), transition=3), loops=1),
    "deep transition, of the output alone": Row(lambda: Deep(LSTMCell(D, 4, proj_size=2), transition=2), loops=1),
    "deep output": Row(lambda: Deep(LSTMCell(D, 4), output=2, width=6), loops=1),
    "deep everywhere": Row(lambda: Deep(GRUCell(D, 4), input=1, transition=2, output=3, skip=True), loops=1),
    "stack of deep": Row(
        lambda: Stack([Deep(ElmanCell(D, 4), transition=2, skip=True), Deep(LSTMCell(4, 3), transition=1)]), loops=2
    ),
}
