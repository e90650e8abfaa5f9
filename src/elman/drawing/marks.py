"""Which loop of the compiled program computes a value."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..compiler.cache import Signature, program_of
from ..errors import UnfoldError
from ..packing import rows_of
from ..unfold import prepare
from .values import Atom
from .watch import Call, Run

__all__ = ["carried_by", "in_loops"]


def carried_by(run: Run) -> list[list[int]] | str:
    """For each loop of the cell's compiled program the state leaves that it carries, or why there is no program."""
    example = pytree.tree_map_only(Tensor, lambda leaf: torch.zeros_like(leaf, device=_device(run)), run.given)
    x, state, *constants = example
    leaf = next((leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)), None)
    if leaf is None:
        return "its step reads nothing"
    rows = rows_of(1, leaf.shape[0])
    try:
        protocol, fixed = prepare(run.cell, rows, x, state, constants[0] if constants else None, False)
        program = program_of(protocol, Signature.of(protocol.xs.leaves, protocol.state.leaves, fixed, protocol.tensors))
    except UnfoldError as error:
        return f"{type(error).__name__}: {error}"
    return [loop.carried for loop in program.program.loops]


def _device(run: Run) -> torch.device:
    return next((p.device for p in run.cell.parameters()), torch.device("cpu"))


def in_loops(call: Call, loops: list[list[int]]) -> dict[Atom, int]:
    """For the values of one step the loop, counted from 0, that they belong to; the others belong to segments.

    As in the compiler: a loop holds what depends on the states that it carries and what these depend on in turn.
    """
    found: dict[Atom, int] = {}
    for number, carried in enumerate(loops):
        before = {a for i in carried for a in call.before[i].atoms}
        stack = [a for i in carried for a in call.after[i].atoms]
        needed: dict[Atom, None] = {}
        while stack:
            atom = stack.pop()
            if atom not in needed and atom.call is call:
                needed[atom] = None
                stack += atom.inputs
        depends = set(before)
        for atom in sorted(needed, key=lambda a: a.serial):
            if not depends.isdisjoint(atom.inputs):
                depends.add(atom)
        found.update((a, number) for a in needed if a in depends)
    return found
