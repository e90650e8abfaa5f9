"""Reading in both directions: each output depends on the whole sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor, nn

from ..combinators.nested import output_size, said
from ..directions import scan_both
from ..errors import CellError, OptionError, StateError
from ..types import Pytree, State
from ..unfold import scan
from .unfolding import Unfolding

__all__ = ["MERGES", "Bidirectional"]

Merge = Callable[[Tensor, Tensor], Tensor]


def _concat(h: Tensor, g: Tensor) -> Tensor:
    return torch.cat([h, g], -1)


def _mean(h: Tensor, g: Tensor) -> Tensor:
    return (h + g) / 2


MERGES: dict[str, Merge] = {"concat": _concat, "mean": _mean, "product": torch.mul, "sum": torch.add}
"""How the outputs of both directions (T, B, H), (T, B, H') become one."""


class Bidirectional(nn.Module):
    """Two cells with weights of their own: one reads forward in time, one backward.

        h(t), s(t) = forward_cell(x(t), s(t-1)),    g(t), r(t) = backward_cell(x(t), r(t+1))
        y(t) = merge(h(t), g(t))

    xs leaves (T, B, …), y (T, B, H + H') for "concat", (T, B, H) for "sum", "mean" and "product"; ``merge`` may be any
    function of both. Any cells. With ``lengths`` (B) the backward cell starts at each sequence's own last step, so
    that nothing of the padding is read. The state is the pair (s(τ), r(1)). No cell itself: y(t) waits for the end.

    Raises CellError for cells that do not fit one another, OptionError for an unknown merge, StateError for a state
    that is no pair.
    Sources: Schuster and Paliwal 1997; Goodfellow, Bengio, Courville 2016, section 10.3.
    """

    def __init__(self, forward_cell: nn.Module, backward_cell: nn.Module, merge: str | Merge = "concat") -> None:
        super().__init__()
        if isinstance(merge, str) and merge not in MERGES:
            raise OptionError.unknown("merge", merge, sorted(MERGES))
        if not callable(merge) and not isinstance(merge, str):
            raise OptionError(
                f"Bidirectional: merge must be one of {', '.join(sorted(MERGES))}, or a function of both outputs; got "
                f"{merge!r}."
            )
        if forward_cell is backward_cell:
            raise CellError(
                f"Bidirectional: both directions are one and the same {type(forward_cell).__name__}. Build a second "
                "one: each direction has weights of its own."
            )
        sizes = [said(cell, "input_size") for cell in (forward_cell, backward_cell)]
        if None not in sizes and sizes[0] != sizes[1]:
            raise CellError(f"Bidirectional: both cells read the same xs, but they are built for {sizes} features.")
        self.forward_cell, self.backward_cell, self.merge = forward_cell, backward_cell, merge
        self._check([said(cell, "output_size") for cell in (forward_cell, backward_cell)])

    @property
    def output_size(self) -> int:
        """Features of y. Raises CellError where ``merge`` is a function of the user's own."""
        if self.merge not in MERGES:
            raise CellError("Bidirectional cannot see how many features your own merge gives.")
        own = output_size(self.forward_cell)
        return own + output_size(self.backward_cell) if self.merge == "concat" else own

    def forward(
        self,
        xs: Pytree,
        state: tuple[State, State] | None = None,
        *,
        constants: Pytree = None,
        lengths: Tensor | list[int] | None = None,
        **options: Unpack[Unfolding],
    ) -> tuple[Tensor, tuple[State, State]]:
        """y (T, B, …), zero past the end of each sequence, and both last states. Raises what ``scan`` raises."""
        if state is not None and not (isinstance(state, tuple | list) and len(state) == 2):
            raise StateError(
                "Bidirectional starts from a pair of states, (of the forward cell, of the backward cell), each of them "
                f"what that cell carries, or None; got a {type(state).__name__}."
            )
        cells, begun = (self.forward_cell, self.backward_cell), (None, None) if state is None else tuple(state)
        if not isinstance(self.merge, str):  # it may leave one of them out
            h, s = scan(cells[0], xs, begun[0], constants=constants, lengths=lengths, **options)
            g, r = scan(cells[1], xs, begun[1], constants=constants, lengths=lengths, reverse=True, **options)
            return self.merge(h, g), (s, r)
        (h, s), (g, r) = scan_both(*cells, xs, begun, constants=constants, lengths=lengths, **options)
        self._check([y.shape[-1] for y in (h, g)])
        return MERGES[self.merge](h, g), (s, r)

    def _check(self, widths: list[int | None]) -> None:
        """A width of 1 would be broadcast, so outputs are compared before they are merged."""
        differ = None not in widths and widths[0] != widths[1]
        if differ and isinstance(self.merge, str) and self.merge != "concat":
            raise CellError(f"Bidirectional: merge={self.merge!r} needs outputs of one width; the cells give {widths}.")
