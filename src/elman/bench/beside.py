"""JAX beside elman: an environment of its own, made on demand in the cache folder, and the process that runs in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cachefolder import cache_directory
from ..errors import ElmanError
from .jax_scan import STEPS
from .rivals import Rival, WrongNumbers, gradients

__all__ = ["STEPS", "Jax", "NoJax", "jax_beside"]

TOLERANCE = 1e-3
"""Largest deviation of JAX's float32 from the loop by hand, relative to the largest value: sums over all steps."""


class NoJax(ElmanError):
    """JAX cannot be installed or does not start here."""


class Jax:
    """The process: it takes a cell with its weights, and runs it when it is its turn."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self._folder = process, folder
        self.version = self._answer()["jax"]

    def load(self, name: str, eager: Rival, xs: Tensor, weight: Tensor) -> float:
        """Compile a cell for these inputs; seconds that it took. Raises WrongNumbers where it computes otherwise."""
        given, got = self._folder / "given.npz", self._folder / "got.npz"
        arrays = {key: value.numpy() for key, value in eager.module.state_dict().items()}
        np.savez(given, xs=xs.detach().numpy(), weight=weight.numpy(), **arrays)
        seconds = self.ask(load=str(given), cell=name)["seconds"]
        self.ask(save=str(got))
        expected = gradients(eager, xs, weight)
        with np.load(got) as found:
            for key, value in expected.items():
                deviation = float((torch.from_numpy(found[key]) - value).abs().max() / value.abs().max())
                if not deviation <= TOLERANCE:
                    raise WrongNumbers(f"JAX, {name}: {key} differs by {deviation:.1e} of the largest.")
        return float(seconds)

    def milliseconds(self, mode: str) -> float:
        return float(self.ask(run=mode)["milliseconds"])

    def ask(self, **job: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise NoJax("JAX's process ended.")
        return json.loads(line)


@contextmanager
def jax_beside(threads: int) -> Iterator[Jax]:
    """JAX on so many threads. Raises NoJax where there is none to be had."""
    python = _environment()
    options = (
        f"--xla_cpu_multi_thread_eigen={'true' if threads > 1 else 'false'} intra_op_parallelism_threads={threads}"
    )
    environment = os.environ | {"XLA_FLAGS": options, "JAX_PLATFORMS": "cpu", "NPROC": str(threads)}
    command = [str(python), "-I", str(Path(__file__).with_name("jax_scan.py"))]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        ) as process,
    ):
        try:
            yield Jax(process, Path(folder))
        finally:
            process.kill()


def _environment() -> Path:
    """The Python of an environment with JAX; made where there is none yet."""
    folder = cache_directory() / f"jax-{sys.version_info.major}.{sys.version_info.minor}"
    python = folder / "bin" / "python"
    made = folder / "made"
    if not made.exists():
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "jax"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                said = done.stderr.strip().splitlines()
                raise NoJax(f"JAX could not be installed into {folder}: {said[-1] if said else command}")
        made.touch()
    return python
