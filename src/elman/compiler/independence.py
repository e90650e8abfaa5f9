"""Which dimension of every value is the batch, and whether the rows of the batch stay independent.

If they do, a step over B rows run T times is, where no state stands between, the same step run once over T·B rows:
this is what lets the program hoist work out of loops without tracing anything again. In a derivative, sums over
rows are allowed: they are the gradients of weights, and over T·B rows they sum over time as well.

Each node gets ``meta["rows"]``: ``None`` for a value that is the same for all steps, ``"sum"`` for a sum over
rows, or ``(dimension, k)`` where that dimension counts k·B.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import MixedRowsError, UnsupportedError
from .step import Step, arguments, batch_multiple, location

__all__ = ["annotate", "is_varying", "rows_of_node"]

aten = torch.ops.aten

_VIEWS = {"view", "_unsafe_view", "reshape"}
_MOVES = {
    "unsqueeze", "squeeze", "permute", "transpose", "t", "expand", "clone", "alias", "detach", "_to_copy",
    "lift_fresh_copy", "contiguous", "full_like", "zeros_like", "ones_like", "empty_like", "constant_pad_nd",
    "embedding", "embedding_dense_backward", "where", "masked_fill", "copy",
}  # fmt: skip
_ALONG_DIM = {
    "slice", "select", "split", "split_with_sizes", "unbind", "cat", "flip", "roll", "cumsum", "cumprod",
    "_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data", "slice_backward",
    "select_backward", "sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin", "var", "var_mean", "prod",
    "any", "all", "topk", "sort", "gather", "scatter", "scatter_add", "index_select", "logcumsumexp", "std",
    "slice_scatter", "select_scatter", "logsumexp", "cummax", "cummin", "norm", "linalg_vector_norm",
}  # fmt: skip
_SUMS = {
    "sum", "mm", "addmm", "bmm", "_trilinear", "embedding_dense_backward", "native_layer_norm_backward",
    "convolution_backward",
}  # fmt: skip
_POINTWISE = {
    "silu_backward", "gelu_backward", "softplus_backward", "elu_backward", "threshold_backward", "sigmoid_backward",
    "tanh_backward",
}  # fmt: skip


def is_varying(node: fx.Node) -> bool:
    """Whether the value differs from step to step."""
    return node.meta["rows"] is not None


def rows_of_node(node: fx.Node) -> tuple[int, int] | None:
    """(dimension, k) of the rows of a varying value, None for any other."""
    rows = node.meta["rows"]
    return rows if isinstance(rows, tuple) else None


def annotate(step: Step, *, sums: bool = False, constants: bool = False) -> None:
    """Set ``meta["rows"]`` on every node. Raises MixedRowsError or UnsupportedError, with the user's line."""
    varying = {*step.xs, *step.state, *step.draws}
    if constants:
        varying |= {w for w in step.weights if batch_multiple(next(iter(w.meta["val"].shape), 0), step.unit)}
    for node in step.graph.nodes:
        if node.op == "output":
            continue
        if node.op != "call_function":
            node.meta["rows"] = _own_rows(node, step.unit) if node in varying else None
            continue
        inputs = [n for n in node.all_input_nodes if is_varying(n)]
        if not inputs:
            node.meta["rows"] = None
            continue
        if any(n.meta["rows"] == "sum" for n in inputs):
            node.meta["rows"] = "sum"
            continue
        rows = _result_rows(node, step.unit)
        if rows == "sum" and not (sums and (_name(node) in _SUMS or node.target is operator.getitem)):
            raise _mixed(node)
        node.meta["rows"] = rows
        if node.target is not operator.getitem:
            _check(node, rows, step.unit, sums)


def _name(node: fx.Node) -> str:
    target = node.target
    return target._schema.name.split("::")[1] if isinstance(target, torch._ops.OpOverload) else str(target)


def _own_rows(node: fx.Node, unit: int) -> tuple[int, int]:
    rows = _result_rows(node, unit)
    if not isinstance(rows, tuple):
        raise _mixed(node)
    return rows


def _result_rows(node: fx.Node, unit: int) -> Any:
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        first = next((v for v in value if isinstance(v, Tensor)), None) if isinstance(value, (tuple, list)) else None
        if first is None:
            raise UnsupportedError(f"{node.target} gives no tensor, at {location(node)}.")
        value = first
    found = [(i, batch_multiple(n, unit)) for i, n in enumerate(value.shape) if batch_multiple(n, unit)]
    if len(found) > 1:
        raise _mixed(node)
    return found[0] if found else "sum"


def _mixed(node: fx.Node) -> MixedRowsError:
    return MixedRowsError(
        f"{node.target} mixes the rows of the batch, at {location(node)}. Each sequence must be computed from its "
        "own row alone: reduce over feature dimensions (dim=-1), not over dimension 0."
    )


