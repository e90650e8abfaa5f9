"""The command line: options in, results to stdout, progress and errors to stderr, exit code 0, 1 or 2."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import ElmanError, UnfoldWarning, UsageError
from .app import app

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
    try:
        with _plain_warnings():
            app(args=[argument for argument in given if argument != "--debug"], prog_name="elman")
    except ElmanError as error:
        if debug:
            raise
        _fail(str(error), 2 if isinstance(error, UsageError) else 1)
    except OSError as error:
        if debug:
            raise
        name = f"{error.filename}: " if error.filename else ""
        _fail(f"{name}{error.strerror or error}.", 1)


def _fail(message: str, code: int) -> None:
    print(f"elman: {message}", file=sys.stderr)
    sys.exit(code)


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
