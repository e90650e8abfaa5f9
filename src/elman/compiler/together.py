"""Calls that do not depend on one another at the same time, each on one thread, where that is faster.

Few sequences are little work for two threads: one does it alone, or they share the units and meet after every item of
every step. Both directions of a layer are two such calls. Side by side neither waits for the other.

What is computed is what either call computes alone on one thread, to the last digit. Whatever does not fit runs one
call after the other, as it would have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..errors import UnfoldError
from .autograd import Call, Unfold, differentiable_backward, kept_for, rule_of, run_backward, run_forward
from .compiled import Differentiated
from .program import Program
from .reference import apart

if TYPE_CHECKING:
    from .llvm.kernels import Kernels

__all__ = ["run"]

T = TypeVar("T")
Result = tuple[list[Tensor], list[Tensor]]  # ys, final state

_ROWS = 4  # for each call; with more, threads that share them do as well
_NEAR = 800_000  # bytes of weights of a call, which one core has to read alone
_WORK = 10_000_000  # operations of a call, some half a millisecond: less is not worth bringing the threads together
_UNEQUAL = 2  # times the work of one call that another may have


def run(calls: Sequence[Call], tensors: Sequence[list[Tensor]]) -> list[Result] | None:
    """(ys, final state) of each call, as ``autograd.run`` gives them; None where they should not run side by side."""
    if not all(map(_simple, calls)) or not _undisturbed():
        return None
    device = calls[0].device.type
    if torch.is_autocast_enabled(device):  # casts are part of the program
        with torch.autocast(device, enabled=False):
            return run(calls, tensors)
    needs = [[torch.is_grad_enabled() and t.requires_grad for t in each] for each in tensors]
    differentiated = {any(each) for each in needs}
    try:
        if differentiated == {False}:
            return _forward(calls, tensors)
        if differentiated == {True}:
            return _differentiable(calls, [rule_of(*each) for each in zip(calls, needs, strict=True)], tensors)
    except (UnfoldError, RuntimeError, MemoryError):  # which of them raised it shows when one runs after the other
        return None
    return None


def _simple(call: Call) -> bool:
    """Whether a call is machine code over some steps, with nothing computed twice."""
    return call.kernels and call.chunk is None and call.rows.total > 0


def _undisturbed() -> bool:
    """Whether nothing watches or changes the operations of this thread: it would not see those of another."""
    modes = torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack()
    return not modes and torch._C._functorch.maybe_current_level() is None and not torch.jit.is_tracing()


def _forward(calls: Sequence[Call], tensors: Sequence[list[Tensor]]) -> list[Result] | None:
    for call in calls:
        call.compiled.forward(call.ragged, True)
    if not _wins(calls, [call.compiled.program for call in calls]):
        return None
    found = _at_once([_bound(run_forward, c, None, c.parts(t)) for c, t in zip(calls, tensors, strict=True)])
    results = []
    for call, given, (ys, final, _, _) in zip(calls, tensors, found, strict=True):
        flat, count = apart([*ys, *final], given), len(call.compiled.step.ys)
        results.append((list(flat[:count]), list(flat[count:])))
    return results


def _differentiable(
    calls: Sequence[Call], rules: list[Differentiated], tensors: Sequence[list[Tensor]]
) -> list[Result] | None:
    for call, rule in zip(calls, rules, strict=True):
        for ragged in {call.ragged, False}:  # a piece of unequal sequences may be one of equal ones
            rule.runners(ragged, True)
    if not _wins(calls, [rule.forward for rule in rules]):
        return None
    flat = iter(Together.apply(calls, rules, *(t for each in tensors for t in each)))
    steps = [call.compiled.step for call in calls]
    return [([next(flat) for _ in step.ys], [next(flat) for _ in step.next]) for step in steps]


def _wins(calls: Sequence[Call], programs: list[Program]) -> bool:
    """Whether calls are faster side by side than one after the other on all threads; as measured, see ``docs/slow.md``.

    That is where few rows, and weights that fit beside one core, leave more threads little to share.
    """
    from .llvm import sides

    if not sides.available():
        return False
    work = []
    for call, program in zip(calls, programs, strict=True):
        kernels: Kernels | None = program.kernels
        if kernels is None or not kernels.made or kernels.missing:
            return False
        made = kernels.made.values()
        shared = max(kernel.sharing(call.rows)[0] for kernel in made)
        if shared > len(calls) or call.rows.batch >= _ROWS * len(calls) or sum(sum(k.packed) for k in made) > _NEAR:
            return False
        work.append(sum(kernel.flops for kernel in made) * call.rows.total)
    return min(work) >= _WORK and max(work) <= _UNEQUAL * min(work)


def _at_once(functions: Sequence[Callable[[], T]]) -> list[T]:
    from .llvm.sides import at_once

    return at_once(functions)


def _bound(function: Callable[..., T], *args: Any) -> Callable[[], T]:
    return lambda: function(*args)


class Together(torch.autograd.Function):
    """Several sequences as one node of the autograd graph, so that their gradients too are computed side by side."""

    @staticmethod
    def forward(ctx: Any, calls: Sequence[Call], rules: list[Differentiated], *tensors: Tensor) -> tuple[Any, ...]:
        counts = [sum(call.counts) for call in calls]
        given, needs = _cut(tensors, counts), _cut(ctx.needs_input_grad[2:], counts)
        each = zip(calls, rules, given, strict=True)
        found = _at_once([_bound(run_forward, call, rule, call.parts(own)) for call, rule, own in each])
        kept = [kept_for(rule, values) for rule, (_, _, values, _) in zip(rules, found, strict=True)]
        fresh = [apart([*ys, *final], own) for own, (ys, final, _, _) in zip(given, found, strict=True)]
        ctx.calls, ctx.rules, ctx.kept = calls, rules, [len(each) for each in kept]
        ctx.save_for_backward(*tensors, *(value for each in kept for value in each))
        without = (call.without_gradient(need, own) for call, need, own in zip(calls, needs, fresh, strict=True))
        ctx.mark_non_differentiable(*(value for each in without for value in each))
        return tuple(value for each in fresh for value in each)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        calls, rules = ctx.calls, ctx.rules
        counts = [sum(call.counts) for call in calls]
        saved = _cut(ctx.saved_tensors, [*counts, *ctx.kept])
        given, kept = saved[: len(calls)], saved[len(calls) :]
        outs = _cut(grads, [len(call.compiled.step.ys) + len(call.compiled.step.next) for call in calls])
        with torch.autocast(calls[0].device.type, enabled=False):  # casts are part of the program
            if torch.is_grad_enabled():
                needs = _cut(ctx.needs_input_grad[2:], counts)
                found = [differentiable_backward(*each) for each in zip(calls, needs, given, outs, strict=True)]
            else:
                each = zip(calls, rules, given, kept, outs, strict=True)
                works = [_bound(run_backward, c, rule, own, more, (), gs) for c, rule, own, more, gs in each]
                side_by_side = _undisturbed() and _wins(calls, [rule.adjoint for rule in rules])
                found = _at_once(works) if side_by_side else [work() for work in works]
        return (None, None, *(g for each in found for g in each))

    @staticmethod
    def jvp(ctx: Any, *grads: Tensor) -> Any:
        return Unfold.jvp(ctx, *grads)


def _cut(values: Sequence[T], counts: Sequence[int]) -> list[tuple[T, ...]]:
    """Consecutive parts of a sequence, of so many values each."""
    return [tuple(values[first:last]) for first, last in pairwise([0, *accumulate(counts)])]
