"""Cells for the tests of bfloat16, and how near to float32 its results must be: about as PyTorch's own, or nearer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import elman
from elman.cells import ElmanCell, GRUCell, LSTMCell, SRUCell
from elman.combinators import Delay, Leaky, Residual, Stack

__all__ = ["CELLS", "check", "distance", "everything"]

CELLS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "elman": (24, lambda: ElmanCell(24, 32)),
    "lstm": (24, lambda: LSTMCell(24, 32)),
    "lstm, odd": (23, lambda: LSTMCell(23, 31)),
    "lstm, layer norm": (24, lambda: LSTMCell(24, 32, layer_norm=True)),
    "gru": (24, lambda: GRUCell(24, 32)),
    "sru": (24, lambda: SRUCell(24, 32)),
    "leaky": (24, lambda: Leaky(ElmanCell(24, 17), 0.7)),
    "stack": (24, lambda: Stack([LSTMCell(24, 32), Residual(GRUCell(32, 32))])),
    "delay": (24, lambda: Delay(GRUCell(24, 20), 3)),
}


def everything(cell: nn.Module, x: Tensor, backend: str, autocast: bool, **options: object) -> list[Tensor]:
    """Outputs, final states and all gradients, as float32."""
    x = x.detach().clone().requires_grad_()
    cell.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ys, state = elman.scan(cell, x, backend=backend, **options)
    leaves = [ys, *torch.utils._pytree.tree_leaves(state)]
    sum(((leaf.float() - 0.1) ** 2).sum() for leaf in leaves).backward()
    found = [*leaves, x.grad, *[p.grad for p in cell.parameters()]]
    return [t.detach().float() for t in found if t is not None]


def distance(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a - b).norm() / (b.norm() or 1)) for a, b in zip(found, exact, strict=True)]


def check(found: list[Tensor], torchs: list[Tensor], exact: list[Tensor]) -> None:
    for ours, theirs in zip(distance(found, exact), distance(torchs, exact), strict=True):
        assert ours < 1.5 * theirs + 1e-3
        assert theirs < 0.2  # or nothing was compared
