"""Zoneout: units of the state that keep what they held, drawn anew at every step."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..cells.gated import probability
from ..errors import OptionError
from ..types import Pytree, State
from .blend import blend
from .nested import Wrapper, step

__all__ = ["Zoneout"]


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
