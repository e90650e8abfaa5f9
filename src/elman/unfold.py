"""``scan``: unfold any step through time. What is public of the engine; how it works is in ``compiler``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad as fwAD
from torch.utils import _pytree as pytree

from .compiler import reference
from .drawn import drawn_for
from .errors import (
    CellError,
    ForwardModeError,
    InputError,
    MixedRowsError,
    OptionError,
    StateError,
    UnfoldError,
    UnfoldWarning,
    UsageError,
)
from .packing import Rows, extent, rows_of, widen
from .protocol import MACHINE, MISTAKES, Protocol, Tree, start, written
from .types import Pytree, State

if TYPE_CHECKING:
    from .compiler.autograd import Run
    from .compiler.compiled import Compiled

__all__ = ["BACKENDS", "Recording", "prepare", "scan", "scan_by", "unfold"]

BACKENDS = ("auto", "reference", "interpret", "llvm")


@dataclass(repr=False)
class Recording:
    """What ``scan(..., record=True)`` returns besides: every marked value and every state, for all steps.

    ``values[name]`` is (T, B, …), zero in the padding; ``states`` has the structure of the state with (T, B, …)
    leaves, each the state after the step.
    """

    values: dict[str, Tensor]
    states: State
    _handles: list[list[Tensor]] = field(repr=False)
    _rows: Rows = field(repr=False)
    _structure: Tree = field(repr=False)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name!r}: {tuple(value.shape)}" for name, value in self.values.items())
        return f"Recording(values={{{shapes}}}, states of {len(self._structure.leaves)} leaves)"

    def adjoint(self, loss: Tensor, *, retain_graph: bool = True) -> State:
        """The total adjoint ∇_{s(t)} L of every state, through all later steps: (T, B, …) leaves.

        The gradient of ``states`` is only its local part. Raises InputError when the loss does not depend on the
        scan. Source: Goodfellow et al. (2016), equations 10.20 and 10.21.
        """
        flat = [leaf for leaves in self._handles for leaf in leaves if leaf.requires_grad]
        if not loss.requires_grad or not flat:
            raise InputError("the loss does not depend on what this scan computed, so its states have no adjoint.")
        gradients = torch.autograd.grad(loss, flat, retain_graph=retain_graph, allow_unused=True)
        if all(g is None for g in gradients):
            raise InputError("the loss does not depend on what this scan computed, so its states have no adjoint.")
        found = dict(zip(map(id, flat), gradients, strict=True))
        grads = [[found.get(id(leaf)) for leaf in leaves] for leaves in self._handles]
        joined = [
            torch.cat([torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gs, strict=True)])
            for leaves, gs in zip(self._handles, grads, strict=True)
        ]
        return self._structure.rebuild([self._rows.unpack(leaf) for leaf in joined])


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
        remat: None stores what the backward needs, k recomputes it from every k-th state, "auto" takes about √T.
        record: also return a ``Recording`` of every value marked with ``elman.record`` and of all states.
        backend: "auto", "reference" (plain loop and autograd: the definition), "interpret" (compiled program, run
            through PyTorch's operations), "llvm" (its loops as machine code; on a CPU).

    Returns:
        ``(ys, state)``: ys with (T, B, …) leaves and the state after each sequence's last step; with ``record=True``
        ``(ys, state, recording)``.

    Raises:
        CellError, StateError: the cell does not follow the protocol. InputError: xs, constants or lengths do not fit.
        OptionError: unknown backend or remat. UnfoldError: a backend asked for by name cannot run this step, or
        ``lengths`` are given and the step mixes the rows of the batch. ForwardModeError: see there.

    With "auto", a step that cannot be unfolded runs on the plain loop, with one UnfoldWarning that says why; so does
    a call under torch.func transforms, and a single step, which is the step itself.
    Source: Goodfellow, Bengio, Courville, Deep Learning (2016), section 10.1, equation 10.5.
    """
    return scan_by(None, cell, xs, state, constants, lengths, reverse, record, remat=remat, backend=backend)


