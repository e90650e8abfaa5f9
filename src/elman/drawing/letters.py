"""The letters of the field: x, h, o for values; U, W, V, R for weights, by what they connect."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable

from .diagram import Kind, Node, When
from .keys import Role, Shown

__all__ = ["clocks_of", "named", "weight_labels"]

Folded = dict[tuple[Role, Role], list[tuple[When, int, tuple[str, ...]]]]

_OPERATORS = {"mul": r"$\times$", "add": "$+$", "sub": "$-$", "div": r"$\div$"}


def clocks_of(found: Shown, folded: Folded) -> dict[Role, int]:
    """Roles that count the same steps have the same number."""
    clock = {role: i for i, role in enumerate(found.roles)}

    def root(role: Role) -> int:
        return clock[role]

    for (a, b), parts in folded.items():
        timed = None not in (*found.times(a), *found.times(b))
        if timed and any(when == "every" for when, _, _ in parts) and root(a) != root(b):
            low, high = sorted((root(a), root(b)))
            for role, number in clock.items():
                if number == high:
                    clock[role] = low
    order = list(dict.fromkeys(clock[role] for role in found.roles))
    return {role: order.index(number) for role, number in clock.items()}


def named(found: Shown, folded: Folded, clocks: dict[Role, int]) -> dict[Role, Node]:
    """A node for every role."""
    kinds = {role: _kind(found, folded, role) for role in found.roles}
    letters = {role: _letter(found, kinds, folded, role) for role in found.roles}
    count = Counter(letters.values())
    number: Counter[str] = Counter()
    nodes: dict[Role, Node] = {}
    for i, role in enumerate(found.roles):
        letter, kind = letters[role], kinds[role]
        index = ""
        if letter and kind not in ("operator", "sum", "input", "constant") and count[letter] > 1:
            number[letter] += 1
            index = str(number[letter])
        if kind in ("input", "constant") and "_" in letter:
            letter, index = letter.split("_", 1)
        caption = found.cells[role].removesuffix("Cell") if kind == "state" and not found.detail else ""
        name = f"{letter}{index}" if letter and kind not in ("operator", "sum") else f"{kind}{i}"
        timed = None not in found.times(role)
        shown = "" if caption == "Elman" else caption
        nodes[role] = Node(name, kind, letter, index, None, timed, None, clocks[role], shown, role in found.outputs)
    return nodes


def _kind(found: Shown, folded: Folded, role: Role) -> Kind:
    atoms = [a for (r, _), a in found.atoms.items() if r == role]
    atom = atoms[-1]
    if atom.op in ("input", "constant"):
        return atom.op  # type: ignore[return-value]
    recurs = any(when == "every" and delay for when, delay, _ in folded.get((role, role), ()))
    reads = {a for a, b in folded if b == role and a != role and any(d == 0 for _, d, _ in folded[a, b])}
    values = {a for a in reads if not (isinstance(a, tuple) and a[0] in ("input", "constant"))}
    weighted = any(w for a in values for _, _, w in folded[a, role])
    if role in found.outputs and not recurs and values and (weighted or role not in found.states):
        return "output" if weighted or atom.op != "add" else "sum"
    if role in found.states:
        return "state"
    if any(a.recorded for a in atoms) and atom.op not in ("add", "mul"):
        return "gate"
    if atom.op in _OPERATORS:
        return "sum" if atom.op == "add" else "operator"
    return "output" if role in found.outputs else "gate" if found.detail else "hidden"


def _letter(found: Shown, kinds: dict[Role, Kind], folded: Folded, role: Role) -> str:
    kind = kinds[role]
    atoms = [a for (r, _), a in found.atoms.items() if r == role]
    atom = atoms[-1]
    if kind in ("input", "constant"):
        return atom.label
    if kind == "output":
        return "o"
    if kind == "state":
        if any(a.recorded.split(".")[-1] == "cell" for a in atoms):
            return "s"
        return "g" if role in found.reversed else "h"
    if kind == "gate":
        return next((a.recorded for a in atoms if a.recorded), _operation(atom.op)).split(".")[-1]
    if kind in ("operator", "sum"):
        return _OPERATORS[atom.op]
    if None in found.times(role) and any(None not in found.times(r) for r in kinds):
        return "C" if any(None not in found.times(b) for a, b in folded if a == role) else ""
    if "state" not in kinds.values() and not any(kinds[a] == "hidden" for a, b in folded if b == role and a != role):
        return "h"
    return ""


def _operation(op: str) -> str:
    """What PyTorch calls an operation, less what only says how it is computed: native_layer_norm is layer norm."""
    return op.strip("_").removeprefix("native_").removesuffix("_forward").replace("_", " ")


def weight_labels(
    found: Shown, folded: Folded, nodes: dict[Role, Node]
) -> Callable[[Role, Role, tuple[str, ...]], str]:
    """How the weights of each edge are written: U, W, V, R, or G where a first state is made.

    One parameter may hold several of them, as where [x, h] is multiplied by one matrix.
    """
    letters: dict[tuple[Role, Role], dict[str, str]] = defaultdict(dict)
    shared: dict[str, list[str]] = defaultdict(list)
    for (a, b), parts in folded.items():
        for when, delay, weights in parts:
            for weight in weights:
                same = any(when == "every" and not delay for when, delay, _ in parts)
                letter = _weight(nodes[a], nodes[b], when, bool(delay) and not (same and a != b)) + (
                    "'" if b in found.reversed else ""
                )
                letters[a, b].setdefault(weight, letter)
                if weight not in shared[letter]:
                    shared[letter].append(weight)

    def label(a: Role, b: Role, weights: tuple[str, ...]) -> str:
        words = []
        for weight in weights:
            letter = letters[a, b].get(weight, "W")
            same = shared[letter]
            words.append(f"${letter}_{{{same.index(weight) + 1}}}$" if len(same) > 1 else f"${letter}$")
        return ", ".join(dict.fromkeys(words))

    return label


def _weight(a: Node, b: Node, when: When, later: bool) -> str:
    if later:
        return "W"
    if when == "first":
        return "G"
    if b.timed and (a.kind == "constant" or not a.timed or when == "last"):
        return "R"
    return "V" if b.kind == "output" or b.letter == "C" else "U"
