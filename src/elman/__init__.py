"""elman: write the recurrence, get the kernel.

``scan`` unfolds any step through time, and ``Stream`` runs it as its inputs arrive; ``explain`` and ``draw`` show what
becomes of it, ``path_lengths`` how far its values are apart; ``record`` marks a value to look at. Cells are single
steps, and combinators make cells of cells; ``RNN``, ``LSTM`` and ``GRU`` are torch.nn's layers on the same engine;
``load`` opens a trained run. What is no single step is in ``networks``. Each is loaded on first use, so that ``import
elman`` costs nothing by itself.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cells import (
        DenseCell,
        ElmanCell,
        GRUCell,
        IRNNCell,
        LRUCell,
        LSTMCell,
        MinGRUCell,
        MinimalGatedCell,
        MinLSTMCell,
        QRNNCell,
        SLSTMCell,
        SRUCell,
    )
    from .combinators import (
        Attend,
        Clockwork,
        Conditioned,
        Deep,
        Delay,
        Feedback,
        Highway,
        Leaky,
        LearnedState,
        Masked,
        Noise,
        Residual,
        Stack,
        TimeSkip,
        VariationalDropout,
        WeightDrop,
        Zoneout,
    )
    from .drawing import draw
    from .explaining import explain
    from .layers import GRU, LSTM, RNN
    from .paths import path_lengths
    from .recording import record
    from .runs import load
    from .streaming import Stream
    from .unfold import Recording, scan

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Attend",
    "Clockwork",
    "Conditioned",
    "Deep",
    "Delay",
    "DenseCell",
    "ElmanCell",
    "Feedback",
    "GRUCell",
    "Highway",
    "IRNNCell",
    "LRUCell",
    "LSTMCell",
    "Leaky",
    "LearnedState",
    "Masked",
    "MinGRUCell",
    "MinLSTMCell",
    "MinimalGatedCell",
    "Noise",
    "QRNNCell",
    "Recording",
    "Residual",
    "SLSTMCell",
    "SRUCell",
    "Stack",
    "Stream",
    "TimeSkip",
    "VariationalDropout",
    "WeightDrop",
    "Zoneout",
    "draw",
    "explain",
    "load",
    "path_lengths",
    "record",
    "scan",
]
__version__ = "0.1.0"

_HOME = {
    "cells": (
        "DenseCell",
        "ElmanCell",
        "GRUCell",
        "IRNNCell",
        "LRUCell",
        "LSTMCell",
        "MinGRUCell",
        "MinLSTMCell",
        "MinimalGatedCell",
        "QRNNCell",
        "SLSTMCell",
        "SRUCell",
    ),
    "combinators": (
        "Attend",
        "Clockwork",
        "Conditioned",
        "Deep",
        "Delay",
        "Feedback",
        "Highway",
        "Leaky",
        "LearnedState",
        "Masked",
        "Noise",
        "Residual",
        "Stack",
        "TimeSkip",
        "VariationalDropout",
        "WeightDrop",
        "Zoneout",
    ),
    "drawing": ("draw",),
    "explaining": ("explain",),
    "layers": (
        "GRU",
        "LSTM",
        "RNN",
    ),
    "paths": ("path_lengths",),
    "recording": ("record",),
    "runs": ("load",),
    "streaming": ("Stream",),
    "unfold": (
        "Recording",
        "scan",
    ),
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
