"""The definition: a plain Python loop over the steps, differentiated by autograd. Every other backend is held to it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..packing import Rows

__all__ = ["apart", "unfold"]

Step = Callable[[list[Tensor], list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]]


def unfold(
    step: Step,
    rows: Rows,
    xs: list[Tensor],
    state: list[Tensor],
    constants: list[Tensor],
    reverse: bool = False,
) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
    """Run ``step`` over all steps of ``rows``.

    xs leaves are packed (N, …); state and constants leaves are (B, …), longest sequence first. Returns the
    packed outputs (N, …), the final state (B, …), and for every step the state leaves after it, (batch size, …).
    """
    if rows.steps == 1 and rows.uniform:
        ys_here, state = step(xs, state, constants)
        return ys_here, state, [state]
    sizes = rows.batch_sizes
    times = [t for t in range(rows.steps) if sizes[t]] or [0]  # with no row at all, one empty step tells the shapes
    ys: list[list[Tensor]] = [[] for _ in range(rows.steps)]
    after: list[list[Tensor]] = [[] for _ in range(rows.steps)]
    for t in reversed(times) if reverse else times:
        n = sizes[t]
        x = [leaf[rows.offsets[t] : rows.offsets[t + 1]] for leaf in xs]
        full = n == rows.batch
        here = state if full else [leaf[:n] for leaf in state]
        ys[t], after[t] = step(x, here, constants if full else [leaf[:n] for leaf in constants])
        state = after[t] if full else [torch.cat([new, old[n:]]) for new, old in zip(after[t], state, strict=True)]
    done = [ys[t] for t in times]
    joined = done[0] if len(done) == 1 else [torch.cat(leaves) for leaves in zip(*done, strict=True)]
    return joined, state, [after[t] for t in times]


def apart(outputs: list[Tensor], given: list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    """Results that share no memory with what was given, nor with one another."""
    seen = {t.untyped_storage()._cdata for t in given}
    found = []
    for out in outputs:
        memory = out.untyped_storage()._cdata
        if memory in seen:
            out = out.clone()
            memory = out.untyped_storage()._cdata
        seen.add(memory)
        found.append(out)
    return found
