"""Instruction sets: the one table of what the generator knows about processors.

Everything else is written for vectors of some width and some number of registers; a new processor is a row here.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import lru_cache

from llvmlite import binding as llvm

from ...errors import OptionError

__all__ = ["DOTS", "ISAS", "MODES", "Dot", "Isa", "Mode", "chosen", "host", "runnable"]


@dataclass(frozen=True)
class Mode:
    """The register that says what becomes of denormal numbers: the intrinsics that read and write it, and its bits.

    ``stored``: these intrinsics take the address of a word, instead of giving and taking its value.
    """

    read: str
    write: str
    bits: int
    stored: bool


MODES = {
    "mxcsr": Mode("llvm.x86.sse.stmxcsr", "llvm.x86.sse.ldmxcsr", 32, True),
    "fpcr": Mode("llvm.aarch64.get.fpcr", "llvm.aarch64.set.fpcr", 64, False),
}


@dataclass(frozen=True)
class Dot:
    """Instructions for pairs of bfloat16: the intrinsics that multiply them and that round float32 to them.

    ``multiply``: (sums, pairs, pairs) gives the float32 sums, to each of which both products of a pair are added.
    ``narrow``: by lanes, what gives so many float32 rounded to nearest even, as bfloat16.
    Both take denormal numbers for zero and give zero for them, whatever the mode says.
    """

    multiply: str
    narrow: tuple[tuple[int, str], ...]


DOTS = {
    "avx512bf16": Dot(
        "llvm.x86.avx512bf16.dpbf16ps.512",
        ((16, "llvm.x86.avx512bf16.cvtneps2bf16.512"), (8, "llvm.x86.avx512bf16.cvtneps2bf16.256")),
    ),
}
"""A matrix unit (AMX: TDPBF16PS) would be one row more. It reads weights as they lie here: a panel is a matrix of pairs
whose rows are as long as the panel is wide, 16 of them by one vector are one tile register, and so are 16 rows of a
``left`` that was narrowed. Besides the name of its multiplication such a row needs a micro-kernel whose sums are tiles
(32 rows by 2 vectors), the permission of the system, once for a process, and in every thread the shapes of its tiles:
set before the body of what ``entry.exported`` makes, released after it."""


@dataclass(frozen=True)
class Isa:
    """A processor family: the bytes of its vectors, how many registers hold them, and what LLVM is to be told.

    ``mode`` names one of MODES; ``flush`` are the bits of it that make denormal numbers zero.
    ``pause`` is the intrinsic, with its arguments, that tells the processor of a loop that waits for another thread.
    ``tile`` is how many rows by how many vectors a product keeps in registers, ``pair_tile`` one of pairs of bfloat16,
    for which ``dot`` names one of DOTS where the processor has it. ``needs`` is what a processor must have besides what
    all of its kind have, in the words of LLVM.
    """

    name: str
    triple: str
    cpu: str
    features: str
    bytes: int
    registers: int
    mode: str
    flush: int
    pause: tuple[str, tuple[int, ...]]
    tile: tuple[int, int]
    pair_tile: tuple[int, int]
    needs: tuple[str, ...] = ()
    dot: str = ""

    def lanes(self, bits: int) -> int:
        """Numbers of that many bits in one vector."""
        return self.bytes * 8 // bits


_X86 = "x86_64-unknown-linux-gnu"
_MXCSR = 0x8040  # flush to zero, denormals are zero
_FPCR = 1 << 24
_PAUSE: tuple[str, tuple[int, ...]] = ("llvm.x86.sse2.pause", ())
_YIELD: tuple[str, tuple[int, ...]] = ("llvm.aarch64.hint", (1,))

_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
_WIDE = "-prefer-256-bit"

ISAS = {
    isa.name: isa
    for isa in (
        Isa(
            "avx512bf16", _X86, "x86-64-v4", f"{_WIDE},+avx512bf16", 64, 32, "mxcsr", _MXCSR, _PAUSE, (8, 2), (6, 2),
            (*_AVX512, "avx512bf16"), "avx512bf16",
        ),
        Isa("avx512", _X86, "x86-64-v4", _WIDE, 64, 32, "mxcsr", _MXCSR, _PAUSE, (8, 2), (8, 2), _AVX512),
        Isa("avx2", _X86, "x86-64-v3", "", 32, 16, "mxcsr", _MXCSR, _PAUSE, (4, 3), (4, 2), ("avx2", "fma")),
        Isa("x86-64", _X86, "x86-64", "", 16, 16, "mxcsr", _MXCSR, _PAUSE, (4, 2), (4, 2)),
        Isa("neon", "aarch64-unknown-linux-gnu", "generic", "+neon", 16, 32, "fpcr", _FPCR, _YIELD, (6, 4), (4, 3)),
    )
}  # fmt: skip
"""By name, those of one family best first."""


@lru_cache(maxsize=1)
def runnable() -> tuple[Isa, ...]:
    """The instruction sets of the table that this machine has, best first."""
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64"):
        return (ISAS["neon"],)
    if machine not in ("x86_64", "amd64"):
        return ()
    has = llvm.get_host_cpu_features()
    return tuple(isa for isa in ISAS.values() if isa.triple == _X86 and all(has.get(name) for name in isa.needs))


def host() -> Isa | None:
    """The best instruction set of this machine, None where there is none in the table."""
    return next(iter(runnable()), None)


def chosen() -> Isa | None:
    """The instruction set to compile for: this machine's, or a lesser one named by $ELMAN_ISA."""
    name, best = os.environ.get("ELMAN_ISA"), host()
    if not name or best is None:
        return best
    possible = {isa.name: isa for isa in runnable()}
    if name not in possible:
        raise OptionError.unknown("instruction set in $ELMAN_ISA", name, tuple(possible))
    return possible[name]
