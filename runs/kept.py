"""What the scripts of this folder share: their options, and how a result is kept, with how and where it was made."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from elman.doctor import describe_machine

__all__ = ["DOCS", "PICTURES", "RESULTS", "keep", "options", "significant"]

RESULTS = Path(__file__).resolve().parent / "results"
DOCS = RESULTS.parents[1] / "docs"
PICTURES = DOCS / "pictures"


def options(doc: str | None, out: Path, quick: str = "a few updates") -> argparse.ArgumentParser:
    """--quick and --out; the help is the docstring of the script. A script may add options of its own."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{quick}, to see that it runs; writes nothing")
    inside = out.relative_to(RESULTS.parents[1])
    parser.add_argument("--out", type=Path, default=out, help=f"where the result is kept (default {inside})")
    return parser


def keep(out: Path, facts: Mapping[str, object]) -> None:
    """Write facts as JSON, after the command and what it ran on.

    The command is without options: none of them changes what is computed, but --quick, which keeps nothing. The threads
    are those at the end; facts of the same names come instead.
    """
    made = {
        "command": f"python runs/{Path(sys.argv[0]).name}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": describe_machine()["processor"],
        "threads": torch.get_num_threads(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**made, **facts}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"kept in {out}")


def significant(value: float, digits: int = 4) -> float:
    """Value with so many digits that count."""
    return float(f"{value:.{digits}g}")
