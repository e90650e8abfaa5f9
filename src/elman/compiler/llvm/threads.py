"""Running a compiled function on several threads: those that PyTorch has already.

PyTorch's operators on the CPU run on the threads of an OpenMP library, which keep watching for work for a while after
each. Threads of our own would have to share the processors with them; so the function runs on theirs, through the entry
point that compilers use (``GOMP_parallel``). Where there is no such library the threads are made for each call.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...errors import UnsupportedError
from . import engine
from .isa import host

__all__ = ["Abandoned", "count", "ends_with", "openmp", "run"]

Launch = Callable[[int, Any, int], None]

# Both define launch(work, args, threads), which calls work(args, number, total) on every thread.

_OPENMP = """
declare i32 @omp_get_thread_num()
declare i32 @omp_get_num_threads()
declare i32 @omp_in_parallel()
declare void @GOMP_parallel(ptr, ptr, i32, i32)

define internal void @share(ptr %data) nounwind {
  %number = call i32 @omp_get_thread_num()
  %total = call i32 @omp_get_num_threads()
  %wide_number = zext i32 %number to i64
  %wide_total = zext i32 %total to i64
  %work = load ptr, ptr %data
  %second = getelementptr ptr, ptr %data, i64 1
  %args = load ptr, ptr %second
  call void %work(ptr %args, i64 %wide_number, i64 %wide_total)
  ret void
}

define void @launch(ptr %work, ptr %args, i64 %threads) nounwind {
  %single = icmp sle i64 %threads, 1
  br i1 %single, label %inline, label %several
several:
  %nested = call i32 @omp_in_parallel()
  %inside = icmp ne i32 %nested, 0
  br i1 %inside, label %inline, label %parallel
inline:
  call void %work(ptr %args, i64 0, i64 1)
  ret void
parallel:
  %data = alloca [2 x ptr]
  store ptr %work, ptr %data
  %second = getelementptr ptr, ptr %data, i64 1
  store ptr %args, ptr %second
  %narrow = trunc i64 %threads to i32
  call void @GOMP_parallel(ptr @share, ptr %data, i32 %narrow, i32 0)
  ret void
}
"""

# A thread takes its number when it starts; none begins before it is known how many the system gave. They end with the
# call, so that nothing is left that a fork, an interrupt or another caller could find half done.
_PTHREADS = """
%call = type { ptr, ptr, i64, i64 }
declare i32 @sched_yield()
declare i32 @pthread_create(ptr, ptr, ptr, ptr)
declare i32 @pthread_join(i64, ptr)

define internal ptr @share(ptr %data) nounwind {
  %total_at = getelementptr %call, ptr %data, i64 0, i32 2
  %next_at = getelementptr %call, ptr %data, i64 0, i32 3
  br label %wait
wait:
  %offered = call i32 @sched_yield()
  %total = load atomic i64, ptr %total_at acquire, align 8
  %early = icmp eq i64 %total, 0
  br i1 %early, label %wait, label %begin
begin:
  %number = atomicrmw add ptr %next_at, i64 1 monotonic
  %work = load ptr, ptr %data
  %args_at = getelementptr %call, ptr %data, i64 0, i32 1
  %args = load ptr, ptr %args_at
  call void %work(ptr %args, i64 %number, i64 %total)
  ret ptr null
}

define void @launch(ptr %work, ptr %args, i64 %threads) nounwind {
  %single = icmp sle i64 %threads, 1
  br i1 %single, label %inline, label %parallel
inline:
  call void %work(ptr %args, i64 0, i64 1)
  ret void
parallel:
  %data = alloca %call
  %handles = alloca i64, i64 %threads
  %args_at = getelementptr %call, ptr %data, i64 0, i32 1
  %total_at = getelementptr %call, ptr %data, i64 0, i32 2
  %next_at = getelementptr %call, ptr %data, i64 0, i32 3
  store ptr %work, ptr %data
  store ptr %args, ptr %args_at
  store i64 0, ptr %total_at
  store i64 1, ptr %next_at
  br label %create
create:
  %made = phi i64 [ 1, %parallel ], [ %more, %created ]
  %handle = getelementptr i64, ptr %handles, i64 %made
  %failed = call i32 @pthread_create(ptr %handle, ptr null, ptr @share, ptr %data)
  %refused = icmp ne i32 %failed, 0
  br i1 %refused, label %begin, label %created
created:
  %more = add i64 %made, 1
  %enough = icmp sge i64 %more, %threads
  br i1 %enough, label %begin, label %create
begin:
  %total = phi i64 [ %made, %create ], [ %more, %created ]
  store atomic i64 %total, ptr %total_at release, align 8
  call void %work(ptr %args, i64 0, i64 %total)
  br label %join
join:
  %joined = phi i64 [ 1, %begin ], [ %next, %joining ]
  %all = icmp sge i64 %joined, %total
  br i1 %all, label %done, label %joining
joining:
  %other_at = getelementptr i64, ptr %handles, i64 %joined
  %other = load i64, ptr %other_at
  %status = call i32 @pthread_join(i64 %other, ptr null)
  %next = add i64 %joined, 1
  br label %join
done:
  ret void
}
"""

_lock = threading.RLock()
_library: engine.Library | None = None  # holds the memory that _launch runs in
_launch: Launch | None = None
_forked = False


class Abandoned(Exception):
    """What runs at the same time as this thread has failed."""


class _Here(threading.local):
    """What a thread has to look at before it runs more."""

    failed: list[BaseException] | tuple[()] = ()


_here = _Here()


@contextmanager
def ends_with(failed: list[BaseException]) -> Iterator[None]:
    """Inside, ``run`` raises Abandoned on this thread as soon as there is something in a list that others write to."""
    _here.failed = failed
    try:
        yield
    finally:
        _here.failed = ()


def count() -> int:
    """How many threads to ask for: PyTorch's number; one in a process that was forked off another."""
    return 1 if _forked else torch.get_num_threads()


def run(address: int, args: Any, threads: int) -> None:
    """Call the function ``void(ptr args, i64 thread, i64 threads)`` at an address on that many threads at once.

    ``args`` is an address or a ctypes array. Each thread is told its number, from 0, and how many there really are,
    which may be fewer: one inside a parallel region, and one in a forked process, where the threads of the parent are
    not. Returns when all are done. Several threads of Python may call it at the same time.

    Raises UnsupportedError on a processor that machine code is not made for, and Abandoned (see ``ends_with``).
    """
    if _here.failed:
        raise Abandoned
    (_launch or _prepared())(address, args, 1 if _forked else threads)


def _prepared() -> Launch:
    """The function that starts threads, compiled on first use."""
    global _library, _launch
    with _lock:
        if _launch is None:
            isa = host()
            if isa is None:
                raise UnsupportedError("there is no machine code for this processor; use another backend.")
            found = openmp()
            _library = engine.load(_OPENMP if found else _PTHREADS, isa, symbols=found)
            kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
            _launch = kind(_library.address("launch"))
    return _launch


def openmp() -> dict[str, int] | None:
    """The addresses of the OpenMP library that PyTorch runs on, None where there is none that has them all.

    They are looked up as the system did for PyTorch: among the libraries open to all (one that was preloaded comes
    first), then among those that PyTorch's own needs.
    """
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "omp_in_parallel", "omp_set_num_threads")
    for path in (None, torch._C.__file__):
        try:
            library = ctypes.CDLL(path)
            return {name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in names}
        except (OSError, AttributeError, TypeError):  # TypeError: None, on systems that have no such scope
            continue
    return None


def _after_fork() -> None:
    global _forked, _lock
    _forked = True
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)
