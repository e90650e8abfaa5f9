"""What a generated function begins and ends with, and where its threads meet."""

from __future__ import annotations

from llvmlite import ir

from .code import I32, I64, PTR, VOID, at, constant, function, intrinsic, load, store
from .isa import MODES, Isa

__all__ = ["BARRIER_BYTES", "barrier", "enter", "exported", "leave"]

BARRIER_BYTES = 64
"""Zeroed memory that a barrier needs, on an address divisible by as much."""

_SPINS = 100  # rounds of waiting, about 3 microseconds, before the processor is offered to others at every round


def enter(b: ir.IRBuilder, isa: Isa) -> ir.Value:
    """Make denormal numbers count as zero; gives the mode before it, for ``leave``.

    Arithmetic in the same function may be moved across it by LLVM, which thinks that no number depends on the mode:
    what computes belongs into a function of its own, as ``exported`` arranges it.
    """
    mode = MODES[isa.mode]
    kind = ir.IntType(mode.bits)
    if mode.stored:
        word = _slot(b, kind)
        intrinsic(b, mode.read, VOID, [word])
        saved = load(b, word, kind)
    else:
        saved = intrinsic(b, mode.read, kind, [])
    leave(b, isa, b.or_(saved, constant(kind, isa.flush)))
    return saved


def leave(b: ir.IRBuilder, isa: Isa, saved: ir.Value) -> None:
    """Put back the mode that ``enter`` found."""
    mode = MODES[isa.mode]
    if not mode.stored:
        intrinsic(b, mode.write, VOID, [saved])
        return
    word = _slot(b, saved.type)
    store(b, saved, word)
    intrinsic(b, mode.write, VOID, [word])


def _slot(b: ir.IRBuilder, kind: ir.Type) -> ir.Value:
    """Memory for one value until the function returns."""
    made = b.alloca(kind)
    made.type = PTR  # llvmlite would call it a pointer to that kind, which no longer exists
    return made


def exported(body: ir.Function, name: str, isa: Isa) -> ir.Function:
    """A function of that name, ``void(ptr args, i64 thread, i64 threads)``, that runs ``body`` with denormals as zero.

    ``body`` takes the same arguments; it becomes internal to the module and is not inlined.
    """
    body.linkage = "internal"
    body.attributes.add("noinline")
    body.attributes.add("nounwind")
    outer = function(body.module, name, VOID, [PTR, I64, I64])
    outer.attributes.add("nounwind")
    b = ir.IRBuilder(outer.append_basic_block("entry"))
    saved = enter(b, isa)
    b.call(body, list(outer.args))
    leave(b, isa, saved)
    b.ret_void()
    return outer


def barrier(module: ir.Module, isa: Isa) -> ir.Function:
    """``void barrier(ptr words, i64 threads)``: returns when that many threads have called it, as often as one likes.

    ``words`` are BARRIER_BYTES of memory that were zero before the first use: how many have arrived, and how often all
    have. Who arrives last counts the second up; the others watch it, first without giving up the processor, then
    offering it in every round, so that more threads than processors get on too.
    """
    known = module.globals.get("barrier")
    if known is not None:
        return known
    meet = function(module, "barrier", VOID, [PTR, I64])
    meet.linkage = "internal"
    meet.attributes.add("noinline")
    meet.attributes.add("nounwind")
    words, threads = meet.args
    entry, last, wait, early, spin, offer, after = (
        meet.append_basic_block(name) for name in ("entry", "last", "wait", "early", "spin", "offer", "after")
    )
    one, zero = constant(I64, 1), constant(I64, 0)
    b = ir.IRBuilder(entry)
    rounds = at(b, words, 8)
    before = b.load_atomic(rounds, "monotonic", 8, typ=I64)  # cannot change before this thread has arrived
    arrived = b.atomic_rmw("add", words, one, "acq_rel")
    b.cbranch(b.icmp_unsigned("==", b.add(arrived, one), threads), last, wait)

    b.position_at_end(last)
    store(b, zero, words)
    b.atomic_rmw("add", rounds, one, "release")
    b.branch(after)

    b.position_at_end(wait)
    spins = b.phi(I64)
    now = b.load_atomic(rounds, "acquire", 8, typ=I64)
    b.cbranch(b.icmp_unsigned("!=", now, before), after, early)
    b.position_at_end(early)
    b.cbranch(b.icmp_unsigned("<", spins, constant(I64, _SPINS)), spin, offer)

    b.position_at_end(spin)
    name, given = isa.pause
    intrinsic(b, name, VOID, [constant(I32, value) for value in given])
    more = b.add(spins, one)
    b.branch(wait)
    b.position_at_end(offer)
    intrinsic(b, "sched_yield", I32, [])
    b.branch(wait)
    for value, block in ((zero, entry), (more, spin), (spins, offer)):
        spins.add_incoming(value, block)

    b.position_at_end(after)
    b.ret_void()
    return meet
