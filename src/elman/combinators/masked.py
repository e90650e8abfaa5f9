"""Removed connections: weights of a cell that stay at zero."""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from ..errors import OptionError
from ..types import Pytree, State
from .nested import Wrapper, step

__all__ = ["Masked", "step_with"]


def step_with(
    weights: dict[str, Tensor], cell: nn.Module, x: Pytree, state: State, constants: Pytree = None
) -> tuple[Pytree, State]:
    """One step of any cell with other tensors in the place of its parameters of these names.

    Not by a parametrisation: that would change the class and the names in the state_dict of a cell that is not ours.
    """
    with _reparametrize_module(cell, weights):
        return step(cell, x, state, constants)


class Masked(Wrapper):
    """Any cell without some of its connections: W ⊙ M in the place of W.

    ``mask`` is a 0/1 tensor M of the shape of W, or the share of connections that are kept, a number from 0 to 1, drawn
    at construction: that many of all, without replacement. ``weights`` names the parameters of the cell that lose
    connections, separated by spaces. What is removed is zero, and has no gradient; M is saved with the state_dict.
    Input, output and state are those of the cell. The product with M is taken once for a whole sequence.

    Raises OptionError for a name that is no parameter, another shape and other numbers.
    Sources: Goodfellow, Bengio, Courville 2016, section 10.9.3 (removed connections); Jaeger 2001, The "echo state"
    approach to analysing and training recurrent neural networks, section 3 (sparse W).
    """

    def __init__(self, cell: nn.Module, mask: Tensor | float, *, weights: str = "weight_hh") -> None:
        super().__init__(cell)
        known = dict(cell.named_parameters())
        self.names = tuple(weights.split())
        for name in self.names:
            if name not in known:
                raise OptionError.unknown(f"parameter of {type(cell).__name__}", name, sorted(known))
            self.register_buffer(_buffer(name), _mask(name, mask, known[name]))
            with torch.no_grad():
                known[name].mul_(getattr(self, _buffer(name)))

    def forward(self, x: Pytree, state: State, constants: Pytree = None) -> tuple[Tensor, State]:
        kept = {name: attrgetter(name)(self.cell) * getattr(self, _buffer(name)) for name in self.names}
        return step_with(kept, self.cell, x, state, constants)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, _buffer(name)).float().mean():.3g}" for name in self.names)


def _buffer(name: str) -> str:
    return f"mask_{name.replace('.', '_')}"


def _mask(name: str, given: Tensor | float, weight: Tensor) -> Tensor:
    """Booleans in the shape of the weight."""
    if isinstance(given, Tensor):
        if given.shape != weight.shape or not ((given == 0) | (given == 1)).all():
            raise OptionError(
                f"Masked: the mask of {name} must be zeros and ones of shape {tuple(weight.shape)}, as the parameter; "
                f"got {tuple(given.shape)} {str(given.dtype).removeprefix('torch.')}."
            )
        return given.detach().to(weight.device, torch.bool)
    if not isinstance(given, int | float) or isinstance(given, bool) or not 0 <= given <= 1:
        raise OptionError(f"Masked: {name} must be a 0/1 tensor or the share that is kept, 0 to 1; got {given!r}.")
    order = torch.randperm(weight.numel(), device=weight.device)
    return (order < round(given * weight.numel())).view(weight.shape)
