"""Rows: sequences of unequal lengths in one tensor, the layout of PackedSequence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence

from elman.errors import InputError
from elman.packing import rows_of


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, list[int]]:
    steps = draw(st.integers(1, 6))
    return steps, draw(st.lists(st.integers(0, steps), min_size=1, max_size=5))


def test_the_example_of_the_docstring() -> None:
    rows = rows_of(3, 3, [3, 2, 1])
    assert rows.batch_sizes == (3, 2, 1)
    assert rows.offsets == (0, 3, 5, 6)
    assert rows.total == 6
    assert not rows.uniform


@given(batches())
def test_pack_is_that_of_packed_sequence(case: tuple[int, list[int]]) -> None:
    steps, lengths = case
    padded = torch.randn(steps, len(lengths), 2)
    rows = rows_of(steps, len(lengths), lengths)
    assert rows.total == sum(lengths)
    if min(lengths) > 0:
        theirs = pack_padded_sequence(padded, torch.tensor(lengths), enforce_sorted=False)
        sizes = [n for n in rows.batch_sizes if n]
        assert sizes == theirs.batch_sizes.tolist()
        if len(set(lengths)) == len(lengths):  # the order of equal lengths is free
            assert torch.equal(rows.pack(padded), theirs.data)


@given(batches())
def test_unpack_undoes_pack_and_fills_with_zeros(case: tuple[int, list[int]]) -> None:
    steps, lengths = case
    padded = torch.randn(steps, len(lengths), 2)
    rows = rows_of(steps, len(lengths), lengths)
    inside = torch.arange(steps)[:, None] < torch.tensor(lengths)
    assert torch.equal(rows.unpack(rows.pack(padded)), torch.where(inside[..., None], padded, 0.0))


@given(batches())
def test_unsort_undoes_sort(case: tuple[int, list[int]]) -> None:
    steps, lengths = case
    rows = rows_of(steps, len(lengths), lengths)
    leaf = torch.arange(len(lengths))
    assert torch.equal(rows.unsort(rows.sort(leaf)), leaf)
    assert [lengths[i] for i in rows.sort(leaf)] == sorted(lengths, reverse=True)


@given(batches(), st.booleans())
def test_previous_and_final_follow_every_sequence(case: tuple[int, list[int]], reverse: bool) -> None:
    """Walking back from ``final`` by ``previous`` visits a sequence's rows in order and ends at its first state."""
    steps, lengths = case
    rows = rows_of(steps, len(lengths), lengths)
    at = torch.stack([torch.arange(steps)[:, None].expand(steps, len(lengths)), rows_numbers(steps, len(lengths))], -1)
    packed = rows.pack(at)
    before, last = rows.previous(reverse), rows.final(reverse)
    order = list(range(len(lengths))) if rows.order is None else rows.order.tolist()
    for place, b in enumerate(order):
        row, times = int(last[place]), []
        while row < rows.total:
            assert int(packed[row, 1]) == b
            times.append(int(packed[row, 0]))
            row = int(before[row])
        assert row == rows.total + place
        forwards = list(range(lengths[b]))
        assert times == (forwards if reverse else forwards[::-1])


def rows_numbers(steps: int, batch: int) -> torch.Tensor:
    return torch.arange(batch).expand(steps, batch)


@given(batches(), st.integers(0, 5), st.integers(0, 6))
def test_chunk_is_a_layout_of_its_own(case: tuple[int, list[int]], first: int, last: int) -> None:
    steps, lengths = case
    rows = rows_of(steps, len(lengths), lengths)
    piece = rows.chunk(first, last)
    assert piece.batch_sizes == rows.batch_sizes[first:last]
    assert piece.batch == rows.batch
    whole = rows.sequence
    if first < last <= steps:
        assert torch.equal(piece.sequence, whole[rows.offsets[first] : rows.offsets[last]])


def test_without_lengths_nothing_moves() -> None:
    padded = torch.randn(3, 2, 4)
    rows = rows_of(3, 2)
    assert rows.uniform
    assert rows.pack(padded).data_ptr() == padded.data_ptr()
    assert torch.equal(rows.unpack(rows.pack(padded)), padded)
    assert rows.sort(padded) is padded


@pytest.mark.parametrize("lengths", [[3, 3], torch.tensor([3, 3])])
def test_full_lengths_are_uniform(lengths: list[int] | torch.Tensor) -> None:
    assert rows_of(3, 2, lengths).uniform


@pytest.mark.parametrize(
    ("lengths", "pattern"),
    [
        ([1], "2 integers"),
        ([1, 4], "T = 3"),
        ([-1, 2], "0"),
        ([1.0, 2.0], "float"),
        ([[1], [2]], "shape"),
        ([True, False], "bool"),
    ],
)
def test_lengths_that_do_not_fit(lengths: list[int], pattern: str) -> None:
    with pytest.raises(InputError, match=pattern):
        rows_of(3, 2, lengths)
