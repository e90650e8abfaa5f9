"""Cells: one recurrence, one small file; by short names, or ``file.py:MyCell`` for a user's own."""

from __future__ import annotations

from .dense import DenseCell
from .elman import ElmanCell, IRNNCell
from .gated import Common, GatedCell
from .gru import GRUCell
from .lru import LRUCell
from .lstm import LSTMCell
from .mingru import MinGRUCell
from .minimal import MinimalGatedCell
from .minlstm import MinLSTMCell
from .qrnn import QRNNCell
from .slstm import SLSTMCell
from .squash import SQUASHES
from .sru import SRUCell
from .user import UserCell, load_user_cell

__all__ = [
    "CELLS",
    "SQUASHES",
    "Common",
    "DenseCell",
    "ElmanCell",
    "GRUCell",
    "GatedCell",
    "IRNNCell",
    "LRUCell",
    "LSTMCell",
    "MinGRUCell",
    "MinLSTMCell",
    "MinimalGatedCell",
    "QRNNCell",
    "SLSTMCell",
    "SRUCell",
    "UserCell",
    "load_user_cell",
]

CELLS: dict[str, type[GatedCell]] = {
    "dense": DenseCell,
    "elman": ElmanCell,
    "gru": GRUCell,
    "irnn": IRNNCell,
    "lru": LRUCell,
    "lstm": LSTMCell,
    "mgu": MinimalGatedCell,
    "mingru": MinGRUCell,
    "minlstm": MinLSTMCell,
    "qrnn": QRNNCell,
    "rnn": ElmanCell,
    "slstm": SLSTMCell,
    "sru": SRUCell,
}
"""Short names, as on the command line."""
