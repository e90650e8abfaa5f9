"""One lock for all tracing: PyTorch traces one function at a time. What is compiled already runs without it."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["tracing"]

_lock = threading.RLock()
_imported = False  # whether a trace has been made in this process
_paused = False  # whether garbage is to be collected again after the trace


@contextmanager
def tracing() -> Iterator[None]:
    """Hold the lock, and keep the caller's hooks for saved tensors away from tensors without data.

    Meanwhile no garbage is collected: tracing makes so many small objects that all of the process would be searched
    several times over, which takes as long as all the rest.
    """
    with _lock, saved_tensors_hooks(_itself, _itself):
        paused = False
        try:
            paused = _pause()
            yield
        finally:
            if paused:
                _resume()


def _pause() -> bool:
    """Collect no garbage; False where none is collected anyway: inside another trace, or because the user says so."""
    global _paused
    if not gc.isenabled():
        return False
    _paused = True
    gc.disable()
    return True


def _resume() -> None:
    """Collect garbage again.

    The first trace of a process imports a hundred thousand objects, which stay: they become old here, or else the next
    traces would wait until all that is there has been searched because of them. What the user has frozen stays so.
    """
    global _paused, _imported
    _paused = False
    if not _imported and not gc.get_freeze_count():
        gc.collect(0)
        gc.freeze()
        gc.unfreeze()
    _imported = True
    gc.enable()


def _itself(saved: Tensor) -> Tensor:
    return saved


def _renew() -> None:
    # A thread may be tracing while another forks; the child must not wait for it, nor keep its garbage.
    global _lock
    _lock = threading.RLock()
    if _paused:
        gc.enable()


os.register_at_fork(after_in_child=_renew)
