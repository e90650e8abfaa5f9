"""Both directions: two scans, whatever runs them, with the numbers and the errors of one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elman
from elman.directions import scan_both, side_by_side
from elman.errors import InputError, StateError
from elman.networks.bidirectional import Bidirectional

STEPS, BATCH, D, H = 5, 3, 2, 4
LENGTHS = [2, STEPS, 0]


def cells() -> tuple[nn.Module, nn.Module]:
    return elman.GRUCell(D, H).double(), elman.LSTMCell(D, H).double()


@pytest.mark.parametrize("backend", ["auto", "reference", "interpret"])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_it_is_two_scans(backend: str, lengths: list[int] | None) -> None:
    ahead, back = cells()
    xs = torch.randn(STEPS, BATCH, D, dtype=torch.float64, requires_grad=True)
    start = torch.randn(BATCH, H, dtype=torch.float64)
    found = scan_both(ahead, back, xs, (start, None), lengths=lengths, backend=backend)
    expected = (
        elman.scan(ahead, xs, start, lengths=lengths, backend="reference"),
        elman.scan(back, xs, lengths=lengths, reverse=True, backend="reference"),
    )
    torch.testing.assert_close(found, expected)
    inputs = [xs, *ahead.parameters(), *back.parameters()]
    ours, theirs = (torch.autograd.grad(h.sum() + g.square().sum(), inputs) for (h, _), (g, _) in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_the_same_random_numbers_as_two_scans() -> None:
    noisy = [elman.Noise(elman.ElmanCell(D, H), state=0.5) for _ in range(2)]
    xs = torch.randn(STEPS, BATCH, D)
    torch.manual_seed(0)
    (h, _), (g, _) = scan_both(noisy[0], noisy[1], xs)
    torch.manual_seed(0)
    torch.testing.assert_close(h, elman.scan(noisy[0], xs)[0])
    torch.testing.assert_close(g, elman.scan(noisy[1], xs, reverse=True)[0])


def wrong(at: int) -> Any:
    ahead, back = cells()
    state: list[Any] = [None, None]
    state[at] = torch.zeros(BATCH + 1, H).double()
    return scan_both(ahead, back, torch.zeros(STEPS, BATCH, D).double(), (state[0], state[1]))


@pytest.mark.parametrize("at", [0, 1])
def test_what_does_not_fit_either_of_them(at: int) -> None:
    with pytest.raises(StateError, match=r"every leaf of state must be \(B, …\) with B = 3"):
        wrong(at)


def test_what_fits_neither() -> None:
    ahead, back = cells()
    with pytest.raises(InputError, match="lengths must lie between 0 and T = 5"):
        scan_both(ahead, back, torch.zeros(STEPS, BATCH, D).double(), lengths=[9, 1, 1])


class Refusal(Exception):
    pass


def test_the_error_of_the_first_is_the_one_that_is_raised() -> None:
    """Also where both fail, and the second of them first."""
    order: list[str] = []

    def first(run: Any) -> None:
        with pytest.raises(AttributeError):
            run(None, [])  # there is no such call
        order.append("first")
        raise Refusal("of the first")

    def second(run: Any) -> None:
        order.append("second")
        raise Refusal("of the second")

    with pytest.raises(Refusal, match="of the first"):
        side_by_side(first, second)
    assert order == ["second", "first"]


def test_the_second_runs_where_the_first_needs_nobody_to_run_it() -> None:
    assert side_by_side(lambda run: 1, lambda run: (2, run)) == (1, (2, None))


def test_inside_a_compiled_model_of_any_size() -> None:
    """A second size in one process is no variable of the graph, though a second T or B is."""
    torch._dynamo.reset()
    for steps, batch, d, h in [(STEPS, BATCH, D, H), (3, 2, D, H), (3, 2, D + 1, H + 2), (6, 5, D + 3, H + 1)]:
        network = Bidirectional(*(elman.GRUCell(d, h) for _ in range(2)))
        xs = torch.randn(steps, batch, d)
        found: tuple[Tensor, Any] = torch.compile(network, backend="eager", fullgraph=True)(xs)
        torch.testing.assert_close(found, network(xs))
    torch._dynamo.reset()
