"""The ways to unfold one cell with the same weights, and the check that they compute the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ElmanError
from ..unfold import scan
from .cells import CELLS, by_hand

__all__ = ["WAYS", "Rival", "WrongNumbers", "agree", "rivals", "train", "verify"]

WAYS = ("elman", "interpret", "torch.nn", "eager", "compiled step", "compiled loop")
"""elman's default, its backend without kernels, torch.nn's layer, the loop by hand, the same with its step in
torch.compile, and all of it, unrolled, in torch.compile."""


class WrongNumbers(ElmanError):
    """Rivals do not compute the same, so that their times mean nothing."""


@dataclass(frozen=True)
class Rival:
    """A module and how it runs over xs (T, B, D)."""

    module: nn.Module
    run: Callable[[Tensor], Tensor]

    def train(self, xs: Tensor, weight: Tensor) -> None:
        """A training step without its update: forward, backward, and the gradients dropped."""
        train(self.module, self.run, xs, weight)


def train(module: nn.Module, run: Callable[[Tensor], Tensor], xs: Tensor, weight: Tensor) -> None:
    """Forward and backward with all gradients, of xs too; they are dropped again."""
    ys = run(xs)
    ys.backward(weight.to(ys.dtype))
    xs.grad = None
    module.zero_grad(set_to_none=True)


def rivals(
    name: str,
    inputs: int,
    hidden: int,
    ways: tuple[str, ...],
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
) -> dict[str, Rival]:
    """The ways that there are for a cell, all with the same weights, drawn by a fixed seed.

    With ``autocast`` they run under PyTorch's autocast to bfloat16.
    """
    contestant = CELLS[name]
    torch.manual_seed(0)
    cell: Any = contestant.make(inputs, hidden).to(dtype)
    if not hasattr(cell, "hidden_size"):
        cell.hidden_size = hidden
    loop = by_hand(contestant, cell)
    found: dict[str, Rival] = {}
    if contestant.layers is not None:
        for way, kind in zip(("elman", "torch.nn"), contestant.layers, strict=True):
            if way in ways:
                layer = kind(inputs, hidden).to(dtype)
                layer.load_state_dict({f"{key}_l0": value for key, value in cell.state_dict().items()})
                found[way] = Rival(layer, lambda xs, layer=layer: layer(xs)[0])  # type: ignore[misc]
    elif "elman" in ways:
        found["elman"] = Rival(cell, lambda xs: scan(cell, xs)[0])
    if "interpret" in ways:
        found["interpret"] = Rival(cell, lambda xs: scan(cell, xs, backend="interpret")[0])
    if "eager" in ways:
        found["eager"] = Rival(cell, loop)
    if any(way.startswith("compiled") for way in ways):
        torch.compiler.reset()  # it gives up on code that it has compiled for eight other cells
    if "compiled step" in ways:
        step = torch.compile(lambda a, *states: contestant.step(cell, a, *states), dynamic=False, fullgraph=True)
        found["compiled step"] = Rival(cell, by_hand(contestant, cell, step))
    if "compiled loop" in ways:
        found["compiled loop"] = Rival(cell, torch.compile(loop, dynamic=False, fullgraph=True))
    if autocast:
        return {way: Rival(rival.module, _narrowed(rival.run)) for way, rival in found.items()}
    return found


def _narrowed(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def narrowed(xs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return run(xs)

    return narrowed


def gradients(rival: Rival, xs: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Outputs and every gradient, those of parameters by the name that they have in a cell."""
    ys = rival.run(xs)
    named = {name.removesuffix("_l0"): p for name, p in rival.module.named_parameters()}
    found = torch.autograd.grad(ys, [xs, *named.values()], weight.to(ys.dtype))
    return {"ys": ys.detach(), "xs": found[0], **dict(zip(named, found[1:], strict=True))}


def agree(found: dict[str, Rival], xs: Tensor, weight: Tensor, tolerance: float, by: Rival | None = None) -> float:
    """The largest deviation of any rival from the loop by hand, relative to the largest value of the same tensor.

    ``by`` is that loop, where it is none of the rivals.

    Raises WrongNumbers where it is above the tolerance.
    """
    by = by or found["eager"]
    expected = gradients(by, xs, weight)
    worst = 0.0
    for way, rival in found.items():
        got = gradients(rival, xs, weight) if rival is not by else expected
        for what, value in got.items():
            scale = max(float(expected[what].abs().max()), torch.finfo(value.dtype).tiny)
            deviation = float((value - expected[what]).abs().max()) / scale
            if not deviation <= tolerance:
                raise WrongNumbers(f"{way}: {what} differs from the loop by hand by {deviation:.1e} of the largest.")
            worst = max(worst, deviation)
    return worst


def verify(name: str) -> float:
    """The largest deviation in float64, small sizes, other inputs than units; nothing is timed before.

    Raises WrongNumbers.
    """
    found = rivals(name, 17, 24, ("elman", "interpret", "torch.nn", "eager"), torch.float64)
    generator = torch.Generator().manual_seed(1)
    xs = torch.randn(9, 5, 17, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(9, 5, 24, dtype=torch.float64, generator=generator)
    return agree(found, xs, weight, 1e-10)
