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

__all__ = ["ISAS", "MODES", "Isa", "Mode", "chosen", "host"]


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
class Isa:
    """A processor family: the bytes of its vectors, how many registers hold them, and what LLVM is to be told.

    ``mode`` names one of MODES; ``flush`` are the bits of it that make denormal numbers zero.
    ``pause`` is the intrinsic, with its arguments, that tells the processor of a loop that waits for another thread.
    ``tile`` is how many rows by how many vectors a product keeps in registers.
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

    def lanes(self, bits: int) -> int:
        """Numbers of that many bits in one vector."""
        return self.bytes * 8 // bits


_X86 = "x86_64-unknown-linux-gnu"
_MXCSR = 0x8040  # flush to zero, denormals are zero
_FPCR = 1 << 24
_PAUSE: tuple[str, tuple[int, ...]] = ("llvm.x86.sse2.pause", ())
_YIELD: tuple[str, tuple[int, ...]] = ("llvm.aarch64.hint", (1,))

ISAS = {
    isa.name: isa
    for isa in (
        Isa("avx512", _X86, "x86-64-v4", "-prefer-256-bit", 64, 32, "mxcsr", _MXCSR, _PAUSE, (8, 2)),
        Isa("avx2", _X86, "x86-64-v3", "", 32, 16, "mxcsr", _MXCSR, _PAUSE, (4, 3)),
        Isa("x86-64", _X86, "x86-64", "", 16, 16, "mxcsr", _MXCSR, _PAUSE, (4, 2)),
        Isa("neon", "aarch64-unknown-linux-gnu", "generic", "+neon", 16, 32, "fpcr", _FPCR, _YIELD, (6, 4)),
    )
}
"""By name, those of one family best first."""


@lru_cache(maxsize=1)
def host() -> Isa | None:
    """The best instruction set of this machine, None where there is none in the table."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return ISAS["neon"]
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    has = llvm.get_host_cpu_features()
    if all(has.get(name) for name in ("avx512f", "avx512bw", "avx512dq", "avx512vl")):
        return ISAS["avx512"]
    return ISAS["avx2"] if has.get("avx2") and has.get("fma") else ISAS["x86-64"]


def chosen() -> Isa | None:
    """The instruction set to compile for: this machine's, or a lesser one named by $ELMAN_ISA."""
    name, best = os.environ.get("ELMAN_ISA"), host()
    if not name or best is None or name == best.name:
        return best
    possible = [isa.name for isa in ISAS.values() if isa.triple == best.triple and isa.bytes <= best.bytes]
    if name not in possible:
        raise OptionError.unknown("instruction set in $ELMAN_ISA", name, tuple(possible))
    return ISAS[name]
