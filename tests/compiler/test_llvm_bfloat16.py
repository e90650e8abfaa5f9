"""Machine code with bfloat16: under autocast, and of modules that are bfloat16 throughout.

What is exact is float32 here. PyTorch's own bfloat16 rounds after every operation; kernels round what they multiply and
what they leave in memory for others, so they must be about as near to float32 as PyTorch is, or nearer.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from bfloat16_cells import CELLS, check, distance, everything
from tile_unit import AMX, machine_with_tiles, usable
from torch import Tensor, nn

import elman
from elman.cells import ElmanCell, LSTMCell
from elman.compiler.cache import forget
from elman.compiler.llvm.isa import DOTS, _permitted, chosen, runnable
from elman.compiler.llvm.kernel import Kernel
from elman.compiler.llvm.numeric import in_halves
from elman.doctor import NARROW, TOLERANCES, _deviation
from elman.errors import UnfoldWarning

T, B = 9, 5


@pytest.fixture(params=["this machine", "tiles"])
def processor(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instructions of this machine, and those of a matrix unit, in software where it has none."""
    if request.param == "tiles" and not usable():
        pytest.skip("no machine code for tiles runs here")
    with machine_with_tiles() if request.param == "tiles" else nullcontext():
        yield request.param


table = pytest.mark.parametrize("name", list(CELLS))


class Ran:
    """Which kernels ran."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.kernels: list[Kernel] = []
        plain = Kernel.__call__

        def watched(kernel: Kernel, *args: object) -> None:
            self.kernels.append(kernel)
            plain(kernel, *args)  # type: ignore[arg-type]

        patch.setattr(Kernel, "__call__", watched)


@table
@pytest.mark.parametrize("lengths", [None, [9, 0, 4, 9, 1]], ids=["full", "lengths"])
def test_under_autocast(name: str, lengths: list[int] | None, processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    size, make = CELLS[name]
    cell, x = make(), torch.randn(T, B, size)
    exact = everything(cell, x, "reference", False, lengths=lengths)
    theirs = everything(cell, x, "reference", True, lengths=lengths)
    ran = Ran(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnfoldWarning)
        found = everything(cell, x, "llvm", True, lengths=lengths)
    assert len(ran.kernels) >= 2
    assert all(kernel.isa == AMX for kernel in ran.kernels) or processor != "tiles"
    check(found, theirs, exact)


@table
def test_of_a_module_in_bfloat16(name: str, processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    size, make = CELLS[name]
    narrow, x = make().bfloat16(), torch.randn(T, B, size).bfloat16()
    exact = everything(copy.deepcopy(narrow).float(), x.float(), "reference", False)
    theirs = everything(narrow, x, "reference", False)
    ran = Ran(monkeypatch)
    found = everything(narrow, x, "llvm", False)
    assert len(ran.kernels) >= 2
    check(found, theirs, exact)
    ys, state = elman.scan(narrow, x, backend="llvm")
    assert {t.dtype for t in (ys, *torch.utils._pytree.tree_leaves(state))} == {torch.bfloat16}


def test_products_multiply_bfloat16_where_the_processor_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an even number of features the operands stand in memory as bfloat16, on such a processor; sums are float32."""
    ran = Ran(monkeypatch)
    everything(LSTMCell(24, 32), torch.randn(T, B, 24), "llvm", True)
    for kernel in ran.kernels:
        (product,) = kernel.products
        assert product.left.buffer.dtype == (torch.bfloat16 if kernel.isa.dot else torch.float32)
        assert product.out.buffer.dtype == torch.float32


