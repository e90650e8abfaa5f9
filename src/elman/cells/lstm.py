"""Long short-term memory."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import OptionError
from ..init import set_bias_
from ..recording import record
from .gated import Common, GatedCell, probability

__all__ = ["LSTMCell"]


class LSTMCell(GatedCell):
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

    gates = ("input", "forget", "candidate", "output")
    shown = (
        "peepholes", "forget_gate", "coupled", "layer_norm", "proj_size", "forget_bias", "recurrent_dropout",
    )  # fmt: skip

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        peepholes: bool = False,
        forget_gate: bool = True,
        coupled: bool = False,
        layer_norm: bool = False,
        proj_size: int = 0,
        forget_bias: float | None = None,
        recurrent_dropout: float = 0,
        **common: Unpack[Common],
    ) -> None:
        if not forget_gate and (coupled or forget_bias is not None):
            option = "coupled=True" if coupled else f"forget_bias={forget_bias}"
            raise OptionError(f"LSTMCell: {option} is about the forget gate, and forget_gate=False takes that away.")
        without = {"input"} if coupled else set() if forget_gate else {"forget"}
        gates = tuple(gate for gate in self.gates if gate not in without)
        super().__init__(input_size, hidden_size, proj_size, gates=gates, **common)
        self.peepholes, self.proj_size, self.forget_bias = peepholes, proj_size, forget_bias
        self.forget_gate, self.coupled, self.layer_norm = forget_gate, coupled, layer_norm
        self.recurrent_dropout = probability("LSTMCell", "recurrent_dropout", recurrent_dropout)
        new = self.weight_ih.new_empty
        self.weight_hr: Tensor | None = nn.Parameter(new(proj_size, hidden_size)) if proj_size else None
        self.weight_peephole: Tensor | None = nn.Parameter(new(len(gates) - 1, hidden_size)) if peepholes else None
        if layer_norm:
            like: Any = {"device": new(0).device, "dtype": new(0).dtype}
            self.norm_ih = nn.LayerNorm(len(gates) * hidden_size, bias=False, **like)
            self.norm_hh = nn.LayerNorm(len(gates) * hidden_size, bias=False, **like)
            self.norm_cell = nn.LayerNorm(hidden_size, **like)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, by the scheme named at construction, then set the forget bias."""
        super().reset_parameters()
        for norm in (self.norm_ih, self.norm_hh, self.norm_cell) if self.layer_norm else ():
            norm.reset_parameters()
        if self.forget_bias is not None:
            set_bias_(self, "forget", self.forget_bias)

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(B, P) and (B, H) of zeros."""
        h = torch.zeros(batch, self.output_size, device=device, dtype=dtype)
        return h, h.new_zeros(batch, self.hidden_size)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, s = state
        a = self._preactivation(x, h).chunk(len(self.gates), -1)
        *into, n, q = a  # what opens the cell: input and forget gate, or the one of them that there is
        if self.weight_peephole is not None:
            into = [gate + self.weight_peephole[i] * s for i, gate in enumerate(into)]
        names = self.gates[:-2]
        into = [record(name, torch.sigmoid(gate)) for name, gate in zip(names, into, strict=True)]
        n = record("candidate", self.squash(n))
        if self.recurrent_dropout:
            n = F.dropout(n, self.recurrent_dropout, self.training)
        s = record("cell", self._cell(s, n, *into))
        if self.weight_peephole is not None:
            q = q + self.weight_peephole[-1] * s
        shown = self.norm_cell(s) if self.layer_norm else s
        h = (torch.tanh(shown) * record("output", torch.sigmoid(q))).to(h.dtype)  # s may be wider than h
        if self.weight_hr is not None:
            h = F.linear(h, self.weight_hr)
        return h, (h, s)

    def _preactivation(self, x: Tensor, h: Tensor) -> Tensor:
        if not self.layer_norm:
            return F.linear(x, self.weight_ih, self.bias_ih) + F.linear(h, self.weight_hh, self.bias_hh)
        a = self.norm_ih(F.linear(x, self.weight_ih)) + self.norm_hh(F.linear(h, self.weight_hh))
        return a if self.bias_ih is None else a + self.bias_ih + self.bias_hh

    def _cell(self, s: Tensor, n: Tensor, first: Tensor, second: Tensor | None = None) -> Tensor:
        """f ⊙ s⁻ + g ⊙ n with the gates that there are."""
        if second is not None:
            return second * s + first * n
        return n + first * (s - n) if self.coupled else s + first * n
