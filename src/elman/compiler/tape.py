"""What runs on tensors without data, operation by operation: what ``make_fx`` sees, at a fraction of its cost.

``make_fx`` follows whatever a user's step may do. Where it has done so once, less is enough: to see whether the step
does the same with another batch, and to differentiate a graph or take its operations apart.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import snapshot_fake
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import UnsupportedError
from .step import ours

__all__ = ["Recorder", "Tape", "Unrecorded"]

aten = torch.ops.aten
Table = Mapping[Any, Callable[..., Any]]
_ours = lru_cache(maxsize=4096)(ours)


@lru_cache(maxsize=4096)
def _composite(func: Any) -> bool:
    """Whether autograd takes an operation apart; below autograd, where formulas run, nobody has yet."""
    has = partial(torch._C._dispatch_has_kernel_for_dispatch_key, func.name())
    return has("CompositeImplicitAutograd") and not (has("CPU") or has("CUDA"))


class _Apart(TorchDispatchMode):
    """Takes operations apart by a table, and hands those that are left to ``record``."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table
        self.alive: list[Any] = []  # so that no two tensors have one id

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if (formula := self.table.get(func)) is not None:
            with self:
                out = formula(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if _composite(func):
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        return self.record(func, args, kwargs)

    def record(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation and note it."""
        raise NotImplementedError


class Entry(NamedTuple):
    """An operation, and the leaves of what it is given: of a tensor without data, where it comes from."""

    target: Any
    given: list[Any]
    structure: Any = None


class Tape(_Apart):
    """The operations of one run, and the user's lines that they come from. ``unit`` is the size of its batch."""

    def __init__(self, table: Table, unit: int) -> None:
        super().__init__(table)
        self.unit = unit
        self.entries: list[Entry] = []
        self.lines: set[tuple[str, int] | None] = set()
        self._places: dict[int, tuple[int, int]] = {}

    def run(self, step: Callable[..., Any], inputs: Sequence[list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        """``step(*inputs)``, which gives outputs and states."""
        self._name([leaf for part in inputs for leaf in part])
        with self:
            ys, new = step(*inputs)
        self.entries.append(Entry("output", [self._place(leaf) for leaf in (*ys, *new)]))
        return ys, new

    def record(self, func: Any, args: Any, kwargs: Any) -> Any:
        given, structure = pytree.tree_flatten((args, kwargs))
        self.entries.append(Entry(func, [self._place(value) for value in given], structure))
        self.lines.add(_line())
        out = func(*args, **kwargs)
        self._name(out if isinstance(out, (tuple, list)) else [out])
        return out

    def _name(self, values: Sequence[Any]) -> None:
        self.alive.append(values)
        at = len(self.entries)
        self._places.update((id(value), (at, i)) for i, value in enumerate(values) if isinstance(value, Tensor))

    def _place(self, value: Any) -> Any:
        """Where a tensor comes from, None where that is not known; what has a value is itself."""
        if not isinstance(value, Tensor):
            return value
        self.alive.append(value)
        return self._places.get(id(value), None if isinstance(value, FakeTensor) else value)


def _line() -> tuple[str, int] | None:
    """The innermost line that is the user's."""
    frame = sys._getframe(1)
    while frame is not None and _ours(frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    return None if frame is None else (frame.f_code.co_filename, frame.f_lineno)


class Unrecorded(UnsupportedError):
    """A run does what a Recorder does not follow; ``make_fx`` may."""


class Recorder(_Apart):
    """Writes what runs into a graph, as ``make_fx`` would; inputs are named by ``give``.

    Tensors with numbers become attributes of ``root``. Raises Unrecorded for a change in place that others may see.
    """

    def __init__(self, table: Table, graph: fx.Graph, root: nn.Module) -> None:
        super().__init__(table)
        self.graph, self.root = graph, root
        self.meta: dict[str, Any] = {}  # of the operations to come, their line aside where a graph is run
        self.prefix = ""  # of their names
        self._nodes: dict[int, fx.Node] = {}

    def give(self, value: Tensor, node: fx.Node) -> None:
        """Let a tensor be what a node stands for."""
        self.alive.append(value)
        self._nodes[id(value)] = node

    def knows(self, value: Tensor) -> bool:
        """Whether a tensor stands for a node already."""
        return id(value) in self._nodes

    def forget(self) -> None:
        """Let no tensor stand for a node any more."""
        self.alive.clear()
        self._nodes.clear()

    def node_of(self, value: Any) -> Any:
        """The node of a tensor; anything else is itself."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._nodes:
            if isinstance(value, FakeTensor):
                raise Unrecorded("a value from outside")
            name = f"_tensor_constant{len(dict(self.root.named_buffers()))}"
            self.root.register_buffer(name, value)
            self.give(value, self.graph.get_attr(name))
        return self._nodes[id(value)]

    def record(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func._schema.is_mutable:
            return self._changed(func, args)
        func = aten.lift_fresh_copy.default if func is aten.lift_fresh.default else func
        given = pytree.tree_map(self.node_of, (args, kwargs))
        out = func(*args, **kwargs)
        parts = out if isinstance(out, (tuple, list)) else [out]
        if not all(isinstance(part, FakeTensor) or part is None for part in parts):
            raise Unrecorded(f"{func} gives no tensor")
        node = self._new(func, given[0], given[1], pytree.tree_map_only(Tensor, snapshot_fake, out))
        if parts is not out:
            self.give(out, node)
            return out
        for i, part in enumerate(parts):
            if part is not None:
                self.give(part, self._new(operator.getitem, (node, i), {}, node.meta["val"][i]))
        return out

    def _new(self, target: Any, args: Any, kwargs: Any, value: Any) -> fx.Node:
        hint = target if target is operator.getitem else target.overloadpacket.__name__
        name = self.prefix + self.graph._target_to_str(hint)
        node = self.graph.create_node("call_function", target, args, kwargs, name)
        line = fx.traceback.get_current_meta().get("stack_trace")
        node.meta = {**self.meta, **({"stack_trace": line} if line else {}), "val": value}
        return node

    def _changed(self, func: Any, args: Any) -> Any:
        """``a.copy_(b)`` on a value of its own that nothing else looks into: from now on it is b."""
        to, source = (*args, None)[:2]
        if func is aten.copy_.default and isinstance(source, FakeTensor):
            memory = to.untyped_storage()._cdata
            alone = sum(value.untyped_storage()._cdata == memory for value in self.alive) == 1
            alike = source.dtype == to.dtype and source.shape == to.shape and source.device == to.device
            if alone and alike and self.node_of(to).op == "call_function":
                self._nodes[id(to)] = self.node_of(source)
                return to
        raise Unrecorded(f"{func} changes a tensor in place")
