"""The fixed window: where it begins and ends, what it hands on, and its mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elman
from contracts.networks import Mine
from elman.cells import DenseCell, ElmanCell, GRUCell, LSTMCell
from elman.errors import CellError, ElmanError, InputError, OptionError, StateError
from elman.networks.window import Window, windows

STEPS, BATCH, D, H = 5, 2, 3, 4


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape)


def test_windows_are_side_by_side_in_the_order_of_time() -> None:
    xs = torch.arange(1.0, 5.0).view(4, 1, 1)
    assert windows(xs, 1, 2)[:, 0].tolist() == [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 0], [3, 4, 0, 0]]
    assert windows(xs, 0, 1, [3])[:, 0].tolist() == [[1, 2], [2, 3], [3, 0], [0, 0]]
    assert windows(xs, 1, 0, before=torch.full((1, 1, 1), 9.0))[:2, 0].tolist() == [[9, 1], [1, 2]]
    assert windows(xs, 5, 0).shape == (4, 1, 6)


def test_a_window_of_one_is_the_cell() -> None:
    cell, xs = LSTMCell(D, H), torch.randn(STEPS, BATCH, D)
    (ys, (state, before)), expected = Window(cell, 0, 0)(xs), elman.scan(cell, xs)
    torch.testing.assert_close((ys, state), expected, rtol=0, atol=0)
    assert before.shape == (BATCH, 0, D)


def test_the_state_holds_the_last_inputs_of_each_sequence() -> None:
    xs = torch.arange(1.0, 5.0).view(4, 1, 1).expand(4, 3, 1)
    network = Window(nn.Linear(3, H), 2, 0)
    (_, (none, last)), (_, (_, ended)) = network(xs), network(xs, lengths=[4, 1, 0])
    assert none == ()
    assert last[..., 0].tolist() == [[3, 4]] * 3
    assert ended[..., 0].tolist() == [[3, 4], [0, 1], [0, 0]]


@pytest.mark.parametrize("state", [None, (None, None)])
def test_a_state_that_is_left_out_is_the_first_one(state: Any) -> None:
    network, xs = Window(GRUCell(2 * D, H), 1, 0), torch.randn(STEPS, BATCH, D)
    expected = network(xs, (zeros(BATCH, H), zeros(BATCH, 1, D)))
    torch.testing.assert_close(network(xs, state), expected, rtol=0, atol=0)


XS = zeros(STEPS, BATCH, D)
MISTAKES: dict[str, tuple[Any, type[ElmanError], str]] = {
    "negative": (lambda: Window(GRUCell(D, H), -1, 0), OptionError, "left must be .* 0 or more; got -1"),
    "no number": (lambda: Window(GRUCell(D, H), 0, 1.0), OptionError, r"right must be a number of steps.* got 1\.0"),
    "negative windows": (lambda: windows(XS, 0, -1), OptionError, "windows: right must be a number of steps"),
    "cell": (lambda: Window(GRUCell(4, H), 1, 1), CellError, "4 features, which are not 3.* input_size = 3 · features"),
    "linear": (lambda: Window(nn.Linear(4, H), 1, 1), CellError, "Linear reads 4.* not 3.* in_features = 3 · features"),
    "sequential": (lambda: Window(nn.Sequential(nn.Linear(4, H)), 1, 1), CellError, "Sequential reads 4 features"),
    "features": (
        lambda: Window(nn.Linear(12, H), 1, 1)(XS),
        InputError,
        "xs have 3 features, 3 of them side by side 9, but Linear reads 12.* in_features=9",
    ),
    "features of a cell": (lambda: Window(DenseCell(12, H), 1, 1)(XS), InputError, "DenseCell reads 12.* input_size=9"),
    "no features": (lambda: windows(zeros(2, 3), 1, 1), InputError, r"one tensor \(T, B, D\); got \(2, 3\)"),
    "no tensor": (lambda: Window(nn.Linear(D, H), 0, 0)((XS, XS)), InputError, "one tensor .* got tuple"),
    "class": (lambda: Window(GRUCell, 1, 1), CellError, "a cell or a module; got the class GRUCell"),
    "layer": (lambda: Window(nn.GRU(9, H), 1, 1)(XS), CellError, "GRU is a layer.* Use GRUCell"),
    "our layer": (lambda: Window(elman.LSTM(9, H), 1, 1)(XS), CellError, "LSTM is a layer.* Use LSTMCell"),
    "no sequence": (
        lambda: Window(nn.Flatten(), 1, 1)(XS),
        CellError,
        r"Flatten has no initial_state.* windows \(5, 2, 9\) at once.* \(T, B, …\); got \(5, 18\)",
    ),
    "lengths": (lambda: Window(nn.Linear(9, H), 1, 1)(XS, lengths=[9, 2]), InputError, "0 and T = 5; got 2 to 9"),
    "lengths of others": (lambda: Window(nn.Linear(9, H), 1, 1)(XS, lengths=[2]), InputError, "must be 2 integers"),
    "state of the cell": (
        lambda: Window(ElmanCell(9, H), 1, 1)(XS, zeros(BATCH, H)),
        StateError,
        r"the pair of the cell's state and the last inputs \(2, 1, 3\).* got \(2, 4\) in place of the pair",
    ),
    "states of the cell": (
        lambda: Window(LSTMCell(9, H), 1, 1)(XS, (zeros(BATCH, H), zeros(BATCH, H))),
        StateError,
        r"last inputs \(2, 1, 3\), .* got \(2, 4\) as these",
    ),
    "state for a module": (
        lambda: Window(nn.Linear(9, H), 1, 1)(XS, (zeros(BATCH, H), None)),
        CellError,
        "Linear.* forward",
    ),
    "constants for a module": (
        lambda: Window(nn.Linear(9, H), 1, 1)(XS, constants=XS[0]),
        CellError,
        "Linear is no step",
    ),
}


@pytest.mark.parametrize(("make", "error", "says"), MISTAKES.values(), ids=MISTAKES)
def test_what_does_not_fit(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


def test_a_cell_that_does_not_say_where_it_starts() -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            return x.sum(-1, keepdim=True) + state, state + 1

    with pytest.raises(CellError, match=r"Silent has no initial_state.* and no state was given"):
        Window(Silent(), 1, 1)(XS)
    _, (state, _) = Window(Silent(), 1, 1)(XS, (zeros(BATCH, 1), None))
    assert state.tolist() == [[STEPS]] * BATCH


def test_a_user_s_own_cell_need_not_say_its_widths() -> None:
    ys, (state, _) = Window(Mine(), 0, 0)(XS)
    torch.testing.assert_close(ys[-1], state["h"])
