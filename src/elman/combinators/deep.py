"""Depth inside one step: a multilayer perceptron in any of the three blocks of a cell."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import CellError, OptionError
from ..protocol import MISTAKES
from ..types import Pytree, State
from .mlp import MLP
from .nested import Wrapper, first_state, input_size, like, output_size, positive, step, trial

__all__ = ["Deep"]


class Deep(Wrapper):
    """Any cell with an MLP in any of the three blocks: input to hidden, hidden to hidden, hidden to output.

        x'(t) = MLP_in(x(t)),    h'(t-1) = MLP_tr(h(t-1)),    y(t) = MLP_out(cell(x'(t), h'(t-1)))

    ``input``, ``transition`` and ``output`` are the layers of each, 0 for none; ``skip`` adds the identity around each,
    so that it lengthens no path; ``squash`` and ``width`` as in ``MLP``. x, y and state are those of the cell. h is the
    leaf of the state that is the cell's output: a memory cell beside it, as s of the LSTM, keeps its short path. Which
    leaf that is shows one step at construction; for a cell that reads constants, or gives what is no state, say it by
    its number as ``leaf``. An output MLP has no connections through time: it is a tower that runs once for all steps.

    Raises OptionError for numbers of layers that are no whole numbers, or all 0, and for an unknown squash; CellError
    where no leaf is the output.
    Sources: Pascanu, Gulcehre, Cho, Bengio 2014, How to construct deep recurrent neural networks, sections 3.3.1 to
    3.3.3; Goodfellow, Bengio, Courville 2016, figures 10.13b and c.
    """

    def __init__(
        self,
        cell: nn.Module,
        *,
        input: int = 0,
        transition: int = 0,
        output: int = 0,
        skip: bool = False,
        squash: str | Callable[[Tensor], Tensor] = "tanh",
        width: int | None = None,
        leaf: int | None = None,
    ) -> None:
        super().__init__(cell)
        if leaf is not None and (not isinstance(leaf, int) or leaf < 0):
            raise OptionError(f"Deep: leaf must be the number of a leaf of the state, from 0; got {leaf!r}.")
        depths = {"input": input, "transition": transition, "output": output}
        if not any(depths.values()):
            raise OptionError("Deep: give the layers of at least one block: input=, transition= or output=.")

        def block(name: str, features: Callable[[nn.Module], int]) -> MLP | None:
            if isinstance(depths[name], int) and depths[name] == 0:
                return None
            layers = positive("Deep", name, depths[name])
            mlp = MLP(features(cell), layers, width=width, squash=squash, skip=skip)
            return mlp.to(device=like(cell).device, dtype=like(cell).dtype)

        self.leaf = (_leaf_of_output(cell) if leaf is None else leaf) if transition else None
        self.input, self.transition = block("input", input_size), block("transition", self._carried)
        self.output = block("output", output_size)

    def _carried(self, cell: nn.Module) -> int:
        """Features of the leaf that the transition acts on."""
        leaves = pytree.tree_leaves(first_state(cell))
        assert self.leaf is not None
        if self.leaf >= len(leaves):
            raise OptionError(f"Deep: leaf {self.leaf} is not there; the state has {len(leaves)}, counted from 0.")
        return int(leaves[self.leaf].shape[-1])

    def forward(self, x: Tensor, state: State, constants: Pytree = None) -> tuple[Tensor, State]:
        if self.transition is not None and self.leaf is not None:
            leaves, structure = pytree.tree_flatten(state)
            leaves[self.leaf] = self.transition(leaves[self.leaf])
            state = pytree.tree_unflatten(leaves, structure)
        y, state = step(self.cell, x if self.input is None else self.input(x), state, constants)
        return y if self.output is None else self.output(y), state


def _leaf_of_output(cell: nn.Module) -> int:
    """Which leaf of its state a cell gives as its output."""
    try:
        y, state = trial(cell, input_size(cell))
    except MISTAKES as error:
        raise _unknown(cell, f"a step on zeros fails: {error}") from error
    found = [i for i, leaf in enumerate(pytree.tree_leaves(state)) if leaf is y]
    if not found:
        raise _unknown(cell, "none is its output")
    return found[0]


def _unknown(cell: nn.Module, why: str) -> CellError:
    return CellError(
        f"Deep: which leaf of the state of {type(cell).__name__} goes from hidden to hidden is not known, since "
        f"{why.rstrip('.')}. Give its number as leaf=, or put Deep around the cell inside."
    )
