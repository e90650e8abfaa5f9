"""Combinators: what takes cells and gives a cell. Whatever they nest is one step, compiled as one program."""

from .nested import Make, Wrapper, input_size, output_size, positive, start, step
from .residual import Highway, Residual
from .stack import Stack

__all__ = ["Highway", "Make", "Residual", "Stack", "Wrapper", "input_size", "output_size", "positive", "start", "step"]
