"""What a loop's step is lowered to: products with weights, maps over the features of every row, and their memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

__all__ = [
    "Access", "Buffer", "Chosen", "Contract", "Item", "Kind", "Lowered", "Map", "Op", "Product", "Slot", "buffers_of",
    "reads_of",
]  # fmt: skip

Kind = Literal["time", "batch", "shared", "thread"]
"""One row for each sequence at each step, one for each sequence, the same for all, or one for each thread."""


@dataclass(frozen=True)
class Slot:
    """Where a state stands in a ring of so many slots before the first step; at every step it moves to the next one."""

    ring: int
    slots: int
    number: int


@dataclass(eq=False)
class Buffer:
    """Memory of a value: ``row`` numbers for each row."""

    name: str
    kind: Kind
    dtype: torch.dtype
    row: int
    role: str = "scratch"  # or input, spent (an input that is overwritten), state, output, sum
    number: int = 0  # which of its role
    slot: Slot | None = None  # of a state in a ring
    filled: bool = False  # scratch that is zero where nothing is written


@dataclass(frozen=True)
class Access:
    """Which numbers of a row: from ``offset`` on, ``strides`` apart along every dimension that is looped over."""

    buffer: Buffer
    offset: int
    strides: tuple[int, ...]

    def __str__(self) -> str:
        at = f"+{self.offset}" if self.offset else ""
        plain = all(s in (0, 1) for s in self.strides)
        return f"{self.buffer.name}{at}" + ("" if plain else f":{','.join(map(str, self.strides))}")


@dataclass(frozen=True)
class Chosen:
    """Rows of a table that is the same for all: the number of the row stands in memory."""

    table: Access
    number: Access
    width: int

    def __str__(self) -> str:
        return f"{self.table}[{self.number}]"


@dataclass(frozen=True)
class Op:
    """One pointwise operation of a map; its operands are registers (as ("r", number)), memory, or constants."""

    name: str
    operands: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]
    dtype: torch.dtype
    line: str = field(default="", repr=False)  # the user's


@dataclass
class Map:
    """For every row and every index below ``shape``: operations, then stores.

    ``reductions`` are (register, kind, where): over the last ``reduced`` dimensions of the shape. ``sums`` are over all
    rows and steps, kept up by every thread for itself.
    """

    shape: tuple[int, ...]
    ops: list[Op] = field(default_factory=list)
    stores: list[tuple[int, Access]] = field(default_factory=list)
    reductions: list[tuple[int, str, Access]] = field(default_factory=list)
    sums: list[tuple[int, Access]] = field(default_factory=list)
    reduced: int = 0


@dataclass
class Contract:
    """For every row and every index of ``shape``: a reduction over ``inner`` of the product of what is read."""

    shape: tuple[int, ...]
    inner: tuple[int, ...]
    reads: list[Access]
    kind: str
    out: Access


@dataclass
class Product:
    """out = init + left @ weight, for ``times`` rows of every row of the batch."""

    out: Access
    init: Access | None
    left: Access
    weight: tuple[Buffer, int, int, int] | Buffer  # a part of what is contiguous: offset, strides of K and N
    k: int
    n: int
    times: int
    chunk: int = 0  # columns that the maps after it take together
    rests: bool = False  # of numbers in two halves (see ``Numeric``)


Item = Map | Contract | Product


@dataclass
class Lowered:
    """The items of one step, in order, and the memory that they use."""

    items: list[Item]
    buffers: list[Buffer]


def reads_of(item: Map) -> list[Access]:
    """All memory that a map reads."""
    given = [a for op in item.ops for a in op.operands]
    chosen = [part for a in given if isinstance(a, Chosen) for part in (a.table, a.number)]
    return [*(a for a in given if isinstance(a, Access)), *chosen]


def buffers_of(item: Item) -> set[Buffer]:
    """All memory that an item reads or writes."""
    if isinstance(item, Map):
        reads = {a.buffer for a in reads_of(item)}
        return reads | {a.buffer for _, a in (*item.stores, *item.sums)} | {a.buffer for _, _, a in item.reductions}
    if isinstance(item, Contract):
        return {a.buffer for a in (*item.reads, item.out)}
    more = {item.init.buffer} if item.init else set()
    return {item.out.buffer, item.left.buffer} | more
