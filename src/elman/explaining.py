"""``explain``: what becomes of a cell. Which backend runs it and why, its program in both directions, its code."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx, nn

from .compiler.affine import is_affine
from .compiler.autograd import needs_of
from .compiler.cache import Signature, program_of
from .compiler.compiled import Compiled, Differentiated, kernels_of
from .compiler.emit import Names, call
from .compiler.interpret import compile_program
from .compiler.llvm.listing import LISTINGS
from .compiler.plan import operation, plan
from .compiler.program import Loop, Program
from .errors import OptionError, UnfoldError
from .packing import extent, rows_of
from .types import Pytree, State
from .unfold import prepare, scan

__all__ = ["LEVELS", "compiled_step", "explain"]

LEVELS = ("plan", "program", "code", "kernel", "ir", "asm")


def explain(cell: nn.Module, xs: Pytree, state: State = None, *, constants: Pytree = None, level: str = "plan") -> str:
    """What ``scan(cell, xs)`` does, as text.

    ``level`` "plan" summarises segments, loops and their stages; "program" lists every operation; "code" is the
    generated source; "kernel" is what the machine code of each loop does, "ir" its representation for LLVM, "asm" its
    assembly. xs is (T, B, …); its sizes T and B do not matter. Raises OptionError for another level, and
    what ``scan`` raises for a cell or xs that do not fit.
    """
    if level not in LEVELS:
        raise OptionError.unknown("level", level, LEVELS)
    name = type(cell).__name__
    try:
        step = compiled_step(cell, xs, state, constants=constants)
    except UnfoldError as error:
        return f"{name}: backend reference (plain loop and autograd)\nwhy: {type(error).__name__}: {error}\n"
    rule = step.derivative(*needs_of(step))
    machine = torch.utils._pytree.tree_leaves(xs)[0].device.type == "cpu"
    rule.runners(False, machine)  # compiles the loops
    found = (
        [reason for p in (rule.forward, rule.adjoint) for reason in kernels_of(p).missing.values()] if machine else []
    )
    lines = [
        f"{name}: backend {_LLVM if machine and len(found) < _loops(rule) else _INTERPRET}",
        _why(machine, found, _loops(rule)),
        *([_MEDIUM] if machine and step.step.precision == "medium" else []),
        "",
        *_once(step, level),
    ]
    lines += ["forward", *_program(rule.forward, level, "forward"), ""]
    lines += ["backward, in reversed time", *_program(rule.adjoint, level, "backward")]
    return "\n".join(lines) + "\n"


_MEDIUM = 'precision: products of float32 may be of bfloat16: torch.set_float32_matmul_precision("medium") is set'
_LLVM = "llvm (loops as machine code, the rest through ATen)"
_INTERPRET = "interpret (the program through ATen, with preallocated buffers)"


def _loops(rule: Differentiated) -> int:
    return len(rule.forward.loops) + len(rule.adjoint.loops)


def _why(machine: bool, missing: list[str], loops: int) -> str:
    """Why a step runs as it does."""
    independent = "why: the rows of the batch are independent and every operation is known"
    if not machine:
        return f"{independent}; machine code is for the CPU"
    if missing:
        return (
            f"{independent}; {len(missing)} of {loops} loops have no machine code: {'; '.join(dict.fromkeys(missing))}"
        )
    return independent


def compiled_step(cell: nn.Module, xs: Pytree, state: State = None, *, constants: Pytree = None) -> Compiled:
    """The compiled step that ``scan`` runs for a cell that is given these. Raises what ``scan`` raises, and
    UnfoldError where it would run the plain loop."""
    leaves, spec = torch.utils._pytree.tree_flatten(xs)
    steps, batch = extent(leaves)
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
        runs = program.kernels.program if program.kernels else program
        return [f"  {line}" for line in compile_program(runs, name, False, program.kernels).source.splitlines()]
    lines = []
    for part in program.parts:
        if isinstance(part, Loop):
            carried = ", ".join(program.step.state[i].name for i in part.carried)
            stages = plan(part)
            lines.append(f"  loop      carries {carried}; {len(stages)} stage{'s' if len(stages) != 1 else ''}")
            kernel = program.kernels.kernel_of(part) if program.kernels else None
            if kernel is not None and level in LISTINGS:
                lines += [f"    {line}" for line in LISTINGS[level](kernel)]
                continue
            if kernel is None and is_affine(program.step, part):
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
