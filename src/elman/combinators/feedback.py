"""Output recurrence: what a cell gave, or should have given, is part of what it reads at the next step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import CellError, InputError, OptionError
from ..recording import record, scope
from ..types import Pytree, State
from .nested import Make, Wrapper, output_size, positive, said, step

__all__ = ["FEEDS", "Feedback"]

Map: TypeAlias = Callable[[Tensor], Tensor]


def _softmax(o: Tensor) -> Tensor:
    return torch.softmax(o, -1)


def _argmax(o: Tensor) -> Tensor:
    return o.argmax(-1)


def _sample(o: Tensor) -> Tensor:
    return (o - torch.empty_like(o).exponential_().log()).argmax(-1)  # the maximum of o + Gumbel noise


FEEDS: dict[str, Map] = {"argmax": _argmax, "sample": _sample, "softmax": _softmax}
"""What can be made of logits (B, V): the likeliest symbol (B), one drawn from them (B), their probabilities (B, V)."""


class Feedback(Wrapper):
    """The output of a cell is fed back to it: the Jordan form of a recurrence.

        o(t) = readout(cell([x(t), f(t-1)], s(t-1))),    f(t) = embed(p(t)),    f(0) = 0
        p(t) = feed(o(t)) where x(t) is given alone,     p(t) = y(t) where the pair (x(t), y(t)) is given

    So one object runs free on xs (T, B, D), and forced by targets, which are not shifted, on ``scan(cell, (xs, ys))``.
    x (B, D), output o (B, O), state (s, f (B, F)); the cell inside reads D + F features. ``readout`` and ``embed`` are
    modules; without ``embed`` f is p as it is, but integer symbols (B) become one-hot, and those outside 0 … F-1 zeros.
    ``feed`` is a function or a name in ``FEEDS``. F is ``width``, or what ``embed`` gives, or else O. A target has the
    form of what ``feed`` gives, or any that can be fed.

    With a cell without memory (``DenseCell``), forced steps do not wait for one another: no loop. ``sampling`` is
    scheduled sampling: while training, p(t) is feed(o(t)) instead of y(t) with that probability, drawn for each step
    and sequence; change it by ``cell.sampling.fill_(p)``. Records "choice", feed(o), where that is computed; what the
    cell records as "name" is "cell.name".

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
        if isinstance(feed, str) and feed not in FEEDS:
            raise OptionError.unknown("feed", feed, sorted(FEEDS))
        if sampling is not None and not (isinstance(sampling, int | float) and 0 <= sampling <= 1):
            raise OptionError(f"Feedback: sampling must be a probability between 0 and 1, got {sampling!r}.")
        self.readout, self.embed = readout, embed
        self.feeds, self.feed = feed, FEEDS[feed] if isinstance(feed, str) else feed
        self.register_buffer("sampling", None if sampling is None else torch.tensor(float(sampling)))
        source = readout if embed is None else embed
        if width is None:
            width = output_size(cell) if source is None else _given_by(source)
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
        return output_size(self.cell) if self.readout is None else _given_by(self.readout)

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype, constants: Pytree = None) -> State:
        """The first state of the cell inside, and (B, F) of zeros."""
        inner = super().initial_state(batch, device=device, dtype=dtype, constants=constants)
        return inner, torch.zeros(batch, self.width, device=device, dtype=dtype)

    def forward(
        self, x: Tensor | tuple[Tensor, Tensor], state: State, constants: Pytree = None
    ) -> tuple[Tensor, State]:
        x, target = self._apart(x)
        inner, fed = state
        with scope("cell"):
            o, inner = step(self.cell, torch.cat([x, fed], -1), inner, constants)
        if self.readout is not None:
            o = self.readout(o)
        sampling = self.sampling if self.training else None
        given = None if target is None else self._fed("the target", target, fed)
        if given is not None and sampling is None:
            return o, (inner, given)
        own = self._fed("feed(o)", record("choice", o if self.feed is None else self.feed(o)), fed)
        if given is not None and sampling is not None:
            coin = torch.rand(len(o), 1, device=o.device) < sampling
            own = torch.where(coin, own, given)
        return o, (inner, own)

    def _fed(self, what: str, p: Tensor, before: Tensor) -> Tensor:
        if self.embed is not None:
            f = self.embed(p)
        elif p.is_floating_point():
            f = p
        else:
            f = (p.unsqueeze(-1) == torch.arange(self.width, device=p.device)).to(before.dtype)
        if f.shape != before.shape:
            raise InputError(
                f"Feedback: {what} {_form(p)} would be fed as {_form(f)}, but {self.width} features are fed back: give "
                f"{_form(before)}, or symbols (B) to be one-hot, or else an embed that gives as many."
            )
        return f

    def _apart(self, x: Any) -> tuple[Tensor, Tensor | None]:
        pair = isinstance(x, tuple | list) and len(x) == 2
        x, target = x if pair else (x, None)
        if not isinstance(x, Tensor) or x.dim() != 2 or not (target is None or isinstance(target, Tensor)):
            raise InputError(
                "Feedback reads x, a tensor (B, D), or the pair (x, y) of it and the target of this step; got "
                f"{_form(x) if target is None else f'({_form(x)}, {_form(target)})'}. Where there is no x, give one "
                "without features: torch.empty(T, B, 0)."
            )
        if x.shape[-1] != self.input_size:
            raise InputError(
                f"Feedback: x has {x.shape[-1]} features, but {type(self.cell).__name__} reads "
                f"{self.input_size + self.width}: {self.input_size} of x and {self.width} that are fed back."
            )
        return x, target


def _given_by(module: Any) -> int:
    """Features that a readout or an embedding gives: what the last part of it says that says it."""
    for part in reversed([*module.modules()] if isinstance(module, nn.Module) else []):
        for name in ("out_features", "embedding_dim", "output_size", "hidden_size"):
            if isinstance(getattr(part, name, None), int):
                return int(getattr(part, name))
    kind = type(module).__name__ if isinstance(module, nn.Module) else getattr(module, "__name__", repr(module))
    raise CellError(
        f"Feedback cannot see how many features {kind} gives. Use a module that has out_features or output_size, such "
        "as nn.Linear, or nn.Sequential of them."
    )


def _form(x: Any) -> str:
    return str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__
