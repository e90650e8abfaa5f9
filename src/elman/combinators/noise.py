"""Gaussian noise on the input and the state, drawn anew at every step."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import OptionError
from ..types import Pytree, State
from .nested import Wrapper, step

__all__ = ["Noise"]


class Noise(Wrapper):
    """Any cell with Gaussian noise on what it reads, while training.

        y(t), s(t) = cell(x(t) + σ_x ε(t), s(t-1) + σ_s ε'(t)),    ε, ε' ~ N(0, 1) elementwise

    σ_x is ``input``, σ_s ``state``, for every floating leaf. Raises OptionError for a negative deviation.
    Source: Jim, Giles, Horne 1996, An analysis of noise in recurrent neural networks, section III (additive, per step).
    """

    def __init__(self, cell: nn.Module, state: float = 0.0, input: float = 0.0) -> None:
        super().__init__(cell)
        for name, deviation in (("state", state), ("input", input)):
            if not isinstance(deviation, int | float) or isinstance(deviation, bool) or deviation < 0:
                raise OptionError(f"Noise: {name} must be a standard deviation, 0 or more; got {deviation!r}.")
        self.state, self.input = float(state), float(input)

    def forward(self, x: Pytree, state: State, constants: Pytree = None) -> tuple[Tensor, State]:
        return step(self.cell, self._disturb(x, self.input), self._disturb(state, self.state), constants)

    def _disturb(self, tree: Pytree, deviation: float) -> Pytree:
        if not (self.training and deviation):
            return tree
        return pytree.tree_map_only(
            Tensor, lambda v: v + deviation * torch.randn_like(v) if v.is_floating_point() else v, tree
        )

    def extra_repr(self) -> str:
        return f"state={self.state}, input={self.input}"
