"""What numbers machine code gives: the same ones every time, NaN and infinity where PyTorch has them, no denormals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from llvmcells import KINDS, given, made
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import elman
from cellzoo import zoo
from comparing import assert_same, everything, inputs, scan_by
from elman.errors import InputError


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", [(12, 33, 5, 100), (3, 2, 7, 500)], ids=["rows are shared", "units are shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_bit_identical_from_run_to_run(
    kind: str, dtype: torch.dtype, size: tuple[int, int, int, int], threads: Any
) -> None:
    steps, batch, d, h = size
    cell = made(kind, d, h, dtype)
    sources = given(cell, steps, batch, d, dtype)
    by_count = []
    for count in (1, 2):
        threads(count)
        first = everything(scan_by("llvm"), cell, sources)
        for _ in range(3):
            assert_same(everything(scan_by("llvm"), cell, sources), first, rtol=0, atol=0)
        by_count.append(first)
    if dtype == torch.float64:
        assert_same(*by_count)


@pytest.mark.parametrize("kind", KINDS)
def test_more_threads_than_processors(kind: str, threads: Any) -> None:
    cell = made(kind, 5, 100, torch.float64)
    sources = given(cell, 9, 17, 5, torch.float64)
    expected = everything(scan_by("reference"), cell, sources)
    threads(8)
    assert_same(everything(scan_by("llvm"), cell, sources), expected)


def assert_same_masks(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        if value.is_floating_point():
            for mask in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(mask(found[name]), mask(value)), (name, mask.__name__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_goes_where_pytorch_has_it(kind: str, value: float, dtype: torch.dtype) -> None:
    cell = made(kind, 5, 19, dtype)
    sources = given(cell, 4, 3, 5, dtype)
    with torch.no_grad():
        sources["xs"][1, 0, 2] = value
        for leaf in pytree.tree_leaves(sources["state"]):
            leaf[2, 7] = value
    assert_same_masks(everything(scan_by("llvm"), cell, sources), everything(scan_by("reference"), cell, sources))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["Pointwise", "SoftmaxGate", "Leaky", "Clockwork", "Attends"])
def test_what_is_not_finite_in_a_cell_of_the_zoo(name: str, value: float) -> None:
    cell = zoo(name)
    sources = inputs(cell, 4, 3)
    with torch.no_grad():
        pytree.tree_leaves(sources["xs"])[0][1, 0, 0] = value
    with torch.no_grad():
        expected, found = (everything(scan_by(backend), cell, sources) for backend in ("reference", "llvm"))
    assert_same_masks(found, expected)


class Fading(nn.Module):
    """A state that halves at every step."""

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.full((batch, 5), 4 * torch.finfo(dtype).tiny, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = state * 0.5 + x * state.tanh()
        return state, state


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_denormal_numbers_are_zero_inside_and_stay_outside(dtype: torch.dtype, count: int, threads: Any) -> None:
    threads(count)
    tiny = torch.full((20_000,), torch.finfo(dtype).tiny, dtype=dtype)
    assert (tiny * 0.5).all(), "this test needs denormals outside"
    xs = torch.zeros(6, 3, 5, dtype=dtype)
    slow, _ = elman.scan(Fading(), xs, backend="reference")
    fast, _ = elman.scan(Fading(), xs, backend="llvm")
    assert slow[-1].all()
    torch.testing.assert_close(fast[:2], slow[:2], rtol=0, atol=0)
    assert not fast[3:].any()
    assert (tiny * 0.5).all()
    with pytest.raises(InputError):
        elman.scan(Fading(), xs[:0], backend="llvm")
    assert (tiny * 0.5).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_none(kind: str) -> None:
    cell = made(kind, 5, 7, torch.float64)
    sources = given(cell, 4, 0, 5, torch.float64)
    assert_same(everything(scan_by("llvm"), cell, sources), everything(scan_by("reference"), cell, sources))


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_of_none(kind: str) -> None:
    cell = made(kind, 5, 7, torch.float64)
    sources = given(cell, 4, 3, 5, torch.float64)
    expected = everything(scan_by("reference"), cell, sources, lengths=[0, 0, 0])
    assert_same(everything(scan_by("llvm"), cell, sources, lengths=[0, 0, 0]), expected)
