"""``scan``: unfold any step through time. What is public of the engine; how it works is in ``compiler``."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .compiler import reference
from .compiler.autograd import Call, chunk_length, run
from .compiler.compiled import Compiled
from .compiler.key import ambient, fingerprint
from .compiler.trace import Leaf, perturb, trace
from .errors import (
    CellError,

    ForwardModeError,
    InputError,
    MixedRowsError,
    MutationError,
    OptionError,
    StateError,
    UnfoldError,
    UnfoldWarning,
)
from .packing import Rows, rows_of
from .recording import recorder
from .types import Pytree, State

__all__ = ["BACKENDS", "Recording", "compiled_for", "scan", "unfold"]

BACKENDS = ("auto", "reference", "interpret")
_MOST_PROGRAMS = 256


@dataclass
class Recording:
    """What ``scan(..., record=True)`` returns besides: every marked value and every state, for all steps.

    ``values[name]`` is (T, B, …), zero in the padding; ``states`` has the structure of the state with (T, B, …)
    leaves, each the state after the step.
    """

    values: dict[str, Tensor]
    states: State
    _handles: list[list[Tensor]] = field(repr=False, default_factory=list)
    _rebuild: Callable[[list[Tensor]], State] = field(repr=False, default=list)
    _unpack: Callable[[Tensor], Tensor] = field(repr=False, default=lambda leaf: leaf)

    def adjoint(self, loss: Tensor, *, retain_graph: bool = True) -> State:
        """The total adjoint ∇_{s(t)} L of every state, the part through all later steps included: (T, B, …) leaves.

        The gradient of ``states`` is only the local part. Raises InputError when the loss does not depend on the scan.
        """
        flat = [leaf for leaves in self._handles for leaf in leaves]
        if not loss.requires_grad or not any(leaf.requires_grad for leaf in flat):
            raise InputError("the loss does not depend on what this scan computed, so its states have no adjoint.")
        found = iter(torch.autograd.grad(loss, flat, retain_graph=retain_graph, allow_unused=True))
        joined = []
        for leaves in self._handles:
            grads = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=False)]
            joined.append(self._unpack(torch.cat(grads)))
        return self._rebuild(joined)


def scan(
    cell: nn.Module,
    xs: Pytree,
    state: State = None,
    *,
    constants: Pytree = None,
    lengths: Tensor | list[int] | None = None,
    reverse: bool = False,
    remat: int | str | None = None,
    record: bool = False,
    backend: str = "auto",
) -> Any:
    """Unfold one step through time: s(t) = f(s(t−1), x(t)), differentiable in everything.

    Args:
        cell: any module whose ``forward(x, state)``, or ``forward(x, state, constants)``, gives ``(y, state)``.
            ``torch.nn.RNNCell``, ``LSTMCell`` and ``GRUCell`` are taken as they are.
        xs: (T, B, …) tensor, or tuples, lists and dicts of such; a leaf (T, 1, …) is shared by the rows.
        state: what the cell carries, (B, …) leaves; None asks ``cell.initial_state(batch, device=, dtype=)``.
        constants: what does not change over time, (B, …) leaves.
        lengths: (B,) integers, 0 to T. Past a sequence's end its state stays as it is, y is zero, no gradient flows,
            nothing is computed, and whatever stands in the padding is never read.
        reverse: start every sequence at its own last step; ``ys`` stay aligned with ``xs``.
        remat: None stores what the backward needs, k recomputes it from every k-th state, "auto" takes k = √T.
        record: also return a ``Recording`` of every value marked with ``elman.record`` and of all states.
        backend: "auto", "reference" (plain loop and autograd: the definition), "interpret" (compiled program).

    Returns:
        ``(ys, state)``: ys with (T, B, …) leaves and the state after each sequence's last step; with ``record=True``
        ``(ys, state, recording)``.

    Raises:
        CellError, StateError: the cell does not follow the protocol. InputError: xs, constants or lengths do not fit.
        OptionError: unknown backend or remat. UnfoldError: a backend asked for by name cannot run this step, or
        ``lengths`` are given and the step mixes the rows of the batch.

    With "auto", a step that cannot be unfolded runs on the plain loop, with one UnfoldWarning that says why.
    Source: Goodfellow, Bengio, Courville, Deep Learning (2016), section 10.1, equation 10.5.
    """
    leaves, spec = pytree.tree_flatten(xs)
    steps, batch = _extent(leaves)
    rows = rows_of(steps, batch, lengths)
    packed = [rows.pack(_widen(leaf, steps, batch)) for leaf in leaves]
    if rows.order is not None:
        state = pytree.tree_map_only(Tensor, rows.sort, state)
        constants = pytree.tree_map_only(Tensor, rows.sort, constants)
    ys, final, *recording = unfold(
        cell,
        rows,
        pytree.tree_unflatten(packed, spec),
        state,
        constants=constants,
        reverse=reverse,
        remat=remat,
        record=record,
        backend=backend,
    )
    ys = rows.unpack(ys) if isinstance(ys, Tensor) else pytree.tree_map_only(Tensor, rows.unpack, ys)
    if rows.order is not None:
        final = pytree.tree_map_only(Tensor, rows.unsort, final)
    return (ys, final, *recording)


def unfold(
    cell: nn.Module,
    rows: Rows,
    xs: Pytree,
    state: State = None,
    *,
    constants: Pytree = None,
    reverse: bool = False,
    remat: int | str | None = None,
    record: bool = False,
    backend: str = "auto",
    parameters: Mapping[str, Tensor] | None = None,
) -> Any:
    """``scan`` over rows that are packed already: xs leaves (N, …), state and constants (B, …), longest first.

    ``parameters`` stand in for the cell's own, by name, as in ``torch.func.functional_call``. Returns ys with
    (N, …) leaves and the final state longest first; arguments and errors otherwise as for ``scan``.
    """
    if backend not in BACKENDS:
        raise OptionError.unknown("backend", str(backend), BACKENDS)
    if not (remat is None or remat == "auto" or (isinstance(remat, int) and remat > 0)):
        raise OptionError(f"remat must be None, 'auto' or a positive number of steps; got {remat!r}.")
    job = _Job(cell, rows, xs, state, constants, record, parameters)
    if _runs_reference(job, backend):
        return job.by_reference(reverse)
    try:
        compiled = compiled_for(job)
    except UnfoldError as error:
        if backend != "auto" or (isinstance(error, MixedRowsError) and not rows.uniform):
            raise
        _warn_once(cell, error)
        return job.by_reference(reverse)
    return job.by_program(compiled, reverse, remat)


def _runs_reference(job: _Job, backend: str) -> bool:
    """Whether the plain loop is what was asked for, or what serves best."""
    if backend == "reference":
        return True
    if torch._C._functorch.maybe_current_level() is not None and any(map(_wrapped, job.tensors())):
        if _forward_mode():
            raise ForwardModeError(
                "forward-mode differentiation (jvp, jacfwd, hessian) is not derived by this backend. Use "
                "scan(..., backend='reference'), or reverse mode (torch.func.vjp, grad, jacrev)."
            )
        return True
    # One step is the step itself: there is nothing to unfold.
    return backend == "auto" and job.rows.steps <= 1


def _wrapped(leaf: Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(leaf)


def _forward_mode() -> bool:
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() == torch._C._functorch.TransformType.Jvp for level in stack)


class _Tree:
    """A pytree taken apart into its tensors; anything else in it (None, numbers) stays part of the structure."""

    __slots__ = ("leaves", "others", "spec")

    def __init__(self, tree: Pytree) -> None:
        if isinstance(tree, Tensor):
            self.leaves: list[Tensor] = [tree]
            self.spec: Any = None
            self.others: tuple[Any, ...] = ()
            return
        leaves, self.spec = pytree.tree_flatten(tree)
        self.leaves = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.others = tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves)

    def rebuild(self, leaves: list[Any]) -> Pytree:
        if self.spec is None:
            return leaves[0]
        tensors = iter(leaves)
        return pytree.tree_unflatten([next(tensors) if o is _TENSOR else o for o in self.others], self.spec)

    def same_structure(self, other: _Tree) -> bool:
        return self.spec == other.spec and len(self.leaves) == len(other.leaves)

    def key(self) -> Any:
        return (repr(self.spec), tuple(o if o is _TENSOR else repr(o) for o in self.others)) if self.spec else None


_TENSOR = object()


class _Job:
    """One call of unfold, taken apart."""

    def __init__(
        self,
        cell: nn.Module,
        rows: Rows,
        xs: Pytree,
        state: State,
        constants: Pytree,
        record: bool,
        parameters: Mapping[str, Tensor] | None,
    ) -> None:
        if not isinstance(cell, nn.Module):
            raise CellError(f"cell must be an nn.Module with forward(x, state) -> (y, state); got {_named(cell)}.")
        self.cell, self.rows, self.record = cell, rows, record
        self.own = parameters is None
        if parameters is None:
            self.parameters = {**dict(cell.named_parameters()), **dict(cell.named_buffers())}
        else:
            self.parameters = dict(parameters)
        self.xs = _Tree(xs)
        self.takes_constants = constants is not None
        self.constants = _Tree(() if constants is None else constants)
        self.state = _Tree(self._initial_state() if state is None else state)
        self._check()

    def _initial_state(self) -> State:
        make = getattr(self.cell, "initial_state", None) or _TORCH_CELL_STATES.get(type(self.cell))
        if make is None:
            raise CellError(
                f"{type(self.cell).__name__} has no initial_state(batch, *, device, dtype), and no state was given. "
                "Add the method, or pass state= to scan."
            )
        first = self.xs.leaves[0]
        options = {"device": first.device, "dtype": self._dtype()}
        if type(self.cell) in _TORCH_CELL_STATES:
            return make(self.cell, self.rows.batch, **options)
        return make(self.rows.batch, **options)

    def _dtype(self) -> torch.dtype:
        for leaf in (*self.parameters.values(), *self.xs.leaves):
            if leaf.is_floating_point():
                return leaf.dtype
        return torch.get_default_dtype()

    def _check(self) -> None:
        batch = self.rows.batch
        for what, tree, error in (("state", self.state, StateError), ("constants", self.constants, InputError)):
            for leaf in tree.leaves:
                if leaf.dim() == 0 or leaf.shape[0] != batch:
                    raise error(
                        f"every leaf of {what} must be (B, …) with B = {batch}, the batch of xs; got {tuple(leaf.shape)}."
                    )

    def tensors(self) -> list[Tensor]:
        return [*self.xs.leaves, *self.state.leaves, *self.constants.leaves, *self.parameters.values()]

    # -- the step as a function of flat lists of tensors -----------------------------------------------------------

    def step(self, parameters: dict[str, Tensor] | None, seen: dict[str, Any]) -> Callable[..., Any]:
        """``(xs, state, constants) -> (ys, next state, recorded)``, flat; leaves what y is made of in ``seen``."""
        cell, torch_cell = self.cell, type(self.cell) in _TORCH_CELL_STATES

        def one(xs: list[Tensor], state: list[Tensor], constants: list[Tensor]) -> Any:
            args = [self.xs.rebuild(xs), self.state.rebuild(state)]
            if self.takes_constants:
                args.append(self.constants.rebuild(constants))
            with recorder(self.record) as recorded:
                if parameters is None:
                    result = cell(*args)
                else:
                    result = torch.func.functional_call(cell, parameters, tuple(args))
            y, new = (_first(result), result) if torch_cell else self._pair(result)
            seen["y"] = y_tree = _Tree(y)
            return y_tree.leaves, self._carry(_Tree(new), state), dict(recorded)

        return one

    def _pair(self, result: Any) -> tuple[Any, Any]:
        if not isinstance(result, tuple) or len(result) != 2:
            raise CellError(
                f"{type(self.cell).__name__}.forward must return a pair (y, state); got {_named(result)}. "
                "A step that has no output of its own returns its state twice."
            )
        return result

    def _carry(self, new: _Tree, old: list[Tensor]) -> list[Tensor]:
        """The next state, checked against the one that came in."""
        name = type(self.cell).__name__
        if not new.same_structure(self.state):
            raise StateError(
                f"{name} returned a state of another structure than it was given: {new.spec or 'a tensor'} instead of "
                f"{self.state.spec or 'a tensor'}."
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
                        f"{name} changes the type of its state: leaf {i} was {before.dtype} and became {after.dtype}. "
                        "Give the initial state and xs the type of the parameters."
                    )
                after = after.to(before.dtype)
            carried.append(after)
        return carried

    # -- running -----------------------------------------------------------------------------------------------------

    def by_reference(self, reverse: bool) -> Any:
        seen: dict[str, Any] = {}
        step = self.step(None if self.own else self.parameters, seen)
        names: list[str] = []

        def one(xs: list[Tensor], state: list[Tensor], constants: list[Tensor]) -> Any:
            ys, new, recorded = step(xs, state, constants)
            names[:] = list(recorded)
            return [*ys, *recorded.values()], new

        outs, final, after = reference.unfold(
            one, self.rows, self.xs.leaves, self.state.leaves, self.constants.leaves, reverse
        )
        y_tree: _Tree = seen["y"]
        count = len(y_tree.leaves)
        result = (y_tree.rebuild(outs[:count]), self.state.rebuild(final))
        if not self.record:
            return result
        states = [torch.cat(leaves) for leaves in zip(*after, strict=True)]
        handles = [list(leaves) for leaves in zip(*after, strict=True)]
        return (*result, self._recording(dict(zip(names, outs[count:], strict=True)), states, handles))

    def by_program(self, compiled: Compiled, reverse: bool, remat: int | str | None) -> Any:
        rows, device = self.rows, self.xs.leaves[0].device
        leaves = [*self.parameters.values(), *self.constants.leaves]
        weights = compiled.weights(rows.batch, leaves, device.type)
        draws = compiled.draws(rows.total, device) if compiled.step.draws else []
        perturbations = self._perturbations() if self.record else []
        xs = [*self.xs.leaves, *perturbations]
        counts = (len(xs), len(self.state.leaves), len(weights), len(draws))
        call = Call(compiled, rows, reverse, chunk_length(remat, rows.steps), counts)
        ys, final, kept = run(call, [*xs, *self.state.leaves, *weights, *draws])
        y_tree: _Tree = compiled.y_tree  # type: ignore[attr-defined]
        result = (y_tree.rebuild(ys), self.state.rebuild(final))
        if not self.record:
            return result
        states = [kept.pop(f"state {i}") for i in range(len(self.state.leaves))]
        handles = iter(perturbations)
        tracked = [[next(handles)] if s.is_floating_point() else [torch.zeros(())] for s in self.state.leaves]
        return (*result, self._recording(kept, states, tracked))

    def _perturbations(self) -> list[Tensor]:
        n = self.rows.total
        return [
            torch.zeros(n, *s.shape[1:], dtype=s.dtype, device=s.device, requires_grad=torch.is_grad_enabled())
            for s in self.state.leaves
            if s.is_floating_point()
        ]

    def _recording(self, values: dict[str, Tensor], states: list[Tensor], handles: list[list[Tensor]]) -> Recording:
        unpack, rebuild = self.rows.unpack, self.state.rebuild
        return Recording({k: unpack(v) for k, v in values.items()}, rebuild([unpack(s) for s in states]), handles, rebuild, unpack)

    # -- tracing -----------------------------------------------------------------------------------------------------

    def key(self) -> Any:
        """Everything that the traced program depends on (see compiler/key.py)."""
        first = self.xs.leaves[0]
        return (
            fingerprint(self.cell),
            self.record,
            self.takes_constants,
            self.xs.key(),
            self.state.key(),
            self.constants.key(),
            tuple((leaf.shape[1:], leaf.dtype, leaf.device) for leaf in (*self.xs.leaves, *self.state.leaves)),
            tuple((leaf.shape[1:], leaf.dtype, leaf.device) for leaf in self.constants.leaves),
            tuple((name, p.shape, p.dtype, p.device) for name, p in self.parameters.items()),
            ambient(first.device),
        )

    def compile(self) -> Compiled:
        seen: dict[str, Any] = {}
        names = list(self.parameters)

        def function(xs: list[Tensor], state: list[Tensor], weights: list[Tensor]) -> Any:
            own = dict(zip(names, weights, strict=False))
            ys, new, recorded = self.step(own, seen)(xs, state, weights[len(names) :])
            for i, y in enumerate(ys):
                if y.dim() == 0 or y.shape[0] != xs[0].shape[0]:
                    raise CellError(
                        f"{type(self.cell).__name__} returns a y whose leaf {i} does not start with the batch "
                        f"dimension: {tuple(y.shape)}. Every leaf of y must be (B, …)."
                    )
            kept = {**recorded, **{f"state {i}": leaf for i, leaf in enumerate(new)}} if self.record else recorded
            return ys, new, kept

        with _unchanged(self.cell):
            traced = trace(
                function,
                [Leaf(tuple(x.shape[1:]), x.dtype, x.device, True) for x in self.xs.leaves],
                [Leaf(tuple(s.shape[1:]), s.dtype, s.device, True) for s in self.state.leaves],
                [
                    *(Leaf(tuple(p.shape), p.dtype, p.device, False) for p in self.parameters.values()),
                    *(Leaf(tuple(c.shape[1:]), c.dtype, c.device, True) for c in self.constants.leaves),
                ],
            )
        if self.record:
            perturb(traced)
        compiled = Compiled(traced)
        compiled.y_tree = seen["y"]  # type: ignore[attr-defined]
        return compiled


class _unchanged:
    """Tracing must leave the module as it was. Raises MutationError when the step changes Python state."""

    def __init__(self, cell: nn.Module) -> None:
        self.cell = cell

    def __enter__(self) -> None:
        self.before = {part: dict(part.__dict__) for part in self.cell.modules()}
        self.key = fingerprint(self.cell)

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        changed = kind is None and fingerprint(self.cell) != self.key
        names = []
        for part, attributes in self.before.items():
            now = part.__dict__
            names += [
                f"{type(part).__name__}.{k}" for k, v in now.items() if k not in attributes or attributes[k] is not v
            ]
            now.clear()
            now.update(attributes)
        if changed:
            raise MutationError(
                f"the step changes Python state of its module ({', '.join(names) or 'inside a container'}), which one "
                "traced program cannot follow. Carry it as a tensor in the state, or count outside the step."
            )


_programs: OrderedDict[Any, Compiled | UnfoldError] = OrderedDict()
_lock = threading.RLock()
_warned: set[str] = set()


def compiled_for(job: _Job) -> Compiled:
    """The program of a job, traced on first use. Raises what tracing raised, also the second time."""
    key = job.key()
    found = _programs.get(key)
    if found is None:
        with _lock:
            found = _programs.get(key)
            if found is None:
                try:
                    found = job.compile()
                except UnfoldError as error:
                    found = error.with_traceback(None)
                _programs[key] = found
                while len(_programs) > _MOST_PROGRAMS:
                    _programs.popitem(last=False)
    if isinstance(found, UnfoldError):
        raise found
    return found


def _warn_once(cell: nn.Module, error: UnfoldError) -> None:
    text = f"{type(cell).__name__} runs on the plain loop (backend 'reference'): {error}"
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, UnfoldWarning, stacklevel=4)


def _extent(leaves: list[Any]) -> tuple[int, int]:
    """T and B of the leaves of xs."""
    if not leaves:
        raise InputError("xs holds no tensor; scan needs at least one (T, B, …) tensor to know how far to unfold.")
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or leaf.dim() < 2:
            shape = tuple(leaf.shape) if isinstance(leaf, Tensor) else _named(leaf)
            raise InputError(f"every leaf of xs must be a tensor (T, B, …); got {shape}. Add a batch dimension.")
    steps, batch = leaves[0].shape[0], max(leaf.shape[1] for leaf in leaves)
    if any(leaf.shape[0] != steps or leaf.shape[1] not in (1, batch) for leaf in leaves):
        raise InputError(f"the leaves of xs must agree in T and B; got {[tuple(leaf.shape) for leaf in leaves]}.")
    if steps == 0:
        raise InputError("xs has no steps (T = 0); there is nothing to unfold.")
    return steps, batch


def _widen(leaf: Tensor, steps: int, batch: int) -> Tensor:
    return leaf if leaf.shape[1] == batch else leaf.expand(steps, batch, *leaf.shape[2:])


def _named(thing: Any) -> str:
    return f"a {type(thing).__name__}" + (f" of {len(thing)}" if isinstance(thing, (tuple, list)) else "")


def _first(state: Any) -> Tensor:
    return state[0] if isinstance(state, tuple) else state


def _one_state(cell: Any, batch: int, **options: Any) -> Tensor:
    return torch.zeros(batch, cell.hidden_size, **options)


def _two_states(cell: Any, batch: int, **options: Any) -> tuple[Tensor, Tensor]:
    return _one_state(cell, batch, **options), _one_state(cell, batch, **options)


# torch.nn's own cells return only their state; their output is its first tensor.
_TORCH_CELL_STATES: dict[type, Callable[..., Any]] = {
    nn.RNNCell: _one_state,
    nn.GRUCell: _one_state,
    nn.LSTMCell: _two_states,
}


