"""Random cells: the compiled program equals the loop written by hand, outputs, final states and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, note, settings

from comparing import assert_same, by_hand, everything, inputs, scan_by
from randomcells import Plan, RandomCell, plans, ways

SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
    "report_multiple_bugs": False,
}


def check(plan: Plan, way: dict[str, Any]) -> None:
    note(repr(plan))
    cell = RandomCell(plan)
    fed = inputs(cell, way["steps"], way["batch"])
    options = {"lengths": way["lengths"], "reverse": way["reverse"]}
    expected = everything(by_hand, cell, fed, **options)
    found = everything(scan_by("interpret"), cell, fed, remat=way["remat"], **options)
    # Norms and quotients of nearly equal numbers lose a few digits.
    assert_same(found, expected, rtol=1e-7, atol=1e-9)


@given(plans(), ways())
@settings(max_examples=40, **SETTINGS)
def test_a_random_cell_equals_the_hand_written_loop(plan: Plan, way: dict[str, Any]) -> None:
    check(plan, way)


@pytest.mark.slow
@given(plans(most=20), ways())
@settings(max_examples=1500, **SETTINGS)
def test_many_larger_random_cells(plan: Plan, way: dict[str, Any]) -> None:
    check(plan, way)
