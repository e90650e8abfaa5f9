"""A run of a program noted down once and made again by one call of machine code.

For short sequences most of a run is Python: making tensors, checking them, telling a dozen functions where everything
lies. Of equal runs (the same program, T, B, shapes and strides) only the addresses differ. So the program is run on
tensors of the same shapes without looking at a number, and what it would have called is written down, every address as
an offset into one of

    what is given and constants  |  what is returned, made anew for every run  |  the rest, pieces of one block

Playing it is: make what is returned, put the addresses in, call. Threads start once for all the functions and meet
between them. The functions, their order and the number of threads are the same: so are the results, to the last bit.

What does anything else on the way, an operation of PyTorch on numbers, cannot be noted and runs as it did.
"""

from __future__ import annotations

from array import array
from collections.abc import Container, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ...packing import Rows
from ..interpret import Runner
from . import calls, threads
from .entry import BARRIER_BYTES
from .isa import host
from .scratch import KEPT_BYTES, Scratch, lined

__all__ = ["Played", "run"]

_MOST = 16  # runs of a program that are remembered
_WORK_OF_A_CALL = 2e9  # operations after which Python looks for an interrupt: some 20 milliseconds
_MANY = 1 << 14  # numbers whose conversion threads share
_LARGE = 32 << 20  # bytes of a tensor that is better made by who knows what for
_GIVEN = 1 << 30  # bytes of all that is given; with more, what is not computing hardly counts

aten = torch.ops.aten
_ALLOCATES = {
    aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default,
    aten.new_empty_strided.default,
}  # fmt: skip
_CONVERTS = {(torch.float32, torch.bfloat16): "narrow", (torch.bfloat16, torch.float32): "widen"}
_CLEARS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}


class Unnoted(Exception):
    """A run does what cannot be played."""


class _Call(NamedTuple):
    """``places``: which of its words are addresses, each with the memory and the offset in it."""

    address: int
    words: list[int]
    places: list[tuple[int, int, int]]
    threads: int
    work: float


