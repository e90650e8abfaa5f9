"""What a traced program depends on, as a hashable key: a program is used again exactly while its key is the same.

    the structure of the module tree (types, train or eval, hooks); modules in plain lists and other attributes too
    every Python attribute of every module (numbers, strings, containers, objects, functions, tensors)
    the attributes and functions of the modules' classes
    what those functions, and functions in attributes, read besides: global names, closures, default arguments
    shape, dtype and device of every leaf of x, state, constants, parameters and buffers; their tree structure
    autocast (on, dtype), the default dtype, the default device, the precision of products, global module hooks

Sizes of T and B are no part of it. What belongs to Python or to an installed package is taken as fixed; objects without
``__dict__`` or slots count by identity. What a step asks of autograd (``requires_grad``, ``is_grad_enabled``) has one
fixed answer.
"""

from __future__ import annotations

import enum
import functools
import operator
import types
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .names import global_chains, installed, user_classes

__all__ = ["PROXIES", "ambient", "fingerprint", "forget_classes", "referent", "slots"]

_INTERNALS = frozenset(vars(nn.Module())) | {"_forward_hooks", "_forward_pre_hooks"}
_NUMBERS = (int, float, str, bool, bytes, complex)
_PLAIN = frozenset((*_NUMBERS, type(None), torch.dtype, torch.device, range, type(...), type(NotImplemented)))
_RUNNING = frozenset(
    ("threading", "_thread", "queue", "logging", "multiprocessing", "concurrent", "asyncio", "io", "_io")
)
_OPAQUE = (types.BuiltinFunctionType, types.ModuleType, torch._C.Generator, enum.Enum)
PROXIES = frozenset((weakref.ProxyType, weakref.CallableProxyType))
_MISSING = object()
_MOST = 256


class _Identity:
    """A key that equals only the very same object; it does not keep it alive where Python can do without."""

    __slots__ = ("number", "thing")

    def __init__(self, thing: Any) -> None:
        self.number = id(thing)
        try:
            self.thing: Callable[[], Any] = weakref.ref(thing)
        except TypeError:
            self.thing = lambda: thing

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        # After its object is gone a key equals nothing else: the address may be in use again.
        if self is other:
            return True
        if not isinstance(other, _Identity) or self.number != other.number:
            return False
        return self.thing() is other.thing() is not None


class _Frozen:
    """A long key with its hash computed once."""

    __slots__ = ("code", "value")

    def __init__(self, value: Hashable) -> None:
        self.value, self.code = value, hash(value)

    def __hash__(self) -> int:
        return self.code

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Frozen) and self.code == other.code and self.value == other.value)


def referent(value: Any) -> Any:
    """What a weak reference or proxy leads to; None when that is gone."""
    try:
        return value.__init__.__self__ if type(value) in PROXIES else value()
    except ReferenceError:
        return None


def slots(value: Any) -> tuple[Any, ...]:
    """The descriptors of all ``__slots__`` of an object."""
    kind: Any = type(value)
    return _slots_of(kind)


@functools.lru_cache(maxsize=1024)
def _slots_of(kind: Any) -> tuple[Any, ...]:
    found = (value for parent in kind.__mro__ if "__slots__" in vars(parent) for value in vars(parent).values())
    return tuple(value for value in found if isinstance(value, types.MemberDescriptorType))


