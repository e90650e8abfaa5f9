"""The key of a program is complete: whatever a step reads, a change of it is seen at the next call."""

from __future__ import annotations

import collections
import copy
import enum
import functools
import gc
import math
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elman
from elman.errors import MutationError

GAIN = 1.0
TABLE = {"gain": 1.0}
COUNT = 0
OWNER = types.ModuleType("settings_of_a_user")


class Level(enum.Enum):
    LOW = 1
    HIGH = 2


class Constants:
    """What some keep in a class instead of an object."""

    gain = 1.0

    def doubled(self) -> float:
        return 2 * self.gain * GAIN


class Slotted:
    __slots__ = ("gain",)

    def __init__(self) -> None:
        self.gain = 1.0


def scaled(a: Tensor) -> Tensor:
    return a * GAIN


def with_default(a: Tensor, gain: float = 1.0) -> Tensor:
    return a * gain


class Scales(nn.Module):
    """A step that multiplies by what ``how(self, h)`` says; ``class_gain`` is read from the class."""

    class_gain = 1.0
    class_table = (1.0, [1.0])

    def __init__(self, how: Callable[[Any, Tensor], Any], **attributes: Any) -> None:
        super().__init__()
        self.W = nn.Linear(3, 3)
        self.how = how
        for name, value in attributes.items():
            setattr(self, name, value)

    @property
    def from_property(self) -> float:
        return GAIN

    @staticmethod
    def from_static(h: Tensor) -> Tensor:
        return scaled(h)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.W(h) + x * self.how(self, x))
        return h, h


class WithSlot(Scales):
    __slots__ = ("slot",)


class Counter:
    """A closure over a number that can be moved."""

    def __init__(self) -> None:
        value = 1.0

        def read(cell: nn.Module, h: Tensor) -> Tensor:
            return h * value

        def write(new: float) -> None:
            nonlocal value
            value = new

        self.read, self.write = read, write


def same_as_reference(cell: nn.Module) -> None:
    xs, state = torch.randn(4, 2, 3), torch.randn(2, 3)
    found, expected = (elman.scan(cell, xs, state, backend=b)[0] for b in ("interpret", "reference"))
    torch.testing.assert_close(found, expected)


Change = Callable[[Scales, pytest.MonkeyPatch], Any]


def closed(counter: Counter) -> Scales:
    return Scales(counter.read, writer=counter.write)


def unregistered() -> list[nn.Module]:
    return [nn.Linear(3, 3).requires_grad_(False)]


READS: dict[str, tuple[Callable[[], Scales], Change]] = {
    "a global number": (lambda: Scales(lambda c, h: GAIN), lambda c, m: m.setitem(globals(), "GAIN", 3.0)),
    "a global of a function that is called": (
        lambda: Scales(lambda c, h: scaled(h)),
        lambda c, m: m.setitem(globals(), "GAIN", 3.0),
    ),
    "a global function": (
        lambda: Scales(lambda c, h: scaled(h)),
        lambda c, m: m.setitem(globals(), "scaled", lambda a: a * 0.25),
    ),
    "a global dict": (lambda: Scales(lambda c, h: TABLE["gain"]), lambda c, m: m.setitem(TABLE, "gain", 3.0)),
    "a class among the globals": (
        lambda: Scales(lambda c, h: Constants.gain),
        lambda c, m: m.setattr(Constants, "gain", 3.0),
    ),
    "a module among the globals": (
        lambda: Scales(lambda c, h: OWNER.gain),
        lambda c, m: m.setattr(OWNER, "gain", 3.0),
    ),
    "an attribute of the class": (
        lambda: Scales(lambda c, h: c.class_gain),
        lambda c, m: m.setattr(Scales, "class_gain", 3.0),
    ),
    "a new attribute of a subclass": (
        lambda: WithSlot(lambda c, h: c.class_gain),
        lambda c, m: m.setattr(WithSlot, "class_gain", 3.0, raising=False),
    ),
    "a list of the class": (
        lambda: Scales(lambda c, h: c.class_table[1][0]),
        lambda c, m: Scales.class_table[1].insert(0, 3.0),
    ),
    "a property": (lambda: Scales(lambda c, h: c.from_property), lambda c, m: m.setitem(globals(), "GAIN", 3.0)),
    "a static method": (lambda: Scales(lambda c, h: c.from_static(h)), lambda c, m: m.setitem(globals(), "GAIN", 3.0)),
    "a method of an object": (
        lambda: Scales(lambda c, h: c.thing.doubled(), thing=Constants()),
        lambda c, m: m.setitem(globals(), "GAIN", 3.0),
    ),
    "the class of an object": (
        lambda: Scales(lambda c, h: c.thing.doubled(), thing=Constants()),
        lambda c, m: m.setattr(Constants, "gain", 3.0),
    ),
    "a closure": (lambda: closed(Counter()), lambda c, m: c.writer(3.0)),
    "a default argument": (
        lambda: Scales(lambda c, h: with_default(h)),
        lambda c, m: m.setattr(with_default, "__defaults__", (3.0,)),
    ),
    "code that was replaced": (
        lambda: Scales(lambda c, h: scaled(h)),
        lambda c, m: m.setattr(scaled, "__code__", (lambda a: a * 0.25).__code__),
    ),
    "a deque": (
        lambda: Scales(lambda c, h: c.thing[0], thing=collections.deque([1.0])),
        lambda c, m: c.thing.appendleft(3.0),
    ),
    "a slot of an object": (
        lambda: Scales(lambda c, h: c.thing.gain, thing=Slotted()),
        lambda c, m: setattr(c.thing, "gain", 3.0),
    ),
    "a slot of the module": (
        lambda: WithSlot(lambda c, h: c.slot, slot=1.0),
        lambda c, m: setattr(c, "slot", 3.0),
    ),
    "a member of an enumeration": (
        lambda: Scales(lambda c, h: 3.0 if c.thing is Level.HIGH else 1.0, thing=Level.LOW),
        lambda c, m: setattr(c, "thing", Level.HIGH),
    ),
    "the sign of zero": (
        lambda: Scales(lambda c, h: math.copysign(1.0, c.thing), thing=0.0),
        lambda c, m: setattr(c, "thing", -0.0),
    ),
    "deep inside": (
        lambda: Scales(lambda c, h: c.thing[0][0][0][0][0][0][0][0], thing=[[[[[[[[1.0]]]]]]]]),
        lambda c, m: c.thing[0][0][0][0][0][0][0].insert(0, 3.0),
    ),
    "a partial": (
        lambda: Scales(functools.partial(lambda table, c, h: table["gain"], TABLE)),
        lambda c, m: m.setitem(TABLE, "gain", 3.0),
    ),
    "a module in a list": (
        lambda: Scales(lambda c, h: c.thing[0](h) * c.thing[0].gain, thing=_with_gain(unregistered())),
        lambda c, m: setattr(c.thing[0], "gain", 3.0),
    ),
    "a parameter of a module in a list": (
        lambda: Scales(lambda c, h: c.thing[0](h), thing=unregistered()),
        lambda c, m: setattr(c.thing[0], "weight", nn.Parameter(torch.randn(3, 3), requires_grad=False)),
    ),
    "a hook on all modules": (
        lambda: Scales(lambda c, h: 1.0),
        lambda c, m: m.setitem(
            torch.nn.modules.module._global_forward_hooks,
            0,
            lambda part, args, out: out * 0.5 if type(part) is nn.Linear else None,
        ),
    ),
}


