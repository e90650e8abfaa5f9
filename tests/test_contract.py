"""What every cell and combinator promises, checked for each row of the contract table, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import elman
from comparing import (
    assert_reloads,
    assert_same,
    by_hand,
    compiled,
    differentiable,
    everything,
    leaves,
    part,
    poisoned,
    scan_by,
)
from contracts import ROWS, Row
from elman.combinators import start, step

STEPS, BATCH = 6, 3
table = pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in ROWS.items()])
on_every_backend = pytest.mark.parametrize(
    ("row", "backend"),
    [pytest.param(row, backend, id=f"{name}-{backend}") for name, row in ROWS.items() for backend in row.backends],
)


def made(row: Row) -> nn.Module:
    torch.manual_seed(11)
    return row.make().double().eval()


def first_state(cell: nn.Module, batch: int, constants: Any) -> Any:
    return start(cell, batch, device=torch.device("cpu"), dtype=torch.float64, constants=constants)


def given(row: Row, cell: nn.Module, steps: int = STEPS, batch: int = BATCH) -> dict[str, Any]:
    """xs, constants and a first state, whose floating leaves want their gradients."""
    torch.manual_seed(12)
    xs, constants = row.example(steps, batch)
    state = first_state(cell, batch, constants)
    # Away from zero, where mistakes cannot hide; what counts steps or selects units must stay what it is.
    state = pytree.tree_map_only(Tensor, lambda s: s + 0.3 * torch.randn_like(s) if s.is_floating_point() else s, state)
    return {"xs": differentiable(xs), "state": differentiable(state), "constants": differentiable(constants)}


@on_every_backend
def test_equals_every_sequence_alone_by_hand(row: Row, backend: str) -> None:
    """Outputs, final states and every gradient: of a batch at once, and of each sequence alone, step by step."""
    cell = made(row)
    sources = given(row, cell)
    assert_same(everything(scan_by(backend), cell, sources), everything(by_hand, cell, sources))


@table
def test_the_plain_loop_is_the_definition(row: Row) -> None:
    cell = made(row)
    sources = given(row, cell)
    assert_same(everything(scan_by("reference"), cell, sources), everything(by_hand, cell, sources))


@on_every_backend
@pytest.mark.parametrize("reverse", [False, True])
def test_padding_changes_nothing(row: Row, backend: str, reverse: bool) -> None:
    cell = made(row)
    sources = given(row, cell)
    lengths = torch.tensor([STEPS, 1, STEPS - 2])
    expected = everything(by_hand, cell, sources, lengths=lengths, reverse=reverse)
    sources["xs"] = poisoned(sources["xs"], lengths)
    found = everything(scan_by(backend), cell, sources, lengths=lengths, reverse=reverse)
    assert_same(found, expected)


@on_every_backend
def test_chunked_equals_whole(row: Row, backend: str) -> None:
    """Values and every gradient, through the states that are handed on."""
    cell = made(row)
    sources = given(row, cell)

    def whole(cell: nn.Module, xs: Any, state: Any, *, constants: Any) -> tuple[Any, Any]:
        ys, state = elman.scan(cell, xs, state, constants=constants, backend=backend)
        return leaves(ys), state

    def chunked(cell: nn.Module, xs: Any, state: Any, *, constants: Any) -> tuple[Any, Any]:
        pieces = []
        for cut in (slice(0, 2), slice(2, 3), slice(3, STEPS)):
            ys, state = elman.scan(cell, part(xs, cut), state, constants=constants, backend=backend)
            pieces.append(leaves(ys))
        return [torch.cat(parts) for parts in zip(*pieces, strict=True)], state

    assert_same(everything(chunked, cell, sources), everything(whole, cell, sources))


@on_every_backend
def test_streamed_equals_whole(row: Row, backend: str) -> None:
    cell = made(row)
    sources = given(row, cell)
    whole, _ = elman.scan(cell, sources["xs"], sources["state"], constants=sources["constants"], backend=backend)
    state = sources["state"]
    for t in range(STEPS):
        y, state = step(cell, part(sources["xs"], t), state, sources["constants"])
        for found, expected in zip(leaves(y), leaves(whole), strict=True):
            torch.testing.assert_close(found, expected[t], rtol=1e-10, atol=1e-10)


@table
def test_begins_where_it_says(row: Row) -> None:
    cell = made(row)
    torch.manual_seed(12)
    xs, constants = row.example(STEPS, BATCH)
    expected = elman.scan(cell, xs, first_state(cell, BATCH, constants), constants=constants)
    for found, wanted in zip(leaves(elman.scan(cell, xs, constants=constants)), leaves(expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@table
def test_saved_equals_loaded(row: Row) -> None:
    cell = made(row)
    sources = given(row, cell)
    xs, state, constants = sources.values()
    assert_reloads(cell, row.make, lambda cell: elman.scan(cell, xs, state, constants=constants))


@pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in ROWS.items() if row.loops is not None])
def test_has_the_loops_it_promises(row: Row) -> None:
    cell = made(row)
    program = compiled(cell, given(row, cell)).program
    assert len(program.loops) == row.loops