class _Pass:
    """One look at everything: each object that may hold others is taken once, and named by its number if met again."""

    __slots__ = ("code", "met", "pending")

    def __init__(self, code: bool) -> None:
        self.code = code
        self.met: dict[int, int] = {}
        self.pending: list[nn.Module] = []

    def value(self, value: Any) -> Hashable:
        kind = type(value)
        if kind in _PLAIN:
            if value != value:
                return (kind, "nan")
            return (kind, value) if value else (kind, repr(value))  # 0.0 and -0.0 are equal
        if isinstance(value, Tensor):
            return (_Identity(value), tuple(value.shape), value.dtype)
        if kind in PROXIES or isinstance(value, weakref.ref):
            return (kind, self.value(referent(value)))
        if isinstance(value, nn.Module):
            return ("module", self.number(value))
        if isinstance(value, _OPAQUE):
            return _Identity(value)
        if isinstance(value, type):
            return self.kind(value)
        if isinstance(value, _NUMBERS):
            return (kind, value, repr(value), self.value(getattr(value, "__dict__", None)))
        if (number := self.met.get(id(value))) is not None:
            return ("again", number)
        self.met[id(value)] = len(self.met)
        return self._held(kind, value)

    def kind(self, kind: type) -> Any:
        """A class, and what its methods read."""
        known: Any = kind  # a class is hashable, whatever its instances are
        return known if not self.code or installed(kind.__module__) else (known, *_of_class(kind).key(self))

    def _held(self, kind: type, value: Any) -> Hashable:
        freeze = self.value
        if isinstance(value, types.MethodType):
            return (kind, freeze(value.__func__), freeze(value.__self__))
        if isinstance(value, functools.partial):
            return (kind, freeze(value.func), freeze(value.args), freeze(value.keywords))
        if isinstance(value, types.FunctionType):
            return (kind, *_Surroundings(value).key(self)) if self.code else _Identity(value)
        own: Hashable = None
        if isinstance(value, (list, tuple, deque)):
            own = tuple([freeze(v) for v in value])
        elif isinstance(value, (dict, types.MappingProxyType)):
            own = tuple([(freeze(k), freeze(v)) for k, v in value.items()])
        elif isinstance(value, (set, frozenset)):
            own = frozenset([freeze(v) for v in value])
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            own = (value.dtype.str, value.shape, value.tobytes())
        elif isinstance(value, (bytearray, array)):
            own = bytes(value)
        inner, slotted = getattr(value, "__dict__", None), slots(value)
        opaque = (inner is None and not slotted) or kind.__module__.partition(".")[0] in _RUNNING
        if own is None and opaque:  # a lock, a queue, a logger: no part of what is computed
            return _Identity(value)
        attributes = tuple([(k, freeze(v)) for k, v in inner.items()]) if isinstance(inner, dict) else ()
        return (self.kind(kind), own, attributes, *[freeze(_slot(value, s)) for s in slotted])

    def number(self, part: nn.Module) -> int:
        number = self.met.get(id(part))
        if number is None:
            number = self.met[id(part)] = len(self.met)
            self.pending.append(part)
        return number

    def tree(self, root: nn.Module) -> Hashable:
        self.number(root)
        for part in self.pending:  # it grows by those that are met
            for child in part._modules.values():
                if child is not None:
                    self.number(child)
        registered = self.pending
        self.pending = []
        found = [self.part(part, True) for part in registered]
        for part in self.pending:  # known through an attribute alone: its tensors are no inputs of the program
            found.append(self.part(part, False))
        return tuple(found)

    def part(self, part: nn.Module, registered: bool) -> Hashable:
        kind, met = type(part), self.met
        found: list[Any] = [kind, getattr(kind, "forward", None), part.training]
        for tensors in (part._parameters, part._buffers):
            for key, tensor in tensors.items():
                if tensor is not None:
                    found.append((key, met.setdefault(id(tensor), len(met)) if registered else self.value(tensor)))
        for key, child in part._modules.items():
            found.append((key, None if child is None else self.number(child)))
        # A pre-hook (pruning, the older weight_norm) writes its tensors anew at every call.
        hooked = bool(part._forward_pre_hooks)
        for key, value in part.__dict__.items():
            if key not in _INTERNALS and not (hooked and isinstance(value, Tensor)):
                found.append((key, self.value(value)))
        if hooked or part._forward_hooks or part._backward_pre_hooks or part._backward_hooks:
            all_hooks = (part._forward_pre_hooks, part._forward_hooks, part._backward_pre_hooks, part._backward_hooks)
            found.extend((i, self.value(hook)) for i, hooks in enumerate(all_hooks) for hook in hooks.values())
        found.extend((slot.__name__, self.value(_slot(part, slot))) for slot in slots(part))
        if self.code and not kind.__module__.startswith("torch.nn."):
            found.extend(_of_class(kind).key(self))
        return tuple(found)


def _slot(owner: Any, slot: Any) -> Any:
    try:
        return slot.__get__(owner)
    except AttributeError:
        return None


