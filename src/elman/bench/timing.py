"""Times of several calls that take turns, and the peak of this machine that they are held against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch

__all__ = ["alternate", "gemm_peak", "gemms", "gflops", "milliseconds", "significant", "summary", "threads"]

Key = TypeVar("Key", bound=Hashable)

LONG = 3.0
"""Seconds."""


def milliseconds(call: Callable[[], object]) -> float:
    """How long one call takes."""
    begun = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begun)


def alternate(
    calls: Mapping[Key, Callable[[], float | None]], seconds: float, least: int = 3, most: int = 15, warm: int = 1
) -> dict[Key, list[float]]:
    """Milliseconds of every call, which take turns, so that a slow moment of the machine hits all of them.

    As many turns as take about ``seconds``, within ``least`` and ``most``, after ``warm`` that do not count; two are
    enough where one takes LONG. A call that gives a number measures itself: that number is its time.
    """
    for _ in range(warm):
        for call in calls.values():
            call()
    times: dict[Key, list[float]] = {key: [] for key in calls}
    begun, done = time.perf_counter(), 0
    while True:
        for key, call in calls.items():
            start = time.perf_counter()
            own = call()
            times[key].append(1e3 * (time.perf_counter() - start) if own is None else own)
        done += 1
        spent = time.perf_counter() - begun
        enough = min(least, 2) if spent > LONG * done else least
        if done >= most or (done >= enough and spent * (1 + 1 / done) > seconds):
            break
    return times


def summary(times: list[float]) -> dict[str, float]:
    """What is kept of a list of times."""
    return {
        "min": significant(min(times)),
        "median": significant(statistics.median(times)),
        "turns": len(times),
    }


def significant(value: float, digits: int = 4) -> float:
    """Value with so many digits that count."""
    return float(f"{value:.{digits}g}")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch's."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


GEMM = 2048
"""Rows and columns of the matrices whose product is the measure of a peak."""


def gemms(size: int = GEMM) -> dict[str, Callable[[], Any]]:
    """A square matrix product in float32: torch.mm and, where it is, oneDNN, which gets its matrix packed."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    ways: dict[str, Callable[[], Any]] = {"torch.mm": partial(torch.mm, a, b)}
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        packed = torch.ops.mkldnn._reorder_linear_weight(b, size)
        ways["oneDNN"] = partial(torch.ops.mkldnn._linear_pointwise, a, packed, None, "none", [], "")
    return ways


def gflops(times: list[float], size: int = GEMM) -> float:
    """GFLOP/s of the fastest of such products, which took so many milliseconds."""
    return significant(2 * size**3 / min(times) / 1e6)


def gemm_peak(counts: tuple[int, ...], turns: int = 9, size: int = GEMM) -> dict[str, dict[str, float]]:
    """GFLOP/s of the products, by number of threads and way."""
    ways = {way: partial(milliseconds, call) for way, call in gemms(size).items()}
    found = {}
    for count in counts:
        with threads(count):
            times = alternate(ways, 0.0, turns, turns)
        found[str(count)] = {way: gflops(each, size) for way, each in times.items()}
    return found
