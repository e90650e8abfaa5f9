"""The minimal LSTM: all gates read the input alone, and forget and input gate share one whole."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from ..recording import record
from .gated import Common, GatedCell

__all__ = ["MinLSTMCell"]


class MinLSTMCell(GatedCell):
    """Minimal LSTM, its gates normalised so that the state is an average.

        f = σ(U_f x + b_f)     g = σ(U_g x + b_g)     n = φ(U x + b)
        h = f / (f + g) ⊙ h⁻ + g / (f + g) ⊙ n

    x (B, D), state and output h (B, H). Gates are stacked input g, forget f, candidate n: ``weight_ih`` (3H, D),
    ``bias_ih`` (3H). The recurrence is affine. Keywords: ``squash`` (φ, by default
    the identity), ``bias``, ``init``, ``device``, ``dtype``. Records "forget", which is f / (f + g), and "candidate".

    Raises OptionError for an unknown name or an impossible size.
    Source: Feng et al. 2024, Were RNNs all we needed?, section 3.2.
    """

    gates = ("input", "forget", "candidate")
    feedback = False

    def __init__(self, input_size: int, hidden_size: int, **common: Unpack[Common]) -> None:
        super().__init__(input_size, hidden_size, **(Common(squash="identity") | common))
        self.reset_parameters()

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(B, H) of zeros."""
        return torch.zeros(batch, self.hidden_size, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        g, f, n = F.linear(x, self.weight_ih, self.bias_ih).chunk(3, -1)
        # f / (f + g) = σ(log f - log g), which is finite where both gates are closed
        share = record("forget", torch.sigmoid(F.logsigmoid(f) - F.logsigmoid(g)))
        n = record("candidate", self.squash(n))
        h = n + share * (state - n)
        return h, h
