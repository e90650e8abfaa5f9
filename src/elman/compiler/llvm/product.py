"""Matrix products with packed weights: out = init + left W, by micro-kernels that keep a tile of out in registers.

W (K, N) is packed once into *panels* of a few vectors of columns (see ``panel``), so that a product reads its weights
in the order in which they lie in memory. A tile is some rows of ``left`` by one panel; K is cut into blocks so that the
block of a panel stays in the first-level cache while all the rows pass over it.

    for panel:  for block of K:  for block of rows:  out[rows, panel] (+)= left[rows, block] W[block, panel]

The blocking is that of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34 (2008).
``left`` need not be packed: a recurrent step has too few rows to pay for it. For a product of many rows there is
``pack_left``. Every function is made for one shape, or, given no shape, for all: k and columns are arguments then.

What the numbers are is the *numeric mode* (see ``numeric``), asked for by a type: F32, F64 or BF16. In BF16 out and
init are float32, the weight is packed as pairs of bfloat16, and ``left`` are rows that ``narrow`` or ``pack_left``
made; where the processor multiplies pairs, rows of bfloat16 of an even k are such rows as they lie.
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
    intrinsic,
    lanes_below,
    load,
    masked_load,
    masked_store,
    store,
    suffix,
    vector,
)  # fmt: skip
from .isa import Isa
from .numeric import Numeric, numeric
from .panel import (
    Columns,
    Tile,
    any_columns,
    ceil,
    columns_of,
    full_tiles,
    internal,
    left_bytes,
    mask_below,
    narrow,
    pack,
    pack_left,
    packed_bytes,
    panel_count,
    panels,
    rows_at,
    rows_narrowed,
)  # fmt: skip
from .tiles import release, tile_kernel

__all__ = [
    "depth_of", "left_bytes", "micro_kernel", "narrow", "pack", "pack_left", "packed_bytes", "panel_count", "panels",
    "product", "rows_narrowed",
]  # fmt: skip

_CACHE = 24 * 1024
"""Bytes of a panel's block: half of a usual first-level cache, the rest is for the rows."""

_SECOND_CACHE = 96 * 1024
"""The same for a product of any shape: what streams from a second-level cache past the rows of one tile at a time."""

_PREFETCHING = 4
"""Rows of a tile that leave time to ask for the next block of a panel; with fewer, reading it is all there is to do."""


def depth_of(isa: Isa, kind: ir.Type = F32) -> int:
    """The most rows of a weight that a product without a shape should be given at a time: they are one block."""
    mode = numeric(isa, kind)
    elements = _SECOND_CACHE // (mode.tile[1] * isa.bytes) // len(mode.weights)
    return elements * mode.group // mode.whole * mode.whole


def product(
    module: ir.Module, isa: Isa, kind: ir.Type, k: int | None = None, columns: int | None = None
) -> ir.Function:
    """The function that computes out = init + left W for the panels of a weight (k, columns) from first to below last.

        void(ptr out, i64 out_stride, ptr init, i64 init_stride, ptr left, i64 left_stride, ptr packed,
             i64 rows, i64 first_panel, i64 last_panel)

    Strides are bytes from row to row. ``init`` may be ``out`` itself, or one row with stride 0. Nothing outside the
    rows and the columns of the panels is read or written. The order of a sum depends on the shape of its tile and on
    nothing else, so a result does not depend on how panels are shared between threads; in BF16 it depends on the width
    of the tile alone, so that neither does it on how rows are.

    Without a shape there are four arguments more:

        i64 left_step, i64 tile_stride, i64 k, i64 columns

    ``left_step`` are the bytes from element to element of a row of ``left``: from k to k, in BF16 from pair to pair.
    ``tile_stride`` is 0, or the bytes from tile to tile of a ``left`` that ``pack_left`` made. A matrix unit takes rows
    alone, their elements side by side, and needs neither.
    """
    general = k is None or columns is None
    mode = numeric(isa, kind)
    name = f"product.{suffix(kind)}" + ("" if general else f".{k}x{columns}")
    made = internal(module, name, [PTR, I64, PTR, I64, PTR, I64, PTR, I64, I64, I64] + [I64] * 4 * general)
    if made.blocks:
        return made
    out, out_stride, init, init_stride, left, left_stride, packed, rows, first_panel, last_panel, *more = made.args
    b = ir.IRBuilder(made.append_basic_block("entry"))
    if k is None or columns is None:
        left_step, tile_stride, every_k, width_of_all = more
        length = mode.elements_of(b, every_k)
        split = any_columns(b, isa, kind, width_of_all)
        depth = length
        blocks, tile = full_tiles(b, rows, mode.tile[0])
    else:
        left_step, tile_stride, length = I64(mode.left.size), I64(0), I64(mode.elements(k))
        split = columns_of(columns, isa, kind)
        depth = I64(_depth(mode, mode.elements(k), isa, panels(columns, isa, kind)[0]))
        blocks, tile = (full_tiles if mode.unit else _even_tiles)(b, rows, mode.tile[0])
    with counted(b, first_panel, last_panel, name="panel") as panel:
        start, width = split.place(b, panel)
        weights = at(b, packed, b.mul(start, b.mul(length, I64(isa.bytes))))
        column = b.mul(start, I64(isa.bytes))
        target = at(b, out, column)
        with counted(b, 0, length, depth, name="depth") as done:
            count = intrinsic(b, "llvm.smin.i64", I64, [depth, b.sub(length, done)])
            new = b.icmp_signed("==", done, I64(0))
            source = b.select(new, at(b, init, column), target)
            source_stride = b.select(new, init_stride, out_stride)
            factors = at(b, left, b.mul(done, left_step))
            block_weights = at(b, weights, b.mul(b.mul(done, width), I64(isa.bytes)))
            with counted(b, 0, blocks, name="rows") as block:
                row, height = tile(block)
                begin = b.mul(row, left_stride)
                if general and not mode.unit:
                    begin = b.select(b.icmp_signed("!=", tile_stride, I64(0)), b.mul(block, tile_stride), begin)
                arguments = [
                    at(b, target, b.mul(row, out_stride)), out_stride,
                    at(b, source, b.mul(row, source_stride)), source_stride,
                    at(b, factors, begin), left_stride,
                    block_weights, count,
                ]  # fmt: skip
                if mode.unit:
                    _call_unit(b, isa, mode, split, panel, height, arguments)
                else:
                    arguments += [left_step, split.tail] if general else []
                    _call_by_shape(b, isa, mode, split, panel, height, arguments)
    if mode.unit:
        release(b, mode.unit)
    b.ret_void()
    return made


