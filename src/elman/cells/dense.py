"""The dense cell: a layer without memory, so that what is built around it is the only recurrence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import OptionError
from ..recording import record
from .squash import squash_label, squash_of

__all__ = ["Dense"]


class Dense(nn.Module):
    """A feed-forward layer as a cell: its state is the empty tuple.

        h(t) = φ(U x(t) + b)

    x (B, D), output h (B, H). U is ``weight_ih`` (H, D), b ``bias_ih`` (H), drawn as in torch.nn.Linear. φ is
    ``squash``, as in ``ElmanCell``. Records "preactivation". The compiler finds no loop in it: all steps at once.

    Raises OptionError for an unknown squashing function or an impossible size.
    Source: Goodfellow, Bengio, Courville 2016, equation 6.36.
    """

    def __init__(
        self, input_size: int, hidden_size: int, *, squash: str | Callable[[Tensor], Tensor] = "tanh", bias: bool = True
    ) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise OptionError(f"Dense: {name} must be a positive integer, got {size!r}.")
        self.input_size, self.hidden_size, self.output_size = input_size, hidden_size, hidden_size
        self.squash = squash_of(squash)
        bound = input_size**-0.5
        self.weight_ih = nn.Parameter(torch.empty(hidden_size, input_size).uniform_(-bound, bound))
        drawn = nn.Parameter(torch.empty(hidden_size).uniform_(-bound, bound)) if bias else None
        self.bias_ih: nn.Parameter | None = drawn

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> tuple[()]:
        """Nothing is carried."""
        return ()

    def forward(self, x: Tensor, state: tuple[()]) -> tuple[Tensor, tuple[()]]:
        return self.squash(record("preactivation", F.linear(x, self.weight_ih, self.bias_ih))), state

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, squash={squash_label(self.squash)}"
