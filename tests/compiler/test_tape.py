"""Runs on tensors without data: what a tape notes of them, and graphs that say the same as ``make_fx``."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import elman
from elman.compiler import trace
from elman.compiler.cache import forget
from elman.compiler.lock import tracing
from elman.compiler.tape import Recorder, Tape, Unrecorded
from elman.compiler.trace import decompositions, functional, recorded
from elman.errors import MixedRowsError

SIZE = (5, 4)


def fakes(*sizes: tuple[int, ...]) -> list[Tensor]:
    with FakeTensorMode():
        return [torch.empty(size) for size in sizes]


def normed(x: Tensor, w: Tensor) -> list[Tensor]:
    return [torch.nn.functional.layer_norm(x @ w.t(), (w.shape[0],)), x.split(2, 1)[1]]


def gradients(x: Tensor, w: Tensor) -> list[Any]:
    """With an operation that changes in place what autograd has made: that of maximum."""
    x, w = (leaf.detach().requires_grad_() for leaf in (x, w))
    with torch.enable_grad():
        y = torch.maximum(torch.softmax(x @ w.t(), -1), x.roll(1, 1)).amax(-1)
        return [y.detach(), *torch.autograd.grad(y.sum(), (x, w))]


def constant(x: Tensor, w: Tensor) -> list[Tensor]:
    return [x * torch.tensor(0.5), w + 1]


@pytest.mark.parametrize("function", [normed, gradients, constant])
def test_a_recorded_graph_computes_what_a_traced_one_does(function: Callable[..., list[Tensor]]) -> None:
    inputs = fakes(SIZE, (4, 4))
    mode = inputs[0].fake_mode  # type: ignore[attr-defined]
    with mode, torch.no_grad():
        graph, root = recorded(function, inputs)
        traced = functional(function, inputs)
    graph.lint()
    torch.manual_seed(0)
    given = [torch.randn(SIZE), torch.randn(4, 4)]
    for found, expected in zip(fx.GraphModule(root, graph)(*given), traced(*given), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_graph_has_the_values_that_it_says() -> None:
    inputs = fakes(SIZE, (4, 4))
    with inputs[0].fake_mode, torch.no_grad():  # type: ignore[attr-defined]
        graph, _ = recorded(gradients, inputs)
    given = [torch.randn(SIZE), torch.randn(4, 4)]
    env: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            env[node] = given.pop(0)
        elif node.op == "call_function":
            args, kwargs = (fx.map_arg(part, env.__getitem__) for part in (node.args, node.kwargs))
            env[node] = node.target(*args, **kwargs)
            if isinstance(env[node], Tensor):
                said = node.meta["val"]
                assert (said.shape, said.dtype, said.requires_grad) == (env[node].shape, env[node].dtype, False)


def test_a_change_in_place_that_others_see_is_not_recorded() -> None:
    def changes(x: Tensor) -> list[Tensor]:
        y = x + 1
        first = y[0]
        y.copy_(x)
        return [first, y]

    def changes_its_input(x: Tensor) -> list[Tensor]:
        x.copy_(x + 1)
        return [x]

    for function in (changes, changes_its_input):
        inputs = fakes(SIZE)
        with inputs[0].fake_mode, torch.no_grad(), pytest.raises(Unrecorded):  # type: ignore[attr-defined]
            recorded(function, inputs)


def test_a_value_from_elsewhere_is_not_recorded() -> None:
    (x,) = fakes(SIZE)
    recorder = Recorder(decompositions(), fx.Graph(), nn.Module())
    with x.fake_mode, recorder, pytest.raises(Unrecorded):  # type: ignore[attr-defined]
        x + 1


def tape_of(function: Callable[..., Any], unit: int) -> Tape:
    inputs = fakes((unit, 4))
    tape = Tape(decompositions(), unit)
    with inputs[0].fake_mode:  # type: ignore[attr-defined]
        tape.run(lambda xs: ([function(*xs)], []), [inputs])
    return tape


@pytest.mark.parametrize(
    ("function", "same"),
    [
        (lambda x: torch.tanh(x.view(len(x), 2, 2)).sum(-1), True),
        (lambda x: x.new_zeros(len(x), 3), True),
        (lambda x: x * (1 / len(x)), False),
        (lambda x: x + x if len(x) > 1010 else x + 2 * x, False),
        (lambda x: (x + 1, x + 2)[len(x) > 1010], False),
        (lambda x: x.relu() if len(x) > 1010 else x.tanh(), False),
    ],
)
def test_two_tapes_are_the_same_where_the_batch_decides_nothing(function: Callable[..., Any], same: bool) -> None:
    assert trace._repeats(tape_of(function, 1009), tape_of(function, 1013)) is same


def test_a_tape_knows_the_lines_of_the_user() -> None:
    def one(x: Tensor) -> Tensor:
        if len(x) == 1:
            return x.exp()
        return x.tanh()

    assert trace._repeats(tape_of(one, 1009), tape_of(one, 2))
    assert not trace._repeats(tape_of(one, 1009), tape_of(one, 1))


class Base(nn.Module):
    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.zeros(batch, 4, device=device, dtype=dtype)


class Plain(Base):
    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return state, torch.tanh(state + x)


class ByBatch(Base):
    """A number that depends on the batch alone, in an operation and not in a shape."""

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return state, torch.tanh(state + x) * (len(x) % 7)


class ByConstant(Base):
    """The same, made a tensor."""

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return state, torch.tanh(state + x) * torch.tensor(float(len(x)))


class Constant(Base):
    """A tensor made in the step, of what depends on nothing."""

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return state, torch.tanh(state + x) * torch.tensor([0.5, float("nan"), 1.0, -1.0])


@pytest.mark.parametrize("kind", [Plain, Constant])
def test_a_step_is_traced_once_by_make_fx(kind: type[Base], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    made = trace.make_fx
    monkeypatch.setattr(trace, "make_fx", lambda *args, **kwargs: calls.append(1) or made(*args, **kwargs))
    forget()
    xs = torch.randn(3, 2, 4, requires_grad=True)
    elman.scan(kind(), xs, backend="interpret")[0].sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize(("kind", "line"), [(ByBatch, r"len\(x\) % 7"), (ByConstant, r"float\(len\(x\)\)")])
def test_what_depends_on_the_batch_is_refused_with_its_line(kind: type[Base], line: str) -> None:
    with pytest.raises(MixedRowsError, match=rf"test_tape\.py:\d+: .*{line}"):
        elman.scan(kind(), torch.randn(3, 2, 4), backend="interpret")


def test_garbage_is_left_alone_while_tracing_and_not_after() -> None:
    assert gc.isenabled()
    with tracing():
        assert not gc.isenabled()
        with tracing():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(KeyError), tracing():
        raise KeyError
    assert gc.isenabled()
    gc.disable()
    try:
        with tracing():
            pass
        assert not gc.isenabled()  # as the user has it
    finally:
        gc.enable()
