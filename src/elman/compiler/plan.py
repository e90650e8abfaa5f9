"""Pass 4, plan: every loop as a short list of stages, the summary of what it does.

A stage is products with weights, then pointwise operations, then reductions over the features of a row. A product
starts a new stage when it reads what the stage before computed; so does whatever reads a reduction. An LSTM is one
stage, a GRU with the reset gate before the product two, an LSTM with normalised gates and state three.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from .program import Loop

__all__ = ["Stage", "plan"]

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
_REDUCTIONS = {
    "sum", "mean", "amax", "amin", "max", "min", "var", "var_mean", "std", "prod", "argmax", "argmin", "_softmax",
    "_log_softmax", "native_layer_norm", "native_layer_norm_backward", "_softmax_backward_data",
    "_log_softmax_backward_data", "logsumexp", "linalg_vector_norm", "cumsum", "cumprod", "sort", "topk", "any", "all",
}  # fmt: skip
_VIEWS = {
    "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "unsqueeze", "squeeze", "expand", "slice", "select",
    "split", "split_with_sizes", "getitem", "alias", "detach",
}  # fmt: skip


@dataclass
class Stage:
    """What one pass over the rows of a step computes, in this order."""

    products: list[fx.Node] = field(default_factory=list)
    pointwise: list[fx.Node] = field(default_factory=list)
    reductions: list[fx.Node] = field(default_factory=list)


def operation(node: fx.Node) -> str:
    """The plain name of a node's operation."""
    target = node.target
    return target._schema.name.split("::")[1] if isinstance(target, torch._ops.OpOverload) else "getitem"


def plan(loop: Loop) -> list[Stage]:
    """The stages of a loop."""
    at: dict[fx.Node, int] = {}
    stages: list[Stage] = []
    for node in loop.nodes:
        name = operation(node)
        sources = [n for n in node.all_input_nodes if n in at]
        stage = max((at[n] + (_kind(n) == "reductions") for n in sources), default=0)
        kind = _kind(node)
        if kind == "products" and any(_computed(n) and at[n] == stage for n in sources):
            stage += 1
        at[node] = stage
        while len(stages) <= stage:
            stages.append(Stage())
        if name not in _VIEWS:
            getattr(stages[stage], kind).append(node)
    return [s for s in stages if s.products or s.pointwise or s.reductions]


def _kind(node: fx.Node) -> str:
    name = operation(node)
    if name == "getitem":
        return _kind(node.all_input_nodes[0])
    return "products" if name in _PRODUCTS else "reductions" if name in _REDUCTIONS else "pointwise"


def _computed(node: fx.Node) -> bool:
    """Whether a value is more than a view of what comes from outside the stage."""
    while operation(node) in _VIEWS and node.op == "call_function":
        node = node.all_input_nodes[0]
    return node.op == "call_function"
