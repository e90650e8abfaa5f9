"""Cells whose loops are affine, and how they come to be shared over time though they are short."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elman.compiler.llvm import kernel
from elman.spec import make_cell

__all__ = ["CELLS", "Average", "hurried"]


class Average(nn.Module):
    """s = keep ⊙ s⁻ + (1 - keep) ⊙ x, a rate for every unit; y = tanh(s), which is in the loop and not affine."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.input_size = self.output_size = size
        self.keep = nn.Parameter(torch.rand(size))

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.zeros(batch, self.input_size, device=device, dtype=dtype)

    def forward(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        s = self.keep * s + (1 - self.keep) * x
        return torch.tanh(s), s


def _named(name: str) -> Callable[[int], nn.Module]:
    return lambda size: make_cell(name, size, size)


CELLS: dict[str, Callable[[int], nn.Module]] = {
    "average": Average,
    **{name: _named(name) for name in ("lru", "mingru", "minlstm", "qrnn", "sru")},
}


def hurried(patch: pytest.MonkeyPatch) -> None:
    """Share any affine loop over time, in blocks of a few steps."""
    changed: dict[str, Any] = {
        "_WORK_TO_SHARE": 0, "_BYTES_TO_SCAN": 0, "_BYTES_OF_A_SUM": 0, "_FEWEST_STEPS": 2, "_NEAR_PIECE": 5000,
        "_ROWS_APART": 10**9,
    }  # fmt: skip
    for name, value in changed.items():
        patch.setattr(kernel, name, value)
