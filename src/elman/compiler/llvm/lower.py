"""From the body of a loop to a list of items: products with weights, and maps over the features of every row.

Every operation goes into the first map over its shape that may read what it needs, and stays in a register there; what
another map or a product reads has a place in memory. Views and concatenations are no operations at all.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ...errors import UnsupportedError
from ..step import arguments, location
from . import pointwise
from .body import Body
from .ends import Ends
from .items import Access, Buffer, Chosen, Contract, Item, Lowered, Map, Op, Product, buffers_of
from .numeric import Numeric
from .products import Products
from .values import DTYPES, Value

__all__ = ["lower"]

_VIEWS = {
    "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "unsqueeze", "squeeze", "expand", "slice", "select",
    "split", "split_with_sizes", "unbind", "alias", "detach", "unflatten", "flatten", "chunk", "movedim",
}  # fmt: skip
_REDUCTIONS = {"sum": "sum", "amax": "max", "amin": "min", "prod": "prod"}
_OF_FLOATS = {"mm", "addmm", "bmm", "baddbmm", "argmax"}
_FILLS = {"full", "scalar_tensor", "zeros", "ones", "full_like", "zeros_like", "ones_like"}


def lower(
    body: Body,
    states: dict[fx.Node, int],
    stored: Sequence[fx.Node],
    varying: set[fx.Node],
    narrow: Mapping[torch.dtype, Numeric] | None = None,
) -> Lowered:
    """The items of a loop's step.

    ``states`` are inputs of the body that it replaces: by the result of that index. The results of the nodes in
    ``stored`` (nodes of the step) are written for every row and step. ``varying`` are inputs that differ from step to
    step. ``narrow`` are the types whose products multiply bfloat16, and by which mode. Raises UnsupportedError for what
    has no place in a kernel, with the user's line.
    """
    return _Lowering(body, states, stored, varying, narrow or {}).run()


class _Lowering(Products, Ends):
    """The walk over the nodes."""

    def run(self) -> Lowered:
        for node in self.body.graph.nodes:
            if node.op == "call_function":
                self._node(node)
            elif node.op == "get_attr":
                self._constant(node)
        self.outputs()
        self.commit()
        self.chunks()
        if any(0 in _sizes(item) for item in self.items):
            raise UnsupportedError("a value without features has no place in a compiled loop.")
        return Lowered(self.items, [b for b in self.buffers if self._used(b)])

    def _used(self, buffer: Buffer) -> bool:
        return buffer.role != "scratch" or any(buffer in buffers_of(item) for item in self.items)

    def _constant(self, node: fx.Node) -> None:
        value = getattr(self.body.root, str(node.target))
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise UnsupportedError("a tensor made inside the step has no place in a compiled loop.")
        self.values[node] = Value(self.canonical(value), number=value.item())

    def _node(self, node: fx.Node) -> None:
        name = "getitem" if node.target is operator.getitem else node.target._schema.name.split("::")[1]  # type: ignore[union-attr]
        value = node.meta["val"]
        if name == "getitem" or (name in _VIEWS and isinstance(node.args[0], fx.Node)):
            self._view(node, name)
        elif name == "clone" and node.all_input_nodes[0] in self.states:  # nothing replaces it before the step ends
            self.views[node] = self.resolve(node.all_input_nodes[0])
        elif name in _FILLS:
            self.values[node] = Value(self.canonical(value), number=self._fill(node, name))
        elif not isinstance(value, Tensor) or value.dtype not in DTYPES:
            raise self.refuse(node, name)
        elif name in _OF_FLOATS and not all(n.meta["val"].is_floating_point() for n in node.all_input_nodes):
            raise self.refuse(node, f"{name} of whole numbers")
        elif name in ("mm", "addmm"):
            self.product(node)
        elif name in ("bmm", "baddbmm"):
            self.batched(node)
        elif name == "arange":
            self._arange(node)
        elif name == "argmax":
            self._argmax(node)
        elif name == "embedding":
            self._embedding(node)
        elif name in _REDUCTIONS:
            self._reduction(node, _REDUCTIONS[name])
        elif name == "cumsum":
            self._running_sum(node)
        elif name == "flip":
            self._flip(node)
        elif name == "constant_pad_nd":
            self._pad(node)
        elif name in ("cat", "stack"):
            dim = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
            self._cat(node, list(node.args[0]), dim, stacked=name == "stack")  # type: ignore[arg-type]
        elif name in ("slice_scatter", "select_scatter"):
            self._scatter(node, name)
        elif pointwise.supports(name):
            self.pointwise(node, name)
        else:
            raise self.refuse(node, name)

    def _fill(self, node: fx.Node, name: str) -> Any:
        if "zeros" in name or "ones" in name:
            number: Any = 1 if "ones" in name else 0
        else:
            number = node.args[0] if name == "scalar_tensor" else node.args[1]
        return torch.tensor(number, dtype=node.meta["val"].dtype, device="cpu").item()  # as exact as its type is

    def _view(self, node: fx.Node, name: str) -> None:
        if name == "getitem":
            whole, parts = self.views[node.args[0]]  # type: ignore[index]
            self.views[node] = (whole, parts[node.args[1]])
            return
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        value = node.meta["val"]
        if isinstance(value, Tensor) and value.dtype != source.meta["val"].dtype:
            raise self.refuse(node, "reading numbers as another type")
        base, view = self.resolve(source)
        reshape = name in ("view", "_unsafe_view", "reshape")

        def made(view: Tensor) -> Any:
            target: Any = node.target
            return view.view(*_integers(node.args[1:])) if reshape else target(view, *node.args[1:], **node.kwargs)

        try:
            self.views[node] = (base, made(view))
        except RuntimeError:  # not a view of how it lies: copied, then viewed
            copy = self.values[self.copied(source, view)]
            self.views[node] = (copy, made(copy.meta))

    def _reduction(self, node: fx.Node, kind: str) -> None:
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        view = self.resolve(source)[1]
        dims: Any = node.args[1] if len(node.args) > 1 else []
        if kind == "sum" and source.meta["val"].dtype == torch.bool:  # counting
            source = self._counts(node, source)
            view = self.resolve(source)[1]
        elif node.meta["val"].dtype != view.dtype or not view.is_floating_point():
            raise self.refuse(node, f"{kind} of whole numbers")
        rows = self.rows(view)
        every = [d for d in range(view.dim()) if rows is None or d != rows[0]]
        over = [d % view.dim() for d in ([dims] if isinstance(dims, int) else dims or every)]
        meta = self.canonical(node.meta["val"])
        if rows is not None and kind == "sum" and over == [rows[0]] and rows[1] == 1 and view.is_floating_point():
            self._row_sum(node, source)
            return
        if rows is not None and rows[0] in over:
            raise self.refuse(node, "a sum over rows and features")
        trailing = rows is not None and rows[1] == 1 and sorted(over) == every[len(every) - len(over) :]
        if not trailing:
            self._contract(node, source, over, kind, meta)
            return
        shape = self.normal(view, rows)[1]
        reduced = sum(int(view.shape[d]) != 1 for d in over)
        if not reduced:
            self.views[node] = (self.values[self.copied(source, view)], meta)
            return
        index, register = self._register(source, reduced)
        self.map_at(index).reduced = reduced
        buffer = self.new_buffer(node.name, "batch", node.meta["val"])
        outer = shape[: len(shape) - reduced]
        self.map_at(index).reductions.append((register, kind, Access(buffer, 0, self.own_strides(outer))))
        self.values[node] = Value(meta, index + 1, buffer)

    def _counts(self, node: fx.Node, source: fx.Node) -> fx.Node:
        """Truth values as the whole numbers 0 and 1."""
        value = source.meta["val"]
        counts = self.made(
            f"{source.name}_counts", torch.empty(value.shape, dtype=torch.int64, device="meta"), source, like=node
        )
        self.pointwise(counts, "_to_copy")
        return counts

    def _register(self, source: fx.Node, reduced: int = 0) -> tuple[int, int]:
        """A map over the shape of a value, and the register in which it has it."""
        value, view = self.resolve(source)
        shape = self.shape_of(view)
        here = value.map is not None and self.holds(value, view, self.rows(view), shape)
        index = self.map_over(shape, (value.map or 0) if here else value.ready, reduced)
        operand = self.operand(source, view, index)
        if isinstance(operand, tuple):
            return index, operand[1]
        ops = self.map_at(index).ops
        ops.append(Op("clone", (operand,), (), source.meta["val"].dtype, location(source)))
        return index, len(ops) - 1

    def _row_sum(self, node: fx.Node, source: fx.Node) -> None:
        """A sum over the rows of all steps; of values that were joined, that of each where it is computed."""
        parts = self._parts(source)
        if not parts:
            index, register = self._register(source)
            parts = [(index, register, 0, self.own_strides(self.map_at(index).shape))]
        buffer = self.new_buffer(node.name, "thread", node.meta["val"])
        buffer.role, buffer.number = "sum", -1
        for index, register, offset, strides in parts:
            self.map_at(index).sums.append((register, Access(buffer, offset, strides)))
        self.values[node] = Value(self.canonical(node.meta["val"]), max(part[0] for part in parts) + 1, buffer)

    def _parts(self, source: fx.Node) -> list[tuple[int, int, int, tuple[int, ...]]]:
        """Of all of a value in memory that maps have written: which map has which part in which register, and where."""
        value, view = self.resolve(source)
        shape = self.shape_of(view)
        if value.map is not None or self.normal(view, self.rows(view)) != (0, shape, self.own_strides(shape)):
            return []
        maps = [(i, item) for i, item in enumerate(self.items) if isinstance(item, Map)]
        found = [(i, item, *store) for i, item in maps for store in item.stores if store[1].buffer is value.buffer]
        whole = sum(math.prod(item.shape) for _, item, _, _ in found)
        if value.buffer is None or whole != value.buffer.row:
            return []
        return [(i, register, access.offset, access.strides) for i, _, register, access in found]

    def _arange(self, node: fx.Node) -> None:
        """Whole numbers, evenly apart along the features."""
        like = self.canonical(node.meta["val"])
        start, _, step = {1: (0, 0, 1), 2: (*node.args, 1), 3: node.args}[len(node.args)]
        if like.dtype != torch.int64:
            raise self.refuse(node, "arange of numbers that are not whole")
        op = Op("arange", (start, step), (), like.dtype, location(node))
        self.operation(node, op, like, self.map_over(self.shape_of(like), 0))

    def _argmax(self, node: fx.Node) -> None:
        source, dim, _ = (*arguments(node), None, False)[:3]
        if dim is None:
            raise self.refuse(node, "argmax over all dimensions")
        self._contract(node, source, [dim % source.meta["val"].dim()], "argmax", self.canonical(node.meta["val"]))

    def _embedding(self, node: fx.Node) -> None:
        """Rows of a table; only where their numbers were counted here, for nothing else is sure to be in range."""
        table, index = arguments(node)[:2]
        (value, view), (number, where) = self.resolve(table), self.resolve(index)
        counted = any(
            isinstance(i, Contract) and i.kind == "argmax" and i.out.buffer is number.buffer for i in self.items
        )
        if not counted or value.buffer is None or value.buffer.kind != "shared" or not view.is_contiguous():
            raise self.refuse(node, "embedding of numbers from outside")
        like = self.canonical(node.meta["val"])
        rows = self.rows(like)
        shape = self.normal(like, rows)[1]
        width = int(view.shape[1])
        strides = (*(0,) * (len(shape) - (width != 1)), *((1,) if width != 1 else ()))
        table_access = Access(value.buffer, int(view.storage_offset()), strides)
        offset, _, number_strides = self.normal(where.unsqueeze(-1).expand(*where.shape, width), rows)
        chosen = Chosen(table_access, Access(self.in_memory(number, index.name), offset, number_strides), width)
        op = Op("clone", (chosen,), (), node.meta["val"].dtype, location(node))
        self.operation(node, op, like, self.map_over(shape, number.ready))

    def _contract(self, node: fx.Node, source: fx.Node, over: list[int], kind: str, meta: Tensor) -> None:
        """A reduction over dimensions in the middle: its own item."""
        value, view = self.resolve(source)
        rows = self.rows(view)
        if rows is None:
            raise self.refuse(node, kind)
        feature = view.unflatten(rows[0], (self.unit, rows[1])).movedim((rows[0], rows[0] + 1), (0, 1))[0]
        gone = [d + (d < rows[0]) for d in over]  # the rows' own k come first
        order = [[d for d in range(feature.dim()) if d not in gone], gone]
        kept, gone = ([d for d in some if feature.shape[d] != 1] for some in order)
        shape, inner = (tuple(int(feature.shape[d]) for d in some) for some in (kept, gone))
        strides = tuple(int(feature.stride(d)) for d in (*kept, *gone))
        read = Access(self.in_memory(value, source.name), int(feature.storage_offset()), strides)
        buffer = self.new_buffer(node.name, "batch", node.meta["val"])
        self.items.append(Contract(shape, inner, [read], kind, Access(buffer, 0, self.own_strides(shape))))
        self.values[node] = Value(meta, len(self.items), buffer)

    def _features(self, view: Tensor, dims: Sequence[int]) -> tuple[Tensor, list[int]]:
        """One row of a value, and where those dimensions are in it; UnsupportedError for the dimension of rows."""
        rows = self.rows(view)
        if rows is None or rows[0] in dims:
            raise UnsupportedError("an order of rows has no place in a compiled loop.")
        feature = view.unflatten(rows[0], (self.unit, rows[1])).movedim((rows[0], rows[0] + 1), (0, 1))[0]
        return feature, [d + (d < rows[0]) for d in dims]

    def _running_sum(self, node: fx.Node) -> None:
        source, dim = arguments(node)[:2]
        value, view = self.resolve(source)
        if not view.is_floating_point() or not view.dim():
            raise self.refuse(node, "cumsum of whole numbers")
        meta = self.canonical(node.meta["val"])
        buffer = self.new_buffer(node.name, "batch", node.meta["val"])
        access = []
        for lying, where in ((view, self.in_memory(value, source.name)), (meta, buffer)):
            feature, (along,) = self._features(lying, [dim % view.dim()])
            kept = [d for d in range(feature.dim()) if d != along and feature.shape[d] != 1]
            strides = tuple(int(feature.stride(d)) for d in (*kept, along))
            access.append(Access(where, int(feature.storage_offset()), strides))
            shape = tuple(int(feature.shape[d]) for d in kept)
        self.items.append(Contract(shape, (int(feature.shape[along]),), access[:1], "cumsum", access[1]))
        self.values[node] = Value(meta, len(self.items), buffer)

    def _flip(self, node: fx.Node) -> None:
        """A copy that reads its source backwards."""
        source, dims = arguments(node)[:2]
        value, view = self.resolve(source)
        feature, backwards = self._features(view, [d % view.dim() for d in dims])
        buffer = self.in_memory(value, source.name)
        offset = int(feature.storage_offset())
        strides = []
        for d, (size, stride) in enumerate(zip(feature.shape, feature.stride(), strict=True)):
            if d in backwards:
                offset += (int(size) - 1) * int(stride)
            if size != 1:
                strides.append(-int(stride) if d in backwards else int(stride))
        like = self.canonical(node.meta["val"])
        op = Op("clone", (Access(buffer, offset, tuple(strides)),), (), node.meta["val"].dtype, location(node))
        self.operation(node, op, like, self.map_over(self.shape_of(like), value.ready))

    def _scatter(self, node: fx.Node, name: str) -> None:
        """A value with a part replaced is what stands before the part, the part, and what stands after it, joined."""
        given: list[Any] = [*arguments(node), None, None, 0, None, None, 1]
        into, part, dim, start, end, step = [*given[: len(node.args)], *given[2 * len(node.args) :]]
        size, dim = int(node.meta["val"].shape[dim]), dim % node.meta["val"].dim()
        if name == "select_scatter":
            start, end, step = start % size, start % size + 1, 1
        start, end, _ = slice(start, end).indices(size)
        if step != 1:
            raise self.refuse(node, f"{name} with a step")
        pieces = [self._narrowed(into, dim, 0, start), part, self._narrowed(into, dim, end, size - end)]
        self._cat(node, pieces, dim, stacked=False, middle=name == "select_scatter")

    def _pad(self, node: fx.Node) -> None:
        """A number before and after; along several dimensions one after the other."""
        source, pads, number = (*arguments(node), 0)[:3]
        value = node.meta["val"]
        for dim, before, after in zip(range(value.dim() - 1, -1, -1), pads[::2], pads[1::2], strict=False):
            whole = source.meta["val"]
            if before or after:
                kept = self._narrowed(source, dim, max(-before, 0), whole.shape[dim] + min(before, 0) + min(after, 0))
                pieces = [kept]
                for size, at in ((before, 0), (after, len(pieces))):
                    if size > 0:
                        edge = whole.narrow(dim, 0, 1).expand(
                            [size if d == dim else n for d, n in enumerate(whole.shape)]
                        )
                        filled = self.made(f"{node.name}_edge", edge, like=node)
                        self.values[filled] = Value(self.canonical(edge), number=number)
                        pieces.insert(at if at == 0 else len(pieces), filled)
                padded = torch.cat([piece.meta["val"] for piece in pieces], dim)
                source = self.made(f"{node.name}_padded", padded, *pieces, like=node)
                self._cat(source, pieces, dim, stacked=False)
        self.values[node] = self.values[source]

    def _narrowed(self, node: fx.Node, dim: int, start: int, size: int) -> fx.Node:
        """Part of a value, as a node that is a view of it."""
        value, view = self.resolve(node)
        part = view.narrow(dim, start, size)
        narrow = self.made(f"{node.name}_part", part, node, like=node)
        self.views[narrow] = (value, part)
        return narrow

    def _cat(self, node: fx.Node, sources: list[fx.Node], dim: int, *, stacked: bool, middle: bool = False) -> None:
        """Every part is written straight into its place; of a stack, and of the one in the middle, without its dim."""
        meta = self.canonical(node.meta["val"])
        dim %= meta.dim()
        rows = self.rows(meta)
        if rows is not None and rows[0] == dim:
            raise self.refuse(node, "joining along the rows")
        buffer = self.new_buffer(node.name, "batch", node.meta["val"])
        at = 0
        whole = Value(meta, 0, buffer)
        for i, source in enumerate(sources):
            alone = stacked or (middle and i == 1)
            size = 1 if alone else int(source.meta["val"].shape[dim])
            place = meta.narrow(dim, at, size)
            at += size
            if place.numel():
                offset, inner, strides = self.normal(place, rows)
                whole.ready = max(whole.ready, self.write_to(source, Access(buffer, offset, strides), inner))
        self.values[node] = whole


def _sizes(item: Item) -> tuple[int, ...]:
    if isinstance(item, Product):
        return item.k, item.n
    return (*item.shape, *item.inner) if isinstance(item, Contract) else item.shape


def _integers(args: Any) -> tuple[int, ...]:
    first = args[0]
    return tuple(int(n) for n in (first if isinstance(first, (list, tuple)) else args))
