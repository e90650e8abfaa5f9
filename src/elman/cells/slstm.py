"""The scalar LSTM of the xLSTM: an input gate that can outvote all the past."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import OptionError
from ..recording import record
from .gated import Common, GatedCell

__all__ = ["SLSTMCell"]

State = tuple[Tensor, Tensor, Tensor, Tensor]

_EMPTY = -1000.0  # the logarithm of the weight that the past has before the first step


class SLSTMCell(GatedCell):
    """sLSTM: exponential gates, a normaliser n, and a stabiliser m that keeps both in range.

        g̃, f̃, z̃, q̃ = U x + b + W h⁻ + b', each
        m = max(log f + m⁻, g̃)     with f = σ(f̃), or with ``exponential_forget`` exp(f̃)
        s = f' ⊙ s⁻ + g' ⊙ φ(z̃)    n = f' ⊙ n⁻ + g'    where f' = exp(log f + m⁻ - m), g' = exp(g̃ - m)
        h = σ(q̃) ⊙ s / n

    x (B, D), state (h, s, n, m) (B, H) each, output h (B, H). Gates are stacked input g̃, forget f̃, candidate z̃, output
    q̃: ``weight_ih`` (4H, D), ``bias_ih`` and ``bias_hh`` (4H). W is block-diagonal: a unit reads the K = H / ``heads``
    units of its own head, so ``weight_hh`` is (4H, K). Keywords: ``squash`` (φ), ``bias``, ``init``, ``device``,
    ``dtype``. Records "input" (g'), "forget" (f'), "candidate", "output" and "normaliser".

    Raises OptionError when the heads do not divide the units, for an unknown name or an impossible size.
    Source: Beck et al. 2024, xLSTM: extended long short-term memory, equations 8 to 17.
    """

    gates = ("input", "forget", "candidate", "output")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        heads: int = 1,
        exponential_forget: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(input_size, hidden_size, **common)
        if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1 or hidden_size % heads:
            raise OptionError(f"SLSTMCell: heads must divide the {hidden_size} units; got heads={heads!r}.")
        self.heads, self.exponential_forget = heads, exponential_forget
        if heads > 1:
            self.weight_hh = nn.Parameter(self.weight_hh.new_empty(4 * hidden_size, hidden_size // heads))
        self.reset_parameters()

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Four (B, H): zeros, and m so low that the past weighs nothing."""
        h = torch.zeros(batch, self.hidden_size, device=device, dtype=dtype)
        return h, torch.zeros_like(h), torch.zeros_like(h), torch.full_like(h, _EMPTY)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        h, s, n, m = state
        a = F.linear(x, self.weight_ih, self.bias_ih) + self._recurrent(h)
        g, f, z, q = a.chunk(4, -1)
        past = m + (f if self.exponential_forget else F.logsigmoid(f))
        m = torch.maximum(past, g)
        f, g = record("forget", torch.exp(past - m)), record("input", torch.exp(g - m))
        s = f * s + g * record("candidate", self.squash(z))
        n = record("normaliser", f * n + g)
        h = record("output", torch.sigmoid(q)) * s / n
        return h, (h, s, n, m)

    def _recurrent(self, h: Tensor) -> Tensor:
        """W h⁻ + b', head by head."""
        if self.heads == 1:
            return F.linear(h, self.weight_hh, self.bias_hh)
        width = self.hidden_size // self.heads
        weight = self.weight_hh.view(4, self.heads, width, width)
        a = torch.einsum("bhk,ghjk->bghj", h.view(-1, self.heads, width), weight).flatten(1)
        return a if self.bias_hh is None else a + self.bias_hh
