"""A multilayer perceptron that gives as many features as it reads: depth inside one step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor, nn

from ..cells.squash import squash_label, squash_of
from .nested import positive

__all__ = ["MLP"]


class MLP(nn.Module):
    """Layers v ↦ φ(W v + b), as many as ``layers``, that give as many features as they read; with ``skip`` v + MLP(v).

    v (B, F); between layers (B, ``width``), F where that is None. φ is ``squash``: a name of ``SQUASHES`` or any
    pointwise function. Raises OptionError for an impossible size and an unknown name.
    """

    def __init__(
        self,
        features: int,
        layers: int,
        *,
        width: int | None = None,
        squash: str | Callable[[Tensor], Tensor] = "tanh",
        skip: bool = False,
    ) -> None:
        super().__init__()
        between = features if width is None else positive("MLP", "width", width)
        sizes = [features, *[between] * (positive("MLP", "layers", layers) - 1), features]
        self.layers = nn.ModuleList(nn.Linear(reads, gives) for reads, gives in pairwise(sizes))
        self.squash, self.skip = squash_of(squash), skip

    def forward(self, v: Tensor) -> Tensor:
        shortcut = v
        for layer in self.layers:
            v = self.squash(layer(v))
        return shortcut + v if self.skip else v

    def extra_repr(self) -> str:
        return f"squash={squash_label(self.squash)}, skip={self.skip}"
