"""The linear recurrent unit: complex units that decay and turn at rates of their own."""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import OptionError
from ..recording import record
from .gated import Common, GatedCell

__all__ = ["LRUCell"]


class LRUCell(GatedCell):
    """Linear recurrent unit, H complex units with real arithmetic on their real and imaginary parts.

        λ = exp(-exp(ν) + i exp(θ))
        s = λ ⊙ s⁻ + exp(γ) ⊙ (U x + b)
        h = φ(Re(C s) + V x)

    x (B, D), state (Re s, Im s) (B, H) each, output h (B, H). Real and imaginary rows of U are stacked in ``weight_ih``
    (2H, D), and b in ``bias_ih`` (2H); ``weight_ho`` (H, 2H) is (Re C, -Im C), ``weight_io`` (H, D) is V; ``log_decay``
    ν, ``log_angle`` θ and ``log_scale`` γ (H). |λ|² is drawn uniformly from ``r_min``² to ``r_max``², the angle from 0
    to ``max_phase``, and γ so that every unit keeps the variance of white noise: exp(γ)² = 1 - |λ|². The recurrence is
    affine. Keywords: ``squash`` (φ, by default the identity), ``bias`` (by default False), ``init`` (of the matrices,
    by default xavier), ``device``, ``dtype``. Records "decay", which is |λ|.

    Raises OptionError for radii that are not 0 ≤ r_min < r_max ≤ 1, a phase that is not positive, an unknown name or
    an impossible size. Source: Orvieto et al. 2023, Resurrecting recurrent neural networks for long sequences,
    equation 7 and lemma 3.2.
    """

    gates = ("real", "imaginary")
    feedback = False

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        **common: Unpack[Common],
    ) -> None:
        plain = Common(squash="identity", bias=False, init="xavier")
        super().__init__(input_size, hidden_size, **(plain | common))
        if not (0 <= r_min < r_max <= 1 and max_phase > 0):
            given = f"r_min={r_min!r}, r_max={r_max!r}, max_phase={max_phase!r}"
            raise OptionError(f"LRUCell: the ring needs 0 <= r_min < r_max <= 1 and max_phase > 0; got {given}.")
        self.r_min, self.r_max, self.max_phase = r_min, r_max, max_phase
        new = self.weight_ih.new_empty
        self.weight_ho = nn.Parameter(new(hidden_size, 2 * hidden_size))
        self.weight_io = nn.Parameter(new(hidden_size, input_size))
        self.log_decay = nn.Parameter(new(hidden_size))
        self.log_angle = nn.Parameter(new(hidden_size))
        self.log_scale = nn.Parameter(new(hidden_size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the matrices by the scheme named at construction, and λ on the ring."""
        super().reset_parameters()
        # Away from radii of exactly 0 and 1, whose ν and γ are not finite.
        low, high = max(self.r_min**2, 1e-6), min(self.r_max**2, 1 - 1e-6)
        decay = self.log_decay.uniform_(low, high).log().neg() / 2  # -log |λ|
        self.log_decay.copy_(decay.log())
        self.log_angle.uniform_(1e-6, 1).mul_(self.max_phase).log_()
        self.log_scale.copy_(torch.log(-torch.expm1(-2 * decay)) / 2)

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Two (B, H) of zeros."""
        real = torch.zeros(batch, self.hidden_size, device=device, dtype=dtype)
        return real, torch.zeros_like(real)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        real, imaginary = state
        decay, angle, scale = torch.exp(-torch.exp(self.log_decay)), torch.exp(self.log_angle), self.log_scale.exp()
        cos, sin = decay * torch.cos(angle), decay * torch.sin(angle)
        x_re, x_im = F.linear(x, self.weight_ih, self.bias_ih).chunk(2, -1)
        record("decay", decay.expand_as(real))
        new = (cos * real - sin * imaginary + scale * x_re, sin * real + cos * imaginary + scale * x_im)
        return self.squash(F.linear(torch.cat(new, -1), self.weight_ho) + F.linear(x, self.weight_io)), new
