"""Arithmetic on LLVM values that reads as arithmetic: what the formulas of the operations are written in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llvmlite import ir

from . import code
from .code import BOOL, F32, F64

__all__ = ["Lanes", "Operand", "is_float", "polynomial"]


def is_float(kind: ir.Type) -> bool:
    """Whether the elements are floating-point numbers."""
    return code.scalar_of(kind) in (F32, F64)


@dataclass(frozen=True)
class Lanes:
    """A vector of numbers (or one number) in a program under construction; plain numbers join in on either side.

    Comparisons give bool lanes and are false where a side is NaN, ``differs`` alone is true there. On bool lanes
    ``&``, ``|``, ``^`` and ``~`` are logical, on integers bitwise; integers are signed and wrap around.
    """

    b: ir.IRBuilder
    value: ir.Value

    @property
    def kind(self) -> ir.Type:
        """The type of one element."""
        return code.scalar_of(self.value.type)

    @property
    def count(self) -> int:
        """How many numbers these are."""
        return self.value.type.count if isinstance(self.value.type, ir.VectorType) else 1

    def like(self, number: Operand) -> Lanes:
        """The number in every lane, of this type; lanes stay what they are."""
        return number if isinstance(number, Lanes) else Lanes(self.b, code.constant(self.value.type, number))

    def _binary(self, left: Operand, right: Operand, real: str, whole: str) -> Lanes:
        name = real if is_float(self.kind) else whole
        return Lanes(self.b, getattr(self.b, name)(self.like(left).value, self.like(right).value))

    def __add__(self, other: Operand) -> Lanes:
        return self._binary(self, other, "fadd", "or_" if self.kind == BOOL else "add")

    def __radd__(self, other: Operand) -> Lanes:
        return self._binary(other, self, "fadd", "add")

    def __sub__(self, other: Operand) -> Lanes:
        return self._binary(self, other, "fsub", "sub")

    def __rsub__(self, other: Operand) -> Lanes:
        return self._binary(other, self, "fsub", "sub")

    def __mul__(self, other: Operand) -> Lanes:
        return self._binary(self, other, "fmul", "mul")

    def __rmul__(self, other: Operand) -> Lanes:
        return self._binary(other, self, "fmul", "mul")

    def __truediv__(self, other: Operand) -> Lanes:
        return self._binary(self, other, "fdiv", "sdiv")

    def __rtruediv__(self, other: Operand) -> Lanes:
        return self._binary(other, self, "fdiv", "sdiv")

    def __mod__(self, other: Operand) -> Lanes:
        """The remainder of the division towards zero."""
        return self._binary(self, other, "frem", "srem")

    def __neg__(self) -> Lanes:
        return Lanes(self.b, self.b.fneg(self.value)) if is_float(self.kind) else 0 - self

    def __and__(self, other: Operand) -> Lanes:
        return Lanes(self.b, self.b.and_(self.value, self.like(other).value))

    def __or__(self, other: Operand) -> Lanes:
        return Lanes(self.b, self.b.or_(self.value, self.like(other).value))

    def __xor__(self, other: Operand) -> Lanes:
        return Lanes(self.b, self.b.xor(self.value, self.like(other).value))

    def __invert__(self) -> Lanes:
        return self ^ -1

    def __lshift__(self, bits: Operand) -> Lanes:
        return Lanes(self.b, self.b.shl(self.value, self.like(bits).value))

    def __rshift__(self, bits: Operand) -> Lanes:
        return Lanes(self.b, self.b.lshr(self.value, self.like(bits).value))

    def compare(self, how: str, other: Operand) -> Lanes:
        """Lanes of bool: one of ``< <= > >= == !=``."""
        right = self.like(other).value
        if not is_float(self.kind):  # false and true are ordered as 0 and 1
            make = self.b.icmp_unsigned if self.kind == BOOL else self.b.icmp_signed
        else:
            make = self.b.fcmp_unordered if how == "!=" else self.b.fcmp_ordered
        return Lanes(self.b, make(how, self.value, right))

    def __lt__(self, other: Operand) -> Lanes:
        return self.compare("<", other)

    def __le__(self, other: Operand) -> Lanes:
        return self.compare("<=", other)

    def __gt__(self, other: Operand) -> Lanes:
        return self.compare(">", other)

    def __ge__(self, other: Operand) -> Lanes:
        return self.compare(">=", other)

    def equals(self, other: Operand) -> Lanes:
        return self.compare("==", other)

    def differs(self, other: Operand) -> Lanes:
        return self.compare("!=", other)

    def where(self, yes: Operand, no: Operand) -> Lanes:
        """Of bool lanes: ``yes`` where true, ``no`` elsewhere; at least one of the two is no plain number."""
        sample = yes if isinstance(yes, Lanes) else no
        assert isinstance(sample, Lanes)
        return Lanes(self.b, self.b.select(self.value, sample.like(yes).value, sample.like(no).value))

    def call(self, name: str, *others: Operand) -> Lanes:
        """LLVM's intrinsic of that name on these lanes: ``fabs`` for llvm.fabs.v16f32."""
        operands = [self.value, *(self.like(other).value for other in others)]
        return Lanes(
            self.b, code.intrinsic(self.b, f"llvm.{name}.{code.suffix(self.value.type)}", self.value.type, operands)
        )

    def fma(self, factor: Operand, addend: Operand) -> Lanes:
        """self · factor + addend, rounded once where the processor can; as two operations where it cannot."""
        return self.call("fmuladd", factor, addend)

    def bits(self, kind: ir.Type) -> Lanes:
        """The same bits, read as elements of another type of that width."""
        return Lanes(self.b, self.b.bitcast(self.value, code.vector(kind, self.count)))

    def by_lane(self, name: str, *others: Operand) -> Lanes:
        """A function of the C library, called for one lane after the other: ``sin`` is sinf in float32."""
        element = self.kind
        operands = [self, *(self.like(other) for other in others)]
        full = name + ("f" if element == F32 else "")
        if self.count == 1:
            return Lanes(self.b, code.intrinsic(self.b, full, element, [operand.value for operand in operands]))
        result = ir.Constant(self.value.type, ir.Undefined)
        for lane in range(self.count):
            index = ir.Constant(code.I32, lane)
            single = [self.b.extract_element(operand.value, index) for operand in operands]
            called = code.intrinsic(self.b, full, element, single)
            result = self.b.insert_element(result, called, index)
        return Lanes(self.b, result)


Operand = Lanes | float
"""What stands beside lanes in a formula: other lanes of the same type, or a plain number (bool and int included)."""


def polynomial(x: Lanes, square: Lanes, coefficients: Sequence[float]) -> Lanes:
    """Σ cₖ xᵏ from c₀ up: pairs of terms, then Horner's rule in x², for half the latency at as many operations."""
    pairs = [coefficients[k : k + 2] for k in range(0, len(coefficients), 2)]
    terms = [x.fma(pair[1], pair[0]) if len(pair) == 2 else x.like(pair[0]) for pair in pairs]
    total = terms[-1]
    for term in terms[-2::-1]:
        total = square.fma(total, term)
    return total