@pytest.mark.parametrize("isa", ["avx512", "avx2", "x86-64"])
def test_processors_without_the_instruction(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if isa not in {one.name for one in runnable()}:
        pytest.skip(f"this machine has no {isa}")
    torch.manual_seed(5)
    cell, x = LSTMCell(24, 32), torch.randn(T, B, 24)
    exact, theirs = (everything(cell, x, "reference", autocast) for autocast in (False, True))
    monkeypatch.setenv("ELMAN_ISA", isa)
    forget()
    try:
        ran = Ran(monkeypatch)
        check(everything(cell, x, "llvm", True), theirs, exact)
        assert {kernel.isa.name for kernel in ran.kernels} == {isa}
    finally:
        forget()


@pytest.fixture
def precision() -> Iterator[Callable[[str], None]]:
    """Sets PyTorch's precision of products until the test is over."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@table
def test_products_of_medium_precision(name: str, processor: str, precision: Callable[[str], None]) -> None:
    """float32 whose products may round their operands: as near as autocast, and away from the exact result."""
    torch.manual_seed(6)
    size, make = CELLS[name]
    cell, x = make(), torch.randn(T, B, size)
    exact = everything(cell, x, "llvm", False)
    autocast = everything(cell, x, "reference", True)
    precision("high")
    nearly = everything(cell, x, "llvm", False)
    here = chosen()
    if here and in_halves(here) and name != "sru":  # three products of bfloat16 for one
        assert 5e-7 < max(distance(nearly, exact)) < max(distance(autocast, exact)) / 200
    else:
        assert all(torch.equal(found, same) for found, same in zip(nearly, exact, strict=True))
    precision("medium")
    found = everything(cell, x, "llvm", False)
    check(found, autocast, exact)
    pairs = here is not None and here.dot and name != "sru"  # which has no product in its loop
    assert (max(distance(found[:1], exact[:1])) > 1e-4) == bool(pairs)
    precision("highest")
    for found_again, same in zip(everything(cell, x, "llvm", False), exact, strict=True):
        assert torch.equal(found_again, same)


@pytest.mark.skipif(not usable(), reason="no machine code for tiles runs here")
@pytest.mark.parametrize("batch", [2, 37], ids=["units are shared", "rows are shared"])
def test_tiles_of_threads_and_of_a_child(batch: int) -> None:
    """Each thread has its own tiles, whoever made it; a child may use them as its parent did."""
    torch.manual_seed(10)
    cell, x = LSTMCell(24, 100), torch.randn(3, batch, 24)

    def run(threads: int) -> Tensor:
        torch.set_num_threads(threads)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return elman.scan(cell, x, backend="llvm")[0]

    before = torch.get_num_threads()
    try:
        with machine_with_tiles(), ThreadPoolExecutor(3) as pool:
            alone = run(1)
            assert torch.equal(run(2), alone)
            assert all(torch.equal(ys, alone) for ys in pool.map(run, [2] * 6))
            child = os.fork()
            if not child:
                os._exit(0 if torch.equal(run(1), alone) else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("name", NARROW)
def test_what_doctor_checks_is_right_on_tiles(name: str, precision: str, processor: str) -> None:
    deviation = max(_deviation(name, "llvm", precision))
    assert deviation <= TOLERANCES[precision]
    here = chosen()
    high = 1e-6 if here and in_halves(here) else 0
    least = {"float64": 0, "float32": 0, "high": high, "medium": 1e-4, "bf16": 1e-4}
    assert deviation > least[precision] or (precision == "medium" and not (here and here.dot))


def test_a_matrix_unit_is_used_where_the_system_permits_it() -> None:
    """Without the permission its first instruction would end the process; without the processor's word too."""
    permitted = _permitted(DOTS["amx"])
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert (AMX in runnable()) == (permitted and "amx_bf16" in flags)
    assert _permitted(None)
    assert _permitted(DOTS["avx512bf16"])


def test_many_steps_do_not_drift() -> None:
    """A slow average over 2,000 steps: carried in float32 it arrives, where in bfloat16 it would stand still."""

    class Average(nn.Module):
        def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
            return torch.zeros(batch, 4, device=device, dtype=dtype)

        def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            state = state + (x - torch.tanh(state)) * 0.001
            return state, state

    x = torch.full((2000, 1, 4), 0.5, dtype=torch.bfloat16)
    with torch.no_grad():
        _, fast = elman.scan(Average(), x, torch.zeros(1, 4).bfloat16(), backend="llvm")
        _, exact = elman.scan(Average(), x.float(), torch.zeros(1, 4), backend="reference")
        _, plain = elman.scan(Average(), x, torch.zeros(1, 4).bfloat16(), backend="reference")
    torch.testing.assert_close(fast.float(), exact, rtol=1e-2, atol=0)
    assert (plain.float() - exact).abs().max() > 0.05


def test_float16_runs_through_pytorch_without_a_warning() -> None:
    cell, x = ElmanCell(3, 4).half(), torch.randn(4, 2, 3).half()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnfoldWarning)
        ys, _ = elman.scan(cell, x, backend="llvm")
    assert ys.dtype == torch.float16


