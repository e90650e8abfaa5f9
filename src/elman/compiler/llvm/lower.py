"""From the body of a loop to a list of items: products with weights, and maps over the features of every row.

A value is either in a register of one map, or in memory: with one row for each sequence at each step ("time"), one for
each sequence ("batch"), or the same for all ("shared"). How a view reads memory is worked out by PyTorch itself: the view
is made of a tensor without data, whose offset and strides say it. So slices, chunks, transposes and broadcasting cost
nothing here, in code or at run time.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ...errors import UnsupportedError
from ..step import arguments, batch_multiple, location
from . import pointwise
from .body import Body

__all__ = ["Access", "Buffer", "Chosen", "Contract", "Item", "Lowered", "Map", "Op", "Product", "buffers_of", "lower", "reads_of"]

Kind = Literal["time", "batch", "shared"]

_VIEWS = {
    "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "unsqueeze", "squeeze", "expand", "slice", "select",
    "split", "split_with_sizes", "unbind", "alias", "detach", "unflatten", "flatten", "chunk", "movedim",
}  # fmt: skip
_REDUCTIONS = {"sum": "sum", "amax": "max", "amin": "min", "prod": "prod"}
_FILLS = {"full", "scalar_tensor", "zeros", "ones", "full_like", "zeros_like", "ones_like"}
DTYPES = {torch.float32, torch.float64, torch.int64, torch.int32, torch.bool}


@dataclass(eq=False)
class Buffer:
    """Memory of a value: ``row`` numbers for each row."""

    name: str
    kind: Kind
    dtype: torch.dtype
    row: int
    role: str = "scratch"  # or input, spent (an input that is overwritten), state, output
    number: int = 0  # which of its role


@dataclass(frozen=True)
class Access:
    """Which numbers of a row: from ``offset`` on, ``strides`` apart along every dimension that is looped over."""

    buffer: Buffer
    offset: int
    strides: tuple[int, ...]

    def __str__(self) -> str:
        at = f"+{self.offset}" if self.offset else ""
        plain = all(s in (0, 1) for s in self.strides)
        return f"{self.buffer.name}{at}" + ("" if plain else f":{','.join(map(str, self.strides))}")


@dataclass(frozen=True)
class Chosen:
    """Rows of a table that is the same for all: the number of the row stands in memory."""

    table: Access
    number: Access
    width: int

    def __str__(self) -> str:
        return f"{self.table}[{self.number}]"


@dataclass(frozen=True)
class Op:
    """One pointwise operation of a map; its operands are registers (as ("r", number)), memory, or constants."""

    name: str
    operands: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]
    dtype: torch.dtype
    line: str = ""


@dataclass
class Map:
    """For every row and every index below ``shape``: operations, then stores.

    ``reductions`` are (register, kind, where): over the last ``reduced`` dimensions of the shape.
    """

    shape: tuple[int, ...]
    ops: list[Op] = field(default_factory=list)
    stores: list[tuple[int, Access]] = field(default_factory=list)
    reductions: list[tuple[int, str, Access]] = field(default_factory=list)
    reduced: int = 0


@dataclass
class Contract:
    """For every row and every index of ``shape``: a reduction over ``inner`` of the product of what is read."""

    shape: tuple[int, ...]
    inner: tuple[int, ...]
    reads: list[Access]
    kind: str
    out: Access
    init: Access | None = None


@dataclass
class Product:
    """out = init + left @ weight, for ``times`` rows of every row of the batch."""

    out: Access
    init: Access | None
    left: Access
    weight: tuple[Buffer, int, int, int] | Buffer  # a part of what is contiguous: offset, strides of K and N
    k: int
    n: int
    times: int
    chunk: int = 0  # columns that the maps after it take together


Item = Map | Contract | Product


@dataclass
class Lowered:
    """The items of one step, in order, and the memory that they use."""

    items: list[Item]
    buffers: list[Buffer]


@dataclass(eq=False)
class _Value:
    """What a node stands for before views: given, or computed by an item."""

    meta: Tensor  # without data, strides as they lie in a row
    ready: int  # the first item that may read it from memory
    buffer: Buffer | None = None
    offset: int = 0
    map: int | None = None  # the map that has it in a register
    register: int = -1


def lower(body: Body, states: dict[fx.Node, int], stored: Sequence[fx.Node], varying: set[fx.Node]) -> Lowered:
    """The items of a loop's step.

    ``states`` are inputs of the body that it replaces: by the result of that index. The results of the nodes in
    ``stored`` (nodes of the step) are written for every row and step. ``varying`` are inputs that differ from step to
    step. Raises UnsupportedError for what has no place in a kernel, with the user's line.
    """
    return _Lowering(body, states, stored, varying).run()


class _Lowering:
    def __init__(self, body: Body, states: dict[fx.Node, int], stored: Sequence[fx.Node], varying: set[fx.Node]):
        self.body, self.unit = body, body.unit
        self.items: list[Item] = []
        self.buffers: list[Buffer] = []
        self.values: dict[fx.Node, _Value] = {}
        self.views: dict[fx.Node, tuple[fx.Node, Any]] = {}
        self.numbers: dict[fx.Node, Any] = {}
        self.states = dict(states)
        self.stored = list(stored)
        self.aliases: dict[fx.Node, list[tuple[_Value, Access]]] = {}
        for i, (node, outer) in enumerate(zip(body.inputs, body.outside, strict=True)):
            self._given(node, i, "time" if outer in varying else None)

    # -- values -------------------------------------------------------------------------------------------------

    def _rows(self, value: Tensor) -> tuple[int, int] | None:
        found = [(d, k) for d, n in enumerate(value.shape) if (k := batch_multiple(int(n), self.unit))]
        return found[0] if found else None

    def _canonical(self, value: Tensor) -> Tensor:
        """A tensor without data, with the rows outermost in memory."""
        rows = self._rows(value)
        shape = [int(n) for n in value.shape]
        if rows is None:
            return torch.empty(self.unit, *shape, dtype=value.dtype, device="meta")[0]
        d, k = rows
        rest = [*shape[:d], *shape[d + 1 :]]
        meta = torch.empty(self.unit, k, *rest, dtype=value.dtype, device="meta")
        return meta.movedim((0, 1), (d, d + 1)).flatten(d, d + 1)

    def _given(self, node: fx.Node, number: int, kind: Kind | None) -> None:
        value = node.meta["val"]
        if not isinstance(value, Tensor) or value.dtype not in DTYPES:
            raise UnsupportedError(f"{getattr(value, 'dtype', type(value))} has no place in a compiled loop.")
        rows = self._rows(value)
        state = node in self.states
        buffer = self._buffer(node.name, kind or ("batch" if rows or state else "shared"), value)
        buffer.role, buffer.number = ("state" if state else "input"), number
        self.values[node] = _Value(self._canonical(value), 0, buffer)

    def _buffer(self, name: str, kind: Kind, value: Tensor) -> Buffer:
        row = math.prod(int(n) for n in value.shape) // (self.unit if self._rows(value) else 1)
        buffer = Buffer(name, kind, value.dtype, row)
        self.buffers.append(buffer)
        return buffer

    def _resolve(self, node: fx.Node) -> tuple[_Value, Tensor] | Any:
        """The value that a node is a view of, and that view; or the number that it is everywhere."""
        if node in self.numbers:
            return self.numbers[node]
        if node in self.values:
            return self.values[node], self.values[node].meta
        source, view = self.views[node]
        return self.values[source], view

    def _normal(self, view: Tensor, rows: tuple[int, int] | None) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """(offset, shape, strides) within a row, without dimensions of one."""
        if rows is not None:
            d, k = rows
            view = view.unflatten(d, (self.unit, k)).movedim((d, d + 1), (0, 1))[0]
        kept = [(int(n), int(s)) for n, s in zip(view.shape, view.stride(), strict=True) if n != 1]
        return int(view.storage_offset()), tuple(n for n, _ in kept), tuple(s for _, s in kept)

    def _own_strides(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))

    def _in_memory(self, value: _Value, name: str) -> Buffer:
        """The buffer of a value; a register gets one now."""
        if value.buffer is None:
            shape = self._normal(value.meta, self._rows(value.meta))[1]
            value.buffer = self._buffer(name, "batch", value.meta)
            self._store(value, Access(value.buffer, 0, self._own_strides(shape)))
        return value.buffer

    def _store(self, value: _Value, access: Access) -> None:
        assert value.map is not None
        item = self.items[value.map]
        assert isinstance(item, Map)
        if item.reduced and len(access.strides) == len(item.shape) - item.reduced:
            raise AssertionError("a reduction is stored where it is made")
        item.stores.append((value.register, access))

    def _access(self, node: fx.Node, like: Tensor | None = None) -> tuple[Access, _Value, tuple[int, ...]]:
        """How memory is read for a node, broadcast to ``like``. Also the value, and the shape that is looped over."""
        value, view = self._resolve(node)
        rows = self._rows(like if like is not None else view)
        if like is not None and tuple(view.shape) != tuple(like.shape):
            view = torch.broadcast_to(view, like.shape)
        offset, shape, strides = self._normal(view, rows)
        buffer = self._in_memory(value, node.name)
        return Access(buffer, offset + value.offset, strides), value, shape

    # -- the walk -----------------------------------------------------------------------------------------------

    def run(self) -> Lowered:
        for node in self.body.graph.nodes:
            if node.op == "call_function":
                self._node(node)
            elif node.op == "get_attr":
                self._constant(node)
        self._outputs()
        self._commit()
        self._chunks()
        return Lowered(self.items, [b for b in self.buffers if self._used(b)])

    def _used(self, buffer: Buffer) -> bool:
        return buffer.role != "scratch" or any(buffer in buffers_of(item) for item in self.items)

    def _constant(self, node: fx.Node) -> None:
        value = getattr(self.body.root, str(node.target))
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise UnsupportedError("a tensor made inside the step has no place in a compiled loop.")
        self.numbers[node] = value.item()

    def _node(self, node: fx.Node) -> None:
        name = "getitem" if node.target is operator.getitem else node.target._schema.name.split("::")[1]  # type: ignore[union-attr]
        value = node.meta["val"]
        if name == "getitem" or (name in _VIEWS and isinstance(node.args[0], fx.Node)):
            self._view(node, name)
        elif name in _FILLS:
            self.numbers[node] = self._fill(node, name)
        elif not isinstance(value, Tensor) or value.dtype not in DTYPES:
            raise self._refuse(node, name)
        elif name in ("mm", "addmm"):
            self._product(node)
        elif name in ("bmm", "baddbmm"):
            self._batched(node)
        elif name == "argmax":
            self._argmax(node)
        elif name == "embedding":
            self._embedding(node)
        elif name in _REDUCTIONS:
            self._reduction(node, _REDUCTIONS[name])
        elif name in ("cat", "stack"):
            dim = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
            self._cat(node, list(node.args[0]), dim, stacked=name == "stack")  # type: ignore[arg-type]
        elif name in ("slice_scatter", "select_scatter"):
            self._scatter(node, name)
        elif pointwise.supports(name):
            self._pointwise(node, name)
        else:
            raise self._refuse(node, name)

    def _refuse(self, node: fx.Node, name: str) -> UnsupportedError:
        return UnsupportedError(f"{name} has no place in a compiled loop yet, at {location(node)}")

    def _fill(self, node: fx.Node, name: str) -> Any:
        if "zeros" in name or "ones" in name:
            number: Any = 1 if "ones" in name else 0
        else:
            number = node.args[0] if name == "scalar_tensor" else node.args[1]
        dtype = node.meta["val"].dtype
        return bool(number) if dtype == torch.bool else float(number) if dtype.is_floating_point else int(number)

    def _view(self, node: fx.Node, name: str) -> None:
        if name == "getitem":
            source, parts = self.views[node.args[0]]  # type: ignore[index]
            self.views[node] = (source, parts[node.args[1]])  # type: ignore[index]
            return
        source_node: fx.Node = node.args[0]  # type: ignore[assignment]
        if source_node in self.numbers:
            self.numbers[node] = self.numbers[source_node]
            return
        value, view = self._resolve(source_node)
        base = next(n for n, v in self.values.items() if v is value)
        try:
            if name in ("view", "_unsafe_view", "reshape"):
                made = view.view(*_integers(node.args[1:]))
            else:
                made = node.target(view, *node.args[1:], **node.kwargs)  # type: ignore[operator]
        except RuntimeError:  # not a view of how it lies: copied, then viewed
            copy = self._copied(source_node, view)
            base, view = copy, self.values[copy].meta
            made = view.reshape(*_integers(node.args[1:])) if name in ("view", "_unsafe_view", "reshape") else None
            if made is None or not made._is_view():
                raise self._refuse(node, name) from None
        self.views[node] = (base, made)

    def _copied(self, node: fx.Node, view: Tensor) -> fx.Node:
        """A value of its own with the numbers of a view."""
        copy = fx.Node(self.body.graph, f"{node.name}_copy", "call_function", _copy, (node,), {})
        copy.meta = {**node.meta, "val": torch.empty(view.shape, dtype=view.dtype, device="meta")}
        self._pointwise(copy, "clone")
        return copy

    def _pointwise(self, node: fx.Node, name: str) -> None:
        like = self._canonical(node.meta["val"])
        shape = self._normal(like, self._rows(like))[1]
        first = 0
        wanted: list[tuple[Any, bool]] = []
        for arg in node.args:
            if isinstance(arg, (list, tuple)):
                raise self._refuse(node, name)
            if not isinstance(arg, fx.Node):
                wanted.append((arg, False))
                continue
            found = self._resolve(arg)
            if not (isinstance(found, tuple) and isinstance(found[0], _Value)):
                wanted.append((found, False))
                continue
            value, view = found
            here = self._held(value, torch.broadcast_to(view, like.shape), self._rows(like), shape)
            wanted.append((arg, True))
            first = max(first, value.map if here else value.ready)  # type: ignore[type-var]
        index = self._map(shape, first)
        item = self.items[index]
        assert isinstance(item, Map)
        operands: list[Any] = []
        for arg, is_node in wanted:
            operands.append(self._operand(arg, like, shape, index) if is_node else arg)
        keywords = tuple((k, v) for k, v in node.kwargs.items() if v is not None and k not in _IGNORED)
        item.ops.append(Op(name, tuple(operands), keywords, node.meta["val"].dtype, location(node)))
        self.values[node] = _Value(like, index + 1, map=index, register=len(item.ops) - 1)

    def _operand(self, arg: fx.Node, like: Tensor, shape: tuple[int, ...], index: int) -> Any:
        value, view = self._resolve(arg)
        if value.map == index and self._held(value, torch.broadcast_to(view, like.shape), self._rows(like), shape):
            return ("r", value.register)
        return self._access(arg, like)[0]

    def _held(self, value: _Value, view: Tensor, rows: tuple[int, int] | None, shape: tuple[int, ...]) -> bool:
        """Whether a map over that shape has a view of a value, number for number, in a register."""
        if value.map is None:
            return False
        item = self.items[value.map]
        plain = self._normal(view, rows) == (0, shape, self._own_strides(shape))
        return isinstance(item, Map) and item.shape == shape and plain

    def _map(self, shape: tuple[int, ...], first: int, reduced: int = 0) -> int:
        """The first map over that shape that may read what is ready from ``first`` on; a new one where there is none."""
        for index in range(first, len(self.items)):
            item = self.items[index]
            if isinstance(item, Map) and item.shape == shape and (not reduced or item.reduced in (0, reduced)):
                return index
        self.items.append(Map(shape))
        return len(self.items) - 1

    def _reduction(self, node: fx.Node, kind: str) -> None:
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        found = self._resolve(source)
        if node.meta["val"].dtype != source.meta["val"].dtype or not isinstance(found, tuple):
            raise self._refuse(node, f"{kind} of another type")
        value, view = found
        dims = node.args[1] if len(node.args) > 1 else []
        rows = self._rows(view)
        every = [d for d in range(view.dim()) if rows is None or d != rows[0]]
        over = [d % view.dim() for d in ([dims] if isinstance(dims, int) else dims or every)]
        meta = self._canonical(node.meta["val"])
        trailing = rows is not None and rows[1] == 1 and sorted(over) == every[len(every) - len(over) :]
        if not trailing:
            self._contract(node, [source], over, kind, meta)
            return
        shape = self._normal(view, rows)[1]
        reduced = sum(int(view.shape[d]) != 1 for d in over)
        if not reduced:
            self.views[node] = (self._copied(node.args[0], view), meta)  # type: ignore[arg-type]
            return
        here = self._held(value, view, rows, shape)
        index = self._map(shape, value.map if here else value.ready, reduced)  # type: ignore[arg-type]
        item = self.items[index]
        assert isinstance(item, Map)
        item.reduced = reduced
        operand = self._operand(source, view, shape, index)
        if not isinstance(operand, tuple):
            item.ops.append(Op("clone", (operand,), (), node.meta["val"].dtype, location(node)))
            operand = ("r", len(item.ops) - 1)
        buffer = self._buffer(node.name, "batch", node.meta["val"])
        outer = shape[: len(shape) - reduced]
        item.reductions.append((operand[1], kind, Access(buffer, 0, self._own_strides(outer))))
        self.values[node] = _Value(meta, index + 1, buffer)

    def _argmax(self, node: fx.Node) -> None:
        source, dim, _ = (*arguments(node), None, False)[:3]
        if dim is None:
            raise self._refuse(node, "argmax over all dimensions")
        self._contract(node, [source], [dim % source.meta["val"].dim()], "argmax", self._canonical(node.meta["val"]))

    def _embedding(self, node: fx.Node) -> None:
        """Rows of a table; only where their numbers were counted here, for nothing else is sure to be in range."""
        table, index = arguments(node)[:2]
        (value, view), (number, where) = self._resolve(table), self._resolve(index)
        counted = any(isinstance(i, Contract) and i.kind == "argmax" and i.out.buffer is number.buffer for i in self.items)
        if not counted or value.buffer is None or value.buffer.kind != "shared" or not view.is_contiguous():
            raise self._refuse(node, "embedding of numbers from outside")
        like = self._canonical(node.meta["val"])
        rows = self._rows(like)
        shape = self._normal(like, rows)[1]
        width = int(view.shape[1])
        strides = (*(0,) * (len(shape) - (width != 1)), *((1,) if width != 1 else ()))
        table_access = Access(value.buffer, int(view.storage_offset()) + value.offset, strides)
        offset, _, number_strides = self._normal(where.unsqueeze(-1).expand(*where.shape, width), rows)
        chosen = Chosen(table_access, Access(number.buffer, offset + number.offset, number_strides), width)
        item = self.items[at := self._map(shape, number.ready)]
        assert isinstance(item, Map)
        item.ops.append(Op("clone", (chosen,), (), node.meta["val"].dtype, location(node)))
        self.values[node] = _Value(like, at + 1, map=at, register=len(item.ops) - 1)

    def _contract(self, node: fx.Node, sources: list[fx.Node], over: list[int], kind: str, meta: Tensor) -> None:
        """A reduction over dimensions in the middle: its own item."""
        reads, shape, inner = [], (), ()
        for source in sources:
            _, view = self._resolve(source)
            rows = self._rows(view)
            if rows is None or rows[1] != 1:
                raise self._refuse(node, kind)
            feature = view.movedim(rows[0], 0)[0]
            over_features = [d - (d > rows[0]) for d in over]
            kept = [d for d in range(feature.dim()) if d not in over_features and feature.shape[d] != 1]
            gone = [d for d in over_features if feature.shape[d] != 1]
            self._in_memory(self._resolve(source)[0], source.name)
            value = self._resolve(source)[0]
            strides = tuple(int(feature.stride(d)) for d in (*kept, *gone))
            shape, inner = (tuple(int(feature.shape[d]) for d in some) for some in (kept, gone))
            reads.append(Access(value.buffer, int(feature.storage_offset()) + value.offset, strides))  # type: ignore[arg-type]
        buffer = self._buffer(node.name, "batch", node.meta["val"])
        out = Access(buffer, 0, self._own_strides(shape))
        self.items.append(Contract(shape, inner, reads, kind, out))
        self.values[node] = _Value(meta, len(self.items), buffer)

    def _batched(self, node: fx.Node) -> None:
        """bmm: for every sequence a product of two matrices of its own."""
        *bias, left, right = arguments(node)
        if bias or node.kwargs:
            raise self._refuse(node, "baddbmm")
        (_, a), (b_value, b) = self._resolve(left), self._resolve(right)
        if (self._rows(a) or (0,))[0] == 1 and self._rows(b) is None:
            self._grouped(node, left, right)
            return
        if (self._rows(a) or (0,))[0] or (self._rows(b) or (0,))[0]:
            raise self._refuse(node, "a product of two values that vary")
        (g, m, k), n = (int(size) for size in a.shape), int(b.shape[2])
        g //= self.unit
        first, second = (v.unflatten(0, (self.unit, g))[0] for v in (a, b))
        wide = first.unsqueeze(2).expand(g, m, n, k), second.transpose(1, 2).unsqueeze(1).expand(g, m, n, k)
        kept = [d for d, size in enumerate((g, m, n)) if size != 1]
        reads = []
        for source, view in zip((left, right), wide, strict=True):
            value = self._resolve(source)[0]
            strides = (*(int(view.stride(d)) for d in kept), int(view.stride(3)))
            at = int(view.storage_offset()) + value.offset
            reads.append(Access(self._in_memory(value, source.name), at, strides))
        shape = tuple((g, m, n)[d] for d in kept)
        buffer = self._buffer(node.name, "batch", node.meta["val"])
        self.items.append(Contract(shape, (k,), reads, "sum", Access(buffer, 0, self._own_strides(shape))))
        self.values[node] = _Value(self._canonical(node.meta["val"]), len(self.items), buffer)

    def _grouped(self, node: fx.Node, left: fx.Node, right: fx.Node) -> None:
        """bmm of (groups, B, K) with weights (groups, K, N): a product for each group, side by side."""
        (_, a), (weight, b) = self._resolve(left), self._resolve(right)
        if self._rows(a) != (1, 1) or weight.buffer is None or weight.buffer.kind != "shared":
            raise self._refuse(node, "a product of two values that vary")
        groups, k, n = (int(size) for size in b.shape)
        if int(a.stride(2)) != 1 and k != 1:
            left = self._copied(left, a)
            a = self.values[left].meta
        value = self._resolve(left)[0]
        source = self._in_memory(value, left.name)
        buffer = self._buffer(node.name, "batch", node.meta["val"])
        meta = self._canonical(node.meta["val"])
        for group in range(groups):
            at = int(a[group].storage_offset()) + value.offset
            part = int(b[group].storage_offset()) + weight.offset
            out = Access(buffer, int(meta[group].storage_offset()), (1,))
            where = (weight.buffer, part, int(b.stride(1)), int(b.stride(2)))
            self.items.append(Product(out, None, Access(source, at, (1,)), where, k, n, 1))
        self.values[node] = _Value(meta, len(self.items), buffer)

    def _product(self, node: fx.Node) -> None:
        *bias, left, right = arguments(node)
        if node.kwargs:
            raise self._refuse(node, "addmm with factors")
        (a_value, a), (b_value, b) = self._resolve(left), self._resolve(right)
        if self._rows(a) is None:  # W hᵀ: the same as h Wᵀ, transposed, and rows come first in memory anyway
            left, right, a, b, a_value, b_value = right, left, b.t(), a.t(), b_value, a_value
        if self._rows(b) is not None or b_value.buffer is None or b_value.buffer.kind != "shared":
            raise self._refuse(node, "a product of two values that vary")
        access, times, k = self._matrix(left, a)
        n = int(b.shape[1])
        init, late = None, None
        like = self._canonical(node.meta["val"])
        if bias:
            init, late = self._initial(bias[0], like, times)
        buffer = self._buffer(node.name, "batch", node.meta["val"])
        plain = b_value.meta.shape == b.shape and b_value.meta.stride() == b.stride()
        part = (b_value.buffer, int(b.storage_offset()) + b_value.offset, int(b.stride(0)), int(b.stride(1)))
        weight: Any = b_value.buffer if plain else part
        out = Access(buffer, 0, (n, 1) if times > 1 else (1,))
        self.items.append(Product(out, init, access, weight, k, n, times))
        self.values[node] = _Value(like, len(self.items), buffer)
        if late is not None:  # what is added lies too far apart to start from
            product = self.values.pop(node)
            source = fx.Node(self.body.graph, f"{node.name}_product", "call_function", _copy, (), {})
            source.meta = dict(node.meta)
            self.values[source] = product
            added = fx.Node(self.body.graph, f"{node.name}_added", "call_function", _copy, (source, late), {})
            added.meta = dict(node.meta)
            self._pointwise(added, "add")
            self.values[node] = self.values.pop(added)

    def _matrix(self, node: fx.Node, view: Tensor) -> tuple[Access, int, int]:
        """The left side of a product: rows of neighbouring numbers, so many for each sequence."""
        rows = self._rows(view)
        assert rows is not None
        for attempt in (0, 1):
            d, times = rows
            feature = view.unflatten(d, (self.unit, times)).movedim((d, d + 1), (0, 1))[0]  # (times, K)
            value = self._resolve(node)[0]
            if int(feature.stride(1)) == 1 or feature.shape[1] == 1 or attempt:
                break
            node = self._copied(node, view)
            view = self.values[node].meta
        buffer = self._in_memory(value, node.name)
        strides = (int(feature.stride(0)), 1) if times > 1 else (1,)
        return Access(buffer, int(feature.storage_offset()) + value.offset, strides), times, int(feature.shape[1])

    def _initial(self, node: fx.Node, like: Tensor, times: int) -> tuple[Access | None, fx.Node | None]:
        """What a product is added to: where its sum can start from, or what must be added after it."""
        found = self._resolve(node)
        if not (isinstance(found, tuple) and isinstance(found[0], _Value)):
            return None, node
        value, view = found
        d, _ = self._rows(like)  # type: ignore[misc]
        wide = torch.broadcast_to(view, like.shape).unflatten(d, (self.unit, times)).movedim((d, d + 1), (0, 1))[0]
        if int(wide.stride(1)) != 1 and wide.shape[1] != 1:
            return None, node
        buffer = self._in_memory(value, node.name)
        strides = (int(wide.stride(0)), 1) if times > 1 else (1,)
        return Access(buffer, int(wide.storage_offset()) + value.offset, strides), None

    def _scatter(self, node: fx.Node, name: str) -> None:
        """A value with a part replaced is what stands before the part, the part, and what stands after it, joined."""
        given = arguments(node)
        into, part, dim, start, end, step = (*given, *(None, None, 0, None, None, 1)[len(given) :])
        size, dim = int(node.meta["val"].shape[dim]), dim % node.meta["val"].dim()
        if name == "select_scatter":
            start, end, step = start % size, start % size + 1, 1
        start, end, _ = slice(start, end).indices(size)
        if step != 1:
            raise self._refuse(node, f"{name} with a step")
        pieces = [self._narrowed(into, dim, 0, start), part, self._narrowed(into, dim, end, size - end)]
        self._cat(node, pieces, dim, stacked=False, middle=name == "select_scatter")

    def _narrowed(self, node: fx.Node, dim: int, start: int, size: int) -> fx.Node:
        """Part of a value, as a node that is a view of it."""
        narrow = fx.Node(self.body.graph, f"{node.name}_part", "call_function", _copy, (node,), {})
        value = node.meta["val"]
        narrow.meta = {**node.meta, "val": torch.empty(value.shape, dtype=value.dtype, device="meta").narrow(dim, start, size)}
        found = self._resolve(node)
        if isinstance(found, tuple) and isinstance(found[0], _Value):
            base = next(n for n, v in self.values.items() if v is found[0])
            self.views[narrow] = (base, found[1].narrow(dim, start, size))
        else:
            self.numbers[narrow] = found
        return narrow

    def _cat(self, node: fx.Node, sources: list[fx.Node], dim: int, *, stacked: bool, middle: bool = False) -> None:
        """Every part is written straight into its place; of a stack, and of the one in the middle, without its dim."""
        meta = self._canonical(node.meta["val"])
        dim %= meta.dim()
        rows = self._rows(meta)
        if rows is not None and rows[0] == dim:
            raise self._refuse(node, "joining along the rows")
        buffer = self._buffer(node.name, "batch", node.meta["val"])
        at = 0
        whole = _Value(meta, 0, buffer)
        for i, source in enumerate(sources):
            alone = stacked or (middle and i == 1)
            size = 1 if alone else int(source.meta["val"].shape[dim])
            place = meta.narrow(dim, at, size)
            at += size
            if place.numel():
                offset, inner, strides = self._normal(place, rows)
                whole.ready = max(whole.ready, self._write(source, Access(buffer, offset, strides), inner))
        self.values[node] = whole

    def _write(self, source: fx.Node, access: Access, shape: tuple[int, ...]) -> int:
        """Also store a value at a place of that shape. Returns the first item that may read it there."""
        found = self._resolve(source)
        given = isinstance(found, tuple) and isinstance(found[0], _Value)
        if given and found[0].map is not None:
            value, view = found
            item = self.items[value.map]
            plain = self._normal(view, self._rows(view)) == (0, shape, self._own_strides(shape))
            whole = math.prod(shape) == math.prod(item.shape) and access.strides == self._own_strides(shape)
            if plain and (item.shape == shape or whole):  # neighbours either way, so looped over as the map does
                strides = access.strides if item.shape == shape else self._own_strides(item.shape)
                self._store(value, Access(access.buffer, access.offset, strides))
                return value.map + 1
        copy = self._copied(source, found[1] if given else source.meta["val"])
        value = self.values[copy]
        assert value.map is not None
        self._store(value, access)
        return value.map + 1

    # -- the ends -----------------------------------------------------------------------------------------------

    def _outputs(self) -> None:
        """What others read is written for every row and step: where a value has a buffer of its own, that is it."""
        for outer in self.stored:
            node = self.body.results[self.body.outputs.index(outer)]
            found = self._resolve(node)
            number = self.stored.index(outer)
            value = found[0] if isinstance(found, tuple) and isinstance(found[0], _Value) else None
            buffer = value.buffer if value is not None and found[1] is value.meta else None
            if buffer is not None and buffer.role == "scratch" and value is not None and not value.offset:
                buffer.kind, buffer.role, buffer.number = "time", "output", number
                continue
            out = Buffer(outer.name, "time", node.meta["val"].dtype, self._buffer_row(node), "output", number)
            self.buffers.append(out)
            meta = self._canonical(node.meta["val"])
            shape = self._normal(meta, self._rows(meta))[1]
            self._write(node, Access(out, 0, self._own_strides(shape)), shape)

    def _buffer_row(self, node: fx.Node) -> int:
        value = node.meta["val"]
        return math.prod(int(n) for n in value.shape) // (self.unit if self._rows(value) else 1)

    def _commit(self) -> None:
        """Replace every state by its next: at once where nothing reads the old one later, else at the end."""
        late: list[tuple[fx.Node, fx.Node]] = []
        following = {state: self.body.results[i] for state, i in self.states.items()}
        for state, node in following.items():  # what is handed on is copied before anything replaces it
            found = self._resolve(node)
            if node is not state and isinstance(found, tuple) and isinstance(found[0], _Value):
                value, view = found
                if value.buffer is not None and value.buffer.role == "state":
                    following[state] = self._copied(node, view)
        for state, node in following.items():
            if node is state:
                continue
            found = self._resolve(node)
            meta = self.values[state].meta
            shape = self._normal(meta, self._rows(meta))[1]
            buffer = self.values[state].buffer
            assert buffer is not None
            if isinstance(found, tuple) and isinstance(found[0], _Value):
                value, view = found
                if self._straight(value, view, buffer):
                    continue
                if self._held(value, view, self._rows(view), shape) and self._free(buffer, value.map):  # type: ignore[arg-type]
                    self._store(value, Access(buffer, 0, self._own_strides(shape)))
                    continue
            late.append((state, node))
        if not late:
            return
        for _, node in late:  # everything that is replaced at the end is in memory before
            found = self._resolve(node)
            if isinstance(found, tuple) and isinstance(found[0], _Value):
                self._in_memory(found[0], node.name)
        start = len(self.items)
        for state, node in late:
            meta = self.values[state].meta
            shape = self._normal(meta, self._rows(meta))[1]
            found = self._resolve(node)
            numeric = not (isinstance(found, tuple) and isinstance(found[0], _Value))
            operand = found if numeric else self._access(node, meta)[0]
            index = self._map(shape, start)
            item = self.items[index]
            assert isinstance(item, Map)
            item.ops.append(Op("clone", (operand,), (), meta.dtype))
            buffer = self.values[state].buffer
            assert buffer is not None
            item.stores.append((len(item.ops) - 1, Access(buffer, 0, self._own_strides(shape))))

    def _straight(self, value: _Value, view: Tensor, state: Buffer) -> bool:
        """Let a product write its sum where the state is, if nothing else wants either."""
        made = next(
            (i for i, p in enumerate(self.items) if isinstance(p, Product) and p.out.buffer is value.buffer), -1
        )
        if made < 0 or view is not value.meta or value.buffer is None or value.buffer.role != "scratch":
            return False
        product, later = self.items[made], self.items[made + 1 :]
        assert isinstance(product, Product)
        if product.left.buffer is state or any({state, value.buffer} & buffers_of(item) for item in later):
            return False
        product.out = Access(state, 0, product.out.strides)
        value.buffer = state
        return True

    def _free(self, buffer: Buffer, index: int) -> bool:
        """Whether a state may be overwritten by a map: nothing reads it later, nor elsewhere in the same row."""
        for later in self.items[index + 1 :]:
            if buffer in buffers_of(later):
                return False
        item = self.items[index]
        assert isinstance(item, Map)
        own = self._own_strides(item.shape)
        reads = [a for a in reads_of(item) if a.buffer is buffer]
        return all(a.offset == 0 and a.strides == own for a in reads)

    def _chunks(self) -> None:
        """Columns of a product that are taken together: the width of the maps that read it, where all agree."""
        for item in self.items:
            if isinstance(item, Product):
                widths = {
                    other.shape[-1]
                    for other in self.items
                    if isinstance(other, Map) and other.shape
                    for a in reads_of(other)
                    if a.buffer is item.out.buffer
                }
                width = next(iter(widths)) if len(widths) == 1 else item.n
                item.chunk = width if item.n % width == 0 else item.n


_IGNORED = {"memory_format", "layout", "device", "pin_memory", "non_blocking", "dtype"}


def _copy() -> None:
    """Stands for a copy that the lowering makes."""


def reads_of(item: Map) -> list[Access]:
    """All memory that a map reads."""
    given = [a for op in item.ops for a in op.operands]
    chosen = [part for a in given if isinstance(a, Chosen) for part in (a.table, a.number)]
    return [*(a for a in given if isinstance(a, Access)), *chosen]


def _integers(args: Any) -> tuple[int, ...]:
    first = args[0]
    return tuple(int(n) for n in (first if isinstance(first, (list, tuple)) else args))


def buffers_of(item: Item) -> set[Buffer]:
    """All memory that an item reads or writes."""
    if isinstance(item, Map):
        reads = {a.buffer for a in reads_of(item)}
        return reads | {a.buffer for _, a in item.stores} | {a.buffer for _, _, a in item.reductions}
    if isinstance(item, Contract):
        return {a.buffer for a in (*item.reads, item.out)}
    more = {item.init.buffer} if item.init else set()
    return {item.out.buffer, item.left.buffer} | more
