"""Which library runs a matrix product on the CPU: oneDNN where that is the faster of PyTorch's two, or our own code.

torch.mm calls MKL, which keeps its best code for processors of its own maker; elsewhere oneDNN, which PyTorch carries
too, reaches the machine's peak (two cores of an AMD EPYC with AVX-512: 530 against 235 GFLOP/s for large products, 390
against 190 for 32 rows with a packed weight). Which one is used depends on the maker of the processor alone, so the
same machine always rounds the same way. Programs whose loops are machine code have their other products by the same
micro-kernels (``llvm.matmul``) there, in float64 too; and everywhere those of float32 at "high" precision where a
matrix unit makes three products of bfloat16 faster than one, which torch.mm does not. None of these functions is
differentiable.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, fx

from .step import arguments

__all__ = ["added", "applies", "function_of", "pack", "prefers_onednn", "product"]

_FEW = 128  # operands narrower than this gain nothing
_MANY = 8  # products that are worth laying out a weight for


@lru_cache(maxsize=1)
def prefers_onednn() -> bool:
    """Whether float32 products on this machine go through oneDNN."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # not part of every build
        return False
    info = Path("/proc/cpuinfo")
    maker = info.read_text() if info.exists() else platform.processor()
    return "GenuineIntel" not in maker


def function_of(node: fx.Node, compiled: bool = False, precision: str = "highest") -> Callable[..., Tensor] | None:
    """What runs the product of a node, None where that is torch.mm or torch.addmm, and for any other node.

    It takes (bias, left, right), or (left, right) where nothing is added. ``compiled``: in a program of machine code,
    whose products of float32 have that precision.
    """
    bias = node.target is torch.ops.aten.addmm.default
    if compiled and _is_product(node, torch.float32, torch.float64, torch.bfloat16):
        from .llvm import isa, matmul, numeric  # llvmlite is loaded with the first program of machine code

        found = isa.chosen()
        high = precision == "high" and _is_product(node, torch.float32)
        if found is not None and (prefers_onednn() or (high and numeric.in_halves(found))):
            function = matmul.added if bias else matmul.product_of
            return function if precision == "highest" else _precise(function, precision)
    if not applies(node):
        return None
    return added if bias else product


@lru_cache(maxsize=8)
def _precise(function: Callable[..., Tensor], precision: str) -> Callable[..., Tensor]:
    return partial(function, precision=precision)


def applies(node: fx.Node) -> bool:
    """Whether the product of a node goes through oneDNN: mm or addmm of float32 matrices on a CPU, not tiny."""
    if not _is_product(node, torch.float32) or not prefers_onednn():
        return False
    right = arguments(node)[-1].meta["val"]
    return min(int(right.shape[0]), int(right.shape[1])) >= _FEW


def _is_product(node: fx.Node, *dtypes: torch.dtype) -> bool:
    """Whether a node is mm or addmm on the CPU, of one of these types."""
    if node.target not in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) or node.kwargs:
        return False
    right = arguments(node)[-1].meta["val"]
    return right.dtype in dtypes and right.device.type == "cpu"


def pack(right: Tensor, rows: int, times: int) -> Tensor:
    """A weight (K, N) laid out for as many products ``(rows, K) @ right``, for ``product`` and ``added`` alone."""
    if times < _MANY:
        return right.t()
    return torch.ops.mkldnn._reorder_linear_weight(right.t().contiguous(), rows)


def _dense(weight: Tensor) -> Tensor:
    """A matrix without gaps: with a slice or an expanded value for its second operand oneDNN takes a thousandfold."""
    return weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()


def product(left: Tensor, right: Tensor, packed: bool = False) -> Tensor:
    """(M, K) @ (K, N), ``right`` packed or not."""
    linear = torch.ops.mkldnn._linear_pointwise
    if not packed and not left.is_contiguous() and left.numel() > right.numel():
        # The first operand must be contiguous: copy the smaller one, and give the transposed result.
        return linear(right.t(), _dense(left), None, "none", [], "").t()
    return linear(left, right if packed else _dense(right.t()), None, "none", [], "")


def added(bias: Tensor, left: Tensor, right: Tensor, packed: bool = False) -> Tensor:
    """bias + (M, K) @ (K, N), the bias (N), or anything that expands to (M, N), ``right`` packed or not."""
    linear = torch.ops.mkldnn._linear_pointwise
    weight = right if packed else _dense(right.t())  # (N, K)
    if bias.shape == weight.shape[:1]:
        return linear(left, weight, bias, "none", [], "")
    return linear.binary(left, bias.expand(left.shape[0], weight.shape[0]), weight, None, "add")
