"""The summary network: a whole sequence is read before the one output is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor, nn

from ..combinators.nested import said
from ..errors import CellError
from ..types import Pytree, State
from ..unfold import scan
from .unfolding import Unfolding

__all__ = ["Summary"]


class Summary(nn.Module):
    """One output after the last step.

        (y(t), s(t)) = cell(x(t), s(t-1)),    o = readout(y(τ))

    xs leaves (T, B, …), ``lengths`` (B) the τ of each sequence, or T; o (B, O). Any cell; ``readout`` is a module or
    None: then o is y(τ) (B, H), a code of what was read. A sequence of no steps has y(τ) = 0.

    Raises CellError where the cell gives more than one tensor, or another width than the readout reads.
    Source: Goodfellow, Bengio, Courville 2016, figure 10.5.
    """

    def __init__(self, cell: nn.Module, readout: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        reads, given = getattr(readout, "in_features", None), said(cell, "output_size")
        if None not in (reads, given) and reads != given:
            raise CellError(
                f"Summary: {type(cell).__name__} gives {given} features, but the readout reads {reads}. Build it with "
                f"in_features={given}."
            )
        self.cell, self.readout = cell, readout

    def forward(
        self,
        xs: Pytree,
        state: State = None,
        *,
        constants: Pytree = None,
        lengths: Tensor | list[int] | None = None,
        **options: Unpack[Unfolding],
    ) -> tuple[Tensor, State]:
        """o (B, O) and the state after each sequence's last step. Raises what ``scan`` raises."""
        ys, state = scan(self.cell, xs, state, constants=constants, lengths=lengths, **options)
        if not isinstance(ys, Tensor):
            raise CellError(
                f"Summary takes the last output of {type(self.cell).__name__}, one tensor (B, …); got a "
                f"{type(ys).__name__}."
            )
        if lengths is None:
            y = ys[-1]
        else:  # outputs past the end are zero, and so is the first of a sequence of no steps
            last = torch.as_tensor(lengths, device=ys.device).clamp(min=1) - 1
            y = ys[last, torch.arange(ys.shape[1], device=ys.device)]
        return y if self.readout is None else self.readout(y), state
