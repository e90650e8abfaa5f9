"""Long short-term memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..recording import record
from .lstm_gates import LSTMGates

__all__ = ["LSTMCell"]


class LSTMCell(LSTMGates):
    """Long short-term memory.

        g = σ(U_g x + b_g + W_g h⁻ + b'_g + p_g ⊙ s⁻)        f, likewise, with its own parameters
        s = f ⊙ s⁻ + g ⊙ φ(U x + b + W h⁻ + b')
        q = σ(U_q x + b_q + W_q h⁻ + b'_q + p_q ⊙ s)
        h = tanh(s) ⊙ q,  with a projection h = R (tanh(s) ⊙ q)

    x (B, D), state (h (B, P), s (B, H)), output h (B, P); P = proj_size or else H. As in torch.nn, gates are
    stacked input g, forget f, candidate, output q: ``weight_ih`` (4H, D), ``weight_hh`` (4H, P), ``bias_ih``,
    ``bias_hh`` (4H); R is ``weight_hr`` (P, H). Options:

    ``peepholes``: the terms in p, ``weight_peephole`` (3, H) for input, forget and output, which sees the new s.
    ``forget_gate=False``: f = 1; without its blocks. ``coupled``: g = 1 - f; without the blocks of g.
    ``layer_norm``: LN(U x) + b + LN(W h⁻) + b' over all gates at once, and tanh(LN(s)); the gains, and the shift of s,
    are those of ``norm_ih``, ``norm_hh`` and ``norm_cell``, torch.nn.LayerNorm. ``forget_bias``: b_f + b'_f at the
    start; None: as ``init`` draws it. ``recurrent_dropout``: the probability with which training drops a unit of the
    candidate, so that the cell keeps what it holds.

    Keywords: ``squash`` (φ), ``bias``, ``init``, ``device``, ``dtype``. Records "input", "forget", "candidate",
    "output" and "cell", which is s. Raises OptionError for an impossible option. Sources: Hochreiter and Schmidhuber
    1997 (no forget gate); Gers et al. 2000 (forget gate); Gers and Schmidhuber 2000 (peepholes); Greff et al. 2015
    (coupled); Sak et al. 2014 (projection); Jozefowicz et al. 2015 (forget_bias=1); Ba et al. 2016, equations 20 to 22
    (layer_norm); Semeniuta et al. 2016, equation 12 (recurrent_dropout).
    """

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(B, P) and (B, H) of zeros."""
        h = torch.zeros(batch, self.output_size, device=device, dtype=dtype)
        return h, h.new_zeros(batch, self.hidden_size)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, s = state
        *into, n, q = self.sums(x, h)
        opened = [self.gate(at, a, s) for at, a in enumerate(into)]  # g and f, or the one of them that there is
        n = record("candidate", self.squash(n))
        if self.recurrent_dropout:
            n = F.dropout(n, self.recurrent_dropout, self.training)
        if self.coupled:
            s = n + opened[0] * (s - n)
        else:
            s = (opened[1] * s if self.forget_gate else s) + opened[0] * n
        s = record("cell", s)
        q = self.gate(-1, q, s)
        h = (torch.tanh(self.norm_cell(s) if self.layer_norm else s) * q).to(h.dtype)  # s may be wider than h
        if self.weight_hr is not None:
            h = F.linear(h, self.weight_hr)
        return h, (h, s)
