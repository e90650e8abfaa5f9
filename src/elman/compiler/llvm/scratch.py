"""Memory of machine code while it runs, kept from call to call: fresh pages cost time."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from . import threads
from .calls import listening

__all__ = ["KEPT_BYTES", "LINE", "Scratch", "lined"]

LINE = 64  # bytes of a cache line

KEPT_BYTES = 64 << 20
"""That stay for later calls."""

_CALLERS = 2  # whose memory stays at least: two that run side by side have one thread each

_free: list[Tensor] = []  # that no call uses; taking from it and adding to it are single operations


def lined(size: int) -> int:
    """So many bytes, filled up to whole cache lines."""
    return -(-size // LINE) * LINE


def _kept() -> Tensor | None:
    """Memory of an earlier call."""
    try:
        return _free.pop()
    except IndexError:  # perhaps another thread took the last
        return None


class Scratch:
    """Memory for one call: a context, which gives the addresses of so many bytes each, whole cache lines."""

    def __init__(self, *sizes: int) -> None:
        self.ends = [*accumulate(map(lined, sizes), initial=LINE)]

    def __enter__(self) -> list[int]:
        self.noted = listening.listener is not None  # then no call has this memory, nor may a later one
        room = None if self.noted else _kept()
        if room is None or room.numel() < self.ends[-1]:
            room = torch.empty(self.ends[-1], dtype=torch.uint8, device="cpu")
        self.room = room
        start = lined(room.data_ptr()) - LINE
        return [start + end for end in self.ends[:-1]]

    def __exit__(self, *failure: object) -> None:
        if not self.noted and self.ends[-1] <= KEPT_BYTES and len(_free) < max(threads.count(), _CALLERS):
            _free.append(self.room)
