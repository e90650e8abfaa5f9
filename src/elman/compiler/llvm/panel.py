"""Panels: how the factors of a product lie in memory, and the functions that bring them there.

W (K, N) is packed into *panels* of a few vectors of columns: the K rows of a panel lie one after the other, so that a
product reads its weights in the order in which they lie. What lies there are *elements* of the numeric mode: numbers,
or pairs of neighbouring k. K is filled up with zeros to as many as are multiplied at once (``Numeric.whole``).

``left`` is read as it lies where its rows are elements already. Where a mode rounds them, ``narrow`` makes such rows of
others, once for each product; for a product of many rows ``pack_left`` makes tiles of them, but for a matrix unit,
which takes rows: for it ``pack_left`` makes such rows of a left that lies otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from .code import (
    I32,
    I64,
    PTR,
    VOID,
    at,
    constant,
    counted,
    function,
    intrinsic,
    load,
    masked_load,
    masked_store,
    splat,
    store,
    vector,
)  # fmt: skip
from .isa import Isa
from .numeric import Cell, Numeric, numeric

__all__ = [
    "ANY", "Columns", "Tile", "any_columns", "ceil", "columns_of", "full_tiles", "internal", "left_bytes", "mask_below",
    "narrow", "pack", "pack_left", "packed_bytes", "panel_count", "panels", "rows_at", "rows_narrowed",
]  # fmt: skip

Tile = Callable[[ir.Value], tuple[ir.Value, ir.Value]]

_SQUARE = 8
"""Largest side of the squares that are transposed in registers while packing."""

_CHUNK = 32
"""Rows of a matrix that are packed whole before the next: as many as a cache takes, whatever lies between them."""

_TOGETHER = 4
"""Tiles of rows side by side that are packed at once, so that a cache line is read at once."""

ANY = -1
"""The tail of a micro-kernel that is told how many lanes there are."""


def panels(columns: int, isa: Isa, kind: ir.Type) -> list[int]:
    """Width in vectors of every panel of a weight with so many columns: a tile's or a little less, widest first."""
    mode = numeric(isa, kind)
    vectors = -(-columns // mode.lanes(isa))
    count = -(-vectors // mode.tile[1])
    narrow, wide = divmod(vectors, count)
    return [narrow + 1] * wide + [narrow] * (count - wide)


def packed_bytes(k: int, columns: int, isa: Isa, kind: ir.Type) -> int:
    """Bytes of a packed weight (k, columns): its panels, filled up with zeros to whole vectors and elements."""
    return numeric(isa, kind).elements(k) * isa.bytes * sum(panels(columns, isa, kind))


def left_bytes(k: int, isa: Isa, kind: ir.Type) -> int:
    """Bytes of a row of ``left`` as a product of that kind reads it."""
    mode = numeric(isa, kind)
    return mode.elements(k) * mode.left.size


def panel_count(b: ir.IRBuilder, isa: Isa, kind: ir.Type, columns: ir.Value) -> ir.Value:
    """How many panels so many columns have, where that is known only when it runs."""
    return any_columns(b, isa, kind, columns).count


# -- packing ----------------------------------------------------------------------------------------------------------


def pack(
    module: ir.Module,
    isa: Isa,
    kind: ir.Type,
    k: int | None = None,
    columns: int | None = None,
    source: ir.Type | None = None,
) -> ir.Function:
    """The function that packs the panels of a weight (k, columns) from first to below last.

        void(ptr packed, ptr weight, i64 k_stride, i64 column_stride, i64 first_panel, i64 last_panel)

    The strides are bytes of any value; it is fast where one of them is the size of a number. ``packed`` has
    ``packed_bytes`` bytes and is aligned to 64. Without a shape, ``i64 k, i64 columns`` are two arguments more.
    ``source`` is the type of the weight's numbers where it is not ``kind``: F32 for a product of BF16.
    """
    general = k is None or columns is None
    mode = numeric(isa, kind, source)
    name = f"pack.{mode.weight.name}{'.rests' * mode.rests}" + ("" if general else f".{k}x{columns}")
    made = internal(module, name, [PTR, PTR, I64, I64, I64, I64] + [I64] * 2 * general)
    if made.blocks:
        return made
    packed, weight, k_stride, column_stride, first_panel, last_panel, *more = made.args
    b = ir.IRBuilder(made.append_basic_block("entry"))
    lanes = mode.lanes(isa)
    if k is None or columns is None:
        length, width_of_all = more
        split = any_columns(b, isa, kind, width_of_all)
    else:
        length, width_of_all, split = I64(k), I64(columns), columns_of(columns, isa, kind)
    bytes_of_vector = b.mul(mode.elements_of(b, length), I64(isa.bytes))
    written, every = ceil(b, length, mode.group), b.udiv(mode.elements_of(b, length), I64(len(mode.weights)))
    with counted(b, first_panel, last_panel, name="panel") as panel:
        start, width = split.place(b, panel)
        target = at(b, packed, b.mul(start, bytes_of_vector))
        with counted(b, 0, width, name="strip") as strip:
            column = b.mul(b.add(start, strip), I64(lanes))
            there = intrinsic(b, "llvm.smin.i64", I64, [I64(lanes), b.sub(width_of_all, column)])
            step = b.mul(width, I64(isa.bytes))
            origin = at(b, weight, b.mul(column, column_stride))
            for number, cell in enumerate(mode.weights):
                goal = at(b, at(b, target, b.mul(b.mul(every, I64(number)), step)), b.mul(strip, I64(isa.bytes)))
                arguments = [goal, step, origin, k_stride, column_stride, length, there]
                b.call(_pack_strip(module, cell, lanes), arguments)
                if mode.whole > mode.group:
                    with counted(b, written, every, name="fill") as i:
                        store(b, constant(vector(cell.kind, lanes), 0), at(b, goal, b.mul(i, step)))
    b.ret_void()
    return made


def pack_left(module: ir.Module, isa: Isa, kind: ir.Type, source: ir.Type | None = None) -> ir.Function:
    """The function that packs some rows of ``left``: of every tile its rows lie side by side, one k after the other.

        void(ptr packed, i64 tile_stride, ptr left, i64 left_stride, i64 left_step, i64 rows, i64 k)

    Strides are bytes of any value: from tile to tile of what is packed, ``left_bytes`` times the rows of a tile at
    least, and of ``left`` from row to row and from k to k. For ``product`` the packed rows are one element apart, and
    the elements of a row as many as a tile has rows. ``source`` is as for ``pack``.

    For a matrix unit it makes rows as ``narrow`` does, ``tile_stride`` bytes from row to row.
    """
    mode = numeric(isa, kind, source)
    if mode.unit:
        return _turned_rows(module, isa, mode)
    cell, height = mode.left, mode.tile[0]
    made = internal(module, f"pack.{cell.name}.left", [PTR, I64, PTR, I64, I64, I64, I64])
    if made.blocks:
        return made
    packed, tile_stride, left, left_stride, left_step, rows, length = made.args
    b = ir.IRBuilder(made.append_basic_block("entry"))
    step, across = I64(height * cell.size), I64(height * cell.item)
    blocks, tile = full_tiles(b, rows, height)
    strip = _pack_strip(module, cell, height)
    neighbours = b.icmp_signed("==", left_stride, I64(cell.item))
    together = b.udiv(rows, I64(_TOGETHER * height))
    in_groups = b.select(neighbours, b.mul(together, I64(_TOGETHER)), I64(0))
    with counted(b, 0, length, _CHUNK, name="chunk") as k:
        count = intrinsic(b, "llvm.smin.i64", I64, [I64(_CHUNK), b.sub(length, k)])
        goal, origin = at(b, packed, b.mul(b.udiv(k, I64(cell.group)), step)), at(b, left, b.mul(k, left_step))
        with counted(b, 0, in_groups, _TOGETHER, name="group") as block:
            targets = rows_at(b, at(b, goal, b.mul(block, tile_stride)), tile_stride, _TOGETHER)
            source_at = at(b, origin, b.mul(block, across))
            for first, end, present in _runs(b, cell, count):
                with counted(b, first, end) as i:
                    lines = _numbers_at(b, cell, source_at, left_step, i, present)
                    places = [[at(b, line, t * height * cell.item) for line in lines] for t in range(_TOGETHER)]
                    elements = [_across(b, cell, each, height) for each in places]
                    for element, target in zip(elements, targets, strict=True):
                        store(b, element, at(b, target, b.mul(i, step)))
        with counted(b, in_groups, blocks, name="tile") as block:
            row, there = tile(block)
            target, source_at = at(b, goal, b.mul(block, tile_stride)), at(b, origin, b.mul(row, left_stride))
            b.call(strip, [target, step, source_at, left_step, left_stride, count, there])
    b.ret_void()
    return made


def narrow(module: ir.Module, isa: Isa, kind: ir.Type, source: ir.Type | None = None) -> ir.Function:
    """The function that makes rows of ``left`` as ``product`` reads them: ``left_bytes`` each, from rows of ``source``.

        void(ptr out, i64 out_stride, ptr rows, i64 rows_stride, i64 count, i64 k)

    Strides are bytes from row to row; the numbers of a row are neighbours. Every row is worked on alone, so that it is
    the same whoever does it. ``source`` is as for ``pack``.
    """
    mode = numeric(isa, kind, source)
    return _rows_of_cells(module, isa, mode.lefts, mode.whole)


def rows_narrowed(module: ir.Module, isa: Isa, kind: ir.Type) -> ir.Function:
    """The function that rounds rows of the sums of a kind to rows of the kind itself: as ``narrow``, nothing added."""
    return _rows_of_cells(module, isa, [numeric(isa, kind, numeric(isa, kind).sums).weight], 1)


def _rows_of_cells(module: ir.Module, isa: Isa, cells: list[Cell], whole: int) -> ir.Function:
    """Rows of numbers to rows of what of an element they become, each filled up with zeros to a multiple of ``whole``.

    Of several cells those of one follow those of another.
    """
    cell = cells[0]
    name = f"rows.{cell.name}" + (".filled" if whole > 1 else "") + (f".{len(cells)}" if len(cells) > 1 else "")
    made = internal(module, name, [PTR, I64, PTR, I64, I64, I64])
    if made.blocks:
        return made
    out, out_stride, rows, rows_stride, count, k = made.args
    b = ir.IRBuilder(made.append_basic_block("entry"))
    lanes = isa.lanes(32)
    numbers_of, size = vector(cell.source, lanes), cell.part // 8
    in_vectors = b.and_(k, I64(-lanes))
    filled = b.mul(ceil(b, k, whole), I64(whole))
    with counted(b, 0, count, name="row") as row:
        target, source = at(b, out, b.mul(row, out_stride)), at(b, rows, b.mul(row, rows_stride))
        goals = rows_at(b, target, b.mul(filled, I64(size)), len(cells))
        with counted(b, 0, in_vectors, lanes) as i:
            numbers = load(b, at(b, source, b.mul(i, I64(cell.item))), numbers_of)
            for made_of, goal in zip(cells, goals, strict=True):
                store(b, made_of.parts(b, numbers), at(b, goal, b.mul(i, I64(size))))
        with counted(b, in_vectors, filled, lanes, name="rest") as i:
            there = intrinsic(b, "llvm.smax.i64", I64, [b.sub(k, i), I64(0)])
            present, written = mask_below(b, there, lanes), mask_below(b, b.sub(filled, i), lanes)
            numbers = masked_load(b, at(b, source, b.mul(i, I64(cell.item))), numbers_of, present)
            for made_of, goal in zip(cells, goals, strict=True):
                masked_store(b, made_of.parts(b, numbers), at(b, goal, b.mul(i, I64(size))), written)
    b.ret_void()
    return made


def _turned_rows(module: ir.Module, isa: Isa, mode: Numeric) -> ir.Function:
    """``pack_left`` for a matrix unit: rows filled up as ``narrow`` fills them, from a left of any strides."""
    cell, side = mode.left, _SQUARE
    made = internal(module, f"pack.{cell.name}.rows.{len(mode.lefts)}", [PTR, I64, PTR, I64, I64, I64, I64])
    if made.blocks:
        return made
    packed, row_stride, left, left_stride, left_step, rows, length = made.args
    b = ir.IRBuilder(made.append_basic_block("entry"))
    size = I64(cell.size)
    every = b.udiv(mode.elements_of(b, length), I64(len(mode.lefts)))
    neighbours = b.icmp_signed("==", left_stride, I64(cell.item))
    squares_down = b.select(neighbours, b.and_(rows, I64(-side)), I64(0))
    squares_along = b.and_(b.udiv(length, I64(cell.group)), I64(-side))

    def goals(row: ir.Value, i: ir.Value) -> list[ir.Value]:
        here = at(b, at(b, packed, b.mul(row, row_stride)), b.mul(i, size))
        return rows_at(b, here, b.mul(every, size), len(mode.lefts))

    # A few k of all rows before the next ones: what lies side by side is read together.
    with counted(b, 0, squares_along, side, name="k") as i, counted(b, 0, squares_down, side, name="rows") as row:
        origin = at(b, left, b.mul(row, left_stride))
        places = [_numbers_at(b, cell, origin, left_step, b.add(i, I64(n)), cell.group) for n in range(side)]
        for made_of, goal in zip(mode.lefts, goals(row, i), strict=True):
            lines = _transposed(b, [_across(b, made_of, each, side) for each in places])
            for line, place in zip(lines, rows_at(b, goal, row_stride, side), strict=True):
                store(b, line, place)
    for first, end, present in _runs(b, cell, length):
        with counted(b, 0, rows, name="row") as row:
            in_squares = b.select(b.icmp_signed("<", row, squares_down), squares_along, I64(0))
            begin = intrinsic(b, "llvm.smax.i64", I64, [first, in_squares])
            origin = at(b, left, b.mul(row, left_stride))
            with counted(b, begin, end, name="single") as i:
                numbers = _numbers_at(b, cell, origin, left_step, i, present)
                for made_of, goal in zip(mode.lefts, goals(row, i), strict=True):
                    store(b, _across(b, made_of, numbers, 1), goal)
    written = ceil(b, length, cell.group)
    with counted(b, 0, rows, name="fill") as row, counted(b, written, every, name="element") as i:
        for goal in goals(row, i):
            store(b, constant(cell.kind, 0), goal)
    b.ret_void()
    return made


def _pack_strip(module: ir.Module, cell: Cell, lanes: int) -> ir.Function:
    """Pack so many columns, ``there`` of which exist, side by side; the rows of the strip lie ``step`` bytes apart."""
    made = internal(
        module, f"pack.{cell.name}{cell.half and f'.{cell.half}'}.strip{lanes}", [PTR, I64, PTR, I64, I64, I64, I64]
    )
    if made.blocks:
        return made
    target, step, source, k_stride, column_stride, k, there = made.args
    b = ir.IRBuilder(made.append_basic_block("entry"))
    zero, element = I64(0), I64(cell.size)
    side = min(1 << (lanes.bit_length() - 1), _SQUARE)
    full = b.icmp_signed("==", there, I64(lanes))
    copied = b.icmp_signed("==", column_stride, I64(cell.item))
    mask = mask_below(b, there, lanes)

    def copy(length: ir.Value, name: str, mask: ir.Value | None) -> None:
        for first, end, present in _runs(b, cell, length):
            with counted(b, first, end, name=name) as i:
                places = _numbers_at(b, cell, source, k_stride, i, present)
                store(b, _across(b, cell, places, lanes, mask), at(b, target, b.mul(i, step)))

    copy(b.select(b.and_(full, copied), k, zero), "copy", None)
    copy(b.select(b.and_(b.not_(full), copied), k, zero), "part", mask)
    elements = ceil(b, k, cell.group)
    with counted(b, 0, b.select(b.or_(full, copied), zero, elements), name="clear") as i:
        store(b, constant(vector(cell.kind, lanes), 0), at(b, target, b.mul(i, step)))
    rest = b.select(copied, zero, there)
    in_squares = b.select(b.icmp_signed("==", k_stride, I64(cell.item)), b.and_(rest, I64(-side)), zero)
    rows_in_squares = b.and_(b.udiv(k, I64(cell.group)), I64(-side))
    with counted(b, 0, in_squares, side, name="column") as c, counted(b, 0, rows_in_squares, side, name="row") as i:
        corner = at(b, at(b, source, b.mul(c, column_stride)), b.mul(i, I64(cell.group * cell.item)))
        lines = [cell.along(b, place, side) for place in rows_at(b, corner, column_stride, side)]
        goal = at(b, at(b, target, b.mul(c, element)), b.mul(i, step))
        for line, place in zip(_transposed(b, lines), rows_at(b, goal, step, side), strict=True):
            store(b, line, place)
    for first, end, present in _runs(b, cell, b.select(copied, zero, k)):
        with counted(b, first, end, name="single") as i:
            begin = b.select(b.icmp_signed("<", i, rows_in_squares), in_squares, zero)
            with counted(b, begin, rest) as c:
                column = at(b, source, b.mul(c, column_stride))
                made_of = _across(b, cell, _numbers_at(b, cell, column, k_stride, i, present), 1)
                store(b, made_of, at(b, at(b, target, b.mul(c, element)), b.mul(i, step)))
    b.ret_void()
    return made


def _runs(b: ir.IRBuilder, cell: Cell, k: ir.Value) -> list[tuple[ir.Value, ir.Value, int]]:
    """The elements of so many k: first, end, and how many numbers such an element has; the last may lack one."""
    whole = b.udiv(k, I64(cell.group))
    every = [(I64(0), whole, cell.group)]
    return every if cell.group == 1 else [*every, (whole, ceil(b, k, cell.group), 1)]


def _numbers_at(
    b: ir.IRBuilder, cell: Cell, place: ir.Value, k_stride: ir.Value, element: ir.Value, present: int
) -> list[ir.Value]:
    """The addresses of the numbers of an element."""
    return rows_at(b, at(b, place, b.mul(b.mul(element, I64(cell.group)), k_stride)), k_stride, present)


def _across(b: ir.IRBuilder, cell: Cell, places: list[ir.Value], lanes: int, mask: ir.Value | None = None) -> ir.Value:
    """So many elements side by side, their first numbers at one address, the second ones at the next, …"""
    whole = vector(cell.source, lanes)
    lines = [load(b, place, whole) if mask is None else masked_load(b, place, whole, mask) for place in places]
    return cell.joined(b, [cell.parts(b, line) for line in lines])


def _transposed(b: ir.IRBuilder, lines: list[ir.Value]) -> list[ir.Value]:
    """The columns of a square, its side a power of two: the halves interleaved until every line has met the others."""
    half = len(lines) // 2
    low = ir.Constant(ir.VectorType(I32, 2 * half), [i // 2 + i % 2 * 2 * half for i in range(2 * half)])
    high = ir.Constant(ir.VectorType(I32, 2 * half), [half + i // 2 + i % 2 * 2 * half for i in range(2 * half)])
    for _ in range(half.bit_length()):
        pairs = list(zip(lines[:half], lines[half:], strict=True))
        lines = [b.shuffle_vector(x, y, mask) for x, y in pairs for mask in (low, high)]
    return lines


# -- columns, rows and tiles ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
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


def columns_of(columns: int, isa: Isa, kind: ir.Type) -> Columns:
    """The panels of so many columns."""
    widths = panels(columns, isa, kind)
    tail = columns % numeric(isa, kind).lanes(isa)
    all_shapes = list(zip(widths, [0] * (len(widths) - 1) + [tail], strict=True))
    shapes = list(dict.fromkeys(all_shapes))
    after = [max(i for i, found in enumerate(all_shapes) if found == shape) + 1 for shape in shapes[:-1]]
    wide = sum(width > widths[-1] for width in widths)
    return Columns(I64(len(widths)), I64(widths[-1]), I64(wide), I64(tail), shapes, after)


def any_columns(b: ir.IRBuilder, isa: Isa, kind: ir.Type, columns: ir.Value) -> Columns:
    """The same, for a number of columns, one at least, that is known only when it runs."""
    mode = numeric(isa, kind)
    lanes, widest = mode.lanes(isa), mode.tile[1]
    vectors = ceil(b, columns, lanes)
    count = ceil(b, vectors, widest)
    narrow = b.udiv(vectors, count)
    wide = b.sub(vectors, b.mul(narrow, count))
    shapes = [(width, tail) for tail in (0, ANY) for width in range(1, widest + 1)]
    return Columns(count, narrow, wide, b.urem(columns, I64(lanes)), shapes, [])


def full_tiles(b: ir.IRBuilder, rows: ir.Value, height: int) -> tuple[ir.Value, Tile]:
    """Rows cut into full tiles and a last one: the same for a row in whatever share of all rows it is."""

    def tile(block: ir.Value) -> tuple[ir.Value, ir.Value]:
        row = b.mul(block, I64(height))
        return row, intrinsic(b, "llvm.smin.i64", I64, [I64(height), b.sub(rows, row)])

    return ceil(b, rows, height), tile


def ceil(b: ir.IRBuilder, number: ir.Value, divisor: int) -> ir.Value:
    """A number divided, rounded up."""
    return b.udiv(b.add(number, I64(divisor - 1)), I64(divisor))


def mask_below(b: ir.IRBuilder, count: ir.Value, lanes: int) -> ir.Value:
    """``lanes_below`` for a count that is known only when it runs."""
    kind = ir.VectorType(I64, lanes)
    numbers = ir.Constant(kind, [ir.Constant(I64, i) for i in range(lanes)])
    return b.icmp_unsigned("<", numbers, splat(b, count, lanes))


def internal(module: ir.Module, name: str, arguments: list[ir.Type]) -> ir.Function:
    """A function for this module alone that is never copied into its callers; new where it has no blocks."""
    made = function(module, name, VOID, arguments)
    made.linkage = "internal"
    made.attributes.add("noinline")
    return made


def rows_at(b: ir.IRBuilder, pointer: ir.Value, stride: ir.Value, rows: int) -> list[ir.Value]:
    """The address of every row."""
    return [at(b, pointer, b.mul(stride, I64(r))) for r in range(rows)]