class _Notes(TorchDispatchMode):
    """Watches a run on stand-ins for what is given: the memory that it asks for, what it would call."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.memories: list[Tensor] = []  # alive, so that no address comes twice
        self.constants: list[int] = []  # those that were made from nothing but numbers
        self.number: dict[int, int] = {}  # of a memory, by its first address
        self.made: list[_Call] = []
        for tensor in given:
            self._remember(tensor, True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ALLOCATES or func in _CLEARS:
            made = func(*args, **kwargs)
            self._remember(made)
            if func in _CLEARS:
                self._clear(made)
            return made
        if func in (aten.clone.default, aten._to_copy.default):
            made = func(*args, **kwargs)
            self._remember(made)
            self._copy(made, args[0])
            return made
        if func is aten.copy_.default:
            self._copy(args[0], args[1])
            return args[0]
        if func is aten.zero_.default:
            self._clear(args[0])
            return args[0]
        constant = not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((args, kwargs)))
        if not (constant or func.is_view or func is aten._unsafe_view.default):
            raise Unnoted(func)  # before it reads numbers that are none
        if func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags:
            raise Unnoted(func)
        result = func(*args, **kwargs)
        if constant:
            self.constants.append(len(self.memories))
            self._remember(result)
        return result

    def note(self, address: int, words: Sequence[int], pointers: Sequence[int], count: int, work: float) -> None:
        """See ``calls.Listener``."""
        places = [(i, *self.place(words[i])) for i in pointers if words[i]]
        self.made.append(_Call(address, list(words), places, count, work))

    def place(self, address: int) -> tuple[int, int]:
        """Which memory an address lies in, and where. Raises Unnoted for one that is not known."""
        for number, memory in enumerate(self.memories):
            start = memory.untyped_storage().data_ptr()
            if start <= address < start + memory.untyped_storage().nbytes():
                return number, address - start
        raise Unnoted(address)

    def returned(self, tensor: Tensor) -> int:
        """Which memory a result has. Raises Unnoted where it is not known, or the same for every run."""
        number = self.number.get(tensor.untyped_storage().data_ptr())
        if number is None or number in self.constants:
            raise Unnoted("a result")
        return number

    def _remember(self, tensor: Tensor, given: bool = False) -> None:
        if not tensor.is_cpu:
            raise Unnoted(tensor.device)
        if tensor.untyped_storage().nbytes() >= _LARGE and not given:
            raise Unnoted("large")
        if tensor.untyped_storage().nbytes():
            self.number[tensor.untyped_storage().data_ptr()] = len(self.memories)
            self.memories.append(tensor)

    def _clear(self, tensor: Tensor) -> None:
        if not tensor.is_contiguous():
            raise Unnoted("zero_")
        self.note(calls.address_of("zero"), (tensor.data_ptr(), tensor.nbytes), (0,), 1, 0.0)

    def _copy(self, to: Tensor, source: Tensor) -> None:
        how = "copy" if to.dtype == source.dtype else _CONVERTS.get((source.dtype, to.dtype))
        if how is None or to.shape != source.shape or not _alike(to, source):
            raise Unnoted("copy_")
        several = how != "copy" and to.numel() >= _MANY
        words = to.data_ptr(), source.data_ptr(), to.nbytes if how == "copy" else to.numel()
        self.note(calls.address_of(how), words, (0, 1), threads.count() if several else 1, 0.0)


class _Result(NamedTuple):
    """A tensor that is returned: of a memory, with a shape, strides and offset; None for all of it as it was made."""

    memory: int
    view: tuple[torch.Size, tuple[int, ...], int] | None

    def of(self, memories: list[Tensor]) -> Tensor:
        """The tensor, of the memories of one run."""
        tensor = memories[self.memory]
        if self.view is None:
            return tensor
        shape, strides, offset = self.view
        return tensor.as_strided(shape, strides, tensor.storage_offset() + offset)


class Played:
    """A run that was noted down. Raises Unnoted where that cannot be.

    The code that it calls belongs to the runner, which must outlive it.
    """

    def __init__(self, runner: Runner, rows: Rows, reverse: bool, parts: tuple[list[Tensor], ...]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            own = [
                [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu") for t in part] for part in parts
            ]
            flat = [t for part in own for t in part]
            notes = _Notes(flat)
            calls.listening.listener = notes
            try:
                with notes:
                    results = runner(rows, reverse, *own)
            finally:
                calls.listening.listener = None
        if not notes.made:
            raise Unnoted("there is no call")
        ys, final, kept, sums = results
        self.kept, self.sums = list(kept), list(sums)
        self.ends = len(ys), len(ys) + len(final), len(ys) + len(final) + len(kept)
        leaves = [*ys, *final, *kept.values(), *sums.values()]
        self.constants = [notes.memories[n] for n in notes.constants]
        self.given = [*range(len(flat)), *notes.constants]
        self._make(notes, leaves)
        self._list(notes)

    def _make(self, notes: _Notes, leaves: list[Tensor | None]) -> None:
        """What is returned, and of what shape it is made."""
        users: dict[int, list[Tensor]] = {}
        for leaf in leaves:
            if leaf is not None:
                users.setdefault(notes.returned(leaf), []).append(leaf)
        self.makes: list[tuple[Any, torch.dtype]] = []
        self.place = {n: i for i, n in enumerate(self.given)}
        like = {n: notes.memories[n] for n in self.given}
        for n, views in users.items():
            if n in self.place:
                continue
            memory = notes.memories[n]
            size = memory.untyped_storage().nbytes()
            alone = len(views) == 1 and views[0].is_contiguous() and views[0].nbytes == size
            like[n] = views[0] if alone else memory.as_strided((size // memory.element_size(),), (1,), 0)
            self.place[n] = len(self.given) + len(self.makes)
            self.makes.append((like[n].shape, memory.dtype))
        self.results: list[_Result | None] = []
        for leaf in leaves:
            if leaf is None:
                self.results.append(None)
                continue
            n = notes.returned(leaf)
            view = (leaf.shape, leaf.stride(), int(leaf.storage_offset()))
            whole = view == (like[n].shape, like[n].stride(), 0)
            self.results.append(_Result(self.place[n], None if whole else view))

    def _list(self, notes: _Notes) -> None:
        """The words of all calls, and where addresses are to be put in: from which memory, how far in."""
        inner = _inside(notes, self.place)
        self.inside = max((first + size for first, size in inner.values()), default=0)
        block = len(self.place)
        words = [0, 0, 0]
        patches = [(0, block, 0)]
        start = calls.HEAD + calls.ENTRY * len(notes.made)
        for call in notes.made:
            patches.append((len(words) + 1, block + 1, 8 * start))
            words += [call.address, 0, call.threads]
            start += len(call.words)
        for call in notes.made:
            for i, memory, offset in call.places:
                where = (block, BARRIER_BYTES + inner[memory][0]) if memory in inner else (self.place[memory], 0)
                patches.append((len(words) + i, where[0], where[1] + offset))
            words += call.words
        self.words, self.patches = array("q", words), patches
        self.threads = max(call.threads for call in notes.made)
        self.groups: list[tuple[int, int]] = []
        first, work = 0, 0.0
        for i, call in enumerate(notes.made):
            if i > first and work + call.work > _WORK_OF_A_CALL:
                self.groups.append((first, i))
                first, work = i, 0.0
            work += call.work
        self.groups.append((first, len(notes.made)))

    def __call__(self, parts: tuple[list[Tensor], ...]) -> Any:
        """The results for other tensors of the same shapes and strides."""
        memories = [*(t for part in parts for t in part), *self.constants]
        memories += [torch.empty(shape, dtype=dtype, device="cpu") for shape, dtype in self.makes]
        with Scratch(BARRIER_BYTES + self.inside) as [block]:
            words = self.words[:]
            bases = [t.data_ptr() for t in memories]
            bases += (block, words.buffer_info()[0])
            for i, memory, offset in self.patches:
                words[i] = bases[memory] + offset
            calls.clear(block, BARRIER_BYTES)
            for first, end in self.groups:
                words[1], words[2] = first, end
                threads.run(calls.address_of("all"), bases[-1], self.threads)
        found = [result and result.of(memories) for result in self.results]
        ys, last, kept = self.ends
        return (
            found[:ys],
            found[ys:last],
            dict(zip(self.kept, found[last:], strict=False)),
            dict(zip(self.sums, found[kept:], strict=True)),
        )


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether the numbers of both fill a piece of memory, in the same order."""
    if one.stride() == other.stride():
        order = sorted(range(one.dim()), key=one.stride, reverse=True)
        one, other = one.permute(order), other.permute(order)
    return one.is_contiguous() and other.is_contiguous()


