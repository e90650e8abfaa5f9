"""``python -m elman.bench {"…": …}``: the process that measures, its threads as those of any script of a user."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ..errors import ElmanError
from .machine import machine
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


if __name__ == "__main__":
    main()
