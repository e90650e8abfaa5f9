"""Calls of compiled functions: made at once; or noted down on the way, to be made later, many in one go (``replay``).

All have the form ``void(ptr words, i64 thread, i64 threads)``. What is not computing but moving, clearing, converting
and adding up what threads have summed alone is such a function too, so that nothing else is to be done between two.
"""

from __future__ import annotations

import ctypes
import threading
from array import array
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

import torch
from llvmlite import ir
from torch import Tensor

from ...cachefolder import cache_directory
from . import engine, threads
from .code import (
    BYTE,
    F32,
    F64,
    I16,
    I64,
    PTR,
    VOID,
    at,
    counted,
    folded,
    function,
    intrinsic,
    load,
    share,
    store,
    vector,
)
from .entry import barrier, exported
from .isa import Isa, host
from .memory import from_memory
from .numeric import rounded

__all__ = ["ENTRY", "HEAD", "Listener", "address_of", "call", "clear", "listening", "together"]

HEAD, ENTRY = 3, 3
"""Words of a list of calls, for "all": before the calls, where threads meet, the first call and the end; and of each,
the function, its words, the most threads."""


class Listener(Protocol):
    """Who wants to know of calls instead of having them made."""

    def note(self, address: int, words: Sequence[int], pointers: Sequence[int], count: int, work: float) -> None:
        """A function, what it is told, which of the words are addresses, the threads and about how many operations."""


class _Here(threading.local):
    listener: Listener | None = None


listening = _Here()
"""The listener of this thread, None where calls are made."""


def call(address: int, words: array[int], pointers: Sequence[int], count: int, work: float = 0.0) -> None:
    """Call a function on so many threads (see ``threads.run``), or note that down."""
    if listening.listener is not None:
        listening.listener.note(address, words, pointers, count, work)
    else:
        threads.run(address, words.buffer_info()[0], count)


def clear(address: int, size: int) -> None:
    """Fill memory with zeros."""
    if listening.listener is not None:
        listening.listener.note(address_of("zero"), (address, size), (0,), 1, 0.0)
    else:
        ctypes.memset(address, 0, size)


def together(out: Tensor, partial: Tensor) -> None:
    """out (n) = the sum over the first dimension of partial (threads, n or more), both of one type and dense."""
    words = array("q", (out.data_ptr(), partial.data_ptr(), partial.stride(0), len(partial), out.numel()))
    call(address_of({torch.float32: "sum32", torch.float64: "sum64"}[out.dtype]), words, (0, 1), 1)


@engine.kept
def _compiled() -> engine.Library:
    isa = host()
    assert isa is not None  # there is a kernel that calls
    names = [name for name, _ in _FUNCTIONS]
    return engine.load(
        lambda: _module(isa),
        isa,
        cache_directory(),
        description=f"{engine.generator()} {isa} calls",
        functions=names,
    )


@cache
def address_of(name: str) -> int:
    """Where a function begins: "all", "copy", "zero", "narrow", "widen", "sum32" or "sum64"."""
    return _compiled().address(name)


def _module(isa: Isa) -> ir.Module:
    module = ir.Module("calls")
    for name, write in _FUNCTIONS:
        body = function(module, f"{name}.body", VOID, [PTR, I64, I64])
        write(ir.IRBuilder(body.append_basic_block("entry")), body, isa)
        exported(body, name, isa)
    return module


class _Function:
    """A function that stands at an address, as llvmlite calls one: it asks for the type, which addresses have not."""

    def __init__(self, address: ir.Value, kind: ir.FunctionType) -> None:
        self.type, self.function_type, self.get_reference = address.type, kind, address.get_reference


def _all(b: ir.IRBuilder, f: ir.Function, isa: Isa) -> None:
    """words: see HEAD and ENTRY."""
    words, thread, threads_ = f.args
    meet = barrier(b.module, isa)
    meeting = load(b, words, PTR)
    first, end = (load(b, at(b, words, 8 * i), I64) for i in (1, 2))
    with counted(b, first, end, 1, "call") as i:
        entry = at(b, words, b.add(I64(8 * HEAD), b.mul(i, I64(8 * ENTRY))))
        code, given = (load(b, at(b, entry, 8 * j), PTR) for j in (0, 1))
        most = load(b, at(b, entry, 16), I64)
        count = intrinsic(b, "llvm.smin.i64", I64, [most, threads_])
        with b.if_then(b.icmp_signed("<", thread, count)):
            b.call(_Function(code, f.function_type), [given, thread, count])
        # Between two calls of one thread nobody waits, and after the last one all do anyway.
        more = b.icmp_signed("<", b.add(i, I64(1)), end)
        following = load(b, at(b, entry, b.select(more, I64(8 * ENTRY + 16), I64(16))), I64)
        several = b.or_(b.icmp_signed(">", most, I64(1)), b.icmp_signed(">", following, I64(1)))
        with b.if_then(b.and_(b.and_(more, several), b.icmp_signed(">", threads_, I64(1)))):
            b.call(meet, [meeting, threads_])
    b.ret_void()


