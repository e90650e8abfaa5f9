"""Cells by a short spec: ``lstm``, ``gru(512, reset_after=false)``, ``stack(3, residual(my.py:MyCell(256)))``.

    spec    name | name(argument, …) | file.py:Class | file.py:Class(argument, …)
    argument  value | option=value | option        an option alone is switched on
    value   number | word | 'text' | [value, …] | spec

The first number of a cell is its width H; where there is none it is the one given beside the spec. Further values
stand for the options in the order in which the constructor declares them. Nothing is evaluated.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, Union

from torch import nn

from .cells import CELLS, Common, load_user_cell
from .combinators import COMBINATORS
from .errors import OptionError

__all__ = ["Spec", "make_cell", "parse_spec"]

Value: TypeAlias = Union[int, float, str, bool, "Spec", list["Value"], None]

_TOKEN = re.compile(
    r"""\s*(?:(?P<text>'[^']*'|"[^"]*")
    |(?P<file>[^\s(),=\[\]'"]+\.py:[A-Za-z_]\w*)
    |(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]))
    |(?P<word>[A-Za-z_]\w*(?::[-+]?[\d.]+)?)
    |(?P<mark>[(),=\[\]]))""",
    re.VERBOSE,
)
_WORDS = {"true": True, "false": False, "none": None}
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_IN_PYTHON = ("device", "dtype")
"""Options of cells that are set elsewhere than in a spec."""
_EXAMPLE = "stack(3, residual(lstm(512, layer_norm)))"


def make_cell(spec: str, input_size: int, hidden_size: int, **options: Any) -> nn.Module:
    """The cell that ``spec`` describes, for inputs of ``input_size`` features; H is ``hidden_size`` where it has none.

    ``options`` are further keywords of the outermost cell. Raises OptionError for a spec that cannot be read, an
    unknown cell, combinator or option (with the nearest known one) or an impossible value; CellError for a user's
    file whose class is no cell, and for parts that do not fit together.
    """
    return parse_spec(spec).make(input_size, hidden_size, **options)


def parse_spec(text: str) -> Spec:
    """The structure of a spec. Raises OptionError that shows where it cannot be read on."""
    name = text.strip()
    file, colon, kind = name.rpartition(":")
    if colon and kind.isidentifier() and (Path(file).is_file() or not re.search(r"[(),=\[\]'\"]", file)):
        return Spec(kind, file)  # a file name may hold anything when it stands alone
    if name.endswith(".py"):
        raise OptionError(f"which class of {text!r}? Write file and class, for example {name + ':MyCell'!r}.")
    return _Parser(text).whole()


@dataclass(frozen=True)
class Spec:
    """One name of a spec with its arguments; ``file`` for a class of a user's file."""

    name: str
    file: str | None = None
    arguments: tuple[Value, ...] = ()
    options: tuple[tuple[str, Value], ...] = ()
    called: bool = False

    def __str__(self) -> str:
        name = self.name if self.file is None else f"{self.file}:{self.name}"
        if self.file is not None and re.search(r"[\s(),=\[\]'\"]", self.file) and self.called:
            name = f'"{name}"'
        parts = [*map(_shown, self.arguments), *(f"{k}={_shown(v)}" for k, v in self.options)]
        return f"{name}({', '.join(parts)})" if self.called else name

    def nested(self) -> Iterator[Spec]:
        """This spec and all specs inside it that are cells, outermost first."""
        yield self
        for argument in self.arguments:
            if isinstance(argument, Spec):
                yield from argument.nested()

    @property
    def files(self) -> list[str]:
        """The users' files that it names, each once."""
        return list(dict.fromkeys(spec.file for spec in self.nested() if spec.file is not None))

    def moved(self, files: dict[str, str]) -> Spec:
        """The same spec with other paths for the users' files."""
        arguments = tuple(a.moved(files) if isinstance(a, Spec) else a for a in self.arguments)
        return replace(self, file=files[self.file] if self.file else None, arguments=arguments)

    def make(self, input_size: int, hidden_size: int, **more: Any) -> nn.Module:
        """Build it; see ``make_cell``."""
        if self.file is None and self.name in COMBINATORS:
            return self._combine(input_size, hidden_size, more)
        if not self._known:
            raise OptionError.unknown("cell", self.name, [*sorted({*CELLS, *COMBINATORS}), "file.py:MyCell"])
        kind = CELLS[self.name] if self.file is None else load_user_cell(self.file, self.name).kind
        sizes = list(inspect.signature(kind.__init__).parameters)[1:3]  # whatever a user's constructor calls them
        known, positional = _parameters(kind.__init__, *sizes)
        values = list(self._values(known))
        if values and isinstance(values[0], int):
            hidden_size = values.pop(0)  # type: ignore[assignment]
        options = self._options(known, positional, values, more)
        if self.file is None:
            return kind(input_size, hidden_size, **options)
        cell = load_user_cell(self.file, self.name).make(input_size, hidden_size, **options)
        if not hasattr(cell, "input_size"):  # what is built around it must know
            cell.input_size = input_size  # type: ignore[assignment]
        return cell

    def _combine(self, input_size: int, hidden_size: int, more: dict[str, Any]) -> nn.Module:
        kind = COMBINATORS[self.name]
        known, positional = _parameters(kind.build, "input_size", "make")
        several = "makes" in inspect.signature(kind.build).parameters
        inside, within = _parameters(kind.__init__, "cell", "cells", *known)
        known, positional = known + inside, positional + within
        values = list(self._values(known))
        cells = [value for value in values if isinstance(value, Spec)]
        for cell in cells:
            if not cell._known:
                names = sorted({*CELLS, *COMBINATORS, *known})
                raise OptionError.unknown(f"cell or option in {self.name}(…)", cell.name, names)
        if not cells or (len(cells) > 1 and not several):
            given = "none" if not cells else f"{len(cells)}: {', '.join(map(str, cells))}"
            raise OptionError(
                f"{self.name} goes around {'cells' if several else 'one cell'}; it was given {given}. "
                f"Write for example {self.name}(lstm)."
            )
        plain: list[Value] = [value for value in values if not isinstance(value, Spec)]
        options = self._options(known, positional, plain, more)
        makes = [lambda reads, cell=cell: cell.make(reads, hidden_size) for cell in cells]
        return kind.build(input_size, *makes, **options)

    def _values(self, known: list[str]) -> Iterator[Value]:
        """The arguments that are not options switched on."""
        return (a for a in self.arguments if not (isinstance(a, Spec) and a._flag(known)))

    def _options(
        self, known: list[str], positional: list[str], values: list[Value], more: dict[str, Any]
    ) -> dict[str, Any]:
        """The options of one name: by position, switched on, by name."""
        for value in values:
            if isinstance(value, Spec) and value._known:
                raise OptionError(f"{self}: {self.name} is no combinator, so {value} cannot stand in it.")
            if isinstance(value, Spec):
                raise OptionError.unknown(f"option of {self.name!r}", value.name, sorted(known))
        if len(values) > len(positional):
            taken = f"only for {', '.join(positional)}" if positional else "for none of its options"
            raise OptionError(
                f"{self}: {self.name} takes a value without a name {taken}. Write option=value; it has the options "
                f"{', '.join(sorted(known))}."
            )
        flags = [(a.name, True) for a in self.arguments if isinstance(a, Spec) and a._flag(known)]
        found: dict[str, Any] = {}
        for name, value in [*zip(positional, values, strict=False), *flags, *self.options, *more.items()]:
            if name not in known and "**" not in known and not (name in more and name in _IN_PYTHON):
                raise OptionError.unknown(f"option of {self.name!r}", name, sorted(known))
            if name in found:
                raise OptionError(f"{self}: {name} is given twice.")
            found[name] = _plain(value)
        return found

    @property
    def _known(self) -> bool:
        return self.file is not None or self.name in CELLS or self.name in COMBINATORS

    def _flag(self, known: list[str]) -> bool:
        """Whether it is no cell but an option that is switched on."""
        return self.file is None and not self.called and self.name in known


