"""The Jordan network: the only way from step to step goes through the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..cells.dense import DenseCell
from ..combinators.feedback import Feedback
from ..combinators.nested import given_by, positive
from ..errors import OptionError

__all__ = ["jordan"]


def jordan(
    input_size: int,
    hidden_size: int,
    output_size: int,
    *,
    squash: str | Callable[[Tensor], Tensor] = "tanh",
    embed: Callable[[Tensor], Tensor] | None = None,
    width: int | None = None,
    **options: Any,
) -> Feedback:
    """The Jordan network, a cell.

        h(t) = φ(b + W p(t-1) + U x(t)),    o(t) = c + V h(t)

    x (B, D), o (B, O), h (B, H); [U W] is ``cell.weight_ih``, V and c are ``readout``. p(t-1) is made of o(t-1), or
    is the target y(t-1), as ``Feedback`` says, which takes ``embed``, ``width`` and the ``options``. D may be 0. It is
    weaker than the Elman network: what the outputs do not tell is forgotten; but forced by its targets, all of its
    steps are computed at once.

    Raises OptionError for an impossible size or option, CellError for an ``embed`` that does not say how many features
    it gives. Sources: Jordan 1986, Serial order: a parallel distributed processing approach (without the decaying
    average of its context); Goodfellow, Bengio, Courville 2016, figure 10.4.
    """
    if not isinstance(input_size, int) or isinstance(input_size, bool) or input_size < 0:
        raise OptionError(f"jordan: input_size must be a number of features, 0 or more; got {input_size!r}.")
    positive("jordan", "output_size", output_size)
    if width is None:
        width = output_size if embed is None else given_by("jordan", embed)
    positive("jordan", "width", width)
    return Feedback(
        DenseCell(input_size + width, hidden_size, squash=squash),
        nn.Linear(hidden_size, output_size),
        embed=embed,
        width=width,
        **options,
    )