def scan_by(
    run: Run | None,
    cell: nn.Module,
    xs: Pytree,
    state: State,
    constants: Pytree,
    lengths: Tensor | list[int] | None,
    reverse: bool,
    record: bool = False,
    **options: Any,
) -> Any:
    """``scan`` with these arguments; where a program runs it, that is left to ``run``."""
    leaves, spec = ([xs], None) if isinstance(xs, Tensor) else pytree.tree_flatten(xs)
    steps, batch = extent(leaves)
    if _is_fake(leaves[0]) and lengths is None and not record:
        return _inside_a_step(cell, xs, state, constants, steps, batch, reverse)
    in_graph_lengths = None
    if lengths is not None and torch.compiler.is_compiling():  # their values are not known while compiling
        in_graph_lengths, lengths = torch.as_tensor(lengths), None
    rows = rows_of(steps, batch, lengths, leaves[0].device)
    packed = [rows.pack(widen(leaf, steps, batch)) for leaf in leaves]
    if rows.order is not None:
        if state is None:  # made in the caller's order, then sorted
            own = _start(cell, leaves, batch, None, constants)
            state = own.rebuild(own.leaves)
        _check_batch(Tree(state).leaves, Tree(constants).leaves, batch)
        state = pytree.tree_map_only(Tensor, rows.sort, state)
        constants = pytree.tree_map_only(Tensor, rows.sort, constants)
    ys, final, *recording = unfold(
        cell,
        rows,
        packed[0] if spec is None else pytree.tree_unflatten(packed, spec),
        state,
        constants=constants,
        reverse=reverse,
        record=record,
        _lengths=in_graph_lengths,
        _run=run,
        **options,
    )
    ys = rows.unpack(ys) if isinstance(ys, Tensor) else pytree.tree_map_only(Tensor, rows.unpack, ys)
    if rows.order is not None:
        final = pytree.tree_map_only(Tensor, rows.unsort, final)
    return (ys, final, *recording)


def _inside_a_step(
    cell: nn.Module, xs: Pytree, state: State, constants: Pytree, steps: int, batch: int, reverse: bool
) -> tuple[Pytree, State]:
    """A scan inside a step that is being traced is part of that step: its plain loop, with masks drawn before it."""
    wide = pytree.tree_map(lambda leaf: widen(leaf, steps, batch), xs)
    first = pytree.tree_map(lambda leaf: leaf[0], wide)
    protocol, fixed = prepare(cell, Rows(1, batch), first, state, constants, False)
    step, now, leaves = protocol.step(None), protocol.state.leaves, pytree.tree_leaves(wide)
    ys: list[list[Tensor]] = [[]] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        ys[t], now, _ = step([leaf[t] for leaf in leaves], now, fixed)
    assert protocol.y is not None
    return protocol.y.rebuild([torch.stack(column) for column in zip(*ys, strict=True)]), protocol.state.rebuild(now)


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
    _lengths: Tensor | None = None,
    _run: Run | None = None,
) -> Any:
    """``scan`` over rows that are packed already: xs leaves (N, …), state and constants (B, …), longest first.

    ``parameters`` stand in for the cell's own, by name, as in ``torch.func.functional_call``. Returns ys with
    (N, …) leaves and the final state longest first; arguments and errors otherwise as for ``scan``.
    """
    if backend not in BACKENDS:
        raise OptionError.unknown("backend", str(backend), BACKENDS)
    whole = isinstance(remat, int) and not isinstance(remat, bool) and remat > 0
    if not (remat is None or remat == "auto" or whole):
        raise OptionError(f"remat must be None, 'auto' or a positive number of steps; got {remat!r}.")
    given = None if parameters is None else dict(parameters)
    protocol, constant_leaves = prepare(cell, rows, xs, state, constants, record, given)
    own = protocol.tensors
    tensors = [*protocol.xs.leaves, *protocol.state.leaves, *constant_leaves, *own.values()]
    if _lengths is None and _runs_reference(backend, rows, tensors):
        return _by_reference(protocol, rows, constant_leaves, given, reverse)
    if backend == "llvm" and (device := protocol.xs.leaves[0].device.type) != "cpu":
        raise OptionError(f"backend 'llvm' is machine code for the CPU, and xs are on {device}; 'auto' serves both.")
    # What traces and compiles is loaded on first use: importing it takes as long as importing torch.
    from .compiler import cache

    if torch.compiler.is_compiling() and not record:
        from .compiler.custom_op import in_graph

        return in_graph(protocol, rows, constant_leaves, own, reverse, remat, _lengths)
    signature = cache.Signature.of(protocol.xs.leaves, protocol.state.leaves, constant_leaves, own)
    try:
        program = cache.program_of(protocol, signature)
        kernels = backend != "interpret" and protocol.xs.leaves[0].device.type == "cpu"
        return _by_program(program, protocol, rows, [*own.values(), *constant_leaves], reverse, remat, kernels, _run)
    except (UsageError, UnfoldError, RuntimeError, IndexError) as error:
        failed = error  # handled outside: what the user's step raises shall not have this as its context
    try:
        result = _instead(failed, protocol, rows, constant_leaves, given, reverse, backend)
        assert isinstance(failed, UnfoldError)  # anything else was raised again
        cache.remember(protocol, signature, failed)
        _warn_once(protocol, failed)
        return result
    finally:
        del failed  # its traceback holds this frame


