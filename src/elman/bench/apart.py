"""What has to be measured in a fresh process: the memory of a training step, and the first call of a cell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .cells import CELLS
from .rivals import WAYS, rivals
from .timing import milliseconds, significant

__all__ = ["first_calls", "peak_memory"]

Shape = tuple[int, int, int, int]


def peak_memory(name: str, way: str, shape: Shape, threads: int) -> float | None:
    """MiB that a training step adds to the resident size of a process; None where the system does not tell.

    The process has made one step before, on a twentieth of the length.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    return float(_apart("memory", name, way, list(shape), threads)["MiB"])


def first_calls(names: tuple[str, ...], hidden: int, threads: int) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds of the first training step of cells, and of the third, by how things stand: B 1, T as named.

    The process has unfolded another cell before, so that libraries are loaded. ``T 16``, ``T 1024``: nothing is
    cached; ``T 16, cached``: a process before it left its machine code on disk. ``fresh process``: that other cell,
    small, which found nothing loaded.
    """
    found = {}
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        for label, steps, cache in (("T 16", 16, one), ("T 1024", 1024, other), ("T 16, cached", 16, one)):
            found[label] = _apart("first", list(names), steps, hidden, threads, cache=cache)
    return found


def _apart(*job: Any, cache: str | None = None) -> Any:
    """What a job gives that runs in a process of its own."""
    command = [sys.executable, "-m", "elman.bench.apart", json.dumps(job)]
    environment = os.environ | ({} if cache is None else {"ELMAN_CACHE": cache})
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def _memory(name: str, way: str, shape: list[int], threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    steps, batch, inputs, hidden = shape
    rival = rivals(name, inputs, hidden, (way,))[way]
    short = torch.randn(max(2, steps // 20), batch, inputs, requires_grad=True)
    rival.train(short, torch.ones(len(short), batch, hidden))
    xs, weight = torch.randn(steps, batch, inputs, requires_grad=True), torch.ones(steps, batch, hidden)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from the present size
    before = _resident("VmRSS")
    rival.train(xs, weight)
    return {"MiB": significant((_resident("VmHWM") - before) / 1024)}


def _resident(which: str) -> int:
    """VmRSS, the present resident size of this process, or VmHWM, its peak, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(which)).split()[1])


def _first(names: list[str], steps: int, hidden: int, threads: int) -> dict[str, dict[str, float]]:
    torch.set_num_threads(threads)
    found = {}
    for label, name, size in [("fresh process", "Elman", 8), *((name, name, hidden) for name in names)]:
        assert name in CELLS
        rival = rivals(name, size, size, (WAYS[0],))[WAYS[0]]
        xs, weight = torch.randn(steps, 1, size, requires_grad=True), torch.ones(steps, 1, size)
        first, _, third = (milliseconds(partial(rival.train, xs, weight)) for _ in range(3))
        found[label] = {"first": significant(first), "third": significant(third)}
    return found


def main() -> None:
    what, *given = json.loads(sys.argv[1])
    print(json.dumps({"memory": _memory, "first": _first}[what](*given)))  # type: ignore[operator]


if __name__ == "__main__":
    main()
