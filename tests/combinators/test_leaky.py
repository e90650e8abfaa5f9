"""Leaky states against a step written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elman
from elman.cells import ElmanCell, GRUCell, LSTMCell
from elman.combinators.leaky import Leaky
from elman.errors import OptionError

F64 = torch.float64
B, D, H = 3, 3, 4


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, requires_grad=True)


def rate(cell: Leaky, leaf: int = 0) -> Any:
    """α by its definition."""
    if cell.alpha == "learned":
        return 1 / (1 + torch.exp(-dict(cell.named_parameters())[f"rates.{leaf}"]))
    return dict(cell.named_buffers())[f"rates.{leaf}"] if cell.alpha == "sampled" else cell.alpha


@pytest.mark.parametrize("alpha", [0, 0.7, "learned", "sampled"])
@pytest.mark.parametrize("squash", ["tanh", "softsign"])
def test_leaky_elman_is_the_equation(alpha: Any, squash: str) -> None:
    torch.manual_seed(2)
    inner = ElmanCell(D, H, squash=squash, dtype=F64)
    cell = Leaky(inner, alpha).double()
    x, h = numbers(B, D), numbers(B, H)
    a = x @ inner.weight_ih.T + inner.bias_ih + h @ inner.weight_hh.T + inner.bias_hh
    u = a.tanh() if squash == "tanh" else a / (1 + a.abs())
    expected = rate(cell) * h + (1 - rate(cell)) * u
    y, state = cell(x, h)
    assert state is y
    sources = [x, h, *cell.parameters()]
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(B, H, dtype=F64)
    for found, wanted in zip(
        torch.autograd.grad((y * weight).sum(), sources),
        torch.autograd.grad((expected * weight).sum(), sources),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_every_floating_leaf_leaks_and_the_output_with_it() -> None:
    inner = LSTMCell(D, H, dtype=F64)
    x, h, s = numbers(B, D), numbers(B, H), numbers(B, H)
    cell = Leaky(inner, "sampled").double()
    _, (u_h, u_s) = inner(x, (h, s))
    y, (m_h, m_s) = cell(x, (h, s))
    torch.testing.assert_close(m_h, rate(cell, 0) * h + (1 - rate(cell, 0)) * u_h, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(m_s, rate(cell, 1) * s + (1 - rate(cell, 1)) * u_s, rtol=1e-12, atol=1e-12)
    assert y is m_h


class Counting(nn.Module):
    """Gives what is no state, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.input_size = self.output_size = 1

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Any:
        return {"sum": torch.zeros(batch, 1, device=device, dtype=dtype), "t": torch.zeros(batch, dtype=torch.int64)}

    def forward(self, x: Tensor, state: Any) -> Any:
        total = state["sum"] + x
        return 2 * total, {"sum": total, "t": state["t"] + 1}


def test_integers_do_not_leak_and_other_outputs_stay() -> None:
    ys, state = elman.scan(Leaky(Counting(), 0.5), torch.ones(3, 2, 1), backend="interpret")
    assert ys[:, 0, 0].tolist() == [2.0, 3.0, 4.0]  # the sum grows by half of x
    assert (state["sum"][0].item(), state["t"].tolist()) == (1.5, [3, 3])


def test_an_alpha_near_one_remembers_for_long() -> None:
    inner = ElmanCell(1, 1, squash="identity", bias=False, dtype=F64)
    with torch.no_grad():
        inner.weight_ih.fill_(1.0)
        inner.weight_hh.fill_(0.0)
    impulse = torch.zeros(5, 1, 1, dtype=F64)
    impulse[0] = 1
    ys = elman.scan(Leaky(inner, 0.9), impulse)[0].flatten()
    torch.testing.assert_close(ys, 0.1 * 0.9 ** torch.arange(5, dtype=F64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alpha", ["learned", "sampled"])
def test_time_scales_are_drawn_for_each_unit(alpha: str) -> None:
    torch.manual_seed(0)
    cell = Leaky(GRUCell(D, 2000), alpha, longest=50)
    with torch.no_grad():
        scale = 1 / (1 - torch.as_tensor(rate(cell)))
    assert 1 < scale.min() < 1.1
    assert 45 < scale.max() < 50.01
    assert abs(scale.log().mean().item() - torch.tensor(50.0).log().item() / 2) < 0.1  # log-uniform
    assert len(list(cell.rates.parameters())) == (alpha == "learned")


def test_learned_rates_follow_their_gradient() -> None:
    torch.manual_seed(1)
    cell = Leaky(ElmanCell(D, H), "learned")
    before = cell.rate(0)
    elman.scan(cell, torch.randn(5, B, D))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().min() > 0 for p in cell.rates.parameters())
    assert isinstance(before, Tensor)
    assert before.shape == (H,)


@pytest.mark.parametrize("alpha", [1.0, -0.1, "half", None, True, float("nan")])
def test_an_impossible_alpha(alpha: Any) -> None:
    with pytest.raises(OptionError, match=r"alpha must be a number in \[0, 1\), 'learned' or 'sampled'; got"):
        Leaky(ElmanCell(D, H), alpha)


@pytest.mark.parametrize("longest", [1, 0, -3, float("inf"), "10"])
def test_an_impossible_time_scale(longest: Any) -> None:
    with pytest.raises(OptionError, match="longest must be a number of steps above 1, got"):
        Leaky(ElmanCell(D, H), "sampled", longest=longest)


def test_it_prints_its_alpha() -> None:
    assert "alpha='learned'" in repr(Leaky(ElmanCell(D, H), "learned"))
