"""A compiled step under autograd: one Function for a whole sequence, with recomputation and second derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ForwardModeError
from ..packing import Rows
from . import graphed, reference
from .compiled import Compiled, Differentiated
from .interpret import Runner
from .reference import apart
from .step import batch_multiple

_PIECE = 2048  # rows: enough for a product to run at full speed

__all__ = [
    "Call",
    "Run",
    "Unfold",
    "chunk_length",
    "differentiable_backward",
    "kept_for",
    "needs_of",
    "rule_of",
    "run",
    "run_backward",
    "run_forward",
]


@dataclass
class Call:
    """One call of a compiled step: the layout, the direction, and how many tensors play each role."""

    compiled: Compiled
    rows: Rows
    reverse: bool
    chunk: int | None
    counts: tuple[int, int, int, int]  # xs, state, weights, draws
    device: torch.device
    kernels: bool = False  # whether loops run as machine code

    def parts(self, tensors: tuple[Tensor, ...] | list[Tensor]) -> tuple[list[Tensor], ...]:
        """The flat list of tensors, cut into xs, state, weights, draws."""
        found, at = [], 0
        for count in self.counts:
            found.append([t.resolve_neg() for t in tensors[at : at + count]])  # machine code reads what lies in memory
            at += count
        return tuple(found)

    @property
    def ragged(self) -> bool:
        return not self.rows.uniform

    def pieces(self, size: int | None = None) -> list[tuple[Rows, slice]]:
        """Chunks of time of that many steps, in the order in which they run, with the packed rows of each.

        Those after the end of the longest sequence have no rows, and nothing to run.
        """
        rows, size = self.rows, size or self.rows.steps
        if size >= rows.steps:
            return [(rows, slice(0, rows.total))]
        edges = list(range(0, rows.steps, max(size, 1)))
        found = []
        for first in edges:
            last = min(first + size, rows.steps)
            found.append((rows.chunk(first, last), slice(rows.offsets[first], rows.offsets[last])))
        found = [piece for piece in found if piece[0].total] or found[:1]
        return found[::-1] if self.reverse else found

    def without_gradient(self, needs: Sequence[bool], results: list[Tensor]) -> list[Tensor]:
        """Those of its results, ys and last states, that no gradient flows through to what needs one."""
        return [results[i] for i in self.compiled.without_gradient(tuple(needs), self.ragged)]

    def play(self, runner: Runner, rows: Rows, reverse: bool, *parts: list[Tensor]) -> Any:
        """Run generated code over some of the rows."""
        if self.kernels:
            from .llvm import replay  # there is machine code, so it is loaded

            return replay.run(runner, rows, reverse, *parts)
        return graphed.run(runner, self.device, rows, reverse, *parts)


Run = Callable[[Call, list[Tensor]], tuple[list[Tensor], list[Tensor]]]
"""What gives (ys, final state) of a call: ``run``, or what decides when it runs."""


def run(call: Call, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Run a compiled step over all its rows: (ys, final state), differentiable."""
    if torch.is_autocast_enabled(call.device.type):  # casts are part of the program
        with torch.autocast(call.device.type, enabled=False):
            return run(call, tensors)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        flat = Unfold.apply(call, *tensors)
    else:
        ys, final, _, _ = run_forward(call, None, call.parts(tensors))
        flat = apart([*ys, *final], tensors)
    count = len(call.compiled.step.ys)
    return list(flat[:count]), list(flat[count:])


def rule_of(call: Call, needs: Sequence[bool]) -> Differentiated:
    """The derivative of a call with respect to the tensors that need one."""
    xs, state, weights, _ = call.counts
    return call.compiled.derivative(tuple(needs[:xs]), tuple(needs[xs + state : xs + state + weights]))


def kept_for(rule: Differentiated, kept: dict[str, Tensor]) -> list[Tensor]:
    """What the forward pass keeps, in the order in which the backward pass reads it."""
    return [kept[name] for kind, name in rule.rule.reads if kind == "kept"]


