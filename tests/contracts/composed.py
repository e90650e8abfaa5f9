"""Rows of the contract table: stacks and shortcuts."""

from __future__ import annotations

from elman.cells import ElmanCell, GRUCell, LSTMCell
from elman.combinators import Highway, Residual, Stack

from .row import D, Row

__all__ = ["ROWS"]

ROWS = {
    "stack of one": Row(lambda: Stack([ElmanCell(D, 4)]), loops=1),
    "stack of three": Row(lambda: Stack([LSTMCell(D, 4), GRUCell(4, 5), ElmanCell(5, 2)]), loops=3),
    "stack of stacks": Row(lambda: Stack([Stack([GRUCell(D, 4), GRUCell(4, 4)]), ElmanCell(4, 2)]), loops=3),
    "residual": Row(lambda: Residual(GRUCell(D, D)), loops=1),
    "residual, projected": Row(lambda: Residual(LSTMCell(D, 5)), loops=1),
    "highway": Row(lambda: Highway(ElmanCell(D, D)), loops=1),
    "highway, projected": Row(lambda: Highway(GRUCell(D, 2)), loops=1),
    "stack of residual layers": Row(lambda: Stack([Residual(LSTMCell(D, 4)), Residual(LSTMCell(4, 4))]), loops=2),
}
