"""One row of the contract table: a cell, and what it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FAST", "D", "Row", "numbers"]

D = 3
"""Features of the input of every cell in the table."""
FAST = ("interpret", "llvm")
"""The backends that compile a step."""


def numbers(*shape: int) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64)


def _plain(steps: int, batch: int) -> tuple[Any, Any]:
    return numbers(steps, batch, D), None


@dataclass(frozen=True)
class Row:
    """``make()`` gives the cell, seeded beforehand; ``example(T, B)`` gives xs, (T, B, …), and constants, (B, …).

    ``loops`` is how many loops the compiler must find, where that is part of the promise; ``backends`` are those that
    run it, besides "reference": a row that says less than all says why.
    """

    make: Callable[[], nn.Module]
    example: Callable[[int, int], tuple[Any, Any]] = _plain
    loops: int | None = None
    backends: tuple[str, ...] = FAST
