"""Lengths of the ways through a cell, counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elman.cells import ElmanCell, GRUCell, LSTMCell
from elman.combinators import Highway, Residual, Stack
from elman.combinators.deep import Deep
from elman.combinators.leaky import Leaky
from elman.errors import InputError, MixedRowsError, OptionError
from elman.paths import path_lengths

D, H = 3, 4
XS = torch.zeros(2, 1, D)

# From x(t) to y(t), from state to state, from x(t - 3) to y(t): shortest and longest.
TABLE: list[tuple[nn.Module, Any, Any, Any]] = [
    (ElmanCell(D, H), (1, 1), (1, 1), (4, 4)),
    (ElmanCell(D, H, squash="identity"), (0, 0), (0, 0), (0, 0)),
    # As n + u ⊙ (h - n): by way of the reset gate σ, its product, φ, the product with u. From h to h the last alone.
    (GRUCell(D, H), (1, 4), (1, 4), (4, 16)),
    # σ of the output gate and its product. From s to s one product; from h to h by a gate: σ, ⊙, tanh, ⊙.
    (LSTMCell(D, H), (2, 4), (1, 4), (7, 16)),
    (Stack([ElmanCell(D, H)] + [ElmanCell(H, H) for _ in range(2)]), (3, 3), (1, 3), (6, 6)),
    (Residual(ElmanCell(D, D)), (0, 1), (1, 1), (4, 4)),
    (Residual(ElmanCell(D, H)), (0, 1), (1, 1), (4, 4)),
    (Highway(ElmanCell(D, D)), (0, 2), (1, 1), (5, 5)),
    (Deep(ElmanCell(D, H), transition=5), (1, 1), (6, 6), (19, 19)),
    (Deep(ElmanCell(D, H), transition=5, skip=True), (1, 1), (1, 6), (4, 19)),
    (Deep(ElmanCell(D, H), input=2, output=3), (6, 6), (1, 1), (9, 9)),
    (Deep(ElmanCell(D, H), input=2, output=3, skip=True), (1, 6), (1, 1), (4, 9)),
    (Leaky(ElmanCell(D, H)), (1, 1), (0, 1), (1, 4)),
    (Leaky(ElmanCell(D, H), "learned"), (1, 1), (0, 1), (1, 4)),
]


@pytest.mark.parametrize(("cell", "step", "state", "over"), TABLE, ids=lambda v: type(v).__name__)
def test_lengths_by_hand(cell: nn.Module, step: Any, state: Any, over: Any) -> None:
    found = path_lengths(cell, XS)
    assert (found.step, found.state, found.over(3), found.over(0)) == (step, state, over, step)


def test_products_with_weights_count_if_asked_for() -> None:
    assert path_lengths(ElmanCell(D, H), XS, products=True).over(3) == (8, 8)
    assert path_lengths(Residual(ElmanCell(D, D)), XS, products=True).step == (0, 2)
    assert path_lengths(Residual(ElmanCell(D, H)), XS, products=True).step == (1, 2)
    assert path_lengths(Deep(ElmanCell(D, H), transition=2), XS, products=True).state == (6, 6)


class Custom(nn.Module):
    """Choices, quotients, noise and a memory that is read, but never heard of again."""

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Any:
        return torch.zeros(batch, D), torch.zeros(batch, D), torch.zeros(batch, dtype=torch.int64)

    def forward(self, x: Tensor, state: Any) -> Any:
        h, _dead, t = state
        h = torch.where((t % 2 == 0)[:, None], h + x, h / 2) * torch.rand_like(x)
        return torch.softmax(h, -1) / (1 + x * x), (h, x, t + 1)


def test_choices_quotients_and_noise() -> None:
    found = path_lengths(Custom(), XS)
    assert found.step == (2, 2)  # the quotient, and before it the softmax or the square
    assert found.table[0, 0] == (0, 0)  # a choice, a half and a product with noise
    assert found.table["x", 1] == (0, 0)
    assert found.table[2, 0] == (1, 1)  # the condition of the choice
    assert (1, "y") not in found.table
    assert (1, 1) not in found.table


class Apart(nn.Module):
    """Gives what does not depend on x, and keeps no state."""

    def initial_state(self, batch: int, **_: Any) -> Any:
        return ()

    def forward(self, x: Tensor, state: Any) -> Any:
        return torch.zeros_like(x), ()


def test_where_no_way_leads_there_is_none() -> None:
    found = path_lengths(Apart(), XS)
    assert (found.step, found.state, found.over(2)) == (None, None, None)


class Mixing(ElmanCell):
    """Mixes the rows of the batch."""

    def forward(self, x: Tensor, state: Tensor) -> Any:
        return super().forward(x - x.mean(0), state)


def test_mistakes_are_named() -> None:
    with pytest.raises(MixedRowsError, match="mixes the rows"):
        path_lengths(Mixing(D, H), XS)
    with pytest.raises(InputError):
        path_lengths(ElmanCell(D, H), torch.zeros(2, 1, D + 1))
    with pytest.raises(OptionError, match="lag must be a number of steps, 0 or more; got -1"):
        path_lengths(ElmanCell(D, H), XS).over(-1)
