"""Every cell of the zoo, in every way a scan can run: equal to a loop written by hand, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cellzoo import ZOO, zoo
from comparing import assert_same, by_hand, everything, inputs, scan_by

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reverse": {"reverse": True},
    "lengths": {"lengths": [2, 5, 0]},
    "reverse with lengths": {"lengths": [5, 1, 3], "reverse": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ZOO)
def test_interpret_equals_the_hand_written_loop(name: str, way: str) -> None:
    cell = zoo(name)
    given = inputs(cell, 5, 3)
    expected = everything(by_hand, cell, given, **WAYS[way])
    assert_same(everything(scan_by("interpret"), cell, given, **WAYS[way]), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ZOO)
def test_reference_equals_the_hand_written_loop(name: str, way: str) -> None:
    cell = zoo(name)
    given = inputs(cell, 5, 3)
    expected = everything(by_hand, cell, given, **WAYS[way])
    assert_same(everything(scan_by("reference"), cell, given, **WAYS[way]), expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("remat", [1, 2, "auto"])
@pytest.mark.parametrize("name", ZOO)
def test_recomputation_changes_nothing(name: str, remat: int | str, reverse: bool) -> None:
    cell = zoo(name)
    given = inputs(cell, 5, 3)
    options = {"reverse": reverse, "lengths": [2, 5, 3] if remat == 2 else None}
    expected = everything(scan_by("reference"), cell, given, **options)
    assert_same(everything(scan_by("interpret"), cell, given, remat=remat, **options), expected)


@pytest.mark.parametrize("name", ZOO)
def test_without_gradients(name: str) -> None:
    cell = zoo(name)
    given = inputs(cell, 4, 2)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            expected = everything(by_hand, cell, given)
            assert_same(everything(scan_by("interpret"), cell, given), expected)


@pytest.fixture
def _poison() -> Iterator[None]:
    """torch.empty gives NaN, so that whatever is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_poison")
@pytest.mark.parametrize("options", [{}, {"lengths": [2, 5, 0], "reverse": True, "remat": 2}], ids=["whole", "ragged"])
@pytest.mark.parametrize("name", ZOO)
def test_poisoned_buffers(name: str, options: dict[str, Any]) -> None:
    cell = zoo(name)
    given = inputs(cell, 5, 3)
    found = everything(scan_by("interpret"), cell, given, **options)
    assert not any(value.isnan().any() for value in found.values() if value.is_floating_point())
