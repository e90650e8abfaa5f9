"""What a user did wrong, told from a step that failed: which argument does not fit, at which line, and the way out."""

from __future__ import annotations

import dis
import inspect
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import CellError, InputError, StateError, UsageError
from ..protocol import MACHINE, MISTAKES, Protocol, Tree, from_torch, kind, place, start, takes
from .step import user_line

__all__ = ["Operands", "mistake"]

_OVER_FEATURES = {
    F.linear, F.layer_norm, torch.matmul, torch.mv, torch.inner,
    Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mv, Tensor.inner,
}  # fmt: skip
_WEIGHT, _OWN = frozenset({"weight"}), frozenset({"other"})
_NAMES = {"x": "xs", "state": "the state", "constants": "constants"}


class Operands(TorchFunctionMode):
    """Follows what the tensors of a step come from: its inputs, by role, "weight", or "other"; keeps the last call.

    Raises InputError where features are summed over in an x that has none: then (T, D) was given for (T, B, D).
    """

    def __init__(self, protocol: Protocol, roles: dict[str, list[Tensor]], size: tuple[int, int]) -> None:
        super().__init__()
        self.protocol, self.size = protocol, size
        self.alive: list[Tensor] = []  # so that no id is used again
        self.origin: dict[int, frozenset[str]] = {}
        self.last: tuple[str, list[Any]] = ("", [])
        self.failed = False
        for role, leaves in roles.items():
            self._note(leaves, frozenset({role}))

    def _note(self, leaves: list[Any], origin: frozenset[str]) -> None:
        for leaf in leaves:
            if isinstance(leaf, Tensor) and id(leaf) not in self.origin:
                self.alive.append(leaf)
                self.origin[id(leaf)] = origin

    def of(self, leaf: Tensor) -> frozenset[str]:
        return self.origin.get(id(leaf), _OWN)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.last = (getattr(func, "__name__", str(func)), operands)
        if func in _OVER_FEATURES and any(o.dim() == 1 and self.of(o) == {"x"} for o in operands):
            raise self._without_features()
        try:
            result = func(*args, **kwargs)
        except MISTAKES:
            self.failed = True
            raise
        self._note(pytree.tree_leaves(result), frozenset().union(*map(self.of, operands)) if operands else _OWN)
        return result

    def _without_features(self) -> InputError:
        steps, batch = self.size
        return InputError(
            f"{self.protocol.forward} takes the features of x, but xs of ({steps}, {batch}) are (T, B): one number for "
            f"each of B = {batch} sequences. If these are {batch} features of one sequence, add the batch dimension: "
            "xs.unsqueeze(1) is (T, 1, D)."
        )


def mistake(
    protocol: Protocol,
    error: Exception,
    again: Callable[[], Any],
    roles: dict[str, list[Tensor]],
    size: tuple[int, int],
) -> UsageError | None:
    """Which argument does not fit, where a step raised ``error``.

    ``again`` runs that step once more, ``roles`` are its tensors: x, state, constants, weight; ``size`` is (T, B).
    None where the step raised on purpose, or failed at something of its own.
    """
    if isinstance(error, (UsageError, *MACHINE)) or _on_purpose(error):
        return None
    line = user_line("".join(traceback.format_tb(error.__traceback__)))
    where = f" at {line}" if ":" in line else ""  # inside PyTorch's own cells there is none
    found: UsageError | None = None
    if isinstance(error, TypeError):
        found = _arguments(protocol)
    if found is None and "device" in str(error):
        found = _elsewhere(protocol, where, error, roles)
    found = found or _other_state(protocol, where, error, roles, size)
    if found is not None:
        return found
    operands = Operands(protocol, roles, size)
    try:
        with operands:
            again()
    except UsageError as other:
        return other
    except MISTAKES as second:
        if type(second) is type(error) and str(second) == str(error):
            return _operation(operands, where, error, roles) or _no_tensor(protocol, where, error)
    return None


def _on_purpose(error: Exception) -> bool:
    """Whether a ``raise`` that is not PyTorch's stands at the end of the traceback."""
    stack = error.__traceback__
    while stack is not None and stack.tb_next is not None:
        stack = stack.tb_next
    if stack is None:
        return False
    code = stack.tb_frame.f_code
    return code.co_code[stack.tb_lasti] == dis.opmap["RAISE_VARARGS"] and not from_torch(code.co_filename)


def _arguments(protocol: Protocol) -> UsageError | None:
    """forward cannot be called with so many arguments."""
    forward, given = protocol.cell.forward, protocol.constants is not None
    if takes(forward, *[None] * (3 if given else 2)):
        return None
    if given and takes(forward, None, None):
        return InputError(
            f"{protocol.forward} takes (x, state), but constants were given. Leave constants= out, or add a third "
            "argument to forward that receives them."
        )
    if not given and takes(forward, None, None, None):
        return InputError(
            f"{protocol.forward} takes {inspect.signature(forward)}, but no constants were given. Pass constants= to "
            "scan."
        )
    return CellError(
        f"{protocol.forward} takes {inspect.signature(forward)}. A step must be forward(x, state) -> (y, state), or "
        "forward(x, state, constants)."
    )


