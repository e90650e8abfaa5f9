"""What the nodes of a loop's body stand for: registers of maps, memory, and views of either.

How a view reads memory is worked out by PyTorch itself: the view is made of a tensor without data, whose offset and
strides say it. So slices, chunks, transposes and broadcasting cost nothing here, in code or at run time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...errors import UnsupportedError
from ..step import batch_multiple, location
from .body import Body
from .items import Access, Buffer, Item, Kind, Map, Op
from .numeric import Numeric

__all__ = ["DTYPES", "Value", "Values", "computed_in"]

DTYPES = {torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.bool}
_IGNORED = {"memory_format", "layout", "device", "pin_memory", "non_blocking", "dtype"}


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The type in which numbers of a type are computed."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


@dataclass(eq=False)
class Value:
    """What a node stands for before views: a number, given memory, or what an item computes."""

    meta: Tensor  # without data, strides as they lie in a row
    ready: int = 0  # the first item that may read it from memory
    buffer: Buffer | None = None
    map: int | None = None  # the map that has it in a register
    register: int = -1
    number: float | bool | None = None  # the same everywhere, known now


class Values:
    """The values of a body as far as it is lowered, and the items that compute them."""

    def __init__(
        self,
        body: Body,
        states: dict[fx.Node, int],
        stored: Sequence[fx.Node],
        varying: set[fx.Node],
        narrow: Mapping[torch.dtype, Numeric],
    ) -> None:
        self.body, self.unit, self.narrow = body, body.unit, narrow
        self.items: list[Item] = []
        self.buffers: list[Buffer] = []
        self.values: dict[fx.Node, Value] = {}
        self.views: dict[fx.Node, tuple[Value, Any]] = {}
        self.states = dict(states)
        self.stored = list(stored)
        for i, (node, outer) in enumerate(zip(body.inputs, body.outside, strict=True)):
            self.give(node, i, "time" if outer in varying else None)

    # -- how values lie in memory -------------------------------------------------------------------------------

    def rows(self, value: Tensor) -> tuple[int, int] | None:
        """The dimension of a value that counts k·B rows, and k; None where it is the same for all rows."""
        found = [(d, k) for d, n in enumerate(value.shape) if (k := batch_multiple(int(n), self.unit))]
        return found[0] if found else None

    def canonical(self, value: Tensor) -> Tensor:
        """A tensor without data, with the rows outermost in memory."""
        rows = self.rows(value)
        shape = [int(n) for n in value.shape]
        if rows is None:
            return torch.empty(self.unit, *shape, dtype=value.dtype, device="meta")[0]
        d, k = rows
        rest = [*shape[:d], *shape[d + 1 :]]
        meta = torch.empty(self.unit, k, *rest, dtype=value.dtype, device="meta")
        return meta.movedim((0, 1), (d, d + 1)).flatten(d, d + 1)

    def give(self, node: fx.Node, number: int, kind: Kind | None) -> None:
        value = node.meta["val"]
        if not isinstance(value, Tensor) or value.dtype not in DTYPES:
            raise UnsupportedError(f"{getattr(value, 'dtype', type(value))} has no place in a compiled loop.")
        state = node in self.states
        kind = kind or ("batch" if state or self.rows(value) else "shared")
        buffer = self.new_buffer(node.name, kind, value, None if state else value.dtype)
        buffer.role, buffer.number = ("state" if state else "input"), number
        self.values[node] = Value(self.canonical(value), 0, buffer)

    def new_buffer(self, name: str, kind: Kind, value: Tensor, dtype: torch.dtype | None = None) -> Buffer:
        """Memory for a value, of that type; what is computed in float32 stays in it unless another type is named."""
        row = math.prod(int(n) for n in value.shape) // (self.unit if self.rows(value) else 1)
        taken = {buffer.name for buffer in self.buffers}  # names tell buffers apart, in listings and on disk
        unique = next(n for n in itertools.chain([name], (f"{name}_{i}" for i in itertools.count(2))) if n not in taken)
        buffer = Buffer(unique, kind, dtype or computed_in(value.dtype), row)
        self.buffers.append(buffer)
        return buffer

    def resolve(self, node: fx.Node) -> tuple[Value, Tensor]:
        """The value that a node is a view of, and that view."""
        if node in self.values:
            return self.values[node], self.values[node].meta
        return self.views[node]

    def normal(self, view: Tensor, rows: tuple[int, int] | None) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """(offset, shape, strides) within a row, without dimensions of one."""
        if rows is not None:
            d, k = rows
            view = view.unflatten(d, (self.unit, k)).movedim((d, d + 1), (0, 1))[0]
        kept = [(int(n), int(s)) for n, s in zip(view.shape, view.stride(), strict=True) if n != 1]
        return int(view.storage_offset()), tuple(n for n, _ in kept), tuple(s for _, s in kept)

    def shape_of(self, value: Tensor) -> tuple[int, ...]:
        """What is looped over in a row, without dimensions of one."""
        return self.normal(value, self.rows(value))[1]

    def own_strides(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Those of numbers that lie side by side."""
        return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))

    def in_memory(self, value: Value, name: str) -> Buffer:
        """The buffer of a value; a register gets one now."""
        if value.buffer is None:
            if value.number is not None:
                raise UnsupportedError(f"{name} is the number {value.number}, which has no place in memory.")
            value.buffer = self.new_buffer(name, "batch", value.meta)
            self.store(value, Access(value.buffer, 0, self.own_strides(self.map_of(value).shape)))
        if value.buffer.kind == "thread":
            raise UnsupportedError(f"{name} is a sum over rows, which is known only after the last of them.")
        return value.buffer

    def store(self, value: Value, access: Access) -> None:
        """Let the map that has a value in a register also write it there."""
        self.map_of(value).stores.append((value.register, access))

    # -- maps ---------------------------------------------------------------------------------------------------

    def map_at(self, index: int) -> Map:
        """The map of that number."""
        item = self.items[index]
        assert isinstance(item, Map)
        return item

    def map_of(self, value: Value) -> Map:
        """The map that has a value in a register."""
        assert value.map is not None
        return self.map_at(value.map)

    def made(self, name: str, value: Tensor, *args: fx.Node, like: fx.Node) -> fx.Node:
        """A node for a value that the lowering itself makes, of that shape and type."""
        node = fx.Node(self.body.graph, name, "call_function", made_here, args, {})
        node.meta = {**like.meta, "val": torch.empty(value.shape, dtype=value.dtype, device="meta")}
        return node

    def copied(self, node: fx.Node, view: Tensor) -> fx.Node:
        """A value of its own with the numbers of a view."""
        copy = self.made(f"{node.name}_copy", view, node, like=node)
        self.pointwise(copy, "clone")
        return copy

    def pointwise(self, node: fx.Node, name: str) -> None:
        """Put an operation into the first map over its shape that may read what it needs."""
        if any(isinstance(arg, (list, tuple)) for arg in node.args):
            raise self.refuse(node, name)
        like = self.canonical(node.meta["val"])
        shape = self.shape_of(like)
        first = 0
        for arg in node.all_input_nodes:
            value, view = self.resolve(arg)
            here = self.holds(value, torch.broadcast_to(view, like.shape), self.rows(like), shape)
            first = max(first, value.map if here and value.map is not None else value.ready)
        at = self.map_over(shape, first)
        operands = tuple(self.operand(arg, like, at) if isinstance(arg, fx.Node) else arg for arg in node.args)
        keywords = tuple((k, v) for k, v in node.kwargs.items() if v is not None and k not in _IGNORED)
        self.operation(node, Op(name, operands, keywords, node.meta["val"].dtype, location(node)), like, at)

    def operation(self, node: fx.Node, op: Op, like: Tensor, at: int) -> None:
        """Append an operation to a map, as the value of a node."""
        ops = self.map_at(at).ops
        ops.append(op)
        self.values[node] = Value(like, at + 1, map=at, register=len(ops) - 1)

    def operand(self, arg: fx.Node, like: Tensor, at: int) -> Any:
        """How a map reads a value, broadcast to ``like``: a number, a register, or memory."""
        value, view = self.resolve(arg)
        if value.number is not None:
            return value.number
        wide = torch.broadcast_to(view, like.shape)
        if value.map == at and self.holds(value, wide, self.rows(like), self.map_at(at).shape):
            return ("r", value.register)
        offset, _, strides = self.normal(wide, self.rows(like))
        return Access(self.in_memory(value, arg.name), offset, strides)

    def holds(self, value: Value, view: Tensor, rows: tuple[int, int] | None, shape: tuple[int, ...]) -> bool:
        """Whether a map over that shape has a view of a value, number for number, in a register."""
        if value.map is None or self.map_of(value).shape != shape:
            return False
        return self.normal(view, rows) == (0, shape, self.own_strides(shape))

    def map_over(self, shape: tuple[int, ...], first: int, reduced: int = 0) -> int:
        """The first map over that shape that may read what is ready from ``first`` on; a new one if there is none."""
        for index in range(first, len(self.items)):
            item = self.items[index]
            if isinstance(item, Map) and item.shape == shape and (not reduced or item.reduced in (0, reduced)):
                return index
        self.items.append(Map(shape))
        return len(self.items) - 1

    def write_to(self, source: fx.Node, access: Access, shape: tuple[int, ...]) -> int:
        """Also store a value at a place of that shape. Returns the first item that may read it there."""
        value, view = self.resolve(source)
        if value.map is not None:
            own = self.map_of(value).shape
            plain = self.normal(view, self.rows(view)) == (0, shape, self.own_strides(shape))
            whole = math.prod(shape) == math.prod(own) and access.strides == self.own_strides(shape)
            if plain and (own == shape or whole):  # neighbours either way, so looped over as the map does
                strides = access.strides if own == shape else self.own_strides(own)
                self.store(value, Access(access.buffer, access.offset, strides))
                return value.map + 1
        copy = self.values[self.copied(source, view)]
        self.store(copy, access)
        return copy.ready

    def refuse(self, node: fx.Node, name: str) -> UnsupportedError:
        """What to raise for an operation that cannot be compiled."""
        return UnsupportedError(f"{name} has no place in a compiled loop yet, at {location(node)}")


def made_here() -> None:
    """Stands for an operation that the lowering makes."""
