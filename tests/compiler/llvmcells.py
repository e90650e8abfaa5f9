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
from elman.cells import ElmanCell, GRUCell, LSTMCell, SRUCell
from elman.combinators import Leaky, start

__all__ = [
    "ALL_MACHINE_CODE",
    "KINDS",
    "PARTLY",
    "SIZES",
    "WITHOUT_LOOPS",
    "assert_single",
    "expected_single",
    "given",
    "made",
]

WITHOUT_LOOPS = ("Delay", "DelayLine", "Feedforward", "JordanTeacherForced", "StateFixed", "Stateless")
"""Cells of the zoo in which no step waits for another: nothing is left to a loop."""

PARTLY = {
    "Bilinear": "_trilinear",
    "Convolution": "convolution",
    "Gathers": "gather",
    "Reductions": "scatter",
    "Shapes": "index_select",
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
    state = pytree.tree_map_only(Tensor, lambda s: 0.5 * torch.randn_like(s) if s.is_floating_point() else s, state)
    xs = torch.randn(steps, batch, d, dtype=dtype)
    return {"xs": differentiable(xs, dtype), "state": differentiable(state, dtype), "constants": None}


Expected = dict[str, tuple[Tensor, float]]
"""Of every tensor its value in float64, and how far from it one in float32 may be."""


def expected_single(cell: nn.Module, sources: dict[str, Any], **options: Any) -> Expected:
    """Machine code in float32 must be as near to float64 as PyTorch's operations are, up to another order of sums."""
    wide = pytree.tree_map_only(
        Tensor, lambda s: s.detach().double().requires_grad_() if s.is_floating_point() else s, sources
    )
    exact = everything(scan_by("reference"), copy.deepcopy(cell).double(), wide, **options)
    others = [everything(scan_by(backend), cell, sources, **options) for backend in ("reference", "interpret")]
    found = {}
    for name, value in exact.items():
        usual = max(_farthest(other[name], value) for other in others)
        found[name] = value, 4 * usual + 2e-6 * _farthest(value, torch.zeros_like(value)) + 1e-12
    return found


def assert_single(found: dict[str, Tensor], expected: Expected) -> None:
    assert found.keys() == expected.keys()
    for name, (value, bound) in expected.items():
        assert found[name].shape == value.shape, name
        assert found[name].dtype == (torch.float32 if value.is_floating_point() else value.dtype), name
        assert _farthest(found[name], value) <= bound, (name, _farthest(found[name], value), bound)


def _farthest(found: Tensor, value: Tensor) -> float:
    return float((found.double() - value.double()).abs().max()) if value.numel() else 0.0
