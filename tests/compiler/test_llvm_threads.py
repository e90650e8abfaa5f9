"""Running compiled functions on threads: how many, from where, after a fork, without OpenMP; modes and barriers."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import struct
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import pytest
import torch
from llvmlite import ir

from elman.compiler.llvm import engine, entry, threads
from elman.compiler.llvm.code import F64, I64, PTR, VOID, at, constant, counted, function, load, store
from elman.compiler.llvm.isa import ISAS, Isa, host

best = host()
if best is None:
    pytest.skip("no machine code for this processor", allow_module_level=True)
HERE: Isa = best
NATIVE = [isa for isa in ISAS.values() if isa.triple == HERE.triple and isa.bytes <= HERE.bytes]

SMALL = """
declare i32 @raise(i32)
define void @seen(ptr %args, i64 %thread, i64 %threads) {
  %place = getelementptr i64, ptr %args, i64 %thread
  %old = load i64, ptr %place
  %new = add i64 %old, %threads
  store i64 %new, ptr %place
  ret void
}
define void @interrupted(ptr %args, i64 %thread, i64 %threads) {
  %first = icmp eq i64 %thread, 0
  br i1 %first, label %yes, label %no
yes:
  %status = call i32 @raise(i32 INTERRUPT)
  br label %no
no:
  call void @seen(ptr %args, i64 %thread, i64 %threads)
  ret void
}
"""
NESTED = """
declare void @launch(ptr, ptr, i64)
declare void @seen(ptr, i64, i64)
define void @outer(ptr %args, i64 %thread, i64 %threads) {
  %own = getelementptr [8 x i64], ptr %args, i64 %thread
  call void @launch(ptr @seen, ptr %own, i64 4)
  ret void
}
"""


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    """A thread that waits in machine code cannot be interrupted: show where, and end."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(params=["openmp", "own"])
def pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the threads of OpenMP, and where there is no such library."""
    if request.param == "own":
        monkeypatch.setattr(threads, "openmp", lambda: None)
    elif threads.openmp() is None:
        pytest.skip("PyTorch runs without OpenMP here")
    monkeypatch.setattr(threads, "_launch", None)
    monkeypatch.setattr(threads, "_library", None)
    return str(request.param)


@lru_cache(maxsize=1)
def small() -> engine.Library:
    return engine.load(SMALL.replace("INTERRUPT", str(int(signal.SIGINT))), HERE)


def seen(asked: int, name: str = "seen") -> list[int]:
    """What the threads of a call were told about their number, in their order."""
    words = (ctypes.c_int64 * 64)()
    threads.run(small().address(name), words, asked)
    return [word for word in words if word]


def meetings(isa: Isa) -> ir.Module:
    """Threads that go through a barrier again and again, and count where another is not where it should be.

    args: rounds, the address of a barrier, wrong, then the progress of each thread.
    """
    module = ir.Module("meetings")
    body = function(module, "body", VOID, [PTR, I64, I64])
    b = ir.IRBuilder(body.append_basic_block("entry"))
    args, thread, total = body.args
    words, meet, progress = load(b, at(b, args, 8), PTR), entry.barrier(module, isa), at(b, args, 24)
    with counted(b, 0, load(b, args, I64)) as turn:
        store(b, turn, at(b, progress, b.mul(thread, constant(I64, 8))))
        b.call(meet, [words, total])
        with counted(b, 0, total) as other:
            there = load(b, at(b, progress, b.mul(other, constant(I64, 8))), I64)
            wrong = b.zext(b.icmp_signed("!=", there, turn), I64)
            b.atomic_rmw("add", at(b, args, 16), wrong, "monotonic")
        b.call(meet, [words, total])
    b.ret_void()
    entry.exported(body, "meetings", isa)
    return module


class Meeting:
    """The arguments of ``meetings``."""

    def __init__(self, rounds: int) -> None:
        self.memory = ctypes.create_string_buffer(entry.BARRIER_BYTES + 64)
        place = -(-ctypes.addressof(self.memory) // 64) * 64
        self.args = (ctypes.c_int64 * 64)(rounds, place)

    @property
    def wrong(self) -> int:
        return int(self.args[2])


def test_the_number_of_threads_is_that_of_torch() -> None:
    before = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert threads.count() == number
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("asked", [1, 2, 3, 8])
def test_every_thread_runs_once_and_knows_the_true_number(asked: int, pool: str) -> None:
    for _ in range(50):
        told = seen(asked)
        assert told == [len(told)] * len(told)
        assert 1 <= len(told) <= asked
    if "OMP_THREAD_LIMIT" not in os.environ:
        assert len(told) == asked


def test_the_threads_of_torch_are_found_where_it_has_any() -> None:
    if "OpenMP" not in torch.__config__.parallel_info().split("ATen parallel backend:")[-1].split("\n")[0]:
        pytest.skip("PyTorch runs without OpenMP here")
    assert threads.openmp() is not None


def test_torch_itself_runs_in_between(pool: str) -> None:
    a = torch.randn(200, 200, dtype=torch.float64)
    expected = a @ a
    for _ in range(50):
        assert seen(2) == [2, 2]
        assert torch.equal(a @ a, expected)


def test_a_call_from_within_a_parallel_region_runs_inline() -> None:
    if threads.openmp() is None:
        pytest.skip("PyTorch runs without OpenMP here")
    launch = threads._prepared()
    assert threads._library is not None
    symbols = {"launch": threads._library.address("launch"), "seen": small().address("seen")}
    library = engine.load(NESTED, HERE, symbols=symbols)
    words = (ctypes.c_int64 * 16)()
    launch(library.address("outer"), words, 2)
    assert [word for word in words if word] == [1, 1]
    assert (words[0], words[8]) == (1, 1)


def test_several_python_threads_call_at_once(pool: str) -> None:
    library = engine.load(meetings(HERE), HERE)

    def call(_: int) -> int:
        found = 0
        for _turn in range(50):
            meeting = Meeting(20)
            threads.run(library.address("meetings"), meeting.args, 2)
            found += meeting.wrong
        return found

    with ThreadPoolExecutor(4) as python:
        assert list(python.map(call, range(4))) == [0] * 4


def forever(address: int, words: ctypes.Array[ctypes.c_int64]) -> None:
    while True:
        threads.run(address, words, 2)


def test_an_interrupt_arrives_after_the_call_with_all_work_done(pool: str) -> None:
    words = (ctypes.c_int64 * 64)()
    with pytest.raises(KeyboardInterrupt):
        forever(small().address("interrupted"), words)
    told = list(words[:2])
    assert told[0] == told[1]
    assert told[0] > 0
    assert seen(2) == [2, 2]


def test_after_a_fork_it_runs_inline(pool: str) -> None:
    assert seen(2) == [2, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Python warns of every fork beside threads
        child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that hangs
        try:
            os._exit(int(seen(2) != [1] or threads.count() != 1))
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert seen(2) == [2, 2]


def test_a_forked_process_can_begin_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the parent had run nothing yet."""
    monkeypatch.setattr(threads, "_launch", None)
    address = small().address("seen")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            words = (ctypes.c_int64 * 8)()
            threads.run(address, words, 4)
            os._exit(int(list(words[:2]) != [1, 0]))
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(("asked", "rounds"), [(1, 5000), (2, 5000), (3, 5000), (8, 1000)])
def test_a_barrier_holds_everyone_however_many_there_are(asked: int, rounds: int, pool: str) -> None:
    """Rounds of two barriers; eight threads are more than many machines have processors, and take turns in each."""
    library = engine.load(meetings(HERE), HERE)
    meeting = Meeting(rounds)
    threads.run(library.address("meetings"), meeting.args, asked)
    assert meeting.wrong == 0
    assert set(meeting.args[3 : 3 + asked]) == {rounds - 1}
    assert not any(meeting.args[3 + asked :])


