"""Products of any shape: values, layouts, bounds of memory, blocks, threads, and which of a program they are."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import product as pairs
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("llvmlite")

from guard_pages import Pages
from tile_unit import AMX, machine_with_tiles, present, usable

import elman
from elman.compiler import cache, gemm
from elman.compiler.llvm import matmul, scratch
from elman.compiler.llvm.isa import ISAS, chosen, runnable
from elman.compiler.llvm.matmul import multiply
from elman.compiler.llvm.numeric import in_halves
from elman.errors import InputError, OptionError, UnsupportedError

RUNNABLE = [*([AMX.name] if usable() and not present() else []), *(isa.name for isa in runnable())]
DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16}
each_dtype = pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))

# (M, K, N): single rows and columns, tiles with a rest, more than one block of rows, of k (768) and of a panel's k.
SHAPES = (
    (1, 1, 1), (1, 5, 33), (2, 1, 3), (3, 3, 17), (7, 9, 16), (8, 16, 32), (9, 17, 31), (16, 200, 48), (17, 33, 100),
    (65, 400, 5), (193, 20, 70), (200, 7, 1), (13, 1601, 35), (400, 800, 130),
)  # fmt: skip


SLOW = 10_000_000  # multiplications, for tiles in software


@pytest.fixture(params=RUNNABLE)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("ELMAN_ISA", request.param)
    given = request.node.callspec.params
    if ISAS[request.param].dot and given.get("dtype", torch.bfloat16) != torch.bfloat16:
        pytest.skip("the code of processors without pairs")  # see the test of just that
    if request.param == AMX.name and not present() and math.prod(given.get("shape", ())) > SLOW:
        pytest.skip("too much for tiles in software")
    with machine_with_tiles() if request.param == AMX.name else nullcontext():
        yield str(request.param)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda a: a,
    "columns": lambda a: a.t().contiguous().t(),
    "wide rows": lambda a: torch.cat([a, a, a], 1)[:, a.shape[1] : 2 * a.shape[1]],
    "wide columns": lambda a: torch.cat([a, a], 0).t().contiguous().t()[a.shape[0] :],
    "spread": lambda a: a.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3],
}


def two_layouts(isa: str) -> list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    """Layouts of both operands: every one with every other, but each only once where tiles are slow."""
    every = list(LAYOUTS.values())
    if isa == AMX.name and not present():
        return list(zip(every, reversed(every), strict=True))
    return list(pairs(every, repeat=2))


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + sum(shape)))


def assert_close(out: Tensor, left: Tensor, right: Tensor, init: Tensor | None = None) -> None:
    """Within the bound for a sum in any order: Higham, Accuracy and Stability of Numerical Algorithms, section 3.1."""
    wide, tall = left.double(), right.double()
    start = torch.zeros(out.shape, dtype=torch.float64) if init is None else init.double().expand(out.shape)
    terms = start.abs() + wide.abs() @ tall.abs()
    n, exact = left.shape[1] + 1, start + wide @ tall
    bound = (1e-13 if out.dtype == torch.float64 else n * torch.finfo(torch.float32).eps / 2) * terms
    if out.dtype == torch.bfloat16:  # rounded once more
        bound = bound + (exact.abs() + bound) * torch.finfo(torch.bfloat16).eps / 2
    assert out.shape == (left.shape[0], right.shape[1])
    assert bool(((out.double() - exact).abs() <= bound).all())


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_of_all_layouts(shape: tuple[int, int, int], dtype: torch.dtype, isa: str) -> None:
    m, k, n = shape
    left, right = numbers(m, k, dtype=dtype), numbers(k, n, dtype=dtype, seed=1)
    first = multiply(left, right)
    assert first.is_contiguous()
    for lay, turn in two_layouts(isa):
        out = multiply(lay(left), turn(right))
        assert_close(out, left, right)
        assert torch.equal(out, first)


@each_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 17, 31), (13, 1601, 35), (193, 20, 70)], ids=str)
def test_what_it_is_added_to(shape: tuple[int, int, int], dtype: torch.dtype, isa: str) -> None:
    m, k, n = shape
    left, right, whole = (numbers(*s, dtype=dtype) for s in ((m, k), (k, n), (m, n)))
    inits = [whole, whole[0], whole[:1], whole[:, :1], whole[0, 0], *(lay(whole) for lay in LAYOUTS.values())]
    for init in inits:
        before = init.clone()
        assert_close(multiply(left, right, init), left, right, init)
        assert torch.equal(init, before)
        for lay in LAYOUTS.values():
            around = lay(torch.full((m, n), torch.nan, dtype=dtype))
            made = multiply(left, right, init, out=around)
            assert made.data_ptr() == around.data_ptr()
            assert made.stride() == around.stride()
            assert_close(around, left, right, init)
    for lay in LAYOUTS.values():
        place = lay(whole.clone())
        assert_close(multiply(left, right, place, out=place), left, right, whole)


@each_dtype
def test_expanded_operands(dtype: torch.dtype, isa: str) -> None:
    row, column, number = numbers(1, 40, dtype=dtype), numbers(30, 1, dtype=dtype), torch.full((), 0.3, dtype=dtype)
    for left in (row.expand(30, 40), column.expand(30, 40), number.expand(30, 40)):
        for right in (row.t().expand(40, 35), column[:1].expand(40, 35), row[:, :35].expand(40, 35)):
            assert_close(multiply(left, right), left, right)


@each_dtype
@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)], ids=str)
def test_nothing_to_sum(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, k, n = shape
    left, right, init = (numbers(*s, dtype=dtype) for s in ((m, k), (k, n), (m, n)))
    assert torch.equal(multiply(left, right), torch.zeros(m, n, dtype=dtype))
    assert torch.equal(multiply(left, right, init), init)
    out = torch.full((m, n), torch.nan, dtype=dtype)
    assert multiply(left, right, init[:1] if m else init, out) is out
    assert torch.equal(out, init[:1].expand(m, n) if m else init)


@each_dtype
def test_nothing_else_is_written(dtype: torch.dtype, isa: str) -> None:
    for m, k, n in SHAPES:
        around = torch.full((m + 2, n + 9), -7.0, dtype=dtype)
        left, right = numbers(m, k, dtype=dtype), numbers(k, n, dtype=dtype)
        assert_close(multiply(left, right, out=around[1:-1, 4:-5]), left, right)
        around[1:-1, 4:-5] = -7.0
        assert bool((around == -7.0).all())


@pytest.fixture
def walls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], Pages]]:
    """Memory between pages that nobody may touch, for operands; scratch lies in such memory too."""
    held: list[Pages] = []

    def build(at_end: bool) -> Pages:
        pages = Pages(at_end)
        held.append(pages)

        class Walled:
            def __init__(self, *sizes: int) -> None:
                self.sizes = sizes

            def __enter__(self) -> list[int]:
                return [pages.room(size, 64) for size in self.sizes]

            def __exit__(self, *failure: object) -> None:
                pass

        monkeypatch.setattr(matmul, "Scratch", Walled)
        return pages

    yield build
    for pages in held:
        pages.free()


@each_dtype
@pytest.mark.parametrize("at_end", [False, True], ids=["start", "end"])
def test_no_memory_is_touched_outside(
    dtype: torch.dtype, at_end: bool, isa: str, walls: Callable[[bool], Pages]
) -> None:
    pages = walls(at_end)
    for (m, k, n), lay in pairs(SHAPES, (LAYOUTS["rows"], LAYOUTS["columns"])):
        given = [lay(numbers(*s, dtype=dtype)) for s in ((m, k), (k, n))]
        init = numbers(m, n, dtype=dtype)
        left, right, start = (pages.like(tensor) for tensor in (*given, init))
        out, _ = pages.blank(torch.empty(m, n, dtype=dtype))
        for tensor in (left, right, start):
            pages.close(tensor.data_ptr())
        assert_close(multiply(left, right, start, out), *given, init)
        assert_close(multiply(left, right, start[0], out), *given, init[0])


@each_dtype
def test_many_blocks(dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_RIGHT_BYTES", 1 << 14)
    monkeypatch.setattr(matmul, "depth_of", lambda isa, kind: 192)
    left, right, init = (numbers(*s, dtype=dtype) for s in ((50, 700), (700, 333), (50, 333)))
    for lay, turn in two_layouts(isa):
        assert_close(multiply(lay(left), turn(right), init), left, right, init)


@each_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_where_it_belongs(dtype: torch.dtype, value: float, isa: str) -> None:
    for (m, k, n), lay in pairs(((9, 17, 31), (17, 33, 100), (13, 1601, 35)), LAYOUTS.values()):
        left, right, init = (numbers(*s, dtype=dtype) for s in ((m, k), (k, n), (m, n)))
        left[m - 1, k - 1], right[k // 2, n - 1], init[0, 0] = value, value, value
        out, exact = multiply(lay(left), lay(right), init), init + left @ right
        finite = exact.isfinite()
        assert torch.equal(out[~finite].nan_to_num(7.0, 8.0, 9.0), exact[~finite].nan_to_num(7.0, 8.0, 9.0))
        assert bool(out[finite].isfinite().all())
        assert int((~finite).sum()) == m + n


@each_dtype
@pytest.mark.parametrize("shape", [(16, 300, 2000), (9, 400, 700), (400, 800, 130), (201, 1700, 64)], ids=str)
def test_threads_share_the_work_and_change_no_bit(
    shape: tuple[int, int, int], dtype: torch.dtype, isa: str, two_threads: None
) -> None:
    m, k, n = shape
    for lay in (LAYOUTS["rows"], LAYOUTS["columns"]):
        left, right = lay(numbers(m, k, dtype=dtype)), lay(numbers(k, n, dtype=dtype))
        together = [multiply(left, right) for _ in range(5)]
        torch.set_num_threads(1)
        alone = multiply(left, right)
        torch.set_num_threads(2)
        assert_close(alone, left, right)
        assert all(torch.equal(alone, out) for out in together)


SHORT, LONG = (65, 400, 70), (50, 3201, 130)  # of k: one block, several


@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 17, 31), SHORT, LONG], ids=str)
def test_sums_of_bfloat16_are_float32(shape: tuple[int, int, int], isa: str) -> None:
    m, k, n = shape
    left, right = (numbers(*s, dtype=torch.bfloat16) for s in ((m, k), (k, n)))
    whole = numbers(m, n, dtype=torch.float32)
    for lay, turn in two_layouts(isa):
        sums = multiply(lay(left), turn(right), out_dtype=torch.float32)
        assert sums.dtype == torch.float32
        assert_close(sums, left, right)
        rounded = multiply(lay(left), turn(right))
        assert torch.equal(rounded, sums.bfloat16())
        for init in (whole, whole[0], whole[:, :1], whole.bfloat16(), whole.t().contiguous().t()):
            sums = multiply(lay(left), turn(right), init, out=lay(torch.empty(m, n)))
            assert_close(sums, left, right, init)
            rounded = multiply(lay(left), turn(right), init, out=lay(torch.empty(m, n, dtype=torch.bfloat16)))
            assert torch.equal(rounded, sums.bfloat16())


@pytest.mark.parametrize("shape", [(7, 9, 16), SHORT, (30, 3201, 40)], ids=str)
def test_sums_of_integers_are_exact(shape: tuple[int, int, int], isa: str) -> None:
    m, k, n = shape
    source = torch.Generator().manual_seed(k)
    left, right, init = (torch.randint(-32, 33, s, generator=source) for s in ((m, k), (k, n), (m, n)))
    for lay in LAYOUTS.values():
        given = lay(left.bfloat16()), right.bfloat16(), init.bfloat16()
        assert torch.equal(multiply(*given, out_dtype=torch.float32), (init + left @ right).float())
        for precision in ("highest", "high", "medium"):
            out = multiply(lay(left.float()), right.float(), init.float(), precision=precision)
            assert torch.equal(out, (init + left @ right).float())


@pytest.mark.parametrize("shape", [(1, 5, 33), (9, 17, 31), SHORT, LONG], ids=str)
def test_medium_rounds_the_operands_where_that_is_faster(shape: tuple[int, int, int], isa: str) -> None:
    m, k, n = shape
    left, right, init = (numbers(*s, dtype=torch.float32) for s in ((m, k), (k, n), (m, n)))
    found = chosen()
    assert found is not None
    for lay, turn in two_layouts(isa):
        exact = multiply(lay(left), turn(right), init)
        high = multiply(lay(left), turn(right), init, precision="high")
        assert torch.equal(high, exact) != in_halves(found)
        terms = left.double().abs() @ right.double().abs()
        assert bool(((high.double() - exact).abs() <= 2**-15 * terms + 1e-6 * (terms + init.abs())).all())
        out = multiply(lay(left), turn(right), init, precision="medium")
        assert torch.equal(out, exact) != bool(found.dot)
        if found.dot:
            own = multiply(left.bfloat16(), right.bfloat16(), init, out_dtype=torch.float32)
            assert torch.equal(out, own)
            assert_close(out, left.bfloat16(), right.bfloat16(), init)
        assert torch.equal(matmul.added(init, lay(left), turn(right), "medium"), out) or m * k * n < matmul._LITTLE


@pytest.mark.skipif(not usable(), reason="no machine code for tiles runs here")
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_halves_of_what_is_not_finite(value: float) -> None:
    """It is multiplied once: by 0 it would be NaN, and so would be one infinity with the other."""
    left, right = torch.eye(5, 40), torch.full((40, 7), 1.1)
    left[0, 0] = left[1, 39] = right[3, 2] = right[4, 0] = value
    right[0, 1], right[4, 1] = 1.0, 1.0  # without a rest
    with machine_with_tiles():
        exact = multiply(left, right)
        for lay, turn in two_layouts(AMX.name):
            found = multiply(lay(left), turn(right), precision="high")
            assert torch.equal(found.isnan(), exact.isnan())
            torch.testing.assert_close(found.nan_to_num(), exact.nan_to_num(), rtol=2**-15, atol=0)


@pytest.mark.skipif(not usable(), reason="no machine code for tiles runs here")
@pytest.mark.parametrize("intel", [True, False])
def test_products_in_halves_are_ours_on_every_processor(intel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "prefers_onednn", lambda: not intel)
    graph = torch.fx.symbolic_trace(lambda x, y: torch.ops.aten.mm.default(x, y)).graph
    (node,) = (n for n in graph.nodes if n.op == "call_function")
    with machine_with_tiles():
        for dtype in DTYPES.values():
            for operand in node.args:
                operand.meta["val"] = torch.empty(200, 200, dtype=dtype)
            ours = {p: gemm.function_of(node, True, p) is not None for p in ("highest", "high", "medium")}
            assert ours == {"highest": not intel, "high": not intel or dtype == torch.float32, "medium": not intel}


def test_float64_knows_no_other_precision() -> None:
    left, right = numbers(40, 50, dtype=torch.float64), numbers(50, 60, dtype=torch.float64)
    assert torch.equal(multiply(left, right, precision="medium"), multiply(left, right))


@pytest.mark.parametrize("at_end", [False, True], ids=["start", "end"])
def test_nothing_outside_is_touched_by_what_is_rounded(at_end: bool, isa: str, walls: Callable[[bool], Pages]) -> None:
    pages = walls(at_end)
    for (m, k, n), lay in pairs((*SHAPES, SHORT), (LAYOUTS["rows"], LAYOUTS["columns"])):
        if isa == AMX.name and m * k * n > SLOW:
            continue
        given = [lay(numbers(*s, dtype=torch.float32)) for s in ((m, k), (k, n))]
        left, right = (pages.like(tensor) for tensor in given)
        low_left, low_right = (pages.like(tensor.bfloat16()) for tensor in given)
        out, _ = pages.blank(torch.empty(m, n))
        for tensor in (left, right, low_left, low_right):
            pages.close(tensor.data_ptr())
        assert_close(multiply(low_left, low_right, out=out), low_left, low_right)
        multiply(left, right, out=out, precision="high")
        medium = multiply(left, right, out=out, precision="medium")
        assert_close(medium, *((low_left, low_right) if ISAS[isa].dot else given))


@each_dtype
def test_denormal_numbers_count_as_zero_inside_alone(dtype: torch.dtype, isa: str) -> None:
    tiny = torch.finfo(dtype).tiny
    left, right = torch.full((16, 16), tiny / 4, dtype=dtype), torch.ones(16, 16, dtype=dtype)
    assert bool((multiply(left, right) == 0).all())
    assert bool((left + left != 0).all())
    assert_close(multiply(right, right * tiny), right, right * tiny)


def test_several_threads_of_python_at_once() -> None:
    sets = [[numbers(*s, dtype=torch.float32, seed=i) for s in ((200, 900), (900, 150))] for i in range(4)]
    expected = [multiply(*operands) for operands in sets]
    right: list[bool] = []

    def work(i: int) -> None:
        right.append(all(torch.equal(multiply(*sets[i]), expected[i]) for _ in range(30)))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(sets))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert right == [True] * len(sets)


def test_scratch_is_kept_for_later_calls_within_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_free", [])
    left, right = numbers(64, 100, dtype=torch.float32), numbers(100, 64, dtype=torch.float32)
    multiply(left, right)
    (kept,) = scratch._free
    multiply(left, right)
    assert scratch._free[0] is kept
    assert len(scratch._free) == 1
    monkeypatch.setattr(scratch, "KEPT_BYTES", 1)
    multiply(left, right)
    assert scratch._free == []


def test_operands_that_do_not_fit() -> None:
    a, b = torch.zeros(3, 4), torch.zeros(4, 5)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((a, a), r"\(3, 4\) and \(3, 4\)"),
        ((a[0], b), r"\(4,\) and \(4, 5\)"),
        ((a, b.double()), "float32 on cpu, torch.float64"),
        ((a.half(), b.half()), "float16"),
        ((a, b, torch.zeros(4)), r"\(3, 5\), got \(4,\)"),
        ((a, b, torch.zeros(2, 3, 5)), r"\(3, 5\), got \(2, 3, 5\)"),
        ((a, b, None, torch.zeros(5, 3)), r"\(5, 3\)"),
        ((a, b, None, torch.zeros(3, 5, dtype=torch.float64)), "float64"),
        ((a, b, None, torch.zeros(3, 5, dtype=torch.bfloat16)), "bfloat16"),
        ((a.bfloat16(), b), "bfloat16 on cpu, torch.float32"),
        ((a.bfloat16(), b.bfloat16(), torch.zeros(5, dtype=torch.float64)), "float64"),
    ]
    for operands, message in cases:
        with pytest.raises(InputError, match=message):
            multiply(*operands)
    with pytest.raises(InputError, match=r"out_dtype=torch\.float16"):
        multiply(a, b, out_dtype=torch.float16)
    with pytest.raises(InputError, match="out_dtype"):
        multiply(a.bfloat16(), b.bfloat16(), None, torch.zeros(3, 5), out_dtype=torch.bfloat16)
    with pytest.raises(OptionError, match="'low'"):
        multiply(a, b, precision="low")  # type: ignore[arg-type]


def test_a_processor_without_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "chosen", lambda: None)
    with pytest.raises(UnsupportedError, match="processor"):
        multiply(torch.ones(2, 2), torch.ones(2, 2))


@each_dtype
def test_small_products_are_left_to_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, ...]] = []

    def spy(left: Tensor, right: Tensor, init: Tensor | None = None, **options: Any) -> Tensor:
        taken.append((*left.shape, right.shape[1]))
        return multiply(left, right, init, **options)

    monkeypatch.setattr(matmul, "multiply", spy)
    for m, k, n in ((32, 32, 32), (8, 512, 512), (4096, 4, 128), (4096, 128, 4), (128, 128, 128), (256, 128, 128)):
        left, right, bias = numbers(m, k, dtype=dtype), numbers(k, n, dtype=dtype), numbers(n, dtype=dtype)
        assert_close(matmul.product_of(left, right), left, right)
        assert_close(matmul.added(bias, left, right), left, right, bias)
    assert taken == [*[(128, 128, 128)] * 2, *[(256, 128, 128)] * 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("prefers", [True, False], ids=["onednn", "mkl"])
def test_programs_of_machine_code_use_it(dtype: torch.dtype, prefers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("product_of", "added"):
        original = getattr(matmul, name)
        monkeypatch.setattr(matmul, name, lambda *a, o=original, n=name: (calls.append(n), o(*a))[1])
    monkeypatch.setattr(gemm, "prefers_onednn", lambda: prefers)
    torch.manual_seed(0)
    cell: nn.Module = elman.LSTMCell(48, 40).to(dtype)
    xs = torch.randn(20, 16, 48, dtype=dtype, requires_grad=True)
    found = {}
    for backend in ("llvm", "reference"):
        cache.forget()
        ys, _ = elman.scan(cell, xs, backend=backend)
        found[backend] = [ys, *torch.autograd.grad(ys.sin().sum(), [xs, *cell.parameters()])]
    cache.forget()
    assert calls == (["added", *["product_of"] * 3] if prefers else [])
    for one, two in zip(found["llvm"], found["reference"], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-4)