class _Surroundings:
    """What the code of a class, or of a function, reads besides its arguments.

    Every place that was looked at is kept with what stood there, so that looking again is quick.
    """

    def __init__(self, root: Any) -> None:
        self.places: list[tuple[Any, str]] = []
        self.cells: list[Any] = []
        self.functions: list[types.FunctionType] = []
        self.changing: list[Any] = []
        self.met: set[int] = {id(root)}
        self.todo: list[Any] = [root]
        self.sizes: list[tuple[Any, int]] = []
        found: list[Hashable] = []
        while self.todo:
            thing = self.todo.pop()
            found.extend(self._in_class(thing) if isinstance(thing, type) else self._in_function(thing))
        self.then = self._now()
        self.frozen = _Frozen(tuple(found)) if found else None

    def holds(self) -> bool:
        """Whether in every place there is what was there."""
        return all(map(operator.is_, self._now(), self.then)) and all(len(names) == n for names, n in self.sizes)

    def key(self, seen: _Pass) -> tuple[Hashable, ...]:
        if self.frozen is None:
            return ()
        return (self.frozen, *[seen.value(value) for value in self.changing]) if self.changing else (self.frozen,)

    def _now(self) -> list[Any]:
        return [
            *[names.get(name, _MISSING) for names, name in self.places],
            *[_content(cell) for cell in self.cells],
            *[f.__code__ for f in self.functions],
            *[f.__defaults__ for f in self.functions],
            *[f.__kwdefaults__ for f in self.functions],
        ]

    def _in_class(self, kind: type) -> Iterable[Hashable]:
        for parent, names in user_classes(kind):
            if parent is not kind and id(parent) in self.met:
                continue
            self.met.add(id(parent))
            space = vars(parent)
            self.sizes.append((space, len(space)))
            for name in names:
                self.places.append((space, name))
                yield (name, self._take(space[name]))

    def _in_function(self, function: types.FunctionType) -> Iterable[Hashable]:
        self.functions.append(function)
        yield _Identity(function.__code__)
        yield from map(self._take, (function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            self.cells.append(cell)
            yield self._take(_content(cell))
        for chain in () if installed(function.__module__) else global_chains(function.__code__):
            space: Any = function.__globals__
            for name in chain:
                value = space.get(name, _MISSING)
                self.places.append((space, name))
                if not isinstance(value, types.ModuleType) or installed(value.__name__):
                    break
                space = vars(value)
            yield (chain, self._take(value))

    def _take(self, value: Any) -> Any:
        """A value's part of the key. What may change inside itself is looked at anew every time."""
        kind = type(value)
        if kind in _INSIDE:
            return (kind, self._take(_INSIDE[kind](value)))
        if isinstance(value, (types.FunctionType, type)):
            code = isinstance(value, types.FunctionType)
            if id(value) not in self.met and (code or not installed(value.__module__)):
                self.met.add(id(value))
                self.todo.append(value)
            return kind if code else value
        if kind in _PLAIN or isinstance(value, _OPAQUE):
            return _Pass(False).value(value)
        if value is _MISSING or isinstance(value, (types.GetSetDescriptorType, types.MemberDescriptorType)):
            return kind
        self.changing.append(value)
        return kind


_INSIDE: dict[type, Callable[[Any], Any]] = {
    staticmethod: lambda value: value.__func__,
    classmethod: lambda value: value.__func__,
    property: lambda value: value.fget,
    functools.cached_property: lambda value: value.func,
    functools.partialmethod: lambda value: value.func,
}


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return _MISSING


_classes: dict[type, _Surroundings] = {}


def _of_class(kind: type) -> _Surroundings:
    found = _classes.get(kind)
    if found is None or not found.holds():
        found = _classes[kind] = _Surroundings(kind)
        while len(_classes) > _MOST:
            _classes.pop(next(iter(_classes)), None)
    return found


def forget_classes() -> None:
    """Let go of the classes that were looked at."""
    _classes.clear()


def fingerprint(module: nn.Module, *, code: bool = True) -> Hashable:
    """Everything of the module tree, tensors apart, that a step may read; without ``code`` its attributes alone."""
    return _Pass(code).tree(module)


def ambient(device: torch.device) -> Hashable:
    """The state of PyTorch that a step may depend on."""
    autocast = torch.is_autocast_enabled(device.type)
    hooks = (torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks)
    return (
        autocast,
        torch.get_autocast_dtype(device.type) if autocast else None,
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.get_default_device() if torch._C._len_torch_function_stack() else None,
        tuple([_Identity(hook) for kind in hooks for hook in kind.values()]) if any(hooks) else (),
    )
