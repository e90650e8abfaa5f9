"""What every network hands on to ``scan``: how it is unfolded, and which steps are padding."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

from ..packing import rows_of

__all__ = ["Unfolding", "past"]


class Unfolding(TypedDict, total=False):
    """Options of ``scan`` that change no result: every network takes them and hands them on."""

    backend: str
    remat: int | str | None


def past(xs: Tensor, lengths: Tensor | list[int]) -> Tensor:
    """(T, B) booleans: which steps of xs (T, B, …) lie past the end of their sequence. InputError for other lengths."""
    if not torch.compiler.is_compiling():
        rows_of(xs.shape[0], xs.shape[1], lengths, xs.device)
    return torch.arange(len(xs), device=xs.device)[:, None] >= torch.as_tensor(lengths, device=xs.device)
