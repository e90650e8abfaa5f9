"""Machine code for what follows the order of features: running sums, flips, pads; as the plain loop has it."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comparing import assert_same, everything, scan_by
from elman.errors import UnfoldWarning

ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "running sum": lambda v: v.cumsum(-1),
    "running sum of rows of a matrix": lambda v: v.view(-1, 2, 3).cumsum(1).flatten(1),
    "running sum of a transposed matrix": lambda v: v.view(-1, 2, 3).transpose(1, 2).cumsum(2).flatten(1),
    "flip": lambda v: v.flip(-1),
    "flip of two dimensions": lambda v: v.view(-1, 2, 3).flip(1, 2).flatten(1),
    "flip of one of two": lambda v: v.view(-1, 2, 3).flip(1).flatten(1),
    "running sum from the end": lambda v: v.flip(1).cumsum(1).flip(1),
    "pad": lambda v: F.pad(v, (2, 1))[:, :6] + F.pad(v, (0, 3), value=0.5)[:, 3:],
    "pad that cuts": lambda v: F.pad(v, (-1, 1)) + F.pad(v, (1, -1), value=-0.25),
    "pad of two dimensions": lambda v: F.pad(v.view(-1, 2, 3), (1, 0, 0, 1))[:, 1:, :3].flatten(1),
    "neighbours": lambda v: F.pad(v, (1, 1))[:, :-2] + v + F.pad(v, (1, 1))[:, 2:],
    "products of probabilities": lambda v: torch.exp(F.logsigmoid(v).cumsum(-1)),
}


class Ordered(nn.Module):
    """h ← tanh(f(W h) / 2 + x)"""

    def __init__(self, order: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.W, self.order = nn.Linear(6, 6), order

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.zeros(batch, 6, device=device, dtype=dtype)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.order(self.W(h)) / 2 + x)
        return h, h


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", list(ORDERS))
def test_equals_the_plain_loop(name: str, reverse: bool) -> None:
    torch.manual_seed(1)
    cell = Ordered(ORDERS[name]).double()
    given = {
        "xs": torch.randn(7, 5, 6, dtype=torch.float64, requires_grad=True),
        "state": torch.randn(5, 6, dtype=torch.float64, requires_grad=True),
        "constants": None,
    }
    options = {"lengths": [7, 3, 0, 7, 1], "reverse": reverse}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnfoldWarning)
        found = everything(scan_by("llvm"), cell, given, **options)
    assert_same(found, everything(scan_by("reference"), cell, given, **options))
