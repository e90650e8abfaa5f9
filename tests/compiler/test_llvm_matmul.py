"""Products of any shape: values, layouts, bounds of memory, blocks, threads, and which of a program they are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import product as pairs
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("llvmlite")

from guard_pages import Pages

import elman
from elman.compiler import cache, gemm
from elman.compiler.llvm import matmul
from elman.compiler.llvm.isa import ISAS, host
from elman.compiler.llvm.matmul import multiply
from elman.errors import InputError, UnsupportedError

_here = host()
RUNNABLE = [i.name for i in ISAS.values() if _here and i.triple == _here.triple and i.bytes <= _here.bytes]
DTYPES = (torch.float32, torch.float64)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64"])

# (M, K, N): single rows and columns, tiles with a rest, more than one block of rows, of k (768) and of a panel's k.
SHAPES = (
    (1, 1, 1), (1, 5, 33), (2, 1, 3), (3, 3, 17), (7, 9, 16), (8, 16, 32), (9, 17, 31), (16, 200, 48), (17, 33, 100),
    (65, 400, 5), (193, 20, 70), (200, 7, 1), (13, 1601, 35), (400, 800, 130),
)  # fmt: skip


@pytest.fixture(params=RUNNABLE)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ELMAN_ISA", request.param)
    return str(request.param)


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


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + sum(shape)))


def assert_close(out: Tensor, left: Tensor, right: Tensor, init: Tensor | None = None) -> None:
    """Within the bound for a sum in any order: Higham, Accuracy and Stability of Numerical Algorithms, section 3.1."""
    wide, tall = left.double(), right.double()
    start = torch.zeros(out.shape, dtype=torch.float64) if init is None else init.double().expand(out.shape)
    terms = start.abs() + wide.abs() @ tall.abs()
    n = left.shape[1] + 1
    bound = n * torch.finfo(torch.float32).eps / 2 if out.dtype == torch.float32 else 1e-13
    assert out.shape == (left.shape[0], right.shape[1])
    assert bool(((out.double() - (start + wide @ tall)).abs() <= bound * terms).all())


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_of_all_layouts(shape: tuple[int, int, int], dtype: torch.dtype, isa: str) -> None:
    m, k, n = shape
    left, right = numbers(m, k, dtype=dtype), numbers(k, n, dtype=dtype, seed=1)
    first = multiply(left, right)
    assert first.is_contiguous()
    for lay, turn in pairs(LAYOUTS.values(), repeat=2):
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


@each_dtype
@pytest.mark.parametrize("at_end", [False, True], ids=["start", "end"])
def test_no_memory_is_touched_outside(
    dtype: torch.dtype, at_end: bool, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = Pages(at_end)

    class Walled:
        def __init__(self, size: int) -> None:
            self.size = size

        def __enter__(self) -> list[int]:
            return [pages.room(self.size, 64)]

        def __exit__(self, *failure: object) -> None:
            pass

    monkeypatch.setattr(matmul, "Scratch", Walled)
    try:
        for (m, k, n), lay in pairs(SHAPES, (LAYOUTS["rows"], LAYOUTS["columns"])):
            given = [lay(numbers(*s, dtype=dtype)) for s in ((m, k), (k, n))]
            init = numbers(m, n, dtype=dtype)
            left, right, start = (pages.like(tensor) for tensor in (*given, init))
            out, _ = pages.blank(torch.empty(m, n, dtype=dtype))
            for tensor in (left, right, start):
                pages.close(tensor.data_ptr())
            assert_close(multiply(left, right, start, out), *given, init)
            assert_close(multiply(left, right, start[0], out), *given, init[0])
    finally:
        pages.free()


@each_dtype
def test_many_blocks(dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_RIGHT_BYTES", 1 << 14)
    monkeypatch.setattr(matmul, "_DEPTHS", 1)
    left, right, init = (numbers(*s, dtype=dtype) for s in ((50, 700), (700, 333), (50, 333)))
    for lay, turn in pairs(LAYOUTS.values(), repeat=2):
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
    monkeypatch.setattr(matmul, "_free", [])
    left, right = numbers(64, 100, dtype=torch.float32), numbers(100, 64, dtype=torch.float32)
    multiply(left, right)
    (kept,) = matmul._free
    multiply(left, right)
    assert matmul._free[0] is kept
    assert len(matmul._free) == 1
    monkeypatch.setattr(matmul, "_KEPT_BYTES", 1)
    multiply(left, right)
    assert matmul._free == []


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
    ]
    for operands, message in cases:
        with pytest.raises(InputError, match=message):
            multiply(*operands)


def test_a_processor_without_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "chosen", lambda: None)
    with pytest.raises(UnsupportedError, match="processor"):
        multiply(torch.ones(2, 2), torch.ones(2, 2))


@each_dtype
def test_small_products_are_left_to_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, ...]] = []

    def spy(left: Tensor, right: Tensor, init: Tensor | None = None) -> Tensor:
        taken.append((*left.shape, right.shape[1]))
        return multiply(left, right, init)

    monkeypatch.setattr(matmul, "multiply", spy)
    for m, k, n in ((32, 32, 32), (8, 512, 512), (4096, 4, 128), (4096, 128, 4), (128, 128, 128)):
        left, right, bias = numbers(m, k, dtype=dtype), numbers(k, n, dtype=dtype), numbers(n, dtype=dtype)
        assert_close(matmul.product_of(left, right), left, right)
        assert_close(matmul.added(bias, left, right), left, right, bias)
    assert taken == [(128, 128, 128)] * 2


@each_dtype
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
