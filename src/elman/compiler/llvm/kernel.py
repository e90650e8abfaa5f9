"""A loop as machine code: compiled from its step, and called with tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, fx

from ...cachefolder import cache_directory
from ...errors import UnsupportedError
from ...packing import Rows
from ..independence import is_varying
from ..program import Loop
from ..step import Step
from . import engine, threads
from .body import body_of
from .entry import BARRIER_BYTES
from .generate import generate, layout
from .inplace import Placed, place
from .isa import Isa, chosen
from .items import Buffer, Lowered, Map, Product
from .lower import lower

__all__ = ["Kernel", "PrecisionError", "compile_loop"]

_FLOATS = {torch.float32, torch.float64}

_LINE = 64  # bytes of a cache line
_WORK_OF_A_CALL = 2_000_000_000  # operations after which Python looks for an interrupt: some 20 milliseconds
_WORK_TO_SHARE = 400_000  # operations that are worth a second thread
_WORK_TO_MEET = 100_000  # operations of a step that are worth meeting after it
_NEAR = 1_200_000  # bytes of weights that stay near a core
_FEW = 4  # rows of a thread below which sharing the units is better


class PrecisionError(UnsupportedError):
    """Machine code computes in float32 and float64."""


class Kernel:
    """A compiled loop. ``outside`` are the nodes it reads, in the order of the tensors it is called with.

    ``placed`` says which of the values that it stores stand in place of an input, in which columns.
    """

    def __init__(self, lowered: Lowered, outside: list[fx.Node], placed: Placed, isa: Isa) -> None:
        self.lowered, self.outside, self.placed, self.isa = lowered, outside, placed, isa
        self.layout = layout(lowered, isa)
        self.library = engine.load(
            lambda: generate(lowered, isa),
            isa,
            cache_directory(),
            description=f"{engine.generator()} {isa} {lowered}",
            functions=self.layout.functions,
        )
        self.address, *self.packs = map(self.library.address, self.layout.functions)
        self.products = self.layout.products
        self.sums = [b for b in lowered.buffers if b.role == "sum"]
        self.scratch = [b for b in lowered.buffers if b.role == "scratch"]
        maps = [item for item in lowered.items if isinstance(item, Map)]
        self.flops = sum(2 * p.k * p.n * p.times for p in self.products) + sum(
            10 * len(m.ops) * _numbers(m.shape) for m in maps
        )
        self.weight_bytes = sum(self.layout.packed)

    def __call__(self, rows: Rows, reverse: bool, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Run all steps. ``inputs`` are (N, …), (B, …) or the same for all; those of the states are overwritten.

        ``outputs`` (N, …), contiguous, receive what is stored.
        """
        if not rows.total:
            for buffer in self.sums:
                outputs[buffer.number].zero_()
            return
        count = self._threads(rows)
        units = count > 1 and (rows.batch < _FEW * count or self.weight_bytes > _NEAR)
        if units and self.flops * rows.batch < _WORK_TO_MEET:
            units, count = False, min(count, rows.batch)
        held: list[Tensor] = []  # alive until the call is over
        words = [0, 0, rows.steps, rows.batch, int(reverse), 0, 0, _aligned(BARRIER_BYTES, held, zero=True), int(units)]
        if not rows.uniform:
            sizes = (torch.tensor(values, dtype=torch.int64) for values in (rows.batch_sizes, rows.offsets))
            for word, layout in zip((5, 6), sizes, strict=True):
                held.append(layout)
                words[word] = layout.data_ptr()
        scratch = iter(self._scratch(rows.batch, held))
        partial: dict[Buffer, Tensor] = {}
        for buffer in self.lowered.buffers:
            if buffer.role == "sum":  # of every thread, whole cache lines
                partial[buffer] = torch.zeros(count, _row_bytes(buffer) // buffer.dtype.itemsize, dtype=buffer.dtype)
                words += [partial[buffer].data_ptr(), _row_bytes(buffer)]
            elif buffer.role == "scratch":
                words += [next(scratch), _row_bytes(buffer)]
            else:
                words += self._given(
                    buffer, (outputs if buffer.role == "output" else inputs)[buffer.number], rows, held
                )
        words += self._packed(inputs, count, held)
        args = (ctypes.c_int64 * len(words))(*words)
        steps = max(_WORK_OF_A_CALL // max(self.flops * rows.batch, 1), 1)
        for first in range(0, rows.steps, steps):
            args[0], args[1] = first, min(first + steps, rows.steps)
            threads.run(self.address, args, count)
        for buffer, sums in partial.items():
            outputs[buffer.number].copy_(sums[:, : buffer.row].sum(0).view(outputs[buffer.number].shape))

    def _threads(self, rows: Rows) -> int:
        if self.flops * rows.total < _WORK_TO_SHARE:
            return 1
        return threads.count()

    def _scratch(self, batch: int, held: list[Tensor]) -> list[int]:
        """Where each scratch buffer begins."""
        sizes = [batch * _row_bytes(b) for b in self.scratch]
        ends = [*accumulate(sizes, initial=_aligned(sum(sizes), held))]
        return ends[:-1]

    def _given(self, buffer: Buffer, tensor: Tensor, rows: Rows, held: list[Tensor]) -> list[int]:
        """Address and row stride of a tensor, after a look at whether it is what the code was made for."""
        item = tensor.element_size()
        if buffer.kind == "shared":
            tensor = tensor.contiguous()
            held.append(tensor)
            self._check(tensor, buffer, 1)
            return [tensor.data_ptr(), 0]
        if not tensor.is_contiguous() and (tensor.dim() == 0 or not _neighbours(tensor)):
            if buffer.role != "input":
                raise AssertionError(f"{buffer.name} is written to and must have its numbers side by side")
            tensor = tensor.contiguous()
        held.append(tensor)
        self._check(tensor, buffer, rows.total if buffer.kind == "time" else rows.batch)
        return [tensor.data_ptr(), tensor.stride(0) * item]

    def _check(self, tensor: Tensor, buffer: Buffer, rows: int) -> None:
        right = tensor.dtype == buffer.dtype and tensor.numel() == rows * buffer.row and tensor.device.type == "cpu"
        if not right or tensor.layout is not torch.strided:
            raise RuntimeError(
                f"{buffer.name}: {rows} rows of {buffer.row} {buffer.dtype} were expected, "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )

    def _packed(self, inputs: Sequence[Tensor], count: int, held: list[Tensor]) -> list[int]:
        """Lay out the weights of the products. Returns where."""
        places = []
        for product, address, size in zip(self.products, self.packs, self.layout.packed, strict=True):
            weight = _weight(product, inputs)
            held.append(weight)
            if weight.shape != (product.k, product.n) or weight.dtype != product.out.buffer.dtype:
                raise RuntimeError(f"a weight ({product.k}, {product.n}) was expected, got {tuple(weight.shape)}")
            place = _aligned(size, held)
            strides = [stride * weight.element_size() for stride in weight.stride()]
            args = (ctypes.c_int64 * 4)(place, weight.data_ptr(), *strides)
            threads.run(address, args, count if size > _NEAR else 1)
            places.append(place)
        return places


def compile_loop(step: Step, loop: Loop, stored: Sequence[fx.Node], spent: Sequence[fx.Node]) -> Kernel:
    """The kernel of a loop that writes the values of the nodes ``stored`` for every row and step.

    It may write them in place of values ``spent`` that nobody else reads.

    Raises UnsupportedError where the loop, or this machine, has no machine code.
    """
    isa = chosen()
    if isa is None:
        raise UnsupportedError("there is no machine code for this processor.")
    if any(n.meta["val"].device.type != "cpu" for n in step.state):
        raise UnsupportedError("machine code is for tensors on the CPU.")
    read = (n for node in loop.nodes for n in (node, *node.all_input_nodes))
    narrow = {v.dtype for n in read if isinstance(v := n.meta["val"], Tensor) and v.is_floating_point()} - _FLOATS
    if narrow:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in narrow))
        raise PrecisionError(f"machine code computes in float32 and float64; the step has {names}.")
    nexts = [step.next[i] for i in loop.carried]
    outputs = list(dict.fromkeys([*nexts, *stored]))
    body = body_of(step, loop.nodes, outputs)
    state = {step.state[i]: outputs.index(step.next[i]) for i in loop.carried}
    states = {}
    for node, result in state.items():
        if node in body.outside:
            states[body.inputs[body.outside.index(node)]] = result
        else:  # nothing reads it, so its next value is all that counts
            raise UnsupportedError("a state that nothing reads")
    carried = {step.state[i] for i in loop.carried}
    varying = {n for n in body.outside if is_varying(n) and n not in carried}
    lowered = lower(body, states, list(stored), varying)
    handed = {*step.ys, *step.next}  # to the user, who may change it in place: it has memory of its own
    placed = place(lowered, {body.outside.index(n): n for n in spent}, [None if n in handed else n for n in stored])
    return Kernel(lowered, body.outside, placed, isa)


def _weight(product: Product, inputs: Sequence[Tensor]) -> Tensor:
    """The weight (K, N) of a product."""
    if isinstance(product.weight, Buffer):
        return inputs[product.weight.number]
    buffer, offset, along, across = product.weight
    whole = inputs[buffer.number].contiguous()
    return whole.as_strided((product.k, product.n), (along, across), whole.storage_offset() + offset)


def _neighbours(tensor: Tensor) -> bool:
    """Whether the numbers of every row lie as in a contiguous one."""
    want = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size != 1 and stride != want:
            return False
        want *= size
    return True


def _row_bytes(buffer: Buffer) -> int:
    """Bytes from row to row of scratch: whole cache lines and one more, so that rows do not share a cache set."""
    return (buffer.row * buffer.dtype.itemsize + _LINE - 1) // _LINE * _LINE + _LINE


def _aligned(size: int, held: list[Tensor], zero: bool = False) -> int:
    """So many bytes that begin with a cache line."""
    room = (torch.zeros if zero else torch.empty)(size + _LINE, dtype=torch.uint8)
    held.append(room)
    return (room.data_ptr() + _LINE - 1) // _LINE * _LINE


def _numbers(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
