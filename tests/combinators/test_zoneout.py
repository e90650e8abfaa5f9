"""Zoneout and noise against their formulas, with the draws that were made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import elman
from elman.cells import ElmanCell, GRUCell, LSTMCell
from elman.combinators import Noise, Residual, Zoneout
from elman.errors import OptionError
from elman.spec import make_cell

D, H, T, B = 3, 4, 6, 5
F64 = torch.float64


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_zoneout_in_training_keeps_units_as_they_were() -> None:
    torch.manual_seed(0)
    cell = Zoneout(ElmanCell(D, 200, dtype=F64), 0.3)
    xs = torch.randn(40, B, D, dtype=F64)
    ys, _ = elman.scan(cell, xs, backend="interpret")
    before = torch.cat([torch.zeros_like(ys[:1]), ys[:-1]])
    new = torch.stack([cell.cell(x, h)[0] for x, h in zip(xs, before, strict=True)])
    kept = ys == before
    assert torch.allclose(ys[~kept], new[~kept], rtol=1e-10)  # what was not kept is what the cell computes
    assert abs(kept.double().mean().item() - 0.3) < 0.01
    share = kept.double().mean((0, 1))  # of each unit, over 200 draws: a deviation of 0.03
    assert 0.15 < share.min() < share.max() < 0.45


@pytest.mark.parametrize("backend", ["reference", "interpret"])
def test_zoneout_in_evaluation_is_the_mean(backend: str) -> None:
    """Of an LSTM, whose two leaves have probabilities of their own, with every gradient."""
    cell = Zoneout(LSTMCell(D, H, dtype=F64), [0.2, 0.6]).eval()
    xs = torch.randn(T, B, D, dtype=F64, requires_grad=True)
    h = s = torch.zeros(B, H, dtype=F64)
    expected = []
    for x in xs:
        _, (new_h, new_s) = cell.cell(x, (h, s))
        h, s = 0.2 * h + 0.8 * new_h, 0.6 * s + 0.4 * new_s
        expected.append(h)
    ys, last = elman.scan(cell, xs, backend=backend)
    same(ys, torch.stack(expected))
    same(last, (h, s))
    wanted = [xs, *cell.parameters()]
    same(torch.autograd.grad(ys.sum(), wanted), torch.autograd.grad(torch.stack(expected).sum(), wanted))


def test_an_output_that_is_no_state_stays_what_it_is() -> None:
    cell = Zoneout(Residual(GRUCell(D, D)), 0.5).eval()
    x, h = torch.randn(B, D), torch.randn(B, D)
    y, after = cell(x, h)
    new, _ = cell.cell.cell(x, h)
    torch.testing.assert_close(y, x + new)
    torch.testing.assert_close(after, 0.5 * h + 0.5 * new)


def test_noise_is_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Noise(GRUCell(D, H, dtype=F64), state=0.3, input=0.2)
    xs = torch.randn(T, B, D, dtype=F64)
    drawn: list[Tensor] = []
    randn = torch.randn_like

    def spy(like: Tensor) -> Tensor:
        drawn.append(randn(like))
        return drawn[-1]

    monkeypatch.setattr(torch, "randn_like", spy)
    ys, _ = elman.scan(cell, xs, backend="reference")
    monkeypatch.undo()
    h, expected = torch.zeros(B, H, dtype=F64), []
    for x, e_x, e_s in zip(xs, drawn[::2], drawn[1::2], strict=True):
        h, _ = cell.cell(x + 0.2 * e_x, h + 0.3 * e_s)
        expected.append(h)
    same(ys, torch.stack(expected))


def test_noise_has_the_deviation_it_says() -> None:
    """Read back from a cell that only hands on: y(t) = x(t) + noise."""
    torch.manual_seed(0)
    inner = ElmanCell(1, 1, squash="identity", bias=False, dtype=F64)
    with torch.no_grad():
        inner.weight_ih.fill_(1.0)
        inner.weight_hh.zero_()
    ys, _ = elman.scan(Noise(inner, input=0.5), torch.zeros(200, 100, 1, dtype=F64), backend="interpret")
    assert abs(ys.std().item() - 0.5) < 0.02
    assert abs(torch.corrcoef(torch.stack([ys[1:].flatten(), ys[:-1].flatten()]))[0, 1].item()) < 0.03  # anew each step


@pytest.mark.parametrize("make", [lambda: Zoneout(LSTMCell(D, H), 0.3), lambda: Noise(LSTMCell(D, H), 0.1, 0.2)])
def test_draws_are_the_same_when_recomputed_and_none_in_evaluation(make: Any) -> None:
    cell, results = make().double(), []
    xs = torch.randn(T, B, D, dtype=F64, requires_grad=True)
    for remat in (None, 2):
        torch.manual_seed(3)
        ys, _ = elman.scan(cell, xs, remat=remat, backend="interpret")
        results.append([ys, *torch.autograd.grad(ys.square().sum(), [xs, *cell.parameters()])])
    same(results[1], results[0])
    cell.eval()
    assert torch.equal(elman.scan(cell, xs)[0], elman.scan(cell, xs)[0])


def test_mistakes_and_specs() -> None:
    with pytest.raises(OptionError, match="Zoneout: p must be in"):
        Zoneout(GRUCell(D, H), 1.0)
    with pytest.raises(OptionError, match="Noise: state must be a standard deviation"):
        Noise(GRUCell(D, H), -0.1)
    with pytest.raises(OptionError, match="p has 2 probabilities"):
        Zoneout(Three(), [0.1, 0.2])(torch.zeros(1, D), (torch.zeros(1, 2),) * 3)
    assert make_cell("zoneout(lstm(4), [0.1, 0.5])", 3, 8).p == [0.1, 0.5]
    assert make_cell("noise(lstm, 0.1, input=0.2)", 3, 8).input == 0.2


class Three(torch.nn.Module):
    """Three leaves of state."""

    def forward(self, x: Tensor, state: Any) -> Any:
        return x, state
