"""What every test shares: checked shapes, one thread for each worker, repeatable draws, and who runs what when."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

from shapes import checked_modules

install_import_hook(checked_modules(), "shapes.check")

import torch  # noqa: E402  (the hook has to be in place before elman, and whatever imports it, is loaded)

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# Where tests are begun in the background the signal may be ignored, and every process that they start would inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tracing and writing kernels make so many objects that Python would look for unreachable ones a fifth of the time.
gc.set_threshold(20_000)

# No deadline: the first example of many tests compiles something.
settings.register_profile("elman", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("elman")

ROOT = Path(__file__).parent
APART = ("test_readme.py", "test_runs.py", "cli/test_resume.py")
"""Files of long tests that share nothing: processes of their own."""
LONG = (
    *APART,
    "compiler/test_llvm_guard.py",
    "test_compositions.py",
    "test_layers.py",
    "cli/test_specs.py",
    "compiler/test_zoo.py",
    "test_contract.py",
    "compiler/test_llvm_processes.py",
    "compiler/test_llvm_isas.py",
    "test_streaming.py",
    "cli/test_bad_input.py",
    "test_bench.py",
    "compiler/test_llvm_numbers.py",
    "compiler/test_llvm_matmul.py",
    "test_network_contract.py",
    "cli/test_commands.py",
    "compiler/test_llvm_random.py",
    "drawing/test_picture.py",
    "compiler/test_ecosystem.py",
)
"""Files of more than fifteen seconds, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: begun last, one would keep a single worker busy while the others have nothing left."""
    place = {ROOT / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a file stay on one worker, which traces and compiles their cells once; two would do so twice."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if file.endswith(APART) else file

    if config.getoption("dist") != "load":
        return None
    config.option.loadscopereorder = False  # by the number of tests: their time is another matter
    return ByFile(config, log)


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
