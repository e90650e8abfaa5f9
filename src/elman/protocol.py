"""The cell protocol: from a user's module to a function of flat lists of tensors, checked at every step.

``forward(x, state) -> (y, state)``, with pytrees on both sides; ``forward(x, state, constants)`` where constants
are given; torch.nn's own cells, whose output is their state, are taken as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree

from .errors import CellError, InputError, StateError, UsageError
from .recording import recorder
from .types import Pytree

__all__ = [
    "MACHINE",
    "MISTAKES",
    "Protocol",
    "Tree",
    "from_torch",
    "initial_state",
    "kind",
    "output_of",
    "pair_of",
    "place",
    "start",
    "takes",
    "written",
]


class _Word(str):
    """A string that is its own repr."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def kind(leaf: Tensor) -> str:
    """``(2, 4) float32``"""
    return f"{tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}"


class Tree:
    """A pytree taken apart into its tensors; anything else in it (None, numbers) stays part of the structure."""

    __slots__ = ("flat", "leaves", "others", "spec")

    def __init__(self, tree: Pytree) -> None:
        self.flat = False  # whether it is a plain tuple of tensors
        self.spec: Any = None
        self.others: tuple[Any, ...] = ()
        if isinstance(tree, Tensor):
            self.leaves: list[Tensor] = [tree]
            return
        if type(tree) is tuple and len(tree) < len(_FLAT) and all(isinstance(leaf, Tensor) for leaf in tree):
            self.leaves, self.spec, self.others, self.flat = list(tree), _FLAT[len(tree)], (None,) * len(tree), True
            return
        leaves, self.spec = pytree.tree_flatten(tree)
        self.leaves = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.others = tuple(None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves)

    def rebuild(self, leaves: list[Any]) -> Pytree:
        """The same structure around other tensors."""
        if self.spec is None:
            return leaves[0]
        if self.flat:
            return tuple(leaves)
        tensors = iter(leaves)
        return pytree.tree_unflatten([next(tensors) if o is None else o[0] for o in self.others], self.spec)

    def described(self, leaves: list[Tensor] | None = None) -> str:
        """``(tensor, tensor)``, or with those leaves ``((2, 4) float32, (2, 4) float32)``"""
        words = ["tensor"] * len(self.leaves) if leaves is None else [kind(leaf) for leaf in leaves]
        return repr(self.rebuild([_Word(word) for word in words]))

    @property
    def structure(self) -> Any:
        """The tree without its tensors, hashable."""
        if self.spec is None or self.flat:
            return None if self.spec is None else len(self.others)
        return (repr(self.spec), repr(self.others))

    @classmethod
    def empty(cls, spec: Any, others: tuple[Any, ...]) -> Tree:
        """A structure without its tensors."""
        made = cls.__new__(cls)
        made.leaves, made.spec, made.others = [], spec, others
        made.flat = len(others) < len(_FLAT) and spec == _FLAT[len(others)] and not any(others)
        return made


_FLAT = tuple(pytree.tree_structure((0,) * count) for count in range(9))
"""The structures of tuples of so many tensors, which most states are: known beforehand, for every call meets them."""


def initial_state(
    cell: nn.Module, batch: int, *, device: torch.device, dtype: torch.dtype, constants: Pytree = None
) -> Any:
    """The state that a cell starts from, given the constants if it asks for them. CellError when it does not say."""
    make = _TORCH_CELLS.get(type(cell))
    if make is not None:
        return make(cell, batch, device=device, dtype=dtype)
    own = getattr(cell, "initial_state", None)
    if own is None and isinstance(cell, nn.RNNBase | nn.Linear):
        kind = type(cell).__name__
        raise CellError(
            f"{kind} is a layer, not one step of a recurrence. Use {kind.replace('RNN', 'Elman')}Cell in its place."
            if isinstance(cell, nn.RNNBase)
            else f"{kind} is no step of a recurrence: it has no state. Use DenseCell, or apply it to the sequence."
        )
    if own is None:
        raise CellError(
            f"{type(cell).__name__} has no initial_state(batch, *, device, dtype), and no state was given. "
            "Add the method, or pass state= to scan."
        )
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    if constants is not None and _takes_constants(own.__func__ if hasattr(own, "__func__") else own):
        options["constants"] = constants
    try:
        return own(batch, **options)
    except TypeError as error:
        if takes(own, batch, **options):
            raise
        raise CellError(
            f"{type(cell).__name__}.initial_state{written(own)} cannot be called as initial_state(batch, device=…, "
            f"dtype=…): {error}. Write it as def initial_state(self, batch, *, device, dtype)."
        ) from error


