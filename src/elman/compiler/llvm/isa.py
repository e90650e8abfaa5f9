"""Instruction sets: the one table of what the generator knows about processors.

Everything else is written for vectors of some width and some number of registers; a new processor is a row here.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from functools import lru_cache

from llvmlite import binding as llvm

from ...errors import OptionError

__all__ = ["DOTS", "ISAS", "MODES", "Dot", "Isa", "Mode", "Unit", "chosen", "host", "runnable"]


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
    Both take denormal numbers for zero and give zero for them, whatever the mode says. ``unit``: the matrix unit that
    multiplies in place of ``multiply``, where there is one.
    """

    multiply: str
    narrow: tuple[tuple[int, str], ...]
    unit: Unit | None = None


@dataclass(frozen=True)
class Unit:
    """A matrix unit: registers that hold tiles, so many ``rows`` of so many ``bytes``, and its intrinsics.

    ``configure`` takes the address of the shapes of the tiles (see ``tiles``), without which there are none, until
    ``release``. ``load`` and ``store`` take a tile, an address and the bytes from row to row. ``multiply`` takes three
    tiles: to the float32 sums in the first it adds the second, rows of pairs, by the third, pairs of rows. ``feature``
    is the number by which Linux is asked for the memory that the tiles need whenever a thread is interrupted.
    """

    rows: int
    bytes: int
    configure: str
    release: str
    load: str
    store: str
    multiply: str
    feature: int


_NARROW_512 = (
    (16, "llvm.x86.avx512bf16.cvtneps2bf16.512"),
    (8, "llvm.x86.avx512bf16.cvtneps2bf16.256"),
)
_DPBF16 = "llvm.x86.avx512bf16.dpbf16ps.512"

DOTS = {
    "avx512bf16": Dot(_DPBF16, _NARROW_512),
    "amx": Dot(
        _DPBF16,
        _NARROW_512,
        Unit(
            16, 64, "llvm.x86.ldtilecfg", "llvm.x86.tilerelease", "llvm.x86.tileloadd64", "llvm.x86.tilestored64",
            "llvm.x86.tdpbf16ps", 18,
        ),
    ),
}  # fmt: skip


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
            "amx", _X86, "x86-64-v4", f"{_WIDE},+avx512bf16,+amx-tile,+amx-bf16", 64, 32, "mxcsr", _MXCSR, _PAUSE,
            (8, 2), (32, 4), (*_AVX512, "avx512bf16", "amx-tile", "amx-bf16"), "amx",
        ),
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
    return tuple(
        isa
        for isa in ISAS.values()
        if isa.triple == _X86 and all(has.get(name) for name in isa.needs) and _permitted(DOTS.get(isa.dot))
    )


_ARCH_PRCTL, _REQUEST_PERMISSION = 158, 0x1023


def _permitted(dot: Dot | None) -> bool:
    """Whether the system lets this process use the matrix unit, if that needs one: asked for, and kept after a fork."""
    if dot is None or dot.unit is None:
        return True
    if not sys.platform.startswith("linux"):
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, dot.unit.feature) == 0


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
