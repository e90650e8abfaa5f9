"""elman: write the recurrence, get the kernel.

``scan`` unfolds any step through time; ``explain`` shows what becomes of it; ``record`` marks a value to look at.
Cells are single steps; ``RNN``, ``LSTM`` and ``GRU`` are torch.nn's layers on the same engine; ``load`` opens a
trained run. Each is loaded on first use, so that ``import elman`` costs nothing by itself.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cells import ElmanCell, GRUCell, LSTMCell
    from .explaining import explain
    from .layers import GRU, LSTM, RNN
    from .recording import record
    from .runs import load
    from .unfold import Recording, scan

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "ElmanCell",
    "GRUCell",
    "LSTMCell",
    "Recording",
    "explain",
    "load",
    "record",
    "scan",
]
__version__ = "0.1.0"

_HOME = {
    "cells": ("ElmanCell", "GRUCell", "LSTMCell"),
    "explaining": ("explain",),
    "layers": ("GRU", "LSTM", "RNN"),
    "recording": ("record",),
    "runs": ("load",),
    "unfold": ("Recording", "scan"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            value = getattr(import_module(f".{module}", __name__), name)
            globals()[name] = value
            return value
    if find_spec(f"{__name__}.{name}") is not None:  # elman.unfold, without an import of its own
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
