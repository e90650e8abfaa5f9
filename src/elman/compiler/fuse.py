"""Pointwise work around a loop moves into it, where a kernel does it while the numbers are at hand.

The program takes out of a loop whatever need not wait for a state. That is right for products, which run best over
all rows at once; of a pointwise operation, a norm or a sum over rows the way through memory costs more than it does.
In front of a loop, what is computed for it *sinks* into it; what follows it and reads it is *absorbed*, sums over rows
with it, which are then kept up from step to step.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

import torch
from torch import Tensor, fx

from .independence import is_varying, rows_of_node
from .llvm import pointwise
from .plan import operation
from .program import Loop, Program, Segment
from .step import arguments

__all__ = ["fused"]

_VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "permute", "unsqueeze", "squeeze", "expand", "slice", "select", "split",
    "split_with_sizes", "detach", "alias",
}  # fmt: skip
_ROWWISE = {
    "native_layer_norm", "native_layer_norm_backward", "_softmax", "_softmax_backward_data", "cat", "stack", "clone",
    "sum", "mean", "amax", "var_mean", "sigmoid_backward", "tanh_backward", "silu_backward", "gelu_backward",
    "softplus_backward", "elu_backward", "threshold_backward",
}  # fmt: skip


def fused(program: Program, alone: Set[int] = frozenset()) -> Program:
    """The same program with pointwise work inside its loops; segments keep products and what stands between them.

    Loops that are ``alone``, by their places among the loops, stay as they are.
    """
    parts = [replace(part, nodes=list(part.nodes)) for part in program.parts]
    order = {node: i for i, node in enumerate(program.step.graph.nodes)}
    loops = [at for at, part in enumerate(parts) if isinstance(part, Loop)]
    for at, part in enumerate(parts):
        if isinstance(part, Loop) and loops.index(at) not in alone:
            inside = set(part.nodes)
            _sink(parts[:at], parts[at + 1 :], inside, program)
            _absorb(parts[at + 1 :], inside, program, part)
            part.nodes = sorted(inside, key=order.__getitem__)
    return Program(program.step, program.invariant, [part for part in parts if part.nodes])


def _sink(before: list[Segment | Loop], after: list[Segment | Loop], inside: set[fx.Node], program: Program) -> None:
    """Take from the segments before a loop what is computed for it alone, or for it and later parts."""
    later = {node for part in after for node in part.nodes}
    step = program.step
    outputs = set(step.outputs())
    # What a state becomes is wanted for all steps by whoever reads the state: earlier parts, or this very loop.
    held = {node for node, state in zip(step.next, step.state, strict=True) if state.users}
    for part in reversed(before):
        if not isinstance(part, Segment):
            continue
        for node in reversed(part.nodes):
            unit = _unit(node)
            users = _users(unit)
            elsewhere = not users <= inside or not outputs.isdisjoint(unit)
            if not held.isdisjoint(unit):
                continue
            if users & inside and users <= inside | later and not (elsewhere and _is_view(node)) and _moves(node):
                inside.update(unit)
        part.nodes = [node for node in part.nodes if node not in inside]


def _absorb(after: list[Segment | Loop], inside: set[fx.Node], program: Program, loop: Loop) -> None:
    """Take from the segments after a loop what reads it, and nothing that is not known by then."""
    step = program.step
    unknown = {node for part in after for node in part.nodes}
    own = {step.state[i] for i in loop.carried}
    becomes = dict(zip(step.state, step.next, strict=True))

    def known(node: fx.Node) -> bool:
        """Whether a value is there before the loop, or is made in it; another state is, once all it becomes is."""
        seen = set()
        while node in becomes and node not in own and node not in seen:
            seen.add(node)
            node = becomes[node]
            if node in inside or node in own:
                return False
        return node not in unknown

    taken: dict[fx.Node, list[fx.Node]] = {}
    for part in after:
        for node in part.nodes if isinstance(part, Segment) else ():
            reads = set(node.all_input_nodes)
            if reads & inside and all(map(known, reads)) and (_moves(node) or _sums_rows(node)):
                taken[node] = _unit(node)
                inside.update(taken[node])
                unknown.difference_update(taken[node])
    missing: set[fx.Node] = set()
    while True:  # a view that others read would become a copy: it stays outside, and what reads it too
        out = [
            node
            for node, unit in taken.items()
            if (_is_view(node) and not _users(unit) <= inside) or not missing.isdisjoint(node.all_input_nodes)
        ]
        if not out:
            break
        for node in out:
            missing.update(unit := taken.pop(node))
            inside.difference_update(unit)
    for part in after:
        if isinstance(part, Segment):
            part.nodes = [node for node in part.nodes if node not in inside]


def _unit(node: fx.Node) -> list[fx.Node]:
    """A node with its parts, where it gives several values."""
    return [node] if isinstance(node.meta["val"], Tensor) else [node, *node.users]


def _users(unit: list[fx.Node]) -> set[fx.Node]:
    return {user for node in unit for user in node.users} - set(unit)


def _is_view(node: fx.Node) -> bool:
    return operation(node) in _VIEWS


def _moves(node: fx.Node) -> bool:
    """Whether a kernel computes a node row by row."""
    name = operation(node)
    if name == "getitem" or not is_varying(node) or node.meta["rows"] == "sum":
        return False
    return name in _VIEWS or name in _ROWWISE or pointwise.supports(name)


def _sums_rows(node: fx.Node) -> bool:
    """Whether a node is a sum of something over its rows, and over nothing else."""
    if node.meta["rows"] != "sum" or node.kwargs:
        return False
    if operation(node) == "native_layer_norm_backward":
        return True
    if node.target is not torch.ops.aten.sum.dim_IntList:
        return False
    source, dims = arguments(node)[:2]
    rows = rows_of_node(source)
    return rows is not None and rows[1] == 1 and [d % source.meta["val"].dim() for d in dims] == [rows[0]]
