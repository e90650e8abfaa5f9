"""Output recurrence: against the formula by hand, free and forced, as a distribution, and its mistakes."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elman
from comparing import compiled
from elman.cells import ElmanCell, GRUCell, LSTMCell
from elman.cells.dense import DenseCell
from elman.combinators.feedback import Feedback
from elman.errors import CellError, InputError, OptionError
from elman.networks.distribution import log_prob, sample
from elman.networks.jordan import jordan

STEPS, BATCH, D, H, O = 7, 3, 2, 5, 4


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(4)


def by_formula(cell: Feedback, xs: Tensor, targets: Tensor | None, feed: Any) -> Tensor:
    """h(t) = tanh(b + W p(t-1) + U x(t)), o(t) = c + V h(t), written without elman."""
    weights, b = cell.cell.weight_ih, cell.cell.bias_ih
    U, W = weights[:, :D], weights[:, D:]
    p, outputs = torch.zeros(BATCH, O, dtype=torch.float64), []
    for t, x in enumerate(xs):
        h = torch.tanh(b + p @ W.T + x @ U.T)
        outputs.append(cell.readout.bias + h @ cell.readout.weight.T)
        p = feed(outputs[-1]) if targets is None else targets[t]
    return torch.stack(outputs)


@pytest.mark.parametrize("backend", ["reference", "interpret"])
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize(("feed", "function"), [(None, lambda o: o), ("softmax", lambda o: torch.softmax(o, -1))])
def test_the_jordan_network_is_its_formula(backend: str, forced: bool, feed: str | None, function: Any) -> None:
    cell = jordan(D, H, O, feed=feed).double()
    xs, targets = numbers(STEPS, BATCH, D).requires_grad_(), numbers(STEPS, BATCH, O).requires_grad_()
    sources = [xs, *cell.parameters()] + [targets] * forced
    wanted = by_formula(cell, xs, targets if forced else None, function)
    found, _ = elman.scan(cell, (xs, targets) if forced else xs, backend=backend)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    weights = numbers(*wanted.shape)
    for got, expected in zip(
        torch.autograd.grad((found * weights).sum(), sources),
        torch.autograd.grad((wanted * weights).sum(), sources),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("memory", [False, True])
def test_only_an_own_output_or_a_memory_makes_a_loop(memory: bool) -> None:
    inner = ElmanCell(D + O, H) if memory else DenseCell(D + O, H)
    cell = Feedback(inner, nn.Linear(H, O)).double()
    state = cell.initial_state(BATCH, device=torch.device("cpu"), dtype=torch.float64)
    xs, targets = numbers(STEPS, BATCH, D), numbers(STEPS, BATCH, O)
    free = compiled(cell, {"xs": xs, "state": state, "constants": None})
    forced = compiled(cell, {"xs": (xs, targets), "state": state, "constants": None})
    assert len(free.program.loops) == 1
    assert len(forced.program.loops) == int(memory)


def test_forced_by_its_own_outputs_it_does_what_it_does_free() -> None:
    cell = Feedback(GRUCell(D + O, H), nn.Linear(H, O)).double()
    xs = numbers(STEPS, BATCH, D)
    free, (_, last) = elman.scan(cell, xs)
    forced, (_, given) = elman.scan(cell, (xs, free))
    torch.testing.assert_close(forced, free, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(given, last, rtol=1e-12, atol=1e-12)


def test_runs_on_freely_from_a_forced_beginning() -> None:
    """The state after a forced prefix holds its last target, which is what the first free step reads."""
    cell = jordan(D, H, O).double()
    xs, targets = numbers(STEPS, BATCH, D), numbers(STEPS, BATCH, O)
    _, state = elman.scan(cell, (xs[:3], targets[:3]))
    found, _ = elman.scan(cell, xs[3:], state)
    first, _ = elman.scan(cell, (xs[:4], targets[:4]))
    torch.testing.assert_close(found[0], first[3], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("feed", ["argmax", "sample"])
def test_symbols_are_fed_as_one_hot_or_embedded(feed: str) -> None:
    embedding = nn.Embedding(O, 3)
    xs = numbers(STEPS, BATCH, D)
    for embed, width in ((None, O), (embedding, 3)):
        cell = Feedback(DenseCell(D + width, H), nn.Linear(H, O), feed=feed, embed=embed).double()
        assert (cell.input_size, cell.output_size, cell.width) == (D, O, width)
        logits, _, recording = elman.scan(cell, xs, record=True)
        symbols = recording.values["choice"]
        if feed == "argmax":
            assert torch.equal(symbols, logits.argmax(-1))
        table = torch.eye(O, dtype=torch.float64) if embed is None else embed.weight
        torch.testing.assert_close(recording.states[1], table[symbols], rtol=0, atol=0)
        forced, _ = elman.scan(cell, (xs, symbols))
        torch.testing.assert_close(forced, logits, rtol=1e-12, atol=1e-12)


def test_a_drawn_symbol_has_the_probability_of_its_logit() -> None:
    blank = nn.Embedding.from_pretrained(torch.zeros(O, 1))  # so that both steps have the same logits
    cell = Feedback(DenseCell(1, H), nn.Linear(H, O), feed="sample", embed=blank).double()
    nn.init.normal_(cell.readout.bias)
    draws = 40_000
    logits, _, recording = elman.scan(cell, numbers(2, draws, 0), record=True)
    found = torch.bincount(recording.values["choice"].flatten(), minlength=O) / (2 * draws)
    p = torch.softmax(logits[0, 0], -1)
    assert ((found - p).abs() < 4 * (p * (1 - p) / (2 * draws)).sqrt()).all()


@pytest.mark.parametrize("feed", [None, "softmax"])
@pytest.mark.parametrize("backend", ["reference", "interpret"])
def test_scheduled_sampling_tosses_a_coin_for_each_token(backend: str, feed: str | None) -> None:
    cell = jordan(D, H, O, feed=feed, sampling=0.25).double().train()
    steps, batch = 30, 40
    xs, targets = numbers(steps, batch, D), numbers(steps, batch, O)
    _, _, recording = elman.scan(cell, (xs, targets), record=True, backend=backend)
    fed, own = recording.states[1], recording.values["choice"]
    is_own = (fed == own).all(-1)
    assert torch.equal(~is_own, (fed == targets).all(-1))  # all of a token, from one or from the other
    share = is_own.double()
    assert abs(share.mean() - 0.25) < 4 * (0.25 * 0.75 / (steps * batch)) ** 0.5
    assert (share.mean(0) % 1 != 0).all()  # neither one coin for a sequence
    assert (share.mean(1) % 1 != 0).all()  # nor one for a step


def test_the_sampling_schedule_goes_from_forced_to_free_without_tracing_again() -> None:
    cell = jordan(D, H, O, sampling=0.0).double().train()
    xs, targets = numbers(STEPS, BATCH, D), numbers(STEPS, BATCH, O)
    given = {
        "xs": (xs, targets),
        "state": cell.initial_state(BATCH, device=torch.device("cpu"), dtype=torch.float64),
        "constants": None,
    }
    forced, free = elman.scan(cell.eval(), (xs, targets))[0], elman.scan(cell, xs)[0]
    cell.train()
    program = compiled(cell, given)
    torch.testing.assert_close(elman.scan(cell, (xs, targets))[0], forced, rtol=1e-12, atol=1e-12)
    cell.sampling.fill_(1.0)
    torch.testing.assert_close(elman.scan(cell, (xs, targets))[0], free, rtol=1e-12, atol=1e-12)
    assert compiled(cell, given) is program
    assert "sampling" in cell.state_dict()


@pytest.mark.parametrize("inner", [nn.RNNCell, nn.GRUCell, nn.LSTMCell, ElmanCell, LSTMCell])
def test_any_cell_inside(inner: Any) -> None:
    cell = Feedback(inner(D + H, H))
    assert (cell.input_size, cell.output_size) == (D, H)
    o, (_, last) = elman.scan(cell, torch.randn(STEPS, BATCH, D))
    assert torch.equal(o[-1], last)


def test_constants_reach_the_cell_inside() -> None:
    class Shifted(DenseCell):
        def forward(self, x: Tensor, state: tuple[()], constants: Tensor) -> tuple[Tensor, tuple[()]]:
            return super().forward(x, state)[0] + constants, state

    cell = Feedback(Shifted(D + H, H))
    xs, shift = torch.randn(1, BATCH, D), torch.randn(BATCH, H)
    shifted, plain = (elman.scan(cell, xs, constants=c)[0] for c in (shift, torch.zeros(BATCH, H)))
    torch.testing.assert_close(shifted[0], plain[0] + shift)


def test_built_from_a_spec_it_knows_what_the_cell_inside_reads() -> None:
    cell = Feedback.build(D, lambda n: ElmanCell(n, H), outputs=O, feed="argmax")
    assert (cell.input_size, cell.output_size, cell.cell.input_size) == (D, O, D + O)
    cell = Feedback.build(D, lambda n: ElmanCell(n, H))
    assert (cell.input_size, cell.output_size, cell.cell.input_size) == (D, H, D + H)


@pytest.mark.parametrize(("features", "edge"), [(0, True), (D, True), (D, False)])
@pytest.mark.parametrize("memory", [False, True])
def test_probabilities_of_all_sequences_sum_to_one(features: int, edge: bool, memory: bool) -> None:
    """With the edge y(t-1) → h(t) any joint distribution; without it the symbols are independent, given x."""
    symbols, steps = 3, 4
    kind = ElmanCell if memory else DenseCell
    inner = kind(features + (symbols if edge else 0), H)
    cell = Feedback(inner, nn.Linear(H, symbols)) if edge else Logits(inner, symbols)
    cell = cell.double()
    for parameter in cell.parameters():
        nn.init.normal_(parameter)
    ys = torch.tensor(list(product(range(symbols), repeat=steps))).T
    xs = numbers(steps, 1, features).expand(-1, ys.shape[1], -1)
    p = log_prob(cell, xs, ys).exp()
    torch.testing.assert_close(p.sum(), torch.ones((), dtype=torch.float64), rtol=1e-12, atol=1e-12)
    joint = p.view(3, 3, -1).sum(-1)  # of y(1), y(2)
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    assert torch.allclose(joint, apart, rtol=1e-10) != edge


class Logits(nn.Module):
    """A cell with a readout, and nothing fed back."""

    def __init__(self, cell: nn.Module, symbols: int) -> None:
        super().__init__()
        self.cell, self.readout = cell, nn.Linear(H, symbols)
        self.initial_state = cell.initial_state

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.cell(x, state)
        return self.readout(y), state


@pytest.mark.parametrize("edge", [False, True])
def test_samples_come_as_often_as_their_probability_says(edge: bool) -> None:
    symbols, steps, draws = 2, 3, 40_000
    inner = DenseCell(D + (symbols if edge else 0), H)
    cell = Feedback(inner, nn.Linear(H, symbols), feed="sample") if edge else Logits(inner, symbols)
    for parameter in cell.double().parameters():
        nn.init.normal_(parameter)
    x = numbers(steps, 1, D)
    found = sample(cell, x.expand(-1, draws, -1))
    every = torch.tensor(list(product(range(symbols), repeat=steps))).T
    p = log_prob(cell, x.expand(-1, every.shape[1], -1), every).exp()
    counts = torch.bincount(found[0] * 4 + found[1] * 2 + found[2], minlength=8) / draws
    assert ((counts - p).abs() < 4.5 * (p * (1 - p) / draws).sqrt()).all()


def test_log_prob_of_sequences_of_different_lengths() -> None:
    cell = jordan(D, H, O).double()
    xs, ys, lengths = numbers(STEPS, BATCH, D), torch.randint(O, (STEPS, BATCH)), torch.tensor([STEPS, 0, 4])
    alone = [log_prob(cell, xs[:n, i : i + 1], ys[:n, i : i + 1]) for i, n in enumerate(lengths.tolist()) if n]
    ys[4:, 2] = 10**6
    found = log_prob(cell, xs, ys, lengths=lengths)
    torch.testing.assert_close(found[[0, 2]], torch.cat(alone), rtol=1e-12, atol=1e-12)
    assert found[1] == 0


MISTAKES = {
    "no cell": (lambda: Feedback(ElmanCell), CellError, "class ElmanCell"),
    "unknown feed": (lambda: jordan(D, H, O, feed="sofmax"), OptionError, "did you mean 'softmax'"),
    "no probability": (lambda: jordan(D, H, O, sampling=1.5), OptionError, "between 0 and 1, got 1.5"),
    "too narrow": (lambda: Feedback(DenseCell(3, H), nn.Linear(H, O)), CellError, "3 features, fewer than the 4"),
    "width unknown": (lambda: Feedback(DenseCell(9, H), nn.Tanh()), CellError, "how many features Tanh gives"),
    "no width": (lambda: Feedback(DenseCell(9, H), width=0), OptionError, "width must be a positive integer, got 0"),
}


@pytest.mark.parametrize(("make", "error", "says"), MISTAKES.values(), ids=MISTAKES)
def test_what_cannot_be_built(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize(
    ("xs", "says"),
    [
        (torch.zeros(2, BATCH, D + 1), "x has 3 features, but DenseCell reads 6: 2 of x and 4"),
        ((torch.zeros(2, BATCH, D), torch.zeros(2, BATCH, O), torch.zeros(2, BATCH, 1)), "got tuple"),
        (torch.zeros(2, BATCH, D, 1), r"got \(3, 2, 1\)"),
        (
            (torch.zeros(2, BATCH, D), torch.zeros(2, BATCH, O + 1)),
            r"the target \(3, 5\) would be fed as .* 4 features",
        ),
    ],
    ids=["features", "three", "dimensions", "target"],
)
def test_what_cannot_be_read(xs: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        elman.scan(jordan(D, H, O), xs)


def test_sampling_needs_a_feedback_that_feeds_what_it_draws() -> None:
    with pytest.raises(OptionError, match="feed='sample'"):
        sample(jordan(D, H, O, feed="argmax"), torch.zeros(2, 1, D))
    with pytest.raises(InputError, match="must be symbols"):
        log_prob(jordan(D, H, O), torch.zeros(2, 1, D), torch.zeros(2, 1, O))
