"""A loop as machine code: compiled from its step, and called with tensors."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ...cachefolder import cache_directory
from ...errors import UnsupportedError
from ...packing import Rows
from ..independence import is_varying
from ..program import Loop
from ..step import Step
from . import calls, engine, threads
from .body import body_of
from .code import BF16, BF16X3
from .entry import BARRIER_BYTES
from .generate import WORDS, generate, packed_sizes
from .inplace import Placed, place
from .isa import Isa, chosen
from .items import Buffer, Lowered, Map, Product, buffers_of
from .lower import lower
from .numeric import Numeric, in_halves, numeric
from .overtime import areas
from .piecewise import passes
from .rings import Rings
from .scratch import LINE, Scratch, lined

__all__ = ["Bound", "Kernel", "PrecisionError", "compile_loop"]

_FLOATS = {torch.float32, torch.float64, torch.bfloat16}

_WORK_OF_A_CALL = 2_000_000_000  # operations after which Python looks for an interrupt: some 20 milliseconds
_WORK_TO_SHARE = 400_000  # operations that are worth a second thread
_WORK_TO_MEET = 100_000  # operations of a step that are worth meeting after it
_BYTES_TO_SCAN = 5_000_000  # of an affine loop, some 60 microseconds, that are worth going through twice
_BYTES_OF_A_SUM = 500_000  # as long as the sums of several threads take to be added
_BYTES_OF_A_STEP = 500  # as long as a step takes that does nothing
_FEWEST_STEPS = 64  # of a piece of time
_NEAR_PIECE = 256_000  # bytes of it, that are still near the second time
_ROWS_APART = 24_000  # bytes of a state, for each thread, above which sharing rows is better
_NEAR, _SHARED = 1_200_000, 32_000_000  # bytes of weights that stay near a core, in the cache of all
_FEW, _FEW_OF_FAR = 4, 8  # rows of a thread below which sharing the units is better, where weights are near or not


class PrecisionError(UnsupportedError):
    """Machine code has no numbers of that type."""


class Kernel:
    """A compiled loop. ``outside`` are the nodes it reads, in the order of the tensors it is called with.

    ``placed`` says which of the values that it stores stand in place of an input, in which columns.
    """

    def __init__(self, lowered: Lowered, outside: list[fx.Node], placed: Placed, isa: Isa) -> None:
        self.lowered, self.outside, self.placed, self.isa = lowered, outside, placed, isa
        self.library = engine.load(
            lambda: generate(lowered, isa),
            isa,
            cache_directory(),
            description=f"{engine.generator()} {isa} {lowered}",
            functions=["loop"],
        )
        self.address = self.library.address("loop")
        self.products = [item for item in lowered.items if isinstance(item, Product)]
        self.packed = packed_sizes(lowered, isa)
        self.weights = {p.weight for p in self.products if isinstance(p.weight, Buffer)}
        self.weights = self.weights.difference(*map(buffers_of, lowered.items))
        ends = len(WORDS) + 2 * len(lowered.buffers)
        addresses = [
            *range(len(WORDS), ends, 2),
            *(ends + 4 * i + j for i in range(len(self.products)) for j in (0, 1)),
        ]
        self.pointers = (*(WORDS.index(name) for name in ("sizes", "offsets", "barrier", "private")), *addresses)
        self.sums = [b for b in lowered.buffers if b.role == "sum"]
        self.scratch = [_row_bytes(b) for b in lowered.buffers if b.role == "scratch"]
        self.rings = Rings(lowered.buffers)
        self.affine = passes(lowered)
        maps = [item for item in lowered.items if isinstance(item, Map)]
        self.flops = sum(2 * p.k * p.n * p.times for p in self.products) + sum(
            10 * len(m.ops) * math.prod(m.shape) for m in maps
        )

    def __call__(self, rows: Rows, reverse: bool, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Run all steps. ``inputs`` are (N, …), (B, …) or the same for all; those of the states are overwritten.

        ``outputs`` (N, …), contiguous, receive what is stored.
        """
        if not rows.total:
            for buffer in self.sums:
                outputs[buffer.number].zero_()
            return
        with Bound(self, rows, reverse, inputs, outputs) as bound:
            steps = max(_WORK_OF_A_CALL // max(self.flops * rows.batch, 1), 1)
            for first in range(0, rows.steps, steps):
                bound.run(first, min(first + steps, rows.steps))

    def sharing(self, rows: Rows) -> tuple[int, bool]:
        """How many threads run, and whether they share the units; the rows otherwise."""
        if self.flops * rows.total < _WORK_TO_SHARE or (count := threads.count()) == 1:
            return 1, False
        if self.block(rows):
            return count, False
        weights = sum(self.packed)
        enough = _FEW if weights <= _NEAR else _FEW_OF_FAR
        if rows.batch >= enough * count and weights <= _SHARED:
            return count, False
        if self.flops * rows.batch < _WORK_TO_MEET:
            return min(count, rows.batch), False
        return count, True

    def block(self, rows: Rows) -> int:
        """How many steps several threads take together that share an affine loop over time; none if they share rows."""
        count, alone = threads.count(), _BYTES_TO_SCAN + _BYTES_OF_A_SUM * len(self.sums)
        size = rows.batch * sum(b.row * b.dtype.itemsize for b in self.lowered.buffers if b.kind == "time")
        short = rows.steps * (size + _BYTES_OF_A_STEP) < alone or rows.steps < _FEWEST_STEPS * (count + 1)
        if self.affine is None or short:
            return 0
        states = rows.batch * _row_bytes(self.affine.states[0])
        if rows.uniform and rows.batch >= _FEW * count and states >= _ROWS_APART * count:
            return 0
        steps = max(_NEAR_PIECE // max(size, 1), _FEWEST_STEPS) * (count + 1)
        return -(-rows.steps // -(-rows.steps // steps))  # blocks of the same length


class Bound:
    """A kernel with the tensors that it runs on, for one call: a context. ``words`` are what its code is told.

    The states are overwritten with the last ones when the context is left.
    """

    def __init__(
        self, kernel: Kernel, rows: Rows, reverse: bool, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        self.kernel, self.rows, self.reverse, self.inputs, self.outputs = kernel, rows, reverse, inputs, outputs
        self.count, self.units = kernel.sharing(rows)
        self.block = self.area = private = 0
        if kernel.affine is not None and self.count > 1 and (block := kernel.block(rows)):
            self.block, self.area = block, _row_bytes(kernel.affine.states[0], rows.batch)
            private = self.count * self.area * len(areas(kernel.affine))
        self.held: list[Tensor] = []  # alive until the call is over
        self.wide: list[tuple[Tensor, Tensor]] = []  # states, and what is carried in their place
        self.partial = self._partial()
        self.rings = kernel.rings.filled(rows, reverse, inputs)
        sizes = (rows.batch * size for size in kernel.scratch)
        self.scratch = Scratch(BARRIER_BYTES, private, *sizes, *kernel.packed)

    def __enter__(self) -> Bound:
        kernel, rows, places = self.kernel, self.rows, self.scratch.__enter__()
        try:
            meeting, private, *free = places[: len(places) - len(kernel.packed)]
            calls.clear(meeting, BARRIER_BYTES)
            words = [0, 0, rows.steps, rows.batch, self.reverse, 0, 0, meeting, self.units]
            words += (self.block, self.area, private)
            if not rows.uniform:
                words[5:7] = self._layout()
            slots = [
                self._given(chain[0], ring[0]) for chain, ring in zip(kernel.rings.chains, self.rings, strict=True)
            ]
            for buffer in kernel.lowered.buffers:
                if buffer.role == "scratch":
                    words += (free.pop(0), _row_bytes(buffer))
                    if buffer.filled:
                        calls.clear(words[-2], rows.batch * words[-1])
                elif buffer.role == "sum":
                    words += (self.partial[buffer].data_ptr(), _row_bytes(buffer))
                elif buffer.slot is not None:
                    words += slots[buffer.slot.ring]
                else:
                    given = self.outputs if buffer.role == "output" else self.inputs
                    words += self._given(buffer, given[buffer.number])
            for product, place in zip(kernel.products, places[len(places) - len(kernel.packed) :], strict=True):
                words += (place, *self._weight(product))
        except BaseException as error:
            self.scratch.__exit__(error)
            raise
        self.words = array("q", words)
        return self

    def __exit__(self, *failure: object) -> None:
        self.scratch.__exit__(*failure)
        if any(failure):
            return
        self.read_states(self.rows)
        for buffer, sums in self.partial.items():
            out = self.outputs[buffer.number]
            if sums is out:
                continue
            total = out if out.dtype == buffer.dtype else torch.empty(out.shape, dtype=buffer.dtype, device="cpu")
            calls.together(total, sums)
            if total is not out:
                out.copy_(total)

    def read_states(self, rows: Rows) -> None:
        """Overwrite the states with those after the last steps of such rows."""
        for state, carried in self.wide:
            state.copy_(carried)
        self.kernel.rings.read(self.rings, rows, self.reverse, self.inputs)

    def run(self, first: int, last: int) -> None:
        """Run the steps from the first to below the last, counted in the order in which they are done."""
        kernel = self.kernel
        self.words[0], self.words[1] = first, last
        work = kernel.flops * self.rows.batch * (last - first)
        calls.call(kernel.address, self.words, kernel.pointers, self.count, work)

    def _partial(self) -> dict[Buffer, Tensor]:
        """Zeros for every thread to sum over its rows, whole cache lines; one thread has those of the result."""
        found = {}
        for buffer in self.kernel.sums:
            out = self.outputs[buffer.number]
            room = self.count, _row_bytes(buffer) // buffer.dtype.itemsize
            alone = self.count == 1 and out.dtype == buffer.dtype
            found[buffer] = out.zero_() if alone else torch.zeros(room, dtype=buffer.dtype, device="cpu")
        return found

    def _layout(self) -> list[int]:
        """Where the number of rows of every step stands, and how many come before them."""
        made = [
            torch.tensor(values, dtype=torch.int64, device="cpu")
            for values in (self.rows.batch_sizes, self.rows.offsets)
        ]
        self.held += made
        return [values.data_ptr() for values in made]

    def _given(self, buffer: Buffer, tensor: Tensor) -> tuple[int, int]:
        """Address and row stride of a tensor, after a look at whether it is what the code was made for."""
        rows = self.rows
        if buffer.role == "state" and tensor.dtype == torch.bfloat16:  # carried in float32
            self.wide.append((tensor, tensor := tensor.to(buffer.dtype)))
        count = rows.total if buffer.kind == "time" else 1 if buffer.kind == "shared" else rows.batch
        right = tensor.dtype is buffer.dtype and tensor.numel() == count * buffer.row and tensor.is_cpu
        if not right or tensor.layout is not torch.strided:
            raise RuntimeError(
                f"{buffer.name}: {count} rows of {buffer.row} {buffer.dtype} were expected, "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
        if not tensor.is_contiguous():
            if buffer in self.kernel.weights:  # read by packing alone
                return 0, 0
            if buffer.kind != "shared" and _neighbours(tensor):
                return tensor.data_ptr(), tensor.stride(0) * tensor.itemsize
            if buffer.role != "input":
                raise AssertionError(f"{buffer.name} is written to and must have its numbers side by side")
            tensor = tensor.contiguous()
            self.held.append(tensor)
        return tensor.data_ptr(), buffer.row * tensor.itemsize

    def _as_multiplied(self, weight: Tensor, product: Product) -> Tensor:
        """A weight in the type that a product multiplies."""
        wanted = torch.float32 if product.rests else product.left.buffer.dtype
        if weight.dtype is not wanted:
            if {weight.dtype, wanted} != {torch.bfloat16, torch.float32}:
                raise RuntimeError(f"a weight of {wanted} was expected, got {weight.dtype}")
            weight = weight.to(wanted)
            self.held.append(weight)
        return weight

    def _weight(self, product: Product) -> tuple[int, int, int]:
        """Address of the weight (K, N) of a product, its bytes from k to k and from column to column."""
        if isinstance(product.weight, Buffer):
            weight = self.inputs[product.weight.number]
            if weight.shape != (product.k, product.n):
                raise RuntimeError(f"a weight ({product.k}, {product.n}) was expected, got {tuple(weight.shape)}")
            weight = self._as_multiplied(weight, product)
            along, across = weight.stride()
            return weight.data_ptr(), along * weight.itemsize, across * weight.itemsize
        buffer, offset, along, across = product.weight
        whole = self._as_multiplied(self.inputs[buffer.number].contiguous(), product)
        self.held.append(whole)
        return whole.data_ptr() + offset * whole.itemsize, along * whole.itemsize, across * whole.itemsize


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
    others = {v.dtype for n in read if isinstance(v := n.meta["val"], Tensor) and v.is_floating_point()} - _FLOATS
    if others:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in others))
        raise PrecisionError(f"machine code takes float32, float64 and bfloat16; the step has {names}.")
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
    lowered = lower(body, states, list(stored), varying, _narrow(isa, step.precision))
    handed = {*step.ys, *step.next}  # to the user, who may change it in place: it has memory of its own
    placed = place(lowered, {body.outside.index(n): n for n in spent}, [None if n in handed else n for n in stored])
    return Kernel(lowered, body.outside, placed, isa)


def _narrow(isa: Isa, precision: str) -> dict[torch.dtype, Numeric]:
    """The types whose products multiply bfloat16 on a processor at a precision of float32, and how."""
    if not isa.dot:
        return {}
    narrow = {torch.bfloat16: numeric(isa, BF16)}
    if precision == "medium":
        narrow[torch.float32] = numeric(isa, BF16)
    elif precision == "high" and in_halves(isa):
        narrow[torch.float32] = numeric(isa, BF16X3)
    return narrow


def _neighbours(tensor: Tensor) -> bool:
    """Whether the numbers of every row lie as in a contiguous one."""
    if tensor.dim() == 2:
        return tensor.stride(1) == 1 or tensor.shape[1] == 1
    want = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size != 1 and stride != want:
            return False
        want *= size
    return True


def _row_bytes(buffer: Buffer, rows: int = 1) -> int:
    """Bytes of rows of scratch: whole cache lines and one more, so that what lies side by side shares no cache set."""
    return lined(rows * buffer.row * buffer.dtype.itemsize) + LINE
