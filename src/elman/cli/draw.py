"""``elman draw``: the picture of a cell, into a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["draw"]


def draw(
    out: Annotated[Path, typer.Argument(metavar="FILE", help="The picture to write, .svg or .png.")],
    cell: Annotated[str, typer.Option(help="Cell, as for train: a name, file.py:MyCell or a spec.")] = "lstm",
    hidden: Annotated[int, typer.Option(min=1, help="Units of a cell whose width the spec does not say.")] = 256,
    inputs: Annotated[
        int | None, typer.Option("--input", min=1, help="Features of an input.", show_default="hidden")
    ] = None,
    unroll: Annotated[int, typer.Option(help="Steps to draw side by side; 0: one step, with its delays.")] = 0,
    loss: Annotated[bool, typer.Option("--loss", help="Add loss and target to every output.")] = False,
    detail: Annotated[bool, typer.Option("--detail", help="Show the inside of cells.")] = False,
) -> None:
    """Draw a cell as circuit diagram, or unrolled in time.

    Example: elman draw net.svg --cell "stack(2, residual(gru(64)))" --unroll 4
    """
    from ..drawing import draw as picture_of
    from ..spec import parse_spec
    from .look import constants

    step = parse_spec(cell).make(inputs or hidden, hidden)
    picture_of(step, unroll=unroll, loss=loss, detail=detail, path=out, constants=constants(step, 1))
    print(out)
