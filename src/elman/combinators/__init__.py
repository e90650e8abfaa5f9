"""Combinators: what takes cells and gives a cell. Whatever they nest is one step, compiled as one program."""

from typing import Any

from .attend import Attend
from .conditioned import Conditioned, LearnedState
from .nested import Make, Wrapper, input_size, output_size, positive, start, step
from .residual import Highway, Residual
from .stack import Stack

__all__ = [
    "COMBINATORS",
    "Attend",
    "Conditioned",
    "Highway",
    "LearnedState",
    "Make",
    "Residual",
    "Stack",
    "Wrapper",
    "input_size",
    "output_size",
    "positive",
    "start",
    "step",
]

COMBINATORS: dict[str, Any] = {
    "attend": Attend,
    "conditioned": Conditioned,
    "highway": Highway,
    "learned_state": LearnedState,
    "residual": Residual,
    "stack": Stack,
}
"""Short names, as in specs; each has ``build(input_size, make, …)``."""
