"""A cell run one step at a time: what arrives is answered at once, in constant memory."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .compiler.reference import apart
from .errors import InputError, OptionError, UnfoldError, UnfoldWarning
from .packing import Rows
from .protocol import MISTAKES, Tree, kind
from .types import Pytree, State
from .unfold import prepare, scan

__all__ = ["Stream"]

_warned: set[str] = set()
_BACKENDS = ("auto", "reference", "llvm")


class Stream:
    """y(t) = stream(x(t)): one step of a cell for each call, without gradients, the state kept inside.

        stream = elman.Stream(cell)
        for x in source:          # (B, …), the same shapes every time
            y = stream(x)         # (B, …)

    On a CPU the whole step is one kernel, bound to memory of its own with its weights packed: nothing is traced, and
    but for the copy of y, and what the step draws, nothing is allocated from the second step on. What has no kernel
    runs as it is written, which is said once. Weights and constants are read at the first step, and at the first after
    ``reset``. One stream serves one thread at a time. A copy (``copy.deepcopy``, ``pickle``) goes on from the state, in
    memory of its own.

    Args:
        cell: what ``scan`` takes. In training mode its dropout draws anew at every step.
        state: where to start, (B, …) leaves; None asks the cell.
        constants: what does not change over time, (B, …) leaves.
        backend: "auto", "llvm" (the kernel, or an error that says why there is none), "reference" (as it is written).
        copy: False gives y in the stream's own memory, which the next step overwrites.

    Raises:
        CellError, StateError, InputError: as ``scan``, at the first step; InputError for an x of another shape or type
        later. OptionError: unknown backend. UnfoldError: "llvm" was asked for and cannot run this step.

    Source: Goodfellow, Bengio, Courville, Deep Learning (2016), section 10.1, equation 10.5.
    """

    def __init__(
        self,
        cell: nn.Module,
        state: State = None,
        *,
        constants: Pytree = None,
        backend: str = "auto",
        copy: bool = True,
    ) -> None:
        if backend not in _BACKENDS:
            raise OptionError.unknown("backend", str(backend), _BACKENDS)
        self.cell, self.constants, self.copy = cell, constants, copy
        self._asked, self._first = backend, state
        self._runs: _Kernel | _Written | None = None

    @torch.no_grad()
    def __call__(self, x: Pytree) -> Pytree:
        """One step: x (B, …) → y (B, …)."""
        leaves, spec = ([x], None) if isinstance(x, Tensor) else pytree.tree_flatten(x)
        runs = self._runs
        if runs is None:
            return self._begin(x, leaves)
        if spec != runs.protocol.xs.spec or any(map(_differs, leaves, runs.shapes)):
            now, before = (tree.described(tree.leaves) for tree in (Tree(x), runs.protocol.xs))
            raise InputError(f"this stream began with x of {before} and was given {now}; begin another for it.")
        return runs.step(leaves, self.copy)

    @property
    def state(self) -> State:
        """The state after the last step, (B, …) leaves of their own; what it starts from before the first one."""
        return self._first if self._runs is None else self._runs.protocol.state.rebuild(self._runs.state)

    @property
    def backend(self) -> str | None:
        """What runs the steps, "llvm" or "reference"; None before the first one."""
        return None if self._runs is None else self._runs.name

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_first": self.state, "_runs": None}

    def __repr__(self) -> str:
        return f"Stream({self.cell}, backend={self.backend or self._asked!r})"

    def reset(self, state: State = None) -> None:
        """Start again, from that state or the cell's own, with the weights as they are at the next step."""
        self._first, self._runs = state, None

    def _begin(self, x: Pytree, leaves: list[Any]) -> Pytree:
        """The first step."""
        for leaf in leaves or [None]:
            if not isinstance(leaf, Tensor) or not leaf.dim():
                raise InputError(f"x must be tensors (B, …); got {_kind(leaf)}.")
            if len(leaf) != len(leaves[0]):
                raise InputError(f"the leaves of x must have one B; got {_kind(leaves[0])} and {_kind(leaf)}.")
        try:
            if any(leaf.dim() == 1 and leaf.is_floating_point() for leaf in leaves):  # (D) given for (B, D)?
                self._scanned(x)
            with torch.inference_mode(False), torch.no_grad():  # its memory is written to in either mode
                runs = self._begun(x, leaves[0])
            y = runs.step(leaves, self.copy)
        except MISTAKES:
            self._scanned(x)
            raise
        self._runs = runs
        if runs.why and runs.why not in _warned:
            _warned.add(runs.why)
            warnings.warn(runs.why, UnfoldWarning, stacklevel=4)
        return y

    def _scanned(self, x: Pytree) -> None:
        """A scan of this one step, which says what is wrong in the user's terms."""
        steps = pytree.tree_map(lambda leaf: leaf.unsqueeze(0), x)
        scan(self.cell, steps, self._first, constants=self.constants, backend="reference")

    def _begun(self, x: Pytree, first: Tensor) -> _Kernel | _Written:
        rows = Rows(1, len(first))
        protocol, constants = prepare(self.cell, rows, x, self._first, self.constants, False)
        written = _Written(protocol, constants)
        if self._asked == "reference" or (self._asked == "auto" and first.device.type != "cpu"):
            return written
        try:
            return _Kernel(protocol, constants, rows)
        except UnfoldError as error:
            if self._asked == "llvm":
                raise
            written.why = f"a stream of {type(self.cell).__name__} runs it as it is written: {error}"
            return written


