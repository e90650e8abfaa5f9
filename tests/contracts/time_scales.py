"""Rows of the contract table: several time scales."""

from __future__ import annotations

import torch
from torch import nn

from elman.cells import ElmanCell, GRUCell, LSTMCell
from elman.combinators import Stack
from elman.combinators.clockwork import Clockwork
from elman.combinators.deep import Deep
from elman.combinators.delay import Delay
from elman.combinators.leaky import Leaky
from elman.combinators.masked import Masked
from elman.combinators.time_skip import TimeSkip

from .row import D, Row

__all__ = ["ROWS"]

ROWS = {
    "delay of one": Row(lambda: Delay(ElmanCell(D, 4), 1), loops=1),
    "delay": Row(lambda: Delay(LSTMCell(D, 4), 3), loops=1),
    "dilated stack": Row(lambda: Stack([Delay(GRUCell(D, 4), 1), Delay(GRUCell(4, 4), 2)]), loops=2),
    "skip through time": Row(lambda: TimeSkip(ElmanCell(D + 4, 4), 3), loops=1),
    "skip through time, projected": Row(lambda: TimeSkip(LSTMCell(D + 2, 4, proj_size=2), 2), loops=1),
    "leaky": Row(lambda: Leaky(ElmanCell(D, 4), 0.7), loops=1),
    "leaky, learned": Row(lambda: Leaky(LSTMCell(D, 4, proj_size=3), "learned"), loops=1),
    "leaky, sampled": Row(lambda: Leaky(GRUCell(D, 4), "sampled"), loops=1),
    "leaky delay": Row(lambda: Leaky(Delay(ElmanCell(D, 4), 2), 0.5), loops=1),
    "leaky and deep": Row(lambda: Leaky(Deep(ElmanCell(D, 4), transition=2), 0.5), loops=1),
    "clockwork": Row(lambda: Clockwork(LSTMCell(D, 4), [1, 3])),
    "clockwork, triangular": Row(lambda: Clockwork(ElmanCell(D, 6), [1, 2, 4], triangular=True)),
    "clockwork of clockworks": Row(lambda: Clockwork(Clockwork(GRUCell(D, 4), [1, 2]), [3, 1])),
    "masked": Row(lambda: Masked(GRUCell(D, 4), 0.4, weights="weight_hh weight_ih")),
    "masked, torch's cell": Row(lambda: Masked(nn.LSTMCell(D, 4), torch.eye(4).repeat(4, 1))),
}
