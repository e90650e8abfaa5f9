"""What the tests of the compiler share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from elman.compiler import cache


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One entry for every time that the tracer ran; programs are made anew."""
    seen: list[int] = []
    trace = cache.trace

    def counted(*args: Any) -> Any:
        seen.append(1)
        return trace(*args)

    monkeypatch.setattr(cache, "trace", counted)
    cache.forget()
    yield seen
    cache.forget()
