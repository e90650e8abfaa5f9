"""What is measured, in which order, and how it is printed while it is measured; ``result`` gives it as one dict.

Every row is one cell at one shape and number of threads: rivals compute the same first, then take turns. Training is
forward and backward with every gradient, of xs too. Times are milliseconds, minimum and median.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .apart import first_calls, peak_memory
from .beside import STEPS, Jax, NoJax, jax_beside
from .cells import CELLS, COMPOSED
from .extras import denormal, one_step, unrolled
from .rivals import Rival, agree, rivals, verify
from .timing import alternate, gemm_peak, gemms, gflops, milliseconds, significant, summary, threads

__all__ = ["MAIN", "SHAPES", "Plan", "Shape", "measure", "written"]

Shape = tuple[int, int, int, int]

SHAPES: tuple[Shape, ...] = (
    (256, 8, 128, 128),
    (128, 32, 64, 256),
    (128, 32, 512, 512),
    (64, 64, 1024, 1024),
    (1024, 1, 256, 256),
    (64, 16, 64, 64),
    (100, 20, 200, 200),
    (128, 32, 256, 256),
)
"""T, B, I, H; MAIN last, for what torch.compile loads slows the calls that come after."""

MAIN: Shape = (128, 32, 256, 256)
"""Where every rival takes part."""

SMALL: Shape = (16, 16, 64, 64)
"""Short enough for torch.compile to take the whole unrolled loop."""

RESERVED = 150.0
"""Seconds for what is measured after the rows."""

CLOSE = 2e-3
"""Largest deviation from the loop by hand in float32, relative to the largest value: sums over all rows and steps."""


NARROW = ("LSTM", "GRU", "Elman", "peephole LSTM", "layer-norm LSTM")
"""Cells that are measured in bfloat16 too, under autocast, on all threads."""

NARROW_CLOSE = 0.3
"""Largest deviation from the loop by hand in float32, where rivals compute in bfloat16."""


@dataclass(frozen=True)
class Plan:
    """What is measured. ``whole`` leaves nothing out: only such a result is kept for good."""

    cells: tuple[str, ...] = tuple(CELLS)
    narrow: tuple[str, ...] = NARROW
    shapes: tuple[Shape, ...] = SHAPES
    counts: tuple[int, ...] = (1, 2)
    seconds: float = 0.8
    """That the turns of one row take, where three turns do not take longer."""
    minutes: float = 15.0
    """That all of it may take: rows that come late take fewer turns, and the last unrolled loops are left out."""
    extras: bool = True
    quick: bool = False

    @classmethod
    def quickly(cls, counts: tuple[int, ...] = (1,)) -> Plan:
        """Small enough to see within seconds that everything runs."""
        return cls(("LSTM", "peephole LSTM", "random"), ("LSTM",), ((12, 4, 16, 16),), counts, 0.05, quick=True)

    @property
    def whole(self) -> bool:
        return self == Plan(counts=self.counts) and len(self.counts) > 1


def measure(plan: Plan, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Everything, with the lines that say it handed to ``say``. Raises WrongNumbers where rivals disagree."""
    begun, most = time.perf_counter(), max(plan.counts)
    end = begun + 60 * plan.minutes
    peak = gemm_peak(plan.counts, 2 if plan.quick else 9, 256 if plan.quick else 2048)
    deviations = {name: verify(name) for name in plan.cells}
    say(f"largest deviation from the loop by hand, float64, outputs and gradients: {max(deviations.values()):.0e}")
    result: dict[str, Any] = {"float64 deviation": {name: significant(d, 2) for name, d in deviations.items()}}
    if plan.extras:
        with threads(most):
            _first_of_all(plan, result, say)
    rows: list[dict[str, Any]] = []
    result["rows"] = rows
    for shape in plan.shapes:
        for count in plan.counts:
            say(f"\nT·B·H {written(shape)}, {count} thread{'s' if count > 1 else ''}: milliseconds, minimum (median)")
            everyone = shape == MAIN and count == most
            with threads(count), _jax(count, result) if everyone else nullcontext() as jax:
                narrow = plan.narrow if count == most else ()
                for name, autocast in [*((n, False) for n in plan.cells), *((n, True) for n in narrow)]:
                    each = len(plan.counts) * len(plan.cells) + len(plan.narrow)
                    share = (end - RESERVED - time.perf_counter()) / (len(plan.shapes) * each - len(rows))
                    everything = everyone and not autocast
                    rows.append(_row(name, shape, count, autocast, (plan.seconds, share), everything, jax))
                    say(_line(rows[-1]))
    if plan.extras and not plan.quick:
        with threads(most):
            _last_of_all(plan, most, end, result, say)
    after = gemm_peak(plan.counts, 2 if plan.quick else 9, 256 if plan.quick else 2048)
    result["gemm gflops"] = {n: {way: max(peak[n][way], after[n][way]) for way in peak[n]} for n in peak}
    result["minutes"] = significant((time.perf_counter() - begun) / 60, 2)
    return result


