"""Progress of a training on stderr: a live line on a terminal, sparse plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from typing import TextIO

__all__ = ["Reporter", "Snapshot", "duration"]

PLAIN_SECONDS = 10.0
"""Least time between two plain lines."""


@dataclass(frozen=True)
class Snapshot:
    """What a line of progress shows after a step; losses in nats per symbol."""

    step: int
    total: int | None
    fraction: float
    loss: float
    bits: float
    norm: float
    rate: float
    symbols: int
    skipped: int


class Reporter:
    """Writes progress to ``stream``; ``quiet=True`` writes nothing at all."""

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self.stream = stream or sys.stderr
        self.quiet = quiet
        self._live = None
        self._begin = self._shown = time.monotonic()
        self._from = 0.0
        self._speed = 0.0
        self._mark: tuple[int, float] | None = None
        if not quiet and self.stream.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=self.stream), refresh_per_second=5, transient=True)

    def start(self, step: int, fraction: float) -> None:
        """Training begins, or goes on, at ``step`` with ``fraction`` of its budget spent."""
        self._begin = self._shown = time.monotonic()
        self._from = fraction
        self._mark = None
        if self._live is not None:
            self._live.start()
        if step:
            self.note(f"continuing at step {step:,}")

    def step(self, snapshot: Snapshot) -> None:
        """One step is done."""
        if self.quiet:
            return
        now = time.monotonic()
        self._measure(snapshot.symbols, now)
        if self._live is not None:
            from rich.text import Text

            self._live.update(Text(self._line(snapshot, now), no_wrap=True, overflow="ellipsis"))
        elif now - self._shown >= PLAIN_SECONDS:
            self._shown = now
            self._print(self._line(snapshot, now))

    def validation(self, step: int, loss: float, bits: float | None, better: bool, sample: str | None) -> None:
        """A validation is done; ``sample`` is text drawn from the model, if any was."""
        figure = "not finite" if bits is None else f"{bits:.4f} bits per character"
        self.note(f"step {step:,}  validation {figure} (loss {loss:.4f}){'  best so far' if better else ''}")
        if sample:
            shown = "".join(mark if mark.isprintable() else " " for mark in " ".join(sample.split()))
            self.note(f"  sample: {shown[:160]}")

    def note(self, text: str) -> None:
        """A line that stays."""
        if self.quiet:
            return
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._print(text)

    def _print(self, line: str) -> None:
        """A plain line; when nobody reads on, as behind ``2>&1 | head``, training goes on without."""
        try:
            print(line, file=self.stream, flush=True)
        except BrokenPipeError:
            self.quiet = True
            with open(os.devnull, "w") as nowhere:  # for what is left in the buffer, and what others write
                os.dup2(nowhere.fileno(), self.stream.fileno())

    def close(self) -> None:
        """Take the live line away."""
        if self._live is not None:
            self._live.stop()

    def _measure(self, symbols: int, now: float) -> None:
        """Symbols per second, smoothed over some seconds."""
        if self._mark is None:
            self._mark = (symbols, now)
            return
        before, then = self._mark
        if now - then >= 0.5:
            speed = (symbols - before) / (now - then)
            self._speed = speed if not self._speed else 0.7 * self._speed + 0.3 * speed
            self._mark = (symbols, now)

    def _line(self, at: Snapshot, now: float) -> str:
        of = f"/{at.total:,}" if at.total else ""
        done = at.fraction - self._from
        left = (now - self._begin) / done * (1.0 - at.fraction) if done > 0 else None
        parts = [
            f"step {at.step:,}{of}",
            f"{100 * at.fraction:.0f}%",
            f"{duration(left)} left" if left is not None else "",
            f"loss {at.loss:.4f}",
            f"{at.bits:.3f} bpc",
            f"gradient {at.norm:.2f}",
            f"{self._speed:,.0f} tokens/s" if self._speed else "",
            f"{at.skipped} skipped" if at.skipped else "",
        ]
        return "  ".join(part for part in parts if part)


def duration(seconds: float) -> str:
    """``75`` → ``'1m15s'``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
