"""The code that scans an affine loop over time with all threads (``piecewise`` says what it computes).

Steps are taken in blocks, and n threads cut a block into n + 1 pieces, number 0 a little shorter than the others:

    1  thread 0 runs its piece; every other thread finds z and A of its own
    2  they meet; each finds the state that its piece begins with, from those before it. Thread 0 takes the last piece
    3  every thread runs its piece; they meet again

A piece fits the cache, where it is found again the second time. Every thread goes through memory of its own, so that
none waits for the lines of another, as they would if they shared a row. Where a product of factors overflows, 0 · ∞ is
not the 0 that step after step gives: then thread 0 goes on alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llvmlite import ir

from .code import I64, PTR, VOID, at, constant, counted, function, load, splat, store, vector
from .entry import barrier
from .items import Buffer
from .memory import KINDS
from .piecewise import Passes
from .rowcode import across, least

if TYPE_CHECKING:
    from .generate import Generator

__all__ = ["areas", "over_time"]

_FIRST, _OTHER = 3, 4  # how long the first piece is beside the others


def areas(passes: Passes) -> list[Buffer]:
    """What every thread has memory of its own for: its state, z and A."""
    return [*passes.states, *passes.zero, *passes.along]


def over_time(generator: Generator, passes: Passes, run: Callable[..., None]) -> ir.Function:
    """``void over_time(ptr words, i64 thread, i64 threads)``; ``run`` calls the loop's only item."""
    return _OverTime(generator, passes).write(run)


