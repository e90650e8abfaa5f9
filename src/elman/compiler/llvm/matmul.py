"""Matrix products of any shape, out = init + left right, on the micro-kernels of ``product``: compiled once, for all.

Columns and k are cut into blocks whose packed ``right`` stays in the last-level cache. Within a block every thread
takes some rows (or, where there are few, some panels), and of those as many at a time as its own cache holds:

    for block of N:  for block of K:
        pack right[block of K, block of N], shared by the threads
        for block of rows of this thread:
            pack left[block of rows, block of K], unless it is read as it lies
            product

The order in which an element is summed depends on the shapes alone: not on who does it, nor on how many share.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from llvmlite import ir
from torch import Tensor

from ...cachefolder import cache_directory
from ...errors import InputError, UnsupportedError
from . import engine, threads
from .code import F32, F64, I64, PTR, VOID, at, counted, function, intrinsic, load
from .entry import BARRIER_BYTES, barrier, exported
from .isa import Isa, chosen
from .product import depth_of, pack, pack_left, panel_count, product
from .scratch import LINE, Scratch, lined

__all__ = ["added", "multiply", "product_of"]

_KINDS = {torch.float32: F32, torch.float64: F64}
_DEPTHS = 4  # blocks of a panel in a block of K
_ROWS = 192  # rows of left at a time, a multiple of the rows of every tile
_RIGHT_BYTES = 8 << 20  # of right in a block
_WORK_TO_SHARE = 400_000  # operations that are worth a second thread
_FEW = 8  # columns or k below which torch.mm is faster, and half of the rows
_LITTLE = 1 << 20  # multiplications below which the call itself weighs too much
_FROM_SYSTEM = 32 << 20  # bytes from which on the C library keeps no memory for later
_HUGE = 2 << 20  # bytes of a large page

# What a call is told, in the order of its words.
_WORDS = (
    "out", "out_stride", "init", "init_stride", "left", "left_stride", "left_step", "right", "right_step",
    "right_stride", "rows", "k", "columns", "packed", "scratch", "scratch_bytes", "tile_stride", "by_panels", "meeting",
)  # fmt: skip


def multiply(left: Tensor, right: Tensor, init: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """The matrix product init + left right, not differentiable.

    ``left`` (M, K) and ``right`` (K, N) are float32 or float64 on the CPU, of any strides; it is fastest where each has
    neighbouring numbers along one of its dimensions. ``init`` expands to (M, N). The result (M, N) is ``out`` where
    that is given, which may be ``init`` but must not share memory with the others. Denormal numbers count as zero.

    Raises InputError for tensors that do not fit together, UnsupportedError on a processor without machine code.
    """
    out = _result(left, right, init, out)
    if not out.numel():
        return out
    if left.shape[1] == 0:
        return out.zero_() if init is None else out.copy_(init)
    if out.stride(1) != 1 and out.shape[1] != 1:
        if out.stride(0) == 1 or out.shape[0] == 1:
            multiply(right.t(), left.t(), None if init is None else init.expand(out.shape).t(), out.t())
            return out
        return out.copy_(multiply(left, right, init))
    if init is not None:
        init = init.expand(out.shape)
        if init.stride(1) != 1 and init.shape[1] != 1:
            init = out.copy_(init)
    _run(_code(left.dtype, _isa()), left, right, init, out)
    return out


def product_of(left: Tensor, right: Tensor) -> Tensor:
    """left right: by ``multiply`` where that is worth it, else by torch.mm."""
    return multiply(left, right) if _worth_it(left, right) else torch.mm(left, right)


def added(bias: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """bias + left right: by ``multiply`` where that is worth it, else by torch.addmm."""
    return multiply(left, right, bias) if _worth_it(left, right) else torch.addmm(bias, left, right)


def _worth_it(left: Tensor, right: Tensor) -> bool:
    (rows, k), columns = left.shape, right.shape[1]
    return rows >= 2 * _FEW and k >= _FEW and columns >= _FEW and rows * k * columns >= _LITTLE


def _result(left: Tensor, right: Tensor, init: Tensor | None, out: Tensor | None) -> Tensor:
    """``out``, or a new tensor for the result, after a look at whether all fit together."""
    given = [tensor for tensor in (left, right, init, out) if tensor is not None]
    if left.dtype not in _KINDS or any(t.dtype != left.dtype or t.device.type != "cpu" for t in given):
        kinds = ", ".join(f"{t.dtype} on {t.device}" for t in given)
        raise InputError(f"multiply takes tensors on the CPU that are all float32 or all float64, got {kinds}.")
    if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
        raise InputError(f"multiply takes (M, K) and (K, N), got {tuple(left.shape)} and {tuple(right.shape)}.")
    shape = (left.shape[0], right.shape[1])
    if init is not None:
        pairs = zip(reversed(init.shape), reversed(shape), strict=False)
        if init.dim() > 2 or any(n not in (1, size) for n, size in pairs):
            raise InputError(f"init must expand to {shape}, got {tuple(init.shape)}.")
    if out is None:
        return _fresh(shape, left.dtype)
    if out.shape != shape:
        raise InputError(f"out must be {shape}, got {tuple(out.shape)}.")
    return out


def _fresh(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """A new tensor. One so large that its pages come from the system, each with a fault, asks for few large pages."""
    made = torch.empty(shape, dtype=dtype)
    first, end = -(-made.data_ptr() // _HUGE) * _HUGE, (made.data_ptr() + made.nbytes) // _HUGE * _HUGE
    if made.nbytes >= _FROM_SYSTEM and first < end and hasattr(mmap, "MADV_HUGEPAGE"):
        _madvise()(first, end - first, mmap.MADV_HUGEPAGE)  # a wish: that it may be refused changes nothing
    return made


@lru_cache(maxsize=1)
def _madvise() -> Callable[[int, int, int], int]:
    return ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)(
        ("madvise", ctypes.CDLL(None))
    )


def _isa() -> Isa:
    isa = chosen()
    if isa is None:
        raise UnsupportedError("there is no machine code for this processor; use torch.mm.")
    return isa


class _Code(NamedTuple):
    """The compiled function and what it was compiled for. ``library`` holds the memory that it runs in."""

    library: engine.Library
    address: int
    isa: Isa


_compiling = threading.Lock()


def _code(dtype: torch.dtype, isa: Isa) -> _Code:
    """The function for a type of numbers, compiled on first use."""
    with _compiling:
        return _compiled(dtype, isa)


@lru_cache(maxsize=16)
def _compiled(dtype: torch.dtype, isa: Isa) -> _Code:
    library = engine.load(
        lambda: _module(dtype, isa),
        isa,
        cache_directory(),
        description=f"{engine.generator()} {isa} multiply {dtype}",
        functions=["multiply"],
    )
    return _Code(library, library.address("multiply"), isa)


def _run(code: _Code, left: Tensor, right: Tensor, init: Tensor | None, out: Tensor) -> None:
    """The blocks of columns and of k, one call for each."""
    isa, item = code.isa, out.element_size()
    (rows, k), columns = left.shape, right.shape[1]
    lanes = isa.lanes(8 * item)
    depth = _even_part(k, _DEPTHS * depth_of(isa), 8)
    width = _even_part(columns, max(_RIGHT_BYTES // (depth * item), 1), isa.tile[1] * lanes)
    count = 1 if 2 * rows * columns * k < _WORK_TO_SHARE else threads.count()
    vectors = -(-width // lanes)
    by_panels = count > 1 and -(-rows // isa.tile[0]) < min(4 * count, -(-vectors // isa.tile[1]))
    packs = left.stride(1) != 1 and k > 1
    tile_stride = lined(depth * isa.tile[0] * item) + LINE
    left_bytes = lined(-(-min(rows, _ROWS) // isa.tile[0]) * tile_stride) if packs else 0
    right_bytes = lined(depth * vectors * isa.bytes)
    zero_bytes = lined(width * item) if init is None else 0
    with Scratch(BARRIER_BYTES + zero_bytes + right_bytes + left_bytes * count) as [place]:
        ctypes.memset(place, 0, BARRIER_BYTES + zero_bytes)
        zeros, packed = place + BARRIER_BYTES, place + BARRIER_BYTES + zero_bytes
        strides = [stride * item for tensor in (left, right) for stride in tensor.stride()]
        out_stride = out.stride(0) * item
        for column in range(0, columns, width):
            for done in range(0, k, depth):
                target = out.data_ptr() + column * item
                source, source_stride = target, out_stride
                if not done:
                    source, source_stride = zeros, 0
                    if init is not None:
                        source, source_stride = init.data_ptr() + column * item, init.stride(0) * item
                words = (
                    target, out_stride, source, source_stride,
                    left.data_ptr() + done * strides[1], strides[0], strides[1],
                    right.data_ptr() + done * strides[2] + column * strides[3], strides[2], strides[3],
                    rows, min(depth, k - done), min(width, columns - column),
                    packed, packed + right_bytes, left_bytes, tile_stride if packs else 0, by_panels, place,
                )  # fmt: skip
                threads.run(code.address, (ctypes.c_int64 * len(words))(*words), count)


def _even_part(size: int, most: int, multiple: int) -> int:
    """The size of equal parts of at most about so much, a multiple of a number; all where that is enough."""
    parts = -(-size // most)
    return size if parts == 1 else -(-size // (parts * multiple)) * multiple


def _module(dtype: torch.dtype, isa: Isa) -> ir.Module:
    """A module with ``multiply``, which does one block of columns and of k."""
    kind = _KINDS[dtype]
    module = ir.Module("matmul")
    body = function(module, "block", VOID, [PTR, I64, I64])
    args, thread, total = body.args
    b = ir.IRBuilder(body.append_basic_block("entry"))
    pointers = ("out", "init", "left", "right", "packed", "scratch", "meeting")
    w = {name: load(b, at(b, args, 8 * i), PTR if name in pointers else I64) for i, name in enumerate(_WORDS)}
    zero = I64(0)
    panels = panel_count(b, isa, kind, w["columns"])
    first, last = _share(b, panels, thread, total)
    size = [w["k"], w["columns"]]
    b.call(
        pack(module, isa, kind),
        [w["packed"], w["right"], w["right_step"], w["right_stride"], first, last, *size],
    )
    b.call(barrier(module, isa), [w["meeting"], total])
    by_panels = b.icmp_signed("!=", w["by_panels"], zero)
    first, last = b.select(by_panels, first, zero), b.select(by_panels, last, panels)
    tiles = b.udiv(b.add(w["rows"], I64(isa.tile[0] - 1)), I64(isa.tile[0]))
    begin, end = (b.mul(tile, I64(isa.tile[0])) for tile in _share(b, tiles, thread, total))
    begin = b.select(by_panels, zero, begin)
    end = b.select(by_panels, w["rows"], intrinsic(b, "llvm.smin.i64", I64, [end, w["rows"]]))
    packs = b.icmp_signed("!=", w["tile_stride"], zero)
    room = at(b, w["scratch"], b.mul(thread, w["scratch_bytes"]))
    element = I64(isa.bytes // isa.lanes(8 * dtype.itemsize))
    kept_stride = b.select(packs, element, w["left_stride"])
    kept_step = b.select(packs, I64(isa.tile[0] * dtype.itemsize), w["left_step"])
    with counted(b, begin, end, _ROWS, name="rows") as row:
        rows = intrinsic(b, "llvm.smin.i64", I64, [I64(_ROWS), b.sub(end, row)])
        left = at(b, w["left"], b.mul(row, w["left_stride"]))
        to_pack = b.select(packs, rows, zero)
        b.call(
            pack_left(module, isa, kind),
            [room, w["tile_stride"], left, w["left_stride"], w["left_step"], to_pack, w["k"]],
        )
        target, source = (at(b, w[n], b.mul(row, w[f"{n}_stride"])) for n in ("out", "init"))
        b.call(
            product(module, isa, kind),
            [
                target, w["out_stride"], source, w["init_stride"], b.select(packs, room, left), kept_stride,
                w["packed"], rows, first, last, kept_step, w["tile_stride"], *size,
            ],
        )  # fmt: skip
    b.ret_void()
    exported(body, "multiply", isa)
    return module


def _share(b: ir.IRBuilder, count: ir.Value, part: ir.Value, parts: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The first and the end of what one of so many threads takes."""
    return b.udiv(b.mul(count, part), parts), b.udiv(b.mul(count, b.add(part, I64(1))), parts)
