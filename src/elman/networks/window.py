"""A fixed window around each step: a bounded look ahead, as the contrast to reading backward."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..combinators.nested import said
from ..errors import CellError, InputError, OptionError, StateError
from ..protocol import takes
from ..types import Pytree, State
from ..unfold import scan
from .unfolding import Unfolding, past

__all__ = ["Window", "windows"]


def windows(
    xs: Tensor,
    left: int,
    right: int,
    lengths: Tensor | list[int] | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """(T, B, D) to (T, B, (left + 1 + right)·D): x(t-left), …, x(t+right) side by side, zeros outside the sequence.

    ``before`` (B, left, D) stands before the first step instead of zeros. Raises OptionError for an impossible window,
    InputError for xs or lengths of another form.
    """
    _check("windows", left, right)
    if not isinstance(xs, Tensor) or xs.dim() != 3:
        given = tuple(xs.shape) if isinstance(xs, Tensor) else type(xs).__name__
        raise InputError(f"a window is taken of one tensor (T, B, D); got {given}.")
    steps, batch, features = xs.shape
    if lengths is not None:
        xs = xs.masked_fill(past(xs, lengths)[..., None], 0)
    first = xs.new_zeros(left, batch, features) if before is None else before.transpose(0, 1)
    padded = torch.cat([first, xs, xs.new_zeros(right, batch, features)])
    return torch.cat([padded[k : k + steps] for k in range(left + 1 + right)], -1)


class Window(nn.Module):
    """A cell, or a module without state, that reads some steps before and after this one beside it.

        w(t) = [x(t-left), …, x(t+right)];    y(t), s(t) = cell(w(t), s(t-1)),  or y(t) = module(w(t))

    xs (T, B, D), y (T, B, O); the cell reads (left + 1 + right)·D features; outside a sequence, past its own length
    too, x is zero. What is further ahead than ``right`` can have no influence: compare ``Bidirectional``.

    The state is the pair of the cell's, the empty tuple for a module without one, and the last inputs (B, left, D): so
    a window that does not look ahead can read a sequence in pieces. With ``right`` above 0 each piece would end in
    zeros.

    Raises OptionError for an impossible window, CellError for a cell built for another width or a module that gives
    no tensor (T, B, …), InputError for other xs, StateError for another state.
    Source: Goodfellow, Bengio, Courville 2016, section 10.3 (a fixed-size window around t).
    """

    def __init__(self, cell: nn.Module, left: int, right: int) -> None:
        super().__init__()
        _check("Window", left, right)
        if not isinstance(cell, nn.Module):
            given = f"the class {cell.__name__}" if isinstance(cell, type) else repr(cell)
            raise CellError(f"Window goes around a cell or a module; got {given}.")
        name, size = _reads(cell)
        width = left + 1 + right
        if size is not None and size % width:
            raise CellError(
                f"Window: {type(cell).__name__} reads {size} features, which are not {width} (left + 1 + right) equal "
                f"parts. Build it with {name} = {width} · features of xs."
            )
        self.cell, self.left, self.right, self.recurs = cell, left, right, _is_step(cell)

    def forward(
        self,
        xs: Tensor,
        state: State = None,
        *,
        constants: Pytree = None,
        lengths: Tensor | list[int] | None = None,
        **options: Unpack[Unfolding],
    ) -> tuple[Any, State]:
        """y (T, B, …), zero past the end of each sequence, and the state after it. Raises what ``scan`` raises."""
        inner, before = self._apart(xs, state)
        w = windows(xs, self.left, self.right, lengths, before)
        name, size = _reads(self.cell)
        if size is not None and w.shape[-1] != size:
            raise InputError(
                f"Window: xs have {xs.shape[-1]} features, {self.left + 1 + self.right} of them side by side "
                f"{w.shape[-1]}, but {type(self.cell).__name__} reads {size}. Build it with {name}={w.shape[-1]}."
            )
        stated = any(given is not None for given in pytree.tree_leaves((inner, constants)))
        if self.recurs or stated:
            y, inner = scan(self.cell, w, inner, constants=constants, lengths=lengths, **options)
        else:
            y, inner = self._at_once(w, lengths), ()
        return y, (inner, self._last(xs, before, lengths))

    def _apart(self, xs: Tensor, state: State) -> tuple[State, Tensor | None]:
        """The state of the cell, and the inputs before the first, where there are some."""
        if state is None:
            return None, None
        inner, before = state if isinstance(state, tuple | list) and len(state) == 2 else (None, state)
        if before is not None and isinstance(xs, Tensor) and xs.dim() == 3:  # otherwise xs are the mistake
            expected = (xs.shape[1], self.left, xs.shape[2])
            given = tuple(before.shape) if isinstance(before, Tensor) else type(before).__name__
            if before is state or given != expected:
                raise StateError(
                    f"Window starts from the pair of the cell's state and the last inputs {expected}, (B, left, D), or "
                    f"None for zeros; got {given} {'in place of the pair' if before is state else 'as these'}."
                )
        return inner, before

    def _at_once(self, w: Tensor, lengths: Tensor | list[int] | None) -> Tensor:
        """What a module without state makes of all windows."""
        y = self.cell(w)
        if not isinstance(y, Tensor) or y.shape[:2] != w.shape[:2]:
            given = tuple(y.shape) if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise CellError(
                f"Window: {type(self.cell).__name__} has no initial_state, so it is applied to all windows "
                f"{tuple(w.shape)} at once and gives one tensor (T, B, …); got {given}."
            )
        if lengths is None:
            return y
        return y.masked_fill(past(w, lengths).view(*w.shape[:2], *[1] * (y.dim() - 2)), 0)

    def _last(self, xs: Tensor, before: Tensor | None, lengths: Tensor | list[int] | None) -> Tensor:
        """(B, left, D) the last inputs of each sequence."""
        steps, batch, features = xs.shape
        first = xs.new_zeros(self.left, batch, features) if before is None else before.transpose(0, 1)
        ends = torch.as_tensor([steps] * batch if lengths is None else lengths, device=xs.device)
        places = ends + torch.arange(self.left, device=xs.device)[:, None]
        return torch.cat([first, xs])[places, torch.arange(batch, device=xs.device)].transpose(0, 1)


def _check(owner: str, left: Any, right: Any) -> None:
    for name, value in (("left", left), ("right", right)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise OptionError(f"{owner}: {name} must be a number of steps, 0 or more; got {value!r}.")


def _is_step(module: nn.Module) -> bool:
    """Whether it is a cell, or meant as one, so that scan says what it is not; everything else maps x to y alone."""
    kinds = nn.RNNCellBase | nn.RNNBase
    return hasattr(module, "initial_state") or isinstance(module, kinds) or not takes(module.forward, None)


def _reads(module: nn.Module) -> tuple[str, int | None]:
    """Features that a cell or module reads, where it says so, and what it calls them."""
    while isinstance(module, nn.Sequential) and len(module):
        module = module[0]
    for name in ("input_size", "in_features"):
        size = said(module, name)
        if size is not None:
            return name, size
    return "input_size", None
