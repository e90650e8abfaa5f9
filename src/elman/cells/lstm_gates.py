"""What the gates of an LSTM are made of: which there are, what each adds up, and whether it sees the cell."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import OptionError
from ..init import set_bias_
from ..recording import record
from .gated import Common, GatedCell, probability

__all__ = ["LSTMGates"]


class LSTMGates(GatedCell):
    """Abstract: the parameters of an LSTM with all its options, and its gates; the recurrence is ``LSTMCell``'s.

        a = U x + b + W h⁻ + b',  with ``layer_norm``  LN(U x) + b + LN(W h⁻) + b'      the sums, of all gates
        σ(a),  with ``peepholes``  σ(a + p ⊙ s)                                         a gate

    Of G gates, those that the options leave, all but the candidate have peepholes: ``weight_peephole`` (G - 1, H).
    """

    gates = ("input", "forget", "candidate", "output")

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
        owner = type(self).__name__
        if not forget_gate and (coupled or forget_bias is not None):
            option = "coupled=True" if coupled else f"forget_bias={forget_bias}"
            raise OptionError(f"{owner}: {option} is about the forget gate, and forget_gate=False takes that away.")
        without = "input" if coupled else None if forget_gate else "forget"
        gates = tuple(gate for gate in self.gates if gate != without)
        super().__init__(input_size, hidden_size, proj_size, gates=gates, **common)
        self.peepholes, self.proj_size, self.forget_bias = peepholes, proj_size, forget_bias
        self.forget_gate, self.coupled, self.layer_norm = forget_gate, coupled, layer_norm
        self.recurrent_dropout = probability(owner, "recurrent_dropout", recurrent_dropout)
        new = self.weight_ih.new_empty
        self.weight_hr: Tensor | None = nn.Parameter(new(proj_size, hidden_size)) if proj_size else None
        self.weight_peephole: Tensor | None = nn.Parameter(new(len(gates) - 1, hidden_size)) if peepholes else None
        if layer_norm:
            self.norm_ih = nn.LayerNorm(len(gates) * hidden_size, bias=False).to(self.weight_ih)
            self.norm_hh = nn.LayerNorm(len(gates) * hidden_size, bias=False).to(self.weight_ih)
            self.norm_cell = nn.LayerNorm(hidden_size).to(self.weight_ih)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, by the scheme named at construction, then set the forget bias."""
        super().reset_parameters()
        for norm in (self.norm_ih, self.norm_hh, self.norm_cell) if self.layer_norm else ():
            norm.reset_parameters()
        if self.forget_bias is not None:
            set_bias_(self, "forget", self.forget_bias)

    def sums(self, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        """a, (B, H) for each gate."""
        if self.layer_norm:
            a = self.norm_ih(F.linear(x, self.weight_ih)) + self.norm_hh(F.linear(h, self.weight_hh))
            a = a if self.bias_ih is None else a + self.bias_ih + self.bias_hh
        else:
            a = F.linear(x, self.weight_ih, self.bias_ih) + F.linear(h, self.weight_hh, self.bias_hh)
        return a.chunk(len(self.gates), -1)

    def gate(self, at: int, a: Tensor, s: Tensor) -> Tensor:
        """The gate of that number, or from the end, of its sum a; s is the state of the cell that it may see."""
        if self.weight_peephole is not None:
            a = a + self.weight_peephole[at] * s
        return record(self.gates[at], torch.sigmoid(a))
