"""Random cells as machine code: equal to the plain loop, outputs, final states and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, note, settings

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


@pytest.mark.slow
@given(plans(most=20, wide=True), ways(9))
@settings(max_examples=2000, **SETTINGS)
def test_many_larger_random_cells(plan: Plan, way: dict[str, Any]) -> None:
    check(plan, way)
