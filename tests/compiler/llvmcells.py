"""Cells for the tests of machine code: some of each kind at any size, and how far from float64 float32 may be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cellzoo import ZOO
from comparing import differentiable, everything, scan_by
from contracts.row import FAST
from elman.cells import ElmanCell, GRUCell, LSTMCell, SRUCell
from elman.combinators import Leaky, start

__all__ = ["ALL_MACHINE_CODE", "KINDS", "PARTLY", "SIZES", "WITHOUT_LOOPS", "assert_single", "given", "made"]

WITHOUT_LOOPS = ("Delay", "DelayLine", "Feedforward", "JordanTeacherForced", "StateFixed", "Stateless")
"""Cells of the zoo in which no step waits for another: nothing is left to a loop."""

PARTLY = {
    "Bilinear": "_trilinear",
    "Convolution": "convolution",
    "Gathers": "gather",
    "MultiHead": "max",
    "Reductions": "max",
    "Shapes": "flip",
}
"""Cells of the zoo with a loop that PyTorch's operations run, forward or backward, and one it has no code for."""

ALL_MACHINE_CODE = [name for name in ZOO if name not in WITHOUT_LOOPS and name not in PARTLY]

KINDS: dict[str, Callable[[int, int], nn.Module]] = {
    "lstm": LSTMCell,
    "gru": GRUCell,
    "elman": ElmanCell,
    "sru": SRUCell,
    "lstm, layer norm": lambda d, h: LSTMCell(d, h, layer_norm=True),
    "leaky": lambda d, h: Leaky(ElmanCell(d, h), 0.7),
}
"""(input size, hidden size) to a cell: products alone, none, and row reductions among them."""

SIZES = [(1, 1, 1, 1), (63, 3, 5, 17), (3, 33, 2, 100), (2, 3, 7, 500), (1, 33, 18, 17)]
"""(T, B, I, H), where vectors, tiles and panels do not come out even."""


def made(kind: str, d: int, h: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(21)
    return KINDS[kind](d, h).to(dtype)


def given(cell: nn.Module, steps: int, batch: int, d: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """xs and a first state that is nowhere zero; all want their gradients."""
    torch.manual_seed(22)
    state = start(cell, batch, device=torch.device("cpu"), dtype=dtype)
    state = pytree.tree_map_only(Tensor, lambda s: 0.5 * torch.randn_like(s), state)
    xs = torch.randn(steps, batch, d, dtype=dtype)
    return {"xs": differentiable(xs, dtype), "state": differentiable(state, dtype), "constants": None}


def assert_single(cell: nn.Module, sources: dict[str, Any], **options: Any) -> None:
    """In float32 machine code is as near to float64 as PyTorch's operations are, up to another order of sums."""
    wide = pytree.tree_map_only(
        Tensor, lambda s: s.detach().double().requires_grad_() if s.is_floating_point() else s, sources
    )
    exact = everything(scan_by("reference"), copy.deepcopy(cell).double(), wide, **options)
    plain, program, fast = (everything(scan_by(b), cell, sources, **options) for b in ("reference", *FAST))
    assert fast.keys() == exact.keys()
    for name, value in exact.items():
        assert fast[name].dtype == plain[name].dtype, name
        assert fast[name].shape == value.shape, name
        if not value.numel() or not value.is_floating_point():
            continue
        far, *usual = (float((found[name].double() - value).abs().max()) for found in (fast, plain, program))
        assert far <= 4 * max(usual) + 2e-6 * float(value.abs().max()) + 1e-12, (name, far, usual)
