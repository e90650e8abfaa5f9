"""Affine loops: recurrences s(t) = a(t) ⊙ s(t-1) + b(t) whose a and b depend on no state, in parallel over time.

The steps are cut into chunks, and each pass of the loop's body serves one step of *all* chunks at once, for their rows
are as independent as those of a batch:

    1  every chunk from a zero state, and beside it what the chunk makes of a first state of ones: the product of its a
    2  from chunk to chunk, s ← (product of a) ⊙ s + (last state from zero): now every chunk's first state is known
    3  every chunk from its own first state, with all that is wanted of the loop

With chunks of √T steps that is some 3 √T passes in place of T. Nothing is divided and no logarithm taken, so that gates
that are shut cost no accuracy. Several leaves may mix, as the two parts of complex units do; the product of a is then
one matrix for each unit. The adjoint of an affine loop is affine, so both directions profit.

What is left over when the steps do not divide, sequences of unequal lengths, steps with enough work of their own, and
factors whose product overflows run in the plain loop that follows in the generated code.
"""

from __future__ import annotations

from collections.abc import Set
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from .emit import call
from .independence import is_varying, rows_of_node
from .program import Loop
from .step import Step, arguments, batch_multiple

if TYPE_CHECKING:
    from .loops import LoopWriter

__all__ = ["chunks", "finite", "is_affine", "rest", "write_chunks"]

aten = torch.ops.aten

FEWEST_STEPS = 32
MOST_NUMBERS = 1024  # in a state leaf: at 2048 the second pass costs what the calls saved (measured on one core)

Term = tuple[str, fx.Node, str, Any]  # sign, what depends on the state, operator, factor


def chunks(steps: int, numbers: int) -> tuple[int, int]:
    """How many chunks, of how many steps each, for a loop whose state leaves have so many numbers; (0, 0): none."""
    return _chunks(steps) if steps >= FEWEST_STEPS and 0 < numbers <= MOST_NUMBERS else (0, 0)


