"""A twin of a module tree, to be traced in its place: nothing that happens to it is seen by the user, or by a thread.

Modules are new objects with the same class, the same tensors, and attributes of their own. Whatever leads to a module
leads, in the twin, to the twin of that module: lists, dicts, methods, partials, closures, weak references, objects.
Other objects are shared, since a step may ask which object it has.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from .key import PROXIES, referent, slots
from .names import installed

__all__ = ["Twins"]

_WHOLE = (int, float, complex, str, bytes, type(None), Tensor, type, types.ModuleType, types.BuiltinFunctionType)
_FAR = 10_000


class Twins:
    """The twins of one trace, by the address of what they stand for; ``tensors`` are given."""

    def __init__(self, tensors: dict[int, Tensor]) -> None:
        self.memo: dict[int, Any] = dict(tensors)
        self.shared: list[tuple[Any, Any]] = []  # containers that stay the user's, and copies of them

    def of(self, value: Any) -> Any:
        """The twin of a value: the value itself where it holds nothing that needs one."""
        if isinstance(value, _WHOLE):
            return self.memo.get(id(value), value) if isinstance(value, Tensor) else value
        if id(value) not in self.memo:
            self.memo[id(value)] = value
            self.memo[id(value)] = self._made(value)
        return self.memo[id(value)]

    def put_back(self) -> None:
        """Undo what was done to shared objects."""
        for container, was in self.shared:
            if not _same(container, was):
                container.clear()
                container.extend(was) if isinstance(container, (list, deque)) else container.update(was)

    def _made(self, value: Any) -> Any:
        if type(value) in PROXIES or isinstance(value, weakref.ref):
            return self._weak(value)
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, (list, dict, set, deque)):
            return self._container(value)
        if isinstance(value, (tuple, frozenset)):
            items = [self.of(v) for v in value]
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            return value._make(items) if hasattr(value, "_make") else type(value)(items)
        if isinstance(value, types.MethodType):
            owner = self.of(value.__self__)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if not self._leads_back(value):
            self._remember(value)
            return value
        if isinstance(value, functools.partial):
            new = functools.partial(self.of(value.func), *self.of(value.args), **self.of(value.keywords))
            new.__dict__.update(value.__dict__)
            return new
        if isinstance(value, types.FunctionType):
            return self._function(value)
        return self._object(value)

    def _leads_back(self, value: Any) -> bool:
        """Whether an object leads to a module, or to one of the tensors that are given."""
        seen, todo = {id(value)}, deque([value])
        while todo and len(seen) < _FAR:
            for inner in _inside(todo.popleft()):
                if isinstance(inner, nn.Module) or (isinstance(inner, Tensor) and id(inner) in self.memo):
                    return True
                if not isinstance(inner, _WHOLE) and id(inner) not in seen:
                    seen.add(id(inner))
                    todo.append(inner)
        return False

    def _module(self, part: nn.Module) -> nn.Module:
        if isinstance(part, torch.jit.ScriptModule):
            raise UnsupportedError(f"{part.original_name} is a script, which cannot be traced. Give the module itself.")
        new = self.memo[id(part)] = object.__new__(type(part))
        self._attributes(part, new)
        return new

    def _attributes(self, old: Any, new: Any) -> None:
        if hasattr(old, "__dict__"):
            new.__dict__.update({key: self.of(value) for key, value in old.__dict__.items()})
        for slot in slots(old):
            try:
                slot.__set__(new, self.of(slot.__get__(old)))
            except AttributeError:  # never set
                continue

    def _container(self, value: Any) -> Any:
        new = self.memo[id(value)] = copy.copy(value)
        if isinstance(value, dict):
            pairs = [(self.of(key), self.of(item)) for key, item in value.items()]
            if any(a is not b or c is not d for (a, c), (b, d) in zip(pairs, value.items(), strict=True)):
                new.clear()
                new.update(pairs)
        elif isinstance(value, set):
            new.clear()
            new.update(map(self.of, value))
        else:
            for i, item in enumerate(value):
                new[i] = self.of(item)
        return new

    def _function(self, value: types.FunctionType) -> types.FunctionType:
        cells = tuple(types.CellType() for _ in value.__closure__ or ())
        new = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, cells or None)
        self.memo[id(value)] = new
        for cell, old in zip(cells, value.__closure__ or (), strict=True):
            for content in _contents(old):
                cell.cell_contents = self.of(content)
        new.__defaults__, new.__kwdefaults__ = self.of(value.__defaults__), self.of(value.__kwdefaults__)
        new.__dict__.update(value.__dict__)
        return new

    def _weak(self, value: Any) -> Any:
        there = referent(value)
        twin = self.of(there)
        if twin is there:
            return value
        return weakref.proxy(twin) if type(value) in PROXIES else weakref.ref(twin)

    def _object(self, value: Any) -> Any:
        kind = type(value)
        # What is not made here stays the user's; whether the step reads tensors through it is seen while tracing.
        if kind.__new__ is not object.__new__ or hasattr(kind, "__del__"):
            return value
        new = object.__new__(kind)
        self.memo[id(value)] = new
        self._attributes(value, new)
        return new

    def _remember(self, value: Any) -> None:
        """What a step may change in an object that is shared."""
        if isinstance(value, (list, dict, set, deque)):
            self.shared.append((value, copy.copy(value)))
        elif installed(type(value).__module__):
            return
        for inner in _inside(value):
            if not isinstance(inner, _WHOLE) and id(inner) not in self.memo:
                self.memo[id(inner)] = inner
                self._remember(inner)
        if isinstance(own := getattr(value, "__dict__", None), dict):
            self.shared.append((own, dict(own)))


def _same(container: Any, was: Any) -> bool:
    if isinstance(container, set):
        return container == was
    mine, theirs = (c.items() if isinstance(c, dict) else enumerate(c) for c in (container, was))
    return len(container) == len(was) and all(a == b and v is w for (a, v), (b, w) in zip(mine, theirs, strict=True))


def _inside(value: Any) -> Iterable[Any]:
    """What an object holds."""
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from value
    elif isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, types.MethodType):
        yield value.__self__
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, types.FunctionType):
        yield from (value.__defaults__, value.__kwdefaults__)
        for cell in value.__closure__ or ():
            yield from _contents(cell)
    elif isinstance(value, weakref.ref):
        yield referent(value)
    if isinstance(inner := getattr(value, "__dict__", None), dict):
        yield from inner.values()
    for slot in slots(value):
        try:
            yield slot.__get__(value)
        except AttributeError:  # never set
            continue


def _contents(cell: Any) -> Iterable[Any]:
    try:
        yield cell.cell_contents
    except ValueError:  # not filled yet
        return
