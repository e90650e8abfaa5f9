"""Output recurrence: what a cell gave, or should have given, is part of what it reads at the next step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CellError
from ..recording import record, scope
from ..types import Pytree, State
from .feeds import Map, apart, features, feed_of
from .nested import Make, Wrapper, fraction, given_by, output_size, positive, said, step

__all__ = ["Feedback"]


class Feedback(Wrapper):
    """The output of a cell is fed back to it: the Jordan form of a recurrence.

        o(t) = readout(cell([x(t), f(t-1)], s(t-1))),    f(t) = embed(p(t)),    f(0) = 0
        p(t) = feed(o(t)) where x(t) is given alone,     p(t) = y(t) where the pair (x(t), y(t)) is given

    So one object runs free on xs (T, B, D), and forced by targets, which are not shifted, on ``scan(cell, (xs, ys))``.
    x (B, D), output o (B, O), state (s, f (B, F)); the cell inside reads D + F features. ``readout`` and ``embed`` are
    modules; without ``embed`` f is p as it is, but integer symbols (B) become one-hot, and those outside 0 … F-1 zeros.
    ``feed`` is a function or a name in ``FEEDS``. F is ``width``, or what ``embed`` gives, or O. Any p can be a target.

    With a cell without memory (``DenseCell``), forced steps do not wait for one another: no loop. ``sampling`` is the
    probability with which, while training, p(t) is feed(o(t)) instead of y(t), drawn for each step and sequence; change
    it by ``cell.sampling.fill_(p)``. Records "choice", feed(o), where it is computed; the cell's "name" is "cell.name".

    Raises CellError where widths do not fit, OptionError for an unknown feed or impossible probability, InputError for
    an x of another form. Sources: Jordan 1986, Serial order; Williams and Zipser 1989 (teacher forcing); Goodfellow,
    Bengio, Courville 2016, section 10.2.1; Bengio et al. 2015, Scheduled sampling, section 2.4.
    """

    sampling: Tensor | None

    def __init__(
        self,
        cell: nn.Module,
        readout: Map | None = None,
        *,
        feed: str | Map | None = None,
        embed: Map | None = None,
        width: int | None = None,
        sampling: float | None = None,
    ) -> None:
        super().__init__(cell)
        self.readout, self.embed, self.feeds, self.feed = readout, embed, feed, feed_of(feed)
        rate = None if sampling is None else torch.tensor(fraction("Feedback", "sampling", sampling))
        self.register_buffer("sampling", rate)
        if width is None:
            width = self.output_size if embed is None else given_by("Feedback", embed)
        self.width = positive("Feedback", "width", width)
        reads = said(cell, "input_size")
        if reads is not None and reads < self.width:
            raise CellError(
                f"Feedback: {type(cell).__name__} reads {reads} features, fewer than the {self.width} "
                f"that are fed back. Build it with input_size = features of x + {self.width}."
            )

    @classmethod
    def build(cls, input_size: int, make: Make, outputs: int | None = None, **options: Any) -> Feedback:
        """``outputs`` adds a linear readout of that width; otherwise the output of the cell itself is fed back."""
        width = output_size(make(max(input_size, 1))) if outputs is None else positive("feedback", "outputs", outputs)
        cell = make(input_size + width)
        return cls(cell, None if outputs is None else nn.Linear(output_size(cell), width), **options)

    @property
    def input_size(self) -> int:
        return super().input_size - self.width

    @property
    def output_size(self) -> int:
        return output_size(self.cell) if self.readout is None else given_by("Feedback", self.readout)

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype, constants: Pytree = None) -> State:
        """The first state of the cell inside, and (B, F) of zeros."""
        inner = super().initial_state(batch, device=device, dtype=dtype, constants=constants)
        return inner, torch.zeros(batch, self.width, device=device, dtype=dtype)

    def forward(self, x: Pytree, state: State, constants: Pytree = None) -> tuple[Tensor, State]:
        x, target = apart(self.cell, x, self.width)
        inner, fed = state
        with scope("cell"):
            o, inner = step(self.cell, torch.cat([x, fed], -1), inner, constants)
        o = o if self.readout is None else self.readout(o)
        sampling = self.sampling if self.training else None
        given = None if target is None else features("the target", target, self.embed, fed)
        if given is not None and sampling is None:
            return o, (inner, given)
        own = features("feed(o)", record("choice", o if self.feed is None else self.feed(o)), self.embed, fed)
        if given is not None and sampling is not None:
            own = torch.where(torch.rand(len(o), 1, device=o.device) < sampling, own, given)
        return o, (inner, own)
