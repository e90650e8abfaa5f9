"""Matrix products with packed weights: out = init + left W, by micro-kernels that keep a tile of out in registers.

W (K, N) is packed once into *panels* of a few vectors of columns: the K rows of a panel lie one after the other, so
that a product reads its weights in the order in which they lie in memory. A tile is some rows of ``left`` by one panel;
K is cut into blocks so that the block of a panel stays in the first-level cache while all the rows pass over it.

    for panel:  for block of K:  for block of rows:  out[rows, panel] (+)= left[rows, block] W[block, panel]

The blocking is that of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34 (2008).
``left`` need not be packed: a recurrent step has too few rows to pay for it. For a product of many rows there is
``pack_left``. Every function is made for one shape, or, given no shape, for all: k and columns are arguments then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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

__all__ = ["depth_of", "micro_kernel", "pack", "pack_left", "packed_bytes", "panel_count", "panels", "product"]

Tile = Callable[[ir.Value], tuple[ir.Value, ir.Value]]

_CACHE = 24 * 1024
"""Bytes of a panel's block: half of a usual first-level cache, the rest is for the rows."""

_SUMS = 12
"""Sums that a micro-kernel keeps apart: two fused multiply-adds start a cycle, and each takes four to five."""

_SQUARE = 8
"""Largest side of the squares that are transposed in registers while packing."""

_CHUNK = 32
"""Rows of a matrix that are packed whole before the next: as many as a cache takes, whatever lies between them."""

_TOGETHER = 4
"""Tiles of rows side by side that are packed at once, so that a cache line is read at once."""

_ANY = -1
"""The tail of a micro-kernel that is told how many lanes there are."""


