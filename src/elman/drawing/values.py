"""What is known of a tensor while a network is watched: which values its parts are, and where in it they lie."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .watch import Call

__all__ = ["Atom", "Value", "joined", "rows_kept"]


@dataclass(eq=False)
class Atom:
    """One value that a step computed, or that was given.

    ``inputs`` are what it was computed from, ``weights`` the names of the parameters whose product with them it is.
    ``call`` is the step it belongs to; ``event`` and ``part`` tell which operation made it, the same in every step.
    """

    op: str
    inputs: tuple[Atom, ...] = ()
    weights: tuple[str, ...] = ()
    call: Call | None = None
    event: int = 0
    part: int | None = None
    owner: str = ""
    tags: set[str] = field(default_factory=set)
    label: str = ""
    recorded: str = ""
    serial: int = field(default_factory=count().__next__)


@dataclass(frozen=True)
class Value:
    """A tensor: one atom, or several side by side along ``dim`` with their sizes; none where it holds for all inputs.

    ``params`` are the names of the parameters that a tensor without atoms was made from.
    """

    atoms: tuple[Atom, ...] = ()
    sizes: tuple[int, ...] = ()
    dim: int = 0
    params: frozenset[str] = frozenset()

    @property
    def varies(self) -> bool:
        return bool(self.atoms)

    @property
    def several(self) -> bool:
        return len(self.atoms) > 1

    def cut(self, start: int, stop: int) -> Value:
        """The atoms that lie between two places along ``dim``."""
        atoms, sizes, at = [], [], 0
        for atom, size in zip(self.atoms, self.sizes, strict=True):
            low, high = max(start, at), min(stop, at + size)
            if low < high:
                atoms.append(atom)
                sizes.append(high - low)
            at += size
        return Value(tuple(atoms), tuple(sizes), self.dim)

    def moved(self, dim: int) -> Value:
        return Value(self.atoms, self.sizes, dim, self.params)

    def whole(self, shape: Sequence[int]) -> Value:
        """One atom alone, as a part that fills its tensor along dimension 0."""
        return self if self.several or not self.atoms else Value(self.atoms, (shape[0] if shape else 1,), 0)


def joined(values: Iterable[Value]) -> tuple[Atom, ...]:
    """All atoms of some values, each once."""
    return tuple(dict.fromkeys(atom for value in values for atom in value.atoms))


def rows_kept(old: Sequence[int], new: Sequence[int], dim: int, count: int) -> int | None:
    """Where a view of shape ``new`` has the dimension ``dim`` of ``old`` that holds ``count`` parts; None: nowhere."""
    before = 1
    for size in old[:dim]:
        before *= size
    product = 1
    for at, size in enumerate(new):
        if product == before and size >= count and size % count == 0:
            return at
        product *= size
    return None
