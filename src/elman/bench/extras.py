"""What is measured once, beside the table of cells and shapes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..cells import ElmanCell, LSTMCell
from ..layers import LSTM
from ..unfold import scan
from .rivals import agree, rivals
from .timing import alternate, milliseconds, significant, summary

__all__ = ["denormal", "one_step", "unrolled"]

Shape = tuple[int, int, int, int]

TINY = 1e-39
"""A gradient of this size is denormal in float32, and so is nearly all that is computed from it."""


def denormal(shape: Shape, seconds: float) -> dict[str, float]:
    """How many times as long a training step takes when its gradients are denormal, of elman's LSTM and torch.nn's."""
    steps, batch, inputs, hidden = shape
    found = rivals("LSTM", inputs, hidden, ("elman", "torch.nn"))
    xs, weight = torch.randn(steps, batch, inputs, requires_grad=True), torch.randn(steps, batch, hidden)
    calls = {
        (way, scale): partial(rival.train, xs, weight * scale) for way, rival in found.items() for scale in (1.0, TINY)
    }
    times = alternate(calls, seconds)
    return {way: significant(min(times[way, TINY]) / min(times[way, 1.0])) for way in found}


def one_step(calls: int, repeats: int) -> dict[str, dict[str, float]]:
    """Microseconds of a call with one step: B 1, 64 units, without gradients; the least of the repeats' means."""
    x = torch.randn(1, 1, 64)
    cells = {
        "Elman": ElmanCell(64, 64),
        "LSTM": LSTMCell(64, 64),
        "peephole LSTM": LSTMCell(64, 64, peepholes=True),
    }
    ways: dict[str, dict[str, Callable[[], Any]]] = {}
    for name, cell in cells.items():
        state: Any = cell.initial_state(1, device=x.device, dtype=x.dtype)
        ways[name] = {
            "the step itself": partial(cell, x[0], state),
            "scan": partial(scan, cell, x, state),
            "scan, llvm": partial(scan, cell, x, state, backend="llvm"),
        }
    layer, theirs = LSTM(64, 64), torch.nn.LSTM(64, 64)
    ways["LSTM"] |= {"elman.LSTM": partial(layer, x), "nn.LSTM": partial(theirs, x)}

    def mean(call: Any) -> float:
        return milliseconds(lambda: [call() for _ in range(calls)]) / calls

    found = {}
    with torch.no_grad():
        for name, those in ways.items():
            timed = alternate({way: partial(mean, call) for way, call in those.items()}, 0, repeats, repeats)
            found[name] = {way: significant(1e3 * min(each)) for way, each in timed.items()}
    return found


def unrolled(name: str, shape: Shape, seconds: float) -> dict[str, Any]:
    """The whole loop by hand in torch.compile: how long compiling forward and backward takes, and then a training step.

    Raises WrongNumbers where it computes otherwise.
    """
    steps, batch, inputs, hidden = shape
    found = rivals(name, inputs, hidden, ("elman", "eager", "compiled loop"))
    xs, weight = torch.randn(steps, batch, inputs, requires_grad=True), torch.randn(steps, batch, hidden)
    begun = time.perf_counter()
    found["compiled loop"].train(xs, weight)
    compiling = time.perf_counter() - begun
    agree(found, xs, weight, 1e-3)
    calls = {way: partial(rival.train, xs, weight) for way, rival in found.items()}
    times = alternate(calls, seconds, warm=3)
    return {
        "cell": name,
        "shape": list(shape),
        "compile seconds": significant(compiling, 3),
        "milliseconds": {way: summary(each) for way, each in times.items()},
    }
