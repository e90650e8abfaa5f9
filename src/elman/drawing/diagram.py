"""The form between a network and its picture: nodes and edges, in one step with delays, or unrolled."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

__all__ = ["Diagram", "Edge", "Kind", "Node", "When"]

Kind = Literal[
    "input", "constant", "state", "hidden", "sum", "operator", "gate", "output", "target", "loss", "delay", "more"
]  # fmt: skip
When = Literal["every", "first", "last", "all"]


@dataclass(frozen=True)
class Node:
    """A value, named: ``letter`` with ``index`` where several share it, ``time`` in an unrolled graph.

    ``loop`` is the number of the loop of the compiled program that computes it, 0 outside of loops, None where
    nothing is computed or nothing compiled. ``clock`` counts the sequences of different length, ``output`` says that
    it leaves the network.
    """

    name: str
    kind: Kind
    letter: str = ""
    index: str = ""
    time: int | None = None
    timed: bool = True
    loop: int | None = None
    clock: int = 0
    caption: str = ""
    output: bool = False
    column: int | None = field(default=None, compare=False)

    @property
    def label(self) -> str:
        """What stands in the picture, in mathematical notation."""
        if not self.letter:
            return ""
        if self.kind in ("operator", "sum", "more"):
            return self.letter
        words = self.letter if len(self.letter) == 1 or self.letter.startswith("\\") else rf"\mathrm{{{self.letter}}}"
        low = f"_{{{self.index}}}" if self.index else ""
        high = "" if self.time is None else f"^{{({self.time})}}"
        return f"${words}{low}{high}$"

    def at(self, name: str, time: int | None) -> Node:
        """The same value at one time of an unrolled graph."""
        return replace(self, name=name, time=time, column=time)

    def placed(self, column: int | None) -> Node:
        """The same node in another column of the picture."""
        return replace(self, column=column)


@dataclass(frozen=True)
class Edge:
    """``source`` is read by ``target``, ``delay`` steps later (the black squares); negative against time.

    ``when`` other than "every" holds in a circuit alone: "first" at the first step only (an initial state), "last"
    from the last step of the source, "all" from all its steps. ``weights`` are names of parameters, ``label`` how
    they are written; ``loop`` as for a node.
    """

    source: str
    target: str
    delay: int = 0
    weights: tuple[str, ...] = ()
    label: str = ""
    when: When = "every"
    loop: int | None = None


@dataclass(frozen=True)
class Diagram:
    """A circuit (one step, with delays) or an unrolled graph (``unrolled``: every step on its own).

    ``loops`` is how many loops the compiled program has; None where there is no program, and ``note`` says why.
    """

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    unrolled: bool = False
    loops: int | None = None
    note: str = ""
    title: str = field(default="", compare=False)

    def titled(self, title: str) -> Diagram:
        return replace(self, title=title)

    def node(self, label: str) -> Node:
        """The node of that name or label. Raises KeyError."""
        for node in self.nodes:
            if label in (node.name, node.label, node.label.strip("$")):
                return node
        raise KeyError(label)

    def into(self, name: str) -> list[Edge]:
        return [edge for edge in self.edges if edge.target == name]

    def out_of(self, name: str) -> list[Edge]:
        return [edge for edge in self.edges if edge.source == name]

    def with_loss(self) -> Diagram:
        """The same with a loss L and a target y on every output; a sequence that is called y is taken as the target."""
        nodes, edges = list(self.nodes), list(self.edges)
        fed = [n for n in nodes if n.kind == "input" and n.letter == "y"]
        for o in [node for node in self.nodes if node.output]:
            time = "" if o.time is None else f"({o.time})"
            plain = replace(o, index="", caption="", output=False, loop=None)
            loss = replace(plain, name=f"L{o.index}{time}", kind="loss", letter="L", loop=o.loop and 0, index=o.index)
            y = replace(plain, name=f"y{o.index}{time}", kind="target", letter="y", index=o.index)
            same = [n for n in fed if n.time == o.time]
            y = replace(same[0], kind="target") if same else replace(y, clock=fed[0].clock) if fed else y
            nodes = [n for n in nodes if n.name != y.name] + [loss, y]
            edges += [Edge(o.name, loss.name, loop=loss.loop), Edge(y.name, loss.name, loop=loss.loop)]
        return replace(self, nodes=tuple(nodes), edges=tuple(edges))

    def without_orphans(self) -> Diagram:
        """Less the unnamed values that are computed from a first state of zeros alone."""
        read = {edge.target for edge in self.edges}
        gone = {
            n.name for n in self.nodes if n.kind in ("hidden", "sum") and n.name not in read and not n.letter.isalpha()
        }
        if not gone:
            return self
        nodes = tuple(n for n in self.nodes if n.name not in gone)
        edges = tuple(e for e in self.edges if e.source not in gone)
        return replace(self, nodes=nodes, edges=edges).without_orphans()

    def with_delay_nodes(self) -> Diagram:
        """A delay that several nodes read behind becomes a node of its own, a black square that they share."""
        nodes, edges = list(self.nodes), []
        for edge in self.edges:
            same = [e for e in self.out_of(edge.source) if e.delay == edge.delay]
            if not edge.delay or len(same) < 2:
                edges.append(edge)
                continue
            square = Node(f"{edge.source}/{edge.delay}", "delay", str(edge.delay), loop=self.node(edge.source).loop)
            if square not in nodes:
                nodes.append(square)
                edges.append(Edge(edge.source, square.name, loop=square.loop))
            edges.append(replace(edge, source=square.name, delay=0))
        return replace(self, nodes=tuple(nodes), edges=tuple(edges))
