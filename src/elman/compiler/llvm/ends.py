"""The ends of a step: what others read is stored, every state is replaced by its next."""

from __future__ import annotations

from torch import Tensor, fx

from .items import Access, Buffer, Map, Op, Product, Slot, buffers_of, reads_of
from .rings import chains
from .values import Value, Values

__all__ = ["Ends"]


class Ends(Values):
    """What is done once every node is lowered."""

    def outputs(self) -> None:
        """What others read is written for every row and step: where a value has a buffer of its own, that is it."""
        for number, outer in enumerate(self.stored):
            node = self.body.results[self.body.outputs.index(outer)]
            value, view = self.resolve(node)
            if value.buffer is not None and value.buffer.role == "sum":
                if value.buffer.number >= 0 or view.numel() != value.meta.numel():
                    raise self.refuse(node, "a part of a sum over rows")
                value.buffer.number = number
                continue
            buffer = value.buffer if view is value.meta else None
            if buffer is not None and buffer.role == "scratch" and buffer.dtype == outer.meta["val"].dtype:
                buffer.kind, buffer.role, buffer.number = "time", "output", number
                continue
            shape = self.shape_of(self.canonical(node.meta["val"]))
            out = self.new_buffer(outer.name, "time", node.meta["val"], outer.meta["val"].dtype)
            out.role, out.number = "output", number
            self.write_to(node, Access(out, 0, self.own_strides(shape)), shape)

    def commit(self) -> None:
        """Replace every state by its next: at once where nothing reads the old one later, else at the end."""
        following = self._in_rings({state: self.body.results[i] for state, i in self.states.items()})
        for state, node in following.items():  # what is handed on is copied before anything replaces it
            value, view = self.resolve(node)
            if node is not state and value.buffer is not None and value.buffer.role == "state":
                following[state] = self.copied(node, view)
        changed = {state: node for state, node in following.items() if node is not state}
        late = [(state, node) for state, node in changed.items() if not self._at_once(state, node)]
        for _, node in late:  # everything that replaces a state at the end is in memory before
            value = self.resolve(node)[0]
            if value.number is None:
                self.in_memory(value, node.name)
        start = len(self.items)
        for state, node in late:
            value = self.values[state]
            shape = self.shape_of(value.meta)
            at = self.map_over(shape, start)
            item = self.map_at(at)
            item.ops.append(Op("clone", (self.operand(node, value.meta, at),), (), value.meta.dtype))
            item.stores.append((len(item.ops) - 1, self._whole(value)))

    def _in_rings(self, following: dict[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
        """Let states that are handed on turn in rings: of each, what is new replaces the oldest, and that is all."""
        state_of = {self.values[state]: state for state in following}
        handed = {}
        for state, node in following.items():
            value, view = self.resolve(node)
            old = self.values[state].meta
            if view is value.meta and (old.shape, old.dtype) == (view.shape, view.dtype) and value in state_of:
                handed[state] = state_of[value]
        for number, chain in enumerate(chains({a: b for a, b in handed.items() if a is not b})):
            new = following[chain[-1]]
            for i, state in enumerate(chain):
                buffer = self.values[state].buffer
                assert buffer is not None
                buffer.slot = Slot(number, len(chain), i)
                del following[state]
            if handed.get(chain[-1]) is not chain[0]:  # else it goes round and round
                following[chain[0]] = new
        return following

    def _whole(self, value: Value) -> Access:
        """All of a value in memory."""
        assert value.buffer is not None
        return Access(value.buffer, 0, self.own_strides(self.shape_of(value.meta)))

    def _at_once(self, state: fx.Node, node: fx.Node) -> bool:
        """Let what computes the next state write it over the old one, if nobody reads that any more."""
        (value, view), old = self.resolve(node), self.values[state]
        assert old.buffer is not None
        if self._straight(value, view, old.buffer):
            return True
        shape = self.shape_of(old.meta)
        if not self.holds(value, view, self.rows(view), shape) or not self._free(old.buffer, value.map or 0):
            return False
        self.store(value, self._whole(old))
        return True

    def _straight(self, value: Value, view: Tensor, state: Buffer) -> bool:
        """Let a product write its sum where the state is, if nothing else wants either."""
        made = next(
            (i for i, p in enumerate(self.items) if isinstance(p, Product) and p.out.buffer is value.buffer), -1
        )
        if made < 0 or view is not value.meta or value.buffer is None or value.buffer.role != "scratch":
            return False
        if value.buffer.dtype != state.dtype:
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
        item = self.map_at(index)
        own = self.own_strides(item.shape)
        reads = [a for a in reads_of(item) if a.buffer is buffer]
        return all(a.offset == 0 and a.strides == own for a in reads)

    def chunks(self) -> None:
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
                item.chunk = width if width and item.n % width == 0 else item.n
