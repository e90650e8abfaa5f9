"""The untied network: own weights at each step, for exactly so many steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elman
from elman.cells import ElmanCell, GRUCell, LSTMCell
from elman.errors import CellError, InputError, StateError
from elman.networks.untied import Untied

STEPS, BATCH, D, H = 4, 3, 2, 5


@pytest.mark.parametrize("kind", [ElmanCell, LSTMCell, nn.RNNCell])
@pytest.mark.parametrize("started", [False, True])
def test_with_the_same_weights_at_every_step_it_is_the_shared_network(kind: Any, started: bool) -> None:
    torch.manual_seed(3)
    shared = kind(D, H).double()
    cells = [kind(D, H).double() for _ in range(STEPS)]
    for cell in cells:
        cell.load_state_dict(shared.state_dict())
    xs = torch.randn(STEPS, BATCH, D, dtype=torch.float64)
    with torch.no_grad():
        state = elman.scan(shared, xs)[1] if started else None
    untied = Untied(cells)
    found, wanted = untied(xs, state), elman.scan(shared, xs, state)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(found[0].sum(), [*untied.parameters()])
    each = len(gradients) // STEPS
    summed = [sum(gradients[k::each]) for k in range(each)]  # what is shared sums over the steps
    torch.testing.assert_close(summed, [*torch.autograd.grad(wanted[0].sum(), [*shared.parameters()])])


def test_each_step_has_weights_of_its_own() -> None:
    cells = [ElmanCell(D, H) for _ in range(STEPS)]
    xs, h = torch.randn(STEPS, BATCH, D), torch.zeros(BATCH, H)
    ys, last = Untied(cells)(xs)
    for cell, x, y in zip(cells, xs, ys, strict=True):
        h = torch.tanh(x @ cell.weight_ih.T + cell.bias_ih + h @ cell.weight_hh.T + cell.bias_hh)
        torch.testing.assert_close(y, h)
    torch.testing.assert_close(last, h)


def test_constants_go_to_every_step() -> None:
    class Shifted(GRUCell):
        def forward(self, x: Tensor, state: Tensor, constants: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x + constants, state)

    network, xs = Untied(Shifted(D, H) for _ in range(STEPS)), torch.randn(STEPS, BATCH, D)
    shift = torch.randn(BATCH, D)
    found = network(xs, constants=shift)
    torch.testing.assert_close(found, network(xs + shift, constants=torch.zeros(BATCH, D)))


@pytest.mark.parametrize("steps", [1, STEPS - 1, STEPS + 1])
def test_a_length_that_was_never_trained_is_refused(steps: int) -> None:
    network = Untied(ElmanCell(D, H) for _ in range(STEPS))
    with pytest.raises(InputError, match=f"weights for {STEPS} steps.* sequence of {steps}"):
        network(torch.zeros(steps, BATCH, D))


def test_cells_that_are_no_row_of_steps() -> None:
    with pytest.raises(CellError, match="got none"):
        Untied([])
    with pytest.raises(CellError, match="given twice"):
        Untied([ElmanCell(D, H)] * 2)
    for cells, given in ((ElmanCell(D, H), "ElmanCell"), ([ElmanCell], "type"), (3, "int")):
        with pytest.raises(CellError, match=f"a list of cells, one for every step; got {given}"):
            Untied(cells)


def test_cells_whose_states_are_not_alike() -> None:
    with pytest.raises(StateError, match=r"starts from the state \(3, 5\) float32, but was given \(3, 4\)"):
        Untied([ElmanCell(D, 4), ElmanCell(D, 5)])(torch.zeros(2, BATCH, D))


def test_an_input_that_the_sequences_share() -> None:
    class Both(ElmanCell):
        def forward(self, x: tuple[Tensor, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x[0] + x[1], state)

    network = Untied(Both(D, H) for _ in range(STEPS))
    shared, own = torch.randn(STEPS, 1, D), torch.randn(STEPS, BATCH, D)
    torch.testing.assert_close(network((shared, own)), network((shared.expand_as(own), own)))
