"""Both directions: how wide it is, what each output depends on, on top of one another, and its mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contracts.networks import Mine
from elman.cells import ElmanCell, GRUCell, LSTMCell
from elman.cells.dense import DenseCell
from elman.errors import CellError, OptionError, StateError
from elman.networks.bidirectional import Bidirectional
from elman.networks.window import Window

STEPS, BATCH, D, H = 7, 4, 3, 5
LENGTHS = [STEPS, 1, 0, 4]


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(("merge", "width"), [("concat", 2 * H), ("sum", H), ("mean", H), ("product", H)])
def test_it_says_how_wide_it_is(merge: str, width: int) -> None:
    network = Bidirectional(GRUCell(D, H), ElmanCell(D, H), merge)
    assert network.output_size == width == network(torch.zeros(2, 1, D))[0].shape[-1]


def test_two_of_them_on_top_of_one_another() -> None:
    low = Bidirectional(GRUCell(D, H), GRUCell(D, H))
    high = Bidirectional(LSTMCell(low.output_size, H), LSTMCell(low.output_size, H), "sum")
    xs, lengths = torch.randn(STEPS, BATCH, D), torch.tensor(LENGTHS)
    whole = high(low(xs, lengths=lengths)[0], lengths=lengths)[0]
    part = high(low(xs[:4, 3:])[0])[0]
    torch.testing.assert_close(whole[:4, 3:], part)


def reach(network: nn.Module, at: int) -> list[int]:
    """The steps of x that y(at) depends on."""
    xs = numbers(STEPS, 1, D).requires_grad_()
    (gradient,) = torch.autograd.grad(network(xs)[0][at].sum(), xs)
    return gradient.abs().sum((1, 2)).nonzero()[:, 0].tolist()


def test_how_far_each_network_sees() -> None:
    assert reach(Bidirectional(ElmanCell(D, H), GRUCell(D, H)).double(), 3) == [*range(STEPS)]
    assert reach(Window(GRUCell(3 * D, H), 0, 2).double(), 3) == [0, 1, 2, 3, 4, 5]
    assert reach(Window(DenseCell(3 * D, H), 1, 1).double(), 3) == [2, 3, 4]
    assert reach(Window(nn.Linear(4 * D, H), 2, 1).double(), 6) == [4, 5, 6]


def shared() -> Bidirectional:
    cell = ElmanCell(D, H)
    return Bidirectional(cell, cell)


MISTAKES = {
    "unknown merge": (lambda: Bidirectional(GRUCell(D, H), GRUCell(D, H), "concatt"), OptionError, "mean 'concat'"),
    "one cell twice": (shared, CellError, "one and the same ElmanCell"),
    "inputs": (lambda: Bidirectional(GRUCell(D, H), GRUCell(4, H)), CellError, r"built for \[3, 4\] features"),
    "widths": (lambda: Bidirectional(GRUCell(D, H), GRUCell(D, 4), "sum"), CellError, r"cells give \[5, 4\]"),
    "widths that are not said": (
        lambda: Bidirectional(Mine(), nn.GRUCell(D, 1), "product")(torch.zeros(2, 1, D)),
        CellError,
        r"cells give \[4, 1\]",
    ),
    "own merge": (
        lambda: Bidirectional(GRUCell(D, H), GRUCell(D, H), torch.maximum).output_size,
        CellError,
        "cannot see how many features",
    ),
    "a merge that is none": (
        lambda: Bidirectional(GRUCell(D, H), GRUCell(D, H), 3),
        OptionError,
        "one of concat, mean, product, sum, or a function of both outputs; got 3",
    ),
    "a state that is no pair": (
        lambda: Bidirectional(GRUCell(D, H), GRUCell(D, H))(torch.zeros(2, 1, D), torch.zeros(2, 1, H)),
        StateError,
        "pair of states.* got a Tensor",
    ),
}


@pytest.mark.parametrize(("make", "error", "says"), MISTAKES.values(), ids=MISTAKES)
def test_what_does_not_fit(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()
