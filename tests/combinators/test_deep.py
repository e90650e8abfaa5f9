"""MLPs in the three blocks of a cell, against the same written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elman
from comparing import compiled
from elman.cells import ElmanCell, GRUCell, LSTMCell
from elman.combinators import Stack
from elman.combinators.deep import Deep
from elman.combinators.delay import Delay
from elman.combinators.leaky import Leaky
from elman.combinators.mlp import MLP
from elman.errors import CellError, OptionError

F64 = torch.float64
B, D, H = 3, 3, 4


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, requires_grad=True)


def by_hand(cell: nn.Module, block: str, v: Tensor, skip: bool) -> Tensor:
    """The block's MLP from the names of its parameters; v itself where it has none."""
    weights = {name: p for name, p in cell.named_parameters() if name.startswith(f"{block}.")}
    a = v
    for layer in range(len(weights) // 2):
        a = (a @ weights[f"{block}.layers.{layer}.weight"].T + weights[f"{block}.layers.{layer}.bias"]).tanh()
    return v + a if skip and weights else a


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("depths", [(1, 0, 0), (0, 3, 0), (0, 0, 2), (2, 1, 3)])
@pytest.mark.parametrize("width", [None, 7])
def test_deep_elman_is_the_equation(depths: tuple[int, int, int], skip: bool, width: int | None) -> None:
    torch.manual_seed(9)
    inner = ElmanCell(D, H, dtype=F64)
    blocks = dict(zip(("input", "transition", "output"), depths, strict=True))
    cell = Deep(inner, **blocks, skip=skip, width=width).double()
    x, h = numbers(B, D), numbers(B, H)
    x_, h_ = by_hand(cell, "input", x, skip), by_hand(cell, "transition", h, skip)
    new = (x_ @ inner.weight_ih.T + inner.bias_ih + h_ @ inner.weight_hh.T + inner.bias_hh).tanh()
    expected = by_hand(cell, "output", new, skip)
    y, state = cell(x, h)
    torch.testing.assert_close((y, state), (expected, new), rtol=1e-12, atol=1e-12)
    sources = [x, h, *cell.parameters()]
    assert len(sources) == 2 + 4 + 2 * sum(depths)
    weight = torch.randn(B, H, dtype=F64)
    for found, wanted in zip(
        torch.autograd.grad((y * weight + state).sum(), sources),
        torch.autograd.grad((expected * weight + new).sum(), sources),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_memory_cell_beside_the_output_keeps_its_path() -> None:
    torch.manual_seed(10)
    inner = LSTMCell(D, H, dtype=F64)
    cell = Deep(inner, transition=2).double()
    x, h, s = numbers(B, D), numbers(B, H), numbers(B, H)
    found, expected = cell(x, (h, s)), inner(x, (by_hand(cell, "transition", h, False), s))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class CellFirst(nn.Module):
    """A user's LSTM whose memory is the first leaf of its state, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTMCell(D, H)
        self.input_size, self.output_size = D, H

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Any:
        zeros = torch.zeros(batch, H, device=device, dtype=dtype)
        return {"c": zeros, "h": zeros.clone()}

    def forward(self, x: Tensor, state: Any) -> Any:
        h, c = self.lstm(x, (state["h"], state["c"]))
        return h, {"c": c, "h": h}


@pytest.mark.parametrize(
    ("cell", "leaf"),
    [
        (CellFirst(), 1),
        (GRUCell(D, H), 0),
        (nn.LSTMCell(D, H), 0),
        (Stack([ElmanCell(D, H), LSTMCell(H, H)]), 1),
        (Leaky(LSTMCell(D, H)), 0),
    ],
)
def test_the_leaf_of_the_output_is_found(cell: nn.Module, leaf: int) -> None:
    before = torch.random.get_rng_state()
    deep = Deep(cell, transition=1)
    assert deep.leaf == leaf
    torch.random.set_rng_state(before)
    MLP(H, 1)
    fresh = torch.random.get_rng_state()
    torch.random.set_rng_state(before)
    Deep(cell, transition=1)
    assert torch.equal(torch.random.get_rng_state(), fresh)  # finding it draws nothing


def test_the_output_of_a_users_cell_is_what_goes_through(xs: Tensor) -> None:
    cell = Deep(CellFirst(), transition=1)
    ys, state = elman.scan(cell, xs, backend="interpret")
    before = {"c": torch.zeros(B, H), "h": torch.zeros(B, H)}
    for x, y in zip(xs, ys, strict=True):
        out, before = cell.cell(x, {"c": before["c"], "h": cell.transition(before["h"])})
        torch.testing.assert_close(out, y)
    torch.testing.assert_close(state, before)


@pytest.fixture
def xs() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, B, D)


def test_an_output_tower_leaves_the_loop(xs: Tensor) -> None:
    def products(cell: nn.Module) -> int:
        given = {"xs": xs, "state": torch.zeros(B, H), "constants": None}
        (loop,) = compiled(cell, given).program.loops
        return sum("mm" in str(node.target) for node in loop.nodes)

    assert products(Deep(ElmanCell(D, H), input=3, output=4)) == 1
    assert products(Deep(ElmanCell(D, H), transition=3)) == 4


def test_with_its_last_layer_at_zero_the_skip_is_the_cell(xs: Tensor) -> None:
    inner = GRUCell(D, H)
    cell = Deep(inner, input=2, transition=3, output=2, skip=True)
    for block in (cell.input, cell.transition, cell.output):
        for parameter in block.layers[-1].parameters():
            nn.init.zeros_(parameter)
    torch.testing.assert_close(elman.scan(cell, xs), elman.scan(inner, xs))


def test_it_is_made_where_the_cell_is() -> None:
    cell = Deep(GRUCell(D, H, dtype=F64, device="meta"), input=1, transition=2, output=1)
    assert {(p.dtype, p.device.type) for p in cell.parameters()} == {(F64, "meta")}


class Projected(GRUCell):
    """Gives what is no state."""

    def forward(self, x: Tensor, state: Tensor) -> Any:
        y, state = super().forward(x, state)
        return 2 * y, state


class Reading(GRUCell):
    """Needs constants."""

    def forward(self, x: Tensor, state: Tensor, constants: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x + constants, state)


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        (Projected(D, H), "since none is its output"),
        (Reading(D, H), "a step on zeros fails: Reading reads constants"),
        (Delay(GRUCell(D, H), 2), ""),
    ],
)
def test_a_leaf_that_is_not_known_must_be_said(cell: nn.Module, why: str) -> None:
    if why:
        with pytest.raises(CellError, match=f"{why}.* Give its number as leaf="):
            Deep(cell, transition=1)
    assert Deep(cell, transition=1, leaf=0).leaf == 0
    assert Deep(cell, output=1).leaf is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give the layers of at least one block"),
        ({"transition": -1}, "Deep: transition must be a positive integer, got -1"),
        ({"input": 1.5}, "Deep: input must be a positive integer, got 1.5"),
        ({"output": True}, "Deep: output must be a positive integer, got True"),
        ({"output": 1, "width": 0}, "MLP: width must be a positive integer, got 0"),
        ({"output": 1, "squash": "tan"}, "unknown squashing function 'tan': did you mean 'tanh'"),
        ({"transition": 1, "leaf": -1}, "leaf must be the number of a leaf of the state, from 0; got -1"),
    ],
)
def test_mistakes_are_named(options: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Deep(ElmanCell(D, H), **options)
