"""Combinators: what takes cells and gives a cell. Whatever they nest is one step, compiled as one program."""

from typing import Any

from .attend import Attend
from .clockwork import Clockwork
from .conditioned import Conditioned
from .deep import Deep
from .delay import Delay
from .feedback import Feedback
from .leaky import Leaky
from .learned_state import LearnedState
from .masked import Masked
from .nested import Make, Wrapper, input_size, output_size, positive, start, step
from .noise import Noise
from .residual import Highway, Residual
from .stack import Stack
from .time_skip import TimeSkip
from .variational import VariationalDropout
from .weight_drop import WeightDrop
from .zoneout import Zoneout

__all__ = [
    "COMBINATORS",
    "Attend",
    "Clockwork",
    "Conditioned",
    "Deep",
    "Delay",
    "Feedback",
    "Highway",
    "Leaky",
    "LearnedState",
    "Make",
    "Masked",
    "Noise",
    "Residual",
    "Stack",
    "TimeSkip",
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
    "clockwork": Clockwork,
    "conditioned": Conditioned,
    "deep": Deep,
    "delay": Delay,
    "feedback": Feedback,
    "highway": Highway,
    "leaky": Leaky,
    "learned_state": LearnedState,
    "masked": Masked,
    "noise": Noise,
    "residual": Residual,
    "stack": Stack,
    "time_skip": TimeSkip,
    "variational_dropout": VariationalDropout,
    "weight_drop": WeightDrop,
    "zoneout": Zoneout,
}
"""Short names, as in specs; each has ``build(input_size, make, …)``."""
