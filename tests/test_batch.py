"""Streams: every token predicted once, states carried, positions resumed exactly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elman.batch import Streams, Window, evaluation_windows
from elman.errors import DataError, OptionError, RunError


def ids_of(count: int, dtype: type = np.int64) -> np.ndarray:
    """Ids that are their own places."""
    return np.arange(count, dtype=dtype)


@st.composite
def shapes(draw):
    batch, window = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    return draw(st.integers(batch * window + 1, batch * window + 150)), batch, window


def epoch(streams: Streams) -> list[Window]:
    return [streams.next() for _ in range(streams.windows_per_epoch)]


@given(shape=shapes())
def test_an_epoch_predicts_every_token_once(shape):
    count, batch, window = shape
    streams = Streams(ids_of(count), batch, window)
    for number in range(2):
        assert (streams.epoch, streams.position) == (number, 0)
        windows = epoch(streams)
        targets = torch.cat([w.targets.T.reshape(-1) for w in windows]).sort().values
        kept = (count - 1) // batch * batch
        assert targets.tolist() == list(range(1, kept + 1))
        assert count - 1 - kept < batch
    assert all(torch.equal(w.inputs + 1, w.targets) for w in windows)


@given(shape=shapes())
def test_windows_continue_one_another(shape):
    count, batch, window = shape
    windows = epoch(Streams(ids_of(count), batch, window))
    assert [w.fresh for w in windows] == [True] + [False] * (len(windows) - 1)
    for before, after in itertools.pairwise(windows):
        assert torch.equal(before.targets[-1], after.inputs[0])
        assert before.inputs.shape == (window, batch)
    assert 1 <= len(windows[-1].inputs) <= window
    assert (windows[0].inputs[0] == torch.arange(batch) * ((count - 1) // batch)).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int64])
def test_windows_are_int64_of_any_integer_type(dtype):
    window = Streams(ids_of(100, dtype), 3, 7, device="cpu").next()
    for tensor in (window.inputs, window.targets):
        assert tensor.dtype == torch.int64
        assert tensor.shape == (7, 3)
        assert tensor.is_contiguous()


def test_a_window_is_all_that_is_read():
    class Counted(np.ndarray):
        read = 0

        def __getitem__(self, key):
            assert isinstance(key, slice)
            Counted.read += len(range(*key.indices(len(self))))
            return np.asarray(self)[key]

    streams = Streams(ids_of(10_000).view(Counted), 4, 5)
    streams.next()
    assert Counted.read == 4 * 6


def test_a_mapped_file_is_not_changed_by_what_is_done_to_a_window(tmp_path):
    path = tmp_path / "ids"
    path.write_bytes(bytes(range(200)))
    ids = np.memmap(path, np.uint8, mode="r")
    streams = Streams(ids, 2, 10)
    streams.next().inputs.zero_()
    assert path.read_bytes() == bytes(range(200))


@given(shape=shapes(), drawn=st.integers(0, 60))
def test_resume_is_exact(shape, drawn):
    count, batch, window = shape
    streams, again = (Streams(ids_of(count), batch, window) for _ in range(2))
    for _ in range(drawn):
        streams.next()
    state = streams.state_dict()
    assert all(type(value) is int for value in state.values())
    again.load_state_dict(state)
    for _ in range(5):
        expected, given = streams.next(), again.next()
        assert torch.equal(expected.inputs, given.inputs)
        assert torch.equal(expected.targets, given.targets)
        assert expected.fresh == given.fresh
    assert again.state_dict() == streams.state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 101}, r"over 101 tokens.*over 100 tokens.*began with"),
        ({"batch": 3}, "3 streams"),
        ({"window": 3}, "windows of 3"),
        ({"position": 99}, "damaged"),
        ({"position": -1}, "damaged"),
        ({"epoch": -1}, "damaged"),
        ({"epoch": None}, "damaged"),
        ({"epoch": "one"}, "damaged"),
    ],
)
def test_a_position_that_does_not_fit_is_refused(change, message):
    streams = Streams(ids_of(100), 2, 10)
    streams.next()
    before = streams.state_dict()
    with pytest.raises(RunError, match=message):
        streams.load_state_dict(before | change)
    assert streams.state_dict() == before


def test_a_position_without_its_entries_is_refused():
    with pytest.raises(RunError, match="damaged"):
        Streams(ids_of(100), 2, 10).load_state_dict({})


@pytest.mark.parametrize(
    ("count", "batch", "window", "message"),
    [
        (
            40,
            4,
            10,
            "40 tokens, and 4 streams.*4 × 10 \\+ 1 = 41.*--batch 3 or less, --window 9 or less, or a longer",
        ),
        (8, 4, 10, "give --window 1 or less, or a longer text"),
        (15, 20, 10, "give --batch 1 or less, or a longer text"),
        (3, 4, 10, "= 41: give a longer text"),
        (0, 1, 1, "0 tokens"),
    ],
)
def test_too_short_a_text_says_what_would_do(count, batch, window, message):
    with pytest.raises(DataError, match=message):
        Streams(ids_of(count), batch, window)


def test_the_advice_for_a_short_text_works():
    for batch, window in [(3, 10), (4, 9)]:
        Streams(ids_of(40), batch, window)
    Streams(ids_of(41), 4, 10)


@pytest.mark.parametrize(
    ("batch", "window", "name"), [(0, 1, "batch"), (1, 0, "window"), (True, 1, "batch"), (2.0, 1, "batch")]
)
@pytest.mark.parametrize("make", [Streams, evaluation_windows])
def test_impossible_options(make, batch, window, name):
    with pytest.raises(OptionError, match=f"{name} must be a whole number"):
        make(ids_of(100), batch, window)


@given(count=st.integers(2, 200), batch=st.integers(1, 40), window=st.integers(1, 50))
def test_evaluation_predicts_every_token_but_the_first_once(count, batch, window):
    windows = list(evaluation_windows(ids_of(count), batch, window))
    targets = torch.cat([w.targets.reshape(-1) for w in windows]).sort().values
    assert targets.tolist() == list(range(1, count))
    assert all(torch.equal(w.inputs + 1, w.targets) for w in windows)
    assert all(1 <= len(w.inputs) <= window and w.inputs.shape[1] <= batch for w in windows)
    assert windows[0].fresh
    for before, after in itertools.pairwise(windows):
        assert after.fresh or torch.equal(before.targets[-1], after.inputs[0])
    assert sum(w.fresh for w in windows) <= 2


def test_evaluation_scheme_streams_then_remainder():
    windows = list(evaluation_windows(ids_of(12), 3, 2))
    assert [w.inputs.T.tolist() for w in windows] == [[[0, 1], [3, 4], [6, 7]], [[2], [5], [8]], [[9, 10]]]
    assert [w.fresh for w in windows] == [True, False, True]


def test_evaluation_in_one_stream_loses_no_context():
    windows = list(evaluation_windows(ids_of(50), 1, 8))
    assert [w.fresh for w in windows] == [True] + [False] * 6


def test_a_short_text_is_evaluated_in_fewer_streams():
    windows = list(evaluation_windows(ids_of(30), 32, 10))
    assert windows[0].inputs.shape == (10, 2)


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_to_evaluate(count):
    with pytest.raises(DataError, match=f"{count} tokens?,"):
        evaluation_windows(ids_of(count), 1, 1)
