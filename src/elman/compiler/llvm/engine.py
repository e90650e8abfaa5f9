"""From a module of LLVM's representation to functions that can be called: verified, optimised, compiled, linked.

Objects are kept on disk (see ``store``), so that a second process only links, which takes less than a millisecond.
"""

from __future__ import annotations

import itertools
import os
import re
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache, wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import llvmlite
from llvmlite import binding as llvm
from llvmlite import ir

from ...errors import UnsupportedError
from . import store
from .isa import Isa, host

__all__ = ["CodeError", "Library", "assembly", "generator", "kept", "load", "optimised"]

# The generator writes vectors, tiles and loops as they are to run. LLVM's own levels 1 to 3 take twice as long as these
# few passes, nearly all of it in looking for more, and the code is as fast to the percent.
_PASSES = ("always_inliner", "sroa", "instruction_combine", "simplify_cfg", "global_dead_code_eliminate")

P = ParamSpec("P")
R = TypeVar("R")

_lock = threading.RLock()
_number = itertools.count()


class CodeError(UnsupportedError):
    """LLVM refuses the code that was generated for a loop; ``source`` is that code."""

    def __init__(self, message: str, source: str) -> None:
        super().__init__(message, source)
        self.source = source

    def __str__(self) -> str:
        return str(self.args[0])


class Library:
    """Machine code in memory, for as long as this object lives: a call must hold on to it.

    ``cached`` says that the code came from disk.
    """

    def __init__(self, source: Callable[[], str], isa: Isa, linked: llvm.ResourceTracker, cached: bool) -> None:
        self._source = source
        self.isa = isa
        self.cached = cached
        self._linked = linked

    def address(self, name: str) -> int:
        """Where a function of the module begins; KeyError for one that it does not define for others."""
        return int(self._linked[name])

    @property
    def source(self) -> str:
        """The representation as it was generated."""
        return self._source()

    def ir(self) -> str:
        """The representation after optimisation."""
        return optimised(self.source, self.isa)

    def assembly(self) -> str:
        """What runs, as text."""
        return assembly(self.source, self.isa)


def load(
    module: ir.Module | str | Callable[[], ir.Module],
    isa: Isa,
    directory: Path | None = None,
    symbols: Mapping[str, int] | None = None,
    *,
    description: str = "",
    functions: Sequence[str] = (),
) -> Library:
    """Make the functions of a module callable; compiled anew, or read from ``directory`` where they were made before.

    ``symbols`` are the addresses of functions that it calls; others are looked for in this process. A module may also
    be given by a function that writes it, with a ``description`` that says all it depends on and the ``functions`` it
    defines for others: then what is read is not written first.

    Raises CodeError, an UnsupportedError, where LLVM does not accept the module or a function that it calls is not
    there.
    """
    write = lru_cache(maxsize=1)(lambda: str(module() if callable(module) else module))
    key = store.key_of(description or write(), *_conditions(isa)) if directory else ""
    with _lock:
        kept = store.read(directory, key) if directory else None
        if kept is not None:
            try:
                return Library(write, isa, _linked(kept, write, functions, symbols), True)
            except CodeError:  # made by a process that had other libraries to link with
                pass
        try:
            code = _machine(isa).emit_object(_optimised(write(), isa))
        except RuntimeError as error:
            raise _refusal(error, write()) from None
        library = Library(write, isa, _linked(code, write, functions, symbols), False)
        if directory:
            store.write(directory, key, code)
    return library


def kept(make: Callable[P, R]) -> Callable[P, R]:
    """A function whose results are made once, by one thread, and never dropped.

    For machine code whose address is all that others keep: functools.cache would let two threads make it that come at
    the same time, and drop that of one of them.
    """
    made: dict[tuple[Hashable, ...], R] = {}

    @wraps(make)
    def once(*args: P.args, **options: P.kwargs) -> R:
        key = (*args, *options.items())
        if key not in made:  # else nobody waits for another that compiles
            with _lock:
                if key not in made:
                    made[key] = make(*args, **options)
        return made[key]

    return once


def optimised(module: ir.Module | str, isa: Isa) -> str:
    """The representation of a module after optimisation; of any instruction set. Raises CodeError."""
    with _lock:
        return str(_optimised(str(module), isa))


def assembly(module: ir.Module | str, isa: Isa) -> str:
    """The machine code of a module as text; of any instruction set. Raises CodeError."""
    source = str(module)
    with _lock:
        return str(_machine(isa).emit_assembly(_optimised(source, isa)))


@lru_cache(maxsize=1)
def generator() -> str:
    """A digest of the files that write representations: part of what a description has to say."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return store.key_of(*(file.read_text(encoding="utf-8") for file in files))


def _conditions(isa: Isa) -> tuple[str, ...]:
    """What else the code of a module depends on."""
    versions = (llvmlite.__version__, ".".join(map(str, llvm.llvm_version_info)), *_PASSES)
    return (_triple(isa), isa.cpu, isa.features, llvm.get_host_cpu_name() if _native(isa) else "", *versions)


def _native(isa: Isa) -> bool:
    here = host()
    return here is not None and here.triple == isa.triple


def _triple(isa: Isa) -> str:
    """The table names one system for each family of processors; on this machine it is the one that runs."""
    return str(llvm.get_process_triple()) if _native(isa) else isa.triple


@lru_cache(maxsize=16)
def _machine(isa: Isa) -> llvm.TargetMachine:
    if _native(isa):
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
    else:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple(_triple(isa))
    return target.create_target_machine(isa.cpu, isa.features, opt=3, reloc="pic", codemodel="small")


@lru_cache(maxsize=1)
def _linker() -> llvm.LLJIT:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.create_lljit_compiler(use_jit_link=True, suppress_errors=True)


def _optimised(source: str, isa: Isa) -> llvm.ModuleRef:
    machine = _machine(isa)
    try:
        module = llvm.parse_assembly(source)
        module.triple = machine.triple
        module.data_layout = str(machine.target_data)
        module.verify()
    except RuntimeError as error:
        raise _refusal(error, source) from None
    manager = llvm.create_new_module_pass_manager()
    for name in _PASSES:
        getattr(manager, f"add_{name}_pass")()
    manager.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options()))
    return module


def _linked(
    code: bytes, source: Callable[[], str], functions: Sequence[str], symbols: Mapping[str, int] | None
) -> llvm.ResourceTracker:
    """The object in memory, its functions found."""
    builder = llvm.JITLibraryBuilder().add_object_img(code).add_current_process()
    for name, address in (symbols or {}).items():
        builder.import_symbol(name, address)
    for name in functions or _defined(source()):
        builder.export_symbol(name)
    try:
        return builder.link(_linker(), f"elman.{next(_number)}")
    except RuntimeError as error:
        raise _refusal(error, source()) from None


def _defined(source: str) -> list[str]:
    """The functions that a module defines for others."""
    return re.findall(r'^[ \t]*define (?!internal |private )[^@\n]*@"?([^"(\n]+)"?\(', source, re.MULTILINE)


def _refusal(error: RuntimeError, source: str) -> CodeError:
    version = ".".join(map(str, llvm.llvm_version_info))
    return CodeError(f"LLVM {version} refuses the machine code of this step: {str(error).strip()}", source)


# A thread may be compiling while another forks: wait for it, so that the child finds LLVM at rest.
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
