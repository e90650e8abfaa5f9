"""Programs that were traced already, by everything that they depend on (see ``key``); they are shared by all cells
that are alike."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import MixedRowsError, MutationError, UnfoldError, UnsupportedError
from ..protocol import Protocol
from . import graphed
from .compiled import Compiled
from .key import ambient, fingerprint, forget_classes
from .lock import tracing
from .step import Leaf, user_line
from .trace import perturb, trace
from .twins import Twins

__all__ = ["Signature", "forget", "program_of", "remember"]

_MOST = 256
_programs: dict[Any, Compiled | UnfoldError] = {}


class Signature(NamedTuple):
    """What a program needs to know of the tensors of a call: a Leaf each, and the names of the parameters."""

    xs: tuple[Leaf, ...]
    state: tuple[Leaf, ...]
    constants: tuple[Leaf, ...]
    parameters: tuple[Leaf, ...]
    names: tuple[str, ...]

    @classmethod
    def of(
        cls, xs: list[Tensor], state: list[Tensor], constants: list[Tensor], parameters: dict[str, Tensor]
    ) -> Signature:
        return cls(
            tuple([Leaf(x.shape[1:], x.dtype, x.device, True) for x in xs]),
            tuple([Leaf(s.shape[1:], s.dtype, s.device, True) for s in state]),
            tuple([Leaf(c.shape[1:], c.dtype, c.device, True) for c in constants]),
            tuple([Leaf(p.shape, p.dtype, p.device, False) for p in parameters.values()]),
            tuple(parameters),
        )


def program_of(protocol: Protocol, signature: Signature) -> Compiled:
    """The program of a cell for such tensors, traced on first use.

    Raises what tracing raises; an UnfoldError is remembered like a program.
    """
    key = _key(protocol, signature)
    found = _programs.get(key)
    if found is None:
        with tracing():
            key = _key(protocol, signature)
            found = _programs.get(key)
            if found is None:
                key, found = _traced(protocol, signature)
                _programs[key] = found
                while len(_programs) > _MOST:
                    del _programs[next(iter(_programs))]
    if isinstance(found, UnfoldError):
        raise type(found)(*found.args) from found.__cause__  # raised itself, it would keep the caller's frames
    return found


def _traced(protocol: Protocol, signature: Signature) -> tuple[Any, Compiled | UnfoldError]:
    """The program and its key, or why there is none."""
    for _ in range(2):
        key, found = _key(protocol, signature), _attempted(protocol, signature)
        if _key(protocol, signature) == key:
            break
    else:  # the first time it may have been another thread
        text = (
            "the step changes a global name, a closure or an attribute of a class that it reads, which one traced "
            "program cannot follow. Carry it as a tensor in the state, or count outside the step."
        )
        return key, MutationError(text)
    if isinstance(found, UnfoldError) and found.__cause__ is not None:  # perhaps a mistake in the step: see remember
        raise found
    return key, found


def _attempted(protocol: Protocol, signature: Signature) -> Compiled | UnfoldError:
    try:
        return _trace(protocol, signature)
    except UnfoldError as error:
        return error if error.__cause__ is not None else error.with_traceback(None)


def remember(protocol: Protocol, signature: Signature, error: UnfoldError) -> None:
    """The plain loop runs this step, so what tracing raised is no mistake of the user's: raise it at once next time."""
    _programs[_key(protocol, signature)] = error
    inner: BaseException | None = error
    while inner is not None:  # a traceback holds all the frames of the callers
        inner = inner.with_traceback(None).__cause__ or inner.__context__


def _key(protocol: Protocol, signature: Signature) -> Any:
    trees = (protocol.xs, protocol.state, protocol.constants)
    return (
        fingerprint(protocol.cell),
        signature,
        protocol.record,
        tuple([tree and tree.structure for tree in trees]),
        ambient(signature.xs[0].device),
    )


