"""Numeric modes of products: what their numbers are, how they lie in memory, how they are multiplied. The one table.

A mode is asked for by a type of LLVM (F32, F64, BF16), or by BF16X3. It says how many neighbouring k make one
*element* of what is packed, what such an element is, and how a micro-kernel gets from elements to sums:

| asked for | operands | sums, init, out | k in an element | multiplied by |
|---|---|---|---|---|
| F32, F64 | as they are | the same | 1 | fused multiply-add |
| BF16, with ``isa.dot`` | rounded to bfloat16 | float32 | 2, a word of two halves | the instruction for pairs |
| BF16, with its ``unit`` | rounded to bfloat16 | float32 | 2, and 16 elements together | the matrix unit (``tiles``) |
| BF16X3, with its ``unit`` | float32 in two halves | float32 | the same, three times | the matrix unit |
| BF16, without | rounded to bfloat16 | float32 | 2 | widened to float32: fused multiply-add of either half |

Without the instruction a weight is packed to bfloat16 all the same, half the bytes to read, and widened by a shift once
for all the rows of a tile; the rows of ``left`` are rounded, but kept as float32.

In BF16 denormal numbers count as zero: the instructions take them so whatever the mode of the processor is, and the
arithmetic that stands in for them where numbers are rounded does the same. Rounding is to nearest, ties to even; NaN
stays NaN, and what is larger than every bfloat16 becomes infinite.

BF16X3 is nearly float32 for a third of the speed of bfloat16, which a matrix unit makes worth while: x is its rounded
half x₁ and the rest x₂, rounded too, and x y is taken for x₁y₁ + x₁y₂ + x₂y₁, off by 2⁻¹⁵ of it at most. Here that is a
product of bfloat16 with three times as many k: a row of ``left`` is (x₁, x₁, x₂), a column of the weight (y₁, y₂, y₁).
What is infinite is multiplied once: where it comes again, as second x₁ or y₁, and as a rest, there is 0.
Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations",
ARITH 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from llvmlite import ir

from .code import BF16, BF16X3, F32, F64, I16, I32, I64, at, constant, intrinsic, load, splat, suffix, vector
from .isa import DOTS, Dot, Isa, Unit

__all__ = ["HALVES", "Cell", "Half", "Numeric", "in_halves", "numeric", "rounded"]

Half = Literal["", "finite", "rest"]

_SUMS = 12
"""Sums that a micro-kernel keeps apart: two multiplications start a cycle, and each takes four to six."""

_OTHERS, _OTHERS_WIDENED = 4, 10
"""Registers that hold no sums; where weights are widened there are two halves of everything."""


@dataclass(frozen=True)
class Cell:
    """An element of what is packed, and the numbers in memory that it is made from.

    ``kind`` is the type of the element, ``source`` that of a number, as it is read: F32, F64, or I16 for bfloat16.
    ``group`` neighbouring k are one element, of ``part`` bits each, the first one lowest. ``half``: "" for the rounded
    numbers, "finite" for those of them alone, "rest" for what rounding leaves.
    """

    name: str
    kind: ir.Type
    source: ir.Type
    group: int
    part: int
    dot: Dot | None = None
    half: Half = ""

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return self.group * self.part // 8

    @property
    def item(self) -> int:
        """Bytes of a number in memory."""
        return {F32: 4, F64: 8, I16: 2}[self.source]

    def parts(self, b: ir.IRBuilder, numbers: ir.Value) -> ir.Value:
        """Of every number, what of an element it becomes."""
        if self.group == 1:
            return numbers
        numbers = HALVES[self.half](b, numbers) if self.half else numbers
        halves = rounded(b, numbers, self.dot) if self.source is F32 else numbers
        if self.part == 16:
            return halves
        whole = _like(halves.type, I32)
        return b.shl(b.zext(halves, whole), constant(whole, 16))

    def joined(self, b: ir.IRBuilder, parts: Sequence[ir.Value]) -> ir.Value:
        """Elements from the parts of their first numbers, of their second ones, …; what is missing at the end is 0."""
        if self.group == 1:
            return parts[0]
        whole = _like(parts[0].type, self.kind)
        low, *more = (b.zext(part, whole) for part in parts)
        for high in more:
            low = b.or_(low, b.shl(high, constant(whole, self.part)))
        return low

    def along(self, b: ir.IRBuilder, place: ir.Value, count: int) -> ir.Value:
        """That many elements whose numbers are neighbours in memory."""
        numbers = load(b, place, vector(self.source, self.group * count))
        if self.group == 1:
            return numbers
        return b.bitcast(self.parts(b, numbers), vector(self.kind, count))


@dataclass(frozen=True)
class Numeric:
    """A mode: ``sums`` are the type of sums, init and out, ``tile`` the most rows and vectors that a tile has.

    ``weight`` and ``left`` are what elements are made of if they come from ``source``. ``rests``: of every number the
    rest is multiplied too.
    """

    kind: ir.Type
    sums: ir.Type
    weight: Cell
    left: Cell
    tile: tuple[int, int]
    dot: Dot | None = None
    rests: bool = False

    @property
    def weights(self) -> list[Cell]:
        """What a column of a packed weight is made of, one after the other for all k."""
        return [replace(self.weight, half=half) for half in ("", "rest", "finite")] if self.rests else [self.weight]

    @property
    def lefts(self) -> list[Cell]:
        """What a row of ``left`` is made of."""
        return [replace(self.left, half=half) for half in ("", "finite", "rest")] if self.rests else [self.left]

    @property
    def group(self) -> int:
        """How many k one element has."""
        return self.weight.group

    @property
    def unit(self) -> Unit | None:
        """The matrix unit that multiplies, if one does."""
        return self.dot.unit if self.dot else None

    @property
    def whole(self) -> int:
        """How many k are multiplied at once: what is packed is filled up to a multiple of it with zeros."""
        return self.unit.bytes // self.weight.size * self.group if self.unit else self.group

    def elements(self, k: int) -> int:
        """How many elements so many k are, filled up."""
        return -(-k // self.whole) * (self.whole // self.group) * len(self.weights)

    def elements_of(self, b: ir.IRBuilder, k: ir.Value) -> ir.Value:
        """The same, for a number that is known only when it runs."""
        each = self.whole // self.group * len(self.weights)
        count = b.udiv(b.add(k, I64(self.whole - 1)), I64(self.whole)) if self.whole > 1 else k
        return b.mul(count, I64(each)) if each > 1 else count

    def lanes(self, isa: Isa) -> int:
        """Sums, and elements of a weight, in one vector."""
        return isa.lanes(8 * self.weight.size)

    def apart(self, rows: int, vectors: int, isa: Isa) -> int:
        """Over how many elements a tile keeps its sums apart, a power of two: one alone would wait for itself.

        Of numbers that are multiplied one by one a small tile keeps more of them; of others every tile as many as the
        highest one of its width, so that a sum does not depend on how many rows there are beside it.
        """
        sums, apart = (rows if self.group == 1 else self.tile[0]) * vectors, 1
        most = isa.registers - (_OTHERS if self.group == 1 or self.dot else _OTHERS_WIDENED)
        while sums * apart < _SUMS * self.group and 2 * sums * apart <= most:
            apart *= 2
        return apart

    def factors(self, b: ir.IRBuilder, place: ir.Value, lanes: int) -> list[ir.Value]:
        """An element of ``left``, the same in every lane, as numbers that can be multiplied."""
        if self.dot:
            word = splat(b, load(b, place, I32, 2), lanes)
            return [b.bitcast(word, vector(BF16, 2 * lanes))]
        apart = self.left.part // 8
        return [splat(b, load(b, at(b, place, i * apart), self.sums), lanes) for i in range(self.group)]

    def numbers(self, b: ir.IRBuilder, place: ir.Value, lanes: int, align: int) -> list[ir.Value]:
        """A vector of elements of a weight, as numbers that can be multiplied."""
        if self.dot:
            return [load(b, place, vector(BF16, 2 * lanes), align)]
        if self.group == 1:
            return [load(b, place, vector(self.kind, lanes), align)]
        whole = vector(I32, lanes)
        words = load(b, place, whole, align)
        halves = b.shl(words, constant(whole, 16)), b.and_(words, constant(whole, -1 << 16))
        return [b.bitcast(half, vector(F32, lanes)) for half in halves]

    def multiply_add(self, b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """x y + z, rounded once where the processor can; elsewhere a product and a sum, not a call for each number."""
        if self.dot:
            return intrinsic(b, self.dot.multiply, z.type, [z, x, y])
        return intrinsic(b, f"llvm.fmuladd.{suffix(x.type)}", x.type, [x, y, z])


@lru_cache(maxsize=64)
def numeric(isa: Isa, kind: ir.Type, source: ir.Type | None = None) -> Numeric:
    """The mode of a kind on a processor; ``source`` is the type of its operands in memory, F32 or BF16 for BF16."""
    if kind not in (BF16, BF16X3):
        bits = 32 if kind is F32 else 64
        cell = Cell(suffix(kind), kind, kind, 1, bits)
        return Numeric(kind, kind, cell, cell, isa.tile)
    dot = DOTS.get(isa.dot)
    rests = kind == BF16X3
    assert in_halves(isa) or not rests
    read, wide = (F32, ".f32") if source is F32 or rests else (I16, "")
    pair = Cell(f"bf16{wide}", I32, read, 2, 16, dot)
    left = pair if dot else Cell(f"bf16.wide{wide}", I64, read, 2, 32)
    return Numeric(kind, F32, pair, left, isa.pair_tile, dot, rests)


def in_halves(isa: Isa) -> bool:
    """Whether products of "high" precision are BF16X3 on a processor: where that is faster than float32."""
    dot = DOTS.get(isa.dot)
    return dot is not None and dot.unit is not None


def rounded(b: ir.IRBuilder, numbers: ir.Value, dot: Dot | None, flushed: bool = True) -> ir.Value:
    """float32 rounded to bfloat16, as its 16 bits: to nearest, ties to even, denormal numbers to zero if ``flushed``.

    What is not flushed is rounded as PyTorch does it, without an instruction of the processor.
    """
    lanes = numbers.type.count if isinstance(numbers.type, ir.VectorType) else 1
    name = dict(dot.narrow).get(lanes) if dot and flushed else None
    if name:
        return b.bitcast(intrinsic(b, name, vector(BF16, lanes), [numbers]), vector(I16, lanes))
    whole = vector(I32, lanes)
    bits = b.bitcast(numbers, whole)
    odd = b.and_(b.lshr(bits, constant(whole, 16)), constant(whole, 1))
    near = b.add(bits, b.add(odd, constant(whole, 0x7FFF)))  # carries into the exponent, up to infinity
    magnitude = b.and_(bits, constant(whole, 0x7FFFFFFF))
    sign = b.and_(bits, constant(whole, -1 << 31))
    if flushed:
        near = b.select(b.icmp_unsigned("<", magnitude, constant(whole, 1 << 23)), sign, near)
    quiet = b.or_(bits, constant(whole, 1 << 22))
    near = b.select(b.icmp_unsigned(">", magnitude, constant(whole, 0x7F800000)), quiet, near)
    return b.trunc(b.lshr(near, constant(whole, 16)), vector(I16, lanes))


def _near(b: ir.IRBuilder, numbers: ir.Value) -> ir.Value:
    """float32 rounded to bfloat16, as float32."""
    whole = _like(numbers.type, I32)
    halves = b.zext(rounded(b, numbers, None), whole)
    return b.bitcast(b.shl(halves, constant(whole, 16)), numbers.type)


def _if_finite(b: ir.IRBuilder, numbers: ir.Value) -> ir.Value:
    """The numbers, 0 for those that are not finite."""
    size = intrinsic(b, f"llvm.fabs.{suffix(numbers.type)}", numbers.type, [numbers])
    finite = b.fcmp_ordered("<", size, constant(numbers.type, float("inf")))
    return b.select(finite, numbers, constant(numbers.type, 0))


HALVES: dict[str, Callable[[ir.IRBuilder, ir.Value], ir.Value]] = {
    "finite": lambda b, numbers: _if_finite(b, _near(b, numbers)),
    "rest": lambda b, numbers: _if_finite(b, b.fsub(numbers, _near(b, numbers))),
}
"""float32 → its half that bfloat16 has, and what is left of it; 0 where that is not finite."""


def _like(kind: ir.Type, element: ir.Type) -> ir.Type:
    """A type of as many lanes."""
    return vector(element, kind.count) if isinstance(kind, ir.VectorType) else element
