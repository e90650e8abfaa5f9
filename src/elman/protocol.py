"""The cell protocol: from a user's module to a function of flat lists of tensors, checked at every step.

``forward(x, state) -> (y, state)``, with pytrees on both sides; ``forward(x, state, constants)`` where constants
are given; torch.nn's own cells, whose output is their state, are taken as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree

from .errors import CellError, StateError
from .recording import recorder
from .types import Pytree

__all__ = ["Protocol", "Tree", "initial_state"]


class _Word(str):
    """A string that is its own repr."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


class Tree:
    """A pytree taken apart into its tensors; anything else in it (None, numbers) stays part of the structure."""

    __slots__ = ("leaves", "others", "spec")

    def __init__(self, tree: Pytree) -> None:
        self.spec: Any = None
        self.others: tuple[Any, ...] = ()
        if isinstance(tree, Tensor):
            self.leaves: list[Tensor] = [tree]
            return
        leaves, self.spec = pytree.tree_flatten(tree)
        self.leaves = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.others = tuple(None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves)

    def rebuild(self, leaves: list[Any]) -> Pytree:
        """The same structure around other tensors."""
        if self.spec is None:
            return leaves[0]
        tensors = iter(leaves)
        return pytree.tree_unflatten([next(tensors) if o is None else o[0] for o in self.others], self.spec)

    def described(self) -> str:
        """``(tensor, tensor)``"""
        return repr(self.rebuild([_Word("tensor")] * len(self.leaves)))

    @property
    def structure(self) -> Any:
        """The tree without its tensors, hashable."""
        return None if self.spec is None else (repr(self.spec), repr(self.others))


def initial_state(cell: nn.Module, batch: int, *, device: torch.device, dtype: torch.dtype) -> Any:
    """The state that a cell starts from. Raises CellError when it does not say."""
    make = _TORCH_CELLS.get(type(cell))
    if make is not None:
        return make(cell, batch, device=device, dtype=dtype)
    own = getattr(cell, "initial_state", None)
    if own is None:
        raise CellError(
            f"{type(cell).__name__} has no initial_state(batch, *, device, dtype), and no state was given. "
            "Add the method, or pass state= to scan."
        )
    return own(batch, device=device, dtype=dtype)


class Protocol:
    """A cell and the structures of what goes in; ``step`` makes it a function of flat lists."""

    def __init__(self, cell: nn.Module, xs: Tree, state: Tree, constants: Tree | None, record: bool) -> None:
        self.cell, self.xs, self.state, self.constants, self.record = cell, xs, state, constants, record
        self.y: Tree | None = None

    def step(self, parameters: dict[str, Tensor] | None, replaced: list[str] | None = None) -> Callable[..., Any]:
        """``(xs, state, constants) -> (ys, next state, recorded)``; afterwards ``y`` knows the structure of the output.

        Names of buffers that the step assigned anew are added to ``replaced``.
        """
        cell, plain = self.cell, type(self.cell) in _TORCH_CELLS

        def one(xs: list[Tensor], state: list[Tensor], constants: list[Tensor]) -> Any:
            args = [self.xs.rebuild(xs), self.state.rebuild(state)]
            if self.constants is not None:
                args.append(self.constants.rebuild(constants))
            with recorder(self.record) as recorded:
                if parameters is None:
                    result = cell(*args)
                else:
                    with _reparametrize_module(cell, parameters, tie_weights=True):
                        result = cell(*args)
                        if replaced is not None:
                            replaced.extend(n for n, b in cell.named_buffers() if b is not parameters.get(n))
            y, new = (_output(result), result) if plain else self._pair(result)
            self.y = Tree(y)
            for i, leaf in enumerate(self.y.leaves):
                if leaf.dim() == 0 or leaf.shape[0] != xs[0].shape[0]:
                    raise CellError(
                        f"{type(cell).__name__} returns a y whose leaf {i} does not start with the batch dimension: "
                        f"{tuple(leaf.shape)}. Every leaf of y must be (B, …)."
                    )
            return self.y.leaves, self._carry(Tree(new), state), dict(recorded)

        return one

    def _pair(self, result: Any) -> tuple[Any, Any]:
        if not isinstance(result, tuple) or len(result) != 2:
            given = f"a tuple of {len(result)}" if isinstance(result, tuple) else f"a {type(result).__name__}"
            raise CellError(
                f"{type(self.cell).__name__}.forward must return a pair (y, state); got {given}. "
                "A step that has no output of its own returns its state twice."
            )
        return result

    def _carry(self, new: Tree, old: list[Tensor]) -> list[Tensor]:
        """The next state, checked against the one that came in."""
        name = type(self.cell).__name__
        if new.structure != self.state.structure or len(new.leaves) != len(old):
            raise StateError(
                f"{name} returned a state of another structure (tuple, list or dict) than it was given: "
                f"{new.described()} instead of {self.state.described()}."
            )
        carried = []
        for i, (after, before) in enumerate(zip(new.leaves, old, strict=True)):
            if after.shape != before.shape:
                raise StateError(
                    f"{name} changes the shape of its state: leaf {i} was {tuple(before.shape)} and became "
                    f"{tuple(after.shape)}. A state must keep its shape from step to step."
                )
            if after.dtype != before.dtype:
                # Under autocast a step computes in a narrow type; what it carries keeps the type it was given.
                if not (torch.is_autocast_enabled(before.device.type) and after.is_floating_point()):
                    raise StateError(
                        f"{name} changes the type of its state: leaf {i} was {before.dtype} and became "
                        f"{after.dtype}. Give the initial state and xs the type of the parameters."
                    )
                after = after.to(before.dtype)
            carried.append(after)
        return carried


def _output(state: Any) -> Tensor:
    return state[0] if isinstance(state, tuple) else state


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