def _instead(
    failed: UsageError | UnfoldError | RuntimeError | IndexError,
    protocol: Protocol,
    rows: Rows,
    constants: list[Tensor],
    parameters: dict[str, Tensor] | None,
    reverse: bool,
    backend: str,
) -> Any:
    """The plain loop, where no program ran; a mistake of the user's is raised there, with sizes that the user knows."""
    final = not isinstance(failed, UnfoldError) or backend != "auto"
    final = final or (isinstance(failed, MixedRowsError) and not rows.uniform)
    if final and (isinstance(failed, MACHINE) or (isinstance(failed, UnfoldError) and failed.__cause__ is None)):
        raise failed
    with torch.set_grad_enabled(torch.is_grad_enabled() and not final):
        result = _by_reference(protocol, rows, constants, parameters, reverse)
    if final:
        raise failed
    return result


def prepare(
    cell: nn.Module,
    rows: Rows,
    xs: Pytree,
    state: State,
    constants: Pytree,
    record: bool,
    parameters: dict[str, Tensor] | None = None,
) -> tuple[Protocol, list[Tensor]]:
    """Check what a cell is given. Returns its protocol and the leaves of the constants."""
    if not isinstance(cell, nn.Module):
        raise CellError(f"cell must be an nn.Module with forward(x, state) -> (y, state); got a {type(cell).__name__}.")
    x_tree = Tree(xs)
    c_tree = None if constants is None else Tree(constants)
    s_tree = _start(cell, x_tree.leaves, rows.batch, parameters, constants) if state is None else Tree(state)
    constant_leaves = c_tree.leaves if c_tree else []
    _check_batch(s_tree.leaves, constant_leaves, rows.batch)
    protocol = Protocol(cell, x_tree, s_tree, c_tree, record)
    own = _tensors_of(cell) if parameters is None else parameters
    like = next((leaf for leaf in (*s_tree.leaves, *x_tree.leaves) if leaf.is_floating_point()), None)
    each, protocol.masks = drawn_for(cell, own, rows.batch, x_tree.leaves[0] if like is None else like)
    protocol.drawn, protocol.tensors = tuple(each), {**own, **protocol.masks}
    return protocol, [*constant_leaves, *each.values()]


def _start(
    cell: nn.Module, xs: list[Tensor], batch: int, parameters: dict[str, Tensor] | None, constants: Pytree
) -> Tree:
    """The cell's own initial state, checked."""
    state = Tree(start(cell, xs, batch, None if parameters is None else parameters.values(), constants))
    _check_batch(state.leaves, [], batch, cell)
    return state


def _check_batch(state: list[Tensor], constants: list[Tensor], batch: int, made_by: nn.Module | None = None) -> None:
    for leaf in state:
        if leaf.dim() == 0 or leaf.shape[0] != batch:
            own = getattr(made_by, "initial_state", None)
            made = f"what {type(made_by).__name__}.initial_state{written(own)} returned"
            raise StateError(_wrong_batch("state" if made_by is None else made, leaf, batch))
    for leaf in constants:
        if leaf.dim() == 0 or leaf.shape[0] != batch:
            raise InputError(_wrong_batch("constants", leaf, batch))


