"""Matrix products of any shape, out = init + left right, on the micro-kernels of ``product``: compiled once, for all.

Columns and k are cut into blocks whose packed ``right`` stays in the last-level cache. Within a block every thread
takes some rows (or, where there are few, some panels), and of those as many at a time as its own cache holds:

    for block of N:  for block of K:
        pack right[block of K, block of N], shared by the threads
        for block of rows of this thread:
            pack or narrow left[block of rows, block of K], unless it is read as it lies
            product

The order in which an element is summed depends on the shapes alone: not on who does it, nor on how many share.

bfloat16 is multiplied by its own numeric mode, with sums in float32 over all of K. A result of bfloat16 is rounded
once, from sums that are still in the cache, or that were kept for the whole matrix where K has more than one block.
"""

from __future__ import annotations

import ctypes
import mmap
from array import array
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from llvmlite import ir
from torch import Tensor

from ...cachefolder import cache_directory
from ...errors import InputError, OptionError, UnsupportedError
from . import calls, engine, threads
from .code import BF16, BF16X3, F32, F64, I64, PTR, VOID, at, counted, function, intrinsic, load, share
from .entry import BARRIER_BYTES, barrier, exported
from .isa import Isa, chosen
from .numeric import Numeric, in_halves, numeric
from .panel import any_columns
from .product import depth_of, narrow, pack, pack_left, product, rows_narrowed
from .scratch import LINE, Scratch, lined

__all__ = ["Precision", "added", "multiply", "product_of"]

Precision = Literal["highest", "high", "medium"]
_PRECISIONS = get_args(Precision)

_KINDS = {torch.float32: F32, torch.float64: F64, torch.bfloat16: BF16}
_ROWS = 96  # rows of left at a time, a multiple of the rows of every tile
_PANELS = 8  # whose sums are rounded at a time
_RIGHT_BYTES = 8 << 20  # of right in a block
_WORK_TO_SHARE = 400_000  # operations that are worth a second thread
_FEW = 8  # columns or k below which torch.mm is faster, and half of the rows
_LITTLE = 1 << 18  # multiplications below which the call itself weighs too much
_FROM_SYSTEM = 32 << 20  # bytes from which on the C library keeps no memory for later
_HUGE = 2 << 20  # bytes of a large page

# What a call is told, in the order of its words.
_WORDS = (
    "out", "out_stride", "init", "init_stride", "left", "left_stride", "left_step", "right", "right_step",
    "right_stride", "rows", "k", "columns", "packed", "scratch", "scratch_bytes", "tile_stride", "by_panels", "meeting",
    "narrowed_stride", "sums", "sums_bytes",
)  # fmt: skip


_POINTERS = tuple(
    i
    for i, name in enumerate(_WORDS)
    if name in ("out", "init", "left", "right", "packed", "scratch", "meeting", "sums")
)