def run_forward(call: Call, rule: Differentiated | None, parts: Any) -> Any:
    """All chunks forward. Returns (ys, final, kept, states at the start of every chunk)."""
    xs, state, weights, draws = parts
    whole = rule is not None and call.chunk is None

    def runner(rows: Rows) -> Runner:
        if whole:
            return rule.runners(not rows.uniform, call.kernels)[0]  # type: ignore[union-attr]
        return call.compiled.forward(not rows.uniform, call.kernels)

    size = call.chunk or graphed.steps_of_piece(runner(call.rows), call.device, call.rows.batch)
    pieces = call.pieces(size)
    if len(pieces) == 1:
        return (*call.play(runner(call.rows), call.rows, call.reverse, xs, state, weights, draws)[:3], [state])
    starts, results = [], []
    for rows, here in pieces:
        starts.append(state)
        given = [x[here] for x in xs], state, weights, [d[here] for d in draws]
        ys, state, kept, _ = call.play(runner(rows), rows, call.reverse, *given)
        results.append((ys, kept))
    order = results[::-1] if call.reverse else results
    ys = [torch.cat(leaves) for leaves in zip(*(r[0] for r in order), strict=True)]
    kept = {name: torch.cat([r[1][name] for r in order]) for name in order[0][1]}
    return ys, state, kept, starts if call.chunk else starts[:1]