def _parameters(function: Any, *without: str) -> tuple[list[str], list[str]]:
    """The options that a constructor takes, and those that may stand without a name, in order."""
    parameters = list(inspect.signature(function).parameters.values())
    several = any(p.kind is p.VAR_POSITIONAL and p.name == "makes" for p in parameters)
    named, positional = list[str](), list[str]()
    for parameter in parameters:
        if parameter.name == "common":
            named += [name for name in Common.__annotations__ if name not in _IN_PYTHON]
        elif parameter.kind is parameter.VAR_KEYWORD and function.__module__.startswith("elman_user_cell"):
            named.append("**")
        elif parameter.name not in ("self", *without, *_IN_PYTHON) and parameter.kind in _NAMED:
            named.append(parameter.name)
            if several or parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                positional.append(parameter.name)
    return [name for name in named if name not in without], positional


def _plain(value: Value) -> Any:
    """A value as a constructor takes it: a word is text, or true, false, none."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, Spec):
        return _WORDS.get(value.name.lower(), value.name) if not value.called and value.file is None else str(value)
    return value


def _shown(value: Value) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return repr(value) if isinstance(value, str) else str(value)


class _Parser:
    """Recursive descent over the tokens of one spec."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.kind, self.token = self._next()

    def whole(self) -> Spec:
        spec = self._value("a cell")
        if not isinstance(spec, Spec):
            raise self._error("a spec begins with the name of a cell")
        if self.kind:
            raise self._error("nothing may follow the closing parenthesis")
        return spec

    def _next(self) -> tuple[str, str]:
        self.begin = len(self.text) - len(self.text[self.at :].lstrip())
        if self.begin == len(self.text):
            return "", ""
        match = _TOKEN.match(self.text, self.at)
        if match is None:
            raise self._error("this cannot be read")
        self.at = match.end()
        kind = match.lastgroup or ""
        return kind, match[kind]

    def _take(self) -> str:
        token = self.token
        self.kind, self.token = self._next()
        return token

    def _value(self, expected: str) -> Value:
        if self.kind == "number":
            token = self._take()
            return int(token) if re.fullmatch(r"[-+]?\d+", token) else float(token)
        if self.kind == "text" and ".py:" not in self.token:
            return self._take()[1:-1]
        if self.token == "[":
            self._take()
            return self._series("]", lambda: self._value("a value"))
        if self.kind not in ("word", "file", "text"):
            raise self._error(f"{expected} is missing here")
        return self._spec()

    def _spec(self) -> Spec:
        file, name = None, self._take().strip("'\"")
        if ".py:" in name:
            file, _, name = name.rpartition(":")
        if self.token != "(":
            return Spec(name, file)
        self._take()
        pairs = self._series(")", self._argument)
        positional = tuple(value for key, value in pairs if key is None)
        return Spec(name, file, positional, tuple((k, v) for k, v in pairs if k is not None), called=True)

    def _argument(self) -> tuple[str | None, Value]:
        value = self._value("an argument")
        if self.token != "=":
            return None, value
        if not isinstance(value, Spec) or value.called:
            raise self._error("before '=' stands the name of an option")
        self._take()
        return value.name, self._value("a value")

    def _series(self, end: str, item: Any) -> list[Any]:
        found: list[Any] = []
        while self.token != end:
            found.append(item())
            if self.token not in (",", end):
                raise self._error(f"',' or {end!r} is missing here")
            if self.token == ",":
                self._take()
        self._take()
        return found

    def _error(self, what: str) -> OptionError:
        mark = " " * self.begin + "^"
        return OptionError(f"{what}:\n  {self.text}\n  {mark}\nA cell is written as lstm, or {_EXAMPLE}.")
