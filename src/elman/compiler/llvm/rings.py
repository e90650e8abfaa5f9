"""Rings: states that are handed on stay where they are, and only the place where each is looked for moves.

What a step hands from state to state, as a delay does, would be copied at every step. The states of such a chain share
the slots of a ring instead: after ``index`` steps state i stands in slot (i + index) mod d, which is where state i + 1
stood the step before. Only what is new is written, over the oldest.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ...packing import Rows
from .items import Buffer

__all__ = ["Rings", "chains"]

State = TypeVar("State", bound=Hashable)


def chains(handed: Mapping[State, State]) -> list[list[State]]:
    """Chains of states, each of which becomes the one after it; ``handed`` says what every such state becomes.

    The oldest comes first. They are as long as can be, and no state is in two.
    """
    later = set(handed.values())
    begun = {state: len(_chain(state, handed, set())) for state in handed if state not in later}
    taken: set[State] = set()
    found = []
    for state in [*sorted(begun, key=begun.__getitem__, reverse=True), *handed]:  # what is left are circles
        if state not in taken:
            chain = _chain(state, handed, taken)
            taken.update(chain)
            found.append(chain)
    return [chain for chain in found if len(chain) > 1]


def _chain(first: State, handed: Mapping[State, State], taken: set[State]) -> list[State]:
    found = {first: None}
    state = first
    while state in handed and handed[state] not in taken and handed[state] not in found:
        state = handed[state]
        found[state] = None
    return list(found)


class Rings:
    """The rings of a kernel, before its first step and after its last; ``chains`` are their states."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        slots = sorted((b.slot.ring, b.slot.number, i) for i, b in enumerate(buffers) if b.slot)
        self.chains: list[list[Buffer]] = [[] for ring in {ring for ring, _, _ in slots}]
        for ring, _, i in slots:
            self.chains[ring].append(buffers[i])

    def filled(self, rows: Rows, reverse: bool, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Every ring (d, B, …), with the states where the first steps of their sequences look."""
        made = [torch.stack([inputs[b.number] for b in chain]).to(chain[0].dtype) for chain in self.chains]
        if rows.uniform or not reverse:
            return made
        return [_turned(ring, _lengths(rows) - rows.steps) for ring in made]

    def read(self, filled: Sequence[Tensor], rows: Rows, reverse: bool, inputs: Sequence[Tensor]) -> None:
        """Overwrite the states with what stands in their places after the last steps of their sequences."""
        for chain, ring in zip(self.chains, filled, strict=True):
            if rows.uniform or reverse:
                slots, end = ring.unbind(), rows.steps % len(chain)
                found = slots[end:] + slots[:end]
            else:
                found = _turned(ring, _lengths(rows)).unbind()
            torch._foreach_copy_([inputs[b.number] for b in chain], found)


def _turned(ring: Tensor, by: Tensor) -> Tensor:
    """(d, B, …) with, for state i of sequence b, what was in slot (i + by(b)) mod d."""
    d, batch = ring.shape[:2]
    slots = (torch.arange(d, device="cpu").unsqueeze(1) + by) % d
    return ring[slots, torch.arange(batch, device="cpu")].contiguous()


def _lengths(rows: Rows) -> Tensor:
    """(B,) the steps of every sequence, longest first."""
    return torch.bincount(rows.sequence, minlength=rows.batch)
