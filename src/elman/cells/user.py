"""A user's own cell: ``file.py:MyCell``."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import CellError, OptionError

__all__ = ["UserCell", "load_user_cell"]

PROTOCOL = """a cell is
    class MyCell(torch.nn.Module):
        def __init__(self, input_size, hidden_size): ...
        def initial_state(self, batch, *, device, dtype): ...   # a tensor (batch, ...), or a tuple of them
        def forward(self, x, state): ...                        # one step; returns y, state"""


@dataclass(frozen=True)
class UserCell:
    """A class read from a user's file, with the exact text that was executed and its hash (SHA-256)."""

    path: Path
    name: str
    source: str
    kind: type[nn.Module]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()

    def make(self, input_size: int, hidden_size: int, **options: Any) -> nn.Module:
        """``MyCell(input_size, hidden_size, **options)``; CellError with the user's line when that fails."""
        pairs = (f"{key}={value!r}" for key, value in options.items())
        given = ", ".join([str(input_size), str(hidden_size), *pairs])
        try:
            return self.kind(input_size, hidden_size, **options)
        except Exception as error:  # whatever the user's constructor raises is shown with the user's line
            where = _line(self.path, error) or _constructor(self)
            raise CellError(
                f"{self.name}({given}) failed with {type(error).__name__}: {error}\n{where}\n"
                f"A cell is built as {self.name}(input_size, hidden_size): further arguments need a default."
            ) from error


def load_user_cell(path: str | Path, name: str) -> UserCell:
    """Execute the Python file ``path``, which must stand alone, and take the cell class ``name`` from it.

    Raises OptionError when the file or the class is missing (the nearest class is suggested), and
    CellError, with the user's line, when the file cannot be executed or the class is no cell.
    """
    path = Path(path)
    if not path.is_file():
        beside = [file.name for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=1)
        hint = f" Did you mean {str(path.with_name(near[0]))!r}?" if near else ""
        raise OptionError(f"cell file {str(path)!r} does not exist.{hint}")
    source = _read(path)
    module = _execute(path, source)
    classes = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == module.__name__
    }
    kind = vars(module).get(name)
    if kind is None:
        cells = [key for key, value in classes.items() if issubclass(value, nn.Module)] or list(classes)
        if not cells:
            raise OptionError(f"{path} defines no class {name!r}, and no other: {PROTOCOL}")
        raise OptionError.unknown(f"class in {path}", name, sorted(cells))
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise CellError(f"{name} in {path} is not a torch.nn.Module: {PROTOCOL}")
    for method in ("initial_state", "forward"):
        if getattr(kind, method, None) in (None, nn.Module.forward):
            raise CellError(f"{name} in {path} has no {method}: {PROTOCOL}")
    return UserCell(path, name, source, kind)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CellError(f"cell file {path} is not UTF-8 text (byte {error.start}): is it Python?") from None
    except OSError as error:
        raise CellError(f"cell file {path} cannot be read: {error.strerror}.") from None


def _execute(path: Path, source: str) -> Any:
    """The file as a module, compiled here: what ran is what is hashed, and no .pyc is written.

    An unchanged file runs once, so that all cells made from it are of one class.
    """
    digest = hashlib.sha256(f"{path.resolve()}\n{source}".encode(errors="surrogateescape")).hexdigest()[:12]
    name = f"elman_user_cell_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_loader(name, loader=None, origin=str(path))
    assert spec is not None  # the loader is given, so a spec is always made
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses, inspect and copying look the module up by name
    try:
        exec(compile(source, str(path.resolve()), "exec"), vars(module))
    except Exception as error:  # whatever the user's file raises is shown with the user's line
        del sys.modules[name]
        said = error.msg if isinstance(error, SyntaxError) else error
        line = _line(path, error)
        raise CellError(
            f"{path} cannot be executed: {type(error).__name__}: {said}{f', at {line}' if line else ''}"
        ) from error
    return module


def _line(path: Path, error: BaseException) -> str | None:
    """The innermost line of ``path`` on the way to ``error``, as ``file.py:12: text``."""
    if isinstance(error, SyntaxError):
        return f"{path}:{error.lineno}: {(error.text or '').strip()}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path.resolve())]
    return f"{path}:{frames[-1].lineno}: {frames[-1].line}" if frames else None


def _constructor(cell: UserCell) -> str:
    """The line of the class's own ``def __init__``, or of the class."""
    member = vars(cell.kind).get("__init__", cell.kind)
    try:
        lines, number = inspect.getsourcelines(member)
    except (OSError, TypeError):
        return f"{cell.path}: class {cell.name}"
    return f"{cell.path}:{number}: {lines[0].strip()}"
