"""The machine code of a program's loops, and why some have none."""

from __future__ import annotations

import warnings

from torch import fx

from ...errors import UnfoldWarning, UnsupportedError
from ..fuse import fused
from ..program import Loop, Program
from ..step import Step
from .kernel import Kernel, compile_loop

__all__ = ["Kernels"]

_warned: set[str] = set()


class Kernels:
    """Kernels of the loops of one program, each compiled when it is first asked for.

    ``program`` is what they are kernels of: the given one with pointwise work moved into its loops. ``missing`` says
    for each loop without one, by its number, why.
    """

    def __init__(self, program: Program) -> None:
        self.program = fused(program)
        self._plain = dict(zip(map(id, program.loops), self.program.loops, strict=True))
        self.made: dict[int, Kernel] = {}
        self.missing: dict[int, str] = {}
        self._found: dict[tuple[int, ...], Kernel | None] = {}

    def __call__(self, step: Step, loop: Loop, stored: list[fx.Node], spent: list[fx.Node]) -> Kernel | None:
        """The kernel of a loop, None where it must run through PyTorch's operations; that is said once."""
        key = (id(loop), *map(id, stored))
        if key not in self._found:
            try:
                self._found[key] = self.made[id(loop)] = compile_loop(step, loop, stored, spent)
            except UnsupportedError as error:
                self._found[key] = None
                self.missing[id(loop)] = str(error)
                _warn(", ".join(step.state[i].name for i in loop.carried), str(error))
        return self._found[key]

    def kernel_of(self, loop: Loop) -> Kernel | None:
        """The kernel of a loop of the program as it was given."""
        return self.made.get(id(self._plain[id(loop)]))


def _warn(carried: str, reason: str) -> None:
    text = f"the loop over {carried} runs through PyTorch's operations, some times slower: {reason}"
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, UnfoldWarning, stacklevel=2)
