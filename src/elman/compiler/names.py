"""Which values outside of its arguments a function may read: global names, from its bytecode."""

from __future__ import annotations

import dis
import functools
import sys
import sysconfig
import types
from collections.abc import Iterator
from enum import EnumType

__all__ = ["global_chains", "installed", "user_classes"]

_PLACES = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_OURS = ("torch", "elman", "builtins")
# fmt: off
_UNREAD = frozenset({
    "__module__", "__dict__", "__weakref__", "__doc__", "__qualname__", "__annotations__", "__annotate__",
    "__annotations_cache__", "__annotate_func__", "__init__", "__slots__", "__static_attributes__",
    "__firstlineno__", "__abstractmethods__", "__parameters__", "__orig_bases__", "_abc_impl",
    "__dataclass_fields__", "__dataclass_params__", "__match_args__",
})
# fmt: on


@functools.lru_cache(maxsize=1024)
def global_chains(code: types.CodeType) -> tuple[tuple[str, ...], ...]:
    """The global names that code reads, functions inside it included, each with the attributes taken from it at once.

    ``config.model.gain`` is ``("config", "model", "gain")``.
    """
    found: dict[tuple[str, ...], None] = {}
    chain: tuple[str, ...] = ()
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            chain = (step.argval,)
        elif chain and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            found.pop(chain, None)
            chain = (*chain, step.argval)
        else:
            chain = ()
            continue
        found[chain] = None
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            found.update(dict.fromkeys(global_chains(inner)))
    return tuple(found)


@functools.lru_cache(maxsize=1024)
def installed(module: str | None) -> bool:
    """Whether a module, by name, is part of Python or of an installed package: what stands there is taken as fixed."""
    if module is None or module.partition(".")[0] in _OURS or module in sys.builtin_module_names:
        return True
    loaded = sys.modules.get(module)
    if loaded is None or module == "__main__":
        return False
    spec = getattr(loaded, "__spec__", None)
    file = getattr(loaded, "__file__", None) or getattr(spec, "origin", None)
    return isinstance(file, str) and (file.startswith(_PLACES) or file in ("frozen", "built-in"))


def user_classes(kind: type) -> Iterator[tuple[type, list[str]]]:
    """The classes that a class inherits from, PyTorch's and elman's left out, and what of each a method may read."""
    for parent in kind.__mro__:
        if parent.__module__.partition(".")[0] not in _OURS:
            enum = isinstance(parent, EnumType)  # it keeps tables of its members besides
            yield parent, [name for name in vars(parent) if name not in _UNREAD and not (enum and name[0] == "_")]
