"""Which annotations the tests check: the shapes that elman's modules say with jaxtyping."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from beartype import beartype

ROOT = Path(__file__).resolve().parents[1]


def checked_modules() -> list[str]:
    """The modules of elman that say shapes with jaxtyping.

    The others stay as they are: torch.compile cannot look through a checked call, and it costs about 20 µs.
    """
    source = ROOT / "src"
    return [
        ".".join(path.relative_to(source).with_suffix("").parts)
        for path in sorted(source.rglob("*.py"))
        if "from jaxtyping import" in path.read_text(encoding="utf-8")
    ]


def check(function: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
    """beartype, for functions that say a shape; what others are given, they check themselves."""
    says_shapes = any("jaxtyping." in str(hint) for hint in function.__annotations__.values())
    return beartype(function) if says_shapes else function