def multiply(
    left: Tensor,
    right: Tensor,
    init: Tensor | None = None,
    out: Tensor | None = None,
    *,
    precision: Precision = "highest",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The matrix product init + left right, not differentiable.

    ``left`` (M, K) and ``right`` (K, N) are float32, float64 or bfloat16 on the CPU, of any strides; it is fastest
    where each has neighbouring numbers along one of its dimensions. ``init`` expands to (M, N). The result (M, N) is
    ``out`` where that is given, which may be ``init`` but must not share memory with the others. Denormal numbers count
    as zero.

    Products of bfloat16 are summed in float32 throughout; ``init`` and the result may each be float32 or bfloat16, and
    a new result is of ``out_dtype``, bfloat16 unless given. ``precision`` is PyTorch's for products of float32:
    "medium" allows them to round their operands to bfloat16, which they do where the processor multiplies that faster;
    "high" allows three products of bfloat16 for one, which they are where a matrix unit multiplies them.

    Raises InputError for tensors that do not fit together, OptionError for another precision, UnsupportedError on a
    processor without machine code.
    """
    if precision not in _PRECISIONS:
        raise OptionError.unknown("precision", precision, _PRECISIONS)
    left, right = left.resolve_neg(), right.resolve_neg()
    out = _result(left, right, init, out, out_dtype)
    if not out.numel():
        return out
    if left.shape[1] == 0:
        return out.zero_() if init is None else out.copy_(init)
    isa = _isa()
    form = _form(left.dtype, out.dtype, precision, left.shape[1], isa)
    if form.sums != out.dtype and not form.rounds:
        sums = multiply(left, right, init, precision=precision, out_dtype=form.sums)
        return out.copy_(sums)
    if out.stride(1) != 1 and out.shape[1] != 1:
        if out.stride(0) == 1 or out.shape[0] == 1:
            turned = None if init is None else init.expand(out.shape).t()
            multiply(right.t(), left.t(), turned, out.t(), precision=precision)
            return out
        return out.copy_(multiply(left, right, init, precision=precision, out_dtype=out.dtype))
    if init is not None:
        init = init.resolve_neg().to(form.sums).expand(out.shape)
        if init.stride(1) != 1 and init.shape[1] != 1:
            init = init.contiguous() if form.rounds else out.copy_(init)
    _run(_code(form, isa), left, right, init, out)
    return out


def product_of(left: Tensor, right: Tensor, precision: Precision = "highest") -> Tensor:
    """left right: by ``multiply`` where that is worth it, else by torch.mm."""
    return multiply(left, right, precision=precision) if _worth_it(left, right) else torch.mm(left, right)


def added(bias: Tensor, left: Tensor, right: Tensor, precision: Precision = "highest") -> Tensor:
    """bias + left right: by ``multiply`` where that is worth it, else by torch.addmm."""
    if _worth_it(left, right):
        return multiply(left, right, bias, precision=precision)
    return torch.addmm(bias, left, right)


def _worth_it(left: Tensor, right: Tensor) -> bool:
    (rows, k), columns = left.shape, right.shape[1]
    return rows >= 2 * _FEW and k >= _FEW and columns >= _FEW and rows * k * columns >= _LITTLE


def _result(left: Tensor, right: Tensor, init: Tensor | None, out: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """``out``, or a new tensor for the result, after a look at whether all fit together."""
    given = [tensor for tensor in (left, right, init, out) if tensor is not None]
    operand = left.dtype
    allowed = (operand, torch.float32 if operand == torch.bfloat16 else operand)
    fits = operand in _KINDS and right.dtype == operand and (dtype or operand) in allowed
    if not fits or any(t.dtype not in allowed or t.device.type != "cpu" for t in given):
        kinds = ", ".join([*(f"{t.dtype} on {t.device}" for t in given), *([f"out_dtype={dtype}"] if dtype else [])])
        raise InputError(
            "multiply takes tensors on the CPU that are all float32, all float64 or all bfloat16, in which case init "
            f"and the result may be float32; got {kinds}."
        )
    if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
        raise InputError(f"multiply takes (M, K) and (K, N), got {tuple(left.shape)} and {tuple(right.shape)}.")
    shape = (left.shape[0], right.shape[1])
    if init is not None:
        pairs = zip(reversed(init.shape), reversed(shape), strict=False)
        if init.dim() > 2 or any(n not in (1, size) for n, size in pairs):
            raise InputError(f"init must expand to {shape}, got {tuple(init.shape)}.")
    if out is None:
        return _fresh(shape, dtype or operand)
    if out.shape != shape or (dtype or out.dtype) != out.dtype:
        raise InputError(f"out must be {shape}, of out_dtype where that is given, got {tuple(out.shape)}, {out.dtype}.")
    return out


def _fresh(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """A new tensor. One so large that its pages come from the system, each with a fault, asks for few large pages."""
    made = torch.empty(shape, dtype=dtype, device="cpu")
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


class _Form(NamedTuple):
    """What a function is compiled for: the types of its operands, of its arithmetic, of its sums.

    ``rounds``: it gives the sums rounded to the type of the arithmetic, else as they are. ``rests``: numbers are
    multiplied in halves.
    """

    operand: torch.dtype
    mode: torch.dtype
    sums: torch.dtype
    rounds: bool
    rests: bool = False

    @property
    def kind(self) -> ir.Type:
        """What its numeric mode is asked for by."""
        return BF16X3 if self.rests else _KINDS[self.mode]

    def numeric(self, isa: Isa) -> Numeric:
        """Its numeric mode."""
        return numeric(isa, self.kind, _KINDS[self.operand])


def _form(operand: torch.dtype, result: torch.dtype, precision: str, k: int, isa: Isa) -> _Form:
    """The form for such operands and results; sums of more than one block of k are not rounded as they are made."""
    if operand == torch.bfloat16:
        rounds = result == operand and k <= depth_of(isa, BF16)
        return _Form(operand, operand, torch.float32, rounds)
    if operand == torch.float32 and precision == "high" and in_halves(isa):
        return _Form(operand, torch.bfloat16, operand, False, True)
    if operand == torch.float32 and precision == "medium" and isa.dot:
        return _Form(operand, torch.bfloat16, operand, False)
    return _Form(operand, operand, operand, False)


class _Code(NamedTuple):
    """The compiled function and what it was compiled for. ``library`` holds the memory that it runs in."""

    library: engine.Library
    address: int
    isa: Isa
    form: _Form
    mode: Numeric


@engine.kept
def _code(form: _Form, isa: Isa) -> _Code:
    """The function of a form, compiled on first use."""
    library = engine.load(
        lambda: _module(form, isa),
        isa,
        cache_directory(),
        description=f"{engine.generator()} {isa} multiply {form}",
        functions=["multiply"],
    )
    mode = form.numeric(isa)
    return _Code(library, library.address("multiply"), isa, form, mode)


def _run(code: _Code, left: Tensor, right: Tensor, init: Tensor | None, out: Tensor) -> None:
    """The blocks of columns and of k, one call for each."""
    isa, form, mode = code.isa, code.form, code.mode
    item, wide = out.element_size(), form.sums.itemsize
    (rows, k), columns = left.shape, right.shape[1]
    lanes, (height, vectors_of_tile) = mode.lanes(isa), mode.tile
    depth = _even_part(k, depth_of(isa, mode.kind), max(8 * mode.group, mode.whole))
    width = _even_part(
        columns, max(_RIGHT_BYTES // (mode.elements(depth) * mode.weight.size), 1), vectors_of_tile * lanes
    )
    count = 1 if 2 * rows * columns * k < _WORK_TO_SHARE else threads.count()
    vectors = -(-width // lanes)
    by_panels = count > 1 and -(-rows // height) < min(4 * count, -(-vectors // vectors_of_tile))
    tile_stride, narrowed_stride = _of_left(left, form, mode, depth)
    together = min(rows, _ROWS)
    tiles = together if mode.unit else -(-together // height)
    left_bytes = tiles * tile_stride + together * narrowed_stride
    right_bytes = lined(mode.elements(depth) * vectors * isa.bytes)
    zero_bytes = lined(width * wide) if init is None else 0
    sums_bytes = together * _PANELS * vectors_of_tile * isa.bytes if form.rounds else 0
    sizes = BARRIER_BYTES + zero_bytes, right_bytes, left_bytes * count, sums_bytes * count
    with Scratch(*sizes) as [meeting, packed, kept_left, sums]:
        calls.clear(meeting, sizes[0])
        zeros = meeting + BARRIER_BYTES
        strides = [stride * t.element_size() for t in (left, right) for stride in t.stride()]
        out_stride = out.stride(0) * item
        for column in range(0, columns, width):
            for done in range(0, k, depth):
                target = out.data_ptr() + column * item
                source, source_stride = target, out_stride
                if not done:
                    source, source_stride = zeros, 0
                    if init is not None:
                        source, source_stride = init.data_ptr() + column * wide, init.stride(0) * wide
                words = (
                    target, out_stride, source, source_stride,
                    left.data_ptr() + done * strides[1], strides[0], strides[1],
                    right.data_ptr() + done * strides[2] + column * strides[3], strides[2], strides[3],
                    rows, min(depth, k - done), min(width, columns - column),
                    packed, kept_left, left_bytes, tile_stride, by_panels, meeting,
                    narrowed_stride, sums, sums_bytes,
                )  # fmt: skip
                calls.call(code.address, array("q", words), _POINTERS, count, 2.0 * words[10] * words[11] * words[12])


def _of_left(left: Tensor, form: _Form, mode: Numeric, depth: int) -> tuple[int, int]:
    """The bytes from tile to tile if ``left`` is packed, from row to row if it is narrowed; both 0 if it is read as is.

    As it is it must have the elements of its mode side by side, all of them whole. A matrix unit has rows for tiles.
    """
    k, size = left.shape[1], mode.elements(depth) * mode.left.size
    if left.stride(1) != 1 and k > 1:
        return lined(size * (1 if mode.unit else mode.tile[0])) + LINE, 0
    if mode.group == 1 or (mode.dot and form.operand == form.mode and k % mode.whole == 0):
        return 0, 0
    return 0, lined(size) + LINE


def _even_part(size: int, most: int, multiple: int) -> int:
    """The size of equal parts of at most about so much, a multiple of a number; all where that is enough."""
    parts = -(-size // most)
    return size if parts == 1 else -(-size // (parts * multiple)) * multiple


def _module(form: _Form, isa: Isa) -> ir.Module:
    """A module with ``multiply``, which does one block of columns and of k."""
    kind, source, mode = form.kind, _KINDS[form.operand], form.numeric(isa)
    height = mode.tile[0]
    module = ir.Module("matmul")
    body = function(module, "block", VOID, [PTR, I64, I64])
    args, thread, total = body.args
    b = ir.IRBuilder(body.append_basic_block("entry"))
    w = {name: load(b, at(b, args, 8 * i), PTR if i in _POINTERS else I64) for i, name in enumerate(_WORDS)}
    zero = I64(0)
    split = any_columns(b, isa, kind, w["columns"])
    first, last = share(b, split.count, thread, total)
    size = [w["k"], w["columns"]]
    b.call(
        pack(module, isa, kind, source=source),
        [w["packed"], w["right"], w["right_step"], w["right_stride"], first, last, *size],
    )
    b.call(barrier(module, isa), [w["meeting"], total])
    by_panels = b.icmp_signed("!=", w["by_panels"], zero)
    first, last = b.select(by_panels, first, zero), b.select(by_panels, last, split.count)
    tiles = b.udiv(b.add(w["rows"], I64(height - 1)), I64(height))
    begin, end = (b.mul(tile, I64(height)) for tile in share(b, tiles, thread, total))
    begin = b.select(by_panels, zero, begin)
    end = b.select(by_panels, w["rows"], intrinsic(b, "llvm.smin.i64", I64, [end, w["rows"]]))
    packs, narrows = (b.icmp_signed("!=", w[n], zero) for n in ("tile_stride", "narrowed_stride"))
    moved = b.or_(packs, narrows)
    room = at(b, w["scratch"], b.mul(thread, w["scratch_bytes"]))
    packed_stride = w["tile_stride"] if mode.unit else I64(mode.left.size)
    kept_stride = b.select(packs, packed_stride, b.select(narrows, w["narrowed_stride"], w["left_stride"]))
    kept_step = b.select(packs, I64((1 if mode.unit else height) * mode.left.size), I64(mode.left.size))
    with counted(b, begin, end, _ROWS, name="rows") as row:
        rows = intrinsic(b, "llvm.smin.i64", I64, [I64(_ROWS), b.sub(end, row)])
        left = at(b, w["left"], b.mul(row, w["left_stride"]))
        to_pack, to_narrow = b.select(packs, rows, zero), b.select(narrows, rows, zero)
        b.call(
            pack_left(module, isa, kind, source),
            [room, w["tile_stride"], left, w["left_stride"], w["left_step"], to_pack, w["k"]],
        )
        if mode.group > 1:
            b.call(
                narrow(module, isa, kind, source),
                [room, w["narrowed_stride"], left, w["left_stride"], to_narrow, w["k"]],
            )
        target, begun = (at(b, w[n], b.mul(row, w[f"{n}_stride"])) for n in ("out", "init"))
        factors = b.select(moved, room, left)

        def run(goal: ir.Value, stride: ir.Value, first: ir.Value, last: ir.Value) -> None:
            b.call(
                product(module, isa, kind),
                [
                    goal, stride, begun, w["init_stride"], factors, kept_stride, w["packed"], rows, first, last,
                    kept_step, w["tile_stride"], *size,
                ],
            )  # fmt: skip

        if form.rounds:
            sums, stride = at(b, w["sums"], b.mul(thread, w["sums_bytes"])), I64(_PANELS * mode.tile[1] * isa.bytes)
            with counted(b, first, last, _PANELS, name="panels") as panel:
                until = intrinsic(b, "llvm.smin.i64", I64, [b.add(panel, I64(_PANELS)), last])
                left_of, right_of = (b.mul(split.place(b, p)[0], I64(mode.lanes(isa))) for p in (panel, until))
                right_of = intrinsic(b, "llvm.smin.i64", I64, [right_of, w["columns"]])
                run(at(b, sums, b.mul(left_of, I64(-form.sums.itemsize))), stride, panel, until)
                goal = at(b, target, b.mul(left_of, I64(form.mode.itemsize)))
                b.call(
                    rows_narrowed(module, isa, kind),
                    [goal, w["out_stride"], sums, stride, rows, b.sub(right_of, left_of)],
                )
        else:
            run(target, w["out_stride"], first, last)
    b.ret_void()
    exported(body, "multiply", isa)
    return module
