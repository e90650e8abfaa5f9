"""The command line: options in, results to stdout, progress and errors to stderr, exit code 0, 1 or 2."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

from ..errors import ElmanError, UnfoldWarning, UsageError
from .app import app
from .misuse import CommandLineError, report

__all__ = ["app", "main"]

# Before torch is loaded: threads that spin while they wait make training several times slower as soon as anything else
# wants a core, and save nothing measurable where nothing does.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``elman`` with these arguments, or those of the process, and leave with its exit code.

    0: done. 1: failed. 2: wrong usage. 130: stopped by Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given or bool(os.environ.get("ELMAN_DEBUG"))
    _prepare_output()
    try:
        with _plain_warnings():
            code = app([word for word in given if word != "--debug"], prog_name="elman", standalone_mode=False)
        sys.stdout.flush()
    except ElmanError as error:
        if debug:
            raise
        _fail(str(error), 2 if isinstance(error, UsageError) else 1)
    except CommandLineError as error:
        report(error)
        sys.exit(2)
    except typer.Abort:
        sys.exit(130)
    except BrokenPipeError:  # nobody reads on, as with ``elman generate RUN | head``
        _settle_output()
        sys.exit(1)
    except OSError as error:
        _settle_output()
        if debug:
            raise
        name = f"{error.filename}: " if error.filename else ""
        _fail(f"{name}{error.strerror or error}.", 1)
    sys.exit(code)


def _fail(message: str, code: int) -> NoReturn:
    print(f"elman: {message}", file=sys.stderr)
    sys.exit(code)


def _prepare_output() -> None:
    """Streams that were closed go nowhere; a symbol that a terminal cannot show is escaped."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (for as long as the process runs)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 (for as long as the process runs)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _settle_output() -> None:
    """Write what is left in the buffer, or drop it where nothing can be written: Python would complain at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show elman's warnings as one paragraph each, without the line of elman that gave them."""
    ordinary = warnings.formatwarning

    def paragraph(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
        if issubclass(category, UnfoldWarning):
            return f"warning: {message}\n"
        return ordinary(message, category, *place, **more)

    warnings.formatwarning = paragraph
    try:
        yield
    finally:
        warnings.formatwarning = ordinary
