"""A diagram as a picture, by matplotlib: circles, arrows, black squares for delays, a colour for every loop."""

from __future__ import annotations

import io
import math
from typing import Any

from .diagram import Diagram, Edge, Node
from .layout import Place, place

__all__ = ["rendered"]

RADIUS = 0.36
SEGMENT = ("#dcebf7", "#27618f")
LOOPS = (("#fde2c4", "#b4530a"), ("#dcefcf", "#40781c"), ("#ecdcf6", "#7438a8"), ("#fbd7e0", "#b02a58"))
PLAIN = ("#ffffff", "#333333")
_SQUARE, _NAME = 0.13, 11
_INCHES = 0.52
_UNIT = 72 * _INCHES
"""Points in the picture for one unit of the layout."""
_WHEN = {"first": ("first step",), "last": ("last step",), "all": ("all steps",)}
_STYLE: dict[Any, Any] = {
    "mathtext.fontset": "cm", "font.family": "DejaVu Sans", "svg.hashsalt": "elman", "svg.fonttype": "path",
    "path.simplify": False,
}  # fmt: skip


def rendered(diagram: Diagram, form: str) -> bytes:
    """The picture as "svg" or "png", always the same bytes for the same diagram."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(dpi=120)
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_aspect("equal")
        _Pen(axes, diagram).draw()
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        figure.set_size_inches((right - left) * _INCHES, (high - low) * _INCHES)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=form, metadata={"Date": None} if form == "svg" else {"Software": None})
    return buffer.getvalue()


class _Pen:
    def __init__(self, axes: Any, diagram: Diagram) -> None:
        self.axes, self.diagram = axes, diagram
        self.places = place(diagram)
        self.nodes = {node.name: node for node in diagram.nodes}
        self.boxes = {node.name: box for node in diagram.nodes if (box := self._box(node))}
        self.paths = {edge: self._path(edge) for edge in diagram.edges}
        self.taken = [_bezier(p, i / 16) for p in self.paths.values() for i in range(17)]
        for node in diagram.nodes:
            (x, y), (wide, high) = self.places[node.name], self.boxes.get(node.name, (0.3, 0.25))
            self.taken += [(x - wide, y), (x - wide / 2, y), (x, y), (x + wide / 2, y), (x + wide, y)]
            self.taken += [(x + i * wide * 0.8, y + j * high) for i in (-1, 1) for j in (-1, 1) if node.letter]
        xs, ys = zip(*self.places.values(), strict=True)
        self.box = [min(xs) - 0.8, max(xs) + 0.8, min(ys) - 0.7, max(ys) + 0.7]

    def draw(self) -> None:
        for edge in self.diagram.edges:
            self._edge(edge)
        for node in self.diagram.nodes:
            self._node(node)
        self._legend()
        self.axes.set_xlim(self.box[0], self.box[1])
        self.axes.set_ylim(self.box[2], self.box[3])

    def _box(self, node: Node) -> Place | None:
        """Half the width and height of what is no circle: gates, and long names where there is room beside them."""
        if node.kind == "gate":
            return 0.67, 0.25
        if node.kind in ("operator", "sum", "more", "delay") or len(node.letter) < 4 or node.letter.startswith("\\"):
            return None
        x, y = self.places[node.name]
        near = [abs(x - u) for name, (u, v) in self.places.items() if name != node.name and abs(y - v) < 0.65]
        wide = min(0.5 * _letters(node) * _NAME / _UNIT + 0.1, 0.88, *(d / 2 - 0.05 for d in near))
        return (wide, 0.27) if wide > RADIUS else None

    def _reach(self, x: float, y: float, around: float = 0.35) -> None:
        box = self.box
        box[:] = [min(box[0], x - around), max(box[1], x + around), min(box[2], y - around), max(box[3], y + around)]

    def _node(self, node: Node) -> None:
        from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

        x, y = self.places[node.name]
        fill, line = _colours(node.loop)
        radius = _radius(node)
        if node.kind == "delay":
            shape: Any = Rectangle((x - radius, y - radius), 2 * radius, 2 * radius)
            fill = line = "#111111"
        elif node.name in self.boxes:
            wide, high = (side - 0.05 for side in self.boxes[node.name])
            corner = (x - wide, y - high)
            self._reach(x - wide, y, 0.15)
            self._reach(x + wide, y, 0.15)
            shape = FancyBboxPatch(corner, 2 * wide, 2 * high, boxstyle="round,pad=0.05,rounding_size=0.12")
        elif node.kind == "more":
            self.axes.text(x, y, node.letter, ha="center", va="center", fontsize=15, color="#333333", zorder=4)
            return
        else:
            shape = Circle((x, y), radius)
        shape.set(facecolor=fill, edgecolor=line, linewidth=1.3, zorder=3)
        self.axes.add_patch(shape)
        if node.kind == "gate":
            self.axes.text(x, y, node.letter, ha="center", va="center", fontsize=8.5, color="#111111", zorder=4)
        elif node.kind != "delay":
            self.axes.text(
                x, y, node.label, ha="center", va="center", fontsize=self._size(node), color="#111111", zorder=4
            )
        if self._captioned(node):
            self.axes.text(
                x - radius - 0.08, y, node.caption, ha="right", va="center", fontsize=8, color="#555555", zorder=4
            )
            self._reach(x - radius - 0.2 - 0.13 * len(node.caption), y, 0)

    def _size(self, node: Node) -> float:
        """The size of the letters of a name, in points: smaller where it would reach over its circle or box."""
        usual = 12 if node.time is not None and node.kind != "operator" else 14 if len(node.letter) < 3 else _NAME
        if len(node.letter) < 3 or node.letter.startswith("\\") or node.kind in ("operator", "sum"):
            return usual
        room = self.boxes.get(node.name, (RADIUS, 0.0))[0] - 0.05
        return min(usual, 2 * room * _UNIT / _letters(node))

    def _captioned(self, node: Node) -> bool:
        return bool(node.caption) and node.time in (None, 1)

    def _path(self, edge: Edge) -> list[Place]:
        """The four points of the curve of an edge."""
        a, b = self.places[edge.source], self.places[edge.target]
        if edge.source == edge.target:
            same = [e for e in self.diagram.into(edge.target) if e.source == edge.source]
            out = 1.3 + 1.25 * same.index(edge)
            (x, y), high = a, 0.6 + 0.12 * out
            return [a, (x + out, y + high), (x + out, y - high), a]
        back = not self.diagram.unrolled and edge.delay
        if self.nodes[edge.target].kind == "delay":
            outer = max(x + 0.7 * (self.nodes[n].kind == "gate") for n, (x, _) in self.places.items())
            right = (outer + 0.5 - a[0] / 8 - b[0] / 8) * 4 / 3
            return [a, (right, a[1] + 0.5), (right, b[1] - 0.3), b]
        bows = (0.9, -0.9, 1.5, -1.5, 2.2, -2.2, 3.0, -3.0, 4.0) if back else (0.0, 0.55, -0.55, 0.95, -0.95, 1.4, -1.4)
        ends = {edge.source, edge.target}
        parallel = [e for e in self.diagram.into(edge.target) if e.source == edge.source].index(edge)
        curves = [_curve(a, b, bow) for bow in bows[parallel:]]
        return next((c for c in curves if not any(self._hits(c, n) for n in self.places if n not in ends)), curves[0])

    def _edge(self, edge: Edge) -> None:
        points = self.paths[edge]
        self._arrow(edge, points, self.nodes[edge.source], self.nodes[edge.target])
        middle = _bezier(points, 0.5)
        if edge.delay:
            self._square(*middle, edge.delay)
        words = [edge.label] if edge.label and self._labelled(edge) else []
        words += _WHEN.get(edge.when, ())
        if words:
            text = "\n".join(words)
            self._text(*self._free(edge, points), text, edge.loop)

    def _labelled(self, edge: Edge) -> bool:
        """What leaves one node by one weight for many is labelled once."""
        same = [e for e in self.diagram.out_of(edge.source) if e.label == edge.label and e.delay == edge.delay]
        return len(same) <= 2 or same[-1] is edge

    def _free(self, edge: Edge, points: list[Place]) -> Place:
        """Where beside an edge there is most room for its label."""
        away = 0.3 + 0.025 * len(edge.label) if edge.delay else 0.5 if edge.when in _WHEN else 0.24
        best, room = points[0], -1.0
        for t in (0.5,) if edge.delay else (0.5, 0.42, 0.58, 0.34, 0.66, 0.28, 0.72):
            (x, y), (nx, ny) = _bezier(points, t), _normal(points, t)
            sides = (1, -1) if nx > 0 or (abs(nx) < 1e-9 and ny < 0) else (-1, 1)
            for side in sides:
                spot = (x + side * away * nx, y + side * away * ny)
                free = min(min(_far(spot, taken) for taken in self.taken), 0.3)
                if free > room + 0.02:
                    best, room = spot, free
        self.taken += [(best[0] - 0.2, best[1]), best, (best[0] + 0.2, best[1])]
        return best

    def _hits(self, points: list[Place], name: str) -> bool:
        """Whether a curve runs over a node."""
        near = _radius(self.nodes[name]) + 0.08
        wide = self.boxes[name][0] + 0.05 if name in self.boxes else near
        p, q = self.places[name]
        left = wide + (0.3 + 0.11 * len(self.nodes[name].caption) if self._captioned(self.nodes[name]) else 0)
        return any(
            -left < s - p < wide and abs(t - q) < near for s, t in (_bezier(points, i / 24) for i in range(1, 24))
        )

    def _arrow(self, edge: Edge, points: list[Place], a: Node, b: Node) -> None:
        from matplotlib.patches import FancyArrowPatch
        from matplotlib.path import Path

        first = next(i for i in range(101) if not self._inside(_bezier(points, i / 100), a))
        last = next(i for i in range(100, -1, -1) if not self._inside(_bezier(points, i / 100), b))
        begin, end = (first / 100, last / 100) if first < last else (0.3, 0.7)
        piece = _piece(points, begin, end)
        for i in range(9):
            self._reach(*_bezier(piece, i / 8), around=0.15)
        path = Path(piece, [Path.MOVETO, *[Path.CURVE4] * 3])
        self.axes.add_patch(
            FancyArrowPatch(
                path=path, arrowstyle="-|>", mutation_scale=10, linewidth=1.2, color=_colours(edge.loop)[1], zorder=2
            )
        )

    def _inside(self, spot: Place, node: Node) -> bool:
        (x, y), box = self.places[node.name], self.boxes.get(node.name)
        if box:
            return abs(spot[0] - x) < box[0] + 0.02 and abs(spot[1] - y) < box[1] + 0.02
        return math.hypot(spot[0] - x, spot[1] - y) < _radius(node) + 0.03

    def _square(self, x: float, y: float, delay: int) -> None:
        from matplotlib.patches import Rectangle

        self.axes.add_patch(
            Rectangle(
                (x - _SQUARE, y - _SQUARE), 2 * _SQUARE, 2 * _SQUARE,
                facecolor="#111111" if delay > 0 else "#ffffff", edgecolor="#111111", linewidth=1.3, zorder=4,
            )
        )  # fmt: skip
        if abs(delay) > 1:
            self.axes.text(x, y - 0.3, f"{abs(delay)}", fontsize=8, ha="center", va="center", zorder=5)

    def _text(self, x: float, y: float, text: str, loop: int | None) -> None:
        size = 9 if " " in text else 11
        self.axes.text(x, y, text, ha="center", va="center", fontsize=size, color=_colours(loop)[1], zorder=5)
        self._reach(x, y, 0.45 if " " in text else 0.2)

    def _legend(self) -> None:
        """What colours and squares mean, where there are any."""
        from matplotlib.patches import Rectangle

        marks = {n.loop for n in self.diagram.nodes} | {e.loop for e in self.diagram.edges}
        lines: list[tuple[str, str, str]] = []
        if 0 in marks:
            lines.append((*SEGMENT, "segment: all steps at once"))
        loops = sorted(m for m in marks if m)  # counted as they are seen: one that carries a counter alone is not
        for i, loop in enumerate(loops if len(loops) < 5 else loops[:2], 1):
            lines.append((*_colours(loop), f"loop {i if len(loops) > 1 else ''}".rstrip() + ": step after step"))
        if len(loops) > 4:
            lines.append((*_colours(loops[-1]), f"… loop {len(loops)}"))
        delays = {e.delay for e in self.diagram.edges} | (
            {1} if any(n.kind == "delay" for n in self.nodes.values()) else set()
        )
        if any(d > 0 for d in delays):
            lines.append(("#111111", "#111111", "delay of one step"))
        if any(d < 0 for d in delays):
            lines.append(("#ffffff", "#111111", "one step back in time"))
        x, y = self.box[0] + 0.25, self.box[2] - 0.15
        for fill, line, words in lines:
            self.axes.add_patch(Rectangle((x, y - 0.11), 0.22, 0.22, facecolor=fill, edgecolor=line, linewidth=1.1))
            self.axes.text(x + 0.34, y - 0.01, words, fontsize=7.5, va="center", color="#333333")
            y -= 0.36
        if lines:
            self.box[1] = max(self.box[1], x + 3.4)
            self.box[2] = y


def _radius(node: Node) -> float:
    if node.kind == "delay":
        return 0.14
    if node.kind in ("sum", "operator"):
        return 0.2
    return RADIUS if node.letter else 0.2


def _letters(node: Node) -> float:
    """How wide a name is, in sizes of its font."""
    from matplotlib.textpath import TextPath

    return float(TextPath((0, 0), node.label, size=100).get_extents().width) / 100


def _colours(loop: int | None) -> tuple[str, str]:
    if loop is None:
        return PLAIN
    return SEGMENT if loop == 0 else LOOPS[(loop - 1) % len(LOOPS)]


def _bezier(points: list[Place], t: float) -> Place:
    s = 1 - t
    parts = (s * s * s, 3 * s * s * t, 3 * s * t * t, t * t * t)
    x, y = (sum(w * p[i] for w, p in zip(parts, points, strict=True)) for i in (0, 1))
    return x, y


def _curve(a: Place, b: Place, bow: float) -> list[Place]:
    """From a to b, bent aside."""
    (x, y), (u, v) = a, b
    length = math.hypot(u - x, v - y) or 1.0
    ax, ay = -(v - y) / length * bow, (u - x) / length * bow
    return [a, (x + (u - x) / 3 + ax, y + (v - y) / 3 + ay), (x + 2 * (u - x) / 3 + ax, y + 2 * (v - y) / 3 + ay), b]


def _far(a: Place, b: Place) -> float:
    return math.hypot(a[0] - b[0], a[1] - b[1])


def _piece(points: list[Place], begin: float, end: float) -> list[Place]:
    """The part of a cubic curve between two of its parameters, as a curve of its own."""
    third = (end - begin) / 3
    ends = [(_bezier(points, t), _slope(points, t)) for t in (begin, end)]
    (a, (ax, ay)), (b, (bx, by)) = ends
    return [a, (a[0] + third * ax, a[1] + third * ay), (b[0] - third * bx, b[1] - third * by), b]


def _slope(points: list[Place], t: float) -> Place:
    """The derivative of a cubic curve."""
    s = 1 - t
    parts = (-3 * s * s, 3 * s * s - 6 * s * t, 6 * s * t - 3 * t * t, 3 * t * t)
    x, y = (sum(w * p[i] for w, p in zip(parts, points, strict=True)) for i in (0, 1))
    return x, y


def _normal(points: list[Place], t: float) -> Place:
    (x, y), (u, v) = _bezier(points, t - 0.01), _bezier(points, t + 0.01)
    length = math.hypot(u - x, v - y) or 1.0
    return -(v - y) / length, (u - x) / length
