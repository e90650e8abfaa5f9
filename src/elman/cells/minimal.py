"""The minimal gated unit: a GRU with one gate for both purposes."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from ..recording import record
from .gated import Common, GatedCell

__all__ = ["MinimalGatedCell"]


class MinimalGatedCell(GatedCell):
    """Minimal gated unit: one gate f resets what the candidate sees, and lets in the candidate.

        f = σ(U_f x + b_f + W_f h⁻ + b'_f)
        n = φ(U x + b + W (f ⊙ h⁻) + b')
        h = (1 - f) ⊙ h⁻ + f ⊙ n

    So f near one *forgets*. x (B, D), state and output h (B, H). The gate stands before the candidate in
    ``weight_ih`` (2H, D), ``weight_hh`` (2H, H), ``bias_ih`` and ``bias_hh`` (2H). Keywords: ``squash`` (φ),
    ``bias``, ``init``, ``device``, ``dtype``. Records "gate" and "candidate".

    Raises OptionError for an unknown name or an impossible size.
    Source: Zhou et al. 2016, Minimal gated unit for recurrent neural networks, equations 5 to 7.
    """

    gates = ("gate", "candidate")

    def __init__(self, input_size: int, hidden_size: int, **common: Unpack[Common]) -> None:
        super().__init__(input_size, hidden_size, **common)
        self.reset_parameters()

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(B, H) of zeros."""
        return torch.zeros(batch, self.hidden_size, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        w_f, w_n = self.weight_hh.chunk(2)
        b_f, b_n = (None, None) if self.bias_hh is None else self.bias_hh.chunk(2)
        x_f, x_n = F.linear(x, self.weight_ih, self.bias_ih).chunk(2, -1)
        f = record("gate", torch.sigmoid(x_f + F.linear(state, w_f, b_f)))
        n = record("candidate", self.squash(x_n + F.linear(f * state, w_n, b_n)))
        h = state + f * (n - state)
        return h, h
