"""Clockwork groups against a loop with ordinary branches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elman
from comparing import assert_same, by_hand, everything, scan_by
from elman.cells import ElmanCell, GRUCell, LSTMCell
from elman.combinators.clockwork import Clockwork
from elman.errors import OptionError

F64 = torch.float64
T, B, D, H = 9, 2, 3, 6
PERIODS = (1, 2, 4)


class ByHand(nn.Module):
    """Koutník's equations, group by group, t counted by Python."""

    def __init__(self, cell: ElmanCell, triangular: bool) -> None:
        super().__init__()
        self.cell, self.triangular, self.t = cell, triangular, 0

    def forward(self, x: Tensor, state: Any) -> Any:
        h, t = state
        width = H // len(PERIODS)
        parts = [h[:, g * width : (g + 1) * width] for g in range(len(PERIODS))]
        new = []
        for g, period in enumerate(PERIODS):
            rows = slice(g * width, (g + 1) * width)
            a = x @ self.cell.weight_ih[rows].T + self.cell.bias_ih[rows] + self.cell.bias_hh[rows]
            for other, slower in enumerate(PERIODS):
                if slower >= period or not self.triangular:
                    a = a + parts[other] @ self.cell.weight_hh[rows, other * width : (other + 1) * width].T
            new.append(a.tanh() if int(t[0]) % period == 0 else parts[g])
        h = torch.cat(new, -1)
        return h, (h, t + 1)


@pytest.mark.parametrize("triangular", [False, True])
@pytest.mark.parametrize("first", [0, 3])
def test_clockwork_is_the_equation(triangular: bool, first: int) -> None:
    torch.manual_seed(4)
    inner = ElmanCell(D, H, dtype=F64)
    cell = Clockwork(inner, PERIODS, triangular=triangular)
    h = torch.randn(B, H, dtype=F64, requires_grad=True)
    xs = torch.randn(T, B, D, dtype=F64, requires_grad=True)
    given = {"xs": xs, "state": (h, torch.full((B,), first)), "constants": None}
    expected = everything(by_hand, ByHand(inner, triangular), given)
    found = everything(scan_by("interpret"), cell, given)
    prefix = "gradient of parameter "
    found = {name.replace(prefix + "cell.cell.", prefix + "cell."): value for name, value in found.items()}
    assert_same(found, expected)


def test_slow_units_keep_still_between_their_ticks() -> None:
    torch.manual_seed(5)
    ys, (_, t) = elman.scan(Clockwork(GRUCell(D, 4), [1, 3]), torch.randn(7, B, D))
    moved = (ys[1:] != ys[:-1]).all(dim=1)  # (T - 1, H)
    assert moved[:, :2].all()
    assert moved[:, 2:].all(dim=1).tolist() == [False, False, True, False, False, True]
    assert t.tolist() == [7, 7]


def test_every_leaf_has_its_groups() -> None:
    torch.manual_seed(6)
    _, ((h, s), _) = elman.scan(Clockwork(LSTMCell(D, 4, proj_size=2), [1, 5]), torch.randn(5, B, D))
    _, ((h1, s1), _) = elman.scan(Clockwork(LSTMCell(D, 4, proj_size=2), [5, 5]), torch.randn(1, B, D))
    assert (h.shape, s.shape, h1.shape, s1.shape) == ((B, 2), (B, 4), (B, 2), (B, 4))
    cell = Clockwork(LSTMCell(D, 4, proj_size=2), [1, 5])
    state = cell.initial_state(B, device=torch.device("cpu"), dtype=torch.float32)
    _, first = cell(torch.randn(B, D), state)
    _, ((h, s), _) = cell(torch.randn(B, D), first)
    assert (h != first[0][0]).all(dim=0).tolist() == [True, False]
    assert (s != first[0][1]).all(dim=0).tolist() == [True, True, False, False]


def test_fast_units_do_not_reach_slow_ones() -> None:
    cell = Clockwork(ElmanCell(D, H, dtype=F64), [4, 1, 2], triangular=True)
    before = torch.randn(B, H, dtype=F64, requires_grad=True)
    after, _ = cell(torch.randn(B, D, dtype=F64), (before, torch.zeros(B, dtype=torch.int64)))
    jacobian = torch.stack([torch.autograd.grad(after[0, i], before, retain_graph=True)[0][0] for i in range(H)])
    reaches = jacobian.view(3, 2, 3, 2).abs().amin((1, 3)) > 0  # from the group of the column to that of the row
    assert reaches.tolist() == [[True, False, False], [True, True, True], [True, False, True]]
    assert torch.equal(jacobian.view(3, 2, 3, 2).abs().amax((1, 3)) > 0, reaches)


@pytest.mark.parametrize(
    ("cell", "periods", "options", "said"),
    [
        (ElmanCell(D, 4), [], {}, r"periods must be a list of positive integers, got \[\]"),
        (ElmanCell(D, 4), "12", {}, "periods must be a list of positive integers, got '12'"),
        (ElmanCell(D, 4), 2, {}, "periods must be a list of positive integers, got 2"),
        (ElmanCell(D, 4), [1, 0], {}, "Clockwork: every period must be a positive integer, got 0"),
        (ElmanCell(D, 4), [1, 2, 4], {}, "an output of 4 units does not fall into 3 groups of equal size"),
        (LSTMCell(D, 4, proj_size=3), [1, 2, 4], {"triangular": True}, r"triangular needs .* LSTMCell has \(16, 3\)"),
        (Clockwork(ElmanCell(D, 4), [1]), [1, 2], {"triangular": True}, "triangular needs .* Clockwork has none"),
    ],
)
def test_mistakes_are_named(cell: nn.Module, periods: Any, options: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Clockwork(cell, periods, **options)


def test_a_state_that_does_not_fall_into_groups_is_named() -> None:
    cell = Clockwork(LSTMCell(D, 5, proj_size=4), [1, 2])
    with pytest.raises(OptionError, match="a leaf of the state with 5 units does not fall into 2 groups"):
        elman.scan(cell, torch.randn(T, B, D))
