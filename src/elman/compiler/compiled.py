"""A traced step and everything made from it, on demand: forward programs, derivatives, the step as a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UnfoldError
from ..protocol import Tree
from .derivative import Derivative, derive, ends_of_gradients, tidy
from .independence import annotate
from .interpret import Runner, compile_program, compile_step
from .lock import tracing
from .program import Program, hoist, partition
from .step import Step

if TYPE_CHECKING:
    from .llvm.kernel import Kernel
    from .llvm.kernels import Kernels

__all__ = ["Compiled", "Differentiated", "kernels_of"]


@dataclass
class Differentiated:
    """A derivative with the programs of both directions."""

    rule: Derivative
    forward: Program
    adjoint: Program

    def runners(self, ragged: bool, kernels: bool = False) -> tuple[Runner, Runner]:
        """Both directions, with machine code for the loops or without."""
        cache: dict[tuple[bool, bool], tuple[Runner, Runner]] = self.__dict__.setdefault("_runners", {})
        key = (ragged, kernels)
        if key not in cache:
            with tracing():  # steps of machine code are recorded
                cache[key] = cache.get(key) or (
                    _runner(self.forward, "forward", ragged, kernels),
                    _runner(self.adjoint, "backward", ragged, kernels),
                )
        return cache[key]


def _runner(program: Program, name: str, ragged: bool, kernels: bool) -> Runner:
    if not kernels or not program.loops:
        return compile_program(program, name, ragged)
    from .llvm.kernels import Refused

    made = kernels_of(program)
    while True:
        try:
            return compile_program(made.program, name, ragged, made)
        except Refused as loop:
            made.leave(loop.at)


def kernels_of(program: Program) -> Kernels:
    """The machine code of a program's loops, made once."""
    from .llvm.kernels import Kernels  # llvmlite is loaded with the first loop that is compiled

    if program.kernels is None:
        program.kernels = Kernels(program)
    return program.kernels


class Compiled:
    """A traced step, split into what holds for a whole call and what varies.

    ``y`` is the structure of its output; the values ``recorded`` by name follow it among the ys.

    ``invariant(B, [], [], weights, [])`` gives, under ordinary autograd, the values that ``step`` takes as weights.
    Raises UnfoldError subclasses when the step cannot be unfolded.
    """

    def __init__(self, traced: Step, y: Tree, recorded: tuple[str, ...] = ()) -> None:
        self.y, self.recorded = y, recorded
        annotate(traced, constants=True)
        annotate(traced)
        tidy(traced, derived=False)
        before, self.step = hoist(traced)
        annotate(self.step)
        self.before = before
        self.invariant = compile_step(before, "invariant")
        self.trivial = all(y in before.weights for y in before.ys)
        self.taken = [before.weights.index(y) for y in before.ys] if self.trivial else []  # type: ignore[arg-type]
        self._without: dict[tuple[tuple[bool, ...], bool], list[int]] = {}
        self._forward: dict[tuple[bool, bool], Runner] = {}
        self._derivatives: dict[tuple[tuple[bool, ...], tuple[bool, ...]], Differentiated | UnfoldError] = {}

    @cached_property
    def program(self) -> Program:
        """The forward program without a derivative: nothing is kept."""
        return partition(self.step)

    def without_gradient(self, needs: tuple[bool, ...], ragged: bool) -> list[int]:
        """Which of the ys and last states have no gradient, given which of xs, state, weights and draws need one."""
        key = (needs, ragged)
        if key not in self._without:
            needed = {i for i, need in enumerate(needs) if need}
            ends = ends_of_gradients(self.step, ragged)
            self._without[key] = [i for i, some in enumerate(ends) if not some & needed]
        return self._without[key]

    @cached_property
    def whole(self) -> Kernel:
        """All of the step as one kernel. Raises UnsupportedError where there is none."""
        from .llvm.resident import whole

        with tracing():
            return whole(self.step)

    @cached_property
    def plain(self) -> Callable[..., Any]:
        """The varying step as one differentiable function: the reference for second derivatives."""
        return compile_step(self.step, "step")

    def weights(self, batch: int, leaves: list[Tensor], device: str) -> list[Tensor]:
        """The invariant values of one call."""
        if self.trivial:
            return [leaves[i] for i in self.taken]
        if torch.is_autocast_enabled(device):  # casts are part of the program
            with torch.autocast(device, enabled=False):
                return self.weights(batch, leaves, device)
        return self.invariant(batch, [], [], leaves, [])[0]

    def draws(self, rows: int, device: torch.device) -> list[Tensor]:
        """All random numbers of one call, (N, …) each."""
        return [node.meta["draw"](rows, device) for node in self.step.draws]

    def forward(self, ragged: bool, kernels: bool = False) -> Runner:
        """The program without a derivative, with machine code for the loops or without."""
        key = (ragged, kernels)
        if key not in self._forward:
            with tracing():
                self._forward[key] = self._forward.get(key) or _runner(self.program, "forward", ragged, kernels)
        return self._forward[key]

    def derivative(self, needs_x: tuple[bool, ...], needs_weight: tuple[bool, ...]) -> Differentiated:
        """Programs that also give the gradients asked for."""
        key = (needs_x, needs_weight)
        found = self._derivatives.get(key)
        if found is None:
            with tracing():
                found = self._derivatives.get(key) or self._derive(needs_x, needs_weight)
                self._derivatives[key] = found
        if isinstance(found, UnfoldError):
            raise found
        return found

    def _derive(self, needs_x: tuple[bool, ...], needs_weight: tuple[bool, ...]) -> Differentiated | UnfoldError:
        try:
            with torch.inference_mode(False):
                rule = derive(self.step, needs_x, needs_weight)
            return Differentiated(rule, partition(rule.forward), partition(rule.adjoint))
        except UnfoldError as error:
            return error.with_traceback(None)
