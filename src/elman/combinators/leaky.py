"""Leaky states: a running average of what any cell computes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import OptionError
from ..types import Pytree, State
from .blend import blend
from .nested import Wrapper, first_state, step

__all__ = ["Leaky"]


class Leaky(Wrapper):
    """Leaky units: the state of any cell, averaged over time.

        y(t), u(t) = cell(x(t), μ(t-1))
        μ(t) = α ⊙ μ(t-1) + (1 - α) ⊙ u(t)

    x and y those of the cell, μ in the place of its state, every floating leaf (B, H); where the cell's output is a
    leaf of its state, y is that leaf of μ. ``alpha`` is a number in [0, 1), the same for all units; "sampled", a
    constant of each unit; or "learned", a parameter of each unit behind a sigmoid. The last two begin with time scales
    1 / (1 - α) drawn log-uniformly from 1 to ``longest`` steps. With 0 it is the cell itself; near 1 a unit remembers
    for about 1 / (1 - α) steps, but cannot forget on demand as a gate can.

    Raises OptionError for another alpha, and for a ``longest`` of no more than one step.
    Sources: Mozer 1992, Induction of multiscale temporal structure, equation 2; Jaeger et al. 2007, Optimization and
    applications of echo state networks with leaky-integrator neurons; Goodfellow, Bengio, Courville 2016, section
    10.9.2 (fixed, sampled once, or learned).
    """

    def __init__(self, cell: nn.Module, alpha: float | str = 0.9, *, longest: float = 100.0) -> None:
        super().__init__(cell)
        number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not (0 <= alpha < 1 if number else alpha in ("learned", "sampled")):  # type: ignore[operator]
            raise OptionError(f"Leaky: alpha must be a number in [0, 1), 'learned' or 'sampled'; got {alpha!r}.")
        if not isinstance(longest, int | float) or not 1 < longest < math.inf:
            raise OptionError(f"Leaky: longest must be a number of steps above 1, got {longest!r}.")
        self.alpha, self.longest = alpha, float(longest)
        self.rates = nn.Module()
        if number:
            return
        for at, leaf in enumerate(s for s in pytree.tree_leaves(first_state(cell)) if s.is_floating_point()):
            scale = torch.exp(torch.rand_like(leaf[0]) * math.log(longest)).clamp(min=1 + 1e-3)
            if alpha == "learned":
                logit = nn.Parameter(torch.log(scale - 1))  # its sigmoid is 1 - 1 / scale
                self.rates.register_parameter(str(at), logit)
            else:
                self.rates.register_buffer(str(at), 1 - 1 / scale)

    def rate(self, leaf: int) -> Tensor | float:
        """α of the l-th floating leaf of the state: a number, or one for each unit."""
        if isinstance(self.alpha, int | float):
            return self.alpha
        rate = getattr(self.rates, str(leaf))
        return torch.sigmoid(rate) if self.alpha == "learned" else rate

    def forward(self, x: Pytree, state: State, constants: Pytree = None) -> tuple[Tensor, State]:
        y, new = step(self.cell, x, state, constants)

        def mix(leaf: int, old: Tensor, u: Tensor) -> Tensor:
            return u + self.rate(leaf) * (old - u)

        return blend(mix, state, new, y)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha!r}"
