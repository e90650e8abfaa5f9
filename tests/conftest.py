"""What every test shares: checked shapes, one thread for each worker, repeatable draws."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

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


@pytest.fixture(scope="session", autouse=True)
def _machine_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Equal loops are compiled once for all tests, in every worker, and nothing of it outlives them."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # whose own folder lies in one for all of them
        shared = shared.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELMAN_CACHE", str(shared / "cache"))
        yield


@pytest.fixture(autouse=True)
def _said_anew() -> None:
    """A loop without machine code is warned of in every test, not once for all of them."""
    kernels = sys.modules.get("elman.compiler.llvm.kernels")
    if kernels is not None:
        kernels._warned.clear()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
