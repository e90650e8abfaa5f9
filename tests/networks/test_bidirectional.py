"""Both directions, and a fixed window: any cells, padding that never leaks, and what each output depends on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from elman.cells import ElmanCell, GRUCell, LSTMCell
from elman.cells.dense import DenseCell
from elman.combinators import Residual, Stack
from elman.errors import CellError, InputError, OptionError
from elman.networks.bidirectional import Bidirectional
from elman.networks.window import Window, windows

STEPS, BATCH, D, H = 7, 4, 3, 5
LENGTHS = [STEPS, 1, 0, 4]


class Mine(nn.Module):
    """A user's own cell, that says nothing about itself."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(D + H, H)

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"h": torch.full((batch, H), 0.5, device=device, dtype=dtype)}

    def forward(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        h = torch.sin(self.w(torch.cat([x, state["h"]], -1)))
        return h, {"h": h}


CELLS = {
    "elman, lstm": lambda: (ElmanCell(D, H), LSTMCell(D, H)),
    "user's": lambda: (Mine(), Mine()),
    "torch.nn": lambda: (nn.GRUCell(D, H), nn.LSTMCell(D, H)),
    "combinators": lambda: (Stack([GRUCell(D, 4), GRUCell(4, H)]), Stack([Residual(LSTMCell(D, H))])),
}
MERGES: dict[Any, Any] = {
    "concat": lambda h, g: torch.cat([h, g], -1),
    "sum": lambda h, g: h + g,
    "mean": lambda h, g: (h + g) / 2,
    "product": lambda h, g: h * g,
    torch.maximum: torch.maximum,
}


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def alone(cell: nn.Module, xs: Tensor, state: Any, backward: bool) -> tuple[Tensor, Any]:
    """One sequence (T, D), one step after the other."""
    ys = [torch.empty(0)] * len(xs)
    for t in reversed(range(len(xs))) if backward else range(len(xs)):
        result = cell(xs[t][None], state)
        if type(cell).__module__.startswith("torch.nn"):
            ys[t], state = (result[0] if isinstance(result, tuple) else result), result
        else:
            ys[t], state = result
    return torch.cat(ys), state


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("name", CELLS)
def test_each_sequence_alone_in_both_directions_by_hand(name: str, merge: Any) -> None:
    torch.manual_seed(3)
    network = Bidirectional(*CELLS[name](), merge=merge).double()
    xs = numbers(STEPS, BATCH, D)
    for b, n in enumerate(LENGTHS):
        xs[n:, b] = torch.nan
    xs.requires_grad_()
    _, first = network(torch.zeros_like(xs), lengths=[0] * BATCH)  # where the cells begin
    first = pytree.tree_map(lambda leaf: leaf.detach() + 0.3 * torch.randn_like(leaf), first)
    ys, last = network(xs, first, lengths=LENGTHS)
    weights = numbers(*ys.shape)
    sources = [xs, *network.parameters()]
    expected = torch.zeros((), dtype=torch.float64)
    for b, n in enumerate(LENGTHS):
        assert not ys[n:, b].any()
        states = [pytree.tree_map(lambda leaf, b=b: leaf[b : b + 1], s) for s in first]
        if n:
            h, states[0] = alone(network.forward_cell, xs[:n, b], states[0], backward=False)
            g, states[1] = alone(network.backward_cell, xs[:n, b], states[1], backward=True)
            y = MERGES[merge](h, g)
            torch.testing.assert_close(ys[:n, b], y, rtol=1e-10, atol=1e-10)
            expected = expected + (y * weights[:n, b]).sum()
        for found, wanted in zip(pytree.tree_leaves(last), pytree.tree_leaves(states), strict=True):
            torch.testing.assert_close(found[b], wanted[0], rtol=1e-10, atol=1e-10)
    found_gradients = torch.autograd.grad((ys * weights).sum(), sources)
    for found, wanted in zip(found_gradients, torch.autograd.grad(expected, sources), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


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


@pytest.mark.parametrize("inner", [lambda n: LSTMCell(n, H), lambda n: nn.Linear(n, H), lambda n: nn.GRUCell(n, H)])
def test_a_window_does_not_read_padding(inner: Any) -> None:
    torch.manual_seed(3)
    network = Window(inner(4 * D), 1, 2).double()
    xs = numbers(STEPS, BATCH, D)
    for b, n in enumerate(LENGTHS):
        xs[n:, b] = torch.nan
    xs.requires_grad_()
    ys, _ = network(xs, lengths=LENGTHS)
    (gradient,) = torch.autograd.grad(ys.sum(), xs)
    for b, n in enumerate(LENGTHS):
        assert not ys[n:, b].any()
        assert not gradient[n:, b].any()
        if n:
            torch.testing.assert_close(ys[:n, b], network(xs[:n, b : b + 1])[0][:, 0], rtol=1e-10, atol=1e-10)


def test_windows_are_side_by_side_in_the_order_of_time() -> None:
    xs = torch.arange(1.0, 5.0).view(4, 1, 1)
    assert windows(xs, 1, 2)[:, 0].tolist() == [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 0], [3, 4, 0, 0]]
    assert windows(xs, 0, 1, [3])[:, 0].tolist() == [[1, 2], [2, 3], [3, 0], [0, 0]]
    assert windows(xs, 5, 0).shape == (4, 1, 6)


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
        r"cells give \[5, 1\]",
    ),
    "own merge": (
        lambda: Bidirectional(GRUCell(D, H), GRUCell(D, H), torch.maximum).output_size,
        CellError,
        "cannot see how many features",
    ),
    "negative": (lambda: Window(GRUCell(D, H), -1, 0), OptionError, "left must be a number of steps"),
    "window": (lambda: Window(GRUCell(4, H), 1, 1), CellError, "4 features, which are not 3"),
    "no features": (lambda: windows(torch.zeros(2, 3), 1, 1), InputError, r"one tensor \(T, B, D\); got \(2, 3\)"),
}


@pytest.mark.parametrize(("make", "error", "says"), MISTAKES.values(), ids=MISTAKES)
def test_what_does_not_fit(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()