def start(
    cell: nn.Module, xs: list[Tensor], batch: int, parameters: Iterable[Tensor] | None = None, constants: Pytree = None
) -> Any:
    """The cell's own initial state, in the type of its parameters, on the device of xs."""
    dtype = torch.get_default_dtype()
    for leaf in chain(cell.parameters() if parameters is None else parameters, xs):
        if leaf.is_floating_point():
            dtype = leaf.dtype
            break
    return initial_state(cell, batch, device=xs[0].device, dtype=dtype, constants=constants)


def place(method: Any) -> str:
    """``cell.py:12``: where a method stands; nothing for one that is PyTorch's own, or not Python."""
    code = getattr(getattr(method, "__func__", method), "__code__", None)
    if code is None or from_torch(code.co_filename):
        return ""
    return f"{code.co_filename}:{code.co_firstlineno}"


def written(method: Any) -> str:
    """`` (cell.py:12)``"""
    return f" ({place(method)})" if place(method) else ""


def from_torch(filename: str) -> bool:
    return "/torch/" in filename.replace("\\", "/")


def takes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether a function can be called so, whatever it does then."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


@lru_cache(maxsize=256)
def _takes_constants(method: Callable[..., Any]) -> bool:
    """Whether a cell's first state may depend on the constants."""
    return "constants" in inspect.signature(method).parameters


def output_of(cell: nn.Module, result: Any) -> Any:
    """The pair (y, state) in what a cell's step returned: torch.nn's own cells return their state alone."""
    if type(cell) not in _TORCH_CELLS:
        return result
    return result[0] if isinstance(result, tuple) else result, result


def pair_of(cell: nn.Module, result: Any) -> tuple[Any, Any]:
    """``output_of``; CellError where it is no pair."""
    result = output_of(cell, result)
    if not isinstance(result, tuple) or len(result) != 2:
        given = f"a tuple of {len(result)}" if isinstance(result, tuple) else f"a {type(result).__name__}"
        raise CellError(
            f"{type(cell).__name__}.forward{written(cell.forward)} must return a pair (y, state); got {given}. "
            "A step that has no output of its own returns its state twice."
        )
    return result


