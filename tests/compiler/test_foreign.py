"""What a step may hold besides operations on tensors: hooks, gradients of the user's own, checkpoints, other scans."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from test_detection import Base, by_eager_loop, feed
from torch import Tensor, nn

import elman
from cellzoo import Elman
from elman.errors import UnfoldWarning


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("hook", ["pruning", "old weight_norm", "old spectral_norm"])
def test_hooks_that_rewrite_a_weight(hook: str) -> None:
    from torch.nn.utils import prune, spectral_norm, weight_norm

    cell = Hooked()
    if hook == "pruning":
        prune.random_unstructured(cell.W, "weight", 0.5)
    elif hook == "old weight_norm":
        weight_norm(cell.W)
    else:
        spectral_norm(cell.W)
        cell.eval()
    xs, state = feed()
    for _ in range(2):
        ys, final = elman.scan(cell, xs, state, backend="interpret")
        expected = by_eager_loop(cell, xs, state)
        torch.testing.assert_close((ys, final), expected)
        names, parameters = zip(*cell.named_parameters(), strict=True)
        found = torch.autograd.grad(ys.square().sum(), parameters, allow_unused=True)
        right = torch.autograd.grad(expected[0].square().sum(), parameters, allow_unused=True)
        for name, a, b in zip(names, found, right, strict=True):
            if b is not None:
                torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(0.9)
    assert type(cell.W.weight) in (Tensor, nn.Parameter)
    assert not torch._subclasses.fake_tensor.is_fake(cell.W.weight)


def assert_gradient_of_the_loop(cell: Base) -> None:
    """Compiled or not, a scan gives the gradient that the eager loop gives."""
    xs, state = feed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnfoldWarning)
        ys, _ = elman.scan(cell, xs, state)
    expected, _ = by_eager_loop(cell, xs, state)
    found = torch.autograd.grad(ys.sum(), cell.U.weight)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), cell.U.weight))


class Hooked(Base):
    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Linear(4, 4)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + self.W(h))
        return h, h


class OnlyForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        return a * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 3


def test_an_operation_of_the_users_own_with_its_own_gradient() -> None:
    """A custom autograd.Function has a gradient that no graph of ATen knows: it must not be replaced by another."""

    class Custom(Base):
        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(OnlyForward.apply(self.U(x)) + h)
            return h, h

    cell = Custom()
    xs, state = feed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnfoldWarning)
        ys, _ = elman.scan(cell, xs, state)
    expected, _ = by_eager_loop(cell, xs, state)
    torch.testing.assert_close(ys, expected)
    found = torch.autograd.grad(ys.sum(), cell.U.weight)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), cell.U.weight))


def test_no_grad_inside_a_step() -> None:
    class Partly(Base):
        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                scale = torch.sigmoid(h).mean(-1, keepdim=True)
            h = torch.tanh(self.U(x) + h * scale)
            return h, h

    assert_gradient_of_the_loop(Partly())


def test_a_tensor_hook_inside_a_step() -> None:
    """register_hook changes a gradient on its way: it runs, or the step is refused; it is never forgotten."""

    class WithHook(Base):
        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(self.U(x) + h)
            if h.requires_grad:
                h.register_hook(lambda g: g * 0.5)
            return h, h

    assert_gradient_of_the_loop(WithHook())


def test_a_checkpointed_piece_of_a_step() -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Base):
        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            h = checkpoint(lambda a, b: torch.tanh(self.U(a) + b), x, h, use_reentrant=False)
            return h, h

    assert_gradient_of_the_loop(Checkpointed())


def test_a_scan_inside_a_step() -> None:
    """A step may itself unfold something along its features."""

    class Hierarchy(Base):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Elman()

        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            ys, h = elman.scan(self.inner, x.transpose(0, 1), h)
            return ys.sum(0), h

    cell = Hierarchy()
    xs, state = torch.randn(4, 2, 5, 3), torch.randn(2, 4)
    ys, final = elman.scan(cell, xs, state, backend="interpret")
    expected, last = by_eager_loop(cell, xs, state)
    torch.testing.assert_close((ys, final), (expected, last))
    found = torch.autograd.grad(ys.sum(), cell.inner.W.weight)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), cell.inner.W.weight))
