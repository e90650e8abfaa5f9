"""From nodes to Python source: one call of PyTorch for each, with the batch as a variable."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .step import batch_multiple

__all__ = ["Names", "call", "out_variant", "shape_source"]

aten = torch.ops.aten

# ATen operations whose torch.<name> takes the same positional arguments and out=; the binding costs half as much
# as an OpOverload.
_TORCH = {
    "add", "sub", "mul", "div", "mm", "addmm", "bmm", "baddbmm", "sigmoid", "tanh", "exp", "log", "neg", "abs", "sqrt",
    "rsqrt", "sin", "cos", "maximum", "minimum", "where", "gt", "lt", "ge", "le", "eq", "ne", "cat", "stack", "log1p",
    "expm1", "erf", "floor", "ceil", "round", "sign", "reciprocal", "atan", "sinh", "cosh", "logical_not",
    "logical_and",
    "logical_or", "addcmul", "clamp", "pow", "atan2", "square",
}  # fmt: skip
_VIEW_METHODS = {"t": "t", "transpose": "transpose", "unsqueeze": "unsqueeze", "permute": "permute"}
_GRAD_INPUT = {
    aten.sigmoid_backward.default: aten.sigmoid_backward.grad_input,
    aten.tanh_backward.default: aten.tanh_backward.grad_input,
    aten.threshold_backward.default: aten.threshold_backward.grad_input,
    aten.silu_backward.default: aten.silu_backward.grad_input,
    aten.gelu_backward.default: aten.gelu_backward.grad_input,
    aten.softplus_backward.default: aten.softplus_backward.grad_input,
    aten.elu_backward.default: aten.elu_backward.grad_input,
}


def _name(target: Any) -> str:
    return target._schema.name.split("::")[1]


class Names:
    """The namespace of generated code: short names for functions and constants."""

    def __init__(self) -> None:
        self.table: dict[str, Any] = {"torch": torch, "empty": torch.empty}
        self._of: dict[Any, str] = {}

    def of(self, thing: Any, hint: str) -> str:
        key = thing if isinstance(thing, (torch._ops.OpOverload, torch.dtype, torch.device)) else id(thing)
        if key not in self._of:
            name, n = hint, 1
            while name in self.table:
                n += 1
                name = f"{hint}_{n}"
            self.table[name] = thing
            self._of[key] = name
        return self._of[key]

    def op(self, target: Any) -> str:
        """``torch.mul``, or ``aten_gelu`` for what has no binding of its own."""
        name = _name(target)
        if name in _TORCH:
            return f"torch.{name}"
        return self.of(target, f"aten_{name}")


def _literal(value: Any, env: dict[fx.Node, str], names: Names, unit: int, rows: str) -> str:
    if isinstance(value, fx.Node):
        return env[value]
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_literal(v, env, names, unit, rows) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    multiple = batch_multiple(value, unit)
    if multiple:
        return rows if multiple == 1 else f"{multiple} * {rows}"
    if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return names.of(value, str(value).replace("torch.", "").replace(":", "_"))
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return f'float("{value}")'
    return repr(value)


def call(node: fx.Node, env: dict[fx.Node, str], names: Names, unit: int, rows: str, out: str | None = None) -> str:
    """The source of one node's call; ``rows`` is the source of the number of rows, ``out`` a buffer to write to."""

    def lit(value: Any) -> str:
        return _literal(value, env, names, unit, rows)

    target: Any = node.target
    if target is operator.getitem:
        return f"{lit(node.args[0])}[{node.args[1]}]"
    name = _name(target)
    args = [lit(a) for a in node.args]
    kwargs = [f"{k}={lit(v)}" for k, v in node.kwargs.items()]
    if name in ("view", "_unsafe_view", "reshape"):
        return f"{args[0]}.reshape({args[1]})"
    if name in _VIEW_METHODS:
        return f"{args[0]}.{_VIEW_METHODS[name]}({', '.join(args[1:])})"
    if out is not None and target in _GRAD_INPUT:
        return f"{names.of(_GRAD_INPUT[target], 'aten_' + name)}({', '.join([*args, *kwargs, f'grad_input={out}'])})"
    if out is not None:
        kwargs.append(f"out={out}")
    return f"{names.op(target)}({', '.join([*args, *kwargs])})"


def out_variant(node: fx.Node) -> bool:
    """Whether the node can write its one result into a given buffer."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload) or not isinstance(node.meta["val"], torch.Tensor):
        return False
    name = _name(target)
    if name == "where" and any(not isinstance(a, fx.Node) for a in node.args):
        return False
    if name in ("pow", "clamp") and not isinstance(node.args[0], fx.Node):
        return False
    return name in _TORCH or target in _GRAD_INPUT


def shape_source(node: fx.Node, unit: int, rows: str) -> str:
    """``(rows, 5)``: the shape of a node's value with the batch as a variable."""
    sizes = []
    for size in node.meta["val"].shape:
        multiple = batch_multiple(int(size), unit)
        sizes.append((rows if multiple == 1 else f"{multiple} * {rows}") if multiple else str(int(size)))
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"