def micro_kernel(
    module: ir.Module, isa: Isa, kind: ir.Type, rows: int, vectors: int, tail: int = 0, general: bool = False
) -> ir.Function:
    """One tile: out[rows, vectors] = source + left[rows, count] weights[count, vectors], the sums in registers.

        void(ptr out, i64 out_stride, ptr source, i64 source_stride, ptr left, i64 left_stride, ptr weights, i64 count)

    ``count`` are elements. Of the last vector of out and source only ``tail`` lanes exist, where it is not 0. Tiles may
    run several sums over every few elements and add them at the end (see ``Numeric.apart``). A ``general`` one has two
    arguments more: the bytes of ``left`` from element to element, and how many lanes exist, which counts where ``tail``
    is negative.
    """
    name = f"tile.{suffix(kind)}.{rows}x{vectors}" + (f".{tail}" if tail > 0 else ".any" if tail else "")
    name += ".general" if general else ""
    made = internal(module, name, [PTR, I64, PTR, I64, PTR, I64, PTR, I64] + [I64] * 2 * general)
    if made.blocks:
        return made
    out, out_stride, source, source_stride, left, left_stride, weights, count, *more = made.args
    b = ir.IRBuilder(made.append_basic_block("entry"))
    mode = numeric(isa, kind)
    lanes = mode.lanes(isa)
    left_step = more[0] if general else I64(mode.left.size)
    whole = vector(mode.sums, lanes)
    mask = lanes_below(tail, lanes) if tail > 0 else mask_below(b, more[1], lanes) if tail else None
    factors = rows_at(b, left, left_stride, rows)
    places = [[at(b, row, v * isa.bytes) for v in range(vectors)] for row in rows_at(b, source, source_stride, rows)]

    def step(k: ir.Value, sums: Sequence[ir.Value], further: int = 0) -> list[ir.Value]:
        here = at(b, weights, b.mul(k, I64(vectors * isa.bytes)))
        w = [
            mode.numbers(b, at(b, here, (further * vectors + v) * isa.bytes), lanes, isa.bytes) for v in range(vectors)
        ]
        if rows >= _PREFETCHING and not general:
            for v in range(vectors):
                _prefetch(b, at(b, at(b, here, ahead), (further * vectors + v) * isa.bytes))
        offset = b.mul(b.add(k, I64(further)), left_step)
        x = [mode.factors(b, at(b, factor, offset), lanes) for factor in factors]
        values = list(sums)
        for part in range(len(w[0])):
            values = [
                mode.multiply_add(b, x[i // vectors][part], w[i % vectors][part], value)
                for i, value in enumerate(values)
            ]
        return values

    ahead = b.mul(count, I64(vectors * isa.bytes))  # where the block after this one is, if it is as long
    apart = mode.apart(rows, vectors, isa)
    size = rows * vectors

    def steps(k: ir.Value, sums: Sequence[ir.Value]) -> list[ir.Value]:
        return [value for u in range(apart) for value in step(k, sums[u * size : (u + 1) * size], u)]

    sums = [_read(b, place, whole, mask if v == vectors - 1 else None) for row in places for v, place in enumerate(row)]
    whole_steps = b.sub(count, b.urem(count, I64(apart)))
    many = folded(b, (0, whole_steps, apart), sums + [constant(whole, 0)] * (size * (apart - 1)), steps)
    sums = _together(b, [many[u * size : (u + 1) * size] for u in range(apart)])
    if apart > 1:
        sums = folded(b, (whole_steps, count, 1), sums, step)
    for r, row in enumerate(rows_at(b, out, out_stride, rows)):
        for v in range(vectors):
            _write(b, sums[r * vectors + v], at(b, row, v * isa.bytes), mask if v == vectors - 1 else None)
    b.ret_void()
    return made


def _call_by_shape(
    b: ir.IRBuilder, isa: Isa, mode: Numeric, columns: Columns, panel: ir.Value, rows: ir.Value, args: list[ir.Value]
) -> None:
    """Call the micro-kernel for the width of a panel and a number of rows, both known only when it runs."""
    highest = mode.tile[0]
    end = b.append_basic_block("called")
    choice = b.switch(b.add(b.mul(columns.shape(b, panel), I64(highest)), rows), end)
    for index, (vectors, tail) in enumerate(columns.shapes):
        for height in range(1, highest + 1):
            block = b.append_basic_block(f"call.{height}x{vectors}")
            choice.add_case(I64(index * highest + height), block)
            b.position_at_end(block)
            b.call(micro_kernel(b.module, isa, mode.kind, height, vectors, tail, columns.general), args)
            b.branch(end)
    b.position_at_end(end)


def _call_unit(
    b: ir.IRBuilder, isa: Isa, mode: Numeric, columns: Columns, panel: ir.Value, rows: ir.Value, args: list[ir.Value]
) -> None:
    """Call the micro-kernel of the matrix unit for the width of a panel and a number of rows."""
    assert mode.unit is not None
    width = columns.place(b, panel)[1]
    last = b.icmp_signed("==", panel, b.sub(columns.count, I64(1)))
    tail = b.select(last, columns.tail, I64(0))
    high = b.zext(b.icmp_signed(">", rows, I64(mode.unit.rows)), I64)
    end = b.append_basic_block("called")
    choice = b.switch(b.add(b.mul(width, I64(2)), high), end)
    widths = range(1, mode.tile[1] + 1) if columns.general else sorted({vectors for vectors, _ in columns.shapes})
    for vectors in widths:
        for tall in (False, True):
            block = b.append_basic_block(f"call.{vectors}")
            choice.add_case(I64(2 * vectors + tall), block)
            b.position_at_end(block)
            b.call(tile_kernel(b.module, isa, mode, tall, vectors), [*args, rows, tail])
            b.branch(end)
    b.position_at_end(end)


def _even_tiles(b: ir.IRBuilder, rows: ir.Value, height: int) -> tuple[ir.Value, Tile]:
    """Rows cut into tiles of about one size: how many tiles, and the first row and the rows of each."""
    blocks = ceil(b, rows, height)
    each = b.udiv(rows, intrinsic(b, "llvm.umax.i64", I64, [blocks, I64(1)]))
    larger = b.sub(rows, b.mul(each, blocks))

    def tile(block: ir.Value) -> tuple[ir.Value, ir.Value]:
        row = b.add(b.mul(block, each), intrinsic(b, "llvm.smin.i64", I64, [block, larger]))
        return row, b.add(each, b.zext(b.icmp_signed("<", block, larger), I64))

    return blocks, tile


def _depth(mode: Numeric, elements: int, isa: Isa, width: int) -> int:
    """Elements of a column in one block: as many as the cache holds, all blocks of about one size."""
    most = max(_CACHE // (width * isa.bytes), 1)
    count = -(-elements // most)
    together = max(8, mode.whole // mode.group)
    return min(-(-elements // (count * together)) * together, elements) if count > 1 else elements


def _prefetch(b: ir.IRBuilder, place: ir.Value) -> None:
    """Have what lies there brought to the first-level cache, to be read."""
    intrinsic(b, "llvm.prefetch.p0", VOID, [place, I32(0), I32(3), I32(1)])


def _read(b: ir.IRBuilder, place: ir.Value, whole: ir.Type, mask: ir.Value | None) -> ir.Value:
    return load(b, place, whole) if mask is None else masked_load(b, place, whole, mask)


def _write(b: ir.IRBuilder, value: ir.Value, place: ir.Value, mask: ir.Value | None) -> None:
    if mask is None:
        store(b, value, place)
    else:
        masked_store(b, value, place, mask)


def _together(b: ir.IRBuilder, groups: list[list[ir.Value]]) -> list[ir.Value]:
    """The sum of the groups, by halves."""
    if len(groups) == 1:
        return groups[0]
    half = len(groups) // 2
    pairs = zip(_together(b, groups[:half]), _together(b, groups[half:]), strict=True)
    return [b.fadd(x, y) for x, y in pairs]
