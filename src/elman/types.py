"""Shape letters and the protocol that every cell follows.

T  time steps of a sequence            H  units of a hidden state
B  sequences of a batch (rows)         V  symbols of a vocabulary
D  features of an input                S  positions of a source that is attended to
N  packed rows: one for each step of each sequence, T·B when all lengths are equal
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch

__all__ = ["Cell", "Pytree", "State"]

Pytree: TypeAlias = Any
"""A tensor, or tuples, lists and dicts of tensors (``torch.utils._pytree``)."""

State: TypeAlias = Pytree
"""What a cell carries from step to step; every leaf is (B, …)."""


@runtime_checkable
class Cell(Protocol):
    """One step of a recurrence: ``forward(x, state) -> (y, state)``.

    ``x`` and ``y`` are pytrees of (B, …) tensors. A cell that reads constants takes them as a third argument.
    """

    def __call__(self, x: Pytree, state: State) -> tuple[Pytree, State]: ...

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> State: ...
