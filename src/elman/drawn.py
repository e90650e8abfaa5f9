"""Dropout masks: those that are drawn once for a whole sequence and stay the same from step to step; how they are
drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["DropMask", "Dropout", "bernoulli", "drawn_for"]

_BUFFER = "drawn_once"


def bernoulli(size: Sequence[int], p: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Ones with probability p, zeros else.

    On a CPU torch.bernoulli takes four times as long: 20 ms for (128, 32, 512), where a training step takes 200.
    """
    if device.type != "cpu":
        return torch.empty(size, dtype=dtype, device=device).bernoulli_(p)
    return (torch.rand(size, dtype=torch.float32, device=device) < p).to(dtype)


class Dropout(nn.Dropout):
    """torch.nn.Dropout, with ``bernoulli`` for its mask."""

    def forward(self, x: Tensor) -> Tensor:
        """x (…) → the same shape, each number zero with probability p, else over 1 - p; in evaluation x itself."""
        if self.inplace or not (self.training and self.p and x.device.type == "cpu"):
            return super().forward(x)
        kept = 1 - self.p
        mask = bernoulli(x.shape, kept, x.dtype, x.device)
        return x * (mask.div_(kept) if kept else mask)


class DropMask(nn.Module):
    """m / (1 - p) with m ~ Bernoulli(1 - p), which ``scan`` draws once for all the steps of a cell that holds it.

    With ``rows`` every sequence has a mask of its own, (B, *shape); otherwise they share one, (*shape). A step calls
    the module with a tensor, whose rows, dtype and device it takes, and gets the mask, or None in evaluation. A step
    that is called by itself, outside a scan, draws anew.
    """

    drawn_once: Tensor

    def __init__(self, p: float, *shape: int, rows: bool = True) -> None:
        super().__init__()
        self.p, self.shape, self.rows = p, shape, rows
        self.register_buffer(_BUFFER, torch.empty(0), persistent=False)

    def forward(self, like: Tensor) -> Tensor | None:
        if not self.training or not self.p:
            return None
        return self.drawn_once.to(like.dtype) if self.drawn_once.numel() else self.draw(like.shape[0], like)

    def draw(self, batch: int, like: Tensor) -> Tensor:
        """A new mask, in the dtype and on the device of ``like``."""
        size = (batch, *self.shape) if self.rows else self.shape
        return bernoulli(size, 1 - self.p, like.dtype, like.device) / (1 - self.p)

    def extra_repr(self) -> str:
        return f"{self.p}, shape={self.shape}, rows={self.rows}"


def drawn_for(
    cell: nn.Module, names: Iterable[str], batch: int, like: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """New masks for one scan of a cell, whose parameters and buffers have these names, by the name of the buffer.

    Returns those of each sequence, (B, …), and those that all share.
    """
    each: dict[str, Tensor] = {}
    shared: dict[str, Tensor] = {}
    for name in names:
        if name.endswith(_BUFFER):
            mask = cell.get_submodule(name.removesuffix(_BUFFER).removesuffix("."))
            if isinstance(mask, DropMask) and mask.training and mask.p:
                (each if mask.rows else shared)[name] = mask.draw(batch, like)
    return each, shared