class _Written:
    """Steps as the cell writes them."""

    name = "reference"
    why = ""

    def __init__(self, protocol: Any, constants: list[Tensor]) -> None:
        self.protocol, self.constants = protocol, constants
        self.shapes = list(map(_form, protocol.xs.leaves))
        self._state = [s.clone() for s in protocol.state.leaves]
        self._step = protocol.step(protocol.tensors if protocol.masks or protocol.drawn else None)

    def step(self, leaves: list[Tensor], copy: bool) -> Pytree:
        ys, state, _ = self._step(leaves, self._state, self.constants)
        self._state = apart(state, leaves)  # x, and a y that is a copy, may be overwritten
        return self.protocol.y.rebuild(apart(ys, [*leaves, *self._state]) if copy else ys)

    @property
    def state(self) -> list[Tensor]:
        return [s.clone() for s in self._state]


class _Kernel:
    """Steps as one kernel."""

    name = "llvm"
    why = ""

    def __init__(self, protocol: Any, constants: list[Tensor], rows: Rows) -> None:
        from .compiler.cache import Signature, program_of
        from .compiler.llvm.resident import Resident

        self.protocol = protocol
        self.shapes = list(map(_form, protocol.xs.leaves))
        xs, state, own = protocol.xs.leaves, protocol.state.leaves, protocol.tensors
        program = program_of(protocol, Signature.of(xs, state, constants, own))
        weights = program.weights(rows.batch, [*own.values(), *constants], xs[0].device.type)
        self._resident = Resident(program.step, program.whole, xs, state, weights)
        self._y = program.y

    @property
    def state(self) -> list[Tensor]:
        return self._resident.state

    def step(self, leaves: list[Tensor], copy: bool) -> Pytree:
        resident = self._resident
        for room, x in zip(resident.xs, leaves, strict=True):
            room.copy_(x)
        resident.run()
        return self._y.rebuild([y.clone() for y in resident.ys] if copy else resident.ys)


def _form(leaf: Tensor) -> tuple[Any, ...]:
    return leaf.shape, leaf.dtype, leaf.device


def _differs(leaf: Any, form: tuple[Any, ...]) -> bool:
    return not isinstance(leaf, Tensor) or leaf.shape != form[0] or leaf.dtype != form[1] or leaf.device != form[2]


def _kind(leaf: Any) -> str:
    return kind(leaf) if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
