"""From the items of a loop to one function that runs its steps.

    void loop(ptr words, i64 thread, i64 threads)
        for every step:  for every item:  its share of the rows, or of the units

Threads share the rows of a step, each with its own all the way through, and meet nowhere; or, where rows are few, the
units: then they meet after every item. Rows whose sequences have ended are not there: the rows of a step are the first
ones of the batch, and there are as many as ``sizes`` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from llvmlite import ir

from .code import (
    BF16,
    BF16X3,
    BYTE,
    F32,
    F64,
    I64,
    PTR,
    VOID,
    at,
    constant,
    counted,
    function,
    load,
)
from .entry import barrier, exported
from .isa import Isa
from .items import Access, Buffer, Contract, Item, Lowered, Product
from .memory import BYTES
from .overtime import over_time
from .piecewise import passes
from .product import pack, packed_bytes, panels, product
from .rowcode import RowCode, divides, least, share

__all__ = ["WORDS", "Generator", "generate", "packed_sizes"]

WORDS = (
    "first", "last", "steps", "batch", "reverse", "sizes", "offsets", "barrier", "units", "block", "area", "private",
)  # fmt: skip
"""What the words of the arguments are; after them two for each buffer, its address and the bytes from row to row, and
four for each product: where its packed weight is to stand, the weight, its bytes from k to k and from column to
column."""

_ROWS_TOGETHER = 8  # rows that pass through neighbouring maps at a time, so that what is between stays in the cache


def packed_sizes(lowered: Lowered, isa: Isa) -> list[int]:
    """Bytes of the packed weight of every product of a loop."""
    products = [item for item in lowered.items if isinstance(item, Product)]
    return [_chunk_bytes(item, isa) * (item.n // item.chunk) for item in products]


def _kind_of(item: Product) -> ir.Type:
    """The numeric mode of a product: that of its left side, which its weight is packed for."""
    if item.rests:
        return BF16X3
    return {torch.float32: F32, torch.float64: F64, torch.bfloat16: BF16}[item.left.buffer.dtype]


def generate(lowered: Lowered, isa: Isa) -> ir.Module:
    """Write the module of a loop."""
    return Generator(lowered, isa).run()


def _chunk_bytes(item: Product, isa: Isa) -> int:
    return packed_bytes(item.k, item.chunk, isa, _kind_of(item))


class Generator:
    """The writer of a module; ``word`` says where the words of every buffer begin, ``words`` how many there are."""

    def __init__(self, lowered: Lowered, isa: Isa) -> None:
        self.lowered, self.isa = lowered, isa
        self.module = ir.Module("loop")
        self.products = [item for item in lowered.items if isinstance(item, Product)]
        self.word = {buffer: len(WORDS) + 2 * i for i, buffer in enumerate(lowered.buffers)}
        self.packed_at = len(WORDS) + 2 * len(lowered.buffers)
        self.words = self.packed_at + 4 * len(self.products)

    def run(self) -> ir.Module:
        items = self.lowered.items
        functions = [self.item(f"{type(item).__name__.lower()}{i}", item) for i, item in enumerate(items)]
        exported(self._loop(functions), "loop", self.isa)
        return self.module

    def _pack(self, b: ir.IRBuilder, words: ir.Value, thread: ir.Value, threads: ir.Value) -> None:
        """A thread's share of laying out the weights of the products."""
        for i, item in enumerate(self.products):
            kind = _kind_of(item)
            made = pack(self.module, self.isa, kind, item.k, item.chunk)
            first_word = self.packed_at + 4 * i
            packed, weight = (load(b, at(b, words, 8 * (first_word + j)), PTR) for j in range(2))
            along, across = (load(b, at(b, words, 8 * (first_word + j)), I64) for j in (2, 3))
            count = len(panels(item.chunk, self.isa, kind))
            first, last = share(b, constant(I64, count), thread, threads)
            for chunk in range(item.n // item.chunk):
                here = at(b, weight, b.mul(across, constant(I64, chunk * item.chunk)))
                to = at(b, packed, chunk * _chunk_bytes(item, self.isa))
                b.call(made, [to, here, along, across, first, last])

    # -- the loop over the steps --------------------------------------------------------------------------------

    def named(self, b: ir.IRBuilder, words: ir.Value) -> dict[str, ir.Value]:
        """The words of the arguments by name."""
        return {name: load(b, at(b, words, 8 * i), I64) for i, name in enumerate(WORDS)}

    def _loop(self, functions: Sequence[Callable[..., None]]) -> ir.Function:
        f = function(self.module, "steps", VOID, [PTR, I64, I64])
        words, thread, threads = f.args
        b = ir.IRBuilder(f.append_basic_block("entry"))
        word = self.named(b, words)
        meet = barrier(self.module, self.isa)
        meeting = b.inttoptr(word["barrier"], PTR)
        zero, one = constant(I64, 0), constant(I64, 1)
        by_units = b.icmp_signed("!=", word["units"], zero)
        ragged = b.icmp_signed("!=", word["sizes"], zero)
        together = b.and_(b.or_(by_units, ragged), b.icmp_signed(">", threads, one))
        if (affine := passes(self.lowered)) is not None:
            over = b.icmp_signed("!=", word["block"], zero)
            with b.if_then(b.and_(over, b.icmp_signed(">", threads, one))):
                b.call(over_time(self, affine, functions[0]), [words, thread, threads])
                b.ret_void()
        if self.products:
            with b.if_then(b.icmp_signed("==", word["first"], zero)):
                self._pack(b, words, thread, threads)
                with b.if_then(b.icmp_signed(">", threads, one)):
                    b.call(meet, [meeting, threads])
        with counted(b, word["first"], word["last"], 1, "step") as index:
            rows, offset = self.rows_of(b, word, index)
            first, last = share(b, rows, thread, threads)
            self._items(
                b, functions, words, (index, offset), (first, last), rows, thread, threads, by_units, meet, meeting
            )
            with b.if_then(together):
                b.call(meet, [meeting, threads])
        b.ret_void()
        return f

    def rows_of(self, b: ir.IRBuilder, word: dict[str, ir.Value], index: ir.Value) -> tuple[ir.Value, ir.Value]:
        """How many rows a step has, and how many come before it, by its number in the order in which steps are done."""
        zero, one = constant(I64, 0), constant(I64, 1)
        ragged = b.icmp_signed("!=", word["sizes"], zero)
        back = b.sub(b.sub(word["steps"], one), index)
        t = b.select(b.icmp_signed("!=", word["reverse"], zero), back, index)
        start = b.mul(t, word["batch"])
        before = b.block
        with b.if_then(ragged):
            place = b.mul(t, constant(I64, 8))
            size = load(b, b.inttoptr(b.add(word["sizes"], place), PTR), I64)
            offset = load(b, b.inttoptr(b.add(word["offsets"], place), PTR), I64)
            inside = b.block
        found = []
        for here, otherwise in ((size, word["batch"]), (offset, start)):
            phi = b.phi(I64)
            phi.add_incoming(here, inside)
            phi.add_incoming(otherwise, before)
            found.append(phi)
        return found[0], found[1]

    def _items(
        self,
        b: ir.IRBuilder,
        functions: Sequence[Callable[..., None]],
        words: ir.Value,
        step: tuple[ir.Value, ir.Value],
        mine: tuple[ir.Value, ir.Value],
        rows: ir.Value,
        thread: ir.Value,
        threads: ir.Value,
        by_units: ir.Value,
        meet: ir.Function,
        meeting: ir.Value,
    ) -> None:
        """One step: by rows, neighbouring maps together for a few rows at a time; or by units, item by item."""
        zero = constant(I64, 0)
        with b.if_else(by_units) as (units, by_rows):
            with units:
                for i, (item, run) in enumerate(zip(self.lowered.items, functions, strict=True)):
                    if divides(item):
                        run(b, words, *step, zero, rows, thread, threads, thread)
                    else:
                        run(b, words, *step, *mine, zero, constant(I64, 1), thread)
                    if i + 1 < len(functions):
                        b.call(meet, [meeting, threads])
            with by_rows:
                for group in _neighbours(self.lowered.items):
                    if isinstance(self.lowered.items[group[0]], Product):
                        functions[group[0]](b, words, *step, *mine, zero, constant(I64, 1), thread)
                        continue
                    with counted(b, *mine, _ROWS_TOGETHER, "rows") as first:
                        last = least(b, b.add(first, constant(I64, _ROWS_TOGETHER)), mine[1])
                        for i in group:
                            functions[i](b, words, *step, first, last, zero, constant(I64, 1), thread)

    # -- items --------------------------------------------------------------------------------------------------

    def item(self, name: str, item: Item) -> Callable[..., None]:
        """A function ``void(words, steps and rows before, first row, last, part, parts, thread)``; how to call it."""
        f = function(self.module, name, VOID, [PTR, I64, I64, I64, I64, I64, I64, I64])
        f.linkage = "internal"
        f.attributes.add("noinline")
        b = ir.IRBuilder(f.append_basic_block("entry"))
        if isinstance(item, Product):
            self._product(b, f, item)
        else:
            words, index, offset, first, last, part, parts, thread = f.args

            def place(b: ir.IRBuilder, access: Access) -> tuple[ir.Value, ir.Value]:
                return self.row(b, words, access, (index, offset), first, thread)

            code = RowCode(b, self.isa, item, place, (first, last, part, parts))
            code.contract(item) if isinstance(item, Contract) else code.map(item)
        b.ret_void()

        def run(b: ir.IRBuilder, *args: ir.Value) -> None:
            b.call(f, list(args))

        return run

    def _product(self, b: ir.IRBuilder, f: ir.Function, item: Product) -> None:
        words, index, offset, first, last, part, parts, thread = f.args
        step = index, offset
        kind = _kind_of(item)
        size = BYTES[item.out.buffer.dtype]
        made = product(self.module, self.isa, kind, item.k, item.chunk)
        packed = load(b, at(b, words, 8 * (self.packed_at + 4 * self.products.index(item))), PTR)
        start, end = share(b, constant(I64, len(panels(item.chunk, self.isa, kind))), part, parts)
        out, left = (self.row(b, words, a, step, first, thread) for a in (item.out, item.left))
        init = self.row(b, words, item.init, step, first, thread) if item.init else self._zeros(b, item)
        bytes_of = _chunk_bytes(item, self.isa)
        rows = b.sub(last, first)
        for time in range(item.times):
            for chunk in range(item.n // item.chunk):
                column = chunk * item.chunk * size
                where = [(out[0], item.out, column), (left[0], item.left, 0)]
                places = [at(b, p, time * _outer(a) * BYTES[a.buffer.dtype] + c) for p, a, c in where]
                begun = at(b, init[0], time * _outer(item.init) * size + column) if item.init else init[0]
                weight = at(b, packed, chunk * bytes_of)
                b.call(
                    made, [places[0], out[1], begun, init[1], places[1], left[1], weight, rows, start, end]
                )  # fmt: skip

    def _zeros(self, b: ir.IRBuilder, item: Product) -> tuple[ir.Value, ir.Value]:
        """A row of zeros to start from."""
        size = item.n * BYTES[item.out.buffer.dtype]
        name = f"zeros{size}"
        if name not in self.module.globals:
            kind = ir.ArrayType(BYTE, size)
            zeros = ir.GlobalVariable(self.module, kind, name)
            zeros.initializer = ir.Constant(kind, None)
            zeros.linkage, zeros.global_constant, zeros.align = "internal", True, 64
        return self.module.globals[name], constant(I64, 0)

    def row(
        self,
        b: ir.IRBuilder,
        words: ir.Value,
        access: Access,
        step: tuple[ir.Value, ir.Value],
        first: ir.Value,
        thread: ir.Value,
    ) -> tuple[ir.Value, ir.Value]:
        """Where the numbers of an access begin in a row, and the bytes from row to row."""
        buffer = access.buffer
        here = load(b, at(b, words, 8 * self.word[buffer]), PTR)
        stride = load(b, at(b, words, 8 * self.word[buffer] + 8), I64)
        if buffer.kind == "shared":
            stride = constant(I64, 0)
        elif buffer.kind == "thread":
            return at(b, at(b, here, b.mul(thread, stride)), access.offset * BYTES[buffer.dtype]), constant(I64, 0)
        else:
            before = step[1] if buffer.kind == "time" else self._turned(b, words, buffer, step[0])
            here = at(b, here, b.mul(b.add(before, first), stride))
        return at(b, here, access.offset * BYTES[buffer.dtype]), stride

    def _turned(self, b: ir.IRBuilder, words: ir.Value, buffer: Buffer, index: ir.Value) -> ir.Value:
        """How many rows of a ring come before those of a state, after so many steps; none where there is no ring."""
        if buffer.slot is None:
            return constant(I64, 0)
        slot = b.urem(b.add(index, constant(I64, buffer.slot.number)), constant(I64, buffer.slot.slots))
        return b.mul(slot, load(b, at(b, words, 8 * WORDS.index("batch")), I64))


def _neighbours(items: Sequence[Item]) -> list[list[int]]:
    """Items in groups: a product alone, others with those next to them."""
    groups: list[list[int]] = []
    for i, item in enumerate(items):
        if groups and not isinstance(item, Product) and not isinstance(items[i - 1], Product):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _outer(access: Access) -> int:
    return access.strides[0] if len(access.strides) > 1 else 0
