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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeAlias, Union, get_args, get_origin, get_type_hints

from torch import nn

from .cells import CELLS, Common, load_user_cell
from .combinators import COMBINATORS
from .errors import OptionError

__all__ = ["COMMON", "Option", "Spec", "make_cell", "parse_spec", "usage"]

Value: TypeAlias = Union[int, float, str, bool, "Spec", list["Value"], None]

_TOKEN = re.compile(
    r"""\s*(?:(?P<text>'[^']*'|"[^"]*")
    |(?P<file>[^\s(),=\[\]'"]+\.py:[A-Za-z_]\w*)
    |(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]))
    |(?P<word>[A-Za-z_][\w.]*(?::[-+]?[\d.]+)?)
    |(?P<mark>[(),=\[\]]))""",
    re.VERBOSE,
)
_NONE = inspect.Parameter.empty
_IN_PYTHON = ("device", "dtype")
"""Options of cells that are set elsewhere than in a spec."""
COMMON = tuple(name for name in Common.__annotations__ if name not in _IN_PYTHON)
"""Options of every cell of ours; the defaults are the cell's own."""
_UNIONS = (Union, UnionType)
_SERIES = (list, tuple, Sequence)
_WORDS_FOR = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", NoneType: "none"}
_WORDS = {"true": True, "false": False, "none": None}
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_EXAMPLE = "stack(3, residual(lstm(512, layer_norm)))"


def make_cell(spec: str, input_size: int, hidden_size: int, **options: Any) -> nn.Module:
    """The cell that ``spec`` describes, for inputs of ``input_size`` features; H is ``hidden_size`` where it has none.

    ``options`` are further keywords of a cell that is one name. Raises OptionError for a spec that cannot be read, an
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
    def names(self) -> list[str]:
        """The outermost name and those of the cells inside, each once, in small letters."""
        cells = [spec for spec in self.nested() if spec.file is not None or spec.name in CELLS]
        return list(dict.fromkeys(spec.name.lower() for spec in (self, *cells)))

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
        user = None if self.file is None else load_user_cell(self.file, self.name)
        options = _of_cell(CELLS[self.name] if user is None else user.kind, user is None)
        values = list(self._values(options))
        if values and isinstance(values[0], int):
            hidden_size = values.pop(0)  # type: ignore[assignment]
        given = self._given(options, values, more)
        if user is None:
            return CELLS[self.name](input_size, hidden_size, **given)
        cell = user.make(input_size, hidden_size, **given)
        if not hasattr(cell, "input_size"):  # what is built around it must know
            cell.input_size = input_size  # type: ignore[assignment]
        return cell

    def _combine(self, input_size: int, hidden_size: int, more: dict[str, Any]) -> nn.Module:
        kind = COMBINATORS[self.name]
        if more:
            raise OptionError(
                f"{self} is made of several cells, so whose {', '.join(more)} is meant is open. Write options into "
                f"the spec, behind the name that they belong to, as in {_EXAMPLE}."
            )
        options = _of_combinator(kind)
        values = list(self._values(options))
        cells = [value for value in values if isinstance(value, Spec) and value._known]
        plain = [value for value in values if value not in cells]
        for value in plain:
            if isinstance(value, Spec) and not (cells and value._word_for(plain, options)):
                names = sorted({*CELLS, *COMBINATORS, *(option.name for option in options)})
                raise OptionError.unknown(f"cell or option in {self.name}(…)", value.name, names)
        several = _several(kind)
        if not cells or (len(cells) > 1 and not several):
            given = "none" if not cells else f"{len(cells)}: {', '.join(map(str, cells))}"
            raise OptionError(
                f"{self.name} goes around {'cells' if several else 'one cell'}; it was given {given}. "
                f"It is written {usage(self.name)}."
            )
        found = self._given(options, plain, {})
        makes = [lambda reads, cell=cell: cell.make(reads, hidden_size) for cell in cells]
        return kind.build(input_size, *makes, **found)

    def _values(self, options: list[Option]) -> Iterator[Value]:
        """The arguments that are not options switched on."""
        return (a for a in self.arguments if not (isinstance(a, Spec) and a._flag(options)))

    def _usage(self, options: list[Option]) -> str:
        return usage(self.name) if self.file is None else _written(self.name, "width", options)

    def _given(self, options: list[Option], values: list[Value], more: dict[str, Any]) -> dict[str, Any]:
        """The options of one name: by position, switched on, by name."""
        known = {option.name: option for option in options}
        for value in values:
            if isinstance(value, Spec) and value._known:
                raise OptionError(f"{self}: {self.name} is no combinator, so {value} cannot stand in it.")
            if isinstance(value, Spec) and not value._word_for(values, options):
                raise OptionError.unknown(f"option of {self.name!r}", value.name, sorted(known))
        positional = [option.name for option in options if option.positional]
        if len(values) > len(positional):
            width = [] if self.file is None and self.name in COMBINATORS else ["its width, a whole number"]
            taken = f"only for {', '.join([*width, *positional])}" if width or positional else "for none of its options"
            raise OptionError(
                f"{self}: {self.name} takes a value without a name {taken}. Write option=value; it has the options "
                f"{', '.join(sorted(known))}."
            )
        flags = [(a.name, True) for a in self.arguments if isinstance(a, Spec) and a._flag(options)]
        found: dict[str, Any] = {}
        for name, value in [*zip(positional, values, strict=False), *flags, *self.options]:
            if name not in known and "**" not in known:
                raise OptionError.unknown(f"option of {self.name!r}", name, sorted(known))
            if name in found:
                raise OptionError(f"{self}: {name} is given twice.")
            found[name] = _plain(value)
            if name in known and not _fits(found[name], known[name].hint):
                raise OptionError(
                    f"{self}: {name} must be {_words_for(known[name].hint)}, got {_shown(value)}. It is written "
                    f"{self._usage(options)}."
                )
        for name, value in more.items():
            if name not in known and "**" not in known and name not in _IN_PYTHON:
                raise OptionError.unknown(f"option of {self.name!r}", name, sorted(known))
            if name in found:
                raise OptionError(f"{self}: {name} is given twice.")
            found[name] = value
        missing = [option.name for option in options if option.default is _NONE and option.name not in found]
        if missing:
            needs = f"{self.name} needs {' and '.join(missing)}"
            raise OptionError(f"{self}: {needs}. It is written {self._usage(options)}.")
        return found

    @property
    def _known(self) -> bool:
        return self.file is not None or self.name in CELLS or self.name in COMBINATORS

    def _flag(self, options: list[Option]) -> bool:
        """Whether it is no cell but an option that is switched on."""
        return self.file is None and not self.called and any(option.name == self.name for option in options)

    def _word_for(self, values: list[Value], options: list[Option]) -> bool:
        """Whether it is a word that stands, among the values without a name, where an option takes one."""
        positional = [option for option in options if option.positional]
        at = next(place for place, value in enumerate(values) if value is self)
        return not self.called and at < len(positional) and str in _kinds(positional[at].hint)


@dataclass(frozen=True)
class Option:
    """What a constructor takes besides sizes and cells; ``positional`` says that it may stand without its name."""

    name: str
    hint: Any
    default: Any
    positional: bool


def usage(name: str) -> str:
    """How a name is written in a spec, with its own options and their defaults: ``delay(cell, d)``."""
    if name in CELLS:
        own = [option for option in _of_cell(CELLS[name], True) if option.name not in COMMON]
        return _written(name, "width", own)
    kind = COMBINATORS[name]
    return _written(name, "cell, …" if _several(kind) else "cell", _of_combinator(kind))


def _written(name: str, first: str, options: list[Option]) -> str:
    shown = [o.name if o.default is _NONE else f"{o.name}={_default(o.default)}" for o in options if o.name != "**"]
    return f"{name}({', '.join([first, *shown])})"


def _of_cell(kind: type[nn.Module], ours: bool) -> list[Option]:
    """The options of a cell; the two sizes come first, whatever a user's constructor calls them."""
    sizes = list(inspect.signature(kind.__init__).parameters)[1:3]
    return _options(kind.__init__, ours, *sizes)


