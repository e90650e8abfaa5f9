"""Rows of the contract table: cells that read constants, and learned first states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from elman.cells import ElmanCell, GRUCell, LSTMCell
from elman.combinators import Attend, Conditioned, LearnedState, Residual, Stack

from .row import D, Row, numbers

__all__ = ["ROWS"]

C, S, M = 2, 5, 4


def vector(steps: int, batch: int) -> tuple[Any, Any]:
    return numbers(steps, batch, D), numbers(batch, C)


def sequence(steps: int, batch: int) -> tuple[Any, Any]:
    return (numbers(steps, batch, D), numbers(steps, batch, C)), None


def memory(steps: int, batch: int) -> tuple[Any, Any]:
    return numbers(steps, batch, D), numbers(batch, S, M)


def masked(steps: int, batch: int) -> tuple[Any, Any]:
    xs, m = memory(steps, batch)
    return xs, (m, torch.arange(S) <= torch.arange(batch)[:, None])


def named(steps: int, batch: int) -> tuple[Any, Any]:
    return numbers(steps, batch, D), {"to": numbers(batch, C), "over": numbers(batch, S, M)}


def attend(kind: Callable[..., Any], **options: Any) -> Callable[[], Attend]:
    return lambda: Attend(kind(D + M, 4), M, **options)


ROWS = {
    "conditioned at every step": Row(lambda: Conditioned(LSTMCell(D + C, 4), C), vector, loops=1),
    "conditioned at the start": Row(lambda: Conditioned(LSTMCell(D, 4), C, where="start"), vector, loops=1),
    "conditioned on both": Row(lambda: Conditioned(GRUCell(D + C, 4), C, where="both"), vector, loops=1),
    "conditioned on a sequence": Row(lambda: Conditioned(ElmanCell(D + C, 4), C), sequence, loops=1),
    "learned state": Row(lambda: LearnedState(LSTMCell(D, 4)), loops=1),
    "attend, additive": Row(attend(GRUCell), memory, loops=1),
    "attend, additive, masked": Row(attend(LSTMCell, attention_size=3), masked, loops=1),
    "attend, multiplicative": Row(attend(ElmanCell, score="multiplicative"), memory, loops=1),
    "attend, multiplicative, masked": Row(attend(GRUCell, score="multiplicative"), masked, loops=1),
    "attend in a conditioned stack": Row(
        lambda: Stack(
            [
                Conditioned(ElmanCell(D + C, 3), C, where="both", key="to"),
                Residual(Attend(GRUCell(3 + M, 3), M, key="over")),
            ]
        ),
        named,
        loops=2,
    ),
}
