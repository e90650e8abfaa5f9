"""Matrix products with packed weights: values, bounds of memory, order of sums, and registers that suffice."""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache, partial
from itertools import product as pairs
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("llvmlite")

from llvmlite import ir
from tile_unit import AMX, present, tiles_in_software, usable

from elman.compiler.llvm import engine
from elman.compiler.llvm.code import BF16, F32, F64
from elman.compiler.llvm.isa import ISAS, Isa, runnable
from elman.compiler.llvm.numeric import numeric
from elman.compiler.llvm.product import (
    left_bytes,
    micro_kernel,
    narrow,
    pack,
    pack_left,
    packed_bytes,
    panels,
    product,
    rows_narrowed,
)
from elman.compiler.llvm.tiles import tile_kernel

ROWS = (0, 1, 2, 3, 5, 7, 8, 9, 16, 17, 33)
COLUMNS = (1, 15, 16, 17, 31, 48, 100, 130)
SHAPES = (*pairs((17, 513), COLUMNS), *pairs((1, 3, 100), (1, 17, 100)))
KINDS = {"f32": F32, "f64": F64, "bf16": BF16}
DTYPES: dict[str, Any] = {"f32": np.float32, "f64": np.float64, "bf16": np.float32}
POISON = -7.0e11
NO_ACCESS = 0  # PROT_NONE

RUNNABLE = (*([AMX] if usable() and not present() else []), *runnable())
WITH_PAIRS = [isa for isa in ISAS.values() if isa.dot]
# What has instructions for pairs runs the others as its lesser neighbour does: see the test of just that.
MODES = [(isa, kind) for isa, kind in pairs(RUNNABLE, KINDS) if kind == "bf16" or not isa.dot]
each_mode = pytest.mark.parametrize(("isa", "kind"), MODES, ids=[f"{isa.name}-{kind}" for isa, kind in MODES])
each_isa = pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
each_kind = pytest.mark.parametrize("kind", list(KINDS))

_I64, _P = ctypes.c_int64, ctypes.c_void_p
_PRODUCT = ctypes.CFUNCTYPE(None, _P, _I64, _P, _I64, _P, _I64, _P, _I64, _I64, _I64)
_PACK = ctypes.CFUNCTYPE(None, _P, _P, _I64, _I64, _I64, _I64)
_ROWS = ctypes.CFUNCTYPE(None, _P, _I64, _P, _I64, _I64, _I64)
_LEFT = ctypes.CFUNCTYPE(None, _P, _I64, _P, _I64, _I64, _I64, _I64)


@pytest.fixture(autouse=True, scope="module")
def _tiles() -> Iterator[None]:
    with tiles_in_software() if usable() else nullcontext():
        yield


@cache
def library(isa: Isa, kind: str) -> tuple[engine.Library, dict[tuple[Any, ...], str]]:
    """All shapes in one module: they share the micro-kernels. With the names of its functions, by what they are for."""
    module = ir.Module("products")
    made: dict[tuple[Any, ...], ir.Function] = {}
    sources = {"stored": BF16, "float": F32} if kind == "bf16" else {"float": KINDS[kind]}
    for k, columns in SHAPES:
        made["product", k, columns] = product(module, isa, KINDS[kind], k, columns)
        for name, source in sources.items():
            made["pack", name, k, columns] = pack(module, isa, KINDS[kind], k, columns, source)
    if kind == "bf16":
        made["rounded",] = rows_narrowed(module, isa, BF16)
        for name, source in sources.items():
            made["narrow", name] = narrow(module, isa, BF16, source)
            made["left", name] = pack_left(module, isa, BF16, source)
    for function in made.values():
        function.linkage = "external"
    return engine.load(module, isa), {key: function.name for key, function in made.items()}


def entry(isa: Isa, kind: str, prototype: Any, *key: Any) -> Any:
    code, names = library(isa, kind)
    return prototype(code.address(names[key]))


