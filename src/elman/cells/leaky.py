"""The leaky cell: units that forget at a fixed rate."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import OptionError
from ..recording import record
from .gated import Common, GatedCell

__all__ = ["LeakyCell"]


class LeakyCell(GatedCell):
    """Leaky units: a running average of what an Elman cell computes.

        u(t) = φ(U x(t) + b + W h(t-1) + b')
        h(t) = α h(t-1) + (1 - α) u(t)

    x (B, D), state and output h (B, H); parameters and keywords (``squash``, ``bias``, ``init``,
    ``device``, ``dtype``) as in ``ElmanCell``. α is fixed: 0 is the Elman cell; near 1 a unit remembers for
    about 1 / (1 - α) steps, but cannot forget on demand as a gate can. Records "preactivation" and
    "candidate", which is u.

    Raises OptionError when α is not in [0, 1), for an unknown name or an impossible size. Sources: Mozer
    1992, Induction of multiscale temporal structure, equation 2; Jaeger, Lukoševičius, Popovici and Siewert
    2007, Optimization and applications of echo state networks with leaky-integrator neurons.
    """

    gates = ("candidate",)
    shown = ("alpha",)

    def __init__(self, input_size: int, hidden_size: int, alpha: float = 0.9, **common: Unpack[Common]) -> None:
        super().__init__(input_size, hidden_size, **common)
        if not isinstance(alpha, int | float) or not 0 <= alpha < 1:
            raise OptionError(f"LeakyCell: alpha must be in [0, 1), got {alpha!r}; 0 is the Elman cell.")
        self.alpha = float(alpha)
        self.reset_parameters()

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(B, H) of zeros."""
        return torch.zeros(batch, self.hidden_size, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        a = F.linear(x, self.weight_ih, self.bias_ih) + F.linear(state, self.weight_hh, self.bias_hh)
        u = record("candidate", self.squash(record("preactivation", a)))
        h = self.alpha * state + (1 - self.alpha) * u
        return h, h
