"""Both directions of a sequence: two scans that do not depend on one another, side by side where that is faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from .types import Pytree, State
from .unfold import scan_by

if TYPE_CHECKING:
    from .compiler.autograd import Call, Run

__all__ = ["scan_both", "side_by_side"]

A = TypeVar("A")
B = TypeVar("B")


def scan_both(
    forward_cell: nn.Module,
    backward_cell: nn.Module,
    xs: Pytree,
    state: tuple[State, State] = (None, None),
    *,
    constants: Pytree = None,
    lengths: Tensor | list[int] | None = None,
    remat: int | str | None = None,
    backend: str = "auto",
) -> tuple[Any, Any]:
    """``scan`` of one cell forward in time and of another in reverse: (h, s) and (g, r).

    Arguments, results and errors are those of both scans, ``state`` a pair. The numbers are, too, but for the last
    digits: where both run side by side, each of them has one thread, and both are one node of the autograd graph, as
    in PyTorch's own layers: what one of them gives cannot be differentiated twice without ``retain_graph``, and a
    direction that nothing depends on has zeros for gradients.
    """

    def one(cell: nn.Module, start: State, reverse: bool) -> Callable[[Run | None], Any]:
        return lambda run: scan_by(run, cell, xs, start, constants, lengths, reverse, remat=remat, backend=backend)

    return side_by_side(one(forward_cell, state[0], False), one(backward_cell, state[1], True))


def side_by_side(first: Callable[[Run | None], A], second: Callable[[Run | None], B]) -> tuple[A, B]:
    """What two scans give that do not depend on one another; at the same time where that is faster.

    Each is a function of what shall run its call, for ``scan_by`` or ``unfold``. The second begins when the first has
    nothing left to do but to run, so that both calls are known. Raises what they raise one after the other.
    """
    if torch.compiler.is_compiling():
        return first(None), second(None)
    seconds: list[B] = []
    failed: list[Exception] = []

    def run_first(call: Call, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        from .compiler import autograd, together

        firsts: list[tuple[list[Tensor], list[Tensor]]] = []

        def run_second(other: Call, others: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            both = together.run([call, other], [tensors, others])
            if both is not None:
                firsts.append(both[0])
                return both[1]
            try:
                firsts.append(autograd.run(call, tensors))
            except Exception as error:
                raise _OfTheFirst(error) from error
            return autograd.run(other, others)

        try:
            seconds.append(second(run_second))
        except _OfTheFirst as error:
            raise error.args[0] from None
        except Exception as error:  # raised once the first is through
            failed.append(error)
        return firsts[0] if firsts else autograd.run(call, tensors)

    found = first(run_first)
    if failed:
        raise failed.pop()
    return found, seconds[0] if seconds else second(None)


class _OfTheFirst(Exception):
    """The first of two scans failed while the second waited for it."""