class Unfold(torch.autograd.Function):
    """A sequence as one node of the autograd graph."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> tuple[Any, ...]:
        rule = rule_of(call, ctx.needs_input_grad[1:])
        ys, final, kept, starts = run_forward(call, rule, call.parts(tensors))
        fresh = apart([*ys, *final], tensors)
        ctx.call, ctx.rule = call, rule
        ctx.starts = len(starts)
        extra = [] if call.chunk else kept_for(rule, kept)
        ctx.extra = len(extra)
        ctx.save_for_backward(*tensors, *extra, *(s for start in starts[1:] for s in start))
        ctx.mark_non_differentiable(*call.without_gradient(ctx.needs_input_grad[1:], fresh))
        return tuple(fresh)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        call = ctx.call
        with torch.autocast(call.device.type, enabled=False):  # casts are part of the program
            return Unfold._backward(ctx, call, grads)

    @staticmethod
    def _backward(ctx: Any, call: Call, grads: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        count = sum(call.counts)
        if torch.is_grad_enabled():
            return (None, *differentiable_backward(call, ctx.needs_input_grad[1:], saved[:count], grads))
        extra, starts = saved[count : count + ctx.extra], saved[count + ctx.extra :]
        return (None, *run_backward(call, ctx.rule, saved[:count], extra, starts, grads))

    @staticmethod
    def jvp(ctx: Any, *grads: Tensor) -> Any:
        raise ForwardModeError(
            "forward-mode differentiation (jvp) is not derived by this backend. Use scan(..., backend='reference'), "
            "which PyTorch differentiates in either mode, or reverse mode (torch.autograd.grad, torch.func.vjp)."
        )


def run_backward(
    call: Call,
    rule: Differentiated,
    tensors: tuple[Tensor, ...],
    extra: tuple[Tensor, ...],
    starts: tuple[Tensor, ...],
    grads: tuple[Tensor | None, ...],
) -> list[Tensor | None]:
    xs, state, weights, draws = call.parts(tensors)
    grads = tuple(None if g is None else g.resolve_neg() for g in grads)
    step, derivative = call.compiled.step, rule.rule
    n_ys, n_state = len(step.ys), len(step.next)
    g_ys = [grads[i] for i in derivative.floating]
    carried = [i for i, s in enumerate(state) if s.is_floating_point()]
    g_state: list[Any] = [grads[n_ys + i] for i in carried]
    # In pieces even where nothing is computed again: what a piece leaves for its products with the weights is still in
    # the cache, and goes before the next one takes as much memory.
    recorded = graphed.steps_of_piece(rule.runners(call.ragged, call.kernels)[1], call.device, call.rows.batch)
    pieces = call.pieces(call.chunk or recorded or _piece(call.rows.batch))
    begun = [list(state), *(list(starts[i * n_state : (i + 1) * n_state]) for i in range(len(pieces) - 1))]
    whole = dict(zip((name for kind, name in derivative.reads if kind == "kept"), extra, strict=not call.chunk))
    g_xs: list[list[Any]] = []
    sums: dict[int, Tensor] = {}
    for (rows, here), start in reversed(list(zip(pieces, begun, strict=True))):
        forward, adjoint = rule.runners(not rows.uniform, call.kernels)
        x_here, d_here = [x[here] for x in xs], [d[here] for d in draws]
        if call.chunk:
            kept = call.play(forward, rows, call.reverse, x_here, start, weights, d_here)[2]
        else:
            kept = {name: value[here] for name, value in whole.items()}
        source: dict[str, Any] = {"xs": x_here, "draws": d_here, "kept": kept}
        read = [source[kind][at] for kind, at in derivative.reads]
        read += [g[here] for g in g_ys]  # type: ignore[index]
        back, g_state, _, total = call.play(adjoint, rows, not call.reverse, read, g_state, weights, [])
        g_xs.append(back)
        for w, g in total.items():
            narrow = g.dtype.itemsize == 2 and len(pieces) > 1  # where one more would soon change nothing
            sums[w] = sums[w] + g if w in sums else g.float() if narrow else g
    if len(g_xs) > 1:
        order = g_xs if call.reverse else g_xs[::-1]
        g_xs = [[None if g[0] is None else torch.cat(g) for g in zip(*order, strict=True)]]
    result: list[Tensor | None] = [None] * sum(call.counts)
    result[: len(xs)] = [dict(zip(derivative.x_grads, g_xs[0], strict=True)).get(i) for i in range(len(xs))]
    for i, of_state in zip(carried, g_state, strict=True):
        result[len(xs) + i] = of_state
    for w, of_weight in sums.items():
        result[len(xs) + len(state) + w] = of_weight.to(weights[w].dtype)
    found = iter(apart([g for g in result if g is not None], [g for g in grads if g is not None]))
    return [None if g is None else next(found) for g in result]


def differentiable_backward(call: Call, needs: Any, tensors: Any, grads: Any) -> list[Tensor | None]:
    """The gradients as differentiable functions: the plain loop, differentiated by autograd with create_graph."""
    with torch.enable_grad():
        # Views, for one of them may have been computed from another, and that way is not part of this gradient.
        inputs = [t.view_as(t) if need else t.detach() for t, need in zip(tensors, needs, strict=True)]
        outputs = plain(call, inputs)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        if not pairs:
            return [None] * len(needs)
        heads, tails = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(heads, wanted, tails, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


def plain(call: Call, tensors: list[Tensor]) -> tuple[Any, ...]:
    """The same call as a plain loop over the traced step, with the same draws."""
    xs, state, weights, draws = call.parts(tensors)
    step, function = call.compiled.step, call.compiled.plain
    shapes = [w.meta["val"].shape for w in step.weights]
    multiples = [[(d, k) for d, n in enumerate(shape) if (k := batch_multiple(n, step.unit))] for shape in shapes]
    where = [found[0] if found else None for found in multiples]

    def one(leaves: list[Tensor], s: list[Tensor], constants: list[Tensor]) -> Any:
        mine = iter(constants)
        here = [
            w if place is None else next(mine).movedim(0, place[0]).flatten(place[0], place[0] + 1)
            for w, place in zip(weights, where, strict=True)
        ]
        ys, new, _ = function(leaves[0].shape[0], leaves[: len(xs)], s, here, leaves[len(xs) :])
        return ys, new

    constants = [
        w.unflatten(place[0], (call.rows.batch, place[1])).movedim(place[0], 0)
        for w, place in zip(weights, where, strict=True)
        if place is not None
    ]
    ys, final, _ = reference.unfold(one, call.rows, [*xs, *draws], state, constants, call.reverse)
    return (*ys, *final)


def _piece(batch: int) -> int:
    """Steps that are worth a call of their own."""
    return max(_PIECE // max(batch, 1), 16)


def chunk_length(remat: int | str | None, steps: int, batch: int) -> int | None:
    """Steps from which to recompute: None stores everything, "auto" takes √T, or a few more that are one piece."""
    if remat is None:
        return None
    size = max(math.isqrt(max(steps - 1, 0)) + 1, _piece(batch)) if remat == "auto" else int(remat)
    return size if size < steps else None


def needs_of(compiled: Compiled) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """The gradients that training usually asks for: of every floating input and weight."""
    step = compiled.step
    xs = tuple(n.meta["val"].is_floating_point() for n in step.xs)
    return xs, tuple(n.meta["val"].is_floating_point() for n in step.weights)
