"""Dropped connections: weights of a cell without some of their entries, the same at all steps."""

from __future__ import annotations

from operator import attrgetter

from torch import Tensor, nn

from ..cells.gated import probability
from ..drawn import DropMask
from ..errors import OptionError
from ..types import Pytree, State
from .masked import step_with
from .nested import Wrapper, step

__all__ = ["WeightDrop"]


class WeightDrop(Wrapper):
    """Any cell with dropped connections: M ⊙ W / (1 - p) in the place of its recurrent weights W.

    M ~ Bernoulli(1 - p), drawn once for each ``scan`` and shared by its sequences; in evaluation W itself.
    ``weights`` names the parameters of the cell, separated by spaces. Input, output and state are those of the cell.

    Raises OptionError for a probability outside [0, 1) and a name that is no parameter. Sources: Wan et al. 2013,
    Regularization of neural networks using DropConnect; Merity, Keskar, Socher 2018, Regularizing and optimizing
    LSTM language models, section 2.
    """

    def __init__(self, cell: nn.Module, p: float = 0.5, *, weights: str = "weight_hh") -> None:
        super().__init__(cell)
        known = dict(cell.named_parameters())
        self.p, self.names = probability("WeightDrop", "p", p), tuple(weights.split())
        for name in self.names:
            if name not in known:
                raise OptionError.unknown(f"parameter of {type(cell).__name__}", name, sorted(known))
        self.masks = nn.ModuleList(DropMask(self.p, *known[name].shape, rows=False) for name in self.names)

    def forward(self, x: Pytree, state: State, constants: Pytree = None) -> tuple[Tensor, State]:
        if not (self.training and self.p):
            return step(self.cell, x, state, constants)
        dropped = {}
        for name, mask in zip(self.names, self.masks, strict=True):
            weight = attrgetter(name)(self.cell)
            dropped[name] = weight * mask(weight)
        return step_with(dropped, self.cell, x, state, constants)

    def extra_repr(self) -> str:
        return f"p={self.p}, weights={' '.join(self.names)!r}"
