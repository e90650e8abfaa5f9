"""``explain``: what becomes of a cell. Which backend runs it and why, its program in both directions, its code."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx, nn

from .compiler.affine import is_affine
from .compiler.autograd import needs_of
from .compiler.cache import Signature, program_of
from .compiler.compiled import Compiled
from .compiler.emit import Names, call
from .compiler.interpret import compile_program
from .compiler.plan import operation, plan
from .compiler.program import Loop, Program
from .errors import OptionError, UnfoldError
from .packing import rows_of
from .types import Pytree, State
from .unfold import _extent, prepare, scan

__all__ = ["LEVELS", "compiled_step", "explain"]

LEVELS = ("plan", "program", "code")


def explain(cell: nn.Module, xs: Pytree, state: State = None, *, constants: Pytree = None, level: str = "plan") -> str:
    """What ``scan(cell, xs)`` does, as text.

    ``level`` "plan" summarises segments, loops and their stages; "program" lists every operation; "code" is the
    generated source. xs is (T, B, …); its sizes T and B do not matter. Raises OptionError for another level, and
    what ``scan`` raises for a cell or xs that do not fit.
    """
    if level not in LEVELS:
        raise OptionError.unknown("level", level, LEVELS)
    name = type(cell).__name__
    try:
        program = compiled_step(cell, xs, state, constants=constants)
    except UnfoldError as error:
        return f"{name}: backend reference (plain loop and autograd)\nwhy: {type(error).__name__}: {error}\n"
    rule = program.derivative(*needs_of(program))
    lines = [
        f"{name}: backend interpret (the program through ATen, with preallocated buffers)",
        "why: the rows of the batch are independent and every operation is known; no other fast backend is built in",
        "",
        *_once(program, level),
    ]
    lines += ["forward", *_program(rule.forward, level, "forward"), ""]
    lines += ["backward, in reversed time", *_program(rule.adjoint, level, "backward")]
    return "\n".join(lines) + "\n"


def compiled_step(cell: nn.Module, xs: Pytree, state: State = None, *, constants: Pytree = None) -> Compiled:
    """The compiled step that ``scan`` runs for a cell that is given these. Raises what ``scan`` raises, and
    UnfoldError where it would run the plain loop."""
    leaves, spec = torch.utils._pytree.tree_flatten(xs)
    steps, batch = _extent(leaves)
    rows = rows_of(steps, batch)
    packed = torch.utils._pytree.tree_unflatten([rows.pack(leaf) for leaf in leaves], spec)
    protocol, constant_leaves = prepare(cell, rows, packed, state, constants, False)
    signature = Signature.of(protocol.xs.leaves, protocol.state.leaves, constant_leaves, protocol.tensors)
    try:
        return program_of(protocol, signature)
    except UnfoldError as error:
        if error.__cause__ is not None:  # perhaps a mistake: the plain loop says it as scan would
            scan(cell, xs, state, constants=constants, backend="reference")
        raise


def _once(program: Compiled, level: str) -> list[str]:
    nodes = [n for n in program.before.graph.nodes if n.op == "call_function"]
    if not nodes:
        return []
    if level == "plan":
        return ["once per call", f"  {_tally(nodes)}", ""]
    if level == "code":
        return ["once per call", *(f"  {line}" for line in program.invariant.source.splitlines()), ""]
    return ["once per call", *_listing(nodes, program.before.unit, "B"), ""]


def _program(program: Program, level: str, name: str) -> list[str]:
    if level == "code":
        return [f"  {line}" for line in compile_program(program, name, False).source.splitlines()]
    lines = []
    for part in program.parts:
        if isinstance(part, Loop):
            carried = ", ".join(program.step.state[i].name for i in part.carried)
            stages = plan(part)
            lines.append(f"  loop      carries {carried}; {len(stages)} stage{'s' if len(stages) != 1 else ''}")
            if is_affine(program.step, part):
                lines.append("    affine: scanned in parallel over time where a step is short of work")
            if level == "program":
                lines += _listing(part.nodes, program.step.unit, "B")
            else:
                for i, stage in enumerate(stages, 1):
                    pieces = [
                        f"{what}: {_tally(nodes)}"
                        for what, nodes in (
                            ("products", stage.products),
                            ("pointwise", stage.pointwise),
                            ("reductions", stage.reductions),
                        )
                        if nodes
                    ]
                    lines.append(f"    stage {i} {'; '.join(pieces)}")
        else:
            lines.append(f"  segment   over T·B rows: {_tally(part.nodes)}")
            if level == "program":
                lines += _listing(part.nodes, program.step.unit, "N")
    if not program.loops:
        lines.append("  no loop: all steps at once")
    return lines


def _tally(nodes: list[fx.Node]) -> str:
    names = Counter(operation(n) for n in nodes if operation(n) not in ("getitem",))
    return ", ".join(name if count == 1 else f"{name} ×{count}" for name, count in names.items()) or "nothing"


def _listing(nodes: list[fx.Node], unit: int, rows: str) -> list[str]:
    names = Names()
    lines = []
    for node in nodes:
        env: dict[fx.Node, Any] = {n: n.name for n in node.all_input_nodes}
        lines.append(f"    {node.name} = {call(node, env, names, unit, rows)}")
    return lines
