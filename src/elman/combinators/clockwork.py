"""Clockwork: groups of units that run at different rates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..types import Pytree, State
from .blend import blend
from .masked import Masked
from .nested import Wrapper, like, output_size, positive, start, step

__all__ = ["Clockwork"]


class Clockwork(Wrapper):
    """Groups of units, each with a clock of its own: outside its period a group keeps its state.

        y(t), u(t) = cell(x(t), h(t-1))
        h_g(t) = u_g(t) where t mod T_g = 0,  h_g(t-1) elsewhere;    t = 0, 1, 2, …

    ``periods`` are T_1 … T_G; every floating leaf (B, H) of the cell's state falls into G groups of H / G units, in
    that order. x and y are those of the cell; where its output is a leaf of its state, y is that leaf of h. The state
    is (state of the cell, t), t the integer (B,) that counts steps. ``triangular`` removes the recurrent connections
    from faster groups to slower ones, so that slow units steer fast ones and never the reverse; it is for cells whose
    recurrent weights are ``weight_hh`` (gates · H, H), as ElmanCell's. All groups are computed at every step: the
    restriction shapes what is learned, and saves no time.

    Raises OptionError for periods that are no positive integers or do not divide the units, and for ``triangular``
    with a cell that has no such weights.
    Source: Koutník, Greff, Gomez, Schmidhuber 2014, A clockwork RNN, section 3, equations 1 and 2.
    """

    def __init__(self, cell: nn.Module, periods: Sequence[int], *, triangular: bool = False) -> None:
        given = list(periods) if isinstance(periods, Sequence) and not isinstance(periods, str) else []
        if not given:
            raise OptionError(f"Clockwork: periods must be a list of positive integers, got {periods!r}.")
        clocks = tuple(positive("Clockwork", "every period", period) for period in given)
        super().__init__(_triangular(cell, clocks) if triangular else cell)
        self.periods = clocks
        units = output_size(cell)
        if units % len(given):
            raise _uneven(f"an output of {units} units", len(given))
        self.register_buffer("period", torch.tensor(given, device=like(cell).device), persistent=False)

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype, constants: Pytree = None) -> State:
        """The first state of the cell, and zero (B,)."""
        first = start(self.cell, batch, device=device, dtype=dtype, constants=constants)
        return first, torch.zeros(batch, device=device, dtype=torch.int64)

    def forward(self, x: Pytree, state: State, constants: Pytree = None) -> tuple[Tensor, State]:
        before, t = state
        y, after = step(self.cell, x, before, constants)
        now = (t.unsqueeze(-1) % self.period == 0).unsqueeze(-1)  # (B, G, 1)

        def mix(_: int, old: Tensor, new: Tensor) -> Tensor:
            groups = (len(self.periods), -1)
            if new.shape[-1] % len(self.periods):
                raise _uneven(f"a leaf of the state with {new.shape[-1]} units", len(self.periods))
            return torch.where(now, new.unflatten(-1, groups), old.unflatten(-1, groups)).flatten(-2)

        y, after = blend(mix, before, after, y)
        return y, (after, t + 1)

    def extra_repr(self) -> str:
        return f"periods={self.periods}"


def _uneven(what: str, groups: int) -> OptionError:
    return OptionError(f"Clockwork: {what} does not fall into {groups} groups of equal size.")


def _triangular(cell: nn.Module, periods: tuple[int, ...]) -> Masked:
    """The cell without recurrent connections from a faster group to a slower one."""
    weight = getattr(cell, "weight_hh", None)
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
    if len(shape) != 2 or shape[0] % shape[1] or shape[1] % len(periods):
        raise OptionError(
            f"Clockwork: triangular needs recurrent weights weight_hh (gates · H, H), H a multiple of the number of "
            f"groups, {len(periods)}; {type(cell).__name__} has {shape or 'none'}."
        )
    period = torch.tensor(periods).repeat_interleave(shape[1] // len(periods))
    reads = period[None, :] >= period[:, None]  # from the group of the column to that of the row
    return Masked(cell, reads.repeat(shape[0] // shape[1], 1))