def _wrong_batch(what: str, leaf: Tensor, batch: int) -> str:
    return f"every leaf of {what} must be (B, …) with B = {batch}, the batch of xs; got {tuple(leaf.shape)}."


def _tensors_of(cell: nn.Module) -> dict[str, Tensor]:
    """Parameters, then buffers, by name, each once: found in one walk, for a call of one step pays for every walk."""
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    seen: set[Tensor] = set()
    for prefix, part in cell.named_modules():
        before = f"{prefix}." if prefix else ""
        for found, tensors in ((parameters, part._parameters), (buffers, part._buffers)):
            for name, tensor in tensors.items():
                if tensor is not None and tensor not in seen:
                    seen.add(tensor)
                    found[before + name] = tensor
    return {**parameters, **buffers}


def _runs_reference(backend: str, rows: Rows, tensors: list[Tensor]) -> bool:
    """Whether the plain loop is what was asked for, or what serves best."""
    if backend == "reference":
        return True
    if torch._C._functorch.maybe_current_level() is not None and any(map(_wrapped, tensors)):
        if _forward_mode():
            raise ForwardModeError(_FORWARD_MODE)
        return True
    if fwAD._current_level >= 0 and any(fwAD.unpack_dual(t).tangent is not None for t in tensors):
        raise ForwardModeError(_FORWARD_MODE)
    # One step is the step itself: there is nothing to unfold.
    return backend == "auto" and rows.steps <= 1 and not torch.compiler.is_compiling()


_FORWARD_MODE = (
    "forward-mode differentiation (jvp, jacfwd, hessian, dual numbers) is not derived by this backend. Use "
    "scan(..., backend='reference'), or reverse mode (torch.func.vjp, grad, jacrev)."
)


def _is_fake(leaf: Tensor) -> bool:
    """Whether it is a tensor without data, of a step that is being traced."""
    return type(leaf).__name__ == "FakeTensor"


def _transformed(leaves: list[Tensor]) -> bool:
    """Whether some of them have no memory of their own: they stand for a transform, or for a trace."""
    return any(_is_fake(leaf) or _wrapped(leaf) for leaf in leaves)


def _wrapped(leaf: Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(leaf)


def _forward_mode() -> bool:
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() == torch._C._functorch.TransformType.Jvp for level in stack)


def _by_reference(
    protocol: Protocol, rows: Rows, constants: list[Tensor], parameters: dict[str, Tensor] | None, reverse: bool
) -> Any:
    step = protocol.step(parameters)
    names: list[str] = []

    def one(xs: list[Tensor], state: list[Tensor], here: list[Tensor]) -> Any:
        try:
            ys, new, recorded = step(xs, state, here)
        except MISTAKES as error:
            if torch.compiler.is_compiling():
                raise
            from .compiler.mistakes import mistake

            roles = _roles(protocol, [xs, state, here], parameters)
            wrong = mistake(protocol, error, lambda: step(xs, state, here), roles, (rows.steps, rows.batch))
            if wrong is None:
                raise
            raise wrong from error
        names[:] = list(recorded)
        if protocol.record:  # a state that is handed through must be told apart from what it was
            given = {id(leaf) for leaf in (*xs, *state)}
            new = [_handle(s.view_as(s) if id(s) in given else s) for s in new]
        return [*ys, *recorded.values()], new

    if _without_features(protocol.xs.leaves) and not torch.compiler.is_compiling():
        one = _watched(one, protocol, rows, parameters)
    outs, final, after = reference.unfold(one, rows, protocol.xs.leaves, protocol.state.leaves, constants, reverse)
    assert protocol.y is not None
    if rows.steps == 1:  # nothing was put together, so ys and state may be one tensor, or an input
        given = [*protocol.xs.leaves, *protocol.state.leaves]
        separate = reference.apart([*outs, *final], given) if not _transformed(outs) else [*outs, *final]
        outs, final = separate[: len(outs)], separate[len(outs) :]
    count = len(protocol.y.leaves)
    result = (protocol.y.rebuild(outs[:count]), protocol.state.rebuild(final))
    if not protocol.record:
        return result
    handles = [list(leaves) for leaves in zip(*after, strict=True)]
    values = dict(zip(names, outs[count:], strict=True))
    return (*result, _recording(protocol, rows, values, [torch.cat(leaves) for leaves in handles], handles))


