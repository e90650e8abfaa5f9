"""Loops of generated code: what is read, the buffers, the body, and what the rest of the program reads afterwards.

What is wanted later is written straight into its place in a buffer over all steps; what is not, into one scratch buffer
that all steps share, unless the next step still reads it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from . import gemm
from .affine import is_affine, rest, write_chunks
from .emit import call, out_variant, shape_source
from .independence import is_varying, rows_of_node
from .program import Loop
from .step import arguments

if TYPE_CHECKING:
    from .interpret import Writer

__all__ = ["LoopWriter"]


def _bases(node: fx.Node) -> list[fx.Node]:
    """The node and what it may be a view of."""
    found = [node]
    while node.op == "call_function" and not out_variant(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
        found.append(node)
    return found


class LoopWriter:
    """Writes one loop: buffers before it, the body, and what the rest of the program reads after it."""

    def __init__(self, writer: Writer, loop: Loop) -> None:
        self.w, self.loop = writer, loop
        self.step = writer.step
        self.inside = set(loop.nodes)
        self.next = {self.step.next[i]: i for i in loop.carried}
        self.views: dict[fx.Node, str] = {}  # per-step lists of views
        self.flat: dict[fx.Node, str] = {}  # what they are views of, where the loop is affine
        self.env: dict[fx.Node, str] = {}
        self.buffers: dict[fx.Node, str] = {}
        self.stored = self._stored()
        self.kernel = writer.kernel_of(loop, list(self.stored), self._spent())
        self.affine = self.kernel is None and not writer.ragged and is_affine(writer.step, loop)
        self.parts_of_cat = self._parts_of_cat()

    def _stored(self) -> dict[fx.Node, None]:
        """Nodes whose value is read outside the loop, for all steps."""
        outputs = set(self.step.outputs()) - set(self.next)
        found = {n: None for n in self.loop.nodes if n in outputs or any(u not in self.inside for u in n.users)}
        others = {n for i, n in enumerate(self.step.next) if i not in self.loop.carried}
        real = {
            *others,
            *(y for y in self.step.ys if y is not None),
            *self.step.kept.values(),
            *self.step.sums.values(),
        }
        for i in self.loop.carried:  # several states may become the same
            if self.step.next[i] in real or i in self.w.wanted_before:
                found[self.step.next[i]] = None
        return {n: None for n in found if n in self.inside and isinstance(n.meta["val"], Tensor)}

    def _spent(self) -> list[fx.Node]:
        """Values over all steps that this loop alone reads: a kernel may write what it stores where they stand."""
        outside = {n: None for node in self.loop.nodes for n in node.all_input_nodes if n not in self.inside}
        kept = set(self.step.outputs())
        wide = {n for n, i in self.next.items() if i in self.w.wanted_before}
        return [
            n
            for n in outside
            if n.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and rows_of_node(n) == (0, 1)
            and n not in kept and n not in wide and all(user in self.inside for user in n.users)
        ]  # fmt: skip

    def _parts_of_cat(self) -> dict[fx.Node, tuple[fx.Node, int, int]]:
        """Values that can be written straight into their place in a concatenation: node -> (cat, offset, size)."""
        found: dict[fx.Node, tuple[fx.Node, int, int]] = {}
        carried = {base for node in self.next for base in _bases(node)}
        for node in self.loop.nodes:
            if node.target is not torch.ops.aten.cat.default:
                continue
            sources, dim = [*arguments(node), 0][:2]
            dim %= node.meta["val"].dim()
            fits = all(
                n in self.inside and out_variant(n) and n not in carried and n not in found
                and (n not in self.stored or node in self.stored)
                and n.target is not torch.ops.aten.cat.default and n.meta["val"].dtype == node.meta["val"].dtype
                for n in sources
            )  # fmt: skip
            if fits and len(set(sources)) == len(sources) and rows_of_node(node) == (0, 1) and dim:
                at = 0
                for source in sources:
                    size = int(source.meta["val"].shape[dim])
                    found[source] = (node, at, size)
                    at += size
                node.meta["cat_dim"] = dim
        return found

    def write(self) -> None:
        w, line = self.w, self.w.line
        names = ", ".join(self.step.state[i].name for i in self.loop.carried)
        line(f"# loop: carries {names}")
        if self.kernel is not None:
            self._call_kernel()
            return
        line("times = [t for t, n in enumerate(sizes) if n]")
        line("if reverse:")
        line("times.reverse()", 2)
        self._inputs()
        self._buffers()
        for i in self.loop.carried:
            state = self.step.state[i]
            name = w.fresh(f"{state.name}_now")
            self.env[state] = name
            line(f"{name} = {w.fixed[state]}" + (".clone()" if w.ragged else ""))
        if self.affine:
            write_chunks(self)
            for node, text in self.flat.items():
                line(f"{self.views[node]} = {w.names.of(rest, 'rest')}({text}, B, times)")
        line("for t in times:")
        body = len(w.lines)
        self._body()
        if len(w.lines) == body:
            line("pass", 2)
        for i in self.loop.carried:
            w.finals[i] = f"{self.env[self.step.state[i]]}.clone()"
        for node, text in self.buffers.items():
            w.flat[node] = text

    def _call_kernel(self) -> None:
        """The loop as one call of machine code, which writes what is stored and leaves the last state in place."""
        w, carried = self.w, {self.step.state[i]: i for i in self.loop.carried}
        for node in self.stored:
            if node not in self.kernel.placed:
                self._store(node)
        for state, i in carried.items():
            w.finals[i] = self.env[state] = w.fresh(f"{state.name}_now")
            w.line(f"{self.env[state]} = {w.fixed[state]}.clone(memory_format=torch.contiguous_format)")
        inputs = [self.env[n] if n in carried else self._rows_first(n) for n in self.kernel.outside]
        for node, (source, first, count) in self.kernel.placed.items():
            w.room[node] = name = w.fresh(f"{node.name}_all")
            flat = "" if source.meta["val"].dim() == 2 else ".flatten(1)"
            shape = ", ".join(str(int(n)) for n in node.meta["val"].shape[1:])
            back = "" if node.meta["val"].dim() == 2 else f".unflatten(1, ({shape},))"
            w.line(f"{name} = {w.flat[source]}{flat}.narrow(1, {first}, {count}){back}")
            self.buffers[node] = name
        outputs = [w.room[node] for node in self.stored]
        name = w.names.of(self.kernel, "kernel")
        w.line(f"{name}(rows, reverse, [{', '.join(inputs)}], [{', '.join(outputs)}])")
        w.flat.update(self.buffers)

    def _rows_first(self, node: fx.Node) -> str:
        """A value from outside with its rows in front, (N, …), (B, …) or the same for all."""
        w = self.w
        if is_varying(node):
            return w.front(node, w.over_steps(node), "N")
        place = w.batch_dim(node)
        return w.fixed[node] if place is None else w.moved(w.fixed[node], place, "B")

    def _inputs(self) -> None:
        """Values from outside: one view for each step of those that vary."""
        w = self.w
        outside = {n: None for node in self.loop.nodes for n in node.all_input_nodes if n not in self.inside}
        outside.update({n: None for n in self.next if n not in self.inside})
        carried = {self.step.state[i] for i in self.loop.carried}
        for node in outside:
            if node in carried:
                continue
            if is_varying(node):
                self._split(node, w.front(node, w.over_steps(node), "N"))
            else:
                self.env[node] = w.fixed[node]

    def _buffers(self) -> None:
        """Room over all steps for what is stored, scratch for the rest."""
        w = self.w
        self.out: dict[fx.Node, str] = {}
        self.copies: dict[fx.Node, str] = {}
        self.packed: dict[fx.Node, str] = {}
        carried = {base for node in self.next for base in _bases(node)}
        for node in self.loop.nodes:
            if node in self.parts_of_cat or not isinstance(node.meta["val"], Tensor):
                continue
            packed = self._pack(node)
            plain = rows_of_node(node) == (0, 1) and out_variant(node) and not packed
            source = self._takes_over(node)
            if source is not None and (plain or node in self.stored):
                (self.out if plain else self.copies)[node] = f"{self.views[source]}[t]"
                if node in self.stored:
                    self.buffers[node], self.views[node] = w.flat[source], self.views[source]
                continue
            if node in self.stored:
                self._store(node)
                self._split(node, w.room[node])
                (self.out if plain else self.copies)[node] = f"{self.views[node]}[t]"
            elif plain and not w.ragged and node not in carried:
                name = w.fresh(f"{node.name}_out")
                w.line(f"{name} = empty({shape_source(node, w.unit, 'B')}, {self._options(node)})")
                self.out[node] = name
        for node, (cat, at, size) in self.parts_of_cat.items():
            dim = cat.meta["cat_dim"]
            if cat in self.stored:
                name = w.fresh(f"{node.name}_t")
                part = w.fresh(f"{node.name}_all")
                w.line(f"{part} = {self.buffers[cat]}.narrow({dim}, {at}, {size})")
                w.line(f"{name} = {part}.split_with_sizes(sizes)")
                self.buffers[node] = part
                self.out[node] = f"{name}[t]"
            elif cat in self.out:
                name = w.fresh(f"{node.name}_out")
                w.line(f"{name} = {self.out[cat]}.narrow({dim}, {at}, {size})")
                self.out[node] = name

    def _pack(self, node: fx.Node) -> bool:
        """Lay out the weight of a product once for all steps, where products of float32 are not left to torch.mm."""
        weight = node.all_input_nodes[-1] if node.all_input_nodes else node
        if not gemm.applies(node) or weight not in self.env or self.w.batch_dim(weight) is not None:
            return False
        name = self.w.fresh(f"{weight.name}_packed")
        self.w.line(f"{name} = {self.w.names.of(gemm.pack, 'pack')}({self.env[weight]}, B, len(times))")
        self.packed[node] = name
        return True

    def _takes_over(self, node: fx.Node) -> fx.Node | None:
        """What a product is added to, where the sum can be written in its place: nobody else reads it."""
        if node.target is not torch.ops.aten.addmm.default or node in self.next:
            return None
        source, here = arguments(node)[0], node.meta["val"]
        alone = list(source.users) == [node] and source not in self.step.outputs()
        fresh = source in self.views and source not in self.inside and out_variant(source)
        same = source.meta["val"].shape == here.shape and source.meta["val"].dtype == here.dtype
        return source if alone and fresh and same and rows_of_node(source) == rows_of_node(node) == (0, 1) else None

    def _options(self, node: fx.Node) -> str:
        value, names = node.meta["val"], self.w.names
        dtype = names.of(value.dtype, str(value.dtype).replace("torch.", ""))
        return f"dtype={dtype}, device={names.of(value.device, str(value.device).replace(':', '_'))}"

    def _store(self, node: fx.Node) -> None:
        """Room for a value over all steps, its rows in front."""
        w, options = self.w, self._options(node)
        shape = [int(n) for n in node.meta["val"].shape]
        if node.meta["rows"] == "sum":
            w.room[node] = self.buffers[node] = w.fresh(f"{node.name}_sum")
            w.line(f"{w.room[node]} = empty({tuple(shape)}, {options})")
            return
        dim, k = rows_of_node(node)  # type: ignore[misc]
        rest = [*shape[:dim], *shape[dim + 1 :]]
        sizes = ", ".join(str(n) for n in ([k] if k > 1 else []) + rest)
        name = w.fresh(f"{node.name}_all")
        i = self.next.get(node)
        if i is not None and i in w.wanted_before and not w.ragged and (dim, k) == (0, 1):
            whole = w.fresh(f"{node.name}_room")
            first = w.fixed[self.step.state[i]]
            w.line(f"{whole} = empty((N + B, {sizes}), {options})")
            w.line(f"{whole}.narrow(0, N if reverse else 0, B).copy_({first})")
            w.line(f"{name} = {whole}.narrow(0, 0 if reverse else B, N)")
            w.wide[i] = whole
        else:
            w.line(f"{name} = empty((N, {sizes}), {options})")
        self.buffers[node] = w.back(node, name) if (dim, k) != (0, 1) else name
        w.room[node] = name

    def _split(self, node: fx.Node, text: str) -> None:
        """One view for each step; those of an affine loop for the steps that its chunks leave over."""
        self.views[node] = self.w.fresh(f"{node.name}_t")
        if self.affine:
            self.flat[node] = text
        else:
            self.w.line(f"{self.views[node]} = {text}.split_with_sizes(sizes)")

    def _body(self) -> None:
        w, line = self.w, self.w.line
        rows = "n" if w.ragged else "B"
        env = dict(self.env)
        if w.ragged:
            line("n = sizes[t]", 2)
            for i in self.loop.carried:
                state = self.step.state[i]
                env[state] = w.fresh(state.name)
                line(f"{env[state]} = {self.env[state]}[:n]", 2)
            carried = {self.step.state[i] for i in self.loop.carried}
            for node, text in self.env.items():
                if node not in carried and (place := w.batch_dim(node)) is not None:
                    env[node] = w.fresh(f"{node.name}_now")
                    count = "n" if place[1] == 1 else f"{place[1]} * n"
                    line(f"{env[node]} = {text}.narrow({place[0]}, 0, {count})", 2)
        for node, views in self.views.items():
            if node not in self.inside:
                env[node] = w.back(node, f"{views}[t]")
        self._name_repeated(env)
        for node in self.loop.nodes:
            name = w.fresh(node.name)
            if any(cat is node for cat, _, _ in self.parts_of_cat.values()) and node in self.out:
                line(f"{name} = {self.out[node]}", 2)
            else:
                product = w.product(node, env, self.packed[node]) if node in self.packed else None
                line(f"{name} = {product or call(node, env, w.names, w.unit, rows, self.out.get(node))}", 2)
                if node in self.copies:
                    line(f"{self.copies[node]}.copy_({w.front(node, name, rows)})", 2)
            env[node] = name
        self._carry(env)

    def _name_repeated(self, env: dict[fx.Node, str]) -> None:
        """Give a name to a view of an input that the body reads more than once."""
        w = self.w
        for node in self.views:
            if node not in self.inside and sum(u in self.inside for u in node.users) > 1:
                name = w.fresh(f"{node.name}_here")
                w.line(f"{name} = {env[node]}", 2)
                env[node] = name

    def _carry(self, env: dict[fx.Node, str]) -> None:
        w = self.w
        now = [self.env[self.step.state[i]] for i in self.loop.carried]
        new = [env[self.step.next[i]] for i in self.loop.carried]
        if w.ragged:
            w.line(f"{', '.join(f'{name}[:n]' for name in now)} = {', '.join(self._apart(new))}", 2)
        else:
            w.line(f"{', '.join(now)} = {', '.join(new)}", 2)

    def _apart(self, new: list[str]) -> list[str]:
        """Values that may be views of the carried buffers are copied before those are written."""
        views = {self.step.state[i] for i in self.loop.carried}
        return [
            f"{text}.clone()" if self.step.next[i] in views or not out_variant(self.step.next[i]) else text
            for i, text in zip(self.loop.carried, new, strict=True)
        ]
