"""Rows of the contract table: outputs that are fed back, running free and forced by targets."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from elman.cells import ElmanCell, LSTMCell
from elman.cells.dense import DenseCell
from elman.combinators import Stack
from elman.combinators.feedback import Feedback
from elman.networks.jordan import jordan

from .row import D, Row, numbers

__all__ = ["ROWS"]

O = 4


def forced(steps: int, batch: int) -> tuple[Any, Any]:
    return (numbers(steps, batch, D), numbers(steps, batch, O)), None


def symbols(steps: int, batch: int) -> tuple[Any, Any]:
    return (numbers(steps, batch, D), torch.randint(O, (steps, batch))), None


def nothing(steps: int, batch: int) -> tuple[Any, Any]:
    return numbers(steps, batch, 0), None


def embedded() -> Feedback:
    return jordan(D, 5, O, feed="argmax", embed=nn.Embedding(O, 2))


def remembering() -> Feedback:
    return Feedback(LSTMCell(D + O, 5), nn.Linear(5, O), feed="softmax")


ROWS = {
    "dense": Row(lambda: DenseCell(D, 4), loops=0),
    "Jordan, free": Row(lambda: jordan(D, 5, O), loops=1),
    "Jordan, forced": Row(lambda: jordan(D, 5, O), forced, loops=0),
    "Jordan, embedding the likeliest": Row(embedded, loops=1),
    "Jordan, embedding the symbol given": Row(embedded, symbols, loops=0),
    "Jordan, trained by scheduled sampling, in use": Row(lambda: jordan(D, 5, O, sampling=0.5), forced, loops=0),
    "feedback without readout, without x": Row(lambda: Feedback(ElmanCell(O, O)), nothing, loops=1),
    "feedback with memory, free": Row(remembering, loops=1),
    "feedback with memory, forced": Row(remembering, symbols, loops=1),
    "feedback around a stack, free": Row(
        lambda: Feedback(Stack([ElmanCell(D + O, 5), LSTMCell(5, O)]), feed="softmax"), loops=1
    ),
    "feedback around a stack, forced": Row(
        lambda: Feedback(Stack([ElmanCell(D + O, 5), LSTMCell(5, O)]), feed="softmax"), forced, loops=2
    ),
}
