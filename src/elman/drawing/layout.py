"""Where the nodes of a diagram stand: inputs below, outputs above; in an unrolled graph time goes to the right."""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import permutations

from .diagram import Diagram, Edge, Node

__all__ = ["Place", "group", "place", "ranks"]

Place = tuple[float, float]
COLUMN, ROW = 2.0, 1.45
_MOST_ORDERED = 5


def group(node: Node) -> str:
    """What a node is at all times."""
    return re.sub(r"\(\w+\)", "", node.name)


def ranks(diagram: Diagram) -> dict[str, int]:
    """The row of every group: above everything that it reads in the same step."""
    nodes = {node.name: node for node in diagram.nodes}
    below: dict[str, set[str]] = {group(node): set() for node in diagram.nodes}
    for edge in diagram.edges:
        a, b = nodes[edge.source], nodes[edge.target]
        if group(a) != group(b) and _upward(edge, a, b):
            below[group(b)].add(group(a))
    found: dict[str, int] = {}

    def rank(name: str, path: tuple[str, ...] = ()) -> int:
        if name not in found:
            found[name] = max((rank(n, (*path, name)) + 1 for n in sorted(below[name]) if n not in path), default=0)
        return found[name]

    for name in below:
        rank(name)
    kinds = {group(node): node.kind for node in diagram.nodes}
    for name, kind in kinds.items():
        above = [found[b] for b, sources in below.items() if name in sources]
        if not above and kind == "input":  # read later only
            above = [found[group(nodes[e.target])] for e in diagram.edges if group(nodes[e.source]) == name]
        if kind == "target":
            found[name] = max(above) + 1
        elif kind in ("input", "constant", "delay") and above:
            lower = kind == "constant" and diagram.unrolled and "input" in kinds.values()
            found[name] = min(above) - 1 - lower
    lowest = min(found.values(), default=0)
    return {name: r - lowest for name, r in found.items()}


def _upward(edge: Edge, a: Node, b: Node) -> bool:
    if edge.delay or b.kind == "delay":
        return False
    return a.time is None or b.time is None or a.clock != b.clock or a.time == b.time


def place(diagram: Diagram) -> dict[str, Place]:
    """The centre of every node."""
    return _columns(diagram) if diagram.unrolled else _layers(diagram)


def _rows(diagram: Diagram, rank: dict[str, int]) -> dict[str, tuple[float, float]]:
    """A row for every group and how far it stands aside: no two that recur share a row."""
    groups = list(dict.fromkeys(group(node) for node in diagram.nodes))
    kinds = {group(node): node.kind for node in diagram.nodes}
    aside = _between_steps(diagram) if diagram.unrolled else set()
    timed = {group(node): node.time is not None for node in diagram.nodes}
    y = 0.0
    found: dict[str, tuple[float, float]] = {}
    for level in range(max(rank.values(), default=0) + 1):
        here = [g for g in groups if rank[g] == level]
        lying = [g for g in here if kinds[g] in ("input", "constant", "target")]
        crowded = bool(lying) and any(timed[g] for g in here if g not in lying)
        for i, name in enumerate(lying):  # where something is computed at the same height, higher than that, and aside
            found[name] = (y + 0.6 * ROW * crowded, (i - (len(lying) - 1) / 2) * 0.75 - 0.78 * crowded)
        alone = [g for g in here if g not in lying and not timed[g]]
        found.update((name, (y, 0.0)) for name in alone)
        rest = [g for g in here if g not in lying and g not in alone]
        between = [g for g in rest if g in aside]
        found.update((name, (y, -COLUMN / 2)) for name in between)
        rest = [g for g in rest if g not in between]
        for i, name in enumerate(rest):
            found[name] = (y + i * 0.8 * ROW, 0.42 * i)
        y += ROW + 0.8 * ROW * max(0, len(rest) - 1) + 0.5 * ROW * crowded
    return found


def _between_steps(diagram: Diagram) -> set[str]:
    """What lies on the way from one step to the next and reads nothing of its own step stands between the two."""
    nodes = {node.name: node for node in diagram.nodes}
    reads: dict[str, set[str]] = defaultdict(set)
    for edge in diagram.edges:
        a, b = nodes[edge.source], nodes[edge.target]
        if _upward(edge, a, b):
            reads[group(b)].add(group(a))
    small = {group(n) for n in diagram.nodes if n.kind in ("hidden", "sum") and n.time is not None and not n.index}
    small = {g for g in small if not any(n.letter.isalpha() for n in diagram.nodes if group(n) == g)}
    while outer := {g for g in small if reads[g] - small}:
        small -= outer
    return small


def _columns(diagram: Diagram) -> dict[str, Place]:
    rows = _rows(diagram, ranks(diagram))
    begin = _beginnings(diagram)
    found: dict[str, Place] = {}
    for node in diagram.nodes:
        if node.time is not None:
            y, aside = rows[group(node)]
            found[node.name] = ((begin[node.clock] + (node.column or node.time)) * COLUMN + aside, y)
    xs = [x for x, _ in found.values()] or [0.0]
    for node in diagram.nodes:
        if node.time is None:
            near = [found[e.source][0] for e in diagram.into(node.name) if e.source in found]
            near = near or [found[e.target][0] for e in diagram.out_of(node.name) if e.target in found]
            middle = sum(near) / len(near) if near else (min(xs) + max(xs)) / 2
            y, aside = rows[group(node)]
            found[node.name] = (middle + aside, y)
    return found


