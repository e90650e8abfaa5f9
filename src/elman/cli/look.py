"""``elman explain`` and ``doctor``: what is computed, and whether it is right."""

from __future__ import annotations

import json
from typing import Annotated

import typer

__all__ = ["doctor", "explain"]


def explain(
    cell: Annotated[str, typer.Option(help="Cell, or file.py:MyCell.")] = "lstm",
    layers: Annotated[int, typer.Option(min=1, help="Cells on top of one another.")] = 1,
    hidden: Annotated[int, typer.Option(min=1, help="Units of each layer.")] = 256,
    inputs: Annotated[
        int | None, typer.Option("--input", min=1, help="Features of an input.", show_default="hidden")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Time steps T.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Sequences B.")] = 32,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Option of the cell; may be repeated.")
    ] = None,
    level: Annotated[
        str, typer.Option(help="plan: segments, loops, stages; program: every operation; code: what runs.")
    ] = "plan",
) -> None:
    """Show how a cell is unfolded: backend and why, loops, code.

    Example: elman explain --cell lstm --hidden 512 --level code
    """
    import torch

    from ..config import parse_assignments
    from ..explaining import explain as describe
    from ..spec import make_cell

    options = parse_assignments([f"cell.{assignment}" for assignment in option or []]).get("cell", {})
    width = inputs or hidden
    for layer in range(layers):
        step = make_cell(cell, width, hidden, **options)
        if layers > 1:
            print(f"layer {layer + 1}")
        print(describe(step, torch.zeros(steps, batch, width), level=level))
        width = getattr(step, "output_size", hidden)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show versions and devices, and check that the numbers are right.

    Exit code 1 when a number is wrong.
    """
    from ..doctor import check_numbers, describe_machine

    facts = describe_machine()
    checks = check_numbers()
    if as_json:
        print(json.dumps(facts | {"checks": checks}))
    else:
        for name, fact in facts.items():
            print(f"{name:<14}{', '.join(fact) if isinstance(fact, list) else fact}")
        print("self-check: scan against a loop written by hand, float64, largest deviation")
        for check in checks:
            mark = "ok" if check["ok"] else "WRONG"
            print(
                f"  {check['backend']:<11}{check['cell']:<7} values {check['values']:.1e}  "
                f"gradients {check['gradients']:.1e}  {mark}"
            )
    if not all(check["ok"] for check in checks):
        raise typer.Exit(1)
