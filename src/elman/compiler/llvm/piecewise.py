"""What an affine loop needs to be scanned over time by all threads, as items.

A loop of one map, affine in its states s index by index, takes them over any piece of time from s to z + A s: z is what
the piece makes of zero, A the product of its factors; one number for every index, or four of two states that mix. A
thread can find both before it is known what s is.

    light   a step of z and A: what is stored otherwise is left out, with whatever only that needs
    begin   z = 0, A = 1
    hand    z = s
    take    s = z
    join    s = z + A s
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from .items import Access, Buffer, Lowered, Map, Op, reads_of
from .memory import KINDS

__all__ = ["Passes", "passes"]

_MOST_STATES = 2  # A has the square of it


_Along: TypeAlias = list[Any]
"""Along every state an operand, None for zero."""


@dataclass
class Passes:
    """The items; and the memory of z and of A, that of every state along every other, row by row."""

    light: Map
    begin: Map
    hand: Map
    take: Map
    join: Map
    states: list[Buffer]
    zero: list[Buffer]
    along: list[Buffer]


def passes(lowered: Lowered) -> Passes | None:
    """How a loop is scanned over time; None where it is not affine index by index."""
    if len(lowered.items) != 1 or not isinstance(item := lowered.items[0], Map) or not item.shape or item.reductions:
        return None
    states = [buffer for buffer in lowered.buffers if buffer.role == "state"]
    written = {access.buffer for _, access in item.stores}
    touching = [access for access in (*reads_of(item), *(a for _, a in item.stores)) if access.buffer in states]
    if not states or not states[0].dtype.is_floating_point or len(states) > _MOST_STATES:
        return None
    if len({(s.dtype, s.row) for s in states}) > 1 or any(s.slot for s in states):
        return None
    if (
        not written >= set(states)
        or len({(access.offset, access.strides) for access in touching}) != 1
        or touching[0].offset
    ):
        return None
    try:
        return _Passes(item, states, touching[0].strides).made()
    except _NotAffine:
        return None


class _NotAffine(Exception):
    """A value is no affine function of the states."""


class _Passes:
    """The items in the making."""

    def __init__(self, item: Map, states: list[Buffer], strides: tuple[int, ...]) -> None:
        self.item, self.states, self.strides = item, states, strides
        self.dtype, row = states[0].dtype, states[0].row
        self.zero = [Buffer(f"{s.name}_from_zero", "batch", self.dtype, row) for s in states]
        self.along = [Buffer(f"{s.name}_along_{r.name}", "batch", self.dtype, row) for s in states for r in states]

    def made(self) -> Passes:
        count, ones = len(self.states), [(i, i) for i in range(len(self.states))]
        identity = [float(divmod(i, count) in ones) for i in range(count * count)]
        begin = self._copies([*(0.0 for _ in self.zero), *identity], [*self.zero, *self.along])
        hand = self._copies(list(map(self._whole, self.states)), self.zero)
        take = self._copies(list(map(self._whole, self.zero)), self.states)
        return Passes(self._light(), begin, hand, take, self._join(), self.states, self.zero, self.along)

    def _whole(self, buffer: Buffer) -> Access:
        return Access(buffer, 0, self.strides)

    def _op(self, name: str, *operands: Any) -> Op:
        return Op(name, operands, (), self.dtype)

    def _copies(self, given: Sequence[float | Access], to: Sequence[Buffer]) -> Map:
        ops = [self._op("clone", value) for value in given]
        return Map(self.item.shape, ops, [(i, self._whole(buffer)) for i, buffer in enumerate(to)])

    def _join(self) -> Map:
        made = Map(self.item.shape)
        count = len(self.states)
        for i, zero in enumerate(self.zero):
            given: Access | tuple[str, int] = self._whole(zero)
            for j, state in enumerate(self.states):
                factor = self._whole(self.along[i * count + j])
                made.ops.append(self._op("addcmul", given, factor, self._whole(state)))
                given = ("r", len(made.ops) - 1)
            made.stores.append((len(made.ops) - 1, self._whole(self.states[i])))
        return made

    def _light(self) -> Map:
        """The step from z in place of s, and behind it the derivatives of what it gives along the first s."""
        zero_of = {self._whole(state): self._whole(zero) for state, zero in zip(self.states, self.zero, strict=True)}

        def moved(operand: Any) -> Any:
            return zero_of.get(operand, operand) if isinstance(operand, Access) else operand

        ops = [replace(op, operands=tuple(map(moved, op.operands))) for op in self.item.ops]
        made = Map(self.item.shape, ops)
        found: dict[int, _Along] = {}
        next_of = {access.buffer: register for register, access in self.item.stores}
        for i in _before([next_of[state] for state in self.states], ops):
            op = ops[i]
            read = [self._along(operand, found) for operand in op.operands]
            if any(read):
                if KINDS[op.dtype] is not KINDS[self.dtype]:
                    raise _NotAffine
                found[i] = [self._derivative(op, [along and along[j] for along in read], ops) for j in self._each()]
        for i, state in enumerate(self.states):
            register = next_of[state]
            if KINDS[ops[register].dtype] is not KINDS[self.dtype]:
                raise _NotAffine
            made.stores.append((register, self._whole(self.zero[i])))
            for j in self._each():
                along = found[register][j] if register in found else None
                ops.append(self._op("clone", 0.0 if along is None else along))
                made.stores.append((len(ops) - 1, self._whole(self.along[i * len(self.states) + j])))
        return made

    def _each(self) -> range:
        return range(len(self.states))

    def _along(self, operand: Any, found: dict[int, _Along]) -> _Along | None:
        """The derivatives of what an operation is given; None where it depends on no state."""
        if isinstance(operand, tuple):
            return found.get(operand[1])
        if isinstance(operand, Access) and operand.buffer in self.zero:
            first = self.zero.index(operand.buffer) * len(self.states)
            return [self._whole(buffer) for buffer in self.along[first : first + len(self.states)]]
        return None

    def _derivative(self, op: Op, along: list[Any], ops: list[Op]) -> Any:
        """That of an operation from those of its operands, in new operations; None for zero."""
        given = op.operands

        def new(name: str, *operands: Any) -> tuple[str, int]:
            ops.append(self._op(name, *operands))
            return "r", len(ops) - 1

        def product(left: int, right: int, onto: Any = None) -> Any:
            if along[left] is not None and along[right] is not None:
                raise _NotAffine
            if along[left] is None and along[right] is None:
                return onto
            factors = (along[left], given[right]) if along[right] is None else (along[right], given[left])
            return new("mul", *factors) if onto is None else new("addcmul", onto, *factors)

        if all(one is None for one in along):
            return None
        if op.keywords:
            raise _NotAffine
        match op.name, along:
            case ("add", [one, None]) | ("add", [None, one]) | ("clone", [one]) | ("sub", [one, None]):
                return one
            case ("add" | "sub", [one, other]):
                return new("neg", other) if one is None else new(op.name, one, other)
            case "neg", [one]:
                return new("neg", one)
            case "mul", [_, _]:
                return product(0, 1)
            case "div", [one, None]:
                return new("div", one, given[1])
            case "addcmul", [onto, _, _]:
                return product(1, 2, onto)
        raise _NotAffine


def _before(registers: Sequence[int], ops: Sequence[Op]) -> list[int]:
    """The operations that some registers come from, themselves included, in their order."""
    found, left = set(), list(registers)
    while left:
        if (register := left.pop()) not in found:
            found.add(register)
            left += [operand[1] for operand in ops[register].operands if isinstance(operand, tuple)]
    return sorted(found)