def _row(
    name: str,
    shape: Shape,
    count: int,
    autocast: bool,
    time_of_row: tuple[float, float],
    everyone: bool,
    jax: Jax | None,
) -> dict[str, Any]:
    """Times of all rivals. ``time_of_row``: the seconds that its turns should take, and those that there are for it."""
    steps, batch, inputs, hidden = shape
    ways = ("elman", "torch.nn", "eager") + (("interpret", "compiled step") if everyone else ())
    found = rivals(name, inputs, hidden, ways, autocast=autocast)
    generator = torch.Generator().manual_seed(2)
    xs = torch.randn(steps, batch, inputs, generator=generator, requires_grad=True)
    weight = torch.randn(steps, batch, hidden, generator=generator)
    row: dict[str, Any] = {"cell": name, "shape": list(shape), "threads": count}
    if autocast:
        row["precision"] = "bfloat16"
        by = rivals(name, inputs, hidden, ("eager",))["eager"]
        row["deviation from float32"] = significant(agree(found, xs, weight, NARROW_CLOSE, by), 2)
    else:
        row["float32 deviation"] = significant(agree(found, xs, weight, CLOSE), 2)
    if name in ("peephole LSTM", "layer-norm LSTM") and not autocast:
        found["plain LSTM"] = rivals("LSTM", inputs, hidden, ("elman",))["elman"]
    calls = dict(_calls(found, xs, weight))
    if jax is not None and name in STEPS and everyone:
        row["jax compile seconds"] = significant(jax.load(name, found["eager"], xs, weight))
        calls |= {("JAX", mode): partial(jax.milliseconds, mode) for mode in ("forward", "training")}
    if name == "LSTM" and hidden >= 256 and not autocast:  # the peak that it is held against, under the same conditions
        calls |= {(way, "peak"): partial(milliseconds, call) for way, call in gemms().items()}
    for (_, mode), call in calls.items():
        if mode == "forward":  # training has run already, to be compared
            call()
    wanted, share = time_of_row
    times = alternate(calls, min(wanted, share), least=3 if share >= wanted else 2, warm=0)
    row["milliseconds"] = {}
    for (way, mode), each in times.items():
        if mode == "peak":
            row.setdefault("gemm gflops", {})[way] = gflops(each)
        else:
            row["milliseconds"].setdefault(way, {})[mode] = summary(each)
    del found, calls
    gc.collect()
    return row


def _calls(
    found: dict[str, Rival], xs: torch.Tensor, weight: torch.Tensor
) -> Iterator[tuple[tuple[str, str], Callable[[], float | None]]]:
    """Forward without gradients and training, of every rival."""
    plain = xs.detach()

    def forward(rival: Rival) -> None:
        with torch.no_grad():
            rival.run(plain)

    for way, rival in found.items():
        if way != "compiled step":  # each mode would be compiled anew, for some seconds
            yield (way, "forward"), partial(forward, rival)
        yield (way, "training"), partial(rival.train, xs, weight)


