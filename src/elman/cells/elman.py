"""The Elman cell: hidden-to-hidden recurrence with any squashing function; and its form that starts as a sum."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from ..recording import record
from .gated import Common, GatedCell

__all__ = ["ElmanCell", "IRNNCell"]


class ElmanCell(GatedCell):
    """The plain recurrent unit.

        h(t) = φ(U x(t) + b + W h(t-1) + b')

    x (B, D), state and output h (B, H). U is ``weight_ih`` (H, D), W ``weight_hh`` (H, H), b and b'
    ``bias_ih`` and ``bias_hh`` (H), as in torch.nn.RNNCell. φ is ``squash``: a name of ``SQUASHES`` or any
    pointwise function. Keywords: ``squash``, ``bias``, ``init``, ``device``, ``dtype``. Records
    "preactivation", what φ is applied to.

    Raises OptionError for an unknown name or an impossible size.
    Source: Elman 1990, Finding structure in time.
    """

    gates = ("candidate",)

    def __init__(self, input_size: int, hidden_size: int, **common: Unpack[Common]) -> None:
        super().__init__(input_size, hidden_size, **common)
        self.reset_parameters()

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(B, H) of zeros."""
        return torch.zeros(batch, self.hidden_size, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        a = F.linear(x, self.weight_ih, self.bias_ih) + F.linear(state, self.weight_hh, self.bias_hh)
        h = self.squash(record("preactivation", a))
        return h, h


class IRNNCell(ElmanCell):
    """The Elman cell with rectified units whose recurrent weights start as the identity: it begins as a sum of inputs.

    ``ElmanCell`` with other defaults: ``squash="relu"`` and ``init="identity"``. Source: Le, Jaitly and Hinton 2015, A
    simple way to initialize recurrent networks of rectified linear units.
    """

    def __init__(self, input_size: int, hidden_size: int, **common: Unpack[Common]) -> None:
        super().__init__(input_size, hidden_size, **(Common(squash="relu", init="identity") | common))
