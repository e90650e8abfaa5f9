"""Matrix products with packed weights: values, bounds of memory, order of sums, and registers that suffice."""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Iterator
from functools import cache
from itertools import product as pairs
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llvmlite")

from llvmlite import ir

from elman.compiler.llvm import engine
from elman.compiler.llvm.code import F32, F64
from elman.compiler.llvm.isa import ISAS, Isa, host
from elman.compiler.llvm.product import micro_kernel, pack, packed_bytes, panels, product

ROWS = (0, 1, 2, 3, 5, 7, 8, 9, 16, 17, 33)
COLUMNS = (1, 15, 16, 17, 31, 48, 100, 130)
SHAPES = (*pairs((17, 513), COLUMNS), *pairs((1, 3, 100), (1, 17, 100)))
KINDS = {"f32": F32, "f64": F64}
DTYPES: dict[str, Any] = {"f32": np.float32, "f64": np.float64}
POISON = -7.0e11
NO_ACCESS = 0  # PROT_NONE

_here = host()
RUNNABLE = [i for i in ISAS.values() if _here and i.triple == _here.triple and i.bytes <= _here.bytes]
each_isa = pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
each_kind = pytest.mark.parametrize("kind", list(KINDS))

_I64, _P = ctypes.c_int64, ctypes.c_void_p
_PRODUCT = ctypes.CFUNCTYPE(None, _P, _I64, _P, _I64, _P, _I64, _P, _I64, _I64, _I64)
_PACK = ctypes.CFUNCTYPE(None, _P, _P, _I64, _I64, _I64, _I64)


@cache
def library(isa: Isa, kind: str) -> engine.Library:
    """All shapes in one module: they share the micro-kernels."""
    module = ir.Module("products")
    for k, columns in SHAPES:
        for make in (product, pack):
            make(module, isa, KINDS[kind], k, columns).linkage = "external"
    return engine.load(module, isa)