class Case:
    """A weight, packed, and the function that multiplies by it."""

    def __init__(self, isa: Isa, kind: str, weight: np.ndarray) -> None:
        k, columns = weight.shape
        source = "stored" if weight.dtype == np.uint16 else "float"
        self.isa, self.kind, self.room = isa, kind, np.copy
        self.multiply = entry(isa, kind, _PRODUCT, "product", k, columns)
        self.layout = entry(isa, kind, _PACK, "pack", source, k, columns)
        self.weight = weight
        self.panels = panels(columns, isa, KINDS[kind])
        self.lanes = isa.lanes(64 if kind == "f64" else 32)
        self.bytes = packed_bytes(k, columns, isa, KINDS[kind])
        self.kept = np.full(self.bytes + 128, 255, np.uint8)  # NaN, were it read before it is written
        self.packed = -(-self.kept.ctypes.data // 64) * 64
        self.layout(self.packed, weight.ctypes.data, *weight.strides, 0, len(self.panels))

    def run(self, out: np.ndarray, init: np.ndarray, left: np.ndarray, only: range | None = None) -> np.ndarray:
        only = range(len(self.panels)) if only is None else only
        left = narrowed(self.isa, left, self.room) if self.kind == "bf16" else left
        operands = [(a.ctypes.data, a.strides[0]) for a in (out, init, left)]
        flat = [number for operand in operands for number in operand]
        self.multiply(*flat, self.packed, len(left), only.start, only.stop)
        return out

    def columns(self, panel: int) -> slice:
        start = sum(self.panels[:panel]) * self.lanes
        return slice(start, min(start + self.panels[panel] * self.lanes, self.weight.shape[1]))


def numbers(kind: str, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(DTYPES[kind])


def narrowed(isa: Isa, left: np.ndarray, room: Callable[[np.ndarray], np.ndarray] = np.copy) -> np.ndarray:
    """Rows as a product of bfloat16 reads them, so many bytes each."""
    size = left_bytes(left.shape[1], isa, BF16)
    out = room(np.full((len(left), size), 255, np.uint8))
    convert = entry(isa, "bf16", _ROWS, "narrow", "stored" if left.dtype == np.uint16 else "float")
    convert(out.ctypes.data, size, left.ctypes.data, left.strides[0], *left.shape)
    return out


def stored(array: np.ndarray) -> np.ndarray:
    """The same numbers as bfloat16, by their bits."""
    return torch.from_numpy(np.ascontiguousarray(array)).bfloat16().view(torch.uint16).numpy()


def meaning(array: np.ndarray) -> np.ndarray:
    """What such bits stand for."""
    return (array.astype(np.uint32) << 16).view(np.float32)


def operand(kind: str, array: np.ndarray) -> np.ndarray:
    """What a product of that kind takes a number for."""
    return meaning(stored(array)) if kind == "bf16" else array


def assert_close(kind: str, out: np.ndarray, init: np.ndarray, left: np.ndarray, weight: np.ndarray) -> None:
    """Within the bound for a sum in any order: Higham, Accuracy and Stability of Numerical Algorithms, section 3.1."""
    wide = [a.astype(np.float64) for a in (init, operand(kind, left), operand(kind, weight))]
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


@each_mode
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_values(isa: Isa, kind: str, layout: str) -> None:
    for k, columns in SHAPES:
        weight = LAYOUTS[layout](numbers(kind, k, columns))
        case = Case(isa, kind, weight)
        for rows in ROWS:
            left, init = numbers(kind, rows, k, seed=1), numbers(kind, rows, columns, seed=2)
            out = case.run(np.full_like(init, np.nan), init, left)
            assert_close(kind, out, init, left, weight)


@each_mode
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


@each_mode
def test_rows_apart_a_shared_init_and_nothing_else_written(isa: Isa, kind: str) -> None:
    for (k, columns), rows in pairs(((17, 31), (100, 17), (513, 130), (3, 1)), ROWS):
        case = Case(isa, kind, numbers(kind, k, columns))
        left = numbers(kind, rows + 2, k + 5, seed=1)[1:-1, 2:-3]
        bias = np.broadcast_to(numbers(kind, columns, seed=2), (max(rows, 1), columns))
        assert bias.strides[0] == 0
        around = np.full((rows + 2, columns + 9), POISON, DTYPES[kind])
        out = case.run(around[1:-1, 4:-5], bias, left)
        assert_close(kind, out, bias[:rows], left, case.weight)
        around[1:-1, 4:-5] = POISON
        assert np.all(around == DTYPES[kind](POISON))


@each_mode
def test_in_place_is_the_same_as_beside(isa: Isa, kind: str) -> None:
    for (k, columns), rows in pairs(SHAPES, (1, 3, 9, 33)):
        case = Case(isa, kind, numbers(kind, k, columns))
        left, init = numbers(kind, rows, k, seed=1), numbers(kind, rows, columns, seed=2)
        beside = case.run(np.empty_like(init), init, left)
        assert np.array_equal(case.run(init, init, left), beside)


@each_mode
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


@each_mode
def test_a_weight_packed_panel_by_panel(isa: Isa, kind: str) -> None:
    for k, columns in ((17, 100), (513, 130)):
        for lay in LAYOUTS.values():
            case = Case(isa, kind, lay(numbers(kind, k, columns)))
            whole = ctypes.string_at(case.packed, case.bytes)
            ctypes.memset(case.packed, 255, case.bytes)
            for panel in range(len(case.panels)):
                case.layout(case.packed, case.weight.ctypes.data, *case.weight.strides, panel, panel + 1)
                done = numeric(isa, KINDS[kind]).elements(k) * isa.bytes * sum(case.panels[: panel + 1])
                assert ctypes.string_at(case.packed, case.bytes) == whole[:done] + b"\xff" * (case.bytes - done)


@each_mode
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_where_it_belongs(isa: Isa, kind: str, value: float) -> None:
    for (k, columns), rows in pairs(((17, 31), (100, 17), (513, 130)), (1, 3, 8, 9)):
        weight, left, init = numbers(kind, k, columns), numbers(kind, rows, k, seed=1), numbers(kind, rows, columns)
        weight[k // 2, columns - 1], left[rows - 1, k - 1], init[0, 0] = value, value, value
        out = Case(isa, kind, weight).run(np.empty_like(init), init, left)
        with np.errstate(invalid="ignore"):
            exact = init + operand(kind, left) @ operand(kind, weight)
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


@each_mode
@pytest.mark.parametrize("end", [False, True], ids=["start", "end"])
def test_no_memory_is_touched_outside(isa: Isa, kind: str, end: bool, walled: Any) -> None:
    for (k, columns), rows in pairs(((1, 1), (17, 31), (3, 17), (100, 100), (513, 130)), (1, 3, 9)):
        weight, left = numbers(kind, k, columns), numbers(kind, rows, k, seed=1)
        init = walled(numbers(kind, rows, columns, seed=2), end)
        out = walled(np.zeros_like(init), end)
        for taken, turned in pairs((operand, lambda _, a: stored(a)) if kind == "bf16" else (operand,), (False, True)):
            own = taken(kind, weight)
            layout = walled(np.ascontiguousarray(own.T), end).T if turned else walled(own, end)
            case = Case(isa, kind, layout)
            case.room = partial(walled, end=end)
            packed = walled(np.zeros(case.bytes, np.uint8), end)
            case.packed = packed.ctypes.data
            case.layout(case.packed, layout.ctypes.data, *layout.strides, 0, len(case.panels))
            assert_close(kind, case.run(out, init, walled(taken(kind, left), end)), init, left, weight)


@each_mode
def test_sums_of_integers_are_exact(isa: Isa, kind: str) -> None:
    for (k, columns), rows in pairs(((17, 31), (100, 17), (513, 130), (3, 1)), ROWS):
        whole = np.random.default_rng(k)
        weight, left, init = (
            whole.integers(-64, 65, shape).astype(DTYPES[kind]) for shape in ((k, columns), (rows, k), (rows, columns))
        )
        out = Case(isa, kind, weight).run(np.empty_like(init), init, left)
        assert np.array_equal(out, init + left @ weight)


@each_isa
def test_rounding_is_to_nearest_even_and_keeps_what_is_not_finite(isa: Isa) -> None:
    lows = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    every = np.add.outer(np.arange(1 << 16, dtype=np.uint32) << 16, lows).reshape(-1, 2048 * 3).view(np.float32)
    for width in (every.shape[1], 37):
        given = every[:, :width]
        left = narrowed(isa, given)
        size = left_bytes(2, isa, BF16) // numeric(isa, BF16).elements(2) // 2
        found = left.view(np.uint16 if size == 2 else np.float32)
        found = meaning(found) if size == 2 else found
        expected = operand("bf16", given).copy()
        expected[np.abs(given) < np.finfo(np.float32).tiny] = 0  # of numbers that are denormal only the sign is left
        assert np.array_equal(found[:, :width], expected, equal_nan=True)
        assert np.array_equal(np.signbit(found[:, :width]), np.signbit(given))
        assert np.all(found[:, width:] == 0)


@each_isa
def test_bfloat16_in_memory_is_taken_as_it_is(isa: Isa) -> None:
    for (k, columns), lay in pairs(SHAPES, LAYOUTS.values()):
        weight, left = lay(numbers("bf16", k, columns)), numbers("bf16", 7, k, seed=1)
        case, own = Case(isa, "bf16", weight), Case(isa, "bf16", lay(stored(weight)))
        assert ctypes.string_at(case.packed, case.bytes) == ctypes.string_at(own.packed, own.bytes)
        assert np.array_equal(narrowed(isa, left), narrowed(isa, stored(left)))
        if isa.dot and k % numeric(isa, BF16).whole == 0:  # then it can be read where it lies
            assert np.array_equal(narrowed(isa, left).view(np.uint16), stored(left))


@each_isa
def test_a_row_is_the_same_with_any_others(isa: Isa) -> None:
    for k, columns in ((17, 31), (100, 17), (513, 130), (3, 1)):
        case = Case(isa, "bf16", numbers("bf16", k, columns))
        left, init = numbers("bf16", 33, k, seed=1), numbers("bf16", 33, columns, seed=2)
        together = case.run(np.empty_like(init), init, left)
        for share in (1, 2, 4, 5, 7, 16, 32):
            apart = np.empty_like(init)
            for i in range(0, 33, share):
                case.run(apart[i : i + share], init[i : i + share], left[i : i + share])
            assert np.array_equal(apart, together)


@each_isa
@pytest.mark.parametrize("source", ["stored", "float"])
def test_tiles_hold_the_elements_of_their_rows_side_by_side(isa: Isa, source: str) -> None:
    height = isa.pair_tile[0]
    for rows, k, lay in pairs((1, 5, 6, 8, 51), (1, 2, 17, 100), LAYOUTS.values()):
        left = numbers("bf16", rows, k, seed=1)
        left = lay(stored(left) if source == "stored" else left)
        expected = narrowed(isa, np.ascontiguousarray(left))
        elements = numeric(isa, BF16).elements(k)
        if numeric(isa, BF16).unit:  # which takes rows as they are
            height = 1
        expected = expected.reshape(rows, elements, -1)
        stride = elements * height * expected.shape[2] + 64
        tiles = np.full((-(-rows // height), stride), 255, np.uint8)
        convert = entry(isa, "bf16", _LEFT, "left", source)
        convert(tiles.ctypes.data, stride, left.ctypes.data, *left.strides, *left.shape)
        found = tiles[:, :-64].reshape(len(tiles), elements, height, -1).swapaxes(1, 2).reshape(-1, *expected.shape[1:])
        assert np.array_equal(found[:rows], expected)
        assert np.all(tiles[:, -64:] == 255)


@each_isa
def test_sums_become_rows_of_bfloat16_and_nothing_else(isa: Isa) -> None:
    convert = entry(isa, "bf16", _ROWS, "rounded")
    for rows, columns in pairs((0, 1, 3), (1, 2, 15, 16, 17, 33, 100)):
        sums = numbers("f32", rows + 1, columns + 3)[:rows, 1:-2]
        around = np.full((rows + 2, columns + 9), 0x7FC1, np.uint16)
        out = around[1:-1, 4:-5]
        convert(out.ctypes.data, out.strides[0], sums.ctypes.data, sums.strides[0], rows, columns)
        assert np.array_equal(out, stored(sums))
        out[...] = 0x7FC1
        assert np.all(around == 0x7FC1)


@pytest.mark.parametrize("isa", WITH_PAIRS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_other_numbers_have_the_same_code_with_and_without_pairs(isa: Isa, kind: str) -> None:
    lesser = next(other for other in ISAS.values() if other.bytes == isa.bytes and not other.dot)
    module = ir.Module("plain")
    for make in (product, pack):
        make(module, isa, KINDS[kind], 17, 31).linkage = "external"
    assert engine.assembly(module, isa) == engine.assembly(module, lesser)


@pytest.mark.parametrize("isa", list(ISAS.values()), ids=lambda isa: isa.name)
@each_kind
def test_panels_cover_the_columns(isa: Isa, kind: str) -> None:
    lanes, widest = isa.lanes(64 if kind == "f64" else 32), (isa.pair_tile if kind == "bf16" else isa.tile)[1]
    for columns in range(1, 200):
        widths = panels(columns, isa, KINDS[kind])
        assert widths == sorted(widths, reverse=True)
        assert 1 <= widths[-1] <= widths[0] <= min(widths[-1] + 1, widest)
        assert (sum(widths) - 1) * lanes < columns <= sum(widths) * lanes
        elements = 7 if kind != "bf16" else 16 if isa == AMX else 4
        assert packed_bytes(7, columns, isa, KINDS[kind]) == elements * sum(widths) * isa.bytes


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
    return touching(module, isa)


def touching(module: ir.Module, isa: Isa) -> set[str]:
    """The functions of a module whose loops touch the stack. All of them must have a loop that multiplies."""
    found = loops(engine.assembly(module, isa))
    names = {function.name for function in module.functions if function.blocks}
    multiplies = re.compile(r"\b(vfn?madd\w+|mulp[sd]|fmla|vdpbf16ps|tdpbf16ps)\b")
    assert {name for name, inner in found.items() if any(multiplies.search(x) for l in inner for x in l)} == names
    stack = re.compile(r"\(%rsp\b|\[sp\b")
    return {name for name, inner in found.items() if any(stack.search(x) for l in inner for x in l)}


@pytest.mark.parametrize("isa", list(ISAS.values()), ids=lambda isa: isa.name)
@each_kind
def test_the_sums_of_a_tile_stay_in_registers(isa: Isa, kind: str) -> None:
    if (mode := numeric(isa, KINDS[kind])).unit:
        module = ir.Module("unit")
        for high, vectors in pairs((False, True), range(1, mode.tile[1] + 1)):
            tile_kernel(module, isa, mode, high, vectors).linkage = "external"
        assert touching(module, isa) == set()
        return
    highest, widest = mode.tile
    shapes = list(pairs(range(1, highest + 1), range(1, widest + 1), (0, 1)))
    assert on_stack(isa, kind, shapes) == set()
    beyond = (isa.registers // 4 + 1, 4, 0)
    assert on_stack(isa, kind, [(1, 1, 0), beyond]) == {f"tile.{kind}.{beyond[0]}x{beyond[1]}"}
