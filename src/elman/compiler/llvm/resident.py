"""A whole step as one kernel that stays bound to its memory: run a step at a time, with nothing made on the way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, fx

from ...errors import UnsupportedError
from ...packing import Rows
from ..independence import rows_of_node
from ..program import Loop
from ..step import Step, batch_multiple
from .generate import WORDS
from .items import buffers_of
from .kernel import Bound, Kernel, compile_loop

__all__ = ["Resident", "whole"]


def whole(step: Step) -> Kernel:
    """The kernel of all of a step, products of its inputs included. Raises UnsupportedError where there is none."""
    stored = dict.fromkeys(y for y in step.ys if y is not None)
    if any(rows_of_node(node) != (0, 1) for node in stored):
        raise UnsupportedError("an output whose rows are not those of the batch.")
    carried = [i for i, node in enumerate(step.next) if node is not step.state[i]]
    nodes = [node for node in step.graph.nodes if node.op == "call_function"]
    return compile_loop(step, Loop(nodes, carried), list(stored), [])


class Resident:
    """A step with its packed weights, its state and its output in memory of its own.

    ``run`` reads ``xs`` (B, …), draws what the step draws, replaces the state and overwrites ``ys`` (B, …); ``state``
    gives what it is now.
    """

    def __init__(
        self, step: Step, kernel: Kernel, xs: Sequence[Tensor], state: Sequence[Tensor], weights: list[Tensor]
    ):
        self.xs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs]
        self._state = [s.clone(memory_format=torch.contiguous_format) for s in state]
        batch = len(self.xs[0])
        # The room of each draw, and what draws it, in the order in which the step would.
        self._draws = [(_room(node, batch), partial(node.meta["draw"], batch)) for node in step.draws]
        rooms = [*self.xs, *(room for room, _ in self._draws), *self._state, *weights]
        given = dict(zip([*step.xs, *step.draws, *step.state, *step.weights], rooms, strict=True))
        inputs = [_rows_first(given[node], node, step.unit, batch) for node in kernel.outside]
        # What is not packed is read at every step: a copy, for the user may replace the weights, or their memory.
        read = {b.number for item in kernel.lowered.items for b in buffers_of(item) if b.role == "input"}
        fixed = [i in read and node in step.weights for i, node in enumerate(kernel.outside)]
        inputs = [value.clone() if alone else value for value, alone in zip(inputs, fixed, strict=True)]
        made = {y: _room(y, batch) for y in step.ys if y is not None}
        self.ys = [made[y] for y in step.ys if y is not None]
        self.batch, self.done = batch, 0
        self.bound = Bound(kernel, Rows(1, batch), False, inputs, list(made.values()))
        self.bound.__enter__()
        # The code looks for step t at t·B rows from the first: the first is moved back by as much.
        places = ((len(WORDS) + 2 * i, buffer) for i, buffer in enumerate(kernel.lowered.buffers))
        self._moving = [
            (place, self.bound.words[place], batch * self.bound.words[place + 1])
            for place, buffer in places
            if buffer.kind == "time"
        ]

    def run(self) -> None:
        """One step."""
        bound, done = self.bound, self.done
        for room, draw in self._draws:
            room.copy_(draw())
        for place, address, size in self._moving:
            bound.words[place] = address - done * size
        bound.run(done, done + 1)
        self.done = done + 1

    @property
    def state(self) -> list[Tensor]:
        """The leaves (B, …) as they are now, in memory of their own."""
        self.bound.read_states(Rows(self.done, self.batch))
        return [s.clone() for s in self._state]


def _rows_first(value: Tensor, node: fx.Node, unit: int, batch: int) -> Tensor:
    """What holds for the call as a kernel takes it: (B, …) where it has rows."""
    shape = node.meta["val"].shape
    for dim, size in enumerate(shape):
        if k := batch_multiple(int(size), unit):
            value = value.unflatten(dim, (batch, k)) if k > 1 else value
            return value.movedim(dim, 0) if dim else value
    return value


def _room(node: fx.Node, batch: int) -> Tensor:
    value = node.meta["val"]
    return torch.empty(batch, *value.shape[1:], dtype=value.dtype, device="cpu")
