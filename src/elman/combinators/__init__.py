"""Combinators: what takes cells and gives a cell. Whatever they nest is one step, compiled as one program."""

from typing import Any

from .attend import Attend
from .conditioned import Conditioned, LearnedState
from .dropout import VariationalDropout, WeightDrop
from .nested import Make, Wrapper, input_size, output_size, positive, start, step
from .noise import Noise, Zoneout
from .residual import Highway, Residual
from .stack import Stack

__all__ = [
    "COMBINATORS",
    "Attend",
    "Conditioned",
    "Highway",
    "LearnedState",
    "Make",
    "Noise",
    "Residual",
    "Stack",
    "VariationalDropout",
    "WeightDrop",
    "Wrapper",
    "Zoneout",
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
    "noise": Noise,
    "residual": Residual,
    "stack": Stack,
    "variational_dropout": VariationalDropout,
    "weight_drop": WeightDrop,
    "zoneout": Zoneout,
}
"""Short names, as in specs; each has ``build(input_size, make, …)``."""
