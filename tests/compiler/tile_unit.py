"""AMX in software: the tile instructions of Intel's manual, obeyed where the processor does not know them.

A processor without them stops at each with SIGILL. The handler here reads the instruction, does what the manual says
("Intel Architecture Instruction Set Extensions Programming Reference", chapter 3; the pseudocode of the Software
Developer's Manual, volume 2), and goes on after it: the machine code that runs is the one that a processor with AMX
would run. Whatever the manual forbids ends the process. It is slow, some 50 microseconds an instruction.
"""

from __future__ import annotations

import ctypes
import platform
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from elman.compiler import cache
from elman.compiler.llvm import isa
from elman.compiler.llvm.isa import ISAS, Isa, runnable

__all__ = ["AMX", "machine_with_tiles", "present", "tiles_in_software", "usable"]

AMX: Isa = ISAS["amx"]

_TILES, _ROWS, _BYTES = 8, 16, 64
_REGISTERS = (13, 14, 12, 11, 15, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7)  # rax, rcx, … as the system saves them
_SAVED_AT, _RIP = 40, 16  # where it saves them in its context, in bytes; which of them is the instruction's address
_SIGINFO, _NODEFER = 4, 0x40000000

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _Action(ctypes.Structure):
    """struct sigaction of Linux's C library."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def present() -> bool:
    """Whether the processor has tiles itself."""
    return AMX in runnable()


def usable() -> bool:
    """Whether code for AMX can run here: by the processor, or by this module where all else that it needs is there."""
    near = {ISAS["avx512bf16"]}
    return present() or (sys.platform == "linux" and platform.machine() == "x86_64" and near <= set(runnable()))


class _Unit:
    """The tiles of one thread. ``shapes`` are their rows and bytes, none where nothing is configured."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] | None = None
        self.tiles = np.zeros((_TILES, _ROWS, _BYTES), np.uint8)

    def configure(self, place: int) -> None:
        words = np.frombuffer(ctypes.string_at(place, 64), np.uint8)
        _must(words[0] == 1, f"palette {words[0]}")
        _must(not words[1], "a row to start from")
        _must(not words[2:16].any() and not words[32:48].any() and not words[56:].any(), "reserved bytes are not zero")
        widths, heights = words[16:32].view(np.uint16), words[48:56]
        _must(int(widths.max()) <= _BYTES and int(heights.max()) <= _ROWS, f"shapes {heights} {widths}")
        _must(bool(np.all((widths == 0) == (heights == 0))), "a tile with rows or bytes alone")
        self.shapes = [(int(h), int(w)) for h, w in zip(heights, widths, strict=True)]
        self.tiles[...] = 0

    def release(self) -> None:
        self.shapes = None
        self.tiles[...] = 0

    def shape(self, tile: int) -> tuple[int, int]:
        _must(self.shapes is not None, "nothing is configured")
        assert self.shapes is not None
        _must(self.shapes[tile][0] > 0, f"tile {tile} has no shape")
        return self.shapes[tile]

    def load(self, tile: int, place: int, stride: int) -> None:
        rows, size = self.shape(tile)
        self.tiles[tile] = 0
        self.tiles[tile, :rows, :size] = _matrix(place, rows, size, stride)

    def store(self, tile: int, place: int, stride: int) -> None:
        rows, size = self.shape(tile)
        _matrix(place, rows, size, stride)[...] = self.tiles[tile, :rows, :size]

    def multiply(self, sums: int, left: int, right: int) -> None:
        _must(len({sums, left, right}) == 3, "a tile twice")
        (rows, width), (height, depth), (k, across) = (self.shape(tile) for tile in (sums, left, right))
        _must(rows == height and width == across and depth == 4 * k and width % 4 == 0, "shapes do not fit")
        a, b = (_numbers(self.tiles[tile]) for tile in (left, right))
        with np.errstate(all="ignore"):
            terms = a[:, :rows, :k].swapaxes(1, 2)[..., None] * b[:, :k, None, : width // 4]
            first, second = terms.sum(1, dtype=np.float32)  # one k after the other, as they lie apart
            here = self.tiles[sums].view(np.float32)[:rows, : width // 4]
            here[...] = _flushed(here + (first + second))


def _matrix(place: int, rows: int, size: int, stride: int) -> np.ndarray:
    """So many bytes of every row, as they lie in memory."""
    span = (ctypes.c_ubyte * ((rows - 1) * stride + size)).from_address(place)
    return np.ndarray((rows, size), np.uint8, span, 0, (stride, 1))


def _numbers(tile: np.ndarray) -> np.ndarray:
    """The first and the second numbers of the pairs in rows of bfloat16, as float32, denormal ones zero."""
    halves = tile.view(np.uint16)
    wide = np.where(halves & 0x7F80, halves, halves & 0x8000).astype(np.uint32) << 16
    return np.ascontiguousarray(wide.view(np.float32).reshape(_ROWS, -1, 2).transpose(2, 0, 1))


def _flushed(numbers: np.ndarray) -> np.ndarray:
    return np.where(np.abs(numbers) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), numbers), numbers)


