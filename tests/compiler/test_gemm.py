"""Products of float32 through oneDNN: the same numbers as the plain loop in float64, to single precision."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

import elman
from comparing import compiled
from elman.compiler import cache, gemm

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
CELLS = {
    "elman": elman.ElmanCell,
    "gru": elman.GRUCell,
    "lstm": elman.LSTMCell,
    "peepholes": lambda d, h: elman.LSTMCell(d, h, peepholes=True),
}


@pytest.fixture(params=[True, False], ids=["onednn", "mkl"])
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both libraries, whatever this machine prefers; programs are made anew."""
    monkeypatch.setattr(gemm, "prefers_onednn", lambda: request.param)
    cache.forget()
    yield request.param
    cache.forget()


@needs_onednn
@pytest.mark.parametrize("lengths", [None, [12, 3, 0, 12, 7]])
@pytest.mark.parametrize("name", CELLS)
def test_single_precision(name: str, lengths: list[int] | None, onednn: bool) -> None:
    torch.manual_seed(0)
    single = CELLS[name](130, 128)
    double = copy.deepcopy(single).double()
    xs = torch.randn(12, 5, 130)
    found = []
    for cell, backend in ((single, "interpret"), (double, "reference")):
        given = xs.to(next(cell.parameters()).dtype).requires_grad_()
        ys, state = elman.scan(cell, given, lengths=lengths, backend=backend)
        loss = ys.sin().sum() + sum(s.square().sum() for s in (state if isinstance(state, tuple) else (state,)))
        found.append([ys, *torch.autograd.grad(loss, [given, *cell.parameters()])])
    for one, two in zip(*found, strict=True):
        # 1e-5 of the largest entry: a dozen steps of products of length 128 in float32.
        torch.testing.assert_close(one.double(), two, rtol=0, atol=1e-5 * float(two.detach().abs().max()))


@needs_onednn
def test_which_products_it_takes(onednn: bool) -> None:
    def sources(cell: nn.Module, size: int) -> str:
        dtype = next(cell.parameters()).dtype
        given = {
            "xs": torch.randn(3, 2, size, dtype=dtype),
            "state": torch.zeros(2, size, dtype=dtype),
            "constants": None,
        }
        return compiled(cell, given).forward(False).source

    assert ("pack(" in sources(elman.GRUCell(128, 128), 128)) == onednn
    assert "pack(" not in sources(elman.GRUCell(16, 16), 16)  # too small to gain
    assert "pack(" not in sources(elman.GRUCell(128, 128).double(), 128)


@needs_onednn
@pytest.mark.parametrize("shape", [(1, 128, 128), (7, 130, 129), (300, 128, 256)])
def test_products(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    left, right, bias = torch.randn(m, k), torch.randn(k, n), torch.randn(n)
    full = torch.randn(m, n)
    close = {"rtol": 1e-4, "atol": 1e-4}  # float32 sums of up to 300 terms in another order
    for steps in (1, 100):
        packed = gemm.pack(right, m, steps)
        torch.testing.assert_close(gemm.product(left, packed, True), left @ right, **close)
        torch.testing.assert_close(gemm.added(full, left, packed, True), full + left @ right, **close)
    torch.testing.assert_close(gemm.product(left, right), left @ right, **close)
    torch.testing.assert_close(gemm.product(left.t().contiguous().t(), right), left @ right, **close)
    torch.testing.assert_close(gemm.product(left, right.t().contiguous().t()), left @ right, **close)
    torch.testing.assert_close(gemm.added(bias, left, right), bias + left @ right, **close)
    for narrow in (full[:1], full[:, :1], full[:1, :1], bias[:1], bias[0]):  # whatever expands to (M, N)
        torch.testing.assert_close(gemm.added(narrow, left, right), narrow + left @ right, **close)
        torch.testing.assert_close(gemm.added(narrow, left, packed, True), narrow + left @ right, **close)


LAYOUTS = {
    "whole": lambda rows, columns: torch.randn(rows, columns),
    "transposed": lambda rows, columns: torch.randn(columns, rows).t(),
    "slice of columns": lambda rows, columns: torch.randn(rows, columns + 8)[:, 4:-4],
    "slice of rows, transposed": lambda rows, columns: torch.randn(columns, rows + 8).t()[4:-4],
    "one row for all": lambda rows, columns: torch.randn(1, columns).expand(rows, columns),
    "one column for all": lambda rows, columns: torch.randn(rows, 1).expand(rows, columns),
}


@needs_onednn
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
def test_no_layout_is_slow(left: str, right: str) -> None:
    """oneDNN leaves its kernels for a loop, a thousand times slower, where an operand has gaps."""
    a, b = LAYOUTS[left](160, 128), LAYOUTS[right](128, 192)
    bias = torch.randn(192)
    torch.testing.assert_close(gemm.product(a, b), a @ b, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(gemm.added(bias, a, b), bias + a @ b, rtol=1e-4, atol=1e-3)

    def seconds(function: Callable[..., torch.Tensor], *args: torch.Tensor) -> float:
        begun = time.perf_counter()
        function(*args)
        return time.perf_counter() - begun

    dense = min(seconds(torch.mm, a.contiguous(), b.contiguous()) for _ in range(3))
    for function, args in ((gemm.product, (a, b)), (gemm.added, (bias, a, b))):
        assert min(seconds(function, *args) for _ in range(3)) < 50 * dense
