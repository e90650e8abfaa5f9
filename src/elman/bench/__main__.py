"""``python -m elman.bench {"…": …}``: the process that measures, its threads as those of any script of a user."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ..doctor import describe_machine
from ..errors import ElmanError
from .suite import Plan, measure
from .targets import table, targets

__all__ = ["main"]


def main() -> None:
    given = json.loads(sys.argv[1])
    plan = Plan.quickly(tuple(given["plan"].get("counts", (1,)))) if given["quick"] else planned(given["plan"])
    print(*(f"{name}: {fact}" for name, fact in machine().items()), sep="\n")
    result = {"command": given["command"], "machine": machine(), "whole": plan.whole}
    try:
        result |= measure(plan, lambda line: print(line, flush=True))
    except ElmanError as error:
        sys.exit(f"elman: {error}")
    result["targets"] = [target.kept() for target in targets(result)]
    print(f"\nGEMM, GFLOP/s by threads: {result['gemm gflops']}\n")
    print(*table(targets(result)), sep="\n")
    if given["out"]:
        out = Path(given["out"])
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"\nkept in {out}")


def planned(given: dict[str, Any]) -> Plan:
    """The plan of what was asked for, with the lists of JSON as tuples."""
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    if "shapes" in fields:
        fields["shapes"] = tuple(map(tuple, fields["shapes"]))
    return Plan(**fields)


def machine() -> dict[str, Any]:
    """What the figures are of: processor, versions, commit."""
    facts = describe_machine()
    return {
        "processor": facts["processor"],
        "vectors": facts["vectors"],
        "cores": len(_cores()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": facts["packages"],
        "commit": commit(),
    }


def _cores() -> range | set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def commit() -> str:
    """The commit of this source, with -dirty where files differ from it; empty where it is installed without one."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


if __name__ == "__main__":
    main()