@pytest.mark.parametrize("isa", ISAS.values(), ids=lambda isa: isa.name)
def test_one_barrier_per_module_for_every_instruction_set(isa: Isa) -> None:
    module = meetings(isa)
    assert entry.barrier(module, isa) is entry.barrier(module, isa)
    assert engine.assembly(module, isa).count("sched_yield") == 1


def halves(isa: Isa) -> ir.Module:
    """``plain`` and ``flushed``, the latter as generated functions are: args[2 thread, …] = args[16] / 2, args[17] 2⁶⁰.

    The first result is a denormal number; the second is made from one.
    """
    module = ir.Module("halves")
    body = function(module, "body", VOID, [PTR, I64, I64])
    plain = function(module, "plain", VOID, [PTR, I64, I64])
    b = ir.IRBuilder(body.append_basic_block("entry"))
    args, thread, _ = body.args
    own = at(b, args, b.mul(thread, constant(I64, 16)))
    store(b, b.fmul(load(b, at(b, args, 128), F64), constant(F64, 0.5)), own)
    store(b, b.fmul(load(b, at(b, args, 136), F64), constant(F64, 2.0**60)), at(b, own, 8))
    b.ret_void()
    b = ir.IRBuilder(plain.append_basic_block("entry"))
    b.call(body, list(plain.args))
    b.ret_void()
    entry.exported(body, "flushed", isa)
    return module


def halved(library: engine.Library, name: str) -> list[bool]:
    """Whether the numbers that two threads compute from very small ones are zero."""
    words = (ctypes.c_double * 18)(*[1.0] * 16, 2.0**-1022, 2.0**-1030)
    threads.run(library.address(name), words, 2)
    return [struct.pack("d", word) == bytes(8) for word in words[:4]]


@pytest.mark.parametrize("isa", NATIVE, ids=lambda isa: isa.name)
def test_denormal_numbers_are_zero_inside_and_the_mode_is_restored(isa: Isa, pool: str) -> None:
    library = engine.load(halves(isa), isa)
    assert halved(library, "plain") == [False] * 4
    assert halved(library, "flushed") == [True] * 4
    assert halved(library, "plain") == [False] * 4  # on each of the threads


def test_a_caller_who_flushes_still_does_so_afterwards() -> None:
    library = engine.load(halves(HERE), HERE)
    if not torch.set_flush_denormal(True):
        pytest.skip("PyTorch cannot flush denormal numbers here")
    try:
        assert halved(library, "flushed")[:2] == [True] * 2
        assert halved(library, "plain")[:2] == [True] * 2
    finally:
        torch.set_flush_denormal(False)
    assert halved(library, "plain")[:2] == [False] * 2


@pytest.mark.parametrize("isa", ISAS.values(), ids=lambda isa: isa.name)
def test_the_work_is_not_moved_out_of_the_mode(isa: Isa) -> None:
    """LLVM thinks that no arithmetic depends on the mode: it must stay a call between the two changes of it."""
    optimised = engine.optimised(halves(isa), isa)
    flushed = optimised.split("@flushed(", 1)[1].split("\n}", 1)[0]
    assert "fmul" not in flushed
    assert "@body(" in flushed
