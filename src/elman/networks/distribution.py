"""A cell that gives logits as a distribution over sequences of symbols: log-probability and samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..combinators.feedback import Feedback
from ..errors import InputError, OptionError
from ..types import Pytree, State
from ..unfold import scan
from .unfolding import past

__all__ = ["log_prob", "sample"]


def log_prob(
    cell: nn.Module,
    xs: Pytree,
    ys: Tensor,
    state: State = None,
    *,
    constants: Pytree = None,
    lengths: Tensor | list[int] | None = None,
) -> Tensor:
    """(B) of log p(ys | xs), of symbols ys (T, B), by a cell that gives logits (B, V); ``lengths`` (B) if they differ.

        log p(y(1..T) | x) = Σ_t log softmax(o(t))[y(t)]

    Through ``Feedback``, o(t) depends on y(1..t-1), which forces it, so any joint distribution can be represented.
    Another cell has no edge from y(t-1) to h(t): given x, the symbols are independent of one another.

    Raises InputError where ys are no symbols. Source: Goodfellow, Bengio, Courville 2016, section 10.2.3.
    """
    if ys.dim() != 2 or ys.is_floating_point():
        raise InputError(f"log_prob: ys must be symbols, integers (T, B); got {tuple(ys.shape)} of {ys.dtype}.")
    given = (xs, ys) if isinstance(cell, Feedback) else xs
    logits, _ = scan(cell, given, state, constants=constants, lengths=lengths)
    if lengths is not None:  # what stands in the padding need not be a symbol
        ys = ys.masked_fill(past(ys, lengths), -100)
    steps = F.cross_entropy(logits.flatten(0, 1), ys.flatten(), ignore_index=-100, reduction="none")
    return -steps.view(ys.shape).sum(0)


def sample(cell: nn.Module, xs: Pytree, state: State = None, *, constants: Pytree = None) -> Tensor:
    """Symbols (T, B) drawn from what ``log_prob`` gives the probability of.

    ``Feedback`` runs free and must feed what it draws (``feed="sample"``); another cell's symbols are drawn each by
    itself. Raises OptionError for a ``Feedback`` that feeds something else.
    """
    if isinstance(cell, Feedback) and cell.feeds != "sample":
        raise OptionError(
            f"sample draws from a Feedback that feeds back what it draws; this one has feed={cell.feeds!r}. Build it "
            "with feed='sample'."
        )
    with torch.no_grad():
        logits, _, recording = scan(cell, xs, state, constants=constants, record=True)
        if isinstance(cell, Feedback):
            return recording.values["choice"]
        return torch.distributions.Categorical(logits=logits).sample()
