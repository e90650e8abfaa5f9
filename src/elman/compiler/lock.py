"""One lock for all tracing: PyTorch traces one function at a time. What is compiled already runs without it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["tracing"]

_lock = threading.RLock()


@contextmanager
def tracing() -> Iterator[None]:
    """Hold the lock, and keep the caller's hooks for saved tensors away from tensors without data."""
    with _lock, saved_tensors_hooks(_itself, _itself):
        yield


def _itself(saved: Tensor) -> Tensor:
    return saved


def _renew() -> None:
    # A thread may be tracing while another forks; the child must not wait for it.
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew)
