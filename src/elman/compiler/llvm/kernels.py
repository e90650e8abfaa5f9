"""The machine code of a program's loops, and why some have none."""

from __future__ import annotations

import warnings

from torch import fx

from ...errors import UnfoldWarning, UnsupportedError
from ..fuse import fused
from ..program import Loop, Program
from ..step import Step, level_of_the_caller
from .kernel import Kernel, PrecisionError, compile_loop

__all__ = ["Kernels", "Refused"]

_warned: set[str] = set()


class Refused(Exception):
    """There is no kernel for a loop with what was moved into it: ``at`` is its place among the loops."""

    def __init__(self, at: int) -> None:
        super().__init__(at)
        self.at = at


class Kernels:
    """Kernels of the loops of one program, each compiled when it is first asked for.

    ``program`` is what they are kernels of: the given one with pointwise work moved into its loops. ``missing`` says
    for each loop without one, by its place among the loops, why.
    """

    def __init__(self, program: Program) -> None:
        self.plain, self.program = program, fused(program)
        self.made: dict[int, Kernel] = {}
        self.missing: dict[int, str] = {}
        self._alone: set[int] = set()  # loops that take nothing in
        self._found: dict[tuple[int, ...], Kernel | None] = {}

    def leave(self, at: int) -> None:
        """Move nothing into a loop: it may have a kernel then, and runs without one if not."""
        self._alone.add(at)
        self._found.clear()
        self.program = fused(self.plain, self._alone)

    def __call__(self, step: Step, loop: Loop, stored: list[fx.Node], spent: list[fx.Node]) -> Kernel | None:
        """The kernel of a loop, None where it must run through PyTorch's operations; that is said once.

        Raises Refused where the loop may have one without what was moved into it.
        """
        key = (id(loop), *map(id, stored))
        at = next(i for i, other in enumerate(self.program.loops) if other is loop)
        if key not in self._found:
            try:
                self._found[key] = self.made[at] = compile_loop(step, loop, stored, spent)
            except UnsupportedError as error:
                if at not in self._alone:
                    raise Refused(at) from None
                self._found[key] = None
                self.missing[at] = str(error)
                if not isinstance(error, PrecisionError):  # expected, and as fast as before
                    _warn(", ".join(step.state[i].name for i in loop.carried), str(error))
        return self._found[key]

    def kernel_of(self, loop: Loop) -> Kernel | None:
        """The kernel of a loop of the program as it was given."""
        return self.made.get(next(i for i, other in enumerate(self.plain.loops) if other is loop))


def _warn(carried: str, reason: str) -> None:
    text = f"the loop over {carried} runs through PyTorch's operations, some times slower: {reason}"
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, UnfoldWarning, stacklevel=level_of_the_caller())
