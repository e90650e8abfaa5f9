"""What every test shares: checked shapes, one thread for each worker, repeatable draws."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

from shapes import checked_modules

install_import_hook(checked_modules(), "shapes.check")

import torch  # noqa: E402  (the hook has to be in place before elman, and whatever imports it, is loaded)

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# No deadline: the first example of many tests compiles something.
settings.register_profile("elman", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("elman")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
