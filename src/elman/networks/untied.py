"""The untied network: weights of its own for every step, as the contrast to sharing them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import CellError, InputError
from ..types import Pytree, State
from ..unfold import scan
from .unfolding import Unfolding

__all__ = ["Untied"]


class Untied(nn.Module):
    """One cell for each step, instead of one cell for all.

        y(t), s(t) = cell_t(x(t), s(t-1)),    t = 1 … T

    ``cells`` are T of them, of any kind, whose states are alike. xs leaves (T, B, …), y (T, B, O). There are T times
    as many parameters, each seen by one step of every example, so that more examples are needed for the same error;
    and for a step that was never trained there are none: a sequence of another length is refused.

    Raises CellError for no cells, or one that is given twice; InputError for xs of another length.
    Source: Goodfellow, Bengio, Courville 2016, section 10.1, equation 10.6 (g(t), against the f of 10.7).
    """

    def __init__(self, cells: Iterable[nn.Module]) -> None:
        super().__init__()
        given = list(cells) if isinstance(cells, Iterable) else [cells]
        if not isinstance(cells, Iterable) or not all(isinstance(cell, nn.Module) for cell in given):
            kinds = ", ".join(type(cell).__name__ for cell in given)
            raise CellError(f"Untied takes a list of cells, one for every step; got {kinds}.")
        self.cells = nn.ModuleList(given)
        if not self.cells:
            raise CellError("Untied needs a cell for every step; got none.")
        if len(set(self.cells)) < len(self.cells):
            raise CellError("Untied: a cell is given twice. Each step has its own; to share one, use elman.scan.")

    def forward(
        self, xs: Pytree, state: State = None, *, constants: Pytree = None, **options: Unpack[Unfolding]
    ) -> tuple[Pytree, State]:
        """y (T, B, …) and the state after step T. Raises InputError where xs have not exactly T steps."""
        leaves, spec = pytree.tree_flatten(xs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]  # scan refuses the others
        if any(len(leaf) != len(self.cells) for leaf in tensors):
            raise InputError(
                f"Untied has weights for {len(self.cells)} steps, its own for each, so it cannot read a sequence of "
                f"{len(tensors[0])}. Give it sequences of that length, or share one cell over all steps: elman.scan."
            )
        ys = []
        for t, cell in enumerate(self.cells):
            here = [leaf[t : t + 1] if isinstance(leaf, Tensor) and leaf.dim() else leaf for leaf in leaves]
            y, state = scan(cell, pytree.tree_unflatten(here, spec), state, constants=constants, **options)
            ys.append(y)
        return pytree.tree_map(lambda *parts: torch.cat(parts), *ys), state
