"""The gated recurrent unit."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from ..recording import record
from .gated import Common, GatedCell, probability

__all__ = ["GRUCell"]


class GRUCell(GatedCell):
    """Gated recurrent unit; **u keeps the old state** as in torch.nn (elsewhere Γ_u takes the new).

        r = σ(U_r x + b_r + W_r h⁻ + b'_r)        u = σ(U_u x + b_u + W_u h⁻ + b'_u)
        n = φ(U x + b + r ⊙ (W h⁻ + b'))          reset_after=True, the form of torch.nn and cuDNN
        n = φ(U x + b + W (r ⊙ h⁻) + b')          reset_after=False, the original form
        h = u ⊙ h⁻ + (1 - u) ⊙ n

    x (B, D), state and output h (B, H). Gates are stacked reset, update, candidate: ``weight_ih`` (3H, D),
    ``weight_hh`` (3H, H), ``bias_ih`` and ``bias_hh`` (3H), as in torch.nn.GRUCell. ``recurrent_dropout`` is the
    probability with which training drops a unit of n, which the state then takes up as zero. Keywords: ``squash``
    (φ), ``bias``, ``init``, ``device``, ``dtype``. Records "reset", "update" and "candidate".

    Raises OptionError for an unknown name or an impossible size. Sources: Cho et al. 2014, Learning phrase
    representations using RNN encoder-decoder, equations 5 to 8; Semeniuta et al. 2016, Recurrent dropout without
    memory loss, equation 14.
    """

    gates = ("reset", "update", "candidate")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        reset_after: bool = True,
        recurrent_dropout: float = 0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(input_size, hidden_size, **common)
        self.reset_after = reset_after
        self.recurrent_dropout = probability("GRUCell", "recurrent_dropout", recurrent_dropout)
        self.reset_parameters()

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(B, H) of zeros."""
        return torch.zeros(batch, self.hidden_size, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        x_r, x_u, x_n = F.linear(x, self.weight_ih, self.bias_ih).chunk(3, -1)
        if self.reset_after:
            h_r, h_u, h_n = F.linear(state, self.weight_hh, self.bias_hh).chunk(3, -1)
            r = record("reset", torch.sigmoid(x_r + h_r))
            n = self.squash(x_n + r * h_n)
        else:
            last = 2 * self.hidden_size
            b, b_n = (None, None) if self.bias_hh is None else (self.bias_hh[:last], self.bias_hh[last:])
            h_r, h_u = F.linear(state, self.weight_hh[:last], b).chunk(2, -1)
            r = record("reset", torch.sigmoid(x_r + h_r))
            n = self.squash(x_n + F.linear(r * state, self.weight_hh[last:], b_n))
        u = record("update", torch.sigmoid(x_u + h_u))
        n = record("candidate", n)
        if self.recurrent_dropout:
            n = F.dropout(n, self.recurrent_dropout, self.training)
        h = n + u * (state - n)
        return h, h
