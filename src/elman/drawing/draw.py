"""``draw``: any cell or network as a circuit diagram, or unrolled."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ..errors import OptionError
from ..types import Pytree, State
from .circuit import circuit, unrolled
from .collapse import collapsed
from .diagram import Diagram
from .unrolling import Unrolled
from .unrolling import unroll as watched

__all__ = ["Picture", "draw"]

_FORMS = ("svg", "png")
_STEPS, _MOST = 6, 64


class Picture:
    """A ``diagram``, and how it looks: ``svg()``, ``png()``, ``save(path)``. Notebooks show it by itself."""

    def __init__(self, diagram: Diagram) -> None:
        self.diagram = diagram

    def svg(self) -> str:
        """The picture as SVG text, the same bytes for the same diagram."""
        return self._drawn("svg").decode()

    def png(self) -> bytes:
        return self._drawn("png")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .svg or .png file. Raises OptionError for another ending or a missing folder."""
        form = Path(path).suffix.lower().removeprefix(".")
        if form not in _FORMS:
            raise OptionError(f"a picture is saved as .svg or .png; got {str(path)!r}.")
        if not Path(path).parent.is_dir():
            folder = str(Path(path).parent)
            raise OptionError(f"there is no folder {folder!r} to save a picture in; make it first, or save elsewhere.")
        Path(path).write_bytes(self._drawn(form))

    def _drawn(self, form: str) -> bytes:
        from .render import rendered

        return rendered(collapsed(self.diagram.with_delay_nodes()), form)

    def _repr_svg_(self) -> str:
        return self.svg()

    def __repr__(self) -> str:
        d = self.diagram
        form = "unrolled graph" if d.unrolled else "circuit"
        return f"<{form} of {d.title}: {len(d.nodes)} nodes, {len(d.edges)} edges>"


def draw(
    cell_or_network: nn.Module,
    xs: Pytree = None,
    *,
    unroll: int = 0,
    path: str | os.PathLike[str] | None = None,
    state: State = None,
    constants: Pytree = None,
    loss: bool = False,
    detail: bool = False,
    names: Sequence[str] | None = None,
) -> Picture:
    """Draw a cell or a network as it is: run for a few steps without data, it shows what is computed from what.

    A circuit has one node for every value x, h, o of a step and a black square for each delay of one step;
    ``unroll=τ`` draws τ steps one beside the other. Nodes are what goes in and comes out, states, and whatever a
    weight acts upon; with ``detail`` gates and pointwise operations too. Weights are U (from an input), W (from an
    earlier step), V (to an output), R (from a constant), numbered where there are several. Colours tell the
    segments of the compiled program, which run once for all steps, from its loops.

    Args:
        cell_or_network: any cell, or any network that reads whole sequences and unfolds its cells by ``scan``.
        xs: an example of what it reads, (T, B, …) leaves, a tuple for several arguments of a network; only shapes and
            types count. None: (T, B, input_size).
        unroll: 0 for the circuit, or the number τ of steps.
        path: a .svg or .png file to write.
        state, constants: as for ``scan``, where the cell needs them; examples too.
        loss: add a loss L and a target y to every output; an input of the name y is that target.
        detail: show the inside of cells.
        names: how the leaves of xs are called, else their keys, the names of arguments, or x.

    Raises OptionError for an impossible ``unroll`` or path, InputError for layers (nn.LSTM, elman.LSTM, …), which show
    nothing of what happens between their steps, CellError, InputError and UnfoldError as ``scan`` does.
    Source: Goodfellow, Bengio, Courville, Deep Learning (2016), section 10.1 and figure 10.2.
    """
    if not isinstance(unroll, int) or isinstance(unroll, bool) or not 0 <= unroll <= _MOST:
        raise OptionError(
            f"draw: unroll must be a number of steps from 1 to {_MOST}, or 0 for the circuit; got {unroll!r}."
        )
    diagram = _diagram(cell_or_network, xs, unroll, state, constants, detail, names)
    picture = Picture(diagram.with_loss() if loss else diagram)
    if path is not None:
        picture.save(path)
    return picture


def _diagram(
    network: nn.Module,
    xs: Pytree,
    steps: int,
    state: State,
    constants: Pytree,
    detail: bool,
    names: Sequence[str] | None,
) -> Diagram:
    def watch(count: int) -> Unrolled:
        return watched(network, xs, count, state=state, constants=constants, names=names)

    seen = watch(steps or _STEPS)
    count = _STEPS
    while not steps and seen.empty and count < _MOST:  # until every delay is seen at work more than once
        count *= 2
        longer = watch(count)
        if longer.empty == seen.empty:
            break
        seen = watch(2 * count) if not longer.empty else longer
    diagram = unrolled(seen, detail=detail) if steps else circuit(seen, detail=detail)
    return diagram.titled(type(network).__name__)
