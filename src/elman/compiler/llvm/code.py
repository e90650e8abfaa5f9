"""Writing LLVM's intermediate representation: what llvmlite.ir leaves to say about vectors, loops and addresses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

from llvmlite import ir

__all__ = [
    "BF16", "BF16X3", "BOOL", "BYTE", "F32", "F64", "I16", "I32", "I64", "PTR", "VOID", "at", "constant", "counted",
    "folded", "function", "intrinsic", "lanes_below", "load", "masked_load", "masked_store", "scalar_of", "select",
    "share", "splat", "store", "suffix", "vector",
]  # fmt: skip


class _Named(ir.Type):
    """A type of 16 bits that llvmlite has no name for."""

    width = 16

    def __init__(self, name: str) -> None:
        self.text = name

    def _to_string(self) -> str:
        return self.text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Named) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)


BOOL, BYTE, I16 = ir.IntType(1), ir.IntType(8), ir.IntType(16)
I32, I64 = ir.IntType(32), ir.IntType(64)
F32, F64, VOID, PTR = ir.FloatType(), ir.DoubleType(), ir.VoidType(), ir.PointerType()
BF16 = _Named("bfloat")
BF16X3 = _Named("bfloat x 3")
"""A numeric mode, no type of LLVM: float32 in two halves of bfloat16, multiplied three times."""

Int: TypeAlias = int | ir.Value


def vector(element: ir.Type, lanes: int) -> ir.Type:
    """A vector type; of one lane, the element itself."""
    return ir.VectorType(element, lanes) if lanes > 1 else element


def scalar_of(kind: ir.Type) -> ir.Type:
    """The type of one element."""
    return kind.element if isinstance(kind, ir.VectorType) else kind


def suffix(kind: ir.Type) -> str:
    """How the name of an intrinsic says its type: v16f32."""
    if isinstance(kind, ir.VectorType):
        return f"v{kind.count}{suffix(kind.element)}"
    if isinstance(kind, ir.PointerType):
        return "p0"
    return {BF16: "bf16", BF16X3: "bf16x3", F32: "f32", F64: "f64"}.get(kind) or f"i{kind.width}"


def constant(kind: ir.Type, value: float) -> ir.Constant:
    """A constant, in every lane of a vector."""
    element = scalar_of(kind)
    given = float(value) if element in (F32, F64) else int(value)
    if element is F32:
        given = _as_float32(given)
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [ir.Constant(element, given)] * kind.count)
    return ir.Constant(element, given)


def _as_float32(value: float) -> float:
    import struct

    if value != value or value in (float("inf"), float("-inf")):
        return value
    try:
        return float(struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def function(module: ir.Module, name: str, result: ir.Type, arguments: Sequence[ir.Type]) -> ir.Function:
    """A function of the module by that name, declared where it is not there yet."""
    found = module.globals.get(name)
    return found or ir.Function(module, ir.FunctionType(result, list(arguments)), name)


def intrinsic(b: ir.IRBuilder, name: str, result: ir.Type, arguments: Sequence[ir.Value]) -> ir.Value:
    """Call a function that LLVM or the process knows, by its full name: ``llvm.fma.v16f32``."""
    return b.call(function(b.module, name, result, [a.type for a in arguments]), list(arguments))


def i64(value: Int) -> ir.Value:
    return ir.Constant(I64, value) if isinstance(value, int) else value


def at(b: ir.IRBuilder, pointer: ir.Value, offset: Int) -> ir.Value:
    """The address that many bytes further."""
    if isinstance(offset, int) and offset == 0:
        return pointer
    return b.gep(pointer, [i64(offset)], source_etype=BYTE)


def load(b: ir.IRBuilder, pointer: ir.Value, kind: ir.Type, align: int | None = None) -> ir.Value:
    """Read a value; user data is aligned to its elements alone."""
    return b.load(pointer, typ=kind, align=align or _size(scalar_of(kind)))


def store(b: ir.IRBuilder, value: ir.Value, pointer: ir.Value, align: int | None = None) -> None:
    b.store(value, pointer, align=align or _size(scalar_of(value.type)))


def _size(kind: ir.Type) -> int:
    return (
        4 if kind is F32 else 8 if kind in (F64, PTR) or isinstance(kind, ir.PointerType) else max(kind.width // 8, 1)
    )


def splat(b: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """The same number in every lane."""
    if lanes == 1:
        return value
    kind = ir.VectorType(value.type, lanes)
    first = b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return b.shuffle_vector(first, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def lanes_below(count: int, lanes: int) -> ir.Constant:
    """The mask of the first so many lanes."""
    return ir.Constant(ir.VectorType(BOOL, lanes), [ir.Constant(BOOL, int(i < count)) for i in range(lanes)])


def masked_load(b: ir.IRBuilder, pointer: ir.Value, kind: ir.Type, mask: ir.Value) -> ir.Value:
    """Read the lanes of a mask, zero elsewhere; what lies behind the others is not touched."""
    align = ir.Constant(I32, _size(scalar_of(kind)))
    name = f"llvm.masked.load.{suffix(kind)}.p0"
    return intrinsic(b, name, kind, [pointer, align, mask, constant(kind, 0)])


def masked_store(b: ir.IRBuilder, value: ir.Value, pointer: ir.Value, mask: ir.Value) -> None:
    if isinstance(mask, ir.Constant) and [lane.constant for lane in mask.constant[:2]] == [1, 0]:
        # LLVM would write the one lane of narrowed numbers (AVX-512 without bfloat16) as wide as they were before.
        store(b, b.extract_element(value, ir.Constant(I32, 0)), pointer)
        return
    align = ir.Constant(I32, _size(scalar_of(value.type)))
    intrinsic(b, f"llvm.masked.store.{suffix(value.type)}.p0", VOID, [value, pointer, align, mask])


def select(b: ir.IRBuilder, condition: ir.Value, yes: ir.Value, no: ir.Value) -> ir.Value:
    return b.select(condition, yes, no)


@contextmanager
def counted(b: ir.IRBuilder, start: Int, stop: Int, step: Int = 1, name: str = "i") -> Iterator[ir.Value]:
    """A loop over start, start + step, … below stop; runs not at all where start is not below stop."""
    start, stop, step = i64(start), i64(stop), i64(step)
    before = b.block
    body = b.append_basic_block(f"{name}.body")
    after = b.append_basic_block(f"{name}.end")
    b.cbranch(b.icmp_signed("<", start, stop), body, after)
    b.position_at_end(body)
    index = b.phi(I64, name)
    index.add_incoming(start, before)
    yield index
    following = b.add(index, step)
    index.add_incoming(following, b.block)
    b.cbranch(b.icmp_signed("<", following, stop), body, after)
    b.position_at_end(after)


def folded(
    b: ir.IRBuilder,
    bounds: tuple[Int, Int, int],
    values: Sequence[ir.Value],
    body: Callable[[ir.Value, list[ir.Value]], Sequence[ir.Value]],
) -> list[ir.Value]:
    """A counted loop that carries values in registers: ``body(index, values)`` gives the next ones; the last remain."""
    with counted(b, *bounds) as index:
        before = index.incomings[0][1]
        carried = [b.phi(value.type) for value in values]
        following = list(body(index, list(carried)))
        end = b.block
        for phi, first, later in zip(carried, values, following, strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(later, end)
    results = []
    for first, later in zip(values, following, strict=True):
        phi = b.phi(later.type)
        phi.add_incoming(first, before)
        phi.add_incoming(later, end)
        results.append(phi)
    return results


def share(b: ir.IRBuilder, count: ir.Value, part: ir.Value, parts: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The first and the end of what one of so many threads takes."""
    return b.udiv(b.mul(count, part), parts), b.udiv(b.mul(count, b.add(part, I64(1))), parts)