class Rows(nn.Module):
    """A product of three rows for every sequence, and one whose weight stands on the left."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(n, n), nn.Linear(6, 3 * n)
        self.turn = nn.Parameter(torch.randn(n, n) * 0.3)
        self.n = n

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.zeros(batch, 3, self.n, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        mean = (self.turn @ state.mean(1).t()).t()
        state = torch.tanh(self.inner(state) + self.outer(x).view(-1, 3, self.n) + mean.unsqueeze(1))
        return state.amax(1), state


@pytest.mark.parametrize("mode", ["autocast", "bfloat16", "medium"])
@pytest.mark.parametrize("n", [8, 7])
def test_products_of_several_rows_and_of_a_weight_on_the_left(
    n: int, mode: str, processor: str, precision: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(7)
    cell, x = Rows(n), torch.randn(T, B, 6)
    narrow, autocast = (cell.bfloat16(), False) if mode == "bfloat16" else (cell, mode == "autocast")
    x = x.bfloat16() if mode == "bfloat16" else x
    exact = everything(copy.deepcopy(cell).float(), x.float(), "reference", False)
    theirs = everything(narrow, x, "reference", mode != "bfloat16")
    precision("medium" if mode == "medium" else "highest")
    ran = Ran(monkeypatch)
    found = everything(narrow, x, "llvm", autocast)
    assert len(ran.kernels) >= 2
    check(found, theirs, exact)


@pytest.mark.parametrize("isa", ["avx512bf16", "avx512", "avx2", "x86-64", "neon"])
@pytest.mark.parametrize("n", [3, 17, 33])
def test_nothing_is_written_beside_a_row(n: int, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One number over, written as wide as float32, would be half in the next row, or behind the last."""
    if isa not in {one.name for one in runnable()}:
        pytest.skip(f"this machine has no {isa}")
    plain = Kernel.__call__

    def guarded(kernel: Kernel, rows: object, reverse: bool, inputs: object, outputs: list[Tensor]) -> None:
        rooms = [torch.full((out.numel() + 64,), 7, dtype=out.dtype) for out in outputs]
        inside = [room[32:-32].view(out.shape) for room, out in zip(rooms, outputs, strict=True)]
        plain(kernel, rows, reverse, inputs, inside)  # type: ignore[arg-type]
        for room, made, out in zip(rooms, inside, outputs, strict=True):
            assert (torch.cat([room[:32], room[-32:]]) == 7).all()
            out.copy_(made)

    torch.manual_seed(8)
    cell, x = ElmanCell(5, n).bfloat16(), torch.randn(T, B, 5).bfloat16()
    exact = everything(copy.deepcopy(cell).float(), x.float(), "reference", False)
    theirs = everything(cell, x, "reference", False)
    monkeypatch.setattr(Kernel, "__call__", guarded)
    monkeypatch.setenv("ELMAN_ISA", isa)
    forget()
    try:
        check(everything(cell, x, "llvm", False), theirs, exact)
    finally:
        forget()


def test_gradients_of_weights_are_summed_over_pieces_in_float32() -> None:
    """Of 128 pieces of one sign: in bfloat16 each would change the sum by less and less."""
    torch.manual_seed(9)
    cell, x = ElmanCell(4, 16).bfloat16(), (torch.randn(2048, 1, 4) + 1).bfloat16()
    exact = everything(copy.deepcopy(cell).float(), x.float(), "reference", False)
    found = everything(cell, x, "llvm", False, remat=16)
    assert max(distance(found, exact)) < 6e-3
