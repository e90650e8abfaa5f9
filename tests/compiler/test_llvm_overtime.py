"""Affine loops that all threads share over time: against the reference, run to run, where factors overflow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from overtime_cells import CELLS, Average, hurried
from torch import Tensor
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import elman
from comparing import assert_same, differentiable, everything, scan_by
from elman.combinators import start
from elman.compiler import cache
from elman.compiler.llvm.isa import chosen
from elman.compiler.llvm.kernel import Kernel
from elman.packing import Rows

if chosen() is None:
    pytest.skip("no machine code for this processor", allow_module_level=True)

STEPS = 50
LENGTHS = [7, 50, 33, 0]


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Loops so short that they are not worth it are shared all the same; how many steps were taken at a time."""
    found: list[int] = []
    decide = Kernel.block

    def noted(kernel: Kernel, rows: Rows) -> int:
        found.append(decide(kernel, rows))
        return found[-1]

    cache.forget()  # a run that was noted down asks no kernel
    hurried(monkeypatch)
    monkeypatch.setattr(Kernel, "block", noted)
    return found


@pytest.fixture(params=[2, 3, 8])
def threads(request: pytest.FixtureRequest) -> Any:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def given(cell: Any, batch: int, width: int, dtype: torch.dtype = torch.float64, steps: int = STEPS) -> dict[str, Any]:
    torch.manual_seed(3)
    state = start(cell, batch, device=torch.device("cpu"), dtype=dtype)
    state = pytree.tree_map(torch.randn_like, state)
    xs = torch.randn(steps, batch, width, dtype=dtype)
    return {"xs": differentiable(xs, dtype), "state": differentiable(state, dtype), "constants": None}


@pytest.mark.parametrize("width", [5, 17, 64])
@pytest.mark.parametrize("name", CELLS)
def test_every_gradient(name: str, width: int, blocks: list[int], threads: int) -> None:
    torch.manual_seed(4)
    cell = CELLS[name](width).double()
    for batch, options in ((1, {}), (3, {"reverse": True}), (4, {"lengths": LENGTHS}),
                           (4, {"lengths": LENGTHS, "reverse": True})):  # fmt: skip
        sources = given(cell, batch, width)
        found = everything(scan_by("llvm"), cell, sources, **options)
        assert len(blocks) >= 2
        assert all(blocks)
        assert_same(found, everything(scan_by("reference"), cell, sources, **options))
        again = everything(scan_by("llvm"), cell, sources, **options)
        for key, value in found.items():
            torch.testing.assert_close(again[key], value, rtol=0, atol=0)


def test_pieces_of_a_call(blocks: list[int], threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elman.compiler.llvm.kernel._WORK_OF_A_CALL", 20_000)  # some 14 steps
    torch.manual_seed(4)
    cell = CELLS["lru"](17).double()
    sources = given(cell, 3, 17)
    assert_same(everything(scan_by("llvm"), cell, sources), everything(scan_by("reference"), cell, sources))
    assert all(blocks)


@pytest.mark.parametrize("rate", [3.0, -40.0])
def test_factors_that_overflow(rate: float, blocks: list[int], threads: int) -> None:
    """Their product is infinite and the state stays 0, where 0 · ∞ would be NaN."""
    cell = Average(9).double()
    with torch.no_grad():
        cell.keep.fill_(rate)
    xs = torch.zeros(1000, 2, 9, dtype=torch.float64)
    xs[-1] = 1
    sources = given(cell, 2, 9)
    sources["xs"] = differentiable(xs)
    sources["state"] = differentiable(torch.zeros(2, 9, dtype=torch.float64))

    def outcome(backend: str) -> tuple[Tensor, Tensor]:
        ys, final = elman.scan(cell, sources["xs"], sources["state"], backend=backend)
        return ys.detach(), final.detach()

    for found, expected in zip(outcome("llvm"), outcome("reference"), strict=True):
        assert expected.isfinite().all()
        torch.testing.assert_close(found, expected)
    assert len(blocks) == 2  # asked for the number of threads, and for the call
    assert all(blocks)


def test_bfloat16_is_that_of_one_thread(blocks: list[int]) -> None:
    """The state is carried in float32, so another order of sums shows in the last bit of what is stored at most."""
    torch.manual_seed(4)
    cell = Average(33).bfloat16()
    sources = given(cell, 2, 33, torch.bfloat16)
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(everything(scan_by("llvm"), cell, sources))
    torch.set_num_threads(1)
    assert any(blocks)
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key].float(), value.float(), rtol=2**-7, atol=2**-7)


def test_loops_that_are_not_affine_share_nothing_over_time(blocks: list[int], threads: int) -> None:
    class Squashed(Average):
        def forward(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
            s = torch.tanh(self.keep * s + x)
            return s, s

    cell = Squashed(17).double()
    sources = given(cell, 1, 17)
    assert_same(everything(scan_by("llvm"), cell, sources), everything(scan_by("reference"), cell, sources))
    assert not blocks[0]  # the adjoint is affine


def test_few_steps_or_wide_rows_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels: list[Kernel] = []
    run = Kernel.__call__

    def noted(kernel: Kernel, *args: Any) -> None:
        kernels.append(kernel)
        run(kernel, *args)

    monkeypatch.setattr(Kernel, "__call__", noted)
    elman.scan(Average(64), torch.randn(10, 1, 64), backend="llvm")
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    assert [kernels[0].block(Rows(*shape)) > 0 for shape in ((100, 1), (10_000, 1), (10_000, 256))] == [
        False, True, False
    ]  # fmt: skip


class Shrinking(torch.nn.Module):
    """s = s⁻ σ(x) + x, whose product of factors is 0 after some hundred steps."""

    def forward(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        s = s * x.sigmoid() + x
        return s, s


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_an_infinite_state_stays_what_it_is(value: float, blocks: list[int], threads: int) -> None:
    x, state = torch.randn(3000, 2, 3), torch.zeros(2, 3)
    state[1, 2] = value
    found, expected = (elman.scan(Shrinking(), x, state, backend=b) for b in ("llvm", "reference"))
    assert any(blocks)
    assert_close(found, expected, equal_nan=True)


class Counted(torch.nn.Module):
    """A counter beside a product of x: a loop over whole numbers."""

    def forward(self, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        n = n + 1
        return x * n, n


def test_whole_numbers_are_not_shared_over_time(blocks: list[int], threads: int) -> None:
    x, n = torch.randn(300, 2, 3), torch.zeros(2, 3, dtype=torch.int64)
    assert_close(elman.scan(Counted(), x, n, backend="llvm"), elman.scan(Counted(), x, n, backend="reference"))
    assert not any(blocks)
