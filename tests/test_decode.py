"""Drawing and scoring: distributions as asked for, draws that follow them, samples that are independent."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from elman.decode import Sampler, generate, score
from elman.errors import InputError, OptionError, UsageError

V = 5


class TinyModel:
    """A step with a state that depends on all ids before: h ← tanh(W h + E id), logits = U h."""

    def __init__(self, seed: int = 0, vocab_size: int = V) -> None:
        own = torch.Generator().manual_seed(seed)
        self.w, self.e, self.u = (
            2 * torch.randn(shape, generator=own, dtype=torch.float64)
            for shape in [(3, 3), (vocab_size, 3), (3, vocab_size)]
        )
        self.inputs: list[list[int]] = []

    def __call__(self, ids: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        self.inputs.append(ids.tolist())
        h = torch.zeros(len(ids), 3, dtype=torch.float64) if state is None else state
        h = torch.tanh(h @ self.w + self.e[ids])
        return h @ self.u, h


def log_of(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*args, **kwargs) -> list[list[int]]:
    """The samples of generate, one list each."""
    steps = list(generate(*args, **kwargs))
    return torch.stack(steps, 1).tolist() if steps else []


# distributions


@pytest.mark.parametrize("temperature", [0.25, 0.5, 1.0, 3, 1e3])
def test_temperature_divides_the_logits(temperature):
    logits = torch.randn(4, 7, generator=seeded(0))
    expected = torch.softmax(logits.double() / temperature, -1)
    torch.testing.assert_close(Sampler(temperature).probabilities(logits), expected)


@pytest.mark.parametrize("sampler", [Sampler(0), Sampler(0.0), Sampler(greedy=True), Sampler(2.0, 3, 0.5, greedy=True)])
def test_greedy_takes_the_most_probable_and_the_first_of_equals(sampler):
    logits = torch.tensor([[0.0, 3, 1], [2, -1, 2], [-math.inf, -5, -5]])
    assert sampler(logits).tolist() == [1, 0, 1]
    assert sampler.probabilities(logits).tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-9])
def test_no_temperature_overflows(temperature):
    logits = torch.tensor([[1e30, -1e30, 0.0], [3.0, 2.0, -math.inf]])
    assert Sampler(temperature).probabilities(logits).tolist() == [[1, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize(
    ("options", "probabilities", "expected"),
    [
        ({"top_k": 1}, (0.125, 0.5, 0.25, 0.125), (0, 1, 0, 0)),
        ({"top_k": 2}, (0.125, 0.5, 0.25, 0.125), (0, 2 / 3, 1 / 3, 0)),
        ({"top_k": 3}, (0.125, 0.5, 0.25, 0.125), (1 / 7, 4 / 7, 2 / 7, 0)),  # ties: the lower id
        ({"top_k": 2}, (0.25, 0.25, 0.25, 0.25), (0.5, 0.5, 0, 0)),
        ({"top_k": 4}, (0.125, 0.5, 0.25, 0.125), (0.125, 0.5, 0.25, 0.125)),
        ({"top_k": 99}, (0.125, 0.5, 0.25, 0.125), (0.125, 0.5, 0.25, 0.125)),
        ({"top_p": 1}, (0.125, 0.5, 0.25, 0.125), (0.125, 0.5, 0.25, 0.125)),
        ({"top_p": 0.5}, (0.125, 0.5, 0.25, 0.125), (0, 1, 0, 0)),  # reached exactly
        ({"top_p": 0.51}, (0.125, 0.5, 0.25, 0.125), (0, 2 / 3, 1 / 3, 0)),
        ({"top_p": 0.75}, (0.125, 0.5, 0.25, 0.125), (0, 2 / 3, 1 / 3, 0)),
        ({"top_p": 0.8}, (0.125, 0.5, 0.25, 0.125), (1 / 7, 4 / 7, 2 / 7, 0)),
        ({"top_p": 1e-300}, (0.125, 0.5, 0.25, 0.125), (0, 1, 0, 0)),  # never nothing
        ({"top_p": 0.5}, (0.25, 0.25, 0.25, 0.25), (0.5, 0.5, 0, 0)),
        ({"top_p": 1e-9}, (0.25, 0.25, 0.25, 0.25), (1, 0, 0, 0)),
        ({"top_p": 0.99}, (0.0, 1.0, 0.0, 0.0), (0, 1, 0, 0)),
        # top_k first: of 4/7 2/7 1/7 the first two reach 0.8, of the whole they would not
        ({"top_k": 3, "top_p": 0.8}, (0.125, 0.5, 0.25, 0.125), (0, 2 / 3, 1 / 3, 0)),
        ({"temperature": 0.5, "top_k": 2}, (0.125, 0.5, 0.25, 0.125), (0, 0.8, 0.2, 0)),
    ],
)
def test_what_top_k_and_top_p_keep(options, probabilities, expected):
    logits = log_of(*probabilities)
    given = Sampler(**options).probabilities(logits)
    torch.testing.assert_close(given, torch.tensor([expected], dtype=torch.float64), rtol=1e-12, atol=0)
    allowed = {id for id, p in enumerate(expected) if p}
    ids = Sampler(**options)(logits.expand(300, -1), seeded(0))
    assert set(ids.tolist()) <= allowed


@settings(deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(-4, 4), min_size=6, max_size=6), min_size=1, max_size=4),
    top_k=st.none() | st.integers(1, 8),
    top_p=st.none() | st.floats(1e-6, 1),
    temperature=st.floats(0.1, 5),
)
def test_kept_symbols_are_the_most_probable_and_no_more_than_needed(rows, top_k, top_p, temperature):
    logits = torch.tensor(rows, dtype=torch.float64)
    whole = Sampler(temperature).probabilities(logits)
    cut = Sampler(temperature, top_k, top_p).probabilities(logits)
    torch.testing.assert_close(cut.sum(-1), torch.ones(len(rows), dtype=torch.float64))
    for before, after in zip(whole, cut, strict=True):
        kept = after > 0
        assert 1 <= kept.sum() <= (top_k or 6)
        assert before[kept].min() >= before[~kept].max() if (~kept).any() else True
        torch.testing.assert_close(after[kept], before[kept] / before[kept].sum())
        if top_p is not None and top_k is None:
            assert before[kept].sum() >= top_p - 1e-12
            assert before[kept].sum() - before[kept].min() < top_p


def test_top_k_of_one_is_greedy():
    logits = torch.randint(0, 3, (200, 6), generator=seeded(0)).float()
    assert torch.equal(Sampler(top_k=1)(logits), Sampler(greedy=True)(logits))


# draws


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(0.7), Sampler(top_k=3), Sampler(top_p=0.8)])
def test_frequencies_match_the_distribution(sampler):
    logits = torch.tensor([[0.3, -1.0, 1.2, 0.0, -2.0]])
    expected = sampler.probabilities(logits)[0]
    draws = 200_000
    counted = torch.bincount(sampler(logits.expand(draws, -1), seeded(3)), minlength=5) / draws
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((counted - expected).abs() <= 4.5 * deviation).all()


def test_draws_invert_the_distribution_function(monkeypatch):
    import elman.decode

    numbers = torch.tensor([0.0, 0.2499, 0.25, 0.4999, 0.5, 1 - 2**-53], dtype=torch.float64)
    monkeypatch.setattr(elman.decode, "_uniform", lambda rows, generator: numbers)
    logits = log_of(0.0, 0.25, 0.25, 0.0, 0.5, 0.0).expand(6, -1)
    assert Sampler()(logits).tolist() == [1, 1, 2, 2, 4, 4]  # never a symbol of probability 0


def test_a_number_that_rounds_up_to_the_total_is_the_last_symbol(monkeypatch):
    import elman.decode

    monkeypatch.setattr(elman.decode, "_uniform", lambda rows, generator: torch.ones(rows, dtype=torch.float64))
    assert Sampler()(log_of(0.5, 0.5, 0.0)).tolist() == [1]


def test_ids_are_integers_and_draws_do_not_depend_on_the_type_of_the_logits():
    logits = torch.randn(50, 9, generator=seeded(0)).bfloat16()
    ids = Sampler()(logits, seeded(1))
    assert (ids.dtype, ids.shape) == (torch.int64, (50,))
    assert torch.equal(ids, Sampler()(logits.double(), seeded(1)))


def test_without_a_generator_the_default_one_draws():
    logits = torch.zeros(20, 9)
    torch.manual_seed(5)
    first = Sampler()(logits)
    torch.manual_seed(5)
    assert torch.equal(first, Sampler()(logits))
    assert not torch.equal(first, Sampler()(logits))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "1"},
        {"top_k": 0},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_k": True},
        {"top_p": 0},
        {"top_p": 1.0001},
        {"top_p": -0.5},
        {"top_p": math.nan},
        {"top_p": "0.9"},
    ],
)
def test_impossible_options_are_named(options):
    ((name, value),) = options.items()
    with pytest.raises(OptionError, match=f"{name} must be .*{value!r}") as caught:
        Sampler(**options)
    assert isinstance(caught.value, UsageError)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampler", [Sampler(), Sampler(0), Sampler(top_p=0.5)])
def test_logits_that_are_no_distribution(sampler, bad):
    logits = torch.zeros(3, 4)
    logits[1, 2] = bad
    with pytest.raises(InputError, match="row 1"):
        sampler(logits)
    with pytest.raises(InputError, match=r"row 0.*-inf"):
        sampler(torch.full((1, 3), -math.inf))
    for shape in [(4,), (2, 3, 4), (2, 0)]:
        with pytest.raises(InputError, match="must be"):
            sampler(torch.zeros(shape))


def test_one_generator_for_each_row_or_one_for_all():
    with pytest.raises(InputError, match="2 generators for 3 rows"):
        Sampler()(torch.zeros(3, 4), [seeded(0), seeded(1)])


# generation


def test_the_prompt_is_read_first_and_each_draw_is_fed_back():
    model = TinyModel()
    (sample,) = drawn(model, [1, 4, 2], 4, Sampler(), generator=seeded(0))
    assert model.inputs == [[1], [4], [2], *([id] for id in sample[:-1])]


@pytest.mark.parametrize(
    "prompt", [[1, 2], (1, 2), np.array([1, 2], np.uint16), torch.tensor([1, 2], dtype=torch.uint8)]
)
def test_prompts_of_any_kind(prompt):
    assert drawn(TinyModel(), prompt, 3, Sampler(0)) == drawn(TinyModel(), [1, 2], 3, Sampler(0))


def test_a_read_only_prompt():
    prompt = np.array([1, 2], np.int64)
    prompt.flags.writeable = False
    assert len(drawn(TinyModel(), prompt, 3, Sampler(0))[0]) == 3


def test_generation_streams():
    model = TinyModel()
    stream = generate(model, [0], 1000, Sampler(), n=2)
    assert model.inputs == []
    ids = next(stream)
    assert (ids.shape, ids.dtype) == ((2,), torch.int64)
    assert len(model.inputs) == 1  # no step more than the draw needs
    next(stream)
    assert len(model.inputs) == 2


def test_greedy_generation_follows_the_model():
    model, ids = TinyModel(), [3]
    state, (sample,) = None, drawn(TinyModel(), [3], 6, Sampler(greedy=True))
    for expected in sample:
        logits, state = model(torch.tensor(ids[-1:]), state)
        ids.append(int(logits.argmax()))
        assert ids[-1] == expected


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_sample_does_not_depend_on_how_many_there_are(n):
    model = TinyModel(vocab_size=50)
    five = drawn(model, [0, 1], 40, Sampler(), n=5, generator=seeded(7))
    assert drawn(model, [0, 1], 40, Sampler(), n=n, generator=seeded(7)) == five[:n]
    assert drawn(model, [0, 1], 40, Sampler(), generator=seeded(7 + n - 1)) == [five[n - 1]]
    assert len({tuple(sample) for sample in five}) == 5


def test_the_seed_decides_and_the_generator_stays_as_it_was():
    own = seeded(2**64 - 1)
    before = own.get_state()
    first, second = (drawn(TinyModel(), [0], 20, Sampler(), n=2, generator=own) for _ in range(2))
    assert first == second
    assert torch.equal(own.get_state(), before)


def test_without_a_generator_torchs_seed_decides():
    torch.manual_seed(3)
    first, other = (drawn(TinyModel(), [0], 20, Sampler()) for _ in range(2))
    torch.manual_seed(3)
    assert drawn(TinyModel(), [0], 20, Sampler()) == first != other


def test_samples_follow_the_model():
    model, count = TinyModel(), 40_000
    counts = torch.zeros(V, V)
    stream = generate(model, [2], 2, Sampler(), n=count, generator=seeded(0))
    counts.index_put_((next(stream), next(stream)), torch.ones(count), accumulate=True)
    for first, second in itertools.product(range(V), repeat=2):
        p = math.exp(-sum(score(model, [2, first, second])))
        assert abs(counts[first, second] / count - p) <= 4.5 * math.sqrt(p * (1 - p) / count)


def test_an_empty_prompt_needs_a_start():
    model = TinyModel()
    with pytest.raises(InputError, match=r"prompt is empty.*start"):
        generate(model, [], 3, Sampler())
    assert drawn(model, [], 3, Sampler(0), start=2) == drawn(model, [2], 3, Sampler(0))
    assert drawn(model, [1], 3, Sampler(0), start=2) == drawn(model, [1], 3, Sampler(0))


def test_a_state_carried_over_continues():
    model = TinyModel()
    (whole,) = drawn(model, [1, 2, 3], 5, Sampler(0))
    state = None
    for id in (1, 2):
        _, state = model(torch.tensor([id]), state)
    assert drawn(model, [3], 5, Sampler(0), state=state) == [whole]


def test_nothing_to_generate():
    model = TinyModel()
    assert drawn(model, [1], 0, Sampler()) == []
    assert model.inputs == []


def test_gradients_are_off_in_the_step_and_on_outside():
    seen = []

    def step(ids, state):
        seen.append(torch.is_grad_enabled())
        return torch.zeros(len(ids), 3), state

    for _ in generate(step, [0], 2, Sampler()):
        assert torch.is_grad_enabled()
    score(step, [0, 1])
    assert seen == [False] * 3


@pytest.mark.parametrize("options", [{"length": -1}, {"length": 1.0}, {"n": 0}, {"n": True}])
def test_impossible_counts_are_refused_at_once(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        generate(TinyModel(), [0], **{"length": 1, "sampler": Sampler()} | options)


@pytest.mark.parametrize("prompt", [[-1], [0.5], [[1]], torch.tensor(1), torch.tensor([True]), np.array([1.0]), ["a"]])
def test_what_is_no_prompt_is_refused_at_once(prompt):
    with pytest.raises(InputError, match="token ids"):
        generate(TinyModel(), prompt, 1, Sampler())


def test_a_step_without_logits_for_each_row():
    with pytest.raises(InputError, match=r"logits \(2, V\).*\(2, 1, 4\)"):
        drawn(lambda ids, state: (torch.zeros(2, 1, 4), state), [0], 1, Sampler(), n=2)


# scores


@pytest.mark.parametrize("length", [1, 2, 4])
def test_all_sequences_of_a_length_have_probability_one_together(length):
    model = TinyModel()
    everything = itertools.product(range(V), repeat=length)
    total = math.fsum(math.exp(-math.fsum(score(model, ids, start=0))) for ids in everything)
    assert total == pytest.approx(1, abs=1e-12)


def test_scores_are_one_for_each_predicted_id():
    model = TinyModel()
    with_start, without = score(model, [1, 2, 3], start=4), score(model, [4, 1, 2, 3])
    assert with_start == without
    assert len(without) == 3
    assert all(isinstance(nats, float) and nats > 0 for nats in without)
    logits, _ = model(torch.tensor([4]), None)
    assert without[0] == pytest.approx(-logits[0].log_softmax(-1)[1].item())


@pytest.mark.parametrize("ids", [[], [3]])
def test_nothing_to_score(ids):
    assert score(TinyModel(), ids) == []


def test_what_greedy_generates_scores_as_the_mode_of_every_step():
    model = TinyModel()
    (sample,) = drawn(model, [0], 5, Sampler(0))
    best = score(model, [0, *sample])
    for place in range(5):
        for other in range(V):
            changed = [0, *sample[:place], other]
            assert score(model, changed)[place] >= best[place]


def test_masked_ids_cost_infinitely():
    assert score(lambda ids, state: (torch.tensor([[0.0, -math.inf]]), None), [0, 1, 0]) == [math.inf, 0]


def test_ids_beyond_the_model():
    with pytest.raises(InputError, match="id 7 is outside the 5 symbols"):
        score(TinyModel(), [0, 7])
    with pytest.raises(InputError, match="row 0"):
        score(lambda ids, state: (torch.full((1, 5), math.nan), None), [0, 1])
