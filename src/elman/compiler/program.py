"""Pass 2, program: the step falls apart into values that hold for the whole call, segments and loops.

    invariant  depends on nothing that varies: weight casts, transposes, parametrisations. Once per call.
    segment    depends on no unfinished state: once, over all T·B rows.
    loop       a strongly connected component of the state graph, and in it only what its own next state needs.

What reads a loop but feeds none follows as a segment. So an Elman net is segment (U x), loop (W h), segment (V h);
three layers written as one cell become three loops; a cell whose recurrence vanishes has no loop.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from .independence import is_varying
from .step import Step

__all__ = ["Loop", "Program", "Segment", "hoist", "partition"]


@dataclass
class Segment:
    """Nodes that run once, over the rows of all steps."""

    nodes: list[fx.Node]


@dataclass
class Loop:
    """Nodes that run step after step; ``carried`` are the indices of the state leaves that they compute."""

    nodes: list[fx.Node]
    carried: list[int]


@dataclass
class Program:
    """A step, taken apart: ``invariant`` once per call, then ``parts`` in order."""

    step: Step
    invariant: list[fx.Node]
    parts: list[Segment | Loop]
    kernels: Any = None  # the machine code of its loops, once made

    @property
    def loops(self) -> list[Loop]:
        return [part for part in self.parts if isinstance(part, Loop)]

    @property
    def segments(self) -> list[Segment]:
        return [part for part in self.parts if isinstance(part, Segment)]


def hoist(step: Step) -> tuple[Step, Step]:
    """Split a step into what holds for the whole call and the rest.

    Returns (invariant, varying): ``invariant`` computes, from the same weights, the values in its ``ys``; these
    are the weights of ``varying``.
    """
    crossing: dict[fx.Node, None] = {}
    outputs = step.outputs()
    for node in step.graph.nodes:
        if node.op != "output" and is_varying(node):
            crossing.update((n, None) for n in node.all_input_nodes if not is_varying(n))
    crossing.update((n, None) for n in outputs if not is_varying(n))
    return _copy_invariant(step, list(crossing)), _copy_varying(step, list(crossing))


def _copy_invariant(step: Step, crossing: list[fx.Node]) -> Step:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    weights = []
    for node in step.graph.nodes:
        if node in step.weights:
            env[node] = graph.placeholder(node.name)
            weights.append(env[node])
        elif node.op == "get_attr" or (node.op == "call_function" and not is_varying(node)):
            env[node] = graph.node_copy(node, env.__getitem__)
        else:
            continue
        env[node].meta = dict(node.meta)
    return Step(graph, step.root, step.unit, [], [], weights, ys=[env[n] for n in crossing], precision=step.precision)


def _copy_varying(step: Step, crossing: list[fx.Node]) -> Step:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in (*step.xs, *step.state, *crossing, *step.draws):
        env[node] = graph.placeholder(_role(node))
        env[node].meta = dict(node.meta)
    for node in step.graph.nodes:
        if node.op == "call_function" and is_varying(node):
            env[node] = graph.node_copy(node, env.__getitem__)
            env[node].meta = dict(node.meta)
    return Step(
        graph,
        step.root,
        step.unit,
        xs=[env[n] for n in step.xs],
        state=[env[n] for n in step.state],
        weights=[env[n] for n in crossing],
        draws=[env[n] for n in step.draws],
        ys=[None if n is None else env[n] for n in step.ys],
        next=[env[n] for n in step.next],
        kept={name: env[n] for name, n in step.kept.items()},
        precision=step.precision,
    )


def _role(node: fx.Node) -> str:
    """A name for an invariant value that says which weight it comes from: ``weight_hh_t``."""
    if node.op != "call_function":
        return node.name
    source = next((n for n in node.all_input_nodes), None)
    return node.name if source is None else f"{_role(source)}_{node.name.rstrip('_0123456789')}"


def partition(step: Step) -> Program:
    """Take an annotated step apart into invariant values, segments and loops, in the order in which they run."""
    needed = _ancestors(step.outputs())
    nodes = [n for n in step.graph.nodes if n in needed and n.op != "output"]
    reads = _state_reads(step, nodes)
    components = _components([reads[n] for n in step.next])
    owner = {i: c for c, members in enumerate(components) for i in members}
    cyclic = {
        c
        for c, members in enumerate(components)
        if len(members) > 1
        or (members[0] in reads[step.next[members[0]]] and step.next[members[0]] is not step.state[members[0]])
    }

    loop_of: dict[fx.Node, int] = {}
    for c in cyclic:
        feeds = _ancestors([step.next[i] for i in components[c]])
        loop_of.update(
            (n, c) for n in nodes if n in feeds and n.op == "call_function" and reads[n] & set(components[c])
        )

    for n in nodes:  # the parts of a result live where the result does
        if n.target is operator.getitem and n.args[0] in loop_of:
            loop_of[n] = loop_of[n.args[0]]

    stages = _stages(step, nodes, loop_of, owner, cyclic, components)
    invariant = [n for n in nodes if n.op == "call_function" and not is_varying(n)]
    varying = [n for n in nodes if n.op == "call_function" and is_varying(n)]
    found: dict[tuple[int, int], Segment | Loop] = {}
    for c in cyclic:
        found[stages[c], c] = Loop([n for n in varying if loop_of.get(n) == c], sorted(components[c]))
    # In the order in which _stages settled them: a register is read after what it holds is computed.
    for n in [n for n in stages if isinstance(n, fx.Node) and n.op == "call_function" and is_varying(n)]:
        if n not in loop_of:
            segment = found.setdefault((stages[n], -1), Segment([]))
            segment.nodes.append(n)
    parts = [found[key] for key in sorted(found)]
    return Program(step, invariant, parts)


def _ancestors(ends: list[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = list(ends)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


def _state_reads(step: Step, nodes: list[fx.Node]) -> dict[fx.Node, set[int]]:
    """For every node the state leaves, by index, that it depends on within one step."""
    reads: dict[fx.Node, set[int]] = {n: {i} for i, n in enumerate(step.state)}
    for node in nodes:
        if node not in reads:
            reads[node] = set().union(*(reads.get(n, set()) for n in node.all_input_nodes))
    return reads


def _components(reads: list[set[int]]) -> list[list[int]]:
    """Strongly connected components of the state graph (Tarjan 1972), those that are read first."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    found: list[list[int]] = []

    def visit(v: int) -> None:
        index[v] = low[v] = len(index)
        stack.append(v)
        for w in sorted(reads[v]):
            if w not in index:
                visit(w)
            if w in stack:
                low[v] = min(low[v], low[w])
        if low[v] == index[v]:
            at = stack.index(v)
            found.append(stack[at:])
            del stack[at:]

    for v in range(len(reads)):
        if v not in index:
            visit(v)
    return found


