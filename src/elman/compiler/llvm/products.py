"""Lowering products: with weights that are the same for all rows, and with a matrix for each sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..step import arguments
from .items import Access, Contract, Product
from .values import Value, Values, computed_in

__all__ = ["Products"]


class Products(Values):
    """What becomes of mm, addmm and bmm."""

    def batched(self, node: fx.Node) -> None:
        """bmm: for every sequence a product of two matrices of its own."""
        *bias, left, right = arguments(node)
        if bias or node.kwargs:
            raise self.refuse(node, "baddbmm")
        (_, a), (_, b) = self.resolve(left), self.resolve(right)
        if (self.rows(a) or (0,))[0] == 1 and self.rows(b) is None:
            self._grouped(node, left, right)
            return
        if (self.rows(a) or (0,))[0] or (self.rows(b) or (0,))[0]:
            raise self.refuse(node, "a product of two values that vary")
        (g, m, k), n = (int(size) for size in a.shape), int(b.shape[2])
        g //= self.unit
        first, second = (v.unflatten(0, (self.unit, g))[0] for v in (a, b))
        wide = first.unsqueeze(2).expand(g, m, n, k), second.transpose(1, 2).unsqueeze(1).expand(g, m, n, k)
        kept = [d for d, size in enumerate((g, m, n)) if size != 1]
        reads = []
        for source, view in zip((left, right), wide, strict=True):
            value = self.resolve(source)[0]
            strides = (*(int(view.stride(d)) for d in kept), int(view.stride(3)))
            at = int(view.storage_offset())
            reads.append(Access(self.in_memory(value, source.name), at, strides))
        shape = tuple((g, m, n)[d] for d in kept)
        buffer = self.new_buffer(node.name, "batch", node.meta["val"])
        self.items.append(Contract(shape, (k,), reads, "sum", Access(buffer, 0, self.own_strides(shape))))
        self.values[node] = Value(self.canonical(node.meta["val"]), len(self.items), buffer)

    def _grouped(self, node: fx.Node, left: fx.Node, right: fx.Node) -> None:
        """bmm of (groups, B, K) with weights (groups, K, N): a product for each group, side by side."""
        (_, a), (weight, b) = self.resolve(left), self.resolve(right)
        if self.rows(a) != (1, 1) or weight.buffer is None or weight.buffer.kind != "shared":
            raise self.refuse(node, "a product of two values that vary")
        groups, k, n = (int(size) for size in b.shape)
        if int(a.stride(2)) != 1 and k != 1:
            left = self.copied(left, a)
            a = self.values[left].meta
        left, a = self._computed(left, a)
        source = self.in_memory(self.resolve(left)[0], left.name)
        buffer = self.new_buffer(node.name, "batch", node.meta["val"])
        meta = self.canonical(node.meta["val"])
        for group in range(groups):
            at = int(a[group].storage_offset())
            part = int(b[group].storage_offset())
            out = Access(buffer, int(meta[group].storage_offset()), (1,))
            where = (weight.buffer, part, int(b.stride(1)), int(b.stride(2)))
            self.items.append(Product(out, None, Access(source, at, (1,)), where, k, n, 1))
        self.values[node] = Value(meta, len(self.items), buffer)

    def product(self, node: fx.Node) -> None:
        """mm and addmm: with a weight that is the same for all rows."""
        *bias, left, right = arguments(node)
        if node.kwargs:
            raise self.refuse(node, "addmm with factors")
        (a_value, a), (b_value, b) = self.resolve(left), self.resolve(right)
        if self.rows(a) is None:  # W hᵀ: the same as h Wᵀ, transposed, and rows come first in memory anyway
            left, right, a, b, a_value, b_value = right, left, b.t(), a.t(), b_value, a_value
            turned = self.made(f"{left.name}_t", a, left, like=left)
            self.views[turned] = (a_value, a)
            left = turned
        if self.rows(b) is not None or b_value.buffer is None or b_value.buffer.kind != "shared":
            raise self.refuse(node, "a product of two values that vary")
        access, times, k = self._matrix(left, a)
        n = int(b.shape[1])
        init, late = None, None
        like = self.canonical(node.meta["val"])
        if bias:
            init, late = self._initial(bias[0], like, times)
        buffer = self.new_buffer(node.name, "batch", node.meta["val"])
        plain = b_value.meta.shape == b.shape and b_value.meta.stride() == b.stride()
        part = (b_value.buffer, int(b.storage_offset()), int(b.stride(0)), int(b.stride(1)))
        weight: Any = b_value.buffer if plain else part
        out = Access(buffer, 0, (n, 1) if times > 1 else (1,))
        rests = access.buffer.dtype == torch.bfloat16 and a.dtype == torch.float32 and self.narrow[a.dtype].rests
        self.items.append(Product(out, init, access, weight, k, n, times, rests=rests))
        self.values[node] = Value(like, len(self.items), buffer)
        if late is not None:  # what is added lies too far apart to start from
            alone = self.made(f"{node.name}_product", node.meta["val"], like=node)
            self.values[alone] = self.values.pop(node)
            sum_ = self.made(f"{node.name}_sum", node.meta["val"], alone, late, like=node)
            self.pointwise(sum_, "add")
            self.values[node] = self.values[sum_]

    def _computed(self, node: fx.Node, view: Tensor) -> tuple[fx.Node, Tensor]:
        """A value in the type in which it is computed, in memory too."""
        value = self.resolve(node)[0]
        if computed_in(view.dtype) == view.dtype or (value.buffer or value.map) is None:
            return node, view
        if value.buffer is not None and value.buffer.dtype != computed_in(view.dtype):
            node = self.copied(node, view)
            view = self.values[node].meta
        return node, view

    def _matrix(self, node: fx.Node, view: Tensor) -> tuple[Access, int, int]:
        """The left side of a product, in the type that the product multiplies, filled up with zeros where it must."""
        mode = self.narrow.get(view.dtype)
        if mode is None:
            return self._rows_of_left(*self._computed(node, view))
        access, times, k = self._rows_of_left(node, view)
        every = -(-k // mode.whole) * mode.whole
        if access.buffer.dtype == torch.bfloat16 and every == k and not mode.rests:
            return access, times, k
        copy = self.copied(node, view)
        row = every * len(mode.lefts)
        halves = self.new_buffer(f"{node.name}_halves", "batch", self.values[copy].meta, torch.bfloat16)
        halves.row, halves.filled = times * row, every > k
        along = tuple(stride for size, stride in ((times, row), (k, 1)) if size != 1)
        for number, cell in enumerate(mode.lefts):
            part = copy
            if cell.half:
                part = self.made(f"{node.name}_{cell.half}", view, copy, like=node)
                self.pointwise(part, f"bfloat16_{cell.half}")
            self.store(self.values[part], Access(halves, number * every, along))
        return Access(halves, 0, (row, 1) if times > 1 else (1,)), times, k

    def _rows_of_left(self, node: fx.Node, view: Tensor) -> tuple[Access, int, int]:
        """Rows of neighbouring numbers, so many for each sequence."""
        rows = self.rows(view)
        assert rows is not None
        for attempt in (0, 1):
            d, times = rows
            feature = view.unflatten(d, (self.unit, times)).movedim((d, d + 1), (0, 1))[0]  # (times, K)
            value = self.resolve(node)[0]
            if int(feature.stride(1)) == 1 or feature.shape[1] == 1 or attempt:
                break
            node = self.copied(node, view)
            view = self.values[node].meta
        buffer = self.in_memory(value, node.name)
        strides = (int(feature.stride(0)), 1) if times > 1 else (1,)
        return Access(buffer, int(feature.storage_offset()), strides), times, int(feature.shape[1])

    def _initial(self, node: fx.Node, like: Tensor, times: int) -> tuple[Access | None, fx.Node | None]:
        """What a product is added to: where its sum can start from, or what must be added after it."""
        value, view = self.resolve(node)
        if value.number is not None:
            return None, node
        d, _ = self.rows(like)  # type: ignore[misc]
        wide = torch.broadcast_to(view, like.shape).unflatten(d, (self.unit, times)).movedim((d, d + 1), (0, 1))[0]
        if int(wide.stride(1)) != 1 and wide.shape[1] != 1:
            return None, node
        buffer = self.in_memory(value, node.name)
        if buffer.dtype != computed_in(buffer.dtype):
            return None, node
        strides = (int(wide.stride(0)), 1) if times > 1 else (1,)
        return Access(buffer, int(wide.storage_offset()), strides), None
