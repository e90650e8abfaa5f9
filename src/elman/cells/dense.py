"""The dense cell: a layer without memory, so that what is built around it is the only recurrence."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from ..recording import record
from .gated import Common, GatedCell

__all__ = ["DenseCell"]


class DenseCell(GatedCell):
    """A feed-forward layer as a cell: its state is the empty tuple.

        h(t) = φ(U x(t) + b)

    x (B, D), output h (B, H). U is ``weight_ih`` (H, D), b ``bias_ih`` (H). Keywords: ``squash`` (φ), ``bias``,
    ``init``, ``device``, ``dtype``. Records "preactivation". The compiler finds no loop in it: all steps at once.

    Raises OptionError for an unknown name or an impossible size.
    Source: Goodfellow, Bengio, Courville 2016, equation 6.36.
    """

    gates = ("candidate",)
    feedback = False

    def __init__(self, input_size: int, hidden_size: int, **common: Unpack[Common]) -> None:
        super().__init__(input_size, hidden_size, **common)
        self.reset_parameters()

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> tuple[()]:
        """Nothing is carried."""
        return ()

    def forward(self, x: Tensor, state: tuple[()]) -> tuple[Tensor, tuple[()]]:
        return self.squash(record("preactivation", F.linear(x, self.weight_ih, self.bias_ih))), state
