"""How many nonlinear operations lie between two places of an unfolded cell, counted in its compiled graph."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .compiler.step import Step
from .errors import OptionError
from .explaining import compiled_step
from .types import Pytree, State

__all__ = ["Path", "PathLengths", "path_lengths"]

# Linear in what varies; every other operation counts. Products count where both factors vary.
_LINEAR = {
    "add", "alias", "cat", "clone", "constant_pad_nd", "convolution", "copy", "cumsum", "detach", "diagonal",
    "embedding", "expand", "flip", "gather", "index", "index_select", "lift_fresh_copy", "mean", "neg", "permute",
    "repeat", "reshape", "roll", "rsub", "select", "select_scatter", "slice", "slice_backward", "slice_scatter",
    "split", "split_with_sizes", "squeeze", "stack", "sub", "sum", "t", "_to_copy", "transpose", "unbind", "unfold",
    "_unsafe_view", "unsqueeze", "view",
}  # fmt: skip
_PRODUCTS = {"mul": (0, 1), "mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "addcmul": (1, 2)}
_SHAPES = {
    "empty_like",
    "full_like",
    "new_empty",
    "new_full",
    "new_zeros",
    "ones_like",
    "rand_like",
    "randn_like",
    "zeros_like",
}
"""Operations that read no more than a shape."""
_CHOICES = {"where": 0, "masked_fill": 1}
"""Operations that only hand on values, by a condition that is their argument of this number."""

_Lengths = dict[fx.Node, "Path"]
_End = str | int


class Path(NamedTuple):
    """Operations on the shortest and on the longest way from one place to another."""

    shortest: int
    longest: int


@dataclass(frozen=True)
class PathLengths:
    """What ``path_lengths`` finds.

    ``step`` leads from x(t) to y(t), and ``state`` from state(t-1) to state(t), from any leaf of the state to any; each
    a ``Path``, or None where no way leads there. ``table`` has the ways inside one step between all the ends, by name:
    from "x" or a leaf's number to "y" or a leaf's number.
    """

    step: Path | None
    state: Path | None
    table: dict[tuple[_End, _End], Path]

    def over(self, lag: int) -> Path | None:
        """From x(t - lag) to y(t): through ``lag`` steps of state. Raises OptionError for a negative lag."""
        if not isinstance(lag, int) or lag < 0:
            raise OptionError(f"over: lag must be a number of steps, 0 or more; got {lag!r}.")
        if lag == 0:
            return self.step
        at: dict[_End, Path] = {"x": Path(0, 0)}
        for _ in range(lag):
            at = self._after(at, [end for _, end in self.table if isinstance(end, int)])
        return self._after(at, ["y"]).get("y")

    def _after(self, at: dict[_End, Path], ends: list[_End]) -> dict[_End, Path]:
        found: dict[_End, Path] = {}
        for (start, end), path in self.table.items():
            if start in at and end in ends:
                found[end] = _either(found.get(end), Path(*map(operator.add, at[start], path)))
        return found


def path_lengths(
    cell: nn.Module, xs: Pytree, state: State = None, *, constants: Pytree = None, products: bool = False
) -> PathLengths:
    """The lengths of the ways on which signals and gradients run through a cell, in operations of its program.

    What counts is what is not linear in the values that vary with the step: squashing functions, divisions, softmax,
    products of two such values, as of a gate and what it gates. With ``products`` a product with weights, which is
    linear, counts as well. A choice by a condition (``torch.where``) counts only for the condition. xs is (T, B, …), as
    for ``scan``; its sizes T and B do not matter.

    Raises what ``scan`` raises for a cell or xs that do not fit, and UnfoldError for a cell that cannot be compiled.
    Sources: Pascanu et al. 2014, How to construct deep recurrent neural networks, section 3; Zhang et al. 2016,
    Architectural complexity measures of recurrent neural networks, section 3 (lengths of paths over time).
    """
    step = compiled_step(cell, xs, state, constants=constants).step
    ends: list[tuple[_End, fx.Node]] = [("y", y) for y in step.ys if y is not None]
    ends += list(enumerate(step.next))
    table: dict[tuple[_End, _End], Path] = {}
    starts: list[tuple[_End, list[fx.Node]]] = [("x", step.xs), *((i, [leaf]) for i, leaf in enumerate(step.state))]
    for start, sources in starts:
        lengths = _from(step, sources, products)
        for end, node in ends:
            if node in lengths:
                table[start, end] = _either(table.get((start, end)), lengths[node])
    between = [path for (start, end), path in table.items() if isinstance(start, int) and isinstance(end, int)]
    whole = Path(min(p.shortest for p in between), max(p.longest for p in between)) if between else None
    return PathLengths(table.get(("x", "y")), whole, table)


def _either(one: Path | None, other: Path) -> Path:
    return other if one is None else Path(min(one.shortest, other.shortest), max(one.longest, other.longest))


def _read(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values an operation depends on."""
    target = node.target
    shape = isinstance(target, torch._ops.OpOverload) and _name(target) in _SHAPES
    return [] if shape or node.op != "call_function" else node.all_input_nodes


def _name(target: torch._ops.OpOverload) -> str:
    return target._schema.name.split("::")[1]


def _from(step: Step, sources: list[fx.Node], products: bool) -> _Lengths:
    """The way from the sources to every node that they reach; the graph is in the order of its computation."""
    varying = _reached([*step.xs, *step.state], step)
    found: _Lengths = dict.fromkeys(sources, Path(0, 0))
    for node in step.graph.nodes:
        for read in _read(node):
            if read in found:
                cost = _cost(node, read, varying, products)
                found[node] = _either(found.get(node), Path(*(n + cost for n in found[read])))
    return found


def _reached(sources: list[fx.Node], step: Step) -> set[fx.Node]:
    found = set(sources)
    for node in step.graph.nodes:
        if any(read in found for read in _read(node)):
            found.add(node)
    return found


def _values(node: fx.Node) -> list[Tensor]:
    """What a node gives, one tensor or several."""
    return [value for value in pytree.tree_leaves(node.meta["val"]) if isinstance(value, Tensor)]


def _cost(node: fx.Node, read: fx.Node, varying: set[fx.Node], products: bool) -> int:
    """1 where ``node`` is an operation that counts on the way from ``read`` to it, 0 where not."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):  # a part of a result
        return 0
    name = _name(target)
    if name in _LINEAR or not any(out.is_floating_point() for out in _values(node)):
        return 0
    if name in _CHOICES:
        return int(node.args[_CHOICES[name]] is read)
    if name in _PRODUCTS:
        factors = [node.args[i] for i in _PRODUCTS[name]]
        if read not in factors:
            return 0
        return int(all(f in varying for f in factors) or (products and name not in ("mul", "addcmul")))
    if name == "div":
        return int(node.args[1] in varying)
    return 1