class _OverTime:
    def __init__(self, generator: Generator, passes: Passes) -> None:
        self.generator, self.passes, self.module = generator, passes, generator.module
        self.kind = KINDS[passes.states[0].dtype]
        self.row = passes.states[0].row * passes.states[0].dtype.itemsize  # bytes
        made = [*passes.zero, *passes.along]
        generator.word.update({buffer: generator.words + 2 * i for i, buffer in enumerate(made)})
        self.words = generator.words + 2 * len(made)
        names = ("light", "begin", "hand", "take", "join")
        self.items = {name: generator.item(name, getattr(passes, name)) for name in names}

    def write(self, run: Callable[..., None]) -> ir.Function:
        f = function(self.module, "over_time", VOID, [PTR, I64, I64])
        f.linkage = "internal"
        given, thread, threads = f.args
        b = ir.IRBuilder(f.append_basic_block("entry"))
        self.word = self.generator.named(b, given)
        self.thread, self.threads = thread, threads
        self.mine = self._own_words(b, given)
        self.full, self.light = self._steps("full", run), self._steps("light", self.items["light"])
        meet, meeting = barrier(self.module, self.generator.isa), b.inttoptr(self.word["barrier"], PTR)
        with counted(b, self.word["first"], self.word["last"], self.word["block"], "block") as start:
            end = least(b, b.add(start, self.word["block"]), self.word["last"])
            cuts = self._cuts(b, start, end)
            self._alone(b, start, cuts)
            b.call(meet, [meeting, threads])
            self._together(b, cuts, end)
            b.call(meet, [meeting, threads])
        b.ret_void()
        return f

    def _own_words(self, b: ir.IRBuilder, given: ir.Value) -> ir.Value:
        """A copy of the words for this thread, with memory of its own in place of the state of all but the first."""
        mine = b.alloca(I64, size=self.words)
        mine.type = PTR
        for i in range(self.generator.words):
            store(b, load(b, at(b, given, 8 * i), I64), at(b, mine, 8 * i))
        first = b.icmp_signed("==", self.thread, constant(I64, 0))
        for i, state in enumerate(self.passes.states):
            word = at(b, mine, 8 * self.generator.word[state])
            own = b.add(self._memory(b, self.thread), b.mul(constant(I64, i), self.word["area"]))
            store(b, b.select(first, load(b, word, I64), own), word)
        for buffer in (*self.passes.zero, *self.passes.along):
            store(b, constant(I64, self.row), at(b, mine, 8 * self.generator.word[buffer] + 8))
        return mine

    def _memory(self, b: ir.IRBuilder, thread: ir.Value) -> ir.Value:
        """Where the memory of a thread begins."""
        size = b.mul(constant(I64, len(areas(self.passes))), self.word["area"])
        return b.add(self.word["private"], b.mul(thread, size))

    def _of(self, b: ir.IRBuilder, thread: ir.Value) -> None:
        """From now on z and A are those of that thread."""
        memory, count = self._memory(b, thread), len(self.passes.states)
        for i, buffer in enumerate((*self.passes.zero, *self.passes.along), count):
            place = b.add(memory, b.mul(constant(I64, i), self.word["area"]))
            store(b, place, at(b, self.mine, 8 * self.generator.word[buffer]))

    def _cuts(self, b: ir.IRBuilder, start: ir.Value, end: ir.Value) -> Callable[[ir.Value], ir.Value]:
        """Where a piece begins, by its number from 1 on."""
        whole = b.add(constant(I64, _FIRST), b.mul(constant(I64, _OTHER), self.threads))
        steps = b.sub(end, start)

        def cut(piece: ir.Value) -> ir.Value:
            before = b.add(constant(I64, _FIRST - _OTHER), b.mul(constant(I64, _OTHER), piece))
            return b.add(start, b.sdiv(b.mul(steps, before), whole))

        return cut

    def _alone(self, b: ir.IRBuilder, start: ir.Value, cut: Callable[[ir.Value], ir.Value]) -> None:
        """The first pass of every thread."""
        self._of(b, self.thread)
        following = b.add(self.thread, constant(I64, 1))
        with b.if_else(b.icmp_signed("==", self.thread, constant(I64, 0))) as (first, others):
            with first:
                b.call(self.full, [self.mine, start, cut(following), self.thread])
                self._each_row(b, "hand")
            with others:
                self._each_row(b, "begin")
                b.call(self.light, [self.mine, cut(self.thread), cut(following), self.thread])

    def _together(self, b: ir.IRBuilder, cut: Callable[[ir.Value], ir.Value], end: ir.Value) -> None:
        """The second pass: from the state at its beginning, if nothing overflowed."""
        zero, one = constant(I64, 0), constant(I64, 1)
        first = b.icmp_signed("==", self.thread, zero)
        with b.if_else(self._finite(b)) as (known, not_known):
            with known:
                piece = b.select(first, self.threads, self.thread)
                self._of(b, zero)
                self._each_row(b, "take")
                with counted(b, one, piece, 1, "before") as before:
                    self._of(b, before)
                    self._each_row(b, "join")
                last = b.select(first, end, cut(b.add(piece, one)))
                b.call(self.full, [self.mine, cut(piece), last, self.thread])
            with not_known, b.if_then(first):
                b.call(self.full, [self.mine, cut(one), end, self.thread])

    def _finite(self, b: ir.IRBuilder) -> ir.Value:
        """Whether all z and A are, the first thread's state among them: 0 times every one of them is 0."""
        size = self.passes.states[0].dtype.itemsize
        wide = vector(self.kind, self.generator.isa.lanes(8 * size))
        with b.goto_entry_block():
            total = b.alloca(wide)
        b.store(constant(wide, 0), total)
        bytes_ = b.mul(self.word["batch"], constant(I64, self.row))
        whole = b.sub(bytes_, b.urem(bytes_, constant(I64, self.generator.isa.bytes)))

        def add(place: ir.Value, offset: ir.Value, kind: ir.Type) -> None:
            found = b.fmul(load(b, at(b, place, offset), kind), constant(kind, 0))
            found = found if kind is wide else splat(b, found, wide.count)
            b.store(b.fadd(b.load(total, typ=wide), found), total)

        states, zero, one = len(self.passes.states), constant(I64, 0), constant(I64, 1)
        parts = (
            (zero, one, range(states, 2 * states)),  # what it handed on; it has no A
            (one, self.threads, range(states, len(areas(self.passes)))),
        )
        for begin, end, which in parts:
            with counted(b, begin, end, 1, "thread") as thread:
                memory = self._memory(b, thread)
                for i in which:
                    place = b.inttoptr(b.add(memory, b.mul(constant(I64, i), self.word["area"])), PTR)
                    with counted(b, zero, whole, self.generator.isa.bytes, "v") as offset:
                        add(place, offset, wide)
                    with counted(b, whole, bytes_, size, "one") as offset:
                        add(place, offset, self.kind)
        return b.fcmp_ordered("==", across(b, b.load(total, typ=wide), "sum"), constant(self.kind, 0))

    def _each_row(self, b: ir.IRBuilder, name: str) -> None:
        zero = constant(I64, 0)
        self.items[name](b, self.mine, zero, zero, zero, self.word["batch"], zero, constant(I64, 1), self.thread)

    def _steps(self, name: str, run: Callable[..., None]) -> ir.Function:
        """``void name(ptr words, i64 first, i64 last, i64 thread)``: some steps, one after the other."""
        f = function(self.module, f"{name}_steps", VOID, [PTR, I64, I64, I64])
        f.linkage = "internal"
        words, first, last, thread = f.args
        b = ir.IRBuilder(f.append_basic_block("entry"))
        word, zero = self.generator.named(b, words), constant(I64, 0)
        with counted(b, first, last, 1, "step") as index:
            rows, offset = self.generator.rows_of(b, word, index)
            run(b, words, index, offset, zero, rows, zero, constant(I64, 1), thread)
        b.ret_void()
        return f
