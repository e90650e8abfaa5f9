"""Dropout on activations with masks that stay the same over time."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..cells.gated import probability
from ..drawn import DropMask
from ..errors import OptionError
from ..protocol import MISTAKES
from ..types import Pytree, State
from .nested import Wrapper, first_state, input_size, like, step

__all__ = ["VariationalDropout"]


class VariationalDropout(Wrapper):
    """Dropout around and inside any cell with masks that are drawn once for each sequence.

        y(t), s(t) = cell(m_x ⊙ x(t), m_h ⊙ s(t-1));    the output is m_y ⊙ y(t)

    x (B, D), y (B, O); each m holds 0 with its probability ``input``, ``state`` or ``output``, and else 1 / (1 - p),
    the same at all steps of a sequence, another for every sequence and ``scan``; in evaluation there is none. m_h acts
    on the first floating leaf of the state, h in the cells of elman, where it reaches the next one through products
    with weights alone (Elman, LSTM). Where it is also handed on unit by unit (GRU, Leaky, Zoneout), a factor of
    1 / (1 - p) at every step would have it grow without bound: take ``WeightDrop``, or a cell's ``recurrent_dropout``.

    Raises OptionError for a probability outside [0, 1), and for ``state`` with a cell that hands its state on. Source:
    Gal and Ghahramani 2016, A theoretically grounded application of dropout in recurrent neural networks, equation 7
    (masks shared by the gates).
    """

    def __init__(self, cell: nn.Module, input: float = 0.0, state: float = 0.0, output: float = 0.0) -> None:
        super().__init__(cell)
        sizes = {"input": lambda: self.input_size, "state": self._width, "output": lambda: self.output_size}
        self.p = {"input": input, "state": state, "output": output}
        self.masks = nn.ModuleDict()
        for name, p in self.p.items():
            if probability("VariationalDropout", name, p):
                self.masks[name] = DropMask(p, sizes[name]())
        if state and _hands_on(cell):
            raise OptionError(
                f"VariationalDropout: {type(cell).__name__} hands its state on from step to step, not through products "
                "with weights alone: under a mask on it it would grow without bound. Use WeightDrop or the cell's "
                "recurrent_dropout instead of state=, or put VariationalDropout around the cell inside."
            )

    def _width(self) -> int:
        return next(leaf.shape[-1] for leaf in pytree.tree_leaves(first_state(self.cell)) if leaf.is_floating_point())

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


def _hands_on(cell: nn.Module) -> bool:
    """Whether the first floating leaf of the state reaches the next one although all matrices are zero."""
    still = copy.deepcopy(cell)
    with torch.no_grad():
        for parameter in still.parameters():
            if parameter.dim() > 1:
                parameter.zero_()
    try:
        leaves, spec = pytree.tree_flatten(first_state(still))
        first = next(i for i, leaf in enumerate(leaves) if leaf.is_floating_point())
        leaves[first] = old = torch.full_like(leaves[first], 0.5).requires_grad_()
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            _, after = step(still, like(still).new_zeros(1, input_size(still)), pytree.tree_unflatten(leaves, spec))
            new = pytree.tree_leaves(after)[first]
            by = torch.autograd.grad(new.sum(), old, allow_unused=True)[0] if new.requires_grad else None
    except MISTAKES:  # it reads constants, or does not say what it reads
        return False
    return by is not None and bool(by.any())
