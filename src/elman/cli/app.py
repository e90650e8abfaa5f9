"""The commands of ``elman``, put together."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import bench, draw, look, train, use

__all__ = ["app"]


class TrainFirst(TyperGroup):
    """The commands with what comes first in use first."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: name != "train")


app = typer.Typer(
    name="elman",
    cls=TrainFirst,
    help="Recurrent sequence models: write the recurrence, get the kernel.",
    epilog="Results go to stdout, progress to stderr. "
    "Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if sys.stdout and sys.stdout.isatty() else None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("elman"))
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    """Recurrent sequence models: write the recurrence, get the kernel."""


app.add_typer(train.app, name="train")
app.command("resume")(train.resume)
app.command("evaluate")(use.evaluate)
app.command("generate")(use.generate)
app.command("score")(use.score)
app.command("cells")(look.cells)
app.command("explain")(look.explain)
app.command("draw")(draw.draw)
app.command("doctor")(look.doctor)
app.command("bench")(bench.bench)
