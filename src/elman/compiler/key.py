"""What a traced program depends on, as a hashable key: a program is used again exactly while its key is the same.

    the structure of the module tree (names, types, train or eval, hooks)
    every Python attribute of every module (numbers, strings, containers, configuration objects, functions, tensors)
    shape, dtype and device of every leaf of x, state, constants, parameters and buffers; their tree structure
    autocast (on, dtype) and the default dtype

Sizes of T and B are no part of it. Not tracked are values behind global names, in closures and on classes: make them
attributes of the module. What a step asks of autograd (``requires_grad``, ``is_grad_enabled``) has one fixed answer.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["MODULE_INTERNALS", "ambient", "fingerprint"]

MODULE_INTERNALS = frozenset(vars(nn.Module())) | {"_forward_hooks", "_forward_pre_hooks"}
_PLAIN = (int, float, str, bool, bytes, complex, type(None), torch.dtype, torch.device, type, range)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial, torch._C.Generator)


class _Identity:
    """A key that equals only the very same object, and keeps it alive so that its address is not used again."""

    __slots__ = ("thing",)

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __hash__(self) -> int:
        return id(self.thing)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.thing is other.thing


def _freeze(value: Any, depth: int = 0) -> Hashable:
    kind = type(value)
    if isinstance(value, (int, float, str, bytes, complex)) and kind not in _PLAIN:
        return (kind, value, _freeze(getattr(value, "__dict__", None), depth + 1))
    if isinstance(value, np.ndarray):
        return (kind, value.dtype.str, value.shape, value.tobytes())
    if kind in _PLAIN:
        return ("nan",) if value != value else (kind, value)
    if isinstance(value, Tensor):
        return (_Identity(value), tuple(value.shape), value.dtype)
    if isinstance(value, (nn.Module, *_FUNCTIONS)) or depth > 5:
        return _Identity(value)
    if isinstance(value, (list, tuple)):
        return (kind, *(_freeze(v, depth + 1) for v in value))
    if isinstance(value, dict):
        return (kind, *((_freeze(k, depth + 1), _freeze(v, depth + 1)) for k, v in value.items()))
    if isinstance(value, (set, frozenset)):
        return (kind, frozenset(_freeze(v, depth + 1) for v in value))
    inner = getattr(value, "__dict__", None)
    return (kind, _freeze(dict(inner), depth + 1)) if inner is not None else _Identity(value)


def fingerprint(module: nn.Module) -> Hashable:
    """Everything of the module tree, tensors apart, that a step may read."""
    found: list[Hashable] = []
    first: dict[int, str] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        if id(part) in first:
            found.append((name, first[id(part)]))
            continue
        first[id(part)] = name
        tensors = (*part._parameters.items(), *part._buffers.items())
        found.append(tuple((key, first.setdefault(id(t), f"{name}.{key}")) for key, t in tensors if t is not None))
        # A pre-hook (pruning, the older weight_norm) writes its tensors anew at every call.
        hooked = bool(part._forward_pre_hooks)
        own = [
            (key, _freeze(value))
            for key, value in part.__dict__.items()
            if key not in MODULE_INTERNALS and not (hooked and isinstance(value, Tensor))
        ]
        hooks = tuple(
            _Identity(hook)
            for hooks in (part._forward_pre_hooks, part._forward_hooks, part._backward_pre_hooks, part._backward_hooks)
            for hook in hooks.values()
        )
        found.append((name, type(part), type(part).forward, part.training, *own, *hooks))
    return tuple(found)


def ambient(device: torch.device) -> Hashable:
    """The state of PyTorch that a step may depend on."""
    autocast = torch.is_autocast_enabled(device.type)
    return (autocast, torch.get_autocast_dtype(device.type) if autocast else None, torch.get_default_dtype())