def _elsewhere(protocol: Protocol, where: str, error: Exception, roles: dict[str, list[Tensor]]) -> UsageError | None:
    """An argument is not on the device of the parameters."""
    home = (roles["weight"] or roles["x"])[0].device
    for role, kind_of_error in (("x", InputError), ("constants", InputError), ("state", StateError)):
        for leaf in roles[role]:
            if leaf.device != home:
                what = _NAMES[role] + (_source(protocol) if role == "state" else "")
                return kind_of_error(
                    f"{_name(protocol)} fails{where} ({_said(error)}). The parameters are on {home}, and on "
                    f"{leaf.device} is {what.rstrip(',')}. Move one of them with .to()."
                )
    return None


def _other_state(
    protocol: Protocol, where: str, error: Exception, roles: dict[str, list[Tensor]], size: tuple[int, int]
) -> StateError | None:
    """The state is built otherwise than what the cell itself starts from."""
    rows = roles["x"][0].shape[0]
    constants = None if protocol.constants is None else protocol.constants.rebuild(roles["constants"])
    try:
        own = Tree(start(protocol.cell, roles["x"], rows, roles["weight"], constants))
    except MISTAKES:
        return None
    shapes = [[leaf.shape for leaf in leaves] for leaves in (own.leaves, roles["state"])]
    if own.structure == protocol.state.structure and shapes[0] == shapes[1]:
        return None
    return StateError(
        f"{type(protocol.cell).__name__} starts from the state {own.described(own.leaves)}, but was given "
        f"{protocol.state.described(roles['state'])}, and fails{where} ({_said(error)}). Give state= the structure and "
        "shapes of the cell's initial_state."
    )


def _operation(operands: Operands, where: str, error: Exception, roles: dict[str, list[Tensor]]) -> UsageError | None:
    """The operation that failed reads an input as it came, and nothing of the step's own making."""
    name, leaves = operands.last
    if not (operands.failed or ("to unpack" in str(error) and name in ("unbind", "__iter__"))):
        return None
    origins = [operands.of(leaf) for leaf in leaves]
    at_fault = frozenset[str]().union(*(origin for origin in origins if not origin & (_WEIGHT | _OWN)))
    if not at_fault or _OWN in origins:
        return None
    role = next(role for role in ("x", "constants", "state") if role in at_fault)
    leaf = next(leaf for leaf, origin in zip(leaves, origins, strict=True) if role in origin and not origin & _WEIGHT)
    described = ", ".join(f"{_whose(origin)} {kind(leaf)}" for leaf, origin in zip(leaves, origins, strict=True))
    text = f"{_name(operands.protocol)} fails in {name}({described}){where} ({_said(error)}). "
    text += _advice(operands, role, name, leaf, error, roles)
    if role != "state" and "state" in at_fault:
        text += f" The state is {operands.protocol.state.described(roles['state'])}."
    return StateError(text) if role == "state" else InputError(text)


def _advice(
    operands: Operands, role: str, name: str, leaf: Tensor, error: Exception, roles: dict[str, list[Tensor]]
) -> str:
    what = _NAMES[role] + (_source(operands.protocol) if role == "state" else "")
    parameters = next((weight.dtype for weight in roles["weight"] if weight.is_floating_point()), leaf.dtype)
    if isinstance(error, IndexError) and not leaf.is_floating_point() and type(leaf) is Tensor and leaf.numel():
        return f"What is looked up, {what}, goes from {int(leaf.min())} to {int(leaf.max())}: each must have its row."
    if "embedding" in name and leaf.is_floating_point():
        return f"What is looked up, {what}, must be whole numbers: convert with .long()."
    if role == "x" and not leaf.is_floating_point() and parameters.is_floating_point:
        return "xs are whole numbers: embed them (nn.Embedding), or convert them with .float()."
    if leaf.dtype != parameters:
        other = f", or the cell with .to({leaf.dtype})" if leaf.is_floating_point() else ""
        return f"Convert {what} with .to({parameters}){other}."
    if role != "x":
        return f"Correct {what} to (B, …) with the features that the cell was built for."
    shape = (*operands.size, *roles["x"][0].shape[1:])
    text = f"xs must be (T, B, …), with the features that the cell was built for; got {shape}."
    return text if len(shape) > 2 else f"{text} Features of one sequence need its batch dimension: xs.unsqueeze(1)."


def _no_tensor(protocol: Protocol, where: str, error: Exception) -> StateError | None:
    """The state holds something that is no tensor, None or a number, and that is what the error is about."""
    for other in protocol.state.others:
        if other is not None and type(other[0]).__name__ in str(error):
            return StateError(
                f"the state{_source(protocol)} is {protocol.state.described()}, and {_name(protocol)} fails{where} "
                f"({_said(error)}). A state is made of (B, …) tensors: let initial_state return them."
            )
    return None


def _source(protocol: Protocol) -> str:
    own = getattr(protocol.cell, "initial_state", None)
    if own is None:
        return " from state="
    return f" from state= or initial_state, {place(own)}," if place(own) else " from state= or initial_state"


def _name(protocol: Protocol) -> str:
    return f"{type(protocol.cell).__name__}.forward"


def _whose(origin: frozenset[str]) -> str:
    return next(iter(origin)) if len(origin) == 1 else "a value"


def _said(error: Exception) -> str:
    lines = str(error).splitlines()
    text = lines[0].rstrip(".!") if lines else type(error).__name__
    return f"{type(error).__name__}: {text}"
