"""Machine code between inaccessible pages: every row of the contract table, the zoo, and sizes that are not even.

A wrong address ends the process that runs the kernel, so that is another one; the next check gets a new one.
"""

from __future__ import annotations

import ctypes
import gc
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from multiprocessing import get_context
from typing import Any

import bfloat16_cells
import pytest
import torch
from guard_pages import Pages, guarded
from llvmcells import ALL_MACHINE_CODE, KINDS, SIZES, assert_single, expected_single, given, made
from overtime_cells import CELLS, hurried
from tile_unit import machine_with_tiles, usable
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cellzoo import zoo
from comparing import assert_same, differentiable, everything, floats, inputs, scan_by
from contracts import ROWS
from elman.combinators import start
from elman.errors import UnfoldWarning

STEPS, BATCH = 3, 5
LENGTHS = [2, 0, 3, 1, 3]


class Apart:
    """One process, in which calls run one after the other; one that ends is replaced."""

    def __init__(self) -> None:
        self.pool: ProcessPoolExecutor | None = None

    def __call__(self, function: Any, *args: Any) -> Any:
        if self.pool is None:  # which collects garbage as seldom as this process
            self.pool = ProcessPoolExecutor(1, get_context("spawn"), gc.set_threshold, gc.get_threshold())
        try:
            return self.pool.submit(function, *args).result()
        except BrokenProcessPool:
            self.close()
            raise

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()
            self.pool = None


@pytest.fixture(scope="module")
def apart() -> Iterator[Apart]:
    pool = Apart()
    yield pool
    pool.close()


def overrun(at_end: bool) -> None:
    pages = Pages(at_end)
    address = pages.room(24, 8)
    ctypes.memset(address + 24 if at_end else address - 1, 0, 1)


def overwritten() -> None:
    pages = Pages(True)
    tensor = pages.like(torch.ones(3))
    pages.close(tensor.data_ptr())
    tensor.zero_()


@pytest.mark.parametrize(("wrong", "args"), [(overrun, (True,)), (overrun, (False,)), (overwritten, ())])
def test_the_mode_finds_what_it_is_made_for(apart: Apart, wrong: Any, args: tuple[Any, ...]) -> None:
    with pytest.raises(BrokenProcessPool):
        apart(wrong, *args)
    assert apart(abs, -1) == 1


def check(cell: nn.Module, sources: dict[str, Any], **options: Any) -> None:
    """Machine code against both sides of its memory. Fails where a loop has none, or none ran."""
    single = floats(sources)[0].dtype == torch.float32
    expected: Any = expected_single(cell, sources, **options) if single else None
    expected = expected or everything(scan_by("reference"), cell, sources, **options)
    for at_end in (True, False):
        with warnings.catch_warnings(), guarded(at_end) as ran:
            warnings.simplefilter("error", UnfoldWarning)
            found = everything(scan_by("llvm"), cell, sources, **options)
        (assert_single if single else assert_same)(found, expected)
        assert ran


def of_row(name: str) -> None:
    row = ROWS[name]
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(11)
        cell = row.make().to(dtype).eval()
        xs, constants = (differentiable(tree, dtype) for tree in row.example(STEPS, BATCH))
        state = start(cell, BATCH, device=torch.device("cpu"), dtype=dtype, constants=constants)
        state = pytree.tree_map_only(Tensor, lambda s: s + 0.3 if s.is_floating_point() else s, state)
        sources = {"xs": xs, "state": differentiable(state, dtype), "constants": constants}
        check(cell, sources, **({} if dtype == torch.float32 else {"lengths": LENGTHS, "reverse": True}))


def of_zoo(name: str) -> None:
    check(zoo(name), inputs(zoo(name), STEPS, BATCH), lengths=LENGTHS)


def of_time(name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        hurried(patch)
        patch.setattr(torch, "get_num_threads", lambda: 3)
        for dtype in (torch.float32, torch.float64):
            cell = CELLS[name](17).to(dtype)
            check(cell, given(cell, 50, 3, 17, dtype), lengths=[31, 50, 0], reverse=True)


def of_size(kind: str, steps: int, batch: int, d: int, h: int) -> None:
    for dtype in (torch.float32, torch.float64):
        cell = made(kind, d, h, dtype)
        check(cell, given(cell, steps, batch, d, dtype))


def of_bfloat16(name: str, tiles: bool) -> None:
    size, make = bfloat16_cells.CELLS[name]
    torch.manual_seed(5)
    cell, x = make(), torch.randn(STEPS, BATCH, size)
    options: dict[str, Any] = {"lengths": LENGTHS, "reverse": True}
    with machine_with_tiles() if tiles else nullcontext():
        exact, usual = (bfloat16_cells.everything(cell, x, "reference", cast, **options) for cast in (False, True))
        for at_end in (True, False):
            with guarded(at_end) as ran:
                found = bfloat16_cells.everything(cell, x, "llvm", True, **options)
            bfloat16_cells.check(found, usual, exact)
            assert ran
            torch.set_float32_matmul_precision("high")
            with guarded(at_end) as ran:
                found = bfloat16_cells.everything(cell, x, "llvm", False, **options)
            torch.set_float32_matmul_precision("highest")
            assert max(bfloat16_cells.distance(found, exact)) < 2e-5
            assert ran


compiled_rows = [name for name, row in ROWS.items() if "llvm" in row.backends and row.loops != 0]


@pytest.mark.parametrize("name", compiled_rows)
def test_row_of_the_contract_table(apart: Apart, name: str) -> None:
    apart(of_row, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL_MACHINE_CODE)
def test_cell_of_the_zoo(apart: Apart, name: str) -> None:
    apart(of_zoo, name)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_size_that_is_not_even(apart: Apart, kind: str, size: tuple[int, int, int, int]) -> None:
    apart(of_size, kind, *size)


@pytest.mark.parametrize("tiles", [False, True], ids=["this machine", "tiles"])
@pytest.mark.parametrize("name", bfloat16_cells.CELLS)
def test_bfloat16(apart: Apart, name: str, tiles: bool) -> None:
    if tiles and not usable():
        pytest.skip("no machine code for tiles runs here")
    apart(of_bfloat16, name, tiles)


@pytest.mark.parametrize("name", CELLS)
def test_loop_that_is_shared_over_time(apart: Apart, name: str) -> None:
    apart(of_time, name)
