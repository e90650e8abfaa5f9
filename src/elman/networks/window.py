"""A fixed window around each step: a bounded look ahead, as the contrast to reading backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..combinators.nested import said
from ..errors import CellError, InputError, OptionError
from ..types import Pytree, State
from ..unfold import scan

__all__ = ["Window", "windows"]


def windows(xs: Tensor, left: int, right: int, lengths: Tensor | list[int] | None = None) -> Tensor:
    """(T, B, D) to (T, B, (left + 1 + right)·D): x(t-left), …, x(t+right) side by side, zeros outside the sequence."""
    if not isinstance(xs, Tensor) or xs.dim() != 3:
        given = tuple(xs.shape) if isinstance(xs, Tensor) else type(xs).__name__
        raise InputError(f"a window is taken of one tensor (T, B, D); got {given}.")
    steps = len(xs)
    if lengths is not None:
        past = torch.arange(steps, device=xs.device)[:, None] >= torch.as_tensor(lengths, device=xs.device)
        xs = xs.masked_fill(past[..., None], 0)
    padded = F.pad(xs, (0, 0, 0, 0, left, right))
    return torch.cat([padded[k : k + steps] for k in range(left + 1 + right)], -1)


class Window(nn.Module):
    """A cell, or a module without state, that reads some steps before and after this one beside it.

        w(t) = [x(t-left), …, x(t+right)];    y(t), s(t) = cell(w(t), s(t-1)),  or y(t) = module(w(t))

    xs (T, B, D), y (T, B, O); the cell reads (left + 1 + right)·D features; outside a sequence, past its own length
    too, x is zero. What is further ahead than ``right`` can have no influence: compare ``Bidirectional``.

    Raises OptionError for an impossible window, CellError for a cell built for another width, InputError for other xs.
    Source: Goodfellow, Bengio, Courville 2016, section 10.3 (a fixed-size window around t).
    """

    def __init__(self, cell: nn.Module, left: int, right: int) -> None:
        super().__init__()
        for name, value in (("left", left), ("right", right)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise OptionError(f"Window: {name} must be a number of steps, 0 or more; got {value!r}.")
        size, width = said(cell, "input_size"), left + 1 + right
        if isinstance(size, int) and size % width:
            raise CellError(
                f"Window: {type(cell).__name__} reads {size} features, which are not {width} (left + 1 + right) equal "
                f"parts. Build it with input_size = {width} · features of xs."
            )
        self.cell, self.left, self.right = cell, left, right

    def forward(
        self,
        xs: Tensor,
        state: State = None,
        *,
        constants: Pytree = None,
        lengths: Tensor | list[int] | None = None,
    ) -> tuple[Any, State]:
        """y (T, B, …), zero past the end of each sequence, and the last state; None for a module without state."""
        w = windows(xs, self.left, self.right, lengths)
        if hasattr(self.cell, "initial_state") or isinstance(self.cell, nn.RNNCellBase):
            return scan(self.cell, w, state, constants=constants, lengths=lengths)
        y = self.cell(w)
        if lengths is not None:
            past = torch.arange(len(y), device=y.device)[:, None] >= torch.as_tensor(lengths, device=y.device)
            y = y.masked_fill(past.view(*past.shape, *[1] * (y.dim() - 2)), 0)
        return y, None
