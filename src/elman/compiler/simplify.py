"""Small rewrites of a step's graph that every backend profits from. Each keeps the value, up to rounding.

alias, and detach once derived: gone
sums of terms           what depends on no state is added first, so that it leaves the loop;
                        a matrix product is added by addmm
products of a cat       [x, h] W becomes x W₁ + h W₂ where x is known before h, so that x W₁ leaves the loop;
                        a constant c beside x leaves even the segment
slice gradients         the gradients of all the slices of one value become one concatenation
"""

from __future__ import annotations

from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import fx

from .independence import is_varying
from .step import Step, arguments

__all__ = ["fuse", "simplify"]

aten = torch.ops.aten
_NOTHING = (aten.alias.default, aten.lift_fresh_copy.default)


def simplify(step: Step, *, derived: bool) -> None:
    """Rewrite the graph of an annotated step in place; annotate it again afterwards.

    A detach says where no gradient flows, so it is dropped only from what is ``derived`` already.
    """
    _drop_aliases(step, (*_NOTHING, aten.detach.default) if derived else _NOTHING)
    _own_next(step)
    _drop_dead(step)
    _join_slices(step)
    _split_products(step)
    _order_sums(step)
    _drop_dead(step)


def fuse(step: Step) -> None:
    """a + b·c becomes addcmul, one pass over memory; last, because no other rewrite looks for it."""
    ends = set(step.outputs())
    for node in list(step.graph.nodes):
        if not _is_sum(node):
            continue
        for at, product in enumerate(node.args):
            other = node.args[1 - at]
            factors = product.args if product.target is aten.mul.Tensor else ()
            fits = len(product.users) == 1 and product not in ends and not product.kwargs and other is not product
            if fits and factors and all(isinstance(f, fx.Node) for f in factors):
                values = [n.meta["val"] for n in (node, other, *factors)]
                if (
                    values[1].shape == values[0].shape
                    and len({v.dtype for v in values}) == 1
                    and values[0].is_floating_point()
                ):
                    with step.graph.inserting_before(node):
                        joined = _make(step, aten.addcmul.default, (other, *factors), node)
                    _replace(step, node, joined)
                    step.graph.erase_node(product)
                    break


def _replace(step: Step, node: fx.Node, by: fx.Node) -> None:
    node.replace_all_uses_with(by)
    step.ys[:] = [by if n is node else n for n in step.ys]
    step.next[:] = [by if n is node else n for n in step.next]
    for table in (step.kept, step.sums):
        for key, n in table.items():
            if n is node:
                table[key] = by  # type: ignore[index]
    step.graph.erase_node(node)


def _own_next(step: Step) -> None:
    """A state that takes over another one as it is becomes a value of its own."""
    for i, node in enumerate(step.next):
        if node in step.state and node is not step.state[i]:
            with step.graph.inserting_after(_last_placeholder(step)):
                step.next[i] = _make(step, aten.clone.default, (node,), node)


def _last_placeholder(step: Step) -> fx.Node:
    return next(n for n in reversed(step.graph.nodes) if n.op == "placeholder")


def _drop_aliases(step: Step, nothing: tuple[Any, ...]) -> None:
    for node in list(step.graph.nodes):
        if node.target in nothing and node.args[0].meta["val"].dtype == node.meta["val"].dtype:
            _replace(step, node, node.args[0])


def _drop_dead(step: Step) -> None:
    alive = set(step.outputs())
    for node in reversed(list(step.graph.nodes)):
        if node.op in ("call_function", "get_attr", "output") and not node.users and node not in alive:
            step.graph.erase_node(node)


def _terms(node: fx.Node, ends: set[fx.Node]) -> list[fx.Node]:
    """The summands of a tree of additions of which only the root is used elsewhere."""
    found: list[fx.Node] = []
    for arg in node.args:
        inner = isinstance(arg, fx.Node) and _is_sum(arg) and len(arg.users) == 1 and arg not in ends
        same = inner and arg.meta["val"].shape == node.meta["val"].shape  # type: ignore[union-attr]
        same = same and arg.meta["val"].dtype == node.meta["val"].dtype  # type: ignore[union-attr]
        found += _terms(arg, ends) if same else [arg]  # type: ignore[list-item,arg-type]
    return found


def _is_sum(node: fx.Node) -> bool:
    return node.target is aten.add.Tensor and not node.kwargs and all(isinstance(a, fx.Node) for a in node.args)


def _roots(step: Step, ends: set[fx.Node]) -> list[fx.Node]:
    roots = []
    for node in step.graph.nodes:
        if _is_sum(node):
            user = next(iter(node.users), None)
            inner = len(node.users) == 1 and node not in ends and user is not None and _is_sum(user)
            if not (inner and user.meta["val"].shape == node.meta["val"].shape):  # type: ignore[union-attr]
                roots.append(node)
    return roots


