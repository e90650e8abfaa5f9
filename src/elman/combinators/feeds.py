"""What a feedback reads and feeds back: an input with or without a target, and features made of symbols or numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import InputError, OptionError
from .nested import input_size

__all__ = ["FEEDS", "Map", "apart", "features", "feed_of"]

Map: TypeAlias = Callable[[Tensor], Tensor]


def _softmax(o: Tensor) -> Tensor:
    return torch.softmax(o, -1)


def _argmax(o: Tensor) -> Tensor:
    return o.argmax(-1)


def _sample(o: Tensor) -> Tensor:
    return (o - torch.empty_like(o).exponential_().log()).argmax(-1)  # the maximum of o + Gumbel noise


FEEDS: dict[str, Map] = {"argmax": _argmax, "sample": _sample, "softmax": _softmax}
"""What can be made of logits (B, V): the likeliest symbol (B), one drawn from them (B), their probabilities (B, V)."""


def feed_of(given: str | Map | None) -> Map | None:
    """The function of that name, or what is given. Raises OptionError for an unknown name."""
    if isinstance(given, str):
        if given not in FEEDS:
            raise OptionError.unknown("feed", given, sorted(FEEDS))
        return FEEDS[given]
    return given


def features(what: str, p: Tensor, embed: Map | None, before: Tensor) -> Tensor:
    """p as features like those that were fed ``before``, (B, F): embedded, or as it is, or one-hot where it is symbols.

    Raises InputError, which calls p ``what``, where these are others.
    """
    width = before.shape[-1]
    if embed is not None:
        f = embed(p)
    elif p.is_floating_point():
        f = p
    else:
        f = (p.unsqueeze(-1) == torch.arange(width, device=p.device)).to(before.dtype)
    if f.shape != before.shape:
        raise InputError(
            f"Feedback: {what} {_form(p)} would be fed as {_form(f)}, but {width} features are fed back: give "
            f"{_form(before)}, or symbols (B) to be one-hot, or else an embed that gives as many."
        )
    return f


def apart(cell: nn.Module, x: Any, fed: int) -> tuple[Tensor, Tensor | None]:
    """The input of a step, (B, D), of a cell that reads it beside F ``fed`` features; and its target, or None.

    Raises InputError for anything else, and for another number of features.
    """
    pair = isinstance(x, tuple | list) and len(x) == 2
    x, target = x if pair else (x, None)
    if not isinstance(x, Tensor) or x.dim() != 2 or not (target is None or isinstance(target, Tensor)):
        raise InputError(
            "Feedback reads x, a tensor (B, D), or the pair (x, y) of it and the target of this step; got "
            f"{_form(x) if target is None else f'({_form(x)}, {_form(target)})'}. Where there is no x, give one "
            "without features: torch.empty(T, B, 0)."
        )
    reads = input_size(cell)
    if x.shape[-1] + fed != reads:
        raise InputError(
            f"Feedback: x has {x.shape[-1]} features, but {type(cell).__name__} reads {reads}: {reads - fed} of x and "
            f"{fed} that are fed back."
        )
    return x, target


def _form(x: Any) -> str:
    return str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__
