"""Cells: one recurrence, one small file; by short names, or ``file.py:MyCell`` for a user's own."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from ..errors import OptionError
from .elman import ElmanCell
from .gated import Common, GatedCell
from .gru import GRUCell
from .leaky import LeakyCell
from .lstm import LSTMCell
from .squash import SQUASHES
from .user import UserCell, load_user_cell

__all__ = [
    "CELLS",
    "SQUASHES",
    "ElmanCell",
    "GRUCell",
    "GatedCell",
    "LSTMCell",
    "LeakyCell",
    "UserCell",
    "load_user_cell",
    "make_cell",
]

CELLS: dict[str, type[GatedCell]] = {
    "elman": ElmanCell,
    "gru": GRUCell,
    "leaky": LeakyCell,
    "lstm": LSTMCell,
    "rnn": ElmanCell,
}
"""Short names, as on the command line."""


def make_cell(spec: str, input_size: int, hidden_size: int, **options: Any) -> nn.Module:
    """The cell of a short name (``"lstm"``) or of a user's file (``"file.py:MyCell"``), with its options.

    ``options`` are the keywords of the cell's constructor. Raises OptionError for an unknown cell or
    option, with the nearest known one, and CellError for a file whose class is no cell (see
    ``load_user_cell``).
    """
    path, colon, name = spec.rpartition(":")
    if colon and name.isidentifier():
        return load_user_cell(path, name).make(input_size, hidden_size, **options)
    if spec.endswith(".py"):
        raise OptionError(f"which class of {spec!r}? Write file and class, for example {spec + ':MyCell'!r}.")
    if spec not in CELLS:
        raise OptionError.unknown("cell", spec, [*sorted(CELLS), "file.py:MyCell"])
    kind = CELLS[spec]
    known = sorted(_options(kind))
    for option in options:
        if option not in known:
            raise OptionError.unknown(f"option of cell {spec!r}", option, known)
    return kind(input_size, hidden_size, **options)


def _options(kind: type[nn.Module]) -> set[str]:
    """The keywords of a cell's constructor, the common ones included."""
    own = inspect.signature(kind).parameters
    return {*own, *Common.__annotations__} - {"input_size", "hidden_size", "common"}
