"""A cell that also reads what does not change over time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import OptionError
from ..types import Pytree, State
from .nested import Make, Wrapper, beside, first_state, like, misfit, named, positive, start, step

__all__ = ["Conditioned"]

_PLACES = ("step", "start", "both")


class Conditioned(Wrapper):
    """Any cell, conditioned on a vector c.

        a(t) = U x(t) + R c + W h(t-1) + b          where = "step": c is a further input of every step
        h(0) = initial + G c                        where = "start"; "both": the two at once

    x (B, D), c (B, C) in ``constants``, or in ``constants[key]``; y and state are those of the cell. The cell reads
    [x, c], of D + C features, so R stands in the last C columns of whatever weights read its input, and R c is
    computed once for all steps. With x a pair (x(t), c(t)) the context is a sequence of its own. G, in
    ``initial`` without bias, has a map for every floating leaf of the state.

    Raises OptionError for another ``where`` and an impossible size, InputError for a context of another width.
    Sources: Goodfellow, Bengio, Courville 2016, section 10.2.4, figures 10.9 and 10.10.
    """

    def __init__(self, cell: nn.Module, context_size: int, *, where: str = "step", key: str | None = None) -> None:
        super().__init__(cell)
        if where not in _PLACES:
            raise OptionError.unknown("place of a condition", where, _PLACES)
        self.context_size, self.where, self.key = positive("Conditioned", "context_size", context_size), where, key
        known = like(cell)
        leaves = pytree.tree_leaves(first_state(cell)) if where != "step" else []
        sizes = [leaf.numel() if isinstance(leaf, Tensor) and leaf.is_floating_point() else 0 for leaf in leaves]
        options: dict[str, Any] = {"bias": False, "device": known.device, "dtype": known.dtype}
        self.initial = nn.ModuleList(
            nn.Linear(context_size, size, **options) if size else nn.Identity() for size in sizes
        )

    @classmethod
    def build(
        cls, input_size: int, make: Make, context_size: int, *, where: str = "step", key: str | None = None
    ) -> Conditioned:
        return cls(make(input_size + (context_size if where != "start" else 0)), context_size, where=where, key=key)

    @property
    def input_size(self) -> int:
        return super().input_size - (self.context_size if self.where != "start" else 0)

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype, constants: Pytree = None) -> State:
        """The state of the cell; with ``where`` "start" or "both", moved by the context."""
        state = start(self.cell, batch, device=device, dtype=dtype, constants=constants)
        if self.where == "step":
            return state
        c = self._context(constants)
        leaves, spec = pytree.tree_flatten(state)
        moved = [
            s if isinstance(g, nn.Identity) else s + g(c).view_as(s) for s, g in zip(leaves, self.initial, strict=True)
        ]
        return pytree.tree_unflatten(moved, spec)

    def forward(self, x: Pytree, state: State, constants: Pytree = None) -> tuple[Tensor, State]:
        if self.where != "start":
            x, c = x if isinstance(x, tuple) else (x, self._context(constants))
            beside("Conditioned", self.cell, x, self.context_size, "the context")
            x = torch.cat([x, c], -1)
        return step(self.cell, x, state, constants)

    def _context(self, constants: Pytree) -> Tensor:
        given = named("Conditioned", constants, self.key)
        if not isinstance(given, Tensor) or given.shape[-1] != self.context_size:
            raise misfit("Conditioned", f"a context (B, {self.context_size})", given, self.key)
        return given