class Case:
    """A weight, packed, and the function that multiplies by it."""

    def __init__(self, isa: Isa, kind: str, weight: np.ndarray) -> None:
        k, columns = weight.shape
        code = library(isa, kind)
        self.multiply = _PRODUCT(code.address(f"product.{kind}.{k}x{columns}"))
        self.layout = _PACK(code.address(f"pack.{kind}.{k}x{columns}"))
        self.weight = weight
        self.panels = panels(columns, isa, KINDS[kind])
        self.lanes = isa.lanes(8 * weight.itemsize)
        self.bytes = packed_bytes(k, columns, isa, KINDS[kind])
        self.kept = np.full(self.bytes + 128, 255, np.uint8)  # NaN, were it read before it is written
        self.packed = -(-self.kept.ctypes.data // 64) * 64
        self.layout(self.packed, weight.ctypes.data, *weight.strides, 0, len(self.panels))

    def run(self, out: np.ndarray, init: np.ndarray, left: np.ndarray, only: range | None = None) -> np.ndarray:
        only = range(len(self.panels)) if only is None else only
        operands = [(a.ctypes.data, a.strides[0]) for a in (out, init, left)]
        flat = [number for operand in operands for number in operand]
        self.multiply(*flat, self.packed, len(left), only.start, only.stop)
        return out

    def columns(self, panel: int) -> slice:
        start = sum(self.panels[:panel]) * self.lanes
        return slice(start, min(start + self.panels[panel] * self.lanes, self.weight.shape[1]))


def numbers(kind: str, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(DTYPES[kind])


def assert_close(out: np.ndarray, init: np.ndarray, left: np.ndarray, weight: np.ndarray) -> None:
    """Within the bound for a sum in any order: Higham, Accuracy and Stability of Numerical Algorithms, section 3.1."""
    wide = [a.astype(np.float64) for a in (init, left, weight)]
    exact = wide[0] + wide[1] @ wide[2]
    terms = np.abs(wide[0]) + np.abs(wide[1]) @ np.abs(wide[2])
    n = weight.shape[0] + 1
    unit = float(np.finfo(out.dtype).eps) / 2
    bound = n * unit / (1 - n * unit) if out.dtype == np.float32 else 1e-12
    assert np.all(np.abs(out - exact) <= bound * terms)


LAYOUTS = {
    "rows": lambda w: np.ascontiguousarray(w),
    "columns": lambda w: np.asfortranarray(w),
    "spread": lambda w: np.repeat(np.repeat(w, 2, 0), 3, 1)[::2, ::3],
    "reversed": lambda w: np.ascontiguousarray(w[::-1, ::-1])[::-1, ::-1],
}


@each_isa
@each_kind
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_values(isa: Isa, kind: str, layout: str) -> None:
    for k, columns in SHAPES:
        weight = LAYOUTS[layout](numbers(kind, k, columns))
        case = Case(isa, kind, weight)
        for rows in ROWS:
            left, init = numbers(kind, rows, k, seed=1), numbers(kind, rows, columns, seed=2)
            out = case.run(np.full_like(init, np.nan), init, left)
            assert_close(out, init, left, weight)


@each_isa
@each_kind
def test_a_weight_is_packed_alike_from_every_layout(isa: Isa, kind: str) -> None:
    for k, columns in SHAPES:
        weight = numbers(kind, k, columns)
        cases = [Case(isa, kind, lay(weight)) for lay in LAYOUTS.values()]
        packed = {ctypes.string_at(case.packed, case.bytes) for case in cases}
        assert len(packed) == 1
        for case in cases:
            after = case.kept[case.packed + case.bytes - case.kept.ctypes.data :]
            assert after.size
            assert np.all(after == 255)


@each_isa
@each_kind
def test_rows_apart_a_shared_init_and_nothing_else_written(isa: Isa, kind: str) -> None:
    for (k, columns), rows in pairs(((17, 31), (100, 17), (513, 130), (3, 1)), ROWS):
        case = Case(isa, kind, numbers(kind, k, columns))
        left = numbers(kind, rows + 2, k + 5, seed=1)[1:-1, 2:-3]
        bias = np.broadcast_to(numbers(kind, columns, seed=2), (max(rows, 1), columns))
        assert bias.strides[0] == 0
        around = np.full((rows + 2, columns + 9), POISON, DTYPES[kind])
        out = case.run(around[1:-1, 4:-5], bias, left)
        assert_close(out, bias[:rows], left, case.weight)
        around[1:-1, 4:-5] = POISON
        assert np.all(around == DTYPES[kind](POISON))


@each_isa
@each_kind
def test_in_place_is_the_same_as_beside(isa: Isa, kind: str) -> None:
    for (k, columns), rows in pairs(SHAPES, (1, 3, 9, 33)):
        case = Case(isa, kind, numbers(kind, k, columns))
        left, init = numbers(kind, rows, k, seed=1), numbers(kind, rows, columns, seed=2)
        beside = case.run(np.empty_like(init), init, left)
        assert np.array_equal(case.run(init, init, left), beside)


@each_isa
@each_kind
def test_panels_one_by_one_are_the_same_as_together(isa: Isa, kind: str) -> None:
    for (k, columns), rows in pairs(((17, 100), (513, 130)), (1, 2, 7, 17)):
        case = Case(isa, kind, numbers(kind, k, columns))
        left, init = numbers(kind, rows, k, seed=1), numbers(kind, rows, columns, seed=2)
        together = case.run(np.empty_like(init), init, left)
        apart = np.full_like(init, POISON)
        for panel in reversed(range(len(case.panels))):
            before = apart.copy()
            case.run(apart, init, left, range(panel, panel + 1))
            before[:, case.columns(panel)] = together[:, case.columns(panel)]
            assert np.array_equal(apart, before)
        assert np.array_equal(apart, together)
        assert np.array_equal(case.run(apart.copy(), init, left, range(1, 1)), apart)


@each_isa
@each_kind
def test_a_weight_packed_panel_by_panel(isa: Isa, kind: str) -> None:
    for k, columns in ((17, 100), (513, 130)):
        for lay in LAYOUTS.values():
            case = Case(isa, kind, lay(numbers(kind, k, columns)))
            whole = ctypes.string_at(case.packed, case.bytes)
            ctypes.memset(case.packed, 255, case.bytes)
            for panel in range(len(case.panels)):
                case.layout(case.packed, case.weight.ctypes.data, *case.weight.strides, panel, panel + 1)
                done = k * isa.bytes * sum(case.panels[: panel + 1])
                assert ctypes.string_at(case.packed, case.bytes) == whole[:done] + b"\xff" * (case.bytes - done)


@each_isa
@each_kind
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_where_it_belongs(isa: Isa, kind: str, value: float) -> None:
    for (k, columns), rows in pairs(((17, 31), (100, 17), (513, 130)), (1, 3, 8, 9)):
        weight, left, init = numbers(kind, k, columns), numbers(kind, rows, k, seed=1), numbers(kind, rows, columns)
        weight[k // 2, columns - 1], left[rows - 1, k - 1], init[0, 0] = value, value, value
        out = Case(isa, kind, weight).run(np.empty_like(init), init, left)
        with np.errstate(invalid="ignore"):
            exact = init + left @ weight
        finite = np.isfinite(exact)
        assert np.array_equal(out[~finite], exact[~finite], equal_nan=True)
        assert np.all(np.isfinite(out[finite]))
        assert (~finite).sum() == rows + columns - 1 + (rows > 1 and columns > 1)


@pytest.fixture
def walled() -> Iterator[Any]:
    """Arrays at the end or at the start of the memory that may be touched: one byte further ends the process."""
    held: list[tuple[mmap.mmap, Any]] = []
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [_P, ctypes.c_size_t, ctypes.c_int]
    page = mmap.PAGESIZE

    def make(array: np.ndarray, end: bool) -> np.ndarray:
        middle = max(-(-array.nbytes // page) * page, page)
        memory = mmap.mmap(-1, middle + 2 * page)
        view = (ctypes.c_char * len(memory)).from_buffer(memory)
        start = ctypes.addressof(view)
        held.append((memory, view))
        for wall in (start, start + page + middle):
            assert protect(wall, page, NO_ACCESS) == 0
        offset = page + (middle - array.nbytes if end else 0)
        copy = np.frombuffer(view, array.dtype, array.size, offset).reshape(array.shape)
        copy[...] = array
        return copy

    yield make
    for memory, view in held:
        assert protect(ctypes.addressof(view), len(memory), mmap.PROT_READ | mmap.PROT_WRITE) == 0


@each_isa
@each_kind
@pytest.mark.parametrize("end", [False, True], ids=["start", "end"])
def test_no_memory_is_touched_outside(isa: Isa, kind: str, end: bool, walled: Any) -> None:
    for (k, columns), rows in pairs(((1, 1), (17, 31), (3, 17), (100, 100), (513, 130)), (1, 3, 9)):
        weight = walled(numbers(kind, k, columns), end)
        turned = walled(np.ascontiguousarray(weight.T), end).T
        left, init = walled(numbers(kind, rows, k, seed=1), end), walled(numbers(kind, rows, columns, seed=2), end)
        out = walled(np.zeros_like(init), end)
        for layout in (weight, turned):
            case = Case(isa, kind, layout)
            packed = walled(np.zeros(case.bytes, np.uint8), end)
            case.packed = packed.ctypes.data
            case.layout(case.packed, layout.ctypes.data, *layout.strides, 0, len(case.panels))
            assert_close(case.run(out, init, left), init, left, weight)


@pytest.mark.parametrize("isa", list(ISAS.values()), ids=lambda isa: isa.name)
@each_kind
def test_panels_cover_the_columns(isa: Isa, kind: str) -> None:
    lanes = isa.lanes(32 if kind == "f32" else 64)
    for columns in range(1, 200):
        widths = panels(columns, isa, KINDS[kind])
        assert widths == sorted(widths, reverse=True)
        assert 1 <= widths[-1] <= widths[0] <= min(widths[-1] + 1, isa.tile[1])
        assert (sum(widths) - 1) * lanes < columns <= sum(widths) * lanes
        assert packed_bytes(7, columns, isa, KINDS[kind]) == 7 * sum(widths) * isa.bytes


def loops(assembly: str) -> dict[str, list[list[str]]]:
    """The lines from every label to a jump back to it, by function."""
    found: dict[str, list[list[str]]] = {}
    labels: dict[str, int] = {}
    lines = assembly.splitlines()
    name = ""
    for i, line in enumerate(lines):
        words = line.split()
        if not words:
            continue
        if words[0].endswith(":"):
            labels[words[0][:-1]] = i
            name = name if words[0].startswith(".") else words[0][:-1].strip('"')
            continue
        jump = words[0].startswith(("j", "b.", "cb", "tb")) or words[0] == "b"
        if jump and words[-1] in labels:
            found.setdefault(name, []).append(lines[labels[words[-1]] : i + 1])
    return found


def on_stack(isa: Isa, kind: str, shapes: list[tuple[int, int, int]]) -> set[str]:
    """The micro-kernels whose loops over k touch the stack. All of them must have such a loop."""
    module = ir.Module("tiles")
    for shape in shapes:
        micro_kernel(module, isa, KINDS[kind], *shape).linkage = "external"
    found = loops(engine.assembly(module, isa))
    names = {function.name for function in module.functions if function.blocks}
    multiplies = re.compile(r"\b(vfn?madd\w+|mulp[sd]|fmla)\b")
    assert {name for name, inner in found.items() if any(multiplies.search(x) for l in inner for x in l)} == names
    stack = re.compile(r"\(%rsp\b|\[sp\b")
    return {name for name, inner in found.items() if any(stack.search(x) for l in inner for x in l)}


@pytest.mark.parametrize("isa", list(ISAS.values()), ids=lambda isa: isa.name)
@each_kind
def test_the_sums_of_a_tile_stay_in_registers(isa: Isa, kind: str) -> None:
    highest, widest = isa.tile
    shapes = list(pairs(range(1, highest + 1), range(1, widest + 1), (0, 1)))
    assert on_stack(isa, kind, shapes) == set()
    beyond = (isa.registers // 4 + 1, 4, 0)
    assert on_stack(isa, kind, [(1, 1, 0), beyond]) == {f"tile.{kind}.{beyond[0]}x{beyond[1]}"}
