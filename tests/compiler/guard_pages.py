"""A test mode of the kernels: every buffer that one is given ends, or begins, at a page that nobody may touch.

What a kernel only reads lies in pages that cannot be written to. What it is to fill is NaN before, and so is all that
lies between the rows of what it reads. A wrong address ends the process, so checks in this mode run in another one.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from elman.compiler.llvm import kernel
from elman.compiler.llvm.kernel import Kernel
from elman.compiler.llvm.rings import Rings
from elman.compiler.llvm.scratch import LINE
from elman.packing import Rows

__all__ = ["Pages", "guarded"]

_PAGE = mmap.PAGESIZE
_NONE, _READ, _WRITE = 0, 1, 2  # PROT_NONE, PROT_READ, PROT_WRITE
_PRIVATE_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Pages:
    """Memory with an inaccessible page on either side; ``at_end`` says which side it touches."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self._mapped: list[tuple[int, int]] = []

    def room(self, size: int, alignment: int) -> int:
        """Where so many bytes begin, all of them 0xFF: NaN in every floating type, true, and -1."""
        inner = max(-(-size // _PAGE), 1) * _PAGE
        start = _libc.mmap(None, inner + 2 * _PAGE, _NONE, _PRIVATE_ANONYMOUS, -1, 0)
        if start in (None, 2**64 - 1):
            raise OSError(ctypes.get_errno(), "mmap")
        self._mapped.append((start, inner + 2 * _PAGE))
        self._protect(start + _PAGE, inner, _READ | _WRITE)
        ctypes.memset(start + _PAGE, 0xFF, inner)
        slack = (inner - size) // alignment * alignment if self.at_end else 0
        return start + _PAGE + slack

    def blank(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Such memory for a tensor of that shape and those strides, and all of it from end to end, in bytes."""
        span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        item = tensor.element_size()
        address = self.room(span * item, item)
        raw = torch.frombuffer((ctypes.c_char * (span * item)).from_address(address), dtype=torch.uint8)
        return raw.view(tensor.dtype).as_strided(tensor.shape, tensor.stride()), raw

    def like(self, tensor: Tensor) -> Tensor:
        """The same numbers, as far apart, in such memory."""
        if not tensor.numel():
            return tensor
        made, raw = self.blank(tensor)
        if any(n > 1 and not stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            # Repeated, so that there is nothing between the rows.
            flat = raw.view(tensor.dtype)
            flat.copy_(tensor.as_strided(flat.shape, (1,), tensor.storage_offset()))
        else:
            made.copy_(tensor)
        return made

    def close(self, address: int) -> None:
        """From now on what lies there cannot be written to."""
        for start, size in self._mapped:
            if start <= address < start + size:
                self._protect(start + _PAGE, size - 2 * _PAGE, _READ)

    def free(self) -> None:
        for start, size in self._mapped:
            _libc.munmap(start, size)
        self._mapped.clear()

    def _protect(self, start: int, size: int, access: int) -> None:
        if _libc.mprotect(start, size, access):
            raise OSError(ctypes.get_errno(), "mprotect")


def _covered(tensor: Tensor) -> Tensor:
    """Of the numbers from its first to its last, which are the tensor's."""
    span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    mask = torch.zeros(span, dtype=torch.bool)
    mask.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return mask


@contextmanager
def guarded(at_end: bool) -> Iterator[list[Kernel]]:
    """Calls of kernels inside are guarded; gives the list of the kernels that ran."""
    ran: list[Kernel] = []
    plain, filled = Kernel.__call__, Rings.filled

    def call(self: Kernel, rows: Rows, reverse: bool, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        pages = Pages(at_end)
        written = {b.number for b in self.lowered.buffers if b.role == "state"}

        @contextmanager
        def scratch(*sizes: int) -> Iterator[list[int]]:
            yield [pages.room(size, LINE) for size in sizes]

        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(kernel, "Scratch", scratch)
                patch.setattr(Rings, "filled", lambda *args: [pages.like(ring) for ring in filled(*args)])
                own_inputs, own_outputs = [pages.like(t) for t in inputs], [pages.blank(t) for t in outputs]
                for number, made in enumerate(own_inputs):
                    if number not in written and made.numel():
                        pages.close(made.data_ptr())
                plain(self, rows, reverse, own_inputs, [made for made, _ in own_outputs])
            for number in written:
                inputs[number].copy_(own_inputs[number])
            for given, (made, raw) in zip(outputs, own_outputs, strict=True):
                given.copy_(made)
                between = raw.view(-1, made.element_size())[~_covered(made)]
                assert bool((between == 0xFF).all()), "something was written between the rows of an output"
            ran.append(self)
        finally:
            pages.free()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernel, "__call__", call)
        yield ran
