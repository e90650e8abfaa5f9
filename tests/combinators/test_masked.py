"""Removed connections: zero, without gradient, saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import elman
from comparing import compiled
from elman.cells import ElmanCell, GRUCell
from elman.combinators import Stack
from elman.combinators.masked import Masked
from elman.errors import OptionError

F64 = torch.float64
T, B, D, H = 5, 2, 3, 4
LAST = "cell.cells.1.weight_hh"


def test_masked_is_the_cell_with_the_product() -> None:
    torch.manual_seed(7)
    inner = ElmanCell(D, H, dtype=F64)
    full = inner.weight_hh.detach().clone()
    mask = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    cell = Masked(inner, mask)
    xs = torch.randn(T, B, D, dtype=F64)
    weight = (full * mask).requires_grad_()
    h = torch.zeros(B, H, dtype=F64)
    for x in xs:
        h = (x @ inner.weight_ih.T + inner.bias_ih + h @ weight.T + inner.bias_hh).tanh()
    ys, _ = elman.scan(cell, xs, backend="interpret")
    torch.testing.assert_close(ys[-1], h, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(h.square().sum(), [weight, inner.weight_ih])
    found = torch.autograd.grad(ys[-1].square().sum(), [inner.weight_hh, inner.weight_ih])
    torch.testing.assert_close(found[0], expected[0] * mask, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=1e-12)
    assert found[0][mask == 1].all()


@pytest.mark.parametrize("optimiser", [torch.optim.AdamW, torch.optim.SGD])
def test_what_is_removed_stays_removed(optimiser: Any) -> None:
    cell = Masked(GRUCell(D, H), 0.5)
    removed = ~cell.mask_weight_hh
    assert removed.sum() == 3 * H * H / 2
    steps = optimiser(cell.parameters(), lr=0.1)
    for _ in range(3):
        steps.zero_grad()
        elman.scan(cell, torch.randn(T, B, D))[0].square().sum().backward()
        steps.step()
    weight = cell.cell.weight_hh
    assert not weight[removed].any()
    assert weight[~removed].all()
    assert weight.grad is not None
    assert not weight.grad[removed].any()


def test_even_what_is_written_into_removed_weights_is_not_read() -> None:
    torch.manual_seed(8)
    cell, xs = Masked(ElmanCell(D, H), 0.0), torch.randn(T, B, D)
    ys = elman.scan(cell, xs)[0]
    nn.init.normal_(cell.cell.weight_hh)
    assert torch.equal(elman.scan(cell, xs)[0], ys)


def test_the_mask_is_multiplied_once_for_a_sequence() -> None:
    cell = Masked(ElmanCell(D, H), 0.5)
    program = compiled(cell, {"xs": torch.randn(T, B, D), "state": torch.zeros(B, H), "constants": None})
    once = [str(n.target) for n in program.before.graph.nodes if n.op == "call_function"]
    assert "aten.mul.Tensor" in once
    assert not any("mul" in str(n.target) for part in program.program.parts for n in part.nodes)


def test_weights_of_parts_and_several() -> None:
    stack = Stack([ElmanCell(H, H), ElmanCell(H, H)])
    cell = Masked(Masked(stack, 0.25, weights="cells.0.weight_ih cells.0.weight_hh"), torch.eye(H), weights=LAST)
    weights = dict(stack.named_parameters())
    assert {name: int((weight != 0).sum()) for name, weight in weights.items() if "weight" in name} == {
        "cells.0.weight_ih": H,
        "cells.0.weight_hh": H,
        "cells.1.weight_ih": H * H,
        "cells.1.weight_hh": H,
    }
    assert not weights["cells.0.weight_ih"].bool().equal(weights["cells.0.weight_hh"].bool())  # drawn apart
    saved = {name for name in cell.state_dict() if "mask" in name}
    assert saved == {"mask_cell_cells_1_weight_hh", "cell.mask_cells_0_weight_ih", "cell.mask_cells_0_weight_hh"}
    assert cell.double().mask_cell_cells_1_weight_hh.dtype == torch.bool


WRONG: list[tuple[Any, str, str]] = [
    (0.5, "weight_hx", "unknown parameter of ElmanCell 'weight_hx': did you mean 'weight_"),
    (torch.ones(H, D), "weight_hh", r"zeros and ones of shape \(4, 4\), as the parameter; got \(4, 3\)"),
    (torch.eye(H), "weight_ih", r"the mask of weight_ih must be zeros and ones of shape \(4, 3\)"),
    (torch.full((H, H), 0.5), "weight_hh", "must be zeros and ones"),
    (1.5, "weight_hh", "weight_hh must be a 0/1 tensor or the share that is kept, 0 to 1; got 1.5"),
    ("half", "weight_hh", "share that is kept, 0 to 1; got 'half'"),
    (True, "weight_hh", "share that is kept, 0 to 1; got True"),
]


@pytest.mark.parametrize(("mask", "weights", "said"), WRONG)
def test_mistakes_are_named(mask: Any, weights: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Masked(ElmanCell(D, H), mask, weights=weights)
