"""What a combinator asks of the cells it holds: one step, a first state, widths. Any cell can be held."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import CellError, ElmanError, InputError, OptionError
from ..protocol import MISTAKES, initial_state, pair_of, written
from ..types import Pytree, State

__all__ = [
    "Make",
    "Wrapper",
    "beside",
    "first_state",
    "fraction",
    "given_by",
    "input_size",
    "like",
    "misfit",
    "named",
    "output_size",
    "positive",
    "said",
    "start",
    "step",
    "trial",
]


class Make(Protocol):
    """How a combinator that is built from a spec has the cell inside built, once it knows what that will read."""

    def __call__(self, input_size: int, /) -> nn.Module: ...


def step(cell: nn.Module, x: Pytree, state: State, constants: Pytree = None) -> tuple[Pytree, State]:
    """One step of any cell: (y, state). Constants go to the cells that take a third argument.

    torch.nn's own cells, which return their state alone, are taken as they are. Raises CellError for a cell that
    needs constants when there are none, and for one that does not return a pair.
    """
    known, needed = _third(type(cell).forward)
    if constants is None and needed:
        raise CellError(f"{type(cell).__name__} reads constants; pass constants= to scan, or to the step.")
    result = cell(x, state) if constants is None or not known else cell(x, state, constants)
    return pair_of(cell, result)


def start(cell: nn.Module, batch: int, *, device: torch.device, dtype: torch.dtype, constants: Pytree = None) -> State:
    """The state that any cell starts from; one whose ``initial_state`` takes ``constants`` is given them."""
    return initial_state(cell, batch, device=device, dtype=dtype, constants=constants)


def first_state(cell: nn.Module) -> State:
    """The state that a cell starts one sequence from, in the type and on the device of its parameters."""
    known = like(cell)
    return start(cell, 1, device=known.device, dtype=known.dtype)


def trial(cell: nn.Module, reads: int) -> tuple[Pytree, State]:
    """What a cell gives for one row of ``reads`` zeros: (y, state). No draw of the caller's is used up."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return step(cell, like(cell).new_zeros(1, reads), first_state(cell))


@lru_cache(maxsize=256)
def _third(forward: Callable[..., Any]) -> tuple[bool, bool]:
    """Whether a step takes a third argument, and whether it must have one."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(forward).parameters.values())
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return True, False
    after = [p for p in parameters if p.kind in positional][3:]  # self, x and state come first
    return bool(after), bool(after) and after[0].default is inspect.Parameter.empty


def input_size(cell: nn.Module) -> int:
    """Features that a cell reads: its ``input_size``. Raises CellError where it does not say."""
    size = said(cell, "input_size")
    if size is None:
        raise _silent(cell, "input_size")
    return size


def output_size(cell: nn.Module, reads: int | None = None) -> int:
    """Features that a cell gives: its ``output_size``, or, where it does not say, found by one step.

    ``reads``: features of its input, where it does not say that either. Raises CellError when they are not known.
    """
    size = said(cell, "hidden_size" if type(cell).__module__.startswith("torch.nn.") else "output_size")
    if size is not None:
        return size
    reads = reads or said(cell, "input_size")
    if reads is None or like(cell).is_meta:
        raise _silent(cell, "output_size")
    try:
        return int(trial(cell, reads)[0].shape[-1])
    except ElmanError:
        raise
    except MISTAKES as error:
        kind = type(cell).__name__
        raise CellError(
            f"{kind} does not say its output_size, and the step that was to show it failed with "
            f"{type(error).__name__}: {error}. {kind}.forward{written(cell.forward)} is given x (B, {reads}) and the "
            f"state, and returns a pair (y, state)."
        ) from error


def like(cell: nn.Module) -> Tensor:
    """A tensor of the type and on the device of a cell's parameters."""
    return next((p for p in cell.parameters() if p.is_floating_point()), torch.empty(0))


def said(cell: nn.Module, name: str) -> int | None:
    """A size that a cell says, such as its ``input_size``; None where it does not."""
    try:
        size = getattr(cell, name, None)
    except CellError:  # a combinator around a cell that does not say
        return None
    return size if isinstance(size, int) else None


