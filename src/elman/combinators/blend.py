"""A mixture of two states of any form."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils import _pytree as pytree

from ..types import Pytree, State

__all__ = ["blend"]


def blend(mix: Callable[[int, Tensor, Tensor], Tensor], before: State, after: State, y: Pytree) -> tuple[Pytree, State]:
    """A state between two: the l-th floating leaf becomes mix(l, before, after), any other is the one after.

    Where an output *is* a leaf of the state after, it is that leaf's mixture. Returns (y, state).
    """
    old, structure = pytree.tree_flatten(before)
    new = pytree.tree_leaves(after)
    floating = [i for i, leaf in enumerate(new) if leaf.is_floating_point()]
    mixed = dict(enumerate(new)) | {i: mix(at, old[i], new[i]) for at, i in enumerate(floating)}
    became = {id(leaf): mixed[i] for i, leaf in enumerate(new)}
    y = pytree.tree_map_only(Tensor, lambda leaf: became.get(id(leaf), leaf), y)
    return y, pytree.tree_unflatten(list(mixed.values()), structure)
