"""Batches of a long text: parallel streams, read window by window with carried state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from .errors import DataError, OptionError, RunError, counted

__all__ = ["Streams", "Window", "evaluation_windows"]


@dataclass(frozen=True, eq=False)
class Window:
    """Some steps of all streams: predict ``targets`` (T, B) from ``inputs`` (T, B), both int64.

    ``fresh`` says that the state carried from the window before does not belong to this one: start anew.
    """

    inputs: Int64[Tensor, "T B"]
    targets: Int64[Tensor, "T B"]
    fresh: bool


class Streams:
    """A text cut into ``batch`` contiguous streams, read in step: truncated back-propagation through time.

    Of N ids, each stream predicts L = ⌊(N − 1) / batch⌋: stream b reads ids b·L … b·L + L − 1 and
    predicts, at each, the next. So in one epoch every one of the first batch·L + 1 ids, but for the
    first, is predicted exactly once; at most batch − 1 ids at the end are left out. An epoch has ⌈L /
    window⌉ windows, the last of which may be shorter; its first one is ``fresh``. Reading a window
    touches no more of ``ids`` than that window.

    ``ids`` is 1-D, of any integer type, for example mapped from disk. DataError if L is less than a
    window.
    """

    def __init__(self, ids: np.ndarray, batch: int, window: int, *, device: torch.device | str | None = None) -> None:
        _check(batch, window)
        if len(ids) < batch * window + 1:
            raise DataError(_too_short(len(ids), batch, window))
        self._ids, self._device = ids, device
        self.batch, self.window = batch, window
        self.steps = (len(ids) - 1) // batch
        self.windows_per_epoch = -(-self.steps // window)
        self.epoch = 0
        self.position = 0

    def next(self) -> Window:
        """The next window; ``epoch`` and ``position``, from 0, then say where the one after it stands."""
        start = self.position * self.window
        stop = min(start + self.window, self.steps)
        result = _window(self._ids, self.batch, self.steps, start, stop, self._device)
        self.position += 1
        if self.position == self.windows_per_epoch:
            self.epoch, self.position = self.epoch + 1, 0
        return result

    def state_dict(self) -> dict[str, int]:
        """Where the reading stands and, so that it is continued on the same text only, of what it is."""
        return {"epoch": self.epoch, "position": self.position} | self._shape()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at ``state``: ``next`` gives the window that would have come. RunError if it cannot be."""
        try:
            epoch, position = int(state["epoch"]), int(state["position"])
            shape = {name: int(state[name]) for name in self._shape()}
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"the stored data position is damaged ({error!r}): resume an earlier checkpoint") from error
        if shape != self._shape():
            raise RunError(
                f"the stored data position is one in {_words(shape)}, and these are {_words(self._shape())}: "
                "resume with the text, batch and window that the run began with"
            )
        if epoch < 0 or not 0 <= position < self.windows_per_epoch:
            raise RunError(
                f"the stored data position is damaged (epoch {epoch}, window {position} of "
                f"{self.windows_per_epoch}): resume an earlier checkpoint"
            )
        self.epoch, self.position = epoch, position

    def _shape(self) -> dict[str, int]:
        return {"tokens": len(self._ids), "batch": self.batch, "window": self.window}


def evaluation_windows(
    ids: np.ndarray, batch: int, window: int, *, device: torch.device | str | None = None
) -> Iterator[Window]:
    """All of a text once: of N ids every one but the first is predicted exactly once, N − 1 in all.

    ``batch`` is first reduced until each stream has at least a window, if it can be: fewer streams have
    fewer starts without context. The streams are cut and read as in :class:`Streams`; the r < batch
    predictions that remain at the end are one further stream, of batch 1, read in windows after the
    others. The first window of the streams and of the remainder is ``fresh``. With ``batch`` 1 no context
    is ever lost.

    DataError if there is nothing to predict.
    """
    _check(batch, window)
    if len(ids) < 2:
        raise DataError(f"the text has {counted(len(ids))}, and the first is not predicted: give at least 2")
    return _evaluation_windows(ids, max(1, min(batch, (len(ids) - 1) // window)), window, device)


def _evaluation_windows(
    ids: np.ndarray, batch: int, window: int, device: torch.device | str | None
) -> Iterator[Window]:
    steps = (len(ids) - 1) // batch
    for part, rows in ((ids[: batch * steps + 1], batch), (ids[batch * steps :], 1)):
        length = (len(part) - 1) // rows
        for start in range(0, length, window):
            yield _window(part, rows, length, start, min(start + window, length), device)


def _window(
    ids: np.ndarray, batch: int, steps: int, start: int, stop: int, device: torch.device | str | None
) -> Window:
    """Steps ``start`` to ``stop`` of the streams of ``steps`` predictions each."""
    rows = [ids[b * steps + start : b * steps + stop + 1] for b in range(batch)]
    block = torch.from_numpy(np.stack(rows, axis=1).astype(np.int64, copy=False)).to(device)  # (T + 1, B)
    return Window(block[:-1], block[1:], start == 0)


def _check(batch: int, window: int) -> None:
    for name, value in (("batch", batch), ("window", window)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{name} must be a whole number of at least 1; got {value!r}")


def _too_short(tokens: int, batch: int, window: int) -> str:
    needed = f"{batch} × {window} + 1 = {batch * window + 1}"
    fixes = [f"--batch {(tokens - 1) // window} or less, "] if tokens > window else []
    fixes += [f"--window {(tokens - 1) // batch} or less, "] if tokens > batch else []
    return (
        f"the text has {counted(tokens)}, and {counted(batch, 'stream')} with windows of {window} need {needed}: give "
        f"{''.join(fixes)}{'or ' if fixes else ''}a longer text"
    )


def _words(shape: dict[str, int]) -> str:
    streams, tokens = counted(shape["batch"], "stream"), counted(shape["tokens"])
    return f"{streams} with windows of {shape['window']} over {tokens}"
