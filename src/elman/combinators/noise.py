"""Noise in the state: units that keep what they held, and Gaussian disturbances, anew at every step."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..cells.gated import probability
from ..errors import OptionError
from ..types import Pytree, State
from .leaky import blend
from .nested import Wrapper, step

__all__ = ["Noise", "Zoneout"]


class Zoneout(Wrapper):
    """Any cell, some units of whose state keep their old value.

        y(t), u(t) = cell(x(t), s(t-1));    s(t) = d(t) ⊙ s(t-1) + (1 - d(t)) ⊙ u(t),    d(t) ~ Bernoulli(p)

    In evaluation d(t) is its mean p. Every floating leaf of the state (B, …) has draws of its own; ``p`` is one
    probability for all leaves or a list with one for each. Where the cell's output is a leaf of its state, y is that
    leaf of s. Raises OptionError for a probability outside [0, 1).
    Source: Krueger et al. 2017, Zoneout: regularizing RNNs by randomly preserving hidden activations, section 3.
    """

    def __init__(self, cell: nn.Module, p: float | list[float] = 0.1) -> None:
        super().__init__(cell)
        given = p if isinstance(p, list | tuple) and p else [p]
        self.p = [probability("Zoneout", "p", value) for value in given]  # type: ignore[arg-type]

    def forward(self, x: Pytree, state: State, constants: Pytree = None) -> tuple[Tensor, State]:
        y, new = step(self.cell, x, state, constants)
        count = sum(leaf.is_floating_point() for leaf in pytree.tree_leaves(new))
        if len(self.p) not in (1, count):
            raise OptionError(f"Zoneout: p has {len(self.p)} probabilities, and the state {count} leaves.")

        def mix(leaf: int, old: Tensor, u: Tensor) -> Tensor:
            p = self.p[leaf % len(self.p)]
            if not self.training:
                return u + p * (old - u)
            return torch.where(torch.rand_like(u) < p, old, u) if p else u

        return blend(mix, state, new, y)

    def extra_repr(self) -> str:
        return f"p={self.p}"


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
