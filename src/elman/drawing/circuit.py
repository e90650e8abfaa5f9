"""From the values that are shown to a Diagram: folded into one step with delays, or step by step."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

from ..errors import InputError
from .diagram import Diagram, Edge, Node, When
from .keys import Link, Role, Shown, shown
from .letters import clocks_of, named, weight_labels
from .marks import carried_by, in_loops
from .unrolling import Unrolled

__all__ = ["circuit", "unrolled"]

Pair = tuple[int | None, int | None]


def circuit(seen: Unrolled, *, detail: bool = False) -> Diagram:
    """One step of everything, with the delays between steps."""
    found, loops, note, folded, nodes, label, inside = _looked_at(seen, detail)
    edges = []
    for (a, b), parts in folded.items():
        for when, delay, weights in parts:
            mark = _edge_mark(inside, a, b, loops is not None)
            edges.append(Edge(nodes[a].name, nodes[b].name, delay, weights, label(a, b, weights), when, mark))
    marked = tuple(_with_loop(nodes[r], inside.get(r), loops is not None) for r in found.roles)
    return Diagram(marked, tuple(edges), False, loops, note)


def unrolled(seen: Unrolled, *, detail: bool = False) -> Diagram:
    """Every step on its own: the graph through which gradients flow."""
    found, loops, note, _, nodes, label, inside = _looked_at(seen, detail)

    def name(role: Role, t: int | None) -> str:
        return nodes[role].name if t is None else f"{nodes[role].name}({t + 1})"

    marked = []
    for role, t in found.atoms:
        node = _with_loop(nodes[role], inside.get(role), loops is not None)
        marked.append(node.at(name(role, t), None if t is None else t + 1))
    edges = []
    for link in found.links:
        (a, t), (b, u) = link.source, link.target
        mark = _edge_mark(inside, a, b, loops is not None)
        edges.append(Edge(name(a, t), name(b, u), 0, link.weights, label(a, b, link.weights), "every", mark))
    return Diagram(tuple(marked), tuple(edges), True, loops, note).without_orphans()


def _looked_at(seen: Unrolled, detail: bool) -> tuple[Any, ...]:
    """What both pictures are made of: what is shown, how many loops, a note, its folded links, nodes, labels, loops."""
    found = shown(seen, detail)
    if not found.links:
        raise InputError(
            "nothing that comes out depends on what goes in, as far as it can be seen, so there is nothing to draw. "
            "What unfolds its cells otherwise than by elman.scan or a Python loop cannot be followed: draw the cell."
        )
    loops, note = _loops(seen)
    folded = _folded(found)
    nodes = named(found, folded, clocks_of(found, folded))
    label = weight_labels(found, folded, nodes)
    return found, loops, note, folded, nodes, label, _loop_of_roles(seen, found, loops)


def _loops(seen: Unrolled) -> tuple[int | None, str]:
    """How many loops the programs have, or None and why that is not known."""
    reasons = [why for run in seen.runs if isinstance(why := carried_by(run), str)]
    if not seen.runs or reasons:
        return None, reasons[0] if reasons else ""
    return sum(len(carried_by(run)) for run in seen.runs), ""


def _loop_of_roles(seen: Unrolled, found: Shown, loops: int | None) -> dict[Role, int]:
    """The loop, from 1, of every role that is in one, as in the middle step of each run."""
    if loops is None:
        return {}
    places = {atom: role for (role, _), atom in found.atoms.items()}
    inside: dict[Role, int] = {}
    first = 1
    for run in seen.runs:
        carried = carried_by(run)
        assert not isinstance(carried, str)
        for atom, number in in_loops(run.calls[len(run.calls) // 2], carried).items():
            if atom in places:
                inside[places[atom]] = first + number
        first += len(carried)
    return inside


def _edge_mark(inside: dict[Role, int], a: Role, b: Role, compiled: bool) -> int | None:
    if not compiled:
        return None
    return inside[b] if b in inside and inside.get(a) == inside[b] else 0


def _with_loop(node: Node, loop: int | None, compiled: bool) -> Node:
    if node.kind in ("input", "constant", "target"):
        return node
    return replace(node, loop=loop or 0) if compiled else node


Part = tuple[When, int, tuple[str, ...]]


def _folded(found: Shown) -> dict[tuple[Role, Role], list[Part]]:
    """For every pair of roles the ways in which one reads the other: when, and how many steps later."""
    pairs: dict[tuple[Role, Role], dict[Pair, Link]] = defaultdict(dict)
    for link in found.links:
        pairs[link.source[0], link.target[0]][link.source[1], link.target[1]] = link
    times = {role: [t for t in found.times(role) if t is not None] for role in found.roles}
    return {
        (a, b): _parts(times[a], times[b], links, _of_one_run(a, b), b in found.reversed)
        for (a, b), links in pairs.items()
    }


def _of_one_run(a: Role, b: Role) -> bool:
    return isinstance(a, tuple) and isinstance(b, tuple) and isinstance(a[0], int) and a[0] == b[0]


def _parts(
    sources: list[int], targets: list[int], links: dict[Pair, Link], one_run: bool, backward: bool
) -> list[Part]:
    weights = tuple(dict.fromkeys(w for link in links.values() for w in link.weights))
    if not targets or not sources:  # one of them stands for all steps
        if targets:
            return _from_constant(len(targets), links)
        if sources and not targets:
            return [("all" if len(links) == len(sources) > 1 else "last", 0, weights)]
        return [("every", 0, weights)]
    pairs = [(t, u) for t, u in links if t is not None and u is not None]
    if len(pairs) == len(sources) * len(targets) and len(sources) > 2:
        return [("all", 0, weights)]
    if len({t for t, _ in pairs}) == 1 and len(pairs) == len(targets) > 2:
        return [("last", 0, weights)]
    found: list[Part] = []
    for delay in sorted({u - t for t, u in pairs}):
        possible = sum(t + delay in targets for t in sources)
        # One link alone is a delay that is seen at work once, unless it makes the first state of another run.
        often = possible > 1 or len(targets) < 3 or one_run or (delay > 0 and not backward)
        if often and sum(u - t == delay for t, u in pairs) == possible:
            found.append(("every", delay, _weights_of(links, delay)))
    return found or [("first", 0, weights)]


def _from_constant(steps: int, links: dict[Pair, Link]) -> list[Part]:
    """A value that stands for all steps is read at each, or at the first alone, by weights of its own."""
    by_weights: dict[tuple[str, ...], int] = defaultdict(int)
    for link in links.values():
        by_weights[link.weights] += 1
    return [("first" if count == 1 and steps > 1 else "every", 0, weights) for weights, count in by_weights.items()]


def _weights_of(links: dict[Pair, Link], delay: int) -> tuple[str, ...]:
    mine = (link for (t, u), link in links.items() if t is not None and u is not None and u - t == delay)
    return tuple(dict.fromkeys(w for link in mine for w in link.weights))