def panels(columns: int, isa: Isa, kind: ir.Type) -> list[int]:
    """Width in vectors of every panel of a weight with so many columns: a tile's or a little less, widest first."""
    vectors = -(-columns // _lanes(isa, kind))
    count = -(-vectors // isa.tile[1])
    narrow, wide = divmod(vectors, count)
    return [narrow + 1] * wide + [narrow] * (count - wide)


def packed_bytes(k: int, columns: int, isa: Isa, kind: ir.Type) -> int:
    """Bytes of a packed weight (k, columns): its panels, filled up with zeros to whole vectors."""
    return k * isa.bytes * sum(panels(columns, isa, kind))


def panel_count(b: ir.IRBuilder, isa: Isa, kind: ir.Type, columns: ir.Value) -> ir.Value:
    """How many panels so many columns have, where that is known only when it runs."""
    return _any_columns(b, isa, kind, columns).count


def depth_of(isa: Isa) -> int:
    """The most rows of a panel that are one block."""
    return _CACHE // (isa.tile[1] * isa.bytes)


def product(
    module: ir.Module, isa: Isa, kind: ir.Type, k: int | None = None, columns: int | None = None
) -> ir.Function:
    """The function that computes out = init + left W for the panels of a weight (k, columns) from first to below last.

        void(ptr out, i64 out_stride, ptr init, i64 init_stride, ptr left, i64 left_stride, ptr packed,
             i64 rows, i64 first_panel, i64 last_panel)

    Strides are bytes from row to row. ``init`` may be ``out`` itself, or one row with stride 0. Nothing outside the
    rows and the columns of the panels is read or written. The order of a sum depends on the shape of its tile and on
    nothing else, so a result does not depend on how panels are shared between threads.

    Without a shape there are four arguments more:

        i64 left_step, i64 tile_stride, i64 k, i64 columns

    ``left_step`` are the bytes from k to k. ``tile_stride`` is 0, or the bytes from tile to tile of a ``left`` that
    ``pack_left`` made.
    """
    general = k is None or columns is None
    name = f"product.{suffix(kind)}" + ("" if general else f".{k}x{columns}")
    made = _internal(module, name, [PTR, I64, PTR, I64, PTR, I64, PTR, I64, I64, I64] + [I64] * 4 * general)
    if made.blocks:
        return made
    out, out_stride, init, init_stride, left, left_stride, packed, rows, first_panel, last_panel, *more = made.args
    b = ir.IRBuilder(made.append_basic_block("entry"))
    element = I64(isa.bytes // _lanes(isa, kind))
    if k is None or columns is None:
        left_step, tile_stride, length, width_of_all = more
        split = _any_columns(b, isa, kind, width_of_all)
        depth = _any_depth(b, length, isa)
    else:
        left_step, tile_stride, length = element, I64(0), I64(k)
        split = _columns(columns, isa, kind)
        depth = I64(_depth(k, isa, panels(columns, isa, kind)[0]))
    blocks, tile = (_full_tiles if general else _even_tiles)(b, rows, isa)
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
                if general:
                    begin = b.select(b.icmp_signed("!=", tile_stride, I64(0)), b.mul(block, tile_stride), begin)
                arguments = [
                    at(b, target, b.mul(row, out_stride)), out_stride,
                    at(b, source, b.mul(row, source_stride)), source_stride,
                    at(b, factors, begin), left_stride,
                    block_weights, count, *([left_step, split.tail] if general else []),
                ]  # fmt: skip
                _call_by_shape(b, isa, kind, split, panel, height, arguments)
    b.ret_void()
    return made


def micro_kernel(
    module: ir.Module, isa: Isa, kind: ir.Type, rows: int, vectors: int, tail: int = 0, general: bool = False
) -> ir.Function:
    """One tile: out[rows, vectors] = source + left[rows, count] weights[count, vectors], the sums in registers.

        void(ptr out, i64 out_stride, ptr source, i64 source_stride, ptr left, i64 left_stride, ptr weights, i64 count)

    Of the last vector of out and source only ``tail`` lanes exist, where it is not 0. Small tiles run several sums over
    every few k and add them at the end, since one sum alone would wait for itself. A ``general`` one has two arguments
    more: the bytes of ``left`` from k to k, and how many lanes exist, which counts where ``tail`` is negative.
    """
    name = f"tile.{suffix(kind)}.{rows}x{vectors}" + (f".{tail}" if tail > 0 else ".any" if tail else "")
    name += ".general" if general else ""
    made = _internal(module, name, [PTR, I64, PTR, I64, PTR, I64, PTR, I64] + [I64] * 2 * general)
    if made.blocks:
        return made
    out, out_stride, source, source_stride, left, left_stride, weights, count, *more = made.args
    b = ir.IRBuilder(made.append_basic_block("entry"))
    lanes = _lanes(isa, kind)
    left_step = more[0] if general else I64(isa.bytes // lanes)
    whole = vector(kind, lanes)
    mask = lanes_below(tail, lanes) if tail > 0 else _mask(b, more[1], lanes) if tail else None
    factors = _rows(b, left, left_stride, rows)
    places = [[at(b, row, v * isa.bytes) for v in range(vectors)] for row in _rows(b, source, source_stride, rows)]

    def step(k: ir.Value, sums: Sequence[ir.Value], further: int = 0) -> list[ir.Value]:
        here = at(b, weights, b.mul(k, I64(vectors * isa.bytes)))
        w = [load(b, at(b, here, (further * vectors + v) * isa.bytes), whole, isa.bytes) for v in range(vectors)]
        offset = b.mul(b.add(k, I64(further)), left_step)
        x = [splat(b, load(b, at(b, factor, offset), kind), lanes) for factor in factors]
        return [_multiply_add(b, x[i // vectors], w[i % vectors], value) for i, value in enumerate(sums)]

    apart = _apart(rows * vectors, isa)
    size = rows * vectors

    def steps(k: ir.Value, sums: Sequence[ir.Value]) -> list[ir.Value]:
        return [value for u in range(apart) for value in step(k, sums[u * size : (u + 1) * size], u)]

    sums = [_read(b, place, whole, mask if v == vectors - 1 else None) for row in places for v, place in enumerate(row)]
    whole_steps = b.sub(count, b.urem(count, I64(apart)))
    many = folded(b, (0, whole_steps, apart), sums + [constant(whole, 0)] * (size * (apart - 1)), steps)
    sums = _together(b, [many[u * size : (u + 1) * size] for u in range(apart)])
    if apart > 1:
        sums = folded(b, (whole_steps, count, 1), sums, step)
    for r, row in enumerate(_rows(b, out, out_stride, rows)):
        for v in range(vectors):
            _write(b, sums[r * vectors + v], at(b, row, v * isa.bytes), mask if v == vectors - 1 else None)
    b.ret_void()
    return made


def pack(module: ir.Module, isa: Isa, kind: ir.Type, k: int | None = None, columns: int | None = None) -> ir.Function:
    """The function that packs the panels of a weight (k, columns) from first to below last.

        void(ptr packed, ptr weight, i64 k_stride, i64 column_stride, i64 first_panel, i64 last_panel)

    The strides are bytes of any value; it is fast where one of them is the size of an element. ``packed`` has
    ``packed_bytes`` bytes and is aligned to 64. Without a shape, ``i64 k, i64 columns`` are two arguments more.
    """
    general = k is None or columns is None
    name = f"pack.{suffix(kind)}" + ("" if general else f".{k}x{columns}")
    made = _internal(module, name, [PTR, PTR, I64, I64, I64, I64] + [I64] * 2 * general)
    if made.blocks:
        return made
    packed, weight, k_stride, column_stride, first_panel, last_panel, *more = made.args
    b = ir.IRBuilder(made.append_basic_block("entry"))
    lanes = _lanes(isa, kind)
    if k is None or columns is None:
        length, width_of_all = more
        split = _any_columns(b, isa, kind, width_of_all)
    else:
        length, width_of_all, split = I64(k), I64(columns), _columns(columns, isa, kind)
    with counted(b, first_panel, last_panel, name="panel") as panel:
        start, width = split.place(b, panel)
        target = at(b, packed, b.mul(start, b.mul(length, I64(isa.bytes))))
        with counted(b, 0, width, name="strip") as strip:
            column = b.mul(b.add(start, strip), I64(lanes))
            there = intrinsic(b, "llvm.smin.i64", I64, [I64(lanes), b.sub(width_of_all, column)])
            step = b.mul(width, I64(isa.bytes))
            source = at(b, weight, b.mul(column, column_stride))
            arguments = [at(b, target, b.mul(strip, I64(isa.bytes))), step, source, k_stride, column_stride, length]
            b.call(_pack_strip(module, isa, kind, lanes), [*arguments, there])
    b.ret_void()
    return made


def pack_left(module: ir.Module, isa: Isa, kind: ir.Type) -> ir.Function:
    """The function that packs some rows of ``left``: of every tile its rows lie side by side, one k after the other.

        void(ptr packed, i64 tile_stride, ptr left, i64 left_stride, i64 left_step, i64 rows, i64 k)

    Strides are bytes of any value: from tile to tile of what is packed, k times ``isa.tile[0]`` numbers at least, and
    of ``left`` from row to row and from k to k. For ``product`` the packed rows are one number apart, and the k as many
    as a tile has rows.
    """
    made = _internal(module, f"pack.{suffix(kind)}.left", [PTR, I64, PTR, I64, I64, I64, I64])
    if made.blocks:
        return made
    packed, tile_stride, left, left_stride, left_step, rows, length = made.args
    b = ir.IRBuilder(made.append_basic_block("entry"))
    step = I64(isa.tile[0] * (isa.bytes // _lanes(isa, kind)))
    blocks, tile = _full_tiles(b, rows, isa)
    strip = _pack_strip(module, isa, kind, isa.tile[0])
    neighbours = b.icmp_signed("==", left_stride, I64(isa.bytes // _lanes(isa, kind)))
    together = b.udiv(rows, I64(_TOGETHER * isa.tile[0]))
    in_groups = b.select(neighbours, b.mul(together, I64(_TOGETHER)), I64(0))
    with counted(b, 0, length, _CHUNK, name="chunk") as k:
        count = intrinsic(b, "llvm.smin.i64", I64, [I64(_CHUNK), b.sub(length, k)])
        goal, origin = at(b, packed, b.mul(k, step)), at(b, left, b.mul(k, left_step))
        with counted(b, 0, in_groups, _TOGETHER, name="group") as block:
            targets = _rows(b, at(b, goal, b.mul(block, tile_stride)), tile_stride, _TOGETHER)
            source = at(b, origin, b.mul(block, step))
            with counted(b, 0, count) as i:
                line, further = at(b, source, b.mul(i, left_step)), b.mul(i, step)
                parts = [load(b, place, vector(kind, isa.tile[0])) for place in _rows(b, line, step, _TOGETHER)]
                for part, target in zip(parts, targets, strict=True):
                    store(b, part, at(b, target, further))
        with counted(b, in_groups, blocks, name="tile") as block:
            row, height = tile(block)
            target, source = at(b, goal, b.mul(block, tile_stride)), at(b, origin, b.mul(row, left_stride))
            b.call(strip, [target, step, source, left_step, left_stride, count, height])
    b.ret_void()
    return made


def _pack_strip(module: ir.Module, isa: Isa, kind: ir.Type, lanes: int) -> ir.Function:
    """Pack so many columns, ``there`` of which exist, side by side; the rows of the strip lie ``step`` bytes apart."""
    made = _internal(module, f"pack.{suffix(kind)}.strip{lanes}", [PTR, I64, PTR, I64, I64, I64, I64])
    if made.blocks:
        return made
    target, step, source, k_stride, column_stride, k, there = made.args
    b = ir.IRBuilder(made.append_basic_block("entry"))
    whole = vector(kind, lanes)
    element = I64(isa.bytes // _lanes(isa, kind))
    side = min(1 << (lanes.bit_length() - 1), _SQUARE)
    full = b.icmp_signed("==", there, I64(lanes))
    copied = b.icmp_signed("==", column_stride, element)
    with counted(b, 0, b.select(b.and_(full, copied), k, I64(0)), name="copy") as i:
        store(b, load(b, at(b, source, b.mul(i, k_stride)), whole), at(b, target, b.mul(i, step)))
    mask = _mask(b, there, lanes)
    with counted(b, 0, b.select(b.and_(b.not_(full), copied), k, I64(0)), name="part") as i:
        store(b, masked_load(b, at(b, source, b.mul(i, k_stride)), whole, mask), at(b, target, b.mul(i, step)))
    with counted(b, 0, b.select(b.or_(full, copied), I64(0), k), name="clear") as i:
        store(b, constant(whole, 0), at(b, target, b.mul(i, step)))
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


@dataclass(frozen=True)
class _Columns:
    """The columns of a weight: ``wide`` panels with a vector more than ``narrow``, and the rest of ``count`` with that.

    ``tail`` lanes of the last vector exist, all where it is 0. ``shapes`` are the widths of panels with the tail that a
    micro-kernel is made for, ``after`` for every shape but the last the panel before which it ends; empty where only
    the values tell.
    """

    count: ir.Value
    narrow: ir.Value
    wide: ir.Value
    tail: ir.Value
    shapes: list[tuple[int, int]]
    after: list[int]

    @property
    def general(self) -> bool:
        """Whether the columns are known only when it runs."""
        return len(self.shapes) != len(self.after) + 1

    def place(self, b: ir.IRBuilder, panel: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The first vector of a panel and how many it has."""
        start = b.add(b.mul(panel, self.narrow), intrinsic(b, "llvm.smin.i64", I64, [panel, self.wide]))
        return start, b.add(self.narrow, b.zext(b.icmp_signed("<", panel, self.wide), I64))

    def shape(self, b: ir.IRBuilder, panel: ir.Value) -> ir.Value:
        """Which of the shapes a panel has."""
        if not self.general:
            found = I64(len(self.shapes) - 1)
            for index, after in reversed(list(enumerate(self.after))):
                found = b.select(b.icmp_signed("<", panel, I64(after)), I64(index), found)
            return found
        last = b.icmp_signed("==", panel, b.sub(self.count, I64(1)))
        cut = b.and_(last, b.icmp_signed("!=", self.tail, I64(0)))
        return b.add(b.sub(self.place(b, panel)[1], I64(1)), b.select(cut, I64(len(self.shapes) // 2), I64(0)))


def _columns(columns: int, isa: Isa, kind: ir.Type) -> _Columns:
    """The panels of so many columns."""
    widths = panels(columns, isa, kind)
    tail = columns % _lanes(isa, kind)
    all_shapes = list(zip(widths, [0] * (len(widths) - 1) + [tail], strict=True))
    shapes = list(dict.fromkeys(all_shapes))
    after = [max(i for i, found in enumerate(all_shapes) if found == shape) + 1 for shape in shapes[:-1]]
    wide = sum(width > widths[-1] for width in widths)
    return _Columns(I64(len(widths)), I64(widths[-1]), I64(wide), I64(tail), shapes, after)


def _any_columns(b: ir.IRBuilder, isa: Isa, kind: ir.Type, columns: ir.Value) -> _Columns:
    """The same, for a number of columns, one at least, that is known only when it runs."""
    lanes, widest = _lanes(isa, kind), isa.tile[1]
    vectors = _ceil(b, columns, lanes)
    count = _ceil(b, vectors, widest)
    narrow = b.udiv(vectors, count)
    wide = b.sub(vectors, b.mul(narrow, count))
    shapes = [(width, tail) for tail in (0, _ANY) for width in range(1, widest + 1)]
    return _Columns(count, narrow, wide, b.urem(columns, I64(lanes)), shapes, [])


def _call_by_shape(
    b: ir.IRBuilder, isa: Isa, kind: ir.Type, columns: _Columns, panel: ir.Value, rows: ir.Value, args: list[ir.Value]
) -> None:
    """Call the micro-kernel for the width of a panel and a number of rows, both known only when it runs."""
    highest = isa.tile[0]
    end = b.append_basic_block("called")
    choice = b.switch(b.add(b.mul(columns.shape(b, panel), I64(highest)), rows), end)
    for index, (vectors, tail) in enumerate(columns.shapes):
        for height in range(1, highest + 1):
            block = b.append_basic_block(f"call.{height}x{vectors}")
            choice.add_case(I64(index * highest + height), block)
            b.position_at_end(block)
            b.call(micro_kernel(b.module, isa, kind, height, vectors, tail, columns.general), args)
            b.branch(end)
    b.position_at_end(end)


def _even_tiles(b: ir.IRBuilder, rows: ir.Value, isa: Isa) -> tuple[ir.Value, Tile]:
    """Rows cut into tiles of about one size: how many tiles, and the first row and the rows of each."""
    blocks = _ceil(b, rows, isa.tile[0])
    each = b.udiv(rows, intrinsic(b, "llvm.umax.i64", I64, [blocks, I64(1)]))
    larger = b.sub(rows, b.mul(each, blocks))

    def tile(block: ir.Value) -> tuple[ir.Value, ir.Value]:
        row = b.add(b.mul(block, each), intrinsic(b, "llvm.smin.i64", I64, [block, larger]))
        return row, b.add(each, b.zext(b.icmp_signed("<", block, larger), I64))

    return blocks, tile


def _full_tiles(b: ir.IRBuilder, rows: ir.Value, isa: Isa) -> tuple[ir.Value, Tile]:
    """Rows cut into full tiles and a last one: the same for a row in whatever share of all rows it is."""

    def tile(block: ir.Value) -> tuple[ir.Value, ir.Value]:
        row = b.mul(block, I64(isa.tile[0]))
        return row, intrinsic(b, "llvm.smin.i64", I64, [I64(isa.tile[0]), b.sub(rows, row)])

    return _ceil(b, rows, isa.tile[0]), tile


def _ceil(b: ir.IRBuilder, number: ir.Value, divisor: int) -> ir.Value:
    return b.udiv(b.add(number, I64(divisor - 1)), I64(divisor))


def _mask(b: ir.IRBuilder, count: ir.Value, lanes: int) -> ir.Value:
    """``lanes_below`` for a count that is known only when it runs."""
    kind = ir.VectorType(I64, lanes)
    numbers = ir.Constant(kind, [ir.Constant(I64, i) for i in range(lanes)])
    return b.icmp_unsigned("<", numbers, splat(b, count, lanes))


def _depth(k: int, isa: Isa, width: int) -> int:
    """Rows of a panel in one block: as many as the cache holds, all blocks of about one size."""
    most = max(_CACHE // (width * isa.bytes), 1)
    count = -(-k // most)
    return min(-(-k // count + 7) // 8 * 8, k) if count > 1 else k


def _any_depth(b: ir.IRBuilder, k: ir.Value, isa: Isa) -> ir.Value:
    """The same for a k that is known only when it runs, and the widest panels."""
    count = _ceil(b, k, depth_of(isa))
    even = b.udiv(b.add(k, b.sub(count, I64(1))), intrinsic(b, "llvm.umax.i64", I64, [count, I64(1)]))
    return b.and_(b.add(even, I64(7)), I64(-8))


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
