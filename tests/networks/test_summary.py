"""The summary network: one output, of each sequence's own last step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from elman.cells import ElmanCell
from elman.errors import CellError
from elman.networks.summary import Summary

STEPS, D, H = 6, 3, 5


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_a_sequence_of_no_steps_gives_the_readout_of_zero() -> None:
    network = Summary(ElmanCell(D, H), nn.Linear(H, 2)).double()
    found, _ = network(numbers(STEPS, 2, D), lengths=[0, 3])
    torch.testing.assert_close(found[0], network.readout.bias)


def test_a_cell_with_two_outputs() -> None:
    class Two(ElmanCell):
        def forward(self, x: Tensor, state: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
            h, state = super().forward(x, state)
            return (h, h), state

    with pytest.raises(CellError, match="the last output of Two, one tensor"):
        Summary(Two(D, H))(torch.zeros(2, 1, D))


def test_a_readout_of_another_width() -> None:
    with pytest.raises(CellError, match=r"ElmanCell gives 5 features, but the readout reads 3.* in_features=5"):
        Summary(ElmanCell(D, H), nn.Linear(3, 2))
