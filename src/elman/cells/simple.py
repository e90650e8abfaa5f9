"""The Elman cell: hidden-to-hidden recurrence with any squashing function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ElmanCell"]


class ElmanCell(nn.Module):
    """placeholder to be written by the cells work"""

    def __init__(self, input_size: int, hidden_size: int, squash: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.squash = squash
        self.weight_ih = nn.Parameter(torch.empty(hidden_size, input_size).uniform_(-0.1, 0.1))
        self.weight_hh = nn.Parameter(torch.empty(hidden_size, hidden_size).uniform_(-0.1, 0.1))
        self.bias_ih = nn.Parameter(torch.zeros(hidden_size))

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.zeros(batch, self.hidden_size, device=device, dtype=dtype)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = self.squash(F.linear(x, self.weight_ih, self.bias_ih) + F.linear(h, self.weight_hh))
        return h, h
