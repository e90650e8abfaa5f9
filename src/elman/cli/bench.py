"""``elman bench``: what cells cost beside their rivals."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import OptionError

__all__ = ["bench"]


def bench(
    cell: Annotated[list[str] | None, typer.Option(help="A cell of the table; may be repeated.")] = None,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="T,B,H[,I]", help="Steps, batch, units and inputs; may be repeated.")
    ] = None,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="May be repeated; without: 1 and 2.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="See within seconds that everything runs.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep the result as JSON.")] = None,
) -> None:
    """Measure speed and memory beside PyTorch, torch.compile and JAX, correctness first.

    All of it takes about fifteen minutes, and JAX is installed for it, into the cache folder. Times mean something only
    where nothing else is running.

    Example: elman bench --cell "peephole LSTM" --shape 128,32,256 --threads 2
    """
    from ..bench.cells import CELLS
    from ..bench.suite import NARROW

    plan: dict[str, Any] = {"counts": sorted(set(threads or (1, 2)))}
    for name in cell or ():
        if name not in CELLS:
            raise OptionError.unknown("cell", name, tuple(CELLS))
    if cell:
        plan["cells"] = cell
        plan["narrow"] = [name for name in cell if name in NARROW]
    if shape:
        plan["shapes"] = [_sizes(text) for text in shape]
    if quick and (cell or shape):
        raise OptionError("--quick measures cells and a size of its own: leave out --cell and --shape, or --quick.")
    if cell or shape:
        plan["extras"] = False
    part = quick or cell or shape or plan["counts"] != [1, 2]
    if part and out is not None and _is_whole(out):
        raise OptionError(f"{out} holds the result of a whole run, and this is a part of one: give --out another name.")
    if quick:
        plan["counts"] = sorted(set(threads or (1,)))
    options = [("--cell", cell), ("--shape", shape), ("--threads", map(str, threads or ())), ("--quick", [""] * quick)]
    words = [word for option, values in options for value in values or () for word in (option, value) if word]
    command = shlex.join(["elman", "bench", *words])  # where it is kept, and from where, changes nothing
    job = {"plan": plan, "quick": quick, "out": str(out) if out else None, "command": command}
    # A process of its own: the command line has threads wait without spinning, which a user's script has not, and which
    # some of PyTorch's layers are slower for.
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-m", "elman.bench", json.dumps(job)], env=environment, check=False)
    if done.returncode:
        raise typer.Exit(1)


def _sizes(text: str) -> tuple[int, int, int, int]:
    """T, B, I, H of a shape as written."""
    numbers = text.split(",")
    if len(numbers) not in (3, 4) or not all(n.strip().isdecimal() and int(n) for n in numbers):
        raise OptionError(f"a shape is T,B,H or T,B,H,I in positive whole numbers, as in 128,32,256; got {text!r}.")
    steps, batch, hidden, *inputs = map(int, numbers)
    return steps, batch, inputs[0] if inputs else hidden, hidden


def _is_whole(path: Path) -> bool:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(kept, dict) and kept.get("whole") is True
