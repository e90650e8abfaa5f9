"""Long short-term memory."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..init import set_bias_
from ..recording import record
from .gated import Common, GatedCell

__all__ = ["LSTMCell"]


class LSTMCell(GatedCell):
    """Long short-term memory.

        g = σ(U_g x + b_g + W_g h⁻ + b'_g + p_g ⊙ s⁻)        f, likewise, with its own parameters
        s = f ⊙ s⁻ + g ⊙ φ(U x + b + W h⁻ + b')
        q = σ(U_q x + b_q + W_q h⁻ + b'_q + p_q ⊙ s)
        h = tanh(s) ⊙ q,  with a projection h = R (tanh(s) ⊙ q)

    x (B, D), state (h (B, P), s (B, H)), output h (B, P); P = proj_size or else H. As in torch.nn, gates are
    stacked input g, forget f, candidate, output q: ``weight_ih`` (4H, D), ``weight_hh`` (4H, P), ``bias_ih``,
    ``bias_hh`` (4H); R is ``weight_hr`` (P, H). ``peepholes`` adds the terms in p: ``weight_peephole`` (3, H)
    for input, forget and output, which sees the new s. ``forget_bias`` is b_f + b'_f at the start; None: as
    ``init`` draws it. Keywords: ``squash`` (φ), ``bias``, ``init``, ``device``, ``dtype``. Records "input",
    "forget", "candidate", "output" and "cell", which is s. Raises OptionError for an impossible option.
    Sources: Hochreiter and Schmidhuber 1997; Gers et al. 2000 (forget gate); Gers and Schmidhuber 2000
    (peepholes); Sak et al. 2014 (projection); Jozefowicz et al. 2015 (forget_bias=1).
    """

    gates = ("input", "forget", "candidate", "output")
    shown = ("peepholes", "proj_size", "forget_bias")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        peepholes: bool = False,
        proj_size: int = 0,
        forget_bias: float | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(input_size, hidden_size, proj_size, **common)
        self.peepholes, self.proj_size, self.forget_bias = peepholes, proj_size, forget_bias
        new = self.weight_ih.new_empty
        self.weight_hr: Tensor | None = nn.Parameter(new(proj_size, hidden_size)) if proj_size else None
        self.weight_peephole: Tensor | None = nn.Parameter(new(3, hidden_size)) if peepholes else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, by the scheme named at construction, then set the forget bias."""
        super().reset_parameters()
        if self.forget_bias is not None:
            set_bias_(self, "forget", self.forget_bias)

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(B, P) and (B, H) of zeros."""
        h = torch.zeros(batch, self.output_size, device=device, dtype=dtype)
        return h, h.new_zeros(batch, self.hidden_size)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, s = state
        a = F.linear(x, self.weight_ih, self.bias_ih) + F.linear(h, self.weight_hh, self.bias_hh)
        g, f, n, q = a.chunk(4, -1)
        if self.weight_peephole is not None:
            g, f = g + self.weight_peephole[0] * s, f + self.weight_peephole[1] * s
        g, f = record("input", torch.sigmoid(g)), record("forget", torch.sigmoid(f))
        s = record("cell", f * s + g * record("candidate", self.squash(n)))
        if self.weight_peephole is not None:
            q = q + self.weight_peephole[2] * s
        h = (torch.tanh(s) * record("output", torch.sigmoid(q))).to(h.dtype)  # s may be wider than h
        if self.weight_hr is not None:
            h = F.linear(h, self.weight_hr)
        return h, (h, s)
