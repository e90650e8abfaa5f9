"""Squashing functions by name: the pointwise nonlinearity φ of a cell."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import OptionError

__all__ = ["SQUASHES", "squash_label", "squash_of"]


def _identity(a: Tensor) -> Tensor:
    return a


SQUASHES: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "gelu": F.gelu,
    "hardtanh": F.hardtanh,
    "identity": _identity,
    "leaky_relu": F.leaky_relu,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "tanh": torch.tanh,
}
"""From a name to the function."""


def squash_of(given: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function of that name, or the callable itself: any pointwise one, a module with parameters
    included.

    Raises OptionError for an unknown name and for what cannot be called.
    """
    if isinstance(given, str):
        if given not in SQUASHES:
            raise OptionError.unknown("squashing function", given, sorted(SQUASHES))
        return SQUASHES[given]
    if not callable(given):
        raise OptionError(f"squash must be a function of one tensor or a name ({', '.join(SQUASHES)}); got {given!r}.")
    return given


def squash_label(squash: Callable[[Tensor], Tensor]) -> str:
    """The name under which ``squash`` is printed."""
    for name, function in SQUASHES.items():
        if function is squash:
            return name
    return str(getattr(squash, "__name__", type(squash).__name__))
