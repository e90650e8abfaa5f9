"""``record``: mark a value inside a step so that ``scan(..., record=True)`` returns it for every step."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from .errors import CellError

__all__ = ["record", "recorder", "scope"]

_local = threading.local()


def record(name: str, value: Tensor) -> Tensor:
    """Return ``value`` unchanged, and under ``scan(..., record=True)`` keep it for every step under ``name``.

    ``value`` is (B, …). Costs nothing, and does nothing, when nobody records. Raises CellError when one step
    records the same name twice.
    """
    values = getattr(_local, "values", None)
    if values is not None:
        name = _local.prefix + name
        if value.dim() == 0:
            raise CellError(
                f"elman.record({name!r}) was given one number for the whole batch. Record one for each row, (B, …): "
                "reduce over dim=-1, for example."
            )
        if name in values:
            raise CellError(f"elman.record({name!r}) is called twice in one step; give each value its own name.")
        values[name] = value
    return value


class recorder:  # used like a function; a generator would take twice as long, at every step
    """Collect what one step records, by name; with ``active=False`` nothing is collected."""

    __slots__ = ("active", "outer")

    def __init__(self, active: bool = True) -> None:
        self.active = active

    def __enter__(self) -> dict[str, Tensor]:
        self.outer = getattr(_local, "values", None), getattr(_local, "prefix", "")
        values: dict[str, Tensor] = {}
        _local.values, _local.prefix = values if self.active else None, ""
        return values

    def __exit__(self, *failure: object) -> None:
        _local.values, _local.prefix = self.outer


@contextmanager
def scope(name: str) -> Iterator[None]:
    """What is recorded inside has ``name.`` before its own name: for a step that holds several cells."""
    outer = getattr(_local, "prefix", "")
    _local.prefix = f"{outer}{name}."
    try:
        yield
    finally:
        _local.prefix = outer
