"""Big diagrams made readable: what repeats in the middle, steps or layers, becomes dots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .diagram import Diagram, Edge, Node
from .layout import group, ranks

__all__ = ["collapsed"]

MOST_STEPS, MOST_ROWS = 7, 12


def collapsed(diagram: Diagram) -> Diagram:
    """The same diagram with at most ``MOST_STEPS`` steps and ``MOST_ROWS`` rows, the middle ones as dots."""
    if diagram.unrolled:
        diagram = _steps_left_out(diagram)
    return _rows_left_out(diagram)


def _steps_left_out(diagram: Diagram) -> Diagram:
    last: dict[int, int] = {}
    for node in diagram.nodes:
        last[node.clock] = max(last.get(node.clock, 0), node.time or 0)
    first, kept = MOST_STEPS // 2 + 1, MOST_STEPS // 2 - 1

    def hidden(node: Node) -> Node | None:
        if node.time is None or last[node.clock] <= MOST_STEPS or not first < node.time <= last[node.clock] - kept:
            return None
        return Node(f"{group(node)}(more)", "more", r"$\cdots$", time=first + 1, clock=node.clock)

    moved = _replaced(diagram, hidden)
    shift = {clock: count - first - kept - 1 for clock, count in last.items() if count > MOST_STEPS}
    columns = {
        n.name: n.time - shift.get(n.clock, 0) if n.time is not None and n.time > first + 1 else n.time
        for n in moved.nodes
    }
    return replace(moved, nodes=tuple(n.placed(columns[n.name]) for n in moved.nodes))


def _rows_left_out(diagram: Diagram) -> Diagram:
    rank = ranks(diagram)
    highest = max(rank.values(), default=0)
    if highest < MOST_ROWS:
        return diagram
    low, high = MOST_ROWS // 2 - 2, highest - MOST_ROWS // 2 + 1

    def hidden(node: Node) -> Node | None:
        if not low < rank[group(node)] < high:
            return None
        name = "more" if node.time is None else f"more({node.time})"
        return Node(name, "more", r"$\vdots$", time=node.time, clock=node.clock, column=node.column)

    return _replaced(diagram, hidden)


def _replaced(diagram: Diagram, hidden: Callable[[Node], Node | None]) -> Diagram:
    """Every node for which ``hidden`` gives another one is that one; edges among the hidden are gone."""
    instead = {node.name: other for node in diagram.nodes if (other := hidden(node)) is not None}
    nodes = dict.fromkeys(instead.get(node.name, node) for node in diagram.nodes)
    edges: dict[tuple[str, str, int], Edge] = {}
    for edge in diagram.edges:
        a, b = instead.get(edge.source), instead.get(edge.target)
        if a is not None and b is not None:
            continue
        source, target = (a.name if a else edge.source), (b.name if b else edge.target)
        edges.setdefault((source, target, edge.delay), replace(edge, source=source, target=target))
    joined = {name for edge in edges.values() for name in (edge.source, edge.target)}
    kept = tuple(node for node in nodes if node.kind != "more" or node.name in joined)
    return replace(diagram, nodes=kept, edges=tuple(edges.values()))