def _check(node: fx.Node, rows: Any, unit: int, sums: bool) -> None:
    name, target, given = _name(node), node.target, arguments(node)
    if not isinstance(target, torch._ops.OpOverload):
        raise UnsupportedError(f"{target} is not a tensor operation, at {location(node)}.")
    if target is aten.view.dtype:
        raise UnsupportedError(
            f"{target} reads numbers as another type, which only the plain loop does, at {location(node)}."
        )
    if name in _VIEWS:
        ok = _leading(given[0], unit) == _leading(node, unit)
    elif name in ("mm", "addmm", "bmm", "baddbmm"):
        left, right = given[-2:]
        inner = _dim_is_rows(left, -1) or _dim_is_rows(right, -2)
        ok = not inner or (sums and rows == "sum")
        ok = ok and not (name in ("addmm", "baddbmm") and not _aligned([node, given[0]]))
    elif name in ("native_layer_norm", "native_layer_norm_backward"):
        at = 1 if name == "native_layer_norm" else 2
        source = rows_of_node(given[0])
        ok = source is not None and source[0] < given[0].meta["val"].dim() - len(given[at])
    elif name in ("index", "index_put"):
        ok = _index_ok(node)
    elif name == "_trilinear":
        inserted = [dims for arg, dims in zip(given[:3], given[3:6], strict=True) if is_varying(arg)]
        apart = rows == (0, 1) and not any(0 in dims for dims in (*inserted, given[6]))
        ok = apart or (sums and rows == "sum")
    elif name == "stack":
        ok = len({rows_of_node(n) for n in given[0] if is_varying(n)}) == 1
    elif name == "repeat":
        ok = isinstance(rows, tuple) and given[1][rows[0]] == 1
    elif name in ("convolution", "convolution_backward"):
        weight = given[1] if name == "convolution" else given[2]
        ok = _dim_is_rows(given[0], 0) and not is_varying(weight)
    elif name in _ALONG_DIM:
        ok = not _along_rows(node, rows) or (sums and rows == "sum")
    elif name in _MOVES:
        ok = name not in ("embedding",) or not (is_varying(given[0]) or given[3:4] == (True,))
        ok = ok and (name not in ("where", "masked_fill", "copy") or _aligned(given))
    elif torch.Tag.pointwise in target.tags or name in _POINTWISE:
        ok = _aligned(given)
    else:
        raise UnsupportedError(
            f"{target} is not known to keep the rows of the batch apart, at {location(node)}. "
            "Use backend='reference', or write it with other operations."
        )
    if not ok:
        raise _mixed(node)


def _leading(node: fx.Node, unit: int) -> int:
    """Elements before the rows: a reshape may merge what follows the batch into it, not what stands before."""
    shape = node.meta["val"].shape
    at = next(i for i, n in enumerate(shape) if batch_multiple(n, unit))
    return math.prod(shape[:at])


def _dim_is_rows(arg: Any, dim: int) -> bool:
    rows = rows_of_node(arg) if isinstance(arg, fx.Node) else None
    return rows is not None and rows[0] == dim % arg.meta["val"].dim()


def _aligned(args: Any) -> bool:
    """Whether all varying inputs have their rows at the same dimension, counted from the right as broadcasting does."""
    places = set()
    for arg in args:
        if isinstance(arg, fx.Node) and (rows := rows_of_node(arg)) is not None:
            places.add((rows[0] - arg.meta["val"].dim(), rows[1]))
    return len(places) <= 1


def _along_rows(node: fx.Node, rows: Any) -> bool:
    """Whether an operation along dimensions works along the rows of its input."""
    name, schema = _name(node), node.target._schema.arguments  # type: ignore[union-attr]
    bound = {a.name: a.default_value for a in schema if a.has_default_value()}
    bound.update(zip((a.name for a in schema), node.args, strict=False))
    bound.update(node.kwargs)
    dims = bound.get("dim", bound.get("dims"))
    if dims is None or dims == []:
        return True
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    if name == "select_backward":  # its dimension counts in the result
        return any(dim % node.meta["val"].dim() == rows[0] for dim in dims)
    sources = node.args[0] if isinstance(node.args[0], (list, tuple)) else [node.args[0]]
    if name in ("gather", "scatter", "scatter_add", "slice_scatter", "index_select", "cat"):
        together = sources if name == "cat" else node.args
        if not _aligned(together):
            return True
    if name == "select_scatter" and is_varying(node.args[1]):  # type: ignore[arg-type]
        return _dim_is_rows(node.args[0], dims[0]) or rows_of_node(node.args[1])[0] != rows[0] - (dims[0] < rows[0])  # type: ignore
    return any(_dim_is_rows(source, dim) for source in sources for dim in dims)


def _index_ok(node: fx.Node) -> bool:
    source, indices = node.args[0], node.args[1]
    rows = rows_of_node(node) if _name(node) == "index_put" else rows_of_node(source)  # type: ignore[arg-type]
    used = [i for i, index in enumerate(indices) if index is not None]  # type: ignore[arg-type]
    if rows is None:
        return len(used) >= 1
    fixed = all(not is_varying(indices[i]) for i in used)  # type: ignore[index,arg-type]
    return fixed and rows[0] < min(used)
