"""Back-propagation through time as formulas equals autograd, the derived gradients and the recorded adjoints."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import elman
from elman import bptt
from elman.cells import ElmanCell
from elman.errors import InputError

SIZES = [(1, 1, 2, 3, 2), (2, 3, 1, 1, 4), (9, 4, 3, 5, 6), (40, 2, 2, 7, 3)]  # T, B, D, H, O
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def example(size: tuple[int, ...]) -> tuple[bptt.Parameters, Tensor, Tensor, Tensor]:
    steps, batch, D, H, O = size
    torch.manual_seed(6)
    p = bptt.Parameters(U=numbers(H, D), W=numbers(H, H), V=numbers(O, H), b=numbers(H), c=numbers(O))
    return p, numbers(steps, batch, D), torch.randint(O, (steps, batch)), 0.5 * numbers(batch, H)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("started", [False, True])
def test_the_formulas_equal_autograd(size: tuple[int, ...], started: bool) -> None:
    p, x, y, h0 = example(size)
    named = {**vars(p), "x": x, "h0": h0 if started else torch.zeros_like(h0)}
    wanted = {name: leaf.clone().requires_grad_() for name, leaf in named.items()}
    h, loss = wanted["h0"], torch.zeros((), dtype=torch.float64)
    for t in range(len(x)):
        h = torch.tanh(h @ wanted["W"].T + wanted["x"][t] @ wanted["U"].T + wanted["b"])
        loss = loss + F.cross_entropy(h @ wanted["V"].T + wanted["c"], y[t], reduction="sum")
    run = bptt.forward(p, x, y, h0 if started else None)
    torch.testing.assert_close(run.loss, loss.detach(), **TOLERANCE)
    found = bptt.backward(p, run)
    for (name, _), expected in zip(wanted.items(), torch.autograd.grad(loss, [*wanted.values()]), strict=True):
        torch.testing.assert_close(getattr(found, name), expected, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", ["reference", "interpret"])
def test_the_derived_gradients_and_adjoints_equal_the_formulas(size: tuple[int, ...], backend: str) -> None:
    p, x, y, h0 = example(size)
    cell = ElmanCell(size[2], size[3]).double()
    with torch.no_grad():
        cell.weight_ih.copy_(p.U)
        cell.weight_hh.copy_(p.W)
        cell.bias_ih.copy_(p.b)
        cell.bias_hh.zero_()
    V, c = p.V.clone().requires_grad_(), p.c.clone().requires_grad_()
    sources = {"x": x.clone().requires_grad_(), "h0": h0.clone().requires_grad_(), "V": V, "c": c}
    hs, last, recording = elman.scan(cell, sources["x"], sources["h0"], record=True, backend=backend)
    o = F.linear(hs, V, c)
    loss = F.cross_entropy(o.flatten(0, 1), y.flatten(), reduction="sum")
    run = bptt.forward(p, x, y, h0)
    torch.testing.assert_close(o.detach(), run.o, **TOLERANCE)
    torch.testing.assert_close(last.detach(), run.h[-1], **TOLERANCE)
    torch.testing.assert_close(loss.detach(), run.loss, **TOLERANCE)
    wanted = bptt.backward(p, run)
    torch.testing.assert_close(recording.adjoint(loss), wanted.h, **TOLERANCE)
    torch.testing.assert_close(torch.autograd.grad(loss, o, retain_graph=True)[0], wanted.o, **TOLERANCE)
    sources |= {"U": cell.weight_ih, "W": cell.weight_hh, "b": cell.bias_ih}
    for (name, _), found in zip(sources.items(), torch.autograd.grad(loss, [*sources.values()]), strict=True):
        torch.testing.assert_close(found, getattr(wanted, name), **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def test_the_loss_of_a_symbol_that_is_all_but_impossible_is_finite() -> None:
    p = bptt.Parameters(*(torch.zeros(s, dtype=torch.float64) for s in ((1, 1), (1, 1), (2, 1), (1,), (2,))))
    p.c[0] = 2000.0
    run = bptt.forward(p, torch.zeros(1, 1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.long))
    assert run.loss == 2000
    assert bptt.backward(p, run).c.tolist() == [1, -1]


def test_targets_that_do_not_fit() -> None:
    p, x, y, _ = example(SIZES[2])
    for wrong in (y[1:], y.double(), y[..., None]):
        with pytest.raises(InputError, match="y symbols"):
            bptt.forward(p, x, wrong)
