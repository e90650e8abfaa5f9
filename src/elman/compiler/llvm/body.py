"""The body of a loop in few kinds of operations: products, pointwise operations, reductions, views.

Norms, softmax and the like are taken apart into sums, maxima and pointwise work, which fuse with what is around them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import decomposition_table
from torch._subclasses.fake_tensor import FakeTensor

from ..step import Step, arguments, explained
from ..tape import Recorder
from ..trace import core_decompositions

__all__ = ["Body", "body_of"]

aten = torch.ops.aten


@dataclass
class Body:
    """Part of a step as a graph of its own.

    ``outside`` are the nodes of the step that it reads, ``outputs`` those that it computes and others read; each has
    its counterpart in ``graph``, in ``inputs`` and ``results``.
    """

    graph: fx.Graph
    root: nn.Module
    outside: list[fx.Node]
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    results: list[fx.Node]
    unit: int


def body_of(step: Step, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Body:
    """Those nodes of a step, taken apart. ``outputs`` may be any nodes, also ones from outside."""
    inside = set(nodes)
    read = [n for node in nodes for n in node.all_input_nodes if n not in inside]
    outside = list(dict.fromkeys([*read, *(n for n in outputs if n not in inside)]))
    graph, root = fx.Graph(), nn.Module()
    env: dict[fx.Node, Any] = {}
    for node in outside:
        env[node] = graph.placeholder(node.name)
        env[node].meta = dict(node.meta)
    values = [n.meta["val"] for n in outside]
    mode = next(v.fake_mode for v in values if isinstance(v, FakeTensor))
    recorder = Recorder(_table(), graph, root)
    with explained("a loop cannot be taken apart"), mode, torch.no_grad():
        for node in nodes:
            env[node] = _apart(recorder, node, env)
            if env[node] is NotImplemented:
                env[node] = graph.node_copy(node, env.__getitem__)
                env[node].meta = dict(node.meta)
    results = [env[node] for node in outputs]
    graph.output(tuple(results))
    graph.eliminate_dead_code()
    for node, result in zip(outputs, results, strict=True):
        if result.op != "placeholder":
            result._rename(node.name)
    return Body(graph, root, outside, [env[node] for node in outside], list(outputs), results, step.unit)


def _apart(recorder: Recorder, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    """The node of an operation's result once it is taken apart, a tuple of nodes where it has several results, or
    NotImplemented where it stays as it is."""
    if node.target is operator.getitem:
        whole = env[arguments(node)[0]]
        return whole[arguments(node)[1]] if isinstance(whole, tuple) else NotImplemented
    formula = recorder.table.get(node.target)
    if formula is None:
        return NotImplemented
    given = {}
    recorder.forget()
    for source in node.all_input_nodes:
        value = source.meta["val"]
        given[source] = value = value.view_as(value) if recorder.knows(value) else value
        recorder.give(value, env[source])
    recorder.meta, recorder.prefix = node.meta, f"{node.name}_"
    args: Any = fx.map_arg(node.args, given.__getitem__)
    kwargs: Any = fx.map_arg(node.kwargs, given.__getitem__)
    with recorder:
        out = formula(*args, **kwargs)
    if out is NotImplemented:
        return out
    return tuple(map(recorder.node_of, out)) if isinstance(out, (tuple, list)) else recorder.node_of(out)


@lru_cache(maxsize=1)
def _table() -> dict[Any, Callable[..., Any]]:
    """What becomes of operations that are more than one product, pointwise operation or reduction."""
    keep = {
        aten.addmm.default,
        aten.addcmul.default,
        aten.sigmoid.default,
        aten.tanh.default,
        aten.silu.default,
        aten.softplus.default,
    }
    more = [aten.hardtanh.default, aten.elu.default, aten.leaky_relu.default, aten.linalg_vector_norm.default]
    table = {**core_decompositions(), **{op: decomposition_table[op] for op in more if op in decomposition_table}}
    table |= {
        aten.native_layer_norm.default: _layer_norm,
        aten.max.dim: lambda x, dim, keepdim=False: (x.amax(dim, keepdim), x.argmax(dim, keepdim)),
        aten._softmax.default: _softmax,
        aten._log_softmax.default: _log_softmax,
        aten.logsumexp.default: _logsumexp,
        aten.mean.dim: _mean,
        aten.var_mean.correction: _var_mean,
        aten.var.correction: lambda *args, **kwargs: _var_mean(*args, **kwargs)[0],
    }
    return {op: made for op, made in table.items() if op not in keep}


def _count(x: Tensor, dims: Sequence[int] | None) -> int:
    return math.prod(x.shape[d] for d in dims) if dims else x.numel()


def _mean(x: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    x = x if dtype is None else x.to(dtype)
    return aten.sum.dim_IntList(x, dim, keepdim) / _count(x, dim)


def _var_mean(
    x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    mean = _mean(x, dim, True)
    off = x - mean
    freedom = max(_count(x, dim) - (1 if correction is None else correction), 0)
    var = aten.sum.dim_IntList(off * off, dim, keepdim) / freedom
    return var, mean if keepdim else mean.squeeze(list(dim) if dim else list(range(x.dim())))


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dims = list(range(x.dim() - len(shape), x.dim()))
    mean = _mean(x, dims, True)
    off = x - mean
    rstd = torch.rsqrt(_mean(off * off, dims, True) + eps)
    y = off * rstd
    if weight is not None:
        y = y * weight
    return (y if bias is None else y + bias), mean, rstd


def _softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    e = torch.exp(x - aten.amax.default(x, [dim], True))
    return e / aten.sum.dim_IntList(e, [dim], True)


def _log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    shifted = x - aten.amax.default(x, [dim], True)
    return shifted - torch.log(aten.sum.dim_IntList(torch.exp(shifted), [dim], True))


def _logsumexp(x: Tensor, dim: Sequence[int], keepdim: bool = False) -> Tensor:
    most = aten.amax.default(x, dim, True)
    shift = torch.where(torch.isinf(most), torch.zeros_like(most), most)
    total = torch.log(aten.sum.dim_IntList(torch.exp(x - shift), dim, keepdim))
    return total + (shift if keepdim else shift.squeeze(list(dim)))
