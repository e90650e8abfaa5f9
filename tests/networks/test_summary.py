"""The summary network: one output, of each sequence's own last step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from elman.cells import ElmanCell, LSTMCell
from elman.combinators import Stack
from elman.errors import CellError
from elman.networks.summary import Summary

STEPS, BATCH, D, H = 6, 4, 3, 5


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("readout", [False, True])
@pytest.mark.parametrize("cell", [ElmanCell(D, H), nn.LSTMCell(D, H), Stack([LSTMCell(D, 4), ElmanCell(4, H)])])
def test_each_sequence_is_summed_up_as_if_it_were_alone(cell: nn.Module, readout: bool) -> None:
    torch.manual_seed(1)
    network = Summary(cell, nn.Linear(H, 2) if readout else None).double()
    xs, lengths = numbers(STEPS, BATCH, D), [STEPS, 1, 4, 2]
    for b, n in enumerate(lengths):
        xs[n:, b] = torch.nan
    xs.requires_grad_()
    found, state = network(xs, lengths=torch.tensor(lengths))
    weights = numbers(*found.shape)
    (gradient,) = torch.autograd.grad((found * weights).sum(), xs, retain_graph=True)
    for b, n in enumerate(lengths):
        x = xs[:n, b : b + 1].detach().requires_grad_()
        alone, last = network(x)
        torch.testing.assert_close(found[b], alone[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradient[:n, b], torch.autograd.grad((alone * weights[b]).sum(), x)[0][:, 0])
        assert not gradient[n:, b].any()
        for whole, own in zip(*map(torch.utils._pytree.tree_leaves, (state, last)), strict=True):
            torch.testing.assert_close(whole[b], own[0], rtol=1e-10, atol=1e-10)


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