def _beginnings(diagram: Diagram) -> dict[int, float]:
    """Where each clock begins: after the last step of one that it waits for, else beside it."""
    nodes = {node.name: node for node in diagram.nodes}
    clocks = sorted({node.clock for node in diagram.nodes if node.time is not None})
    ends = {c: max(n.column or n.time for n in diagram.nodes if n.clock == c and n.time is not None) for c in clocks}
    found: dict[int, float] = {}
    bound: dict[str, float] = {}  # of values that stand for all steps: where what they wait for ends
    for _ in range(len(diagram.nodes)):
        before = dict(bound), dict(found)
        for clock in clocks:
            into = [
                e.source for e in diagram.edges if nodes[e.target].clock == clock and nodes[e.target].time is not None
            ]
            found[clock] = max((_wait(nodes[name], clock, found, bound, ends) for name in into), default=0.0)
        for edge in diagram.edges:
            if nodes[edge.target].time is None:
                least = _wait(nodes[edge.source], -1, found, bound, ends)
                bound[edge.target] = max(bound.get(edge.target, 0.0), least)
        if before == (bound, found):
            break
    return found


def _wait(node: Node, clock: int, found: dict[int, float], bound: dict[str, float], ends: dict[int, int]) -> float:
    """The column after which what reads ``node`` can begin, if it counts other steps."""
    if node.time is None:
        return bound.get(node.name, 0.0)
    if node.clock == clock or (node.column or node.time) != ends[node.clock]:
        return 0.0
    return found.get(node.clock, 0.0) + ends[node.clock]


def _layers(diagram: Diagram) -> dict[str, Place]:
    rank = ranks(diagram)
    layers: dict[int, list[str]] = defaultdict(list)
    for node in diagram.nodes:
        layers[rank[group(node)]].append(node.name)
    near: dict[str, list[str]] = defaultdict(list)
    for edge in diagram.edges:
        if rank[_base(diagram, edge.source)] != rank[_base(diagram, edge.target)]:
            near[edge.source].append(edge.target)
            near[edge.target].append(edge.source)
    x = {name: (i - (len(layer) - 1) / 2) * COLUMN for layer in layers.values() for i, name in enumerate(layer)}
    for sweep in range(12):
        for level in sorted(layers, reverse=bool(sweep % 2)):
            layer = layers[level]
            wanted = {n: sum(x[m] for m in near[n]) / len(near[n]) if near[n] else x[n] for n in layer}
            layer.sort(key=lambda n: (diagram.node(n).kind == "delay", round(wanted[n], 6), x[n]))
            _spread(layer, wanted, x)
    y = {name: level * ROW for level, layer in layers.items() for name in layer}
    lines = [(e.source, e.target) for e in diagram.edges if not e.delay and diagram.node(e.target).kind != "delay"]
    for level in [*sorted(layers), *sorted(layers)]:
        _untangle([n for n in layers[level] if diagram.node(n).kind != "delay"], lines, x, y)
    return {name: (x[name], y[name]) for name in x}


def _base(diagram: Diagram, name: str) -> str:
    return group(diagram.node(name))


def _spread(layer: list[str], wanted: dict[str, float], x: dict[str, float]) -> None:
    """As near to where they want to be as the distance between neighbours allows, the middle of all kept."""
    at: list[float] = []
    for name in layer:
        at.append(max(wanted[name], at[-1] + COLUMN) if at else wanted[name])
    shift = (sum(wanted.values()) - sum(at)) / len(layer)
    for name, place in zip(layer, at, strict=True):
        x[name] = place + shift


def _untangle(layer: list[str], lines: list[tuple[str, str]], x: dict[str, float], y: dict[str, float]) -> None:
    """Exchange the places in a layer so that the fewest lines cross one another or run over nodes."""
    if not 2 <= len(layer) <= _MOST_ORDERED:
        return
    slots = sorted(x[name] for name in layer)
    best = min(permutations(layer), key=lambda order: _tangle(x | dict(zip(order, slots, strict=True)), y, lines))
    x.update(zip(best, slots, strict=True))


def _tangle(x: dict[str, float], y: dict[str, float], lines: list[tuple[str, str]]) -> float:
    count = 0.0
    for i, (a, b) in enumerate(lines):
        for c, d in lines[:i]:
            if len({a, b, c, d}) == 4:
                count += _sides(x, y, a, b, c, d) < 0 and _sides(x, y, c, d, a, b) < 0
        for n in x:
            if min(y[a], y[b]) < y[n] < max(y[a], y[b]):
                across = x[a] + (x[b] - x[a]) * (y[n] - y[a]) / (y[b] - y[a])
                count += abs(across - x[n]) < 0.7
        count += 0.01 * abs(x[a] - x[b])
    return count


def _sides(x: dict[str, float], y: dict[str, float], a: str, b: str, c: str, d: str) -> float:
    """Negative where c and d lie on different sides of the line from a to b."""
    left, right = (
        (x[b] - x[a]) * (y[n] - y[a]) - (y[b] - y[a]) * (x[n] - x[a]) for n in (c, d)
    )  # fmt: skip
    return left * right