def _silent(cell: nn.Module, name: str) -> CellError:
    kind = type(cell).__name__
    return CellError(
        f"{kind} does not say its {name}, which what is built around it must know. Set self.{name} in {kind}.__init__."
    )


def given_by(owner: str, module: Any) -> int:
    """Features that a readout or an embedding gives: what the last part of it says that says it.

    Raises CellError, which names the owner, where no part does.
    """
    for part in reversed([*module.modules()] if isinstance(module, nn.Module) else []):
        for name in ("out_features", "embedding_dim", "output_size", "hidden_size"):
            if isinstance(getattr(part, name, None), int):
                return int(getattr(part, name))
    kind = type(module).__name__ if isinstance(module, nn.Module) else getattr(module, "__name__", repr(module))
    raise CellError(
        f"{owner} cannot see how many features {kind} gives. Use a module that has out_features or output_size, such "
        "as nn.Linear, or nn.Sequential of them."
    )


def named(owner: str, constants: Pytree, key: str | None) -> Any:
    """The constants, or those under ``key``. Raises InputError where there are none of that name."""
    if key is None:
        return constants
    if not isinstance(constants, Mapping):
        given = "none" if constants is None else f"a {type(constants).__name__}"
        raise InputError(f"{owner} reads constants[{key!r}]; got {given}. Pass constants={{{key!r}: …}}.")
    if key not in constants:
        raise InputError(f"{owner} reads constants[{key!r}]; there are {', '.join(map(repr, constants))}.")
    return constants[key]


def misfit(owner: str, needs: str, given: Any, key: str | None) -> InputError:
    """The error for constants, or those under ``key``, that are not what the owner needs."""
    what = tuple(given.shape) if isinstance(given, Tensor) else f"a {type(given).__name__}"
    place = "constants" if key is None else f"constants[{key!r}]"
    return InputError(f"{owner} needs {needs} in {place}; got {what}.")


def beside(owner: str, cell: nn.Module, x: Tensor, more: int, what: str) -> None:
    """Raises InputError where a cell that says what it reads does not read x and ``more`` features beside it."""
    reads = said(cell, "input_size")
    if reads is not None and x.shape[-1] + more != reads:
        raise InputError(
            f"{owner}: x has {x.shape[-1]} features and {what} {more}, but {type(cell).__name__} reads {reads}. "
            f"Build it with input_size={x.shape[-1] + more}."
        )


def positive(owner: str, name: str, value: Any) -> int:
    """``value``, when it is a positive integer; otherwise OptionError that names owner and option."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(f"{owner}: {name} must be a positive integer, got {value!r}.")
    return value


def fraction(owner: str, name: str, value: Any) -> float:
    """``value``, when it is a probability, 0 and 1 included; otherwise OptionError that names owner and option."""
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise OptionError(f"{owner}: {name} must be a probability between 0 and 1, got {value!r}.")
    return float(value)


class Wrapper(nn.Module):
    """Abstract: a cell around one other cell, ``self.cell``, with its widths and its state unless it says otherwise.

    ``build`` is how a spec makes one: ``make(input_size)`` gives the cell inside, for the input that it will read.
    """

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        if not isinstance(cell, nn.Module):
            given = f"the class {cell.__name__}" if isinstance(cell, type) else repr(cell)
            raise CellError(f"{type(self).__name__} goes around a cell; got {given}.")
        self.cell = cell

    @classmethod
    def build(cls, input_size: int, make: Make, *args: Any, **options: Any) -> Wrapper:
        return cls(make(input_size), *args, **options)

    @property
    def input_size(self) -> int:
        return input_size(self.cell)

    @property
    def output_size(self) -> int:
        return output_size(self.cell)

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype, constants: Pytree = None) -> State:
        """The state of the cell inside."""
        return start(self.cell, batch, device=device, dtype=dtype, constants=constants)

    def forward(self, x: Pytree, state: State, constants: Pytree = None) -> tuple[Tensor, State]:
        raise NotImplementedError
