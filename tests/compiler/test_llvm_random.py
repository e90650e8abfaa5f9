"""Random cells as machine code: equal to the plain loop, outputs, final states and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from tile_unit import machine_with_tiles, usable
from torch.utils import _pytree as pytree

from comparing import assert_same, everything, inputs, scan_by
from elman.compiler import cache
from elman.compiler.llvm import kernels
from randomcells import Plan, RandomCell, plans, ways

SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
    "report_multiple_bugs": False,
}


def check(plan: Plan, way: dict[str, Any]) -> None:
    note(repr(plan))
    kernels._warned.clear()  # a loop without machine code is an error, also when the example is tried again
    cache.forget()
    cell = RandomCell(plan)
    fed = inputs(cell, way["steps"], way["batch"])
    options = {"lengths": way["lengths"], "reverse": way["reverse"]}
    expected = everything(scan_by("reference"), cell, fed, **options)
    found = everything(scan_by("llvm"), cell, fed, remat=way["remat"], **options)
    # Norms and quotients of nearly equal numbers lose a few digits.
    assert_same(found, expected, rtol=1e-7, atol=1e-9)


@given(plans(wide=True), ways(9))
@settings(max_examples=100, **SETTINGS)
def test_a_random_cell_equals_the_plain_loop(plan: Plan, way: dict[str, Any]) -> None:
    check(plan, way)


def check_tiles(plan: Plan, way: dict[str, Any]) -> None:
    """Products that round their operands alike, on a matrix unit and on vectors: only sums are in another order."""
    note(repr(plan))
    kernels._warned.clear()
    cell = RandomCell(plan).float()
    fed = pytree.tree_map_only(torch.Tensor, _single, inputs(cell, way["steps"], way["batch"]))
    options = {"lengths": way["lengths"], "reverse": way["reverse"], "remat": way["remat"]}
    torch.set_float32_matmul_precision("medium")
    try:
        cache.forget()
        expected = everything(scan_by("llvm"), cell, fed, **options)
        with machine_with_tiles():
            found = everything(scan_by("llvm"), cell, fed, **options)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_same(found, expected, rtol=2e-3, atol=2e-4)


def _single(x: torch.Tensor) -> torch.Tensor:
    return x.detach().float().requires_grad_(x.requires_grad) if x.is_floating_point() else x


@pytest.mark.skipif(not usable(), reason="no machine code for tiles runs here")
@given(plans(wide=True), ways(9))
@settings(max_examples=40, **SETTINGS)
def test_a_random_cell_is_the_same_on_tiles(plan: Plan, way: dict[str, Any]) -> None:
    check_tiles(plan, way)


@pytest.mark.slow
@pytest.mark.skipif(not usable(), reason="no machine code for tiles runs here")
@given(plans(most=20, wide=True), ways(9))
@settings(max_examples=500, **SETTINGS)
def test_many_random_cells_are_the_same_on_tiles(plan: Plan, way: dict[str, Any]) -> None:
    check_tiles(plan, way)


@pytest.mark.slow
@given(plans(most=20, wide=True), ways(9))
@settings(max_examples=2000, **SETTINGS)
def test_many_larger_random_cells(plan: Plan, way: dict[str, Any]) -> None:
    check(plan, way)