def _make(step: Step, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
    new = step.graph.call_function(target, args)
    new.meta = dict(like.meta)
    return new


def _join_slices(step: Step) -> None:
    ends = set(step.outputs())
    for root in _roots(step, ends):
        terms = _terms(root, ends)
        slices = [t for t in terms if t.target is aten.slice_backward.default and len(t.users) == 1 and t.args[5] == 1]
        if len(slices) < 2 or len(slices) != len(terms):
            continue
        sizes, dim = slices[0].args[1], slices[0].args[2]
        if any(t.args[1] != sizes or t.args[2] != dim for t in slices):
            continue
        full = sizes[dim]  # type: ignore[index]
        slices.sort(key=lambda t: t.args[3])  # type: ignore[arg-type,return-value]
        edges = [(t.args[3], min(t.args[4], full)) for t in slices]  # type: ignore[type-var]
        covers = edges[0][0] == 0 and edges[-1][1] == full
        if covers and all(a[1] == b[0] for a, b in pairwise(edges)):
            with step.graph.inserting_before(root):
                joined = _make(step, aten.cat.default, ([t.args[0] for t in slices], dim), root)
            _replace(step, root, joined)
    _drop_dead(step)


def _split_products(step: Step) -> None:
    """A product of values side by side, some of which are known earlier than others, becomes a sum of products."""
    depth = _depths(step)
    for node in list(step.graph.nodes):
        if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
            continue
        *bias, left, weight = arguments(node)
        cast = left.target is aten._to_copy.default
        joined = left.args[0] if cast else left
        if joined.target is not aten.cat.default or joined.args[1:] not in ((1,), (-1,)):
            continue
        known = {part: (is_varying(part), depth(part)) for part in joined.args[0]}
        runs = [list(run) for _, run in groupby(joined.args[0], known.__getitem__)]
        if len(runs) < 2 or depth(weight):
            continue
        ends = [*accumulate(sum(part.meta["val"].shape[1] for part in run) for run in runs)]
        begins = [0, *ends[:-1]]
        total = bias[0] if bias else None
        with step.graph.inserting_before(node):
            for at in sorted(range(len(runs)), key=lambda i: known[runs[i][0]]):
                run = runs[at]
                part = run[0] if len(run) == 1 else _like(step, aten.cat.default, (run, 1))
                part = _like(step, left.target, (part,), dict(left.kwargs)) if cast else part
                rows = _like(step, aten.slice.Tensor, (weight, 0, begins[at], ends[at]))
                total = _accumulate(step, total, (part, rows), node)
        assert total is not None
        _replace(step, node, total)


def _like(step: Step, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
    """A new operation, its value found from those of its arguments."""
    new = step.graph.call_function(target, args, kwargs or {})
    sources = new.all_input_nodes
    values = fx.node.map_arg((args, kwargs or {}), lambda n: n.meta["val"])
    with sources[0].meta["val"].fake_mode:
        new.meta = {**sources[0].meta, "val": target(*values[0], **values[1])}
    return new


def _order_sums(step: Step) -> None:
    """Add first what is known first: what depends on no state, then what earlier loops give; products with addmm."""
    depth = _depths(step)
    ends = set(step.outputs())
    for root in _roots(step, ends):
        terms = _terms(root, ends)
        value = root.meta["val"]
        if len(terms) < 2 or any(t.meta["val"].dtype != value.dtype for t in terms) or not depth(root):
            continue
        parts: list[tuple[int, int, int, tuple[Any, ...]]] = []
        for term in terms:
            single = len(term.users) == 1 and term not in ends and term.meta["val"].shape == value.shape
            if single and term.target is aten.addmm.default and not term.kwargs:
                bias, left, right = arguments(term)
                parts.append((depth(bias), 0, -bias.meta["val"].numel(), (bias,)))
                parts.append((max(depth(left), depth(right)), 1, 0, (left, right)))
            elif single and term.target is aten.mm.default:
                parts.append((depth(term), 1, 0, tuple(term.args)))
            else:
                # The widest first, so that a partial sum has the full shape as early as possible.
                parts.append((depth(term), 0, -term.meta["val"].numel(), (term,)))
        if len(parts) == len(terms) == 2 and all(len(p[3]) == 1 for p in parts):
            continue
        parts.sort(key=lambda part: part[:3])
        with step.graph.inserting_before(root):
            total: fx.Node | None = None
            for _, _, _, factors in parts:
                total = _accumulate(step, total, factors, root)
        assert total is not None
        _replace(step, root, total)


def _accumulate(step: Step, total: fx.Node | None, factors: tuple[Any, ...], root: fx.Node) -> fx.Node:
    if len(factors) == 1:
        return factors[0] if total is None else _add(step, total, factors[0], root)
    if total is not None:
        return _make(step, aten.addmm.default, (total, *factors), root)
    return _make(step, aten.mm.default, factors, root)


def _depths(step: Step) -> Any:
    """How many state leaves a node depends on, through earlier steps too: less is known earlier."""
    reads: dict[fx.Node, frozenset[int]] = {n: frozenset([i]) for i, n in enumerate(step.state)}

    def read(node: fx.Node) -> frozenset[int]:
        if node not in reads:
            reads[node] = frozenset().union(*(read(n) for n in node.all_input_nodes))
        return reads[node]

    for node in step.graph.nodes:
        read(node)
    reach = {i: read(n) | {i} for i, n in enumerate(step.next)}
    for _ in reach:
        reach = {i: seen.union(*(reach[j] for j in seen)) for i, seen in reach.items()}
    return lambda node: len(frozenset().union(*(reach[i] for i in read(node))))


def _add(step: Step, left: fx.Node, right: fx.Node, like: fx.Node) -> fx.Node:
    new = _make(step, aten.add.Tensor, (left, right), like)
    value = like.meta["val"]
    shape = torch.broadcast_shapes(left.meta["val"].shape, right.meta["val"].shape)
    with value.fake_mode:
        new.meta["val"] = torch.empty(shape, dtype=value.dtype, device=value.device)
    return new
