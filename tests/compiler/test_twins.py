"""Tracing runs on a twin of the cell: whatever the cell holds, and whatever other threads do with it meanwhile."""

from __future__ import annotations

import functools
import threading
import types
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import elman
from elman.compiler import cache
from elman.errors import MutationError, UnfoldWarning, UnsupportedError

ELSEWHERE: dict[str, Any] = {}


class Cell(nn.Module):
    """h ← tanh(U x + r(h)), where r is W unless ``setup`` has put another way to W on the module."""

    def __init__(self, setup: Callable[[Any], Any] = lambda cell: None) -> None:
        super().__init__()
        self.U, self.W = nn.Linear(3, 4), nn.Linear(4, 4)
        self.register_buffer("scale", torch.full((4,), 0.5))
        self.way: Any = None
        self.double()
        setup(self)

    def recur(self, h: Tensor) -> Tensor:
        return self.W(h)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        recurrent = self.recur(h) if self.way is None else self.way(h)
        h = torch.tanh(self.U(x) + recurrent * self.scale)
        return h, h


class WithSlots(Cell):
    __slots__ = ("__hidden", "unset")

    def __init__(self, setup: Callable[[Any], Any]) -> None:
        super().__init__(setup)
        self.__hidden = self.W

    def recur(self, h: Tensor) -> Tensor:
        return self.__hidden(h)


