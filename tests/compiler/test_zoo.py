"""Every cell of the zoo, in every way a scan can run: equal to a loop written by hand, in float64."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from llvmcells import PARTLY, WITHOUT_LOOPS

from cellzoo import ZOO, zoo
from comparing import assert_same, by_hand, differentiated, everything, inputs, scan_by
from elman.compiler import cache
from elman.errors import UnfoldWarning

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reverse": {"reverse": True},
    "lengths": {"lengths": [2, 5, 0]},
    "reverse with lengths": {"lengths": [5, 1, 3], "reverse": True},
}


def on_machine_code(name: str) -> Any:
    """That a loop runs through PyTorch's operations is an error, but where it is known."""
    known = "ignore:the loop over .* has no place in a compiled loop:elman.errors.UnfoldWarning"
    return pytest.param(name, "llvm", marks=[pytest.mark.filterwarnings(known)] if name in PARTLY else [])


fast = pytest.mark.parametrize(
    ("name", "backend"),
    [case for name in ZOO for case in (pytest.param(name, "interpret"), on_machine_code(name))],
)


@pytest.mark.parametrize("way", WAYS)
@fast
def test_equals_the_hand_written_loop(name: str, backend: str, way: str) -> None:
    cell = zoo(name)
    given = inputs(cell, 5, 3)
    expected = everything(by_hand, cell, given, **WAYS[way])
    assert_same(everything(scan_by(backend), cell, given, **WAYS[way]), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ZOO)
def test_reference_equals_the_hand_written_loop(name: str, way: str) -> None:
    cell = zoo(name)
    given = inputs(cell, 5, 3)
    expected = everything(by_hand, cell, given, **WAYS[way])
    assert_same(everything(scan_by("reference"), cell, given, **WAYS[way]), expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("remat", [1, "auto"])
@fast
def test_recomputation_changes_nothing(name: str, backend: str, remat: int | str, reverse: bool) -> None:
    cell = zoo(name)
    given = inputs(cell, 5, 3)
    options = {"reverse": reverse, "lengths": [2, 5, 3] if remat == 2 else None}
    expected = everything(scan_by("reference"), cell, given, **options)
    assert_same(everything(scan_by(backend), cell, given, remat=remat, **options), expected)


@pytest.mark.parametrize("name", WITHOUT_LOOPS)
def test_which_cells_have_no_loop(name: str) -> None:
    rule = differentiated(zoo(name), inputs(zoo(name), 5, 3))
    assert not rule.forward.loops
    assert not rule.adjoint.loops


@fast
def test_without_gradients(name: str, backend: str) -> None:
    cell = zoo(name)
    given = inputs(cell, 4, 2)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            expected = everything(by_hand, cell, given)
            assert_same(everything(scan_by(backend), cell, given), expected)


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
@fast
def test_poisoned_buffers(name: str, backend: str, options: dict[str, Any]) -> None:
    cell = zoo(name)
    given = inputs(cell, 5, 3)
    found = everything(scan_by(backend), cell, given, **options)
    assert not any(value.isnan().any() for value in found.values() if value.is_floating_point())


@pytest.mark.parametrize("name", ZOO)
def test_which_loops_have_no_machine_code(name: str) -> None:
    """Those that are known to have none, and nothing else; what is missing is said by its name."""
    cell = zoo(name)
    cache.forget()  # what has been compiled has been said: this comes last, for others to share what they traced
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UnfoldWarning)
        everything(scan_by("llvm"), cell, inputs(cell, 5, 3))
        everything(scan_by("llvm"), cell, inputs(cell, 5, 3), remat=2)
    reasons = [str(warning.message) for warning in said]
    if name in PARTLY:
        assert any(f": {PARTLY[name]} has no place" in reason for reason in reasons)
    else:
        assert not reasons
