"""Random draws become inputs of the step, drawn for all steps beforehand: whoever runs it again sees them again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from ..errors import UnsupportedError
from .step import Step, batch_multiple, location

__all__ = ["draws_become_inputs"]

aten = torch.ops.aten


def draws_become_inputs(step: Step) -> None:
    """Random operations turn into placeholders, to be drawn for all steps beforehand."""
    last = next(node for node in reversed(step.graph.nodes) if node.op == "placeholder")
    for node in list(step.graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if torch.Tag.nondeterministic_seeded not in node.target.tags:
            continue
        _check_draw(node, step.unit)
        with step.graph.inserting_after(last):
            draw = step.graph.placeholder(f"draw_{len(step.draws)}")
        draw.meta = {
            "val": node.meta["val"],
            "draw": _recipe(node),
            "stack_trace": node.meta.get("stack_trace"),
        }
        node.replace_all_uses_with(draw)
        step.draws.append(draw)
        last = draw
        step.ys = [draw if out is node else out for out in step.ys]
        step.next = [draw if out is node else out for out in step.next]
        step.graph.erase_node(node)


_DRAWS = {
    "rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "uniform", "normal_functional",
    "bernoulli", "exponential",
}  # fmt: skip


def _check_draw(node: fx.Node, unit: int) -> None:
    op = node.target
    if op._schema.name.split("::")[1] not in _DRAWS or op is aten.bernoulli.default:  # type: ignore[union-attr]
        raise UnsupportedError(f"{op} draws from a distribution that the step computes, at {location(node)}.")
    if "generator" in op._overloadname:  # type: ignore[union-attr]
        raise UnsupportedError(
            f"{op} draws from a generator of its own, at {location(node)}. Use the default generator, or draw before "
            "the scan and pass the numbers through xs."
        )
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() == 0 or batch_multiple(value.shape[0], unit) != 1:
        raise UnsupportedError(
            f"{node.target} draws numbers that are shared by the rows of the batch, at {location(node)}. Draw one for "
            "each row (shape (B, …)), or draw before the scan and pass it through constants= or xs."
        )


_DRAW_OPTIONS = ("low", "high", "p", "mean", "std", "from", "to", "lambd", "generator")


def _recipe(node: fx.Node) -> Callable[[int, torch.device], Tensor]:
    """A function of the number of rows that makes this draw; tensor arguments count for their shape alone."""
    op = node.target
    value = node.meta["val"]
    shape, dtype, device = tuple(value.shape[1:]), value.dtype, value.device
    named = {a.name for a in op._schema.arguments}  # type: ignore[union-attr]
    rest = [a for a in node.args if not isinstance(a, (fx.Node, list, tuple))]
    like = bool(node.args) and isinstance(node.args[0], fx.Node)
    base = {"rand_like": "rand", "randn_like": "randn"}.get(op._schema.name.split("::")[1], "")  # type: ignore[union-attr]
    values = {k: v for k, v in node.kwargs.items() if not isinstance(v, fx.Node) and k in _DRAW_OPTIONS}

    def draw(rows: int, where: torch.device | None = None) -> Tensor:
        size = (rows, *shape)
        if base:
            return getattr(torch, base)(size, dtype=dtype, device=where or device, **values)
        if like:
            return op(torch.empty(size, dtype=dtype, device=where or device), *rest, **values)  # type: ignore[operator]
        options = {"dtype": dtype, "device": where or device}
        return op(*rest, list(size), **{k: v for k, v in options.items() if k in named}, **values)  # type: ignore[operator]

    return draw
