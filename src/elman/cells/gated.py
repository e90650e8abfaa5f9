"""What the cells share: parameters in the layout and order of torch.nn, and how they are drawn."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..init import initialise
from .squash import squash_label, squash_of

__all__ = ["Common", "GatedCell", "probability"]


class Common(TypedDict, total=False):
    """The keywords that every cell takes."""

    squash: str | Callable[[Tensor], Tensor]
    bias: bool
    init: str
    device: torch.device | str | None
    dtype: torch.dtype | None


class GatedCell(nn.Module):
    """Abstract: G gates stacked in one product with the input and one with the output before.

    ``weight_ih`` (G·H, D), ``weight_hh`` (G·H, output_size), ``bias_ih`` and ``bias_hh`` (G·H) or None; without
    ``feedback`` the gates read the input alone, and what ends in hh is not there. A cell names its ``gates`` in
    the order in which they are stacked (or hands them to the constructor, where options change them), calls
    ``reset_parameters`` once all its parameters are there, and defines ``initial_state`` and ``forward``. Raises
    OptionError for a size that is not a positive integer and for an unknown squashing function or initialisation.
    """

    gates: tuple[str, ...]
    feedback: ClassVar[bool] = True
    weight_ih: nn.Parameter
    weight_hh: nn.Parameter
    bias_ih: nn.Parameter | None
    bias_hh: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        proj_size: int = 0,
        *,
        gates: tuple[str, ...] | None = None,
        squash: str | Callable[[Tensor], Tensor] = "tanh",
        bias: bool = True,
        init: str = "uniform",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise OptionError(f"{type(self).__name__}: {name} must be a positive integer, got {size!r}.")
        if not isinstance(proj_size, int) or not 0 <= proj_size < hidden_size:
            limits = "proj_size must be 0 (none) or an integer below hidden_size"
            raise OptionError(f"{type(self).__name__}: {limits}; got {proj_size!r}.")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.output_size = proj_size or hidden_size
        self.squash = squash_of(squash)
        self.init = init
        self.gates = gates or type(self).gates
        rows = len(self.gates) * hidden_size
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size, device=device, dtype=dtype))
        if self.feedback:
            self.weight_hh = nn.Parameter(self.weight_ih.new_empty(rows, self.output_size))
        for name in ("bias_ih", "bias_hh") if self.feedback else ("bias_ih",):
            self.register_parameter(name, nn.Parameter(self.weight_ih.new_empty(rows)) if bias else None)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, by the scheme named at construction."""
        initialise(self, self.init)

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Any:
        raise NotImplementedError

    def extra_repr(self) -> str:
        known = inspect.signature(type(self)).parameters.values()
        own = [p for p in known if p.default is not p.empty and p.name not in (*Common.__annotations__, "gates")]
        given = [(p.name, getattr(self, p.name, p.default), p.default) for p in own]
        options = [f"{name}={value!r}" for name, value, usual in given if value != usual]
        squash = f"squash={squash_label(self.squash)}"
        bias = [] if self.bias_ih is not None else ["bias=False"]
        return ", ".join([str(self.input_size), str(self.hidden_size), squash, *options, *bias])


def probability(owner: str, name: str, value: float) -> float:
    """``value``, when it is a number in [0, 1); otherwise OptionError that names owner and option."""
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise OptionError(f"{owner}: {name} must be in [0, 1), got {value!r}; 0 is without it.")
    return float(value)
