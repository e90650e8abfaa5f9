"""``scan``: unfold any step through time. The public verb; everything it does is in ``compiler``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from .compiler import reference
from .errors import CellError, InputError, OptionError, StateError
from .packing import Rows, rows_of
from .recording import recorder
from .types import Pytree, State

__all__ = ["scan"]

BACKENDS = ("auto", "reference", "interpret")


def scan(
    cell: nn.Module,
    xs: Pytree,
    state: State = None,
    *,
    constants: Pytree = None,
    lengths: Tensor | list[int] | None = None,
    reverse: bool = False,
    remat: int | str | None = None,
    record: bool = False,
    backend: str = "auto",
) -> Any:
    """Unfold ``cell`` over the sequences ``xs``.

    TODO docstring
    """
    leaves, spec = pytree.tree_flatten(xs)
    steps, batch = _extent(leaves)
    rows = rows_of(steps, batch, lengths)
    packed = [rows.pack(leaf if leaf.shape[1] == batch else leaf.expand(steps, batch, *leaf.shape[2:])) for leaf in leaves]
    state = pytree.tree_map_only(Tensor, rows.sort, state)
    constants = pytree.tree_map_only(Tensor, rows.sort, constants)
    ys, final = unfold(
        cell,
        rows,
        pytree.tree_unflatten(packed, spec),
        state,
        constants=constants,
        reverse=reverse,
        remat=remat,
        record=record,
        backend=backend,
    )
    return pytree.tree_map(rows.unpack, ys), pytree.tree_map(rows.unsort, final)


def unfold(
    cell: nn.Module,
    rows: Rows,
    xs: Pytree,
    state: State = None,
    *,
    constants: Pytree = None,
    reverse: bool = False,
    remat: int | str | None = None,
    record: bool = False,
    backend: str = "auto",
    parameters: Mapping[str, Tensor] | None = None,
) -> Any:
    """scan over rows that are already packed: xs leaves (N, …), state and constants (B, …) longest first.

    ``parameters`` stand in for the cell's own, by name, as in ``torch.func.functional_call``.
    Returns packed ys (N, …) and the final state (B, …), longest first.
    """
    x_leaves, x_spec = pytree.tree_flatten(xs)
    if state is None:
        state = cell.initial_state(rows.batch, device=x_leaves[0].device, dtype=_state_dtype(cell, x_leaves))
    s_leaves, s_spec = pytree.tree_flatten(state)
    c_leaves, c_spec = pytree.tree_flatten(() if constants is None else constants)
    y_spec = None

    def step(x, s, c):
        nonlocal y_spec
        args = (pytree.tree_unflatten(x, x_spec), pytree.tree_unflatten(s, s_spec))
        if constants is not None:
            args += (pytree.tree_unflatten(c, c_spec),)
        if parameters is None:
            y, new = cell(*args)
        else:
            y, new = torch.func.functional_call(cell, dict(parameters), args)
        y_leaves, y_spec = pytree.tree_flatten(y)
        return y_leaves, [leaf.to(old.dtype) for leaf, old in zip(pytree.tree_leaves(new), s, strict=True)]

    ys, final, _ = reference.unfold(step, rows, x_leaves, s_leaves, c_leaves, reverse)
    return pytree.tree_unflatten(ys, y_spec), pytree.tree_unflatten(final, s_spec)


def _extent(leaves: list[Tensor]) -> tuple[int, int]:
    return leaves[0].shape[0], max(leaf.shape[1] for leaf in leaves)


def _state_dtype(cell: nn.Module, xs: list[Tensor]) -> torch.dtype:
    for leaf in (*cell.parameters(), *xs):
        if leaf.is_floating_point():
            return leaf.dtype
    return torch.get_default_dtype()
