"""Memory of machine code while it runs, kept from call to call: fresh pages cost time."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from . import threads

__all__ = ["LINE", "Scratch", "lined"]

LINE = 64  # bytes of a cache line

_KEPT_BYTES = 64 << 20  # that stay for later calls

_free: list[Tensor] = []  # that no call uses; taking from it and adding to it are single operations


def lined(size: int) -> int:
    """So many bytes, filled up to whole cache lines."""
    return -(-size // LINE) * LINE


class Scratch:
    """Memory for one call: a context, which gives the addresses of so many bytes each, whole cache lines."""

    def __init__(self, *sizes: int) -> None:
        self.ends = [*accumulate(map(lined, sizes), initial=LINE)]

    def __enter__(self) -> list[int]:
        try:
            self.room = _free.pop()
        except IndexError:
            self.room = torch.empty(0, dtype=torch.uint8)
        if self.room.numel() < self.ends[-1]:
            self.room = torch.empty(self.ends[-1], dtype=torch.uint8)
        start = lined(self.room.data_ptr()) - LINE
        return [start + end for end in self.ends[:-1]]

    def __exit__(self, *failure: object) -> None:
        if self.ends[-1] <= _KEPT_BYTES and len(_free) < threads.count():
            _free.append(self.room)
