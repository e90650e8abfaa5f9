"""Storing values where others stood: what nobody reads again makes room, and memory is not touched twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from ..independence import rows_of_node
from .items import Buffer, Item, Lowered, Map, buffers_of

__all__ = ["Placed", "place"]

Placed = dict[fx.Node, tuple[fx.Node, int, int]]
"""A stored value, and the input in whose columns it stands: from the second number on, so many."""


def place(lowered: Lowered, spent: Mapping[int, fx.Node], stored: Sequence[fx.Node | None]) -> Placed:
    """Choose which stored values go in place of inputs, by the inputs' numbers, that nobody reads afterwards.

    ``stored`` are the values by number, None for those that need memory of their own. A row of an input is spent when
    the last item that reads it is done with it; what later items store fits there.
    """
    placed: Placed = {}
    outputs = [b for b in lowered.buffers if b.role == "output"]
    for buffer in lowered.buffers:
        if buffer.role != "input" or buffer.number not in spent or buffer.kind != "time":
            continue
        last = max(i for i, item in enumerate(lowered.items) if buffer in buffers_of(item))
        column = 0
        for output in outputs:
            node = stored[output.number]
            if (
                node is None
                or node in placed
                or output.dtype != buffer.dtype
                or column + output.row > buffer.row
                or output.row < 2
            ):
                continue
            if rows_of_node(node) != (0, 1) or not _only_after(output, lowered.items, last):
                continue
            placed[node] = (spent[buffer.number], column, output.row)
            buffer.role = "spent"
            column += output.row
    return placed


def _only_after(output: Buffer, items: Sequence[Item], last: int) -> bool:
    """Whether a value is first touched after that item, and by maps alone, which write rows in any layout."""
    touching = [(i, item) for i, item in enumerate(items) if output in buffers_of(item)]
    return all(i > last for i, _ in touching) and isinstance(touching[0][1], Map)