def _stages(
    step: Step,
    nodes: list[fx.Node],
    loop_of: dict[fx.Node, int],
    owner: dict[int, int],
    cyclic: set[int],
    components: list[list[int]],
) -> dict[fx.Node | int, int]:
    """When each node (and loop, by its number) can run: segments at even stages, loops at odd ones."""
    stages: dict[fx.Node | int, int] = {}
    leaf = {n: i for i, n in enumerate(step.state)}

    def after(node: fx.Node) -> int:
        """The first segment in which the values of ``node``, for all steps, are there."""
        if node in leaf:
            c = owner[leaf[node]]
            if step.next[leaf[node]] is node:  # never changes
                return 0
            return loop_stage(c) + 1 if c in cyclic else after(step.next[leaf[node]])
        if node in loop_of:
            return loop_stage(loop_of[node]) + 1
        if node not in stages:
            stages[node] = max((after(n) for n in node.all_input_nodes), default=0)
        return stages[node]

    def loop_stage(c: int) -> int:
        if c not in stages:
            inside = {n for n, owner_loop in loop_of.items() if owner_loop == c}
            inside |= {step.state[i] for i in components[c]}
            outside = {n for node in inside if node not in leaf for n in node.all_input_nodes} - inside
            outside |= {step.next[i] for i in components[c]} - inside
            stages[c] = max((after(n) for n in outside), default=0) + 1
        return stages[c]

    for c in cyclic:
        loop_stage(c)
    for node in nodes:
        if node not in loop_of:
            after(node)
    return stages
