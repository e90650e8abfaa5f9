"""Layers on top of one another, as one cell."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CellError
from ..recording import scope
from ..types import Pytree, State
from .nested import Make, fraction, input_size, output_size, positive, said, start, step

__all__ = ["Stack"]


class Stack(nn.Module):
    """A hierarchy of states: each cell reads what the one below gives.

        y_0(t) = x(t);    y_l(t), s_l(t) = cell_l(dropout y_{l-1}(t), s_l(t-1));    y(t) = y_L(t)

    ``cells``, bottom first, are any cells; x is what the lowest reads, y what the highest gives, the state a tuple
    with the state of each. ``dropout`` acts between layers, not on x nor y, while training. What the l-th cell
    records as "name" is "l.name". The compiler takes the stack apart again: one loop for each layer, the products
    between them once for all steps.

    Raises CellError for no cells and for neighbours that do not fit, OptionError for an impossible dropout.
    Sources: Schmidhuber 1992, Learning complex, extended sequences using the principle of history compression;
    Goodfellow, Bengio, Courville 2016, figure 10.13a; Zaremba et al. 2014 (dropout between layers).
    """

    def __init__(self, cells: Iterable[nn.Module], *, dropout: float = 0.0) -> None:
        super().__init__()
        self.cells = nn.ModuleList(cells)
        if not self.cells:
            raise CellError("Stack needs at least one cell; got none.")
        self.dropout = fraction("Stack", "dropout", dropout)
        for layer, (below, cell) in enumerate(zip(self.cells, self.cells[1:], strict=False), 1):
            given, read = said(below, "output_size"), said(cell, "input_size")
            if given is not None and read is not None and given != read:
                raise CellError(
                    f"Stack: cell {layer} ({type(cell).__name__}) reads {read} features, and cell {layer - 1} "
                    f"({type(below).__name__}) gives {given}. Build it with input_size={given}."
                )

    @classmethod
    def build(cls, input_size: int, *makes: Make, layers: int = 1, dropout: float = 0.0) -> Stack:
        """``makes`` bottom first, all of them ``layers`` times over, each as wide as the one below gives."""
        cells: list[nn.Module] = []
        for make in makes * positive("Stack", "layers", layers):
            cells.append(make(input_size))
            input_size = output_size(cells[-1])
        return cls(cells, dropout=dropout)

    @property
    def input_size(self) -> int:
        return input_size(self.cells[0])

    @property
    def output_size(self) -> int:
        return output_size(self.cells[-1])

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype, constants: Pytree = None) -> State:
        """A tuple with the first state of each cell."""
        return tuple(start(cell, batch, device=device, dtype=dtype, constants=constants) for cell in self.cells)

    def forward(self, x: Pytree, state: State, constants: Pytree = None) -> tuple[Tensor, State]:
        after = []
        for layer, (cell, before) in enumerate(zip(self.cells, state, strict=True)):
            if layer and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            with scope(str(layer)):
                x, new = step(cell, x, before, constants)
            after.append(new)
        return x, tuple(after)

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}" if self.dropout else ""
