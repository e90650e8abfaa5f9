"""What every test shares: checked shapes, one thread for each worker, repeatable draws."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from beartype import beartype
from hypothesis import settings
from jaxtyping import install_import_hook

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


def check_shapes(function: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
    """beartype, for functions that say a shape; the rest check their arguments themselves, for their users."""
    says_shapes = any("jaxtyping." in str(hint) for hint in function.__annotations__.values())
    return beartype(function) if says_shapes else function


install_import_hook(checked_modules(), "conftest.check_shapes")

import torch  # noqa: E402  (the hook has to be in place before elman, and whatever imports it, is loaded)

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# No deadline: the first example of many tests compiles something.
settings.register_profile("elman", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("elman")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
