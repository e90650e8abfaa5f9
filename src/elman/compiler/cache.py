"""Programs that were traced already, by everything that they depend on (see ``key``); they are shared by all cells
that are alike."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import MixedRowsError, MutationError, UnfoldError
from ..protocol import Protocol
from .compiled import Compiled
from .key import MODULE_INTERNALS, ambient, fingerprint
from .lock import tracing
from .step import Leaf, user_line
from .trace import perturb, trace

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
            found = _programs.get(key)
            if found is None:
                try:
                    found = _trace(protocol, signature)
                except UnfoldError as error:
                    if error.__cause__ is not None:  # perhaps a mistake in the step: see remember
                        raise
                    found = error.with_traceback(None)
                _programs[key] = found
                while len(_programs) > _MOST:
                    del _programs[next(iter(_programs))]
    if isinstance(found, UnfoldError):
        raise type(found)(*found.args) from found.__cause__  # raised itself, it would keep the caller's frames
    return found


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

    def function(xs: list[Tensor], state: list[Tensor], weights: list[Tensor]) -> Any:
        parameters = dict(zip(signature.names, weights, strict=False))
        replaced: list[str] = []
        with _Untouched(protocol.cell):
            ys, new, recorded = protocol.step(parameters, replaced)(xs, state, weights[count:])
            names[:] = recorded
        if replaced:
            raise MutationError(
                f"the step assigns its buffer {replaced[0]!r} anew, which one traced program cannot follow. Return "
                "the new value as part of the state instead."
            )
        return [*ys, *recorded.values(), *(new if protocol.record else [])], new

    with torch.inference_mode(False), _batch_norm_refused(protocol.cell):
        step = trace(function, signature.xs, signature.state, [*signature.parameters, *signature.constants])
    if protocol.record:
        perturb(step)
    _give_names(step, signature)
    assert protocol.y is not None
    return Compiled(step, protocol.y, tuple(names))


@contextmanager
def _batch_norm_refused(cell: nn.Module) -> Iterator[None]:
    """A batch norm that takes statistics of its rows says so itself when the step comes to it."""

    def refuse(part: nn.Module, _: Any) -> None:
        line = user_line("".join(traceback.format_stack()))
        raise MixedRowsError(
            f"{type(part).__name__} takes its statistics over the rows of the batch, at {line}. Sequences must be "
            "independent: use LayerNorm, or put the cell into eval mode with running statistics."
        )

    norms = [part for part in cell.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)]
    mixing = [part for part in norms if part.training or not part.track_running_stats]
    hooks = [part.register_forward_pre_hook(refuse) for part in mixing]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _give_names(step: Any, signature: Signature) -> None:
    """Call the inputs of a step by their role, so that its program can be read."""
    names = [name.replace(".", "_") for name in signature.names]
    roles = ((step.xs, "x"), (step.state, "s"), (step.weights[len(names) :], "constant"))
    for nodes, role in roles:
        for i, node in enumerate(nodes):
            node._rename(role if len(nodes) == 1 else f"{role}_{i}")
    for node, name in zip(step.weights, names, strict=False):
        node._rename(name)


class _Untouched:
    """Tracing must leave the module as it was. Raises MutationError when the step changes Python state."""

    def __init__(self, cell: nn.Module) -> None:
        self.cell = cell

    def __enter__(self) -> None:
        self.before = {part: dict(part.__dict__) for part in self.cell.modules()}
        own = (v for attributes in self.before.values() for k, v in attributes.items() if k not in MODULE_INTERNALS)
        self.contents: list[tuple[Any, Any]] = []
        for value in own:
            self._remember(value)
        self.key = fingerprint(self.cell)

    def _remember(self, value: Any) -> None:
        if isinstance(value, (list, dict, set)):
            self.contents.append((value, value.copy()))
            for inner in value.values() if isinstance(value, dict) else value:
                self._remember(inner)

    def __exit__(self, kind: Any, value: Any, stack: Any) -> None:
        changed = kind is None and fingerprint(self.cell) != self.key
        names = []
        for part, attributes in self.before.items():
            now = part.__dict__
            touched = [k for k in now if k not in attributes or attributes[k] is not now[k]]
            touched += [k for k, v in attributes.items() if any(v is c and c != was for c, was in self.contents)]
            names += [f"{type(part).__name__}.{k}" for k in touched]
            if touched:
                now.clear()
                now.update(attributes)
        for container, was in self.contents:
            _put_back(container, was)
        if changed:
            raise MutationError(
                f"the step changes Python state of its module ({', '.join(names) or 'inside an object'}), which one "
                "traced program cannot follow. Carry it as a tensor in the state, or count outside the step."
            )


def _put_back(container: Any, was: Any) -> None:
    if isinstance(container, list):
        container[:] = was
    else:
        container.clear()
        container.update(was)


def forget() -> None:
    """Drop all programs."""
    with tracing():
        _programs.clear()
