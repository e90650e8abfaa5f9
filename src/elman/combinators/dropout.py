"""Dropout whose masks stay the same over time, on activations and on weights."""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..cells.gated import probability
from ..drawn import DropMask
from ..errors import OptionError
from ..types import Pytree, State
from .masked import step_with
from .nested import Wrapper, start, step

__all__ = ["VariationalDropout", "WeightDrop"]


class VariationalDropout(Wrapper):
    """Dropout around and inside any cell with masks that are drawn once for each sequence.

        y(t), s(t) = cell(m_x ⊙ x(t), m_h ⊙ s(t-1));    the output is m_y ⊙ y(t)

    x (B, D), y (B, O); each m holds 0 with its probability ``input``, ``state`` or ``output``, and else 1 / (1 - p),
    the same at all steps of a sequence, another for every sequence and ``scan``; in evaluation there is none. m_h acts
    on what the step reads of the first floating leaf of the state, which is the output in the cells of elman.

    Raises OptionError for a probability outside [0, 1). Source: Gal and Ghahramani 2016, A theoretically grounded
    application of dropout in recurrent neural networks, equation 7 (masks shared by the gates).
    """

    def __init__(self, cell: nn.Module, input: float = 0.0, state: float = 0.0, output: float = 0.0) -> None:
        super().__init__(cell)
        sizes = {"input": lambda: self.input_size, "state": self._width, "output": lambda: self.output_size}
        self.p = {"input": input, "state": state, "output": output}
        self.masks = nn.ModuleDict()
        for name, p in self.p.items():
            if probability("VariationalDropout", name, p):
                self.masks[name] = DropMask(p, sizes[name]())

    def _width(self) -> int:
        like = next((p for p in self.cell.parameters() if p.is_floating_point()), torch.empty(0))
        state = start(self.cell, 1, device=like.device, dtype=like.dtype)
        return next(leaf.shape[-1] for leaf in pytree.tree_leaves(state) if leaf.is_floating_point())

    def forward(self, x: Tensor, state: State, constants: Pytree = None) -> tuple[Tensor, State]:
        leaves, spec = pytree.tree_flatten(state)
        first = next((i for i, leaf in enumerate(leaves) if leaf.is_floating_point()), None)
        if first is not None:
            leaves[first] = self._drop("state", leaves[first])
        y, state = step(self.cell, self._drop("input", x), pytree.tree_unflatten(leaves, spec), constants)
        return self._drop("output", y), state

    def _drop(self, name: str, value: Tensor) -> Tensor:
        mask = self.masks[name](value) if name in self.masks else None
        return value if mask is None else value * mask

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={p}" for name, p in self.p.items() if p)


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