class Protocol:
    """A cell and the structures of what goes in; ``step`` makes it a function of flat lists.

    Masks that are drawn once for the call (see ``drawn``) go in besides: ``masks`` that all sequences share, by the
    names of their buffers, and one for each sequence in the buffers ``drawn``, the last leaves of the constants.
    ``tensors`` are the parameters and buffers by name, with the shared masks in their places.
    """

    def __init__(self, cell: nn.Module, xs: Tree, state: Tree, constants: Tree | None, record: bool) -> None:
        self.cell, self.xs, self.state, self.constants, self.record = cell, xs, state, constants, record
        self.masks: dict[str, Tensor] = {}
        self.tensors: dict[str, Tensor] = {}
        self.drawn: tuple[str, ...] = ()
        self.y: Tree | None = None

    def step(self, parameters: dict[str, Tensor] | None) -> Callable[..., Any]:
        """``(xs, state, constants) -> (ys, next state, recorded)``; afterwards ``y`` knows the structure of ys."""
        cell = self.cell

        def one(xs: list[Tensor], state: list[Tensor], constants: list[Tensor]) -> Any:
            args = [self.xs.rebuild(xs), self.state.rebuild(state)]
            if self.constants is not None:
                args.append(self.constants.rebuild(constants))
            inside = parameters
            if self.masks or self.drawn:
                mine = constants[len(constants) - len(self.drawn) :]
                inside = {**(parameters or {}), **self.masks, **dict(zip(self.drawn, mine, strict=True))}
            with recorder(self.record) as recorded:
                if inside is None:
                    result = cell(*args)
                else:
                    with _reparametrize_module(cell, inside, tie_weights=True):
                        result = cell(*args)
            y, new = pair_of(cell, result)
            self.y = Tree(y)
            if self.y.others:
                self._only_tensors(self.y)
            for i, leaf in enumerate(self.y.leaves):
                if leaf.dim() == 0 or leaf.shape[0] != xs[0].shape[0]:
                    raise CellError(
                        f"{self.forward} returns a y whose leaf {i} does not start with the batch dimension: "
                        f"{tuple(leaf.shape)}. Every leaf of y must be (B, …), here with B = {xs[0].shape[0]}."
                    )
            return self.y.leaves, self._carry(Tree(new), state), dict(recorded)

        return one

    @property
    def forward(self) -> str:
        """``MyCell.forward (cell.py:12)``"""
        return f"{type(self.cell).__name__}.forward{written(self.cell.forward)}"

    def _only_tensors(self, y: Tree) -> None:
        for other in y.others:
            if other is not None and other[0] is not None:
                raise CellError(
                    f"{self.forward} returns a y that holds a {type(other[0]).__name__}. Every leaf of y must be a "
                    "tensor (B, …); a number that is the same at every step is no output of the scan."
                )

    def _carry(self, new: Tree, old: list[Tensor]) -> list[Tensor]:
        """The next state, checked against the one that came in."""
        if new.structure != self.state.structure or len(new.leaves) != len(old):
            raise StateError(
                f"{self.forward} returned a state of another structure (tuple, list or dict) than it was given: "
                f"{new.described()} instead of {self.state.described()}. What state= or initial_state gives and what "
                "forward returns must be built alike."
            )
        carried = []
        for i, (after, before) in enumerate(zip(new.leaves, old, strict=True)):
            if after.shape != before.shape:
                raise StateError(
                    f"{self.forward} changes the shape of its state: leaf {i} was {tuple(before.shape)} and became "
                    f"{tuple(after.shape)}. A state must keep its shape from step to step: correct forward, or what "
                    "state= or initial_state gives."
                )
            if after.dtype != before.dtype:
                # Under autocast a step computes in a narrow type; what it carries keeps the type it was given.
                if not (torch.is_autocast_enabled(before.device.type) and after.is_floating_point()):
                    raise self._type_changed(i, before, after)
                after = after.to(before.dtype)
            carried.append(after)
        return carried

    def _type_changed(self, i: int, before: Tensor, after: Tensor) -> UsageError:
        own = {p.dtype for p in self.cell.parameters() if p.is_floating_point()}
        foreign = {x.dtype for x in self.xs.leaves if x.is_floating_point()} - own
        if before.dtype in own and after.dtype in foreign:  # the state is what it should be: x made it another
            return InputError(
                f"xs are {after.dtype} and the parameters of {type(self.cell).__name__} {before.dtype}, so "
                f"{self.forward} turns its state into {after.dtype}. Convert one of them: xs.to({before.dtype}), or "
                f"cell.to({after.dtype})."
            )
        return StateError(
            f"{self.forward} changes the type of its state: leaf {i} was {before.dtype} and became {after.dtype}. "
            "Give xs and what state= or initial_state gives the type of the parameters."
        )


def _one_state(cell: Any, batch: int, **options: Any) -> Tensor:
    return torch.zeros(batch, cell.hidden_size, **options)


def _two_states(cell: Any, batch: int, **options: Any) -> tuple[Tensor, Tensor]:
    return _one_state(cell, batch, **options), _one_state(cell, batch, **options)


# torch.nn's own cells return only their state; their output is its first tensor.
_TORCH_CELLS: dict[type, Callable[..., Any]] = {
    nn.RNNCell: _one_state,
    nn.GRUCell: _one_state,
    nn.LSTMCell: _two_states,
}


# What a step may raise when something that it is given does not fit. Where the machine is the cause, no input is.
MISTAKES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)
MACHINE = (torch.OutOfMemoryError, torch.AcceleratorError)
