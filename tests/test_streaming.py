"""A stream says step by step what ``scan`` says at once: for every row of the contract table, in float64."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import elman
from contracts import ROWS, Row
from contracts.row import numbers
from elman import Stream
from elman.cells import ElmanCell, GRUCell, LSTMCell
from elman.cells.dense import DenseCell
from elman.combinators import Delay, Feedback, Noise, Stack
from elman.errors import CellError, InputError, OptionError, StateError, UnfoldWarning, UnsupportedError

STEPS, BATCH = 7, 3


def at(xs: Any, t: int) -> Any:
    """x(t), (B, …) leaves."""
    return pytree.tree_map_only(Tensor, lambda leaf: leaf[t].expand(BATCH, *leaf.shape[2:]), xs)


def same(found: Any, expected: Any) -> None:
    pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


LOOK_UP = ("Jordan, embedding the symbol given", "feedback without readout, without x")
"""Rows of the table whose step looks up symbols that come from outside: there is no kernel for that."""


@pytest.mark.parametrize(("name", "row"), [pytest.param(name, row, id=name) for name, row in ROWS.items()])
def test_a_stream_is_a_scan(name: str, row: Row) -> None:
    torch.manual_seed(11)
    cell = row.make().double().eval()
    xs, constants = row.example(STEPS, BATCH)
    with torch.no_grad():
        ys, state = elman.scan(cell, xs, constants=constants, backend="reference")
    stream = Stream(cell, constants=constants)
    with pytest.warns(UnfoldWarning, match="as it is written") if name in LOOK_UP else nullcontext():
        answers = [stream(at(xs, t)) for t in range(STEPS)]
    assert stream.backend == ("reference" if name in LOOK_UP else "llvm")
    same(answers, [pytree.tree_map(lambda leaf, t=t: leaf[t], ys) for t in range(STEPS)])
    same(stream.state, state)


@pytest.mark.parametrize("backend", ["llvm", "reference"])
def test_it_goes_on_from_a_state_and_starts_again(backend: str) -> None:
    cell = Stack([Delay(GRUCell(3, 5), 3), LSTMCell(5, 4)]).double()
    xs = numbers(9, 2, 3)
    with torch.no_grad():
        ys, _ = elman.scan(cell, xs, backend="reference")
        _, middle = elman.scan(cell, xs[:4], backend="reference")
    stream = Stream(cell, middle, backend=backend)
    same([stream(x) for x in xs[4:]], list(ys[4:]))
    stream.reset()
    same([stream(x) for x in xs], list(ys))
    stream.reset(middle)
    same(stream.state, middle)
    same([stream(x) for x in xs[4:]], list(ys[4:]))


def test_its_state_is_a_copy_and_so_is_y_unless_asked_otherwise() -> None:
    cell = ElmanCell(3, 4)
    xs = torch.randn(2, 1, 3)
    stream, bare = Stream(cell), Stream(cell, copy=False)
    first, state = stream(xs[0]), stream.state
    kept = first.clone(), pytree.tree_map_only(Tensor, Tensor.clone, state)
    here = bare(xs[0])
    assert bare(xs[1]) is here
    second = stream(xs[1])
    same(first, kept[0])
    same(state, kept[1])
    same(here, second)


def test_weights_are_read_at_reset() -> None:
    cell = ElmanCell(3, 4).double()
    x = numbers(2, 3)
    stream = Stream(cell)
    before = stream(x)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.mul_(2)
    stream.reset()
    after = stream(x)
    assert not torch.equal(before, after)
    same(after, elman.scan(cell, x[None], backend="reference")[0][0].detach())


def test_nothing_wants_a_gradient() -> None:
    y = Stream(LSTMCell(3, 4))(torch.randn(2, 3, requires_grad=True))
    assert not y.requires_grad


def test_nothing_is_traced_and_no_tensor_made_from_the_second_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(LSTMCell(3, 4), copy=False)
    x = torch.randn(2, 3)
    stream(x)
    monkeypatch.setattr("elman.compiler.cache.program_of", None)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for _ in range(5):
            stream(x)
    names = {event.key for event in profile.key_averages()}
    assert "aten::copy_" in names  # x
    assert not {name for name in names if "empty" in name or "clone" in name}


class Gathers(nn.Module):
    """A step that has no kernel."""

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.zeros(batch, 4, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = state.sort(1)[0] * 0.1 + x
        return state, state


def test_what_has_no_kernel_runs_as_it_is_written() -> None:
    cell, xs = Gathers(), torch.randn(5, 2, 4)
    stream = Stream(cell)
    with pytest.warns(UnfoldWarning, match="Gathers runs it as it is written.*sort"):
        found = torch.stack([stream(x) for x in xs])
    same(found, elman.scan(cell, xs, backend="reference")[0])
    assert stream.backend == "reference"
    with pytest.raises(UnsupportedError, match="sort"):
        Stream(cell, backend="llvm")(xs[0])


def test_dropout_of_a_cell_in_training_is_drawn_at_every_step() -> None:
    cell = Stack([DenseCell(3, 64), DenseCell(64, 5)], dropout=0.5)  # without memory: alike steps give alike y
    x = torch.randn(1, 3)
    for training in (True, False):
        stream = Stream(cell.train(training), backend="llvm")
        first, second, third = (stream(x) for _ in range(3))
        assert torch.equal(first, second) is not training
        assert torch.equal(second, third) is not training


@pytest.mark.parametrize("batch", [1, 4])
def test_what_a_step_draws_depends_on_the_seed_alone(batch: int) -> None:
    """Symbols drawn and fed back, and noise: the same from torch's generator, whatever runs the steps."""
    cell = Noise(Feedback(LSTMCell(2 + 9, 16), nn.Linear(16, 9), feed="sample"), 0.1).double().train()
    xs = numbers(20, batch, 2)
    found = []
    for backend in ("llvm", "reference"):
        torch.manual_seed(3)
        stream = Stream(cell, backend=backend)
        found.append(([stream(x) for x in xs], stream.state))
        after = torch.rand(1)
        found[-1][0].append(after)
    same(*found)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_another_shape_or_type_later_is_refused(backend: str) -> None:
    stream = Stream(ElmanCell(3, 4), backend=backend)
    stream(torch.randn(2, 3))
    for wrong in (torch.randn(1, 3), torch.randn(2, 3).double(), torch.randn(2, 3, 1), "x", (torch.randn(2, 3),) * 2):
        with pytest.raises(InputError, match=r"began with x of \(2, 3\) float32"):
            stream(wrong)
    assert stream(torch.randn(2, 3)).shape == (2, 4)