def _inside(notes: _Notes, outside: Container[int]) -> dict[int, tuple[int, int]]:
    """Where in one block memory stands that is neither given nor returned, and its size, both in bytes."""
    spans: dict[int, list[int]] = {}
    for i, call in enumerate(notes.made):
        for _, memory, _ in call.places:
            if memory not in outside:
                spans.setdefault(memory, [i, i])[1] = i
    found: dict[int, tuple[int, int]] = {}
    sizes = {n: lined(notes.memories[n].untyped_storage().nbytes()) for n in spans}
    for n in sorted(spans, key=lambda n: -sizes[n]):  # the largest first, each as far in front as it can stand
        taken = sorted(place for m, place in found.items() if spans[m][0] <= spans[n][1] and spans[n][0] <= spans[m][1])
        first = 0
        for other, size in taken:
            if first + sizes[n] <= other:
                break
            first = max(first, other + size)
        found[n] = (first, sizes[n])
    if max((first + size for first, size in found.values()), default=0) > KEPT_BYTES - BARRIER_BYTES:
        raise Unnoted("large")
    return found


def run(runner: Runner, rows: Rows, reverse: bool, *parts: list[Tensor]) -> Any:
    """``runner(rows, reverse, *parts)``: noted down when it comes the second time, and played from then on."""
    if not rows.uniform or torch._C._len_torch_dispatch_stack() or calls.listening.listener is not None:
        return runner(rows, reverse, *parts)
    key = (
        rows.steps, rows.batch, reverse, threads.count(),
        *[(type(t), t.shape, t.stride()) for part in parts for t in part],
    )  # fmt: skip
    found = runner.known.pop(key, None)  # what was used last comes last
    if found is None or found == "once":
        found = _noted(found, runner, rows, reverse, parts)
    runner.known[key] = found
    for oldest in list(runner.known)[:-_MOST]:
        runner.known.pop(oldest, None)
    return found(parts) if isinstance(found, Played) else runner(rows, reverse, *parts)


def _noted(
    found: Literal["once"] | None, runner: Runner, rows: Rows, reverse: bool, parts: tuple[list[Tensor], ...]
) -> Played | Literal["once", "never"]:
    """What is known of a run from now on."""
    if found is None:
        return "once"
    given = [t for part in parts for t in part]
    plain = all(type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.numel() for t in given)
    if not plain or sum(t.nbytes for t in given) > _GIVEN or host() is None:
        return "never"
    try:
        return Played(runner, rows, reverse, parts)
    except Unnoted:
        return "never"
