"""A cell against its equation written out once more: values and every gradient, step by step and unfolded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import elman
from elman.types import Cell

__all__ = ["F64", "B", "D", "H", "assert_is_the_equation", "numbers", "product", "same"]

D, H, B = 3, 4, 5
F64 = torch.float64


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


def same(mine: Any, theirs: Any) -> None:
    torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def product(cell: nn.Module, gate: int, name: str, argument: Tensor) -> Tensor:
    """W v + b for one gate's block, for every row v."""
    rows = slice(gate * H, (gate + 1) * H)
    weight, bias = getattr(cell, f"weight_{name}")[rows], getattr(cell, f"bias_{name}", None)
    return torch.stack([weight @ v for v in argument]) + (0 if bias is None else bias[rows])


def assert_is_the_equation(cell: Any, equation: Callable[..., Any]) -> None:
    """Four steps from the initial state: outputs, final state, gradients in inputs, first state and parameters."""
    assert isinstance(cell, Cell)
    xs = numbers(4, B, cell.input_size).requires_grad_()
    start = cell.initial_state(B, device=torch.device("cpu"), dtype=F64)
    start = pytree.tree_map(lambda leaf: leaf.clone().requires_grad_(), start)
    weights = numbers(4, B, cell.output_size)

    def by(step: Callable[..., Any]) -> tuple[Tensor, Any]:
        ys, state = [], start
        for x in xs:
            y, state = step(x, state)
            ys.append(y)
        return torch.stack(ys), state

    def everything(ys: Tensor, final: Any) -> list[Tensor]:
        sources = [xs, *pytree.tree_leaves(start), *cell.parameters()]
        loss = (ys * weights).sum() + sum(leaf.sin().sum() for leaf in pytree.tree_leaves(final))
        grads = torch.autograd.grad(loss, sources, allow_unused=True, materialize_grads=True)
        return [ys, *pytree.tree_leaves(final), *grads]

    expected = everything(*by(lambda x, state: equation(cell, x, state)))
    assert expected[0].shape == weights.shape
    same(everything(*by(cell)), expected)
    same(everything(*elman.scan(cell, xs, start, backend="interpret")), expected)
