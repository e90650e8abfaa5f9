"""A kernel as text: its items, its representation, its assembly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .items import Buffer, Contract, Item, Map, Product
from .kernel import Kernel

__all__ = ["LISTINGS", "items"]


def items(kernel: Kernel) -> list[str]:
    """The items of a step, in the order in which they run. Sizes are those of a row."""
    roles = {"time": "for every step", "batch": "for every sequence", "shared": "for all", "thread": "for every thread"}
    memory = [
        f"{b.role} {b.name}: {b.row} × {str(b.dtype).removeprefix('torch.')} {roles[b.kind]}"
        + (f", slot {b.slot.number} of {b.slot.slots} of a ring" if b.slot else "")
        for b in kernel.lowered.buffers
    ]
    return [f"for {kernel.isa.name}", *(f"  {line}" for line in memory), "step:", *_indented(kernel.lowered.items)]


def _indented(steps: list[Item]) -> list[str]:
    return [f"  {line}" for item in steps for line in _lines(item)]


def _lines(item: Item) -> list[str]:
    if isinstance(item, Product):
        weight = item.weight if isinstance(item.weight, Buffer) else item.weight[0]
        start = f"{item.init} + " if item.init else ""
        several = f", {item.times} rows for each" if item.times > 1 else ""
        return [f"product {item.out} = {start}{item.left} · {weight.name} ({item.k} × {item.n}{several})"]
    shape = " × ".join(map(str, item.shape)) or "1"
    if isinstance(item, Contract):
        factors = " · ".join(map(str, item.reads))
        inner = " × ".join(map(str, item.inner)) or "1"
        return [f"{item.kind} over {inner}, for each of {shape}: {item.out} = {factors}"]
    lines = [f"map over {shape}"]
    lines += [f"  r{i} = {_operation(item, i)}" for i in range(len(item.ops))]
    lines += [f"  {access} = {kind} of r{register}" for register, kind, access in item.reductions]
    lines += [f"  {access} += r{register}" for register, access in item.sums]
    return lines + [f"  {access} = r{register}" for register, access in item.stores]


def _operation(item: Map, number: int) -> str:
    op = item.ops[number]
    given = [f"r{a[1]}" if isinstance(a, tuple) else str(a) for a in op.operands]
    return f"{op.name}({', '.join([*given, *(f'{k}={v}' for k, v in op.keywords)])})"


LISTINGS: dict[str, Callable[[Any], list[str]]] = {
    "kernel": items,
    "ir": lambda kernel: kernel.library.ir().splitlines(),
    "asm": lambda kernel: kernel.library.assembly().splitlines(),
}
"""What can be shown of a kernel, by the level of ``explain``."""
