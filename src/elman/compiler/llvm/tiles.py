"""The micro-kernel of a matrix unit: out = source + left weights, the sums in tile registers (Intel's AMX).

A tile register holds 16 rows of 64 bytes: 16 sums of float32, or 16 pairs of bfloat16. One instruction adds to a tile
of sums 16 rows of ``left`` by 32 k of a weight. Eight registers are enough for 32 rows by two vectors, four sums that
need not wait for each other, or for 16 rows by four; so a panel four vectors wide is gone through twice where there are
more than 16 rows.

Registers have no shapes until they are configured. A tile of fewer rows, or of fewer columns, is a register of such a
shape, so that nothing outside the rows and columns is read or written; every call configures them anew, which costs a
few tens of cycles of some thousands. ``release`` is for when the product is done: a thread leaves with none in use, and
the system has nothing of them to save when it interrupts the thread.

"Intel 64 and IA-32 Architectures Optimization Reference Manual", chapter 20.
"""

from __future__ import annotations

import itertools

from llvmlite import ir

from .code import BYTE, I16, I64, PTR, VOID, at, constant, counted, intrinsic, store, vector
from .isa import Isa, Unit
from .numeric import Numeric
from .panel import internal

__all__ = ["release", "tile_kernel"]

_LEFT, _LAST = 4, 7
"""The first register of left, after those of sums, and that of the last vector, which may have fewer columns."""

_WIDTHS, _HEIGHTS, _CONFIGURATION = 16, 48, 64  # where the shapes stand, 2 bytes and 1 for each; the size of it


def tile_kernel(module: ir.Module, isa: Isa, mode: Numeric, high: bool, vectors: int) -> ir.Function:
    """out[rows, vectors] = source + left[rows, count] weights[count, vectors].

        void(ptr out, i64 out_stride, ptr source, i64 source_stride, ptr left, i64 left_stride, ptr weights, i64 count,
             i64 rows, i64 tail)

    ``count`` are elements, a multiple of those that are multiplied at once. ``rows`` are 17 to 32 if it is ``high``, 1
    to 16 otherwise. Of the last vector of out and source only ``tail`` lanes exist, where it is not 0.
    """
    name = f"unit.{'high' if high else 'low'}x{vectors}"
    made = internal(module, name, [PTR, I64, PTR, I64, PTR, I64, PTR, I64, I64, I64])
    if made.blocks:
        return made
    unit = mode.unit
    assert unit is not None
    out, out_stride, source, source_stride, left, left_stride, weights, count, rows, tail = made.args
    b = ir.IRBuilder(made.append_basic_block("entry"))
    full, whole = I64(unit.rows), I64(unit.bytes)
    heights = [full, b.sub(rows, full)] if high else [rows]
    rest = b.select(b.icmp_signed("==", tail, I64(0)), whole, b.mul(tail, I64(mode.weight.size)))
    configuration = b.alloca(vector(BYTE, _CONFIGURATION))
    configuration.type = PTR
    step, elements = I64(vectors * unit.bytes), unit.bytes // mode.weight.size
    together = 2 if high else vectors
    for first in range(0, vectors, together):
        columns = range(first, min(first + together, vectors))
        sums = {place: tile for tile, place in enumerate(itertools.product(range(len(heights)), columns))}
        lefts = range(_LEFT, _LEFT + len(heights))
        free = range(lefts.stop, _LAST)
        rights = {v: free[i % len(free)] for i, v in enumerate(columns[:-1])} | {columns[-1]: _LAST}
        widths = {v: rest if v == vectors - 1 else whole for v in columns}
        shapes = {tile: (heights[r], widths[v]) for (r, v), tile in sums.items()}
        shapes |= {tile: (height, whole) for tile, height in zip(lefts, heights, strict=True)}
        shapes |= {tile: (full, widths[v]) for v, tile in rights.items()}
        _configure(b, unit, configuration, shapes)
        for (r, v), tile in sums.items():
            _move(b, unit.load, tile, _place(b, unit, source, source_stride, r, v), source_stride)
        with counted(b, 0, count, elements, name="k") as k:
            along = b.mul(k, I64(mode.left.size))
            for r, tile in enumerate(lefts):
                _move(b, unit.load, tile, at(b, _place(b, unit, left, left_stride, r, 0), along), left_stride)
            here = at(b, weights, b.mul(k, step))
            for v in columns:
                _move(b, unit.load, rights[v], at(b, here, v * unit.bytes), step)
                for r, tile in enumerate(lefts):
                    intrinsic(b, unit.multiply, VOID, [constant(BYTE, t) for t in (sums[r, v], tile, rights[v])])
        for (r, v), tile in sums.items():
            _move(b, unit.store, tile, _place(b, unit, out, out_stride, r, v), out_stride)
    b.ret_void()
    return made


def release(b: ir.IRBuilder, unit: Unit) -> None:
    """Give the tile registers back."""
    intrinsic(b, unit.release, VOID, [])


def _configure(b: ir.IRBuilder, unit: Unit, place: ir.Value, shapes: dict[int, tuple[ir.Value, ir.Value]]) -> None:
    """Give registers their rows and bytes; their numbers are zero then. The memory is written whole."""
    store(b, constant(vector(BYTE, _CONFIGURATION), 0), place)
    store(b, constant(BYTE, 1), place)  # the palette
    for tile, (rows, width) in shapes.items():
        store(b, b.trunc(width, I16), at(b, place, _WIDTHS + 2 * tile))
        store(b, b.trunc(rows, BYTE), at(b, place, _HEIGHTS + tile))
    intrinsic(b, unit.configure, VOID, [place])


def _place(b: ir.IRBuilder, unit: Unit, matrix: ir.Value, stride: ir.Value, r: int, v: int) -> ir.Value:
    """Where a tile of a matrix begins."""
    return at(b, at(b, matrix, b.mul(stride, I64(r * unit.rows))), v * unit.bytes)


def _move(b: ir.IRBuilder, name: str, tile: int, place: ir.Value, stride: ir.Value) -> None:
    """Load or store a tile."""
    intrinsic(b, name, VOID, [constant(BYTE, tile), place, stride])
