"""Affine recurrences scanned in parallel over time, against the same programs step after step, in one run.

    python benchmarks/affine.py [--steps T] [--threads N] [--repeats N] [--out FILE]

Forward and backward with all gradients, float32, xs (T, B, H); the two take turns. Outputs are compared first.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

import elman
from elman.bench.machine import machine
from elman.compiler import affine
from elman.spec import make_cell

RESULTS = Path(__file__).resolve().parent / "results"

CELLS = ("mingru", "minlstm", "qrnn", "sru", "lru")
SHAPES = ((1, 64), (1, 256), (8, 64), (8, 128))


def training(cell: torch.nn.Module, xs: torch.Tensor) -> torch.Tensor:
    ys, _ = elman.scan(cell, xs, backend="interpret")
    ys.square().sum().backward()
    return ys.detach()


def compare(name: str, steps: int, batch: int, units: int, repeats: int) -> dict[str, object]:
    """Milliseconds of both ways, every repeat."""
    torch.manual_seed(0)
    cell, xs = make_cell(name, units, units), torch.randn(steps, batch, units)
    most, found, ys = affine.MOST_NUMBERS, {"in parallel": [], "step by step": []}, {}
    try:
        for turn in range(repeats + 1):  # the first one compiles
            for way, times in found.items():
                affine.MOST_NUMBERS = most if way == "in parallel" else 0
                begun = time.perf_counter()
                ys[way] = training(cell, xs)
                times += [1e3 * (time.perf_counter() - begun)] if turn else []
    finally:
        affine.MOST_NUMBERS = most
    torch.testing.assert_close(*ys.values(), rtol=1e-4, atol=1e-4)
    before, after = min(found["step by step"]), min(found["in parallel"])
    print(f"{name:<9}{steps}·{batch}·{units:<5}{before:8.1f} ms →{after:7.1f} ms{before / after:7.2f}×", flush=True)
    return {"cell": name, "shape": [steps, batch, units], "milliseconds": found, "ratio": before / after}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=1000)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--out", type=Path, default=RESULTS / "affine.json")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    rows = [compare(name, given.steps, *shape, given.repeats) for name in CELLS for shape in SHAPES]
    result = {"command": sys.argv, "machine": machine(), "threads": given.threads, "rows": rows}
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"kept in {given.out}")


if __name__ == "__main__":
    main()