def test_mistakes() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(OptionError, match="interpret"):
        Stream(ElmanCell(3, 4), backend="interpret")
    with pytest.raises(InputError, match=r"\(B, …\)"):
        Stream(ElmanCell(3, 4))("text")
    with pytest.raises(InputError, match=r"\(B, …\)"):
        Stream(ElmanCell(3, 4))(torch.tensor(1.0))
    with pytest.raises(InputError, match="batch"):
        Stream(ElmanCell(3, 4))(torch.randn(3))
    with pytest.raises(CellError):
        Stream(nn.LSTM(3, 4))(x)
    with pytest.raises(StateError, match=r"B = 2"):
        Stream(ElmanCell(3, 4), torch.zeros(1, 4))(x)
    with pytest.raises(InputError, match=r"\(2, 4\)"):
        Stream(ElmanCell(3, 4))(torch.randn(2, 4))


class Plain(nn.Module):
    """A step with a product, and weights that are no part of one; the output is the state itself."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.mix = nn.Linear(3 + 4, 4, dtype=dtype)
        self.gain = nn.Parameter(torch.ones(4, dtype=dtype))

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.zeros(batch, 4, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.tanh(self.mix(torch.cat([x, state], -1))) * self.gain
        return state, state


@pytest.mark.parametrize("make", [LSTMCell, lambda i, h: Delay(GRUCell(i, h), 3)])
def test_the_state_of_bfloat16_is_the_one_after_the_last_step(make: Any) -> None:
    cell, xs = make(4, 8).bfloat16(), torch.randn(5, 2, 4).bfloat16()
    stream = Stream(cell, backend="llvm")
    for x in xs:
        stream(x)
    with torch.no_grad():
        _, state = elman.scan(cell, xs, backend="llvm")
    for one, other in zip(pytree.tree_leaves(stream.state), pytree.tree_leaves(state), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-2)  # a scan rounds what x becomes, before its loop


def test_what_becomes_of_weights_after_the_first_step_does_not_matter() -> None:
    """All of them are read then; neither is their memory needed later."""
    cell, x = Plain(), numbers(2, 3)
    stream, other = Stream(cell), Stream(copy.deepcopy(cell))
    same(stream(x), other(x))
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.mul_(2)
    same(stream(x), other(x))
    cell.float()
    same(stream(x), other(x))


@pytest.mark.parametrize("first", [True, False])
def test_inference_mode_may_begin_or_end(first: bool) -> None:
    cell, xs = Delay(Plain(), 2), numbers(4, 2, 3)
    stream = Stream(cell)
    answers = []
    for t, x in enumerate(xs):
        with torch.inference_mode((t < 2) == first):
            answers.append(stream(x))
            assert stream.state is not None
    with torch.no_grad():
        same(answers, list(elman.scan(cell, xs, backend="reference")[0]))


@pytest.mark.parametrize("backend", ["llvm", "reference"])
def test_what_is_given_and_handed_out_may_be_overwritten(backend: str) -> None:
    class Last(Plain):
        """Also keeps x as it is."""

        def initial_state(self, batch: int, **options: Any) -> Any:
            return super().initial_state(batch, **options), torch.zeros(batch, 3, **options)

        def forward(self, x: Tensor, state: Any) -> Any:
            y, h = super().forward(x + state[1], state[0])
            return (y, x), (h, x)

    cell, xs = Last(), numbers(4, 2, 3)
    with torch.no_grad():
        (expected, _), _ = elman.scan(cell, xs, backend="reference")
    stream, x = Stream(cell, backend=backend), torch.empty(2, 3, dtype=torch.float64)
    for t in range(4):
        y = stream(x.copy_(xs[t]))
        same(y[0], expected[t])
        for leaf in [*y, *stream.state]:
            leaf.fill_(100)


@pytest.mark.parametrize("backend", ["llvm", "reference"])
def test_parts_of_x_are_told_apart(backend: str) -> None:
    class Parts(nn.Module):
        def forward(self, x: Any, state: Tensor) -> tuple[Tensor, Tensor]:
            state = state + x["a"] - x["b"]
            return state, state

    a, b = torch.ones(2, 3), torch.zeros(2, 3)
    stream = Stream(Parts(), torch.zeros(2, 3), backend=backend)
    stream({"a": a, "b": b})
    for wrong in ({"b": b, "a": a}, (a, b), [a, b]):
        with pytest.raises(InputError, match=r"began with x of \{'a': \(2, 3\) float32"):
            stream(wrong)
    with pytest.raises(InputError, match="one B"):
        Stream(Parts(), torch.zeros(2, 3), backend=backend)({"a": a, "b": b[:1]})


@pytest.mark.parametrize("backend", ["llvm", "reference"])
@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda stream: pickle.loads(pickle.dumps(stream))])
def test_a_copy_goes_on_in_memory_of_its_own(again: Any, backend: str) -> None:
    xs = numbers(6, 2, 3)
    stream = Stream(Delay(LSTMCell(3, 4), 2).double(), backend=backend)
    for x in xs[:3]:
        stream(x)
    other = again(stream)
    answers = [stream(x) for x in xs[3:]]
    same([other(x) for x in xs[3:]], answers)
    same(other.state, stream.state)
