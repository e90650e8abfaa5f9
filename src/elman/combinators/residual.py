"""Shortcuts past a cell: its output is added to its input, or mixed with it by a gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..recording import record, scope
from ..types import Pytree, State
from .nested import Wrapper, like, step

__all__ = ["Highway", "Residual"]


class Residual(Wrapper):
    """A shortcut past any cell.

        y(t) = P x(t) + cell(x(t), s(t-1))

    x (B, D), y (B, O), the state that of the cell. P is the identity where the cell gives as many features as it
    reads, and otherwise a learned ``projection`` (O, D) without bias.

    Sources: He et al. 2016, Deep residual learning for image recognition, equations 1 and 2; Wu et al. 2016,
    Google's neural machine translation system, section 3.1 (between recurrent layers).
    """

    def __init__(self, cell: nn.Module) -> None:
        super().__init__(cell)
        fits = self.input_size == self.output_size
        alike: dict[str, Any] = {"device": like(cell).device, "dtype": like(cell).dtype}
        self.projection = None if fits else nn.Linear(self.input_size, self.output_size, bias=False, **alike)

    def forward(self, x: Tensor, state: State, constants: Pytree = None) -> tuple[Tensor, State]:
        y, state = step(self.cell, x, state, constants)
        return y + (x if self.projection is None else self.projection(x)), state


class Highway(Residual):
    """A shortcut past any cell that a gate opens.

        g(t) = σ(W x(t) + b),    y(t) = g(t) ⊙ cell(x(t), s(t-1)) + (1 - g(t)) ⊙ P x(t)

    x (B, D), y (B, O), the state that of the cell; W (O, D) and b (O) are ``gate``; b begins at ``carry_bias``, so
    that at first most of x is carried through. P as in ``Residual``. Records "transform", which is g; what the
    cell records as "name" is "cell.name".

    Source: Srivastava, Greff, Schmidhuber 2015, Highway networks, equation 3.
    """

    def __init__(self, cell: nn.Module, *, carry_bias: float = -1.0) -> None:
        super().__init__(cell)
        self.gate = nn.Linear(self.input_size, self.output_size, device=like(cell).device, dtype=like(cell).dtype)
        nn.init.constant_(self.gate.bias, carry_bias)

    def forward(self, x: Tensor, state: State, constants: Pytree = None) -> tuple[Tensor, State]:
        with scope("cell"):
            y, state = step(self.cell, x, state, constants)
        g = record("transform", torch.sigmoid(self.gate(x)))
        carried = x if self.projection is None else self.projection(x)
        return carried + g * (y - carried), state
