"""One lock for all tracing: PyTorch traces one function at a time. What is compiled already runs without it."""

from __future__ import annotations

import os
import threading

__all__ = ["tracing"]

_lock = threading.RLock()


def tracing() -> threading.RLock:
    """The lock to hold while tracing, a context manager."""
    return _lock


def _renew() -> None:
    # A thread may be tracing while another forks; the child must not wait for it.
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew)