def _copy(b: ir.IRBuilder, f: ir.Function, isa: Isa) -> None:
    """words: where to, where from, how many bytes."""
    to, source = (load(b, at(b, f.args[0], 8 * i), PTR) for i in (0, 1))
    size = load(b, at(b, f.args[0], 16), I64)
    intrinsic(b, "llvm.memcpy.p0.p0.i64", VOID, [to, source, size, ir.Constant(ir.IntType(1), 0)])
    b.ret_void()


def _zero(b: ir.IRBuilder, f: ir.Function, isa: Isa) -> None:
    """words: where, how many bytes."""
    to, size = load(b, f.args[0], PTR), load(b, at(b, f.args[0], 8), I64)
    intrinsic(b, "llvm.memset.p0.i64", VOID, [to, ir.Constant(BYTE, 0), size, ir.Constant(ir.IntType(1), 0)])
    b.ret_void()


def _converted(
    source: ir.Type, goal: ir.Type, rule: Callable[[ir.IRBuilder, ir.Value], ir.Value]
) -> Callable[[ir.IRBuilder, ir.Function, Isa], None]:
    def write(b: ir.IRBuilder, f: ir.Function, isa: Isa) -> None:
        """words: where to, where from, how many numbers, which all threads share."""
        words, thread, threads_ = f.args
        to, origin = (load(b, at(b, words, 8 * i), PTR) for i in (0, 1))
        count, lanes = load(b, at(b, words, 16), I64), isa.lanes(32)
        vectors = b.udiv(count, I64(lanes))
        first, end = share(b, vectors, thread, threads_)

        def one(n: ir.Value, lanes: int | None) -> None:
            kinds = [kind if lanes is None else vector(kind, lanes) for kind in (source, goal)]
            places = [at(b, base, b.mul(n, I64(_SIZES[kind]))) for base, kind in ((origin, source), (to, goal))]
            store(b, rule(b, load(b, places[0], kinds[0])), places[1])

        with counted(b, b.mul(first, I64(lanes)), b.mul(end, I64(lanes)), lanes, "n") as n:
            one(n, lanes)
        last = b.icmp_signed("==", b.add(thread, I64(1)), threads_)
        rest = b.mul(vectors, I64(lanes))
        with counted(b, rest, b.select(last, count, rest), 1, "rest") as n:
            one(n, None)
        b.ret_void()

    return write


_SIZES = {F32: 4, I16: 2}


def _sum(kind: ir.Type, size: int) -> Callable[[ir.IRBuilder, ir.Function, Isa], None]:
    def write(b: ir.IRBuilder, f: ir.Function, isa: Isa) -> None:
        """words: where to, where from, numbers from one row to the next, rows, numbers of a row."""
        to, source = (load(b, at(b, f.args[0], 8 * i), PTR) for i in (0, 1))
        stride, rows, count = (load(b, at(b, f.args[0], 8 * i), I64) for i in (2, 3, 4))
        lanes = isa.lanes(8 * size)
        whole = b.sub(count, b.urem(count, I64(lanes)))

        def added(n: ir.Value, wide: ir.Type) -> None:
            here = at(b, source, b.mul(n, I64(size)))

            def more(row: ir.Value, total: list[ir.Value]) -> list[ir.Value]:
                place = at(b, here, b.mul(b.mul(row, stride), I64(size)))
                return [b.fadd(total[0], load(b, place, wide))]

            (total,) = folded(b, (1, rows, 1), [load(b, here, wide)], more)
            store(b, total, at(b, to, b.mul(n, I64(size))))

        with counted(b, 0, whole, lanes, "n") as n:
            added(n, vector(kind, lanes))
        with counted(b, whole, count, 1, "rest") as n:
            added(n, kind)
        b.ret_void()

    return write


_FUNCTIONS: tuple[tuple[str, Callable[[ir.IRBuilder, ir.Function, Isa], None]], ...] = (
    ("all", _all),
    ("copy", _copy),
    ("zero", _zero),
    ("narrow", _converted(F32, I16, lambda b, numbers: rounded(b, numbers, None, flushed=False))),
    ("widen", _converted(I16, F32, lambda b, numbers: from_memory(b, numbers, torch.bfloat16))),
    ("sum32", _sum(F32, 4)),
    ("sum64", _sum(F64, 8)),
)
