"""Connections through time that are longer than one step, in the place of those of length one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..types import Pytree, State
from .nested import Wrapper, positive, step

__all__ = ["Delay"]


class Delay(Wrapper):
    """Any cell that continues from its state d steps ago: connections of length one become connections of length d.

        y(t), s(t) = cell(x(t), s(t-d))

    x and y those of the cell; the state a tuple of d states of the cell, s(t-d) first: no more than the delay needs.
    These are d interleaved recurrences that share their weights, so that an influence crosses k steps in k / d
    applications of the cell. A ``Stack`` of delays 1, 2, 4, … is the dilated network. d = 1 is the cell itself.

    Raises OptionError unless d is a positive integer.
    Sources: Goodfellow, Bengio, Courville 2016, section 10.9.3 (removed connections); Chang et al. 2017, Dilated
    recurrent neural networks, equations 2 and 5.
    """

    def __init__(self, cell: nn.Module, d: int) -> None:
        super().__init__(cell)
        self.d = positive("Delay", "d", d)

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype, constants: Pytree = None) -> State:
        """A tuple of d first states of the cell."""
        first = super().initial_state
        return tuple(first(batch, device=device, dtype=dtype, constants=constants) for _ in range(self.d))

    def forward(self, x: Pytree, state: State, constants: Pytree = None) -> tuple[Tensor, State]:
        oldest, *later = state
        y, new = step(self.cell, x, oldest, constants)
        return y, (*later, new)

    def extra_repr(self) -> str:
        return f"d={self.d}"
