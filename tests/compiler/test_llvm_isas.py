"""The same cells on lesser instruction sets, which run here too, and on one that does not: its assembly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from llvmcells import KINDS, assert_single, expected_single, given, made

from comparing import assert_same, everything, scan_by
from elman.compiler import cache
from elman.compiler.llvm import engine, kernels
from elman.compiler.llvm.generate import generate
from elman.compiler.llvm.isa import ISAS, host
from elman.compiler.llvm.kernel import Kernel, compile_loop

HERE = host()
if HERE is None:
    pytest.skip("no machine code for this processor", allow_module_level=True)
LESSER = [isa.name for isa in ISAS.values() if isa.triple == HERE.triple and isa.bytes < HERE.bytes]
OTHERS = [isa.name for isa in ISAS.values() if isa.triple != HERE.triple]
SIZES = [(2, 3, 5, 17), (3, 9, 3, 100)]
"""(T, B, I, H)"""


@pytest.fixture
def compiled_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Kernel]]:
    """The kernels of this test: programs, with the kernels that they hold, are made anew before and after."""
    seen: list[Kernel] = []

    def watched(*args: object) -> Kernel:
        seen.append(compile_loop(*args))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(kernels, "compile_loop", watched)
    cache.forget()
    yield seen
    cache.forget()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LESSER)
def test_lesser_instruction_sets(
    name: str,
    kind: str,
    size: tuple[int, int, int, int],
    compiled_here: list[Kernel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ELMAN_ISA", name)
    steps, batch, d, h = size
    single = made(kind, d, h)
    sources, lengths = given(single, steps, batch, d), [steps, 1, 0] * (batch // 3)
    found = everything(scan_by("llvm"), single, sources, lengths=lengths)
    assert_single(found, expected_single(single, sources, lengths=lengths))
    cell = made(kind, d, h, torch.float64)
    sources = given(cell, steps, batch, d, torch.float64)
    assert_same(everything(scan_by("llvm"), cell, sources), everything(scan_by("reference"), cell, sources))
    assert {kernel.isa.name for kernel in compiled_here} == {name}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OTHERS)
def test_other_processors_have_code_too(name: str, kind: str, compiled_here: list[Kernel]) -> None:
    cell = made(kind, 5, 17)
    everything(scan_by("llvm"), cell, given(cell, 2, 3, 5))
    assert len(compiled_here) >= 2
    for kernel in compiled_here:
        text = engine.assembly(generate(kernel.lowered, ISAS[name]), ISAS[name])
        assert ("fmla" if name == "neon" else "vfmadd") in text or not kernel.products
        assert "\nloop:" in text
