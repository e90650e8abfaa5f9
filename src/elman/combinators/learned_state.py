"""A cell whose first state is learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..types import Pytree, State
from .nested import Wrapper, first_state, start, step

__all__ = ["LearnedState"]


class LearnedState(Wrapper):
    """Any cell, started from a state that is learned: h(0) = ``initial`` (one vector for each floating leaf).

    x, y and state are those of the cell, whose own first state is where learning begins.
    Source: Forcada and Carrasco 1995, Learning the initial state of a second-order recurrent neural network.
    """

    def __init__(self, cell: nn.Module) -> None:
        super().__init__(cell)
        leaves = pytree.tree_leaves(first_state(cell))
        learned = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        self.initial = nn.ParameterList(nn.Parameter(leaf.detach().clone()) for leaf in learned)

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype, constants: Pytree = None) -> State:
        """The learned state, the same for every sequence."""
        learned = iter(self.initial)

        def first(leaf: Tensor) -> Tensor:
            return next(learned).to(leaf).expand_as(leaf) if leaf.is_floating_point() else leaf

        state = start(self.cell, batch, device=device, dtype=dtype, constants=constants)
        return pytree.tree_map_only(Tensor, first, state)

    def forward(self, x: Pytree, state: State, constants: Pytree = None) -> tuple[Tensor, State]:
        return step(self.cell, x, state, constants)
