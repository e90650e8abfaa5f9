"""Matrix products with packed weights: out = init + left W, by micro-kernels that keep a tile of out in registers.

W (K, N) is packed once into *panels* of a few vectors of columns: the K rows of a panel lie one after the other, so
that a product reads its weights in the order in which they lie in memory. A tile is some rows of ``left`` by one panel;
K is cut into blocks so that the block of a panel stays in the first-level cache while all the rows pass over it.

    for panel:  for block of K:  for block of rows:  out[rows, panel] (+)= left[rows, block] W[block, panel]

The blocking is that of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34 (2008),
with the packing of ``left`` left out: a recurrent step has too few rows to pay for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from .code import (
    F32,
    I32,
    I64,
    PTR,
    VOID,
    at,
    constant,
    counted,
    folded,
    function,
    intrinsic,
    lanes_below,
    load,
    masked_load,
    masked_store,
    splat,
    store,
    suffix,
    vector,
)
from .isa import Isa

__all__ = ["micro_kernel", "pack", "packed_bytes", "panels", "product"]

_CACHE = 24 * 1024
"""Bytes of a panel's block: half of a usual first-level cache, the rest is for the rows."""

_SUMS = 12
"""Sums that a micro-kernel keeps apart: two fused multiply-adds start a cycle, and each takes four to five."""

_SQUARE = 8
"""Largest side of the squares that are transposed in registers while packing."""