def _with_gain(modules: list[nn.Module]) -> list[nn.Module]:
    for part in modules:
        part.gain = 1.0
    return modules


@pytest.mark.parametrize("what", READS)
def test_a_change_is_seen(what: str, traces: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OWNER, "gain", 1.0, raising=False)
    monkeypatch.setitem(TABLE, "gain", 1.0)
    monkeypatch.setattr(Scales, "class_table", (1.0, [1.0]))
    make, change = READS[what]
    cell = make()
    for _ in range(2):
        same_as_reference(cell)
    assert len(traces) == 1
    change(cell, monkeypatch)
    for _ in range(2):
        same_as_reference(cell)
    assert len(traces) == 2


def test_what_comes_back_is_not_traced_again(traces: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Scales(lambda c, h: c.class_gain * GAIN)
    for gain in (1.0, 2.0, 1.0, 2.0):
        monkeypatch.setattr(Scales, "class_gain", gain)
        same_as_reference(cell)
    assert len(traces) == 2


def test_what_does_not_count_may_change(traces: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock, an event, a global that the step does not read."""
    cell = Scales(lambda c, h: 2.0, ready=threading.Event(), lock=threading.Lock())
    same_as_reference(cell)
    cell.ready.set()
    monkeypatch.setitem(globals(), "COUNT", 9)
    with cell.lock:
        same_as_reference(cell)
    assert len(traces) == 1


class Bound(nn.Module):
    """Attributes that lead back to the module: a method, a function around it, a list of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Linear(3, 3)
        self.method, self.function, self.parts = self.multiply, lambda h: self.W(h), [self.W]
        self.me = weakref.ref(self)

    def multiply(self, h: Tensor) -> Tensor:
        return self.W(h)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.method(h) + self.function(x) + self.parts[0](h))
        return h, h


def test_equal_cells_with_functions_share_a_program(traces: list[int]) -> None:
    first = Bound()
    for cell in (first, Bound(), Bound()):
        same_as_reference(cell)
    assert len(traces) == 1


def test_a_program_keeps_no_cell_alive(traces: list[int]) -> None:
    class Thing:
        pass

    def run() -> list[weakref.ref[Any]]:
        cell = Bound()
        cell.fixed, cell.thing, cell.event = torch.randn(3), Thing(), threading.Event()
        cell.both = cell.thing.__class__.__init__, lambda: cell.thing
        same_as_reference(cell)
        return [weakref.ref(thing) for thing in (cell, cell.fixed, cell.thing, cell.event, cell.W.weight)]

    gone = run()
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)
    same_as_reference(Bound())


def test_a_copy_has_a_key_of_its_own_tensors(traces: list[int]) -> None:
    cell = Scales(lambda c, h: c.fixed, fixed=torch.ones(3))
    other = copy.deepcopy(cell)
    other.fixed.mul_(3)
    for one in (cell, other):
        same_as_reference(one)
    assert len(traces) == 2


class CountsGlobally(nn.Module):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        global COUNT
        COUNT += 1
        return x * COUNT, h


class CountsInItsClass(nn.Module):
    count = 0

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        type(self).count += 1
        return x * self.count, h


@pytest.mark.parametrize("kind", [CountsGlobally, CountsInItsClass])
def test_a_step_that_changes_what_it_reads(kind: type[nn.Module]) -> None:
    with pytest.raises(MutationError, match="global name, a closure or an attribute of a class"):
        elman.scan(kind(), torch.randn(3, 2, 3), torch.zeros(2, 3), backend="interpret")
