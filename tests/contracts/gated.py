"""Rows of the contract table: cells with gates that read the output before."""

from __future__ import annotations

from elman.cells import ElmanCell, GRUCell, IRNNCell, LSTMCell, MinimalGatedCell, SLSTMCell

from .row import D, Row

__all__ = ["ROWS"]

ROWS = {
    "elman": Row(lambda: ElmanCell(D, 4), loops=1),
    "irnn": Row(lambda: IRNNCell(D, 4), loops=1),
    "gru": Row(lambda: GRUCell(D, 4), loops=1),
    "gru, reset before": Row(lambda: GRUCell(D, 4, reset_after=False), loops=1),
    "gru, recurrent dropout": Row(lambda: GRUCell(D, 4, recurrent_dropout=0.5), loops=1),
    "minimal gated unit": Row(lambda: MinimalGatedCell(D, 4), loops=1),
    "lstm": Row(lambda: LSTMCell(D, 4), loops=1),
    "lstm, peepholes and projection": Row(lambda: LSTMCell(D, 4, peepholes=True, proj_size=2), loops=1),
    "lstm, no forget gate": Row(lambda: LSTMCell(D, 4, forget_gate=False), loops=1),
    "lstm, coupled": Row(lambda: LSTMCell(D, 4, coupled=True, peepholes=True), loops=1),
    "lstm, layer norm": Row(lambda: LSTMCell(D, 4, layer_norm=True), loops=1),
    "lstm, recurrent dropout": Row(lambda: LSTMCell(D, 4, recurrent_dropout=0.5), loops=1),
    "slstm": Row(lambda: SLSTMCell(D, 4), loops=1),
    "slstm, two heads": Row(lambda: SLSTMCell(D, 4, heads=2, exponential_forget=True), loops=1),
}
