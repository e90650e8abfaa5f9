"""What every test shares: checked shapes, one thread for each worker, repeatable draws."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parents[1]


def checked_modules() -> list[str]:
    """The modules of elman that use jaxtyping, whose annotations are therefore checked at every call.

    The others stay as they are: a checked function costs about 20 µs a call, and torch.compile cannot look
    through it, so code that ends up inside someone's compiled model must not be wrapped.
    """
    source = ROOT / "src"
    return [
        ".".join(path.relative_to(source).with_suffix("").parts)
        for path in sorted(source.rglob("*.py"))
        if "from jaxtyping import" in path.read_text(encoding="utf-8")
    ]


install_import_hook(checked_modules(), "beartype.beartype")

import torch  # noqa: E402  (the hook has to be in place before elman, and whatever imports it, is loaded)

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# No deadline: the first example of many tests compiles something.
settings.register_profile("elman", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("elman")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
