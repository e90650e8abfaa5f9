"""How numbers stand in memory, and how they are computed with: truth values are bytes there, bfloat16 half a float32.

What is read from memory as bfloat16 is computed with in float32, and rounded where it is written to memory again; so
between an operation and the next nothing is lost, where PyTorch would round.
"""

from __future__ import annotations

import torch
from llvmlite import ir

from .code import BOOL, BYTE, F32, F64, I16, I32, I64, constant, vector
from .isa import DOTS, Isa
from .numeric import rounded

__all__ = ["BYTES", "HELD", "KINDS", "from_memory", "to_memory"]

KINDS = {
    torch.float32: F32, torch.float64: F64, torch.bfloat16: F32,
    torch.int64: I64, torch.int32: I32, torch.bool: BOOL,
}  # fmt: skip
"""What numbers are computed in."""
HELD = {**KINDS, torch.bfloat16: I16, torch.bool: BYTE}
"""What they are in memory."""
BYTES = {dtype: dtype.itemsize for dtype in KINDS}


def from_memory(b: ir.IRBuilder, held: ir.Value, dtype: torch.dtype) -> ir.Value:
    """Numbers as they are computed with, from what stood in memory; one, or a vector of them."""
    if dtype == torch.bool:
        return b.icmp_unsigned("!=", held, constant(held.type, 0))
    if dtype == torch.bfloat16:
        word = _like(held.type, I32)
        return b.bitcast(b.shl(b.zext(held, word), constant(word, 16)), _like(held.type, F32))
    return held


def to_memory(b: ir.IRBuilder, value: ir.Value, dtype: torch.dtype, isa: Isa) -> ir.Value:
    """What is to stand in memory for such numbers."""
    if dtype == torch.bool:
        return b.zext(value, _like(value.type, BYTE))
    return rounded(b, value, DOTS.get(isa.dot)) if dtype == torch.bfloat16 else value


def _like(kind: ir.Type, element: ir.Type) -> ir.Type:
    return vector(element, kind.count) if isinstance(kind, ir.VectorType) else element
