"""The minimal GRU: gate and candidate read the input alone."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from ..recording import record
from .gated import Common, GatedCell

__all__ = ["MinGRUCell"]


class MinGRUCell(GatedCell):
    """Minimal GRU; **u keeps the old state** as in ``GRUCell`` (the paper's z is 1 - u).

        u = σ(U_u x + b_u)
        n = φ(U x + b)
        h = u ⊙ h⁻ + (1 - u) ⊙ n

    x (B, D), state and output h (B, H). The gate is stacked before the candidate: ``weight_ih`` (2H, D), ``bias_ih``
    (2H). The recurrence is affine. Keywords: ``squash`` (φ, by default the identity),
    ``bias``, ``init``, ``device``, ``dtype``. Records "update" and "candidate".

    Raises OptionError for an unknown name or an impossible size.
    Source: Feng et al. 2024, Were RNNs all we needed?, section 3.1.
    """

    gates = ("update", "candidate")
    feedback = False

    def __init__(self, input_size: int, hidden_size: int, **common: Unpack[Common]) -> None:
        super().__init__(input_size, hidden_size, **(Common(squash="identity") | common))
        self.reset_parameters()

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(B, H) of zeros."""
        return torch.zeros(batch, self.hidden_size, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        u, n = F.linear(x, self.weight_ih, self.bias_ih).chunk(2, -1)
        u, n = record("update", torch.sigmoid(u)), record("candidate", self.squash(n))
        h = n + u * (state - n)
        return h, h
