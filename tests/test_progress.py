"""Progress lines: sparse in a file, live on a terminal, none when quiet."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from elman import progress
from elman.plots import draw_losses, read_metrics
from elman.progress import Reporter, Snapshot, duration

AT = Snapshot(step=1200, total=4000, fraction=0.3, loss=1.25, bits=1.8034, norm=0.5, rate=1e-3, symbols=9000, skipped=2)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.2, "0s"), (59.4, "59s"), (75, "1m15s"), (3600, "1h00m"), (9000, "2h30m")]
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def test_plain_lines_are_sparse_and_complete(clock: Clock) -> None:
    stream = io.StringIO()
    reporter = Reporter(stream)
    reporter.start(0, 0.0)
    for _ in range(25):
        clock.now += 1.0
        reporter.step(AT)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    for word in (
        "step 1,200/4,000",
        "30%",
        "loss 1.2500",
        "1.803 bpc",
        "gradient 0.50",
        "2 skipped",
        "23s left",
    ):
        assert word in lines[0]


def test_tokens_per_second(clock: Clock) -> None:
    stream = io.StringIO()
    reporter = Reporter(stream)
    reporter.start(0, 0.0)
    for second in range(12):
        clock.now += 1.0
        reporter.step(Snapshot(**{**vars(AT), "symbols": 500 * second}))
    assert "500 tokens/s" in stream.getvalue()


def test_a_terminal_gets_a_live_line_and_lasting_notes() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    reporter = Reporter(stream)
    reporter.start(5, 0.1)
    reporter.step(AT)
    reporter.validation(10, 1.0, 1.44, True, "a [bold] sample\x1b[31m")
    reporter.close()
    shown = stream.getvalue()
    assert "continuing at step 5" in shown
    assert "1.4400 bits per character" in shown
    assert "a [bold] sample" in shown
    assert "\x1b[31m" not in shown, "what a model draws does not command the terminal"


def test_quiet_is_quiet() -> None:
    stream = io.StringIO()
    reporter = Reporter(stream, quiet=True)
    reporter.start(3, 0.5)
    reporter.step(AT)
    reporter.validation(10, 1.0, None, False, None)
    reporter.close()
    assert stream.getvalue() == ""


def test_a_cut_off_last_line_of_metrics_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "m").write_text('{"step": 1, "bits_per_character": 2.0}\n{"st')
    assert read_metrics(tmp_path / "m") == [{"step": 1, "bits_per_character": 2.0}]
    draw_losses(tmp_path / "m", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw_draws_nothing(tmp_path: Path) -> None:
    draw_losses(tmp_path / "none", tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_goes_on_when_nobody_reads_any_more() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        reporter = Reporter(stream)
        os.close(reading)
        reporter.note("one")
        reporter.note("two")
        reporter.close()
        assert reporter.quiet
        print("what others write there goes nowhere", file=stream, flush=True)
