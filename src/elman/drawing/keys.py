"""From all that a network computed to what a picture shows: states, inputs, outputs, what weights act upon."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from .unrolling import Unrolled
from .values import Atom
from .watch import LEARNED, Call, Run

__all__ = ["Link", "Role", "Shown", "shown"]

UNSEEN = ("nothing", "start")
"""What stands where nothing was computed: zeros of a register, a first state."""

_PLAIN = ("add", "sub", "mul", "product", "join", *UNSEEN)

Role = Hashable
"""Which value of a network it is, the same in every step."""


class Link(NamedTuple):
    """One shown value is computed from another, through these weights."""

    source: tuple[Role, int | None]
    target: tuple[Role, int | None]
    weights: tuple[str, ...]


@dataclass
class Shown:
    """The values that are shown, by role and time, in the order in which they were first met, and their links."""

    detail: bool = False
    atoms: dict[tuple[Role, int | None], Atom] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)
    states: set[Role] = field(default_factory=set)
    outputs: set[Role] = field(default_factory=set)
    reversed: set[Role] = field(default_factory=set)
    cells: dict[Role, str] = field(default_factory=dict)

    def times(self, role: Role) -> list[int | None]:
        return [t for r, t in self.atoms if r == role]

    @property
    def roles(self) -> list[Role]:
        return list(dict.fromkeys(role for role, _ in self.atoms))


def shown(seen: Unrolled, detail: bool) -> Shown:
    """Choose what is shown, and follow what each is computed from."""
    runs = {run: i for i, run in enumerate(seen.runs)}
    backward = {run for run in seen.runs if _runs_backward(run)}
    ends = [atom for atoms in seen.outputs for atom in atoms]
    reached = _ancestors(ends)
    states = _states(seen, reached)
    keys = {a for a in reached if a.op in ("input", "constant")} | states | {a for a in ends if a.op not in UNSEEN}
    keys |= {operand for a in reached if a.weights for i in a.inputs for operand in _operands(i, detail)}
    keys |= {i for a in keys - states if a.op == "add" for i in a.inputs if i.op not in _PLAIN}  # around a shortcut
    if detail:
        keys |= {a for a in reached if a.call and _is_detail(a)}

    first: dict[Atom, tuple[Role, int | None]] = {}

    def place(atom: Atom) -> tuple[Role, int | None]:
        if atom in first:
            return first[atom]
        if atom.op in ("input", "constant"):
            return (atom.op, atom.label), atom.part
        if atom.call is None:
            return ("outside", atom.event, atom.op), atom.part
        call = atom.call
        t = len(call.run.calls) - 1 - call.index if call.run in backward else call.index
        return (runs[call.run], atom.event, atom.op, atom.part), t

    first.update({atom: (place(later)[0], t) for atom, later, t in _first_states(seen, backward) if atom in reached})
    keys |= set(first)
    found = Shown(detail)
    for atom in sorted(keys, key=lambda a: a.serial):
        found.atoms[place(atom)] = atom
    for atom in [a for a in reached if a in keys]:
        for source, weights in _sources(atom, keys).items():
            found.links.append(Link(place(source), place(atom), tuple(sorted(weights))))
    found.states = {place(a)[0] for a in states}
    found.outputs = {place(a)[0] for a in ends if a.op not in UNSEEN}
    found.reversed = {place(a)[0] for a in keys if a.call and a.call.run in backward}
    found.cells = {place(a)[0]: seen.modules.get(a.owner, "") for a in sorted(keys, key=lambda a: a.serial)}
    return found if detail else _merged(found, _twins(seen, place))


def _runs_backward(run: Run) -> bool:
    times = [
        a.part for call in run.calls[:2] for v in call.xs for a in v.atoms if a.op == "input" and a.part is not None
    ]
    if len(times) >= 2:
        return times[1] < times[0]
    return False


def _ancestors(ends: list[Atom]) -> list[Atom]:
    """Everything that ``ends`` were computed from, sources first."""
    found: dict[Atom, None] = {}
    stack: list[tuple[Atom, bool]] = [(atom, False) for atom in reversed(ends)]
    opened: set[Atom] = set()
    while stack:
        atom, done = stack.pop()
        if done:
            found.setdefault(atom)
        elif atom not in opened:
            opened.add(atom)
            stack.append((atom, True))
            stack += [(i, False) for i in reversed(atom.inputs)]
    return list(found)


def _states(seen: Unrolled, reached: list[Atom]) -> set[Atom]:
    alive = set(reached)
    leaves = [
        v for run in seen.runs for call in run.calls for v in (*call.after, *(call.before if not call.index else ()))
    ]
    return {a for value in leaves for a in value.atoms if a in alive and a.op not in (*UNSEEN, "input", "constant")}


def _first_states(seen: Unrolled, backward: set[Run]) -> Iterator[tuple[Atom, Atom, int]]:
    """What a run starts from, where that was made for it: h(0), with what follows it and its time, before the first."""
    for run in seen.runs:
        for before, after in zip(run.calls[0].before, run.calls[0].after, strict=False):
            for atom, later in zip(before.atoms, after.atoms, strict=False):
                own = atom.call is None and atom.op not in UNSEEN and (atom.op != "constant" or atom.label == LEARNED)
                if own and atom.op != "input" and later.call is run.calls[0]:
                    yield atom, later, len(run.calls) if run in backward else -1


def _operands(atom: Atom, detail: bool) -> list[Atom]:
    """What a weight acts upon; a gate on the way to it is not a value of its own, except in detail."""
    through = ("join",) if detail else ("join", "mul")
    if atom.op in through:
        return [found for i in atom.inputs for found in _operands(i, detail)] if atom.op == "join" else []
    return [] if atom.op in UNSEEN else [atom]


def _is_detail(atom: Atom) -> bool:
    """Whether a value is more than the sum that a gate is applied to."""
    if atom.op in ("product", "join", *UNSEEN):
        return False
    return not (atom.op == "add" and _linear(atom))


def _linear(atom: Atom) -> bool:
    return atom.op == "product" or (atom.op in ("add", "join") and any(map(_linear, atom.inputs)))


def _sources(atom: Atom, keys: set[Atom]) -> dict[Atom, set[str]]:
    """The shown values that ``atom`` is computed from, each with the weights that act upon it first."""
    found: dict[Atom, set[str]] = {}
    seen: set[tuple[Atom, tuple[str, ...]]] = set()

    def visit(here: Atom, weights: tuple[str, ...]) -> None:
        for before in here.inputs:
            acting = here.weights or weights
            if before in keys:
                found.setdefault(before, set()).update(acting)
            elif (before, acting) not in seen:
                seen.add((before, acting))
                visit(before, acting)

    visit(atom, ())
    return found


def _twins(seen: Unrolled, place: Callable[[Atom], tuple[Role, int | None]]) -> list[tuple[Role, Role]]:
    """Pairs of roles of states that one cell carries side by side (an LSTM's s and h)."""
    pairs: dict[tuple[Role, Role], None] = {}
    for run in seen.runs:
        for call in run.calls:
            for a, b in _neighbours(call):
                pairs[place(a)[0], place(b)[0]] = None
    return list(pairs)


def _neighbours(call: Call) -> list[tuple[Atom, Atom]]:
    atoms = [a for v in call.after for a in v.atoms if a.call is call]
    return [(a, b) for a in atoms for b in atoms if a is not b and a.owner == b.owner]


def _merged(found: Shown, pairs: list[tuple[Role, Role]]) -> Shown:
    """States that reach another state of their cell without a weight between are drawn as one with it."""
    into: dict[Role, Role] = {}
    for link in found.links:
        (a, t), (b, u) = link.source, link.target
        if (a, b) in pairs and t == u and not link.weights and b not in into:
            into[a] = b
    if not into:
        return found

    def moved(place: tuple[Role, int | None]) -> tuple[Role, int | None]:
        role = place[0]
        while role in into:
            role = into[role]
        return role, place[1]

    links: dict[tuple[tuple[Role, int | None], tuple[Role, int | None]], set[str]] = {}
    for link in found.links:
        source, target = moved(link.source), moved(link.target)
        if source != target:
            links.setdefault((source, target), set()).update(link.weights)
    found.links = [Link(s, t, tuple(sorted(w))) for (s, t), w in links.items()]
    found.atoms = {place: atom for place, atom in found.atoms.items() if place[0] not in into}
    found.states -= set(into)
    return found
