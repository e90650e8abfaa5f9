"""Rows of the contract table: regularisers, as they are in evaluation (``tests/combinators`` has them in training)."""

from __future__ import annotations

from elman.cells import ElmanCell, GRUCell, LSTMCell
from elman.combinators import Noise, VariationalDropout, WeightDrop, Zoneout

from .row import D, Row

__all__ = ["ROWS"]

ROWS = {
    "zoneout": Row(lambda: Zoneout(LSTMCell(D, 4), [0.1, 0.5]), loops=1),
    "noise": Row(lambda: Noise(GRUCell(D, 4), 0.1, 0.1), loops=1),
    "variational dropout": Row(lambda: VariationalDropout(ElmanCell(D, 4), 0.1, 0.2, 0.3), loops=1),
    "weight drop": Row(lambda: WeightDrop(LSTMCell(D, 4), 0.5), loops=1),
}