@lru_cache(maxsize=256)
def _chunks(steps: int) -> tuple[int, int]:
    root = int(steps**0.5)
    lengths = range(max(root // 2, 1), 2 * root + 1)
    length = min(lengths, key=lambda n: 2 * n + steps // n + steps % n)  # passes: 1 and 3, 2, the plain loop
    return steps // length, length


def finite(values: list[Tensor]) -> bool:
    """Whether nothing overflowed, or was infinite before: 0 · ∞ would not be the 0 that the plain loop gives."""
    return all(bool(value.isfinite().all()) for value in values)


def rest(flat: Tensor, batch: int, times: list[int]) -> Any:
    """By its number, the rows (B, …) of every one of these steps, which are the first or the last of all."""
    if not times:
        return ()
    first = min(times)
    rows = flat[first * batch : (first + len(times)) * batch].split(batch)
    return rows if first == 0 else dict(enumerate(rows, first))


def is_affine(step: Step, loop: Loop) -> bool:
    """Whether every node of a loop is an affine function of its states, unit by unit, with all of one shape."""
    states = [step.state[i] for i in loop.carried]
    first = states[0].meta["val"]
    inside = {*states, *loop.nodes}
    same = all(_like(node, first) and rows_of_node(node) == (0, 1) for node in inside)
    outside = {n for node in loop.nodes for n in node.all_input_nodes} - inside
    computed = all(step.next[i] in inside for i in loop.carried)
    return (
        first.device.type == "cpu" and first.is_floating_point() and same and computed
        and all(_terms(node, inside) is not None for node in loop.nodes)
        and all(_fits(node, first, step.unit) for node in outside)
    )  # fmt: skip


def _like(node: fx.Node, first: Tensor) -> bool:
    value = node.meta["val"]
    return isinstance(value, Tensor) and value.shape == first.shape and value.dtype == first.dtype


def _fits(node: fx.Node, first: Tensor, unit: int) -> bool:
    """Whether a value from outside can be read with a dimension of chunks in front of the rows."""
    value = node.meta["val"]
    if not isinstance(value, Tensor) or value.dtype != first.dtype:
        return False
    if is_varying(node):
        return rows_of_node(node) == (0, 1) and value.dim() == first.dim()
    batched = [dim for dim, size in enumerate(value.shape) if batch_multiple(int(size), unit)]
    return value.dim() <= first.dim() and (not batched or (batched == [0] and value.dim() == first.dim()))


def _terms(node: fx.Node, inside: Set[fx.Node]) -> list[Term] | None:
    """The derivative of a node along what it reads of the loop: a sum of terms; None where it is not affine in that."""
    args, target = arguments(node), node.target
    if node.kwargs or any(not isinstance(arg, fx.Node | int | float) for arg in args):
        return None

    def product(left: Any, right: Any) -> list[Term] | None:
        if left in inside:
            return None if right in inside else [("+", left, "*", right)]
        return [("+", right, "*", left)] if right in inside else []

    if target is aten.add.Tensor:
        return [("+", arg, "", None) for arg in args if arg in inside]
    if target is aten.sub.Tensor:
        return [(sign, arg, "", None) for sign, arg in zip("+-", args, strict=True) if arg in inside]
    if target is aten.neg.default:
        return [("-", args[0], "", None)]
    if target is aten.mul.Tensor:
        return product(*args)
    if target is aten.div.Tensor:
        return None if args[1] in inside else [("+", args[0], "/", args[1])]
    if target is aten.addcmul.default:
        factors = product(*args[1:])
        return None if factors is None else [*([("+", args[0], "", None)] if args[0] in inside else []), *factors]
    return None


def write_chunks(lw: LoopWriter) -> None:
    """Write the three passes; ``times`` is then what is left for the plain loop."""
    w, line, states = lw.w, lw.w.line, [lw.step.state[i] for i in lw.loop.carried]
    now = [lw.env[state] for state in states]
    first = [w.fresh(f"{state.name}_first") for state in states]
    along = [[w.fresh(f"{state.name}_along_{other.name}") for state in states] for other in states]
    count, length, here, order, i = (w.fresh(name) for name in ("count", "length", "here", "order", "i"))
    like = states[0].meta["val"]
    line("# affine: chunks of steps side by side, where a step alone is short of work")
    line(f"{count}, {length} = {w.names.of(chunks, 'chunks')}(len(times), B * {like[:1].numel()})")
    line(f"if {count}:")
    line(f"{here} = slice(N - {count} * {length} * B, N) if reverse else slice(0, {count} * {length} * B)", 2)
    line(f"{order} = range({length})[::-1] if reverse else range({length})", 2)
    views: dict[fx.Node, str] = {}
    for node, flat in lw.flat.items():
        name = w.fresh(f"{node.name}_of")
        line(f"{name} = {flat}[{here}].unflatten(0, ({count}, {length}, B)).unbind(1)", 2)
        views[node] = f"{name}[{i}]"
    line(f"{', '.join(first)} = {', '.join(now)}", 2)
    for state, name, before in zip(states, now, first, strict=True):
        line(f"{name} = {before}.new_zeros({', '.join([count, 'B', *(str(int(n)) for n in like.shape[1:])])})", 2)
        for other, names in zip(states, along, strict=True):
            line(f"{names[states.index(state)]} = torch.{'ones' if state is other else 'zeros'}_like({name})", 2)
    line(f"for {i} in {order}:", 2)
    _write_body(lw, 3, views, along)
    carried, starts = _write_carry(lw, count, now, first, along)
    # A chunk, or a product, that is not finite makes a state after it what is not finite either.
    line(f"if {w.names.of(finite, 'finite')}([{', '.join([*starts, *carried])}]):", 2)
    line(f"{', '.join(now)} = {', '.join(starts)}", 3)
    line(f"for {i} in {order}:", 3)
    _write_body(lw, 4, views, [])
    line(f"{', '.join(now)} = {', '.join(f'{name}[0 if reverse else -1]' for name in now)}", 3)
    line(f"times = times[{count} * {length} :]", 3)
    line("else:", 2)
    line(f"{', '.join(now)} = {', '.join(first)}", 3)


def _write_body(lw: LoopWriter, depth: int, views: dict[fx.Node, str], along: list[list[str]]) -> None:
    """One step of all chunks: the states now, with what is wanted of it, or else their derivatives ``along`` each."""
    w, states = lw.w, [lw.step.state[i] for i in lw.loop.carried]
    now = [lw.env[state] for state in states]
    outside = {node: text for node, text in views.items() if node not in lw.inside}
    env = {**lw.env, **outside, **dict(zip(states, now, strict=True))}
    derivatives = [dict(zip(states, names, strict=True)) for names in along]
    for node in lw.loop.nodes:
        name = w.fresh(node.name)
        w.line(f"{name} = {call(node, env, w.names, w.unit, 'B', None if along else views.get(node))}", depth)
        for of in derivatives:
            derivative = w.fresh(f"{node.name}_along")
            w.line(f"{derivative} = {_tangent(node, of, env)}", depth)
            of[node] = derivative
        env[node] = name
    after = [lw.step.next[i] for i in lw.loop.carried]
    new = [table[node] for table in (env, *derivatives) for node in after]
    w.line(f"{', '.join([*now, *(name for names in along for name in names)])} = {', '.join(new)}", depth)


def _write_carry(
    lw: LoopWriter, count: str, now: list[str], first: list[str], along: list[list[str]]
) -> tuple[list[str], list[str]]:
    """From chunk to chunk. Returns the names of the states after the last one, and of the first states of all."""
    w, line = lw.w, lw.w.line
    carried = [w.fresh(f"{name}_carried") for name in now]
    starts = [w.fresh(f"{name}_starts") for name in now]
    line(f"{', '.join(carried)} = {', '.join(first)}", 2)
    for name, start in zip(now, starts, strict=True):
        line(f"{start} = torch.empty_like({name})", 2)
    c = w.fresh("c")
    line(f"for {c} in range({count})[::-1] if reverse else range({count}):", 2)
    for name, start in zip(carried, starts, strict=True):
        line(f"{start}[{c}] = {name}", 3)
    new = []
    for i, last in enumerate(now):
        text = f"{last}[{c}]"
        for name, names in zip(carried, along, strict=True):
            text = f"torch.addcmul({text}, {names[i]}[{c}], {name})"
        new.append(text)
    line(f"{', '.join(carried)} = {', '.join(new)}", 3)
    return carried, starts


def _tangent(node: fx.Node, along: dict[fx.Node, str], env: dict[fx.Node, str]) -> str:
    """The source of a node's derivative, from those of what it reads."""
    text = ""
    for sign, source, operator, factor in _terms(node, along.keys()) or ():
        of = env[factor] if isinstance(factor, fx.Node) else repr(factor)
        scaled = f"{along[source]} {operator} {of}" if operator else along[source]
        text = f"{text} {sign} {scaled}" if text else (scaled if sign == "+" else f"-({scaled})")
    return text
