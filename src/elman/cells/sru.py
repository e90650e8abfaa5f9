"""The simple recurrent unit: all products read the input, and time is elementwise."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..recording import record
from .gated import Common, GatedCell

__all__ = ["SRUCell"]


class SRUCell(GatedCell):
    """Simple recurrent unit, with its highway connection from input to output.

        f = σ(U_f x + b_f + v_f ⊙ s⁻)        r = σ(U_r x + b_r + v_r ⊙ s⁻)
        s = f ⊙ s⁻ + (1 - f) ⊙ (U x + b)
        h = r ⊙ φ(s) + (1 - r) ⊙ x,  or (1 - r) ⊙ (U_x x + b_x) where D is not H

    x (B, D), state s and output h (B, H). Blocks are stacked forget, reset, candidate and, where D is not H, skip:
    ``weight_ih`` (3H or 4H, D), ``bias_ih`` likewise. ``peepholes`` adds the terms in v, ``weight_peephole`` (2, H);
    without them the recurrence is affine. Keywords: ``squash`` (φ, by default the
    identity), ``bias``, ``init``, ``device``, ``dtype``. Records "forget", "reset" and "cell", which is s.

    Raises OptionError for an unknown name or an impossible size. Source: Lei et al. 2018, Simple recurrent units for
    highly parallelizable recurrence, equations 1 to 4 (with peepholes; its first version of 2017 had none, and φ).
    """

    gates = ("forget", "reset", "candidate")
    feedback = False

    def __init__(self, input_size: int, hidden_size: int, *, peepholes: bool = False, **common: Unpack[Common]) -> None:
        gates = self.gates if input_size == hidden_size else (*self.gates, "skip")
        super().__init__(input_size, hidden_size, gates=gates, **(Common(squash="identity") | common))
        self.peepholes = peepholes
        new = self.weight_ih.new_empty
        self.weight_peephole: Tensor | None = nn.Parameter(new(2, hidden_size)) if peepholes else None
        self.reset_parameters()

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(B, H) of zeros."""
        return torch.zeros(batch, self.hidden_size, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        f, r, n, *skip = F.linear(x, self.weight_ih, self.bias_ih).split(self.hidden_size, -1)
        if self.weight_peephole is not None:
            f, r = f + self.weight_peephole[0] * state, r + self.weight_peephole[1] * state
        f, r = record("forget", torch.sigmoid(f)), record("reset", torch.sigmoid(r))
        s = record("cell", n + f * (state - n))
        through = skip[0] if skip else x
        return through + r * (self.squash(s) - through), s