class _Forbidden(Exception):
    """What the manual forbids."""


def _must(condition: bool, message: str) -> None:
    if not condition:
        raise _Forbidden(message)


_units: dict[int, _Unit] = {}  # by thread of the system: to Python, one of another library is new at every call


def _obey(registers: Any) -> int:
    """Do the instruction at the address in the registers; its length."""
    code = ctypes.string_at(registers[_RIP], 10)
    _must(code[0] == 0xC4, f"no tile instruction: {code.hex(' ')}")
    high, kind, opcode, mode = code[1], code[2], code[3], code[4]
    prefix = (None, 0x66, 0xF3, 0xF2)[kind & 3]
    _must(high & 0x9F == 0x82 and not kind & 0x84, f"no tile instruction: {code.hex(' ')}")
    unit = _units.setdefault(threading.get_native_id(), _Unit())
    inside = mode >> 6 == 3
    tile, other, third = mode >> 3 & 7, mode & 7, ~kind >> 3 & 15
    if opcode == 0x5C and prefix == 0xF3 and inside:
        _must(bool(high & 0x20) and third < 8, "a tile above the last one")
        unit.multiply(tile, other, third)
        return 5
    _must(third == 0, "a third operand")
    if opcode == 0x49 and prefix is None and mode == 0xC0:
        unit.release()
        return 5
    place, stride, length = _address(code, registers)
    if opcode == 0x49 and prefix is None and not inside and tile == 0:
        unit.configure(place + stride)
    elif opcode == 0x4B and prefix in (0xF2, 0xF3) and not inside and mode & 7 == 4:
        (unit.load if prefix == 0xF2 else unit.store)(tile, place, stride)
    else:
        raise _Forbidden(f"no tile instruction: {code.hex(' ')}")
    return length


def _address(code: bytes, registers: Any) -> tuple[int, int, int]:
    """The address of an operand, without the index where it has one; the index, scaled; the instruction's length."""
    mode, low = code[4] >> 6, code[4] & 7
    base_high, index_high = (~code[1] >> 5 & 1) * 8, (~code[1] >> 6 & 1) * 8
    at, index = 5, 0
    if low == 4:
        sib, at = code[5], 6
        low = sib & 7
        which = (sib >> 3 & 7) + index_high
        index = 0 if which == 4 else registers[_REGISTERS[which]] << (sib >> 6)
    size = {0: 0, 1: 1, 2: 4}[mode]
    _must(mode != 0 or low != 5, "an address without a base")
    moved = int.from_bytes(code[at : at + size], "little", signed=True)
    return registers[_REGISTERS[low + base_high]] + moved, index, at + size


_C = ctypes.CDLL(None, use_errno=True)
_before = _Action()


@_Handler
def _handle(number: int, _: int, context: int) -> None:
    registers = (ctypes.c_longlong * 23).from_address(context + _SAVED_AT)
    try:
        registers[_RIP] += _obey(registers)
    except BaseException as error:  # nobody above could catch it: let the processor have its way
        print(f"the matrix unit in software: {error!r}", file=sys.stderr, flush=True)
        _C.sigaction(number, ctypes.byref(_before), None)


@contextmanager
def machine_with_tiles() -> Iterator[None]:
    """While this lasts, the best instruction set of this machine is AMX, and programs are compiled for it anew."""
    found = runnable()
    with tiles_in_software(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(isa, "runnable", lambda: found if AMX in found else (AMX, *found))
        cache.forget()
        yield
    cache.forget()


@contextmanager
def tiles_in_software() -> Iterator[None]:
    """While this lasts, the processor obeys tile instructions."""
    if present():
        yield
        return
    action = _Action(handler=ctypes.cast(_handle, ctypes.c_void_p).value, flags=_SIGINFO | _NODEFER)
    if _C.sigaction(int(signal.SIGILL), ctypes.byref(action), ctypes.byref(_before)):
        raise OSError(ctypes.get_errno(), "sigaction")
    try:
        yield
    finally:
        _C.sigaction(int(signal.SIGILL), ctypes.byref(_before), None)
