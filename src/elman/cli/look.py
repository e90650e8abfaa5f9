"""``elman cells``, ``explain`` and ``doctor``: what there is, what is computed, and whether it is right."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import nn

__all__ = ["cells", "doctor", "explain"]


def cells(
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """List the names of cells and combinators, with their options.

    Names nest to a spec, which train and explain take.

    Example: elman explain --cell "stack(3, residual(lstm(512, layer_norm)))"
    """
    from ..cells import CELLS
    from ..combinators import COMBINATORS
    from ..spec import COMMON, usage

    kinds: dict[str, Mapping[str, Any]] = {"cells": CELLS, "combinators": COMBINATORS}
    if as_json:
        print(
            json.dumps(
                {
                    what: {n: {"usage": usage(n), "says": summary(k)} for n, k in named.items()}
                    for what, named in kinds.items()
                }
            )
        )
        return
    print("cells, of any width (without one: --hidden)")
    entries(CELLS)
    print(
        f"  and with each of them {', '.join(f'{option}=…' for option in COMMON)}; your own: file.py:MyCell(width, …)\n"
    )
    print("combinators, around any cell")
    entries(COMBINATORS)
    print(
        '\nAn option alone is switched on, as in lstm(512, layer_norm). Names nest: "stack(3, residual(lstm(512)))" is'
        "\nthree layers, each with a shortcut past it."
    )


def entries(named: Mapping[str, Any]) -> None:
    """How each name is written and, below, the first sentence about it."""
    from ..spec import usage

    width = os.get_terminal_size().columns if sys.stdout.isatty() else 110
    for name, kind in named.items():
        same = next(other for other, kind_ in named.items() if kind_ is kind)
        written = textwrap.wrap(usage(name), width - 2, initial_indent="  ", subsequent_indent="      ")
        print("\n".join(written if same == name else [f"  {name}  is {same}"]))
        if same == name:
            print(textwrap.indent(textwrap.fill(summary(kind), width - 6), "      "))


def summary(kind: Any) -> str:
    """The first paragraph of what a class says about itself, without marks of typesetting."""
    return " ".join((kind.__doc__ or "").partition("\n\n")[0].replace("**", "").replace("``", "").split())


def explain(
    cell: Annotated[str, typer.Option(help="Cell, as for train: a name, file.py:MyCell or a spec.")] = "lstm",
    layers: Annotated[int, typer.Option(min=1, help="Times that the cell stands on top of itself.")] = 1,
    hidden: Annotated[int, typer.Option(min=1, help="Units of a cell whose width the spec does not say.")] = 256,
    inputs: Annotated[
        int | None, typer.Option("--input", min=1, help="Features of an input.", show_default="hidden")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Time steps T.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Sequences B.")] = 32,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Option of a cell that is one name; may be repeated.")
    ] = None,
    level: Annotated[
        str,
        typer.Option(
            help="plan: segments, loops, stages; program: every operation; code: what runs; kernel, ir, asm: the "
            "machine code of loops, as steps, for LLVM, and as assembly."
        ),
    ] = "plan",
) -> None:
    """Show how a cell is unfolded: backend and why, loops, code.

    Example: elman explain --cell lstm --hidden 512 --level code

    Example: elman explain --cell "stack(2, residual(gru(64)))"
    """
    import torch

    from ..combinators import Stack
    from ..config import parse_assignments
    from ..explaining import explain as describe
    from ..spec import parse_spec

    options = parse_assignments([f"cell.{assignment}" for assignment in option or []]).get("cell", {})
    spec, width = parse_spec(cell), inputs or hidden
    step = spec.make(width, hidden, **options)
    if layers > 1:
        step = Stack.build(width, lambda reads: spec.make(reads, hidden, **options), layers=layers)
    print(describe(step, torch.zeros(steps, batch, width), constants=constants(step, batch), level=level))


def constants(cell: nn.Module, batch: int) -> Any:
    """Zeros in the place of what combinators inside read beside the input, with 8 places in a memory; or None."""
    import torch

    from ..combinators import Attend, Conditioned

    found = {
        part.key: torch.zeros(batch, part.context_size) for part in cell.modules() if isinstance(part, Conditioned)
    }
    found |= {part.key: torch.zeros(batch, 8, part.memory_size) for part in cell.modules() if isinstance(part, Attend)}
    return found.get(None) if not found.keys() - {None} else found


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
        print("self-check: scan against a loop written by hand in float64, largest deviation")
        longest = max(len(check["cell"]) for check in checks)
        for check in checks:
            mark = "ok" if check["ok"] else "WRONG"
            print(
                f"  {check['backend']:<11}{check['cell']:<{longest}} {check['precision']:<8} "
                f"values {check['values']:.1e}  "
                f"gradients {check['gradients']:.1e}  {mark}"
            )
    if not all(check["ok"] for check in checks):
        raise typer.Exit(1)