def _trace(protocol: Protocol, signature: Signature) -> Compiled:
    count = len(signature.names)
    names: list[str] = []
    cell = protocol.cell
    own = dict((*cell.named_parameters(remove_duplicate=False), *cell.named_buffers(remove_duplicate=False)))
    places = [id(own[name]) for name in (*signature.names, *protocol.drawn)]
    last = len(signature.constants) - len(protocol.drawn)

    def function(xs: list[Tensor], state: list[Tensor], weights: list[Tensor]) -> Any:
        twins = Twins(dict(zip(places, [*weights[:count], *weights[count + last :]], strict=True)))
        twin = Protocol(twins.of(cell), protocol.xs, protocol.state, protocol.constants, protocol.record)
        with _unchanged(twin.cell, twins), _Apart(frozenset(places)):
            ys, new, recorded = twin.step(None)(xs, state, weights[count : count + last])
        protocol.y, names[:] = twin.y, recorded
        return [*ys, *recorded.values(), *(new if protocol.record else [])], new

    with torch.inference_mode(False):
        step = trace(function, signature.xs, signature.state, [*signature.parameters, *signature.constants])
    if protocol.record:
        perturb(step)
    _give_names(step, signature)
    assert protocol.y is not None
    return Compiled(step, protocol.y, tuple(names))


class _Apart(TorchFunctionMode):
    """Refuses the module's own tensors inside a step that is traced on a twin of it, with others in their place."""

    def __init__(self, own: frozenset[int]) -> None:
        super().__init__()
        self.own = own

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in (*args, *(kwargs or {}).values()):
            for leaf in given if isinstance(given, (list, tuple)) else (given,):
                if id(leaf) in self.own:
                    raise UnsupportedError(
                        "the step reaches a tensor of its module by another way than through self (a global name, "
                        f"an object that cannot be copied), at {user_line(''.join(traceback.format_stack()))}. Read it "
                        "from self, or pass it through constants=."
                    )
        return func(*args, **(kwargs or {}))


def _refuse_batch_norm(part: nn.Module, _: Any) -> None:
    line = user_line("".join(traceback.format_stack()))
    raise MixedRowsError(
        f"{type(part).__name__} takes its statistics over the rows of the batch, at {line}. Sequences must be "
        "independent: use LayerNorm, or put the cell into eval mode with running statistics."
    )


@contextmanager
def _unchanged(cell: nn.Module, twins: Twins) -> Iterator[None]:
    """Raises MutationError when the step, run on a twin of its module, changes Python state or assigns a buffer."""
    for part in cell.modules():
        batch_norm = isinstance(part, torch.nn.modules.batchnorm._BatchNorm)
        if batch_norm and (part.training or not part.track_running_stats):
            part.register_forward_pre_hook(_refuse_batch_norm)
    buffers = dict(cell.named_buffers(remove_duplicate=False))
    before = fingerprint(cell, code=False)
    try:
        yield
        after = fingerprint(cell, code=False)
    finally:
        twins.put_back()
    if after != before:
        raise MutationError(
            f"the step changes Python state of its module ({_difference(before, after)}), which one traced program "
            "cannot follow. Carry it as a tensor in the state, or count outside the step."
        )
    for name, buffer in cell.named_buffers(remove_duplicate=False):
        if buffer is not buffers.get(name):
            raise MutationError(
                f"the step assigns its buffer {name!r} anew, which one traced program cannot follow. Return the new "
                "value as part of the state instead."
            )


def _difference(before: Any, after: Any) -> str:
    """The attributes that differ between two fingerprints."""
    for was, now in zip(before, after, strict=False):
        names = [pair[0] for pair in now if pair not in was and isinstance(pair, tuple)]
        names = names or [pair[0] for pair in was if pair not in now and isinstance(pair, tuple)]
        if names:
            return ", ".join(f"{now[0].__name__}.{name}" for name in names)
    return "inside an object"


def _give_names(step: Any, signature: Signature) -> None:
    """Call the inputs of a step by their role, so that its program can be read."""
    names = [name.replace(".", "_") for name in signature.names]
    roles = ((step.xs, "x"), (step.state, "s"), (step.weights[len(names) :], "constant"))
    for nodes, role in roles:
        for i, node in enumerate(nodes):
            node._rename(role if len(nodes) == 1 else f"{role}_{i}")
    for node, name in zip(step.weights, names, strict=False):
        node._rename(name)


def forget() -> None:
    """Drop all programs."""
    with tracing():
        _programs.clear()
        forget_classes()
    graphed.forget()
