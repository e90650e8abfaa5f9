"""Connections through time that are longer than one step, beside those of length one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CellError
from ..types import Pytree, State
from .nested import Make, Wrapper, input_size, output_size, positive, start, step

__all__ = ["TimeSkip"]


class TimeSkip(Wrapper):
    """Any cell that reads, besides its input, its own output d steps ago: a skip connection through time.

        y(t), s(t) = cell([x(t); y(t-d)], s(t-1)),    y(t) = 0 for t ≤ 0

    x (B, D), y (B, O); ``cell`` reads D + O features, so that the skip has weights of its own beside those of length
    one. The state is (state of the cell, the last d outputs, oldest first).

    Raises OptionError unless d is a positive integer, CellError for a cell that does not read more than it gives.
    Source: Lin, Horne, Tiňo, Giles 1996, Learning long-term dependencies in NARX recurrent neural networks, section 3.
    """

    def __init__(self, cell: nn.Module, d: int) -> None:
        super().__init__(cell)
        self.d = positive("TimeSkip", "d", d)
        reads, gives = input_size(cell), output_size(cell)
        if reads <= gives:
            raise CellError(
                f"TimeSkip: {type(cell).__name__} reads {reads} features and gives {gives}, which it is to read beside "
                f"its input. Build it with input_size = D + {gives} for inputs of D features."
            )
        self._gives = gives

    @classmethod
    def build(cls, input_size: int, make: Make, *args: Any, **options: Any) -> TimeSkip:
        """The cell is made twice: what it gives is known, and then read, once there is one."""
        return cls(make(input_size + output_size(make(input_size))), *args, **options)

    @property
    def input_size(self) -> int:
        return input_size(self.cell) - self._gives

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype, constants: Pytree = None) -> State:
        """The first state of the cell, and d outputs (B, O) of zeros."""
        blank = torch.zeros(batch, self._gives, device=device, dtype=dtype)
        first = start(self.cell, batch, device=device, dtype=dtype, constants=constants)
        return first, tuple(blank.clone() for _ in range(self.d))

    def forward(self, x: Tensor, state: State, constants: Pytree = None) -> tuple[Tensor, State]:
        before, (oldest, *later) = state
        y, new = step(self.cell, torch.cat([x, oldest], -1), before, constants)
        return y, (new, (*later, y))

    def extra_repr(self) -> str:
        return f"d={self.d}"
