"""Scripts in processes of their own that begin with PyTorch loaded: forks of one that has loaded it and done nothing.

Of elman nothing is loaded and nothing has been computed, so that such a process is one that a user starts, less the two
seconds of the processor's in which it would load PyTorch and what PyTorch's optimisers need.
"""

from __future__ import annotations

import os
import runpy
import sys
import warnings
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path

__all__ = ["started"]

_forks = get_context("forkserver")
_forks.set_forkserver_preload(["torch._dynamo", "matplotlib.pyplot"])


def started(script: Path | None, *arguments: object, folder: Path, **environment: str) -> ForkServerProcess:
    """``python -B -W error script arguments`` in a folder, by default ``-m elman``, on one thread.

    It writes to the files out.txt and err.txt beside the folder.
    """
    given = (script, [*map(str, arguments)], folder, {**os.environ, **environment})
    process = _forks.Process(target=_main, args=given)
    process.start()
    return process


def _main(script: Path | None, arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
    for number, name in ((1, "out.txt"), (2, "err.txt")):
        os.dup2(os.open(folder.parent / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.modules["torch"].set_num_threads(1)
    sys.dont_write_bytecode = True
    warnings.simplefilter("error")
    sys.argv = ["elman" if script is None else str(script), *arguments]
    if script is None:
        runpy.run_module("elman", run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")