def _of_combinator(kind: Any) -> list[Option]:
    """The options of ``build``, and those of the constructor that it hands on."""
    outer = _options(kind.build, True, "input_size", "make", several=_several(kind))
    return outer + _options(kind.__init__, True, "cell", "cells", *(option.name for option in outer))


def _several(kind: Any) -> bool:
    """Whether a combinator goes around any number of cells."""
    return "makes" in inspect.signature(kind.build).parameters


def _options(function: Any, ours: bool, *without: str, several: bool = False) -> list[Option]:
    """What a function takes, in order; of ours, only what can be written in a spec."""
    hints = get_type_hints(function) if ours else {}
    found: list[Option] = []
    for parameter in inspect.signature(function).parameters.values():
        name = parameter.name
        if name == "common":
            common = get_type_hints(Common)
            found += [Option(n, common[n], None, False) for n in COMMON]
        elif parameter.kind is parameter.VAR_KEYWORD and not ours:
            found.append(Option("**", Any, None, False))
        elif name not in ("self", *without, *_IN_PYTHON) and parameter.kind in _NAMED:
            hint = hints.get(name, Any)
            if _writable(hint):
                positional = several or parameter.kind is parameter.POSITIONAL_OR_KEYWORD
                found.append(Option(name, hint, parameter.default, positional))
    return [option for option in found if option.name not in without]


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value that was read from a spec is of the kind that a constructor takes."""
    if hint is Any:
        return True
    if get_origin(hint) in _UNIONS:
        return any(_fits(value, kind) for kind in _kinds(hint))
    if get_origin(hint) in _SERIES:
        return isinstance(value, list) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint


def _writable(hint: Any) -> bool:
    """Whether a spec can say a value of this kind: anything but modules, tensors and functions."""
    kinds = [kind for kind in _kinds(hint) if kind is not NoneType]
    return any(kind is Any or kind in _WORDS_FOR or get_origin(kind) in _SERIES for kind in kinds)


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The parts of a union; anything else is its only part."""
    return get_args(hint) if get_origin(hint) in _UNIONS else (hint,)


def _words_for(hint: Any) -> str:
    words = [
        f"a list, each {_words_for(get_args(kind)[0])}" if get_origin(kind) in _SERIES else _WORDS_FOR.get(kind, "")
        for kind in _kinds(hint)
    ]
    return " or ".join(filter(None, words))


def _default(value: Any) -> str:
    short = f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, float) and float(short) != value:
        return repr(value)
    return short if isinstance(value, str) else short.lower()


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
        self.text, self.at, self.begin = text, 0, 0
        self.kind, self.token = self._next()

    def whole(self) -> Spec:
        begin, spec = self.begin, self._value("a cell")
        if not isinstance(spec, Spec):
            self.begin = begin
            raise self._error("a spec begins with the name of a cell")
        if self.kind:
            raise self._error("nothing may follow a cell; its arguments stand in (…), several cells in stack(…)")
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
        if self.token.endswith(".py"):
            raise self._error(f"which class of this file? Write {self.token}:MyCell")
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
