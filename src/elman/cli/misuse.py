"""What the command line answers to words it does not understand: one paragraph, the nearest known one named."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from typing import Any

import typer

__all__ = ["CommandLineError", "describe", "report"]

# typer has carried its own click for some versions and used the package before; this finds its error in both.
CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]


def report(error: Any) -> None:
    """Say on stderr what was wrong; a command that was given no words at all is answered with its help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        print(f"elman: {describe(error)}", file=sys.stderr)


def describe(error: Any) -> str:
    """A mistake found by click, as one paragraph: what is wrong, the nearest known option, the usage."""
    message = " ".join(error.format_message().split())
    context = getattr(error, "ctx", None)
    if hasattr(error, "possibilities"):
        message = f"no such option: {error.option_name}."
        near = nearest(error.option_name, _options(context))
        if near is not None:
            message += f" Did you mean {near}?"
    message = message[:1].lower() + message[1:]
    if context is None:
        return message
    usage = " ".join(context.get_usage().split())
    commands = context.command.list_commands(context) if hasattr(context.command, "list_commands") else []
    known = f" (commands: {', '.join(commands)})" if commands else ""
    end = "" if message.endswith(("?", ".")) else "."
    return f"{message}{end} {usage}{known}; more with: {context.command_path} --help"


def nearest(given: str, known: Iterable[str]) -> str | None:
    """The known option that is most like ``given``: of which it is a longer form, or nearest in spelling."""
    options = sorted(known, key=len, reverse=True)
    longer = [option for option in options if len(option) > 3 and given.startswith(f"{option}-")]
    return next(iter(longer or difflib.get_close_matches(given, options, n=1)), None)


def _options(context: Any) -> list[str]:
    parameters = context.command.get_params(context) if context is not None else []
    return [name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts) if name[0] == "-"]
