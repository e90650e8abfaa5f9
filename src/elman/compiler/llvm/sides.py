"""Functions of Python at the same time, each on one of the threads that PyTorch has already.

Threads of Python's own would have to share the processors with those of PyTorch's OpenMP library, which keep watching
for work. So the functions are entered from one of its parallel regions. Inside, PyTorch's operations and our kernels
run on the one thread that called them, and nothing of it is left when the region ends.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from . import engine, threads
from .isa import host

__all__ = ["at_once", "available"]

T = TypeVar("T")

_LISTEN = 0.05  # seconds after which who waits looks for an interrupt that came just before it began to wait

# Each thread calls its own of the functions, whose number and addresses are the arguments; all, where it is alone.
_EACH = """
define void @each(ptr %functions, i64 %thread, i64 %threads) {
  %count = load i64, ptr %functions
  br label %next
next:
  %at = phi i64 [ %thread, %0 ], [ %later, %call ]
  %more = icmp slt i64 %at, %count
  br i1 %more, label %call, label %done
call:
  %place = add i64 %at, 1
  %entry = getelementptr i64, ptr %functions, i64 %place
  %function = load ptr, ptr %entry
  call void %function(i64 %threads)
  %later = add i64 %at, %threads
  br label %next
done:
  ret void
}
"""

_Callback = ctypes.CFUNCTYPE(None, ctypes.c_int64)


class _Code(NamedTuple):
    """The machine code of ``each``, which lives as long as its library; OpenMP's number of threads, to be set."""

    library: engine.Library
    each: int
    set_threads: Callable[[int], None]


@engine.kept
def _code() -> _Code | None:
    """None where there is no machine code, or no OpenMP library that PyTorch runs on."""
    isa, openmp = host(), threads.openmp()
    if isa is None or openmp is None:
        return None
    library = engine.load(_EACH, isa)
    set_threads = ctypes.CFUNCTYPE(None, ctypes.c_int)(openmp["omp_set_num_threads"])
    return _Code(library, library.address("each"), set_threads)


def available() -> bool:
    """Whether functions can run at the same time: not with one thread, nor in a process that was forked."""
    return threads.count() > 1 and _code() is not None


def at_once(functions: Sequence[Callable[[], T]]) -> list[T]:
    """The results of functions that run at the same time, without gradients, each with one thread of PyTorch's.

    What one of them raises is raised here, an interrupt among it; the others then end with their next kernel.
    """
    code = _code()
    assert code is not None, "ask whether it is available"
    together = _Together(code, len(functions))
    sides = [together.side(at, function) for at, function in enumerate(functions)]
    for side in sides:
        next(side)
    # Python looks for signals where a function begins, before anything in it can catch what their handler raises. The
    # methods are none of Python's functions: they go on inside a generator, within its try.
    callbacks = [_Callback(side.send) for side in sides]
    addresses = [ctypes.cast(callback, ctypes.c_void_p).value or 0 for callback in callbacks]
    threads.run(code.each, (ctypes.c_int64 * (1 + len(addresses)))(len(addresses), *addresses), len(addresses))
    if together.failed:
        try:
            raise together.failed[0]
        finally:
            together.failed.clear()  # their tracebacks hold these frames
    return [together.results[at] for at in range(len(functions))]


class _Together:
    """What functions that run at the same time know of one another."""

    def __init__(self, code: _Code, count: int) -> None:
        self.code, self.count, self.caller = code, count, threading.get_ident()
        self.inference = torch.is_inference_mode_enabled()
        self.results: dict[int, Any] = {}
        self.failed: list[BaseException] = []  # the first is the cause
        self.running = [threading.Lock() for _ in range(count)]
        for lock in self.running:
            lock.acquire()

    def side(self, at: int, function: Callable[[], Any]) -> Generator[None, int, None]:
        """Runs one of the functions when it is sent how many threads there are."""
        own = False
        try:
            given = yield
            own = threading.get_ident() == self.caller
            if given > 1:
                torch.get_num_threads()  # in a thread's first call PyTorch sets the number, so it is set afterwards
                self.code.set_threads(1)  # for the region alone
            with torch.inference_mode(self.inference), torch.no_grad(), threads.ends_with(self.failed):
                self.results[at] = function()
            if own and given >= self.count:  # waiting at the end of the region, it would not hear of an interrupt
                for lock in self.running[:at] + self.running[at + 1 :]:
                    while not lock.acquire(timeout=_LISTEN):
                        pass
        except BaseException as error:  # every one is raised by ``at_once``
            self.failed.append(error)
        if not own:  # a call might raise what a signal handler raises, but only on the main thread
            self.running[at].release()
        yield
