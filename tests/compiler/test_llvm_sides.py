"""Functions of Python at once on PyTorch's threads: results, what they raise, interrupts, and what is left of them."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from elman.compiler.llvm import engine, sides, threads
from elman.compiler.llvm.isa import host

if host() is None or threads.openmp() is None:
    pytest.skip("no machine code for this processor, or PyTorch runs without OpenMP", allow_module_level=True)


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    """A thread that waits in machine code cannot be interrupted: show where, and end."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def two() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    assert sides.available()
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def nothing() -> Callable[[], None]:
    """Runs machine code that does nothing, as kernels do between two looks at the world."""
    isa = host()
    assert isa is not None
    library = engine.load("define void @nothing(ptr %a, i64 %b, i64 %c) {\n  ret void\n}", isa)
    return lambda: threads.run(library.address("nothing"), None, 1)


def test_results_come_in_order() -> None:
    assert sides.at_once([lambda at=at: at * at for at in range(5)]) == [0, 1, 4, 9, 16]  # type: ignore[misc]


def test_they_run_at_the_same_time_each_on_one_thread() -> None:
    meet, alive = threading.Barrier(2, timeout=30), threading.active_count()

    def one() -> tuple[int, int, bool]:
        meet.wait()
        (torch.ones(300, 300) @ torch.ones(300, 300)).sum()  # does not enter a region of its own
        return threading.get_native_id(), torch.get_num_threads(), torch.is_grad_enabled()

    (first, *one_thread), (second, *another) = sides.at_once([one, one])
    assert one_thread == another == [1, False]
    assert first != second
    with ThreadPoolExecutor(1) as pool:  # neither what new threads begin with has changed
        assert pool.submit(torch.get_num_threads).result() == 2
    assert threading.active_count() == alive


@pytest.mark.parametrize("inference", [False, True])
def test_tensors_are_made_as_the_caller_would(inference: bool) -> None:
    with torch.inference_mode(inference):
        made = sides.at_once([lambda: torch.ones(3), lambda: torch.ones(3)])
    assert [t.is_inference() for t in made] == [inference, inference]


@pytest.mark.parametrize("at", [0, 1])
def test_what_one_raises_ends_the_others(nothing: Callable[[], None], at: int) -> None:
    def fails() -> None:
        raise KeyError("this one")

    def goes_on() -> None:
        while True:
            nothing()

    functions = [goes_on, goes_on]
    functions[at] = fails
    with pytest.raises(KeyError, match="this one"):
        sides.at_once(functions)
    nothing()  # is not abandoned
    assert sides.at_once([lambda: 1, lambda: 2]) == [1, 2]


@pytest.mark.parametrize("done", [False, True], ids=["while computing", "while waiting for the other"])
def test_an_interrupt_ends_both(nothing: Callable[[], None], done: bool) -> None:
    caller = threading.get_ident()

    def one() -> None:
        if threading.get_ident() == caller:
            if done:
                return
        else:
            os.kill(os.getpid(), signal.SIGINT)
        while True:
            nothing()

    with pytest.raises(KeyboardInterrupt):
        sides.at_once([one, one])
    nothing()


def test_no_interrupt_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one that is there already when the functions are called, before anything in them can catch it."""

    class Stop(Exception):
        pass

    def handler(*_: object) -> None:
        raise Stop

    call = f"  %status = call i32 @raise(i32 {int(signal.SIGINT)})\n  %count ="
    declared = "declare i32 @raise(i32)\n" + sides._EACH
    monkeypatch.setattr(sides, "_EACH", declared.replace("  %count =", call))
    monkeypatch.setattr(sides, "_code", sides._code.__wrapped__)  # type: ignore[attr-defined]
    previous = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(Stop):
            sides.at_once([lambda: None, lambda: None])
    finally:
        signal.signal(signal.SIGINT, previous)


def test_from_several_threads_of_python() -> None:
    def one(number: int) -> bool:
        torch.set_num_threads(2)
        found = [sides.at_once([lambda: number, lambda: torch.full((50,), number).sum().item()]) for _ in range(20)]
        return found == [[number, 50 * number]] * 20 and torch.get_num_threads() == 2

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one, range(4)))


def test_inside_one_of_them_there_is_no_other() -> None:
    assert sides.at_once([sides.available, sides.available]) == [False, False]


def test_after_a_fork_there_is_but_one_thread() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Python warns of every fork beside threads
        child = os.fork()
    if not child:
        os._exit(int(sides.available()))
    assert os.waitpid(child, 0)[1] == 0
    assert sides.available()
