"""Rows of the contract table: cells that are elementwise in time."""

from __future__ import annotations

from elman.cells import LRUCell, MinGRUCell, MinLSTMCell, QRNNCell, SRUCell

from .row import D, Row

__all__ = ["ROWS"]

ROWS = {
    "sru": Row(lambda: SRUCell(D, 4), loops=1),
    "sru, width kept": Row(lambda: SRUCell(D, D), loops=1),
    "sru, peepholes": Row(lambda: SRUCell(D, 4, peepholes=True), loops=1),
    "qrnn": Row(lambda: QRNNCell(D, 4), loops=1),
    "mingru": Row(lambda: MinGRUCell(D, 4), loops=1),
    "minlstm": Row(lambda: MinLSTMCell(D, 4), loops=1),
    "lru": Row(lambda: LRUCell(D, 4), loops=1),
}
