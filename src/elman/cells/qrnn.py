"""The quasi-recurrent network: a convolution over time, then pooling that is elementwise in time."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..recording import record
from .gated import Common, GatedCell

__all__ = ["QRNNCell"]


class QRNNCell(GatedCell):
    """Quasi-recurrent network: filters two steps wide, and fo-pooling.

        n = φ(V x⁻ + U x + b)     f = σ(V_f x⁻ + U_f x + b_f)     q = σ(V_q x⁻ + U_q x + b_q)
        s = f ⊙ s⁻ + (1 - f) ⊙ n
        h = q ⊙ s

    x (B, D) and x⁻ the input before, zero at first; state (x⁻ (B, D), s (B, H)), output h (B, H). Gates are stacked
    candidate, forget, output: ``weight_ih`` (3H, D) is U, ``weight_before`` (3H, D) V, ``bias_ih`` (3H) b. The
    recurrence is affine. Keywords: ``squash`` (φ), ``bias``, ``init``, ``device``,
    ``dtype``. Records "candidate", "forget", "output" and "cell", which is s.

    Raises OptionError for an unknown name or an impossible size.
    Source: Bradbury et al. 2016, Quasi-recurrent neural networks, equations 2 and 4.
    """

    gates = ("candidate", "forget", "output")
    feedback = False

    def __init__(self, input_size: int, hidden_size: int, **common: Unpack[Common]) -> None:
        super().__init__(input_size, hidden_size, **common)
        self.weight_before = nn.Parameter(torch.empty_like(self.weight_ih))
        self.reset_parameters()

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(B, D) and (B, H) of zeros."""
        before = torch.zeros(batch, self.input_size, device=device, dtype=dtype)
        return before, before.new_zeros(batch, self.hidden_size)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        before, s = state
        a = F.linear(x, self.weight_ih, self.bias_ih) + F.linear(before, self.weight_before)
        n, f, q = a.chunk(3, -1)
        n, f = record("candidate", self.squash(n)), record("forget", torch.sigmoid(f))
        s = record("cell", n + f * (s - n))
        return s * record("output", torch.sigmoid(q)), (x.to(before.dtype), s)