def _handle(state: Tensor) -> Tensor:
    """A state of a recorded step, as what an adjoint is a gradient in: also where no gradient flows into it."""
    alone = state.is_floating_point() and not state.requires_grad and torch.is_grad_enabled()
    return state.detach().requires_grad_() if alone and torch._C._functorch.maybe_current_level() is None else state


def _without_features(leaves: list[Tensor]) -> bool:
    """Whether some packed leaf of xs may be (T, D) given for (T, B, D): a number for each row, no symbol."""
    return any(leaf.dim() == 1 and leaf.is_floating_point() for leaf in leaves)


def _watched(one: Any, protocol: Protocol, rows: Rows, parameters: dict[str, Tensor] | None) -> Any:
    """The step, which in its first call must not take (T, B) for (T, D)."""
    from .compiler.mistakes import Operands

    seen: list[bool] = []

    def first(*leaves: list[Tensor]) -> Any:
        if seen:
            return one(*leaves)
        seen.append(True)
        with Operands(protocol, _roles(protocol, [*leaves], parameters), (rows.steps, rows.batch)):
            return one(*leaves)

    return first


def _by_program(
    program: Compiled,
    protocol: Protocol,
    rows: Rows,
    leaves: list[Tensor],
    reverse: bool,
    remat: int | str | None,
    kernels: bool,
    by: Run | None,
) -> Any:
    from .compiler.autograd import Call, chunk_length, run

    xs, state = protocol.xs.leaves, protocol.state.leaves
    device = xs[0].device
    weights = program.weights(rows.batch, leaves, device.type)
    draws = program.draws(rows.total, device) if program.step.draws else []
    handles = _perturbations(rows, state) if protocol.record else []
    xs = [*xs, *(h for h in handles if h.is_floating_point())]
    counts = (len(xs), len(state), len(weights), len(draws))
    call = Call(program, rows, reverse, chunk_length(remat, rows.steps, rows.batch), counts, device, kernels)
    ys, final = (by or run)(call, [*xs, *state, *weights, *draws])
    n = len(program.y.leaves)
    result = (program.y.rebuild(ys[:n]), protocol.state.rebuild(final))
    if not protocol.record:
        return result
    values = dict(zip(program.recorded, ys[n:], strict=False))
    states = ys[n + len(values) :]
    return (*result, _recording(protocol, rows, values, states, [[h] for h in handles]))


def _roles(
    protocol: Protocol, leaves: list[list[Tensor]], parameters: dict[str, Tensor] | None
) -> dict[str, list[Tensor]]:
    own = _tensors_of(protocol.cell) if parameters is None else parameters
    return {**dict(zip(("x", "state", "constants"), leaves, strict=True)), "weight": list(own.values())}


def _perturbations(rows: Rows, state: list[Tensor]) -> list[Tensor]:
    """A zero for every state at every step: what is added to a state has its total adjoint as gradient."""
    found = []
    for s in state:
        track = s.is_floating_point() and torch.is_grad_enabled()
        found.append(torch.zeros(rows.total, *s.shape[1:], dtype=s.dtype, device=s.device, requires_grad=track))
    return found


def _recording(
    protocol: Protocol, rows: Rows, values: dict[str, Tensor], states: list[Tensor], handles: list[list[Tensor]]
) -> Recording:
    unpacked = {name: rows.unpack(value) for name, value in values.items()}
    structure = protocol.state
    return Recording(unpacked, structure.rebuild([rows.unpack(s) for s in states]), handles, rows, structure)


_warned: set[str] = set()


def _warn_once(protocol: Protocol, error: Exception) -> None:
    text = f"{type(protocol.cell).__name__} runs on the plain loop (backend 'reference'): {error}"
    if _without_features(protocol.xs.leaves):
        text += " Note that xs without features are (T, B); (T, D) needs its batch dimension, xs.unsqueeze(1)."
    if text not in _warned:
        from .compiler.step import level_of_the_caller

        _warned.add(text)
        warnings.warn(text, UnfoldWarning, stacklevel=level_of_the_caller())