@contextmanager
def _jax(count: int, result: dict[str, Any]) -> Iterator[Jax | None]:
    """JAX, or None with a note in the result why not."""
    try:
        process = jax_beside(count)
        jax = process.__enter__()
    except NoJax as error:
        result["jax"] = f"left out: {error}"
        yield None
        return
    result["jax"] = jax.version
    try:
        yield jax
    finally:
        process.__exit__(None, None, None)


def _first_of_all(plan: Plan, result: dict[str, Any], say: Callable[[str], None]) -> None:
    """What is measured once, in a process as fresh as can be."""
    result["one step us"] = one_step(20 if plan.quick else 300, 2 if plan.quick else 15)
    for name, ways in result["one step us"].items():
        say(f"one step, B 1, 64 units, {name}: {_figures(ways, ' µs')}")
    result["denormal"] = denormal(plan.shapes[0] if plan.quick else MAIN, plan.seconds)
    say(f"gradients that underflow, training step against an ordinary one: {_figures(result['denormal'], '×')}")


def _last_of_all(plan: Plan, most: int, end: float, result: dict[str, Any], say: Callable[[str], None]) -> None:
    """What is measured once, in processes of its own or with torch.compile."""
    say("")
    result["memory"] = []
    for name, at in (("LSTM", MAIN), ("LSTM", (64, 64, 1024, 1024)), ("GRU", MAIN), ("Elman", MAIN)):
        mib = {way: peak_memory(name, way, at, most) for way in ("elman", "torch.nn")}
        result["memory"].append({"cell": name, "shape": list(at), "MiB": mib})
        say(f"memory that a training step adds, {name}, {written(at)}: {_figures(mib, ' MiB')}")
    result["first call ms"] = first_calls(("LSTM", "GRU", "layer-norm LSTM", "random"), MAIN[3], most)
    for label, cells in result["first call ms"].items():
        say(f"first training step, {label}: {_figures({n: c['first'] for n, c in cells.items()}, ' ms')}")
    result["unrolled"] = []
    for name in COMPOSED:
        if time.perf_counter() > end:
            say(f"unrolled in torch.compile, {name}: left out, for the {plan.minutes:g} minutes are over")
            continue
        row = unrolled(name, SMALL, plan.seconds)
        result["unrolled"].append(row)
        say(
            f"unrolled in torch.compile, {name}, {written(SMALL)}: compiled in {row['compile seconds']} s,"
            f" {_figures({way: t['min'] for way, t in row['milliseconds'].items()}, ' ms')}"
        )


def written(shape: Shape | list[int]) -> str:
    """T·B·H, and I where it is another number."""
    steps, batch, inputs, hidden = shape
    return f"{steps}·{batch}·{hidden}" + ("" if inputs == hidden else f", I {inputs}")


def _figures(values: dict[str, Any], unit: str) -> str:
    return ", ".join(f"{name} {'–' if value is None else f'{value:.3g}'}{unit}" for name, value in values.items())


def _line(row: dict[str, Any]) -> str:
    """A row as text: elman's times, and those of the others as multiples of them."""
    modes = ("forward", "training")
    own = row["milliseconds"]["elman"]
    parts = [f"{own[m]['min']:.4g} ({own[m]['median']:.4g})" for m in modes]
    others = []
    for way, times in row["milliseconds"].items():
        multiples = [f"{times[m]['min'] / own[m]['min']:.2f}" if m in times else "–" for m in modes]
        others += [f"{way} {' / '.join(multiples)}"] if way != "elman" else []
    cell = row["cell"] + (", bf16" if "precision" in row else "")
    return f"{cell:<23}forward {parts[0]:<16} training {parts[1]:<16} ×: {', '.join(others)}"