class Holder:
    """An object around a module."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, h: Tensor) -> Tensor:
        return self.inner(h)


class SlottedHolder:
    __slots__ = ("inner", "unset")

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, h: Tensor) -> Tensor:
        return self.inner(h)


def closure(cell: Cell) -> Callable[[Tensor], Tensor]:
    inner = cell.W

    def way(h: Tensor, times: int = 1) -> Tensor:
        return way(h, 0) if times else inner(h)  # a closure over itself, too

    return way


def wrapped_forward(cell: Cell) -> None:
    before = cell.forward
    cell.forward = lambda x, h: before(2 * x, h)


def proxy(cell: Cell) -> None:
    vars(cell)["way"] = weakref.proxy(cell.W)


def nested_parent(cell: Cell) -> None:
    cell.U.parent = [cell]
    cell.way = lambda h: cell.U.parent[0].W(h)


def scripted(cell: Cell) -> None:
    cell.W = torch.fx.symbolic_trace(cell.W)


WAYS: dict[str, Callable[[Cell], Any]] = {
    "the module": lambda cell: None,
    "another name": lambda cell: setattr(cell, "way", cell.W),
    "a method": lambda cell: setattr(cell, "way", cell.recur),
    "a method of a part": lambda cell: setattr(cell, "way", cell.W.forward),
    "a closure": lambda cell: setattr(cell, "way", closure(cell)),
    "a default argument": lambda cell: setattr(cell, "way", eval("lambda h, part=part: part(h)", {"part": cell.W})),
    "a partial": lambda cell: setattr(cell, "way", functools.partial(Cell.recur, cell)),
    "an object": lambda cell: setattr(cell, "way", Holder(cell.W)),
    "an object with slots": lambda cell: setattr(cell, "way", SlottedHolder(cell.W)),
    "a namespace": lambda cell: setattr(cell, "way", Holder(types.SimpleNamespace(f=cell.recur).f)),
    "a weak reference": lambda cell: setattr(cell, "way", functools.partial(lambda r, h: r()(h), weakref.ref(cell.W))),
    "a proxy": proxy,
    "a list": lambda cell: setattr(cell, "way", functools.partial(lambda parts, h: parts[1](h), [cell.U, cell.W])),
    "a deque": lambda cell: setattr(cell, "way", functools.partial(lambda parts, h: parts[0](h), deque([cell.W], 1))),
    "a key": lambda cell: setattr(cell, "way", functools.partial(lambda d, w, h: w(h) * d[w], {cell.W: 2.0}, cell.W)),
    "a set": lambda cell: setattr(cell, "way", functools.partial(lambda s, w, h: w(h) * (w in s), {cell.W}, cell.W)),
    "a list of parameters": lambda cell: setattr(
        cell, "way", functools.partial(lambda ps, h: torch.addmm(ps[1], h, ps[0].t()), [*cell.W.parameters()])
    ),
    "the parent": nested_parent,
    "a forward of its own": wrapped_forward,
    "a traced graph": scripted,
    "a parametrisation": lambda cell: parametrizations.weight_norm(cell.W),
    "a hook with the module": lambda cell: cell.U.register_forward_hook(lambda part, args, out: out + cell.W.bias),
    "tied parameters": lambda cell: setattr(cell.W, "bias", cell.U.bias),
    "one part twice": lambda cell: setattr(cell, "V", cell.W),
}


def feed() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)


@pytest.mark.parametrize("kind", [Cell, WithSlots])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_a_module_is_followed(way: str, kind: type[Cell]) -> None:
    cell = kind(WAYS[way])
    attributes = {part: dict(vars(part)) for part in cell.modules()}
    tensors = [*cell.parameters(), *cell.buffers()]
    xs, state = feed()
    results = [elman.scan(cell, xs, state, backend=backend) for backend in ("interpret", "reference")]
    torch.testing.assert_close(*results)
    learned = [*cell.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(ys.square().sum(), learned) for ys, _ in results))
    for part, before in attributes.items():
        assert vars(part).keys() == before.keys()
        assert all(value is before[name] for name, value in vars(part).items())
    assert all(a is b for a, b in zip(tensors, [*cell.parameters(), *cell.buffers()], strict=True))


class Finalised(Holder):
    """What must not be copied: a copy would close what it holds."""

    closed = 0

    def __del__(self) -> None:
        type(self).closed += 1


def by_a_global(cell: Cell) -> None:
    ELSEWHERE["part"] = cell.W
    cell.way = lambda h: ELSEWHERE["part"](h)


def by_a_value(cell: Cell) -> None:
    ELSEWHERE["part"] = cell.scale
    cell.way = lambda h: h * ELSEWHERE["part"][0].item()


UNFOLLOWED: dict[str, Callable[[Cell], Any]] = {
    "a bound method in C": lambda cell: setattr(cell, "way", cell.scale.mul),
    "an object with a finaliser": lambda cell: setattr(cell, "way", Finalised(cell.W)),
}


@pytest.mark.parametrize("way", UNFOLLOWED)
def test_a_way_that_cannot_be_followed_is_refused(way: str) -> None:
    cell = Cell(UNFOLLOWED[way])
    xs, state = feed()
    with pytest.raises(UnsupportedError, match=r"another way than through self.*test_twins.py:\d+"):
        elman.scan(cell, xs, state, backend="interpret")
    with pytest.warns(UnfoldWarning, match="another way than through self"):
        found = elman.scan(cell, xs, state)
    torch.testing.assert_close(found, elman.scan(cell, xs, state, backend="reference"))
    assert Finalised.closed == 0


@pytest.mark.parametrize("setup", [by_a_global, by_a_value])
def test_a_tensor_of_its_own_by_a_global_name_is_refused(setup: Callable[[Cell], None]) -> None:
    cell = Cell(setup)
    with pytest.raises(UnsupportedError, match="another way than through self"):
        elman.scan(cell, *feed(), backend="interpret")


def test_a_script_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        cell = Cell(lambda cell: setattr(cell, "W", torch.jit.script(cell.W)))
    with pytest.raises(UnsupportedError, match="Linear is a script"):
        elman.scan(cell, *feed(), backend="interpret")


# Steps that change their module


@dataclass
class Log:
    count: int = 0
    seen: list[int] = field(default_factory=list)


MUTATIONS: dict[str, Callable[[Any], Any]] = {
    "a number": lambda cell: setattr(cell, "count", cell.count + 1),
    "a list": lambda cell: cell.items.append(1),
    "a deque": lambda cell: cell.queue.append(1),
    "a set": lambda cell: cell.names.add(len(cell.names)),
    "a dict in a list": lambda cell: cell.tables[0].update(a=len(cell.items) + 1),
    "an object": lambda cell: setattr(cell.log, "count", cell.log.count + 1),
    "a list of an object": lambda cell: cell.log.seen.append(1),
    "a slot": lambda cell: setattr(cell, "slot", cell.slot + 1),
    "a part": lambda cell: setattr(cell.W, "count", 1),
    "a tensor more": lambda cell: setattr(cell, "last", cell.W.weight),
    "a buffer": lambda cell: setattr(cell, "scale", cell.scale + 1),
    "an attribute less": lambda cell: vars(cell).pop("count", None),
}


class Changes(Cell):
    __slots__ = ("slot",)

    def __init__(self, change: Callable[[Any], Any]) -> None:
        super().__init__()
        self.change, self.count, self.items, self.queue = change, 0, [], deque()
        self.names: set[int] = set()
        self.tables, self.log, self.slot = [{"a": 0}], Log(), 0

    def recur(self, h: Tensor) -> Tensor:
        self.change(self)
        return self.W(h)


@pytest.mark.parametrize("what", MUTATIONS)
def test_a_step_that_changes_its_module_is_refused_and_undone(what: str) -> None:
    cell = Changes(MUTATIONS[what])

    def described() -> Any:
        own = (cell.count, cell.items, [*cell.queue], cell.names, cell.tables, cell.log.count, cell.log.seen, cell.slot)
        return repr((own, sorted(vars(cell)), sorted(vars(cell.W)), id(cell.scale)))

    before = described()
    with pytest.raises(MutationError, match=r"changes Python state of its module \(|assigns its buffer 'scale'"):
        elman.scan(cell, *feed(), backend="interpret")
    assert described() == before


# Threads


def test_other_threads_use_the_cell_while_it_is_traced() -> None:
    """One thread stands still in the middle of tracing; others run the very same cell, and see nothing of it."""
    cache.forget()
    inside, go_on = threading.Event(), threading.Event()
    tracer: list[int] = []

    def way(h: Tensor) -> Tensor:
        if threading.get_ident() in tracer and not inside.is_set():
            inside.set()
            assert go_on.wait(60)
        return cell.W(h)

    cell = Cell(lambda cell: setattr(cell, "way", way))
    xs, state = feed()
    tensors = {name: id(t) for name, t in (*cell.named_parameters(), *cell.named_buffers())}
    expected = elman.scan(cell, xs, state, backend="reference")
    wanted = torch.autograd.grad(expected[0].sum(), [*cell.parameters()])
    found: dict[str, Any] = {}

    def trace() -> None:
        tracer.append(threading.get_ident())
        found["traced"] = elman.scan(cell, xs, state, backend="interpret")

    def eager() -> None:
        found["tensors"] = {name: id(t) for name, t in (*cell.named_parameters(), *cell.named_buffers())}
        found["hooks"] = [part._forward_pre_hooks for part in cell.modules() if part._forward_pre_hooks]
        ys, h = [], state
        for x in xs:
            y, h = cell(x, h)
            ys.append(y)
        found["eager"] = torch.stack(ys), h
        found["gradients"] = torch.autograd.grad(found["eager"][0].sum(), [*cell.parameters()])
        found["reference"] = elman.scan(cell, xs, state, backend="reference")
        found["one step"] = elman.scan(cell, xs[:1], state)

    def scans() -> None:
        found["scanned"] = elman.scan(cell, xs, state, backend="interpret")

    threads = [threading.Thread(target=target) for target in (trace, eager, scans)]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    threads[1].join(60)
    assert not threads[1].is_alive()  # it had not to wait for the tracing
    threads[2].start()
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert found.pop("tensors") == tensors == {n: id(t) for n, t in (*cell.named_parameters(), *cell.named_buffers())}
    assert found.pop("hooks") == []
    torch.testing.assert_close(found.pop("gradients"), wanted)
    torch.testing.assert_close(found.pop("one step")[0][0], expected[0][0])
    assert set(found) == {"traced", "eager", "reference", "scanned"}
    for result in found.values():
        torch.testing.assert_close(result, expected)


def test_what_another_thread_changes_meanwhile_is_followed() -> None:
    """The program that is kept belongs to what the module was like during the whole of its tracing."""
    cache.forget()
    first, second = threading.Event(), threading.Event()

    class Scaled(Cell):
        gain = 1.0

        def recur(self, h: Tensor) -> Tensor:
            if not first.is_set():  # as another thread would do it in the middle
                first.set()
                other = threading.Thread(target=lambda: setattr(cell, "gain", 3.0))
                other.start()
                other.join()
            if self.gain == 3.0:
                second.set()
            return self.W(h) * self.gain

    cell = Scaled()
    xs, state = feed()
    found = elman.scan(cell, xs, state, backend="interpret")
    assert second.is_set()
    torch.testing.assert_close(found, elman.scan(cell, xs, state, backend="reference"))
