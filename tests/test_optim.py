"""Schedule, clipping and optimiser state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from elman.config import Optim
from elman.optim import clip_gradients, learning_rate, load_optimizer, make_optimizer, optimizer_state


@pytest.mark.parametrize(
    ("step", "fraction", "expected"),
    [(0, 0.0, 0.1), (4, 0.0, 0.5), (9, 0.0, 1.0), (50, 0.5, 0.6), (99, 1.0, 0.2), (200, 1.5, 0.2)],
)
def test_warm_up_and_cosine(step: int, fraction: float, expected: float) -> None:
    settings = Optim(lr=1.0, warmup=10, final_lr=0.2)
    assert learning_rate(settings, step, fraction) == pytest.approx(expected)


def test_constant_and_no_warm_up() -> None:
    assert learning_rate(Optim(lr=3.0, warmup=0, schedule="constant"), 0, 0.9) == 3.0
    assert learning_rate(Optim(lr=3.0, warmup=0), 0, 0.0) == 3.0


def test_clipping_scales_to_the_limit_and_reports_the_norm_before() -> None:
    weights = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(1))]
    weights[0].grad, weights[1].grad = torch.full((3,), 2.0), torch.full((2, 2), 1.0)
    assert clip_gradients(weights, 2.0) == pytest.approx(4.0)
    torch.testing.assert_close(weights[0].grad, torch.full((3,), 1.0), rtol=1e-5, atol=0)
    assert clip_gradients(weights, 2.1) == pytest.approx(2.0)
    torch.testing.assert_close(weights[1].grad, torch.full((2, 2), 0.5), rtol=1e-5, atol=0)
    assert clip_gradients(weights, 0.0) == pytest.approx(2.0)


def test_clipping_leaves_what_is_not_finite() -> None:
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([math.inf, 1.0])
    assert clip_gradients([weight], 1.0) == math.inf
    assert weight.grad[1] == 1.0


def test_only_matrices_are_decayed() -> None:
    optimizer = make_optimizer(nn.Linear(2, 3), Optim(weight_decay=0.3))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert [group["params"][0].dim() for group in optimizer.param_groups] == [2, 1]


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_the_state_goes_on_exactly(name: str) -> None:
    settings = Optim(name=name, lr=0.1)
    x = torch.randn(8, 4)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

    one = nn.Linear(4, 2)
    first = make_optimizer(one, settings)
    steps(one, first, 3)
    other = nn.Linear(4, 2)
    other.load_state_dict(one.state_dict())
    second = make_optimizer(other, settings)
    load_optimizer(second, {key: value.clone() for key, value in optimizer_state(first).items()})
    steps(one, first, 3)
    steps(other, second, 3)
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.bias, other.bias)
