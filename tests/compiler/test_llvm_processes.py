"""Machine code among threads, forks and interrupts, through ``scan`` as users call it."""

from __future__ import annotations

import faulthandler
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from llvmcells import given, made

from comparing import assert_same, everything, scan_by
from elman.compiler import cache


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    """A thread that waits in machine code cannot be interrupted: show where, and end."""
    faulthandler.dump_traceback_later(100, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(params=[1, 2])
def count(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("compiled", [False, True], ids=["the first call of all", "compiled before"])
@pytest.mark.parametrize("size", [(9, 33, 5, 100), (2, 2, 7, 500)], ids=["rows are shared", "units are shared"])
def test_several_threads_of_python_with_one_cell(size: tuple[int, int, int, int], compiled: bool, count: int) -> None:
    steps, batch, d, h = size
    cell = made("lstm", d, h, torch.float64)
    cache.forget()
    sources = given(cell, steps, batch, d, torch.float64)
    expected = everything(scan_by("llvm" if compiled else "reference"), cell, sources)
    together = threading.Barrier(6)

    def one(_: int) -> list[dict[str, torch.Tensor]]:
        torch.set_num_threads(count)  # a number of each thread's own
        together.wait()
        found = []
        for _ in range(3):
            ys, final = scan_by("llvm")(cell, sources["xs"], sources["state"])
            grads = torch.autograd.grad(ys.sum() + final[1].sum(), [sources["xs"], *cell.parameters()])
            found.append({"y": ys.detach(), **{str(i): g for i, g in enumerate(grads)}})
        return found

    with ThreadPoolExecutor(6) as pool:
        results = [found for several in pool.map(one, range(6)) for found in several]
    for found in results:
        assert_same(found, results[0], rtol=0, atol=0)
    torch.testing.assert_close(results[0]["y"], expected["y 0"], rtol=1e-9, atol=1e-10)


HEAD = """
import os, signal, sys, threading, time
import torch
import elman
torch.manual_seed(0)
torch.set_num_threads(int(sys.argv[1]))
def trained(cell, xs, gradients=True):
    with torch.set_grad_enabled(gradients):
        ys, _ = elman.scan(cell, xs, backend="llvm")
    return [ys.detach(), *(torch.autograd.grad(ys.sum(), list(cell.parameters())) if gradients else ())]
def same(found, expected):
    return all(torch.equal(a, b) if sys.argv[1] == "1" else torch.allclose(a, b) for a, b in zip(found, expected))
"""

FORKED = (
    HEAD
    + """
cell, xs = elman.LSTMCell(5, 100).double(), torch.randn(9, 33, 5, dtype=torch.float64)
other = elman.GRUCell(5, 64).double()
if sys.argv[2] == "before":
    expected = trained(cell, xs)
child = os.fork()
if not child:
    torch.set_num_threads(1)  # as PyTorch asks of a forked process
    # Built with CUDA, PyTorch refuses gradients in a child of a process that has computed some.
    gradients = sys.argv[2] != "before" or torch.version.cuda is None
    found, unseen = trained(cell, xs, gradients), trained(other, xs, gradients)
    if sys.argv[2] == "before":
        assert all(torch.allclose(a, b) for a, b in zip(found, expected))
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0, "the child failed"
again = trained(cell, xs)
assert sys.argv[2] == "after" or same(again, expected)
print("done")
"""
)

INTERRUPTED = (
    HEAD
    + """
steps, batch, hidden = map(int, sys.argv[2:])
cell, xs = elman.ElmanCell(16, hidden), torch.zeros(1, 1, 16).expand(steps, batch, 16)
tiny = torch.full((9,), torch.finfo(torch.float32).tiny)
with torch.no_grad():
    elman.scan(cell, xs[:2], backend="llvm")
inside, sent = threading.Event(), []
from elman.compiler.llvm import threads
run = threads.run
def watched(*args):
    inside.set()
    run(*args)
threads.run = watched
def interrupt():
    inside.wait()
    threading.Event().wait(0.2)
    sent.append(time.process_time())
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    with torch.no_grad():
        elman.scan(cell, xs, backend="llvm")
except KeyboardInterrupt:
    taken = time.process_time() - sent[0]
else:
    raise SystemExit("not interrupted")
assert (tiny * 0.5).all(), "the mode of the processor was not restored"
assert taken < 0.1 * int(sys.argv[1]), taken  # seconds of the processor's, so of each thread
with torch.no_grad():
    ys, _ = elman.scan(cell, xs[:9], backend="llvm")
    again, _ = elman.scan(cell, xs[:9], backend="reference")
torch.testing.assert_close(ys, again)
print("done")
"""
)


def run(source: str, *args: str) -> None:
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", source, *args],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        cwd=Path(__file__).parent,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.endswith("done\n")


@pytest.mark.parametrize("parent", ["before", "after"])
def test_after_a_fork(count: int, parent: str) -> None:
    """Of a process that has run machine code, and of one that has not; it goes on in both."""
    run(FORKED, str(count), parent)


@pytest.mark.parametrize("size", [(30_000, 4, 512), (4_000, 1, 2048)], ids=["computing", "reading weights"])
def test_an_interrupt_is_heard_within_a_tenth_of_a_second(size: tuple[int, int, int], count: int) -> None:
    run(INTERRUPTED, str(count), *map(str, size))
