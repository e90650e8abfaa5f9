"""A spec for every name that specs know, as small as it can be written."""

from __future__ import annotations

from elman.cells import CELLS
from elman.combinators import COMBINATORS

NAMES = sorted({*CELLS, *COMBINATORS})

NEEDED = {
    "attend": "3",
    "clockwork": "[1, 2]",
    "conditioned": "3",
    "deep": "transition=1",
    "delay": "3",
    "masked": "0.5",
    "time_skip": "3",
}
"""What combinators must be given besides a cell."""

CONSTANTS = ("attend", "conditioned")
"""Those that read constants."""


def spec_of(name: str, cell: str = "lstm") -> str:
    """The name alone, for a cell; around ``cell`` and with what it needs, for a combinator."""
    if name in CELLS:
        return f"{name}(8)"
    return f"{name}({', '.join(filter(None, (cell, NEEDED.get(name))))})"
