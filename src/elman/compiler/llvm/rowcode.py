"""The code of what is done to every row: maps over its features, reductions, products with a matrix of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from llvmlite import ir

from . import pointwise
from .code import (
    F32,
    F64,
    I32,
    I64,
    at,
    constant,
    counted,
    intrinsic,
    lanes_below,
    load,
    masked_load,
    masked_store,
    scalar_of,
    splat,
    store,
    suffix,
    vector,
)
from .isa import Isa
from .items import Access, Buffer, Chosen, Contract, Item, Map, Op, Product, reads_of
from .memory import BYTES, HELD, KINDS, from_memory, to_memory
from .product import panels

__all__ = ["RowCode", "across", "divides", "least", "share"]

Place = Callable[[ir.IRBuilder, Access], tuple[ir.Value, ir.Value]]
"""Gives where the numbers of an access begin in the first row, and the bytes from row to row."""


class RowCode:
    """Writes what happens to every row of a map or a contraction."""

    def __init__(
        self, b: ir.IRBuilder, isa: Isa, item: Map | Contract, place: Place, where: Sequence[ir.Value]
    ) -> None:
        """``where`` are the first row, the last, and which part of the units, of how many, where units are shared."""
        self.b, self.isa, self.place = b, isa, place
        self.first, self.last, self.part, self.parts = where
        dtypes = {a.buffer.dtype for a in accesses(item)} | {op.dtype for op in getattr(item, "ops", ())}
        self.bits = 64 if torch.float64 in dtypes else 32
        self.lanes = isa.lanes(self.bits)
        self.read_only = b.module.add_metadata([])

    def each_row(self, item: Map | Contract, body: Callable[[dict[Buffer, ir.Value]], None]) -> None:
        """A loop over the rows; ``body`` is given where the row of every buffer begins."""
        b = self.b
        buffers = dict.fromkeys(a.buffer for a in accesses(item))
        bases = {buffer: self.place(b, Access(buffer, 0, ())) for buffer in buffers}
        with counted(b, constant(I64, 0), b.sub(self.last, self.first), 1, "row") as r:
            body({buffer: at(b, base, b.mul(r, stride)) for buffer, (base, stride) in bases.items()})

    # -- maps ---------------------------------------------------------------------------------------------------

    def map(self, item: Map) -> None:
        self.each_row(item, lambda rows: self._dimension(item, rows, []))

    def _dimension(self, item: Map, rows: dict[Buffer, ir.Value], index: list[ir.Value]) -> None:
        """Loop over the dimension after those that have an index; sums begin where the reduced ones do."""
        b, depth, outer = self.b, len(index), len(item.shape) - item.reduced
        sums: list[ir.Value] | None = None
        if item.reductions and depth == outer:
            sums = [self._sum(kind, access) for _, kind, access in item.reductions]
            self.sums = sums
        if depth >= len(item.shape) - 1:
            self._vectors(item, rows, index)
        else:
            with counted(b, 0, item.shape[depth], 1, "i") as i:
                self._dimension(item, rows, [*index, i])
        if sums is not None:
            for place, (_, kind, access) in zip(sums, item.reductions, strict=True):
                total = across(b, b.load(place, typ=self._vector(access.buffer.dtype)), kind)
                self._store(total, self._place(access, rows[access.buffer], index[:outer]), access.buffer.dtype)

    def _sum(self, kind: str, access: Access) -> ir.Value:
        """Room for a vector of partial sums, with what changes nothing in it."""
        wide = self._vector(access.buffer.dtype)
        with self.b.goto_entry_block():
            place = self.b.alloca(wide)
        self.b.store(constant(wide, _NEUTRAL[kind]), place)
        return place

    def _vectors(self, item: Map, rows: dict[Buffer, ir.Value], index: list[ir.Value]) -> None:
        """The last dimension, a vector at a time; what does not fill one, masked."""
        b, width = self.b, item.shape[-1] if item.shape else 1
        whole, rest = divmod(width, self.lanes)
        count = whole + bool(rest)
        if divides(item):
            kind = F32 if self.bits == 32 else F64
            start, end = _vector_share(b, panels(width, self.isa, kind), self.part, self.parts)
        else:
            start, end = constant(I64, 0), constant(I64, count)
        if whole:
            last = least(b, end, constant(I64, whole)) if rest else end
            with counted(b, start, last, 1, "v") as v:
                self._body(item, rows, index, b.mul(v, constant(I64, self.lanes)), None)
        if rest:
            with b.if_then(b.icmp_signed(">", end, constant(I64, whole))):
                self._body(item, rows, index, constant(I64, whole * self.lanes), rest)

    def _body(
        self, item: Map, rows: dict[Buffer, ir.Value], index: list[ir.Value], at_unit: ir.Value, rest: int | None
    ) -> None:
        b = self.b
        where = [*index, at_unit] if item.shape else []
        registers: list[ir.Value] = []
        seen: dict[Access, ir.Value] = {}

        def operand(given: Any) -> Any:
            if isinstance(given, tuple):
                return registers[given[1]]
            if isinstance(given, Chosen):
                return self._chosen(given, rows, where, rest)
            if not isinstance(given, Access):
                return given
            if given not in seen:
                seen[given] = self._read(given, rows[given.buffer], where, rest)
            return seen[given]

        for op in item.ops:
            operands = [operand(a) for a in op.operands]
            registers.append(self._counted(where, *operands) if op.name == "arange" else self._operation(op, operands))
        for register, access in item.stores:
            self._write(registers[register], access, rows[access.buffer], where, rest)
        for register, access in item.sums:
            before = self._read(access, rows[access.buffer], where, rest)
            self._write(b.fadd(before, registers[register]), access, rows[access.buffer], where, rest)
        for place, (register, kind, access) in zip(self.sums if item.reductions else [], item.reductions, strict=True):
            value = registers[register]
            if rest is not None:
                value = b.select(lanes_below(rest, self.lanes), value, constant(value.type, _NEUTRAL[kind]))
            b.store(_combine(b, kind, b.load(place, typ=self._vector(access.buffer.dtype)), value), place)

    def _counted(self, index: Sequence[ir.Value], start: int, step: int) -> ir.Value:
        """start + step · the number of the feature, in every lane."""
        b, wide = self.b, vector(I64, self.lanes)
        lanes = ir.Constant(wide, [ir.Constant(I64, i) for i in range(self.lanes)])
        feature = b.add(splat(b, index[-1] if index else constant(I64, 0), self.lanes), lanes)
        return b.add(constant(wide, start), b.mul(constant(wide, step), feature))

    def _operation(self, op: Op, operands: list[Any]) -> ir.Value:
        kind = KINDS[op.dtype]
        if not any(isinstance(value, ir.Value) for value in operands):  # constants alone
            operands = [constant(vector(kind, self.lanes), operands[0]), *operands[1:]]
        return pointwise.emit(self.b, op.name, operands, kind, **dict(op.keywords))

    def _vector(self, dtype: torch.dtype) -> ir.Type:
        return vector(KINDS[dtype], self.lanes)

    def _place(self, access: Access, row: ir.Value, index: Sequence[ir.Value]) -> ir.Value:
        b, size = self.b, BYTES[access.buffer.dtype]
        place = at(b, row, access.offset * size)
        for i, stride in zip(index, access.strides, strict=True):
            if stride:
                place = at(b, place, b.mul(i, constant(I64, stride * size)))
        return place

    def _read(self, access: Access, row: ir.Value, index: Sequence[ir.Value], rest: int | None) -> ir.Value:
        b, place = self.b, self._place(access, row, index)
        stride = access.strides[-1] if access.strides else 0
        held = HELD[access.buffer.dtype]
        wide = vector(held, self.lanes)
        if stride == 0:
            one = load(b, place, held)
            self._constant_memory(one, access)
            value = splat(b, one, self.lanes)
        elif stride == 1 and rest is None:
            value = load(b, place, wide)
            self._constant_memory(value, access)
        elif stride == 1:
            value = masked_load(b, place, wide, lanes_below(rest, self.lanes))  # type: ignore[arg-type]
        else:
            value = constant(wide, 0)
            for lane in range(self.lanes if rest is None else rest):
                one = load(b, at(b, place, lane * stride * BYTES[access.buffer.dtype]), held)
                value = b.insert_element(value, one, constant(I32, lane))
        return from_memory(b, value, access.buffer.dtype)

    def _chosen(
        self, given: Chosen, rows: dict[Buffer, ir.Value], index: Sequence[ir.Value], rest: int | None
    ) -> ir.Value:
        """Part of the row of a table whose number stands in memory."""
        b, table = self.b, given.table
        number = load(b, self._place(given.number, rows[given.number.buffer], index), I64)
        row = b.mul(number, constant(I64, given.width * BYTES[table.buffer.dtype]))
        return self._read(table, at(b, rows[table.buffer], row), index, rest)

    def _constant_memory(self, value: ir.Value, access: Access) -> None:
        if access.buffer.role == "input":  # nothing in the loop writes there
            value.set_metadata("invariant.load", self.read_only)

    def _write(
        self, value: ir.Value, access: Access, row: ir.Value, index: Sequence[ir.Value], rest: int | None
    ) -> None:
        b, place = self.b, self._place(access, row, index)
        value = to_memory(b, value, access.buffer.dtype, self.isa)
        stride = access.strides[-1] if access.strides else 1
        if not access.strides:
            store(b, b.extract_element(value, constant(I32, 0)), place)
        elif stride == 1 and rest is None:
            store(b, value, place)
        elif stride == 1:
            masked_store(b, value, place, lanes_below(rest, self.lanes))  # type: ignore[arg-type]
        else:
            for lane in range(self.lanes if rest is None else rest):
                one = b.extract_element(value, constant(I32, lane))
                store(b, one, at(b, place, lane * stride * BYTES[access.buffer.dtype]))

    def _store(self, value: ir.Value, place: ir.Value, dtype: torch.dtype, rest: int | None = None) -> None:
        """Write neighbouring numbers, all of them or the first few; or one."""
        held = to_memory(self.b, value, dtype, self.isa)
        if rest is None:
            store(self.b, held, place)
        else:
            masked_store(self.b, held, place, lanes_below(rest, self.lanes))

    def _one(self, place: ir.Value, dtype: torch.dtype) -> ir.Value:
        """Read one number."""
        return from_memory(self.b, load(self.b, place, HELD[dtype]), dtype)

    # -- contractions -------------------------------------------------------------------------------------------

    def contract(self, item: Contract) -> None:
        """Over the last kept dimension where its numbers are neighbours, else over the last one that is reduced."""
        d = len(item.shape)
        along = [a.strides for a in item.reads]
        if item.shape and all(s[d - 1] in (0, 1) for s in along) and any(s[d - 1] == 1 for s in along):
            form = "kept"
        elif item.inner and all(s[-1] in (0, 1) for s in along):
            form = "reduced"
        else:
            form, self.lanes = "single", 1
        if item.kind in ("argmax", "cumsum"):
            form, self.lanes = "single", 1
        self.each_row(item, lambda rows: self._kept(item, rows, [], form))

    def _kept(self, item: Contract, rows: dict[Buffer, ir.Value], index: list[ir.Value], form: str) -> None:
        b, depth = self.b, len(index)
        last = len(item.shape) - 1
        if form == "kept" and depth == last:
            whole, rest = divmod(item.shape[-1], self.lanes)
            if whole:
                with counted(b, 0, whole * self.lanes, self.lanes, "v") as v:
                    self._inner(item, rows, [*index, v], form, None)
            if rest:
                self._inner(item, rows, [*index, constant(I64, whole * self.lanes)], form, rest)
        elif depth <= last:
            with counted(b, 0, item.shape[depth], 1, "i") as i:
                self._kept(item, rows, [*index, i], form)
        else:
            self._inner(item, rows, index, form, None)

    def _inner(
        self, item: Contract, rows: dict[Buffer, ir.Value], index: list[ir.Value], form: str, rest: int | None
    ) -> None:
        """One result, or a vector of them."""
        if item.kind in ("argmax", "cumsum"):
            (self._argmax if item.kind == "argmax" else self._running_sum)(item, rows, index)
            return
        b, dtype = self.b, item.out.buffer.dtype
        wide = self._vector(dtype)
        with b.goto_entry_block():
            place = b.alloca(wide)
        b.store(constant(wide, _NEUTRAL[item.kind]), place)

        def term(inner: list[ir.Value], part: int | None) -> None:
            values = [
                self._term(a, rows[a.buffer], [*index, *inner], len(index), form, part or rest) for a in item.reads
            ]
            total = b.load(place, typ=wide)
            if item.kind == "sum" and len(values) == 2:
                name = f"llvm.fma.{suffix(wide)}"
                b.store(intrinsic(b, name, wide, [*values, total]), place)
                return
            value = values[0] if len(values) == 1 else b.fmul(*values)
            if part is not None and item.kind != "sum":
                value = b.select(lanes_below(part, self.lanes), value, constant(wide, _NEUTRAL[item.kind]))
            b.store(_combine(b, item.kind, total, value), place)

        def loops(inner: list[ir.Value]) -> None:
            depth = len(inner)
            if depth == len(item.inner):
                term(inner, None)
            elif form == "reduced" and depth == len(item.inner) - 1:
                whole, left = divmod(item.inner[-1], self.lanes)
                if whole:
                    with counted(b, 0, whole * self.lanes, self.lanes, "v") as v:
                        term([*inner, v], None)
                if left:
                    term([*inner, constant(I64, whole * self.lanes)], left)
            else:
                with counted(b, 0, item.inner[depth], 1, "k") as k:
                    loops([*inner, k])

        loops([])
        total = b.load(place, typ=wide)
        where = self._place(item.out, rows[item.out.buffer], index)
        if form == "kept":
            self._store(total, where, dtype, rest)
        else:
            self._store(across(b, total, item.kind) if self.lanes > 1 else total, where, dtype)

    def _argmax(self, item: Contract, rows: dict[Buffer, ir.Value], index: list[ir.Value]) -> None:
        """Which number is the largest, the first of equals; NaN is larger than all."""
        b, read = self.b, item.reads[0]
        dtype = read.buffer.dtype
        kind = KINDS[dtype]
        with b.goto_entry_block():
            best, where = b.alloca(kind), b.alloca(I64)
        row = rows[read.buffer]
        b.store(self._one(self._place(read, row, [*index, *(constant(I64, 0) for _ in item.inner)]), dtype), best)
        b.store(constant(I64, 0), where)
        if item.inner:
            with counted(b, 1, item.inner[0], 1, "k") as k:
                value, most = self._one(self._place(read, row, [*index, k]), dtype), b.load(best, typ=kind)
                larger = b.fcmp_unordered(">", value, most)
                with b.if_then(b.and_(larger, b.fcmp_ordered("ord", most, most))):
                    b.store(value, best)
                    b.store(k, where)
        store(b, b.load(where, typ=I64), self._place(item.out, rows[item.out.buffer], index))

    def _running_sum(self, item: Contract, rows: dict[Buffer, ir.Value], index: list[ir.Value]) -> None:
        """Every number with all before it."""
        b, read, out = self.b, item.reads[0], item.out
        kind = KINDS[read.buffer.dtype]
        with b.goto_entry_block():
            total = b.alloca(kind)
        b.store(constant(kind, 0), total)
        with counted(b, 0, item.inner[0], 1, "k") as k:
            value = self._one(self._place(read, rows[read.buffer], [*index, k]), read.buffer.dtype)
            value = b.fadd(b.load(total, typ=kind), value)
            b.store(value, total)
            self._store(value, self._place(out, rows[out.buffer], [*index, k]), out.buffer.dtype)

    def _term(
        self, access: Access, row: ir.Value, index: list[ir.Value], kept: int, form: str, part: int | None
    ) -> ir.Value:
        b = self.b
        place = self._place(access, row, index)
        dtype = access.buffer.dtype
        along = 0 if form == "single" else access.strides[kept - 1 if form == "kept" else -1]
        if self.lanes == 1:
            return self._one(place, dtype)
        if along == 0:
            value = splat(b, self._one(place, dtype), self.lanes)
            if part is None or form == "kept":
                return value
            return b.select(lanes_below(part, self.lanes), value, constant(value.type, 0))
        wide = vector(HELD[dtype], self.lanes)
        held = load(b, place, wide) if part is None else masked_load(b, place, wide, lanes_below(part, self.lanes))
        return from_memory(b, held, dtype)


_NEUTRAL = {"sum": 0.0, "prod": 1.0, "max": float("-inf"), "min": float("inf")}


def _combine(b: ir.IRBuilder, kind: str, total: ir.Value, value: ir.Value) -> ir.Value:
    """One more number for a reduction; NaN stays."""
    if kind == "sum":
        return b.fadd(total, value) if scalar_of(total.type) in (F32, F64) else b.add(total, value)
    if kind == "prod":
        return b.fmul(total, value)
    further = b.fcmp_unordered(">" if kind == "max" else "<", value, total)  # true also where the value is NaN
    keep = b.fcmp_unordered("uno", total, total)
    return b.select(keep, total, b.select(further, value, total))


def across(b: ir.IRBuilder, value: ir.Value, kind: str) -> ir.Value:
    """The lanes of a vector as one number, by halves."""
    lanes = value.type.count if isinstance(value.type, ir.VectorType) else 1
    while lanes > 1:
        lanes //= 2
        undefined = ir.Constant(value.type, ir.Undefined)
        halves = [
            b.shuffle_vector(value, undefined, ir.Constant(ir.VectorType(I32, lanes), list(range(n, n + lanes))))
            for n in (0, lanes)
        ]
        value = _combine(b, kind, *halves)
    return b.extract_element(value, constant(I32, 0)) if isinstance(value.type, ir.VectorType) else value


def divides(item: Item) -> bool:
    """Whether threads can share the units of an item: not where a row is reduced, or has one unit."""
    if isinstance(item, Product):
        return True
    return isinstance(item, Map) and len(item.shape) == 1 and not item.reductions


def accesses(item: Map | Contract) -> list[Access]:
    if isinstance(item, Contract):
        return [*item.reads, item.out]
    return [*reads_of(item), *(a for _, a in (*item.stores, *item.sums)), *(a for _, _, a in item.reductions)]


def least(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.select(b.icmp_signed("<", x, y), x, y)


def share(b: ir.IRBuilder, count: ir.Value, part: ir.Value, parts: ir.Value) -> tuple[ir.Value, ir.Value]:
    """From where to where one of several equal parts goes."""
    next_part = b.add(part, constant(I64, 1))
    return b.sdiv(b.mul(count, part), parts), b.sdiv(b.mul(count, next_part), parts)


def _vector_share(b: ir.IRBuilder, widths: Sequence[int], part: ir.Value, parts: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The same share as that of a product's panels, in vectors."""
    first, last = share(b, constant(I64, len(widths)), part, parts)
    wide = sum(w == widths[0] for w in widths)

    def start(panel: ir.Value) -> ir.Value:
        beyond = b.sub(panel, constant(I64, wide))
        more = b.select(b.icmp_signed(">", beyond, constant(I64, 0)), beyond, constant(I64, 0))
        whole = b.mul(panel, constant(I64, widths[0]))
        return b.sub(whole, b.mul(more, constant(I64, widths[0] - widths[-1])))

    return start(first), start(last)