def panels(columns: int, isa: Isa, kind: ir.Type) -> list[int]:
    """Width in vectors of every panel of a weight with so many columns: a tile's or a little less, widest first."""
    vectors = -(-columns // _lanes(isa, kind))
    count = -(-vectors // isa.tile[1])
    narrow, wide = divmod(vectors, count)
    return [narrow + 1] * wide + [narrow] * (count - wide)


def packed_bytes(k: int, columns: int, isa: Isa, kind: ir.Type) -> int:
    """Bytes of a packed weight (k, columns): its panels, filled up with zeros to whole vectors."""
    return k * isa.bytes * sum(panels(columns, isa, kind))


def product(module: ir.Module, isa: Isa, kind: ir.Type, k: int, columns: int) -> ir.Function:
    """The function that computes out = init + left W for the panels of a weight (k, columns) from first to below last.

        void(ptr out, i64 out_stride, ptr init, i64 init_stride, ptr left, i64 left_stride, ptr packed,
             i64 rows, i64 first_panel, i64 last_panel)

    Strides are bytes from row to row. ``init`` may be ``out`` itself, or one row with stride 0. Nothing outside the
    rows and the columns of the panels is read or written. The order of a sum depends on the shape of its tile and on
    nothing else, so a result does not depend on how panels are shared between threads.
    """
    name = f"product.{suffix(kind)}.{k}x{columns}"
    made = _internal(module, name, [PTR, I64, PTR, I64, PTR, I64, PTR, I64, I64, I64])
    if made.blocks:
        return made
    out, out_stride, init, init_stride, left, left_stride, packed, rows, first_panel, last_panel = made.args
    b = ir.IRBuilder(made.append_basic_block("entry"))
    tile_rows = isa.tile[0]
    blocks = b.udiv(b.add(rows, I64(tile_rows - 1)), I64(tile_rows))
    each = b.udiv(rows, intrinsic(b, "llvm.umax.i64", I64, [blocks, I64(1)]))
    larger = b.sub(rows, b.mul(each, blocks))
    depth = _depth(k, isa, panels(columns, isa, kind)[0])
    with counted(b, first_panel, last_panel, name="panel") as panel:
        start, width = _place(b, panel, panels(columns, isa, kind))
        weights = at(b, packed, b.mul(start, I64(k * isa.bytes)))
        column = b.mul(start, I64(isa.bytes))
        target = at(b, out, column)
        with counted(b, 0, k, depth, name="depth") as done:
            count = intrinsic(b, "llvm.smin.i64", I64, [I64(depth), b.sub(I64(k), done)])
            new = b.icmp_signed("==", done, I64(0))
            source = b.select(new, at(b, init, column), target)
            source_stride = b.select(new, init_stride, out_stride)
            factors = at(b, left, b.mul(done, I64(isa.bytes // _lanes(isa, kind))))
            block_weights = at(b, weights, b.mul(b.mul(done, width), I64(isa.bytes)))
            with counted(b, 0, blocks, name="rows") as block:
                row = b.add(b.mul(block, each), intrinsic(b, "llvm.smin.i64", I64, [block, larger]))
                height = b.add(each, b.zext(b.icmp_signed("<", block, larger), I64))
                arguments = [
                    at(b, target, b.mul(row, out_stride)), out_stride,
                    at(b, source, b.mul(row, source_stride)), source_stride,
                    at(b, factors, b.mul(row, left_stride)), left_stride,
                    block_weights, count,
                ]  # fmt: skip
                _call_by_shape(b, isa, kind, columns, panel, height, arguments)
    b.ret_void()
    return made


def micro_kernel(module: ir.Module, isa: Isa, kind: ir.Type, rows: int, vectors: int, tail: int = 0) -> ir.Function:
    """One tile: out[rows, vectors] = source + left[rows, count] weights[count, vectors], the sums in registers.

        void(ptr out, i64 out_stride, ptr source, i64 source_stride, ptr left, i64 left_stride, ptr weights, i64 count)

    Of the last vector of out and source only ``tail`` lanes exist, where it is not 0. Small tiles run several sums over
    every few k and add them at the end, since one sum alone would wait for itself.
    """
    name = f"tile.{suffix(kind)}.{rows}x{vectors}" + (f".{tail}" if tail else "")
    made = _internal(module, name, [PTR, I64, PTR, I64, PTR, I64, PTR, I64])
    if made.blocks:
        return made
    out, out_stride, source, source_stride, left, left_stride, weights, count = made.args
    b = ir.IRBuilder(made.append_basic_block("entry"))
    lanes = _lanes(isa, kind)
    element = isa.bytes // lanes
    whole = vector(kind, lanes)
    mask = lanes_below(tail, lanes) if tail else None
    factors = _rows(b, left, left_stride, rows)

    def step(k: ir.Value, sums: Sequence[ir.Value], further: int = 0) -> list[ir.Value]:
        here = at(b, weights, b.mul(k, I64(vectors * isa.bytes)))
        w = [load(b, at(b, here, (further * vectors + v) * isa.bytes), whole, isa.bytes) for v in range(vectors)]
        offset = b.mul(b.add(k, I64(further)), I64(element))
        x = [splat(b, load(b, at(b, factor, offset), kind), lanes) for factor in factors]
        return [_multiply_add(b, x[i // vectors], w[i % vectors], value) for i, value in enumerate(sums)]

    apart = _apart(rows * vectors, isa)
    size = rows * vectors

    def steps(k: ir.Value, sums: Sequence[ir.Value]) -> list[ir.Value]:
        return [value for u in range(apart) for value in step(k, sums[u * size : (u + 1) * size], u)]

    for row in _rows(b, source, source_stride, rows):  # what is added at the end is on its way while the sums are made
        for v in range(vectors):
            hint = [at(b, row, v * isa.bytes), *(I32(value) for value in (0, 3, 1))]  # to read, to keep near, data
            intrinsic(b, "llvm.prefetch.p0", VOID, hint)
    sums = [constant(whole, 0)] * size
    whole_steps = b.sub(count, b.urem(count, I64(apart)))
    many = folded(b, (0, whole_steps, apart), sums + [constant(whole, 0)] * (size * (apart - 1)), steps)
    sums = _together(b, [many[u * size : (u + 1) * size] for u in range(apart)])
    if apart > 1:
        sums = folded(b, (whole_steps, count, 1), sums, step)
    ends = zip(_rows(b, out, out_stride, rows), _rows(b, source, source_stride, rows), strict=True)
    for r, (row, begun) in enumerate(ends):
        for v in range(vectors):
            edge = mask if v == vectors - 1 else None
            total = b.fadd(_read(b, at(b, begun, v * isa.bytes), whole, edge), sums[r * vectors + v])
            _write(b, total, at(b, row, v * isa.bytes), edge)
    b.ret_void()
    return made


def pack(module: ir.Module, isa: Isa, kind: ir.Type, k: int, columns: int) -> ir.Function:
    """The function that packs the panels of a weight (k, columns) from first to below last.

        void(ptr packed, ptr weight, i64 k_stride, i64 column_stride, i64 first_panel, i64 last_panel)

    The strides are bytes of any value; it is fast where one of them is the size of an element. ``packed`` has
    ``packed_bytes`` bytes and is aligned to 64.
    """
    made = _internal(module, f"pack.{suffix(kind)}.{k}x{columns}", [PTR, PTR, I64, I64, I64, I64])
    if made.blocks:
        return made
    packed, weight, k_stride, column_stride, first_panel, last_panel = made.args
    b = ir.IRBuilder(made.append_basic_block("entry"))
    lanes = _lanes(isa, kind)
    with counted(b, first_panel, last_panel, name="panel") as panel:
        start, width = _place(b, panel, panels(columns, isa, kind))
        target = at(b, packed, b.mul(start, I64(k * isa.bytes)))
        with counted(b, 0, width, name="strip") as strip:
            column = b.mul(b.add(start, strip), I64(lanes))
            there = intrinsic(b, "llvm.smin.i64", I64, [I64(lanes), b.sub(I64(columns), column)])
            step = b.mul(width, I64(isa.bytes))
            source = at(b, weight, b.mul(column, column_stride))
            arguments = [at(b, target, b.mul(strip, I64(isa.bytes))), step, source, k_stride, column_stride, I64(k)]
            b.call(_pack_strip(module, isa, kind), [*arguments, there])
    b.ret_void()
    return made


def _pack_strip(module: ir.Module, isa: Isa, kind: ir.Type) -> ir.Function:
    """Pack the columns of one vector, ``there`` of which exist; the rows of the strip lie ``step`` bytes apart."""
    made = _internal(module, f"pack.{suffix(kind)}.strip", [PTR, I64, PTR, I64, I64, I64, I64])
    if made.blocks:
        return made
    target, step, source, k_stride, column_stride, k, there = made.args
    b = ir.IRBuilder(made.append_basic_block("entry"))
    lanes = _lanes(isa, kind)
    whole = vector(kind, lanes)
    element = I64(isa.bytes // lanes)
    side = min(lanes, _SQUARE)
    full = b.icmp_signed("==", there, I64(lanes))
    copied = b.and_(full, b.icmp_signed("==", column_stride, element))
    with counted(b, 0, b.select(copied, k, I64(0)), name="copy") as i:
        store(b, load(b, at(b, source, b.mul(i, k_stride)), whole), at(b, target, b.mul(i, step)), isa.bytes)
    with counted(b, 0, b.select(full, I64(0), k), name="clear") as i:
        store(b, constant(whole, 0), at(b, target, b.mul(i, step)), isa.bytes)
    rest = b.select(copied, I64(0), there)
    in_squares = b.select(b.icmp_signed("==", k_stride, element), b.and_(rest, I64(-side)), I64(0))
    rows_in_squares = b.and_(k, I64(-side))
    with counted(b, 0, in_squares, side, name="column") as c, counted(b, 0, rows_in_squares, side, name="row") as i:
        corner = at(b, at(b, source, b.mul(c, column_stride)), b.mul(i, element))
        lines = [load(b, place, vector(kind, side)) for place in _rows(b, corner, column_stride, side)]
        goal = at(b, at(b, target, b.mul(c, element)), b.mul(i, step))
        for line, place in zip(_transposed(b, lines), _rows(b, goal, step, side), strict=True):
            store(b, line, place)
    with counted(b, 0, b.select(copied, I64(0), k), name="single") as i:
        first = b.select(b.icmp_signed("<", i, rows_in_squares), in_squares, I64(0))
        with counted(b, first, rest) as c:
            number = load(b, at(b, at(b, source, b.mul(c, column_stride)), b.mul(i, k_stride)), kind)
            store(b, number, at(b, at(b, target, b.mul(c, element)), b.mul(i, step)))
    b.ret_void()
    return made


def _transposed(b: ir.IRBuilder, lines: list[ir.Value]) -> list[ir.Value]:
    """The columns of a square, its side a power of two: the halves interleaved until every line has met the others."""
    half = len(lines) // 2
    low = ir.Constant(ir.VectorType(I32, 2 * half), [i // 2 + i % 2 * 2 * half for i in range(2 * half)])
    high = ir.Constant(ir.VectorType(I32, 2 * half), [half + i // 2 + i % 2 * 2 * half for i in range(2 * half)])
    for _ in range(half.bit_length()):
        pairs = list(zip(lines[:half], lines[half:], strict=True))
        lines = [b.shuffle_vector(x, y, mask) for x, y in pairs for mask in (low, high)]
    return lines


def _call_by_shape(
    b: ir.IRBuilder, isa: Isa, kind: ir.Type, columns: int, panel: ir.Value, rows: ir.Value, arguments: list[ir.Value]
) -> None:
    """Call the micro-kernel for the width of a panel and a number of rows, both known only when it runs."""
    widths = panels(columns, isa, kind)
    tails = [0] * (len(widths) - 1) + [columns % _lanes(isa, kind)]
    shapes = list(dict.fromkeys(zip(widths, tails, strict=True)))
    shape = I64(len(shapes) - 1)
    for index in reversed(range(len(shapes) - 1)):
        after = max(i for i, found in enumerate(zip(widths, tails, strict=True)) if found == shapes[index]) + 1
        shape = b.select(b.icmp_signed("<", panel, I64(after)), I64(index), shape)
    highest = isa.tile[0]
    end = b.append_basic_block("called")
    choice = b.switch(b.add(b.mul(shape, I64(highest)), rows), end)
    for index, (vectors, tail) in enumerate(shapes):
        for height in range(1, highest + 1):
            block = b.append_basic_block(f"call.{height}x{vectors}")
            choice.add_case(I64(index * highest + height), block)
            b.position_at_end(block)
            b.call(micro_kernel(b.module, isa, kind, height, vectors, tail), arguments)
            b.branch(end)
    b.position_at_end(end)


def _place(b: ir.IRBuilder, panel: ir.Value, widths: list[int]) -> tuple[ir.Value, ir.Value]:
    """The first vector of a panel and how many it has."""
    narrow, wide = widths[-1], sum(width > widths[-1] for width in widths)
    start = b.add(b.mul(panel, I64(narrow)), intrinsic(b, "llvm.smin.i64", I64, [panel, I64(wide)]))
    return start, b.add(I64(narrow), b.zext(b.icmp_signed("<", panel, I64(wide)), I64))


def _depth(k: int, isa: Isa, width: int) -> int:
    """Rows of a panel in one block: as many as the cache holds, all blocks of about one size."""
    most = max(_CACHE // (width * isa.bytes), 1)
    count = -(-k // most)
    return min(-(-k // count + 7) // 8 * 8, k) if count > 1 else k


def _apart(sums: int, isa: Isa) -> int:
    """Over how many k a tile keeps its sums apart, a power of two."""
    apart = 1
    while sums * apart < _SUMS and 2 * sums * apart <= isa.registers - 4:
        apart *= 2
    return apart


def _lanes(isa: Isa, kind: ir.Type) -> int:
    return isa.lanes(32 if kind is F32 else 64)


def _internal(module: ir.Module, name: str, arguments: list[ir.Type]) -> ir.Function:
    """A function for this module alone that is never copied into its callers; new where it has no blocks."""
    made = function(module, name, VOID, arguments)
    made.linkage = "internal"
    made.attributes.add("noinline")
    return made


def _rows(b: ir.IRBuilder, pointer: ir.Value, stride: ir.Value, rows: int) -> list[ir.Value]:
    """The address of every row."""
    return [at(b, pointer, b.mul(stride, I64(r))) for r in range(rows)]


def _read(b: ir.IRBuilder, place: ir.Value, whole: ir.Type, mask: ir.Value | None) -> ir.Value:
    return load(b, place, whole) if mask is None else masked_load(b, place, whole, mask)


def _write(b: ir.IRBuilder, value: ir.Value, place: ir.Value, mask: ir.Value | None) -> None:
    if mask is None:
        store(b, value, place)
    else:
        masked_store(b, value, place, mask)


def _multiply_add(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """x y + z, rounded once where the processor can; elsewhere a product and a sum, not a call for each number."""
    return intrinsic(b, f"llvm.fmuladd.{suffix(x.type)}", x.type, [x, y, z])


def _together(b: ir.IRBuilder, groups: list[list[ir.Value]]) -> list[ir.Value]:
    """The sum of the groups, by halves."""
    if len(groups) == 1:
        return groups[0]
    half = len(groups) // 2
    pairs = zip(_together(b, groups[:half]), _together(b, groups[half:]), strict=True)
    return [b.fadd(x, y) for x, y in pairs]
