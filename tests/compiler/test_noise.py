"""Random numbers inside a step: new at every step and row, the same again in backward and under recomputation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elman
from elman.compiler import cache
from elman.errors import UnsupportedError


class Noisy(nn.Module):
    """h = tanh(U x + W (h ⊙ noise)), y = noise."""

    def __init__(self, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.U, self.W, self.noise = nn.Linear(3, 4).double(), nn.Linear(4, 4).double(), noise

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        noise = self.noise(torch.ones_like(h))
        h = torch.tanh(self.U(x) + self.W(h * noise))
        return noise, h


class Replayed(Noisy):
    """The same with the noise given as an input."""

    def forward(self, x: Any, h: Tensor) -> tuple[Tensor, Tensor]:
        x, noise = x
        h = torch.tanh(self.U(x) + self.W(h * noise))
        return noise, h


NOISES: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda a: F.dropout(a, 0.3),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "rand": lambda a: torch.rand(a.shape, dtype=a.dtype),
    "randn": lambda a: torch.randn(a.shape[0], 1, dtype=a.dtype).expand_as(a),
    "randint": lambda a: torch.randint(3, a.shape).to(a.dtype),
    "randint_like": lambda a: torch.randint_like(a, 1, 5),
    "zoneout": lambda a: torch.where(torch.rand_like(a) < 0.2, a, 0.5 * a),
    "bernoulli with a number": lambda a: torch.zeros_like(a).bernoulli_(0.4),
    "bernoulli with probabilities": lambda a: torch.bernoulli(torch.sigmoid(a)),
    "uniform_": lambda a: torch.empty_like(a).uniform_(-1, 2),
    "normal_": lambda a: torch.empty_like(a).normal_(1.0, 0.5),
    "exponential_": lambda a: torch.empty_like(a).exponential_(2.0),
    "alpha_dropout": lambda a: F.alpha_dropout(a, 0.3, training=True),
    "dropout of a reshape": lambda a: F.dropout(a.view(-1, 2, 2), 0.5).flatten(1),
}
STEPS, BATCH = 6, 3


@pytest.fixture(autouse=True)
def _warns_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elman.unfold, "_warned", set())


def feed() -> tuple[Tensor, Tensor]:
    return (
        torch.randn(STEPS, BATCH, 3, dtype=torch.float64, requires_grad=True),
        torch.randn(BATCH, 4, dtype=torch.float64, requires_grad=True),
    )


@pytest.mark.parametrize(
    "options", [{}, {"remat": 2}, {"reverse": True}, {"lengths": [6, 2, 4]}, {"remat": 4, "reverse": True}]
)
@pytest.mark.parametrize("name", NOISES)
def test_gradients_are_those_of_the_noise_that_was_drawn(name: str, options: dict[str, Any]) -> None:
    cell = Noisy(NOISES[name])
    xs, state = feed()
    noise, final = elman.scan(cell, xs, state, backend="interpret", **options)
    sources = [xs, state, *cell.parameters()]
    found = torch.autograd.grad(final.square().sum(), sources)

    replay = Replayed(NOISES[name])
    replay.load_state_dict(cell.state_dict())
    again = [xs, state, *replay.parameters()]
    given = {key: value for key, value in options.items() if key != "remat"}
    _, expected = elman.scan(replay, (xs, noise.detach()), state, backend="reference", **given)
    torch.testing.assert_close(final, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), again))


@pytest.mark.parametrize("name", NOISES)
def test_noise_is_new_at_every_step_row_and_call(name: str) -> None:
    cell = Noisy(NOISES[name])
    xs, state = torch.randn(64, 16, 3, dtype=torch.float64), torch.zeros(16, 4, dtype=torch.float64)
    noise, _ = elman.scan(cell, xs, state, backend="interpret")
    other, _ = elman.scan(cell, xs, state, backend="interpret")
    assert not torch.equal(noise, other)
    assert not torch.equal(noise[0], noise[1])
    assert len({tuple(step.flatten().tolist()) for step in noise}) == 64
    assert len({tuple(row.flatten().tolist()) for row in noise.transpose(0, 1)}) == 16


@pytest.mark.parametrize("name", NOISES)
def test_noise_has_the_same_distribution_as_in_the_loop(name: str) -> None:
    cell = Noisy(NOISES[name])
    xs, state = torch.randn(200, 50, 3, dtype=torch.float64), torch.zeros(50, 4, dtype=torch.float64)
    with torch.no_grad():
        found, _ = elman.scan(cell, xs, state, backend="interpret")
        expected, _ = elman.scan(cell, xs, state, backend="reference")
    # 40,000 draws each: five standard errors of the difference of two means, and of two deviations (roughly).
    error = 5 * expected.std() * (2 / 40_000) ** 0.5
    assert abs(found.mean() - expected.mean()) < error + 1e-9
    assert abs(found.std() - expected.std()) < 3 * error + 1e-9
    torch.testing.assert_close(found.min(), expected.min(), atol=0.7, rtol=0)


def test_the_same_seed_draws_the_same() -> None:
    cell = Noisy(NOISES["dropout"])
    xs, state = feed()
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        runs.append(elman.scan(cell, xs, state, backend="interpret"))
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


def test_recomputation_does_not_disturb_the_generator() -> None:
    cell = Noisy(NOISES["dropout"])
    xs, state = feed()
    after = []
    for remat in (None, 2):
        torch.manual_seed(7)
        elman.scan(cell, xs, state, backend="interpret", remat=remat)[1].sum().backward()
        after.append(torch.rand(3))
    torch.testing.assert_close(after[0], after[1], rtol=0, atol=0)


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.U, self.dropout = nn.Linear(3, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.dropout(self.U(x)) + h)
        return h, h


def test_evaluation_draws_nothing() -> None:
    cell = WithDropout().eval()
    xs, state = torch.randn(5, 2, 3), torch.zeros(2, 4)
    before = torch.get_rng_state()
    first = elman.scan(cell, xs, state, backend="interpret")
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(first, elman.scan(cell, xs, state, backend="reference"))
    cell.train()
    assert not torch.equal(first[0], elman.scan(cell, xs, state, backend="interpret")[0])


def test_noise_is_not_traced_anew() -> None:
    cache.forget()
    cell = WithDropout()
    for steps in (3, 5, 5):
        elman.scan(cell, torch.randn(steps, 2, 3), torch.zeros(2, 4), backend="interpret")
    assert len(cache._programs) == 1


def test_second_derivatives_see_the_same_draw() -> None:
    cell = Noisy(NOISES["dropout"])
    xs, state = feed()

    def call(xs: Tensor, state: Tensor) -> Tensor:
        torch.manual_seed(3)
        return elman.scan(cell, xs, state, backend="interpret")[1]

    assert torch.autograd.gradcheck(call, (xs, state))
    assert torch.autograd.gradgradcheck(call, (xs, state))


SHARED: dict[str, Callable[[Tensor], Tensor]] = {
    "one number for all rows": lambda a: torch.rand((), dtype=a.dtype) * a,
    "one vector for all rows": lambda a: torch.rand(4, dtype=a.dtype) * a,
    "categories that the step computes": lambda a: torch.multinomial(torch.softmax(a, -1), 4).to(a.dtype),
}


@pytest.mark.parametrize("name", SHARED)
def test_draws_that_cannot_be_made_beforehand_are_refused(name: str) -> None:
    cell = Noisy(SHARED[name])
    xs, state = feed()
    with pytest.raises(UnsupportedError, match=r"draws.*test_noise.py:\d+"):
        elman.scan(cell, xs, state, backend="interpret")
    with pytest.warns(elman.errors.UnfoldWarning, match="draws"):
        ys, _ = elman.scan(cell, xs, state)
    assert ys.shape == (STEPS, BATCH, 4)


def test_a_generator_of_the_users_own() -> None:
    """A draw from the user's own generator comes from it, or is refused; never from the global one."""
    generator = torch.Generator()

    class Own(Noisy):
        def __init__(self) -> None:
            super().__init__(torch.rand_like)
            self.generator = generator

        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            noise = torch.rand(h.shape, generator=self.generator, dtype=h.dtype)
            return noise, h

    cell = Own()
    xs, state = feed()
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", elman.errors.UnfoldWarning)
        generator.manual_seed(1)
        first, _ = elman.scan(cell, xs, state)
        generator.manual_seed(1)
        second, _ = elman.scan(cell, xs, state)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert torch.equal(before, torch.get_rng_state())
