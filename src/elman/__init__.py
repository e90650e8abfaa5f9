"""elman: write the recurrence, get the kernel.

``scan`` unfolds any step through time; ``explain`` shows what becomes of it; ``record`` marks a value to look at.
Cells are single steps; ``RNN``, ``LSTM`` and ``GRU`` are torch.nn's layers on the same engine; ``load`` opens a
trained run.
"""

from typing import Any

from .cells import ElmanCell, GRUCell, LeakyCell, LSTMCell
from .explain import explain
from .layers import GRU, LSTM, RNN
from .recording import record
from .unfold import Recording, scan

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "ElmanCell",
    "GRUCell",
    "LSTMCell",
    "LeakyCell",
    "Recording",
    "explain",
    "load",
    "record",
    "scan",
]
__version__ = "0.1.0"


def load(run: Any, **options: Any) -> Any:
    """A trained model of a run directory, ready to use: see ``elman.runs.load``."""
    from .runs import load

    return load(run, **options)
