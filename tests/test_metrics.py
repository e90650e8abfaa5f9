"""Units of the loss, and baselines that are distributions."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elman.errors import DataError, InputError, OptionError
from elman.metrics import Loss, NGram, bits, n_gram, perplexity, unigram
from elman.text import Tokenizer, default_text, split


@pytest.mark.parametrize(("nats", "expected"), [(0.0, 0.0), (math.log(2), 1.0), (8 * math.log(2), 8.0)])
def test_bits(nats, expected):
    assert bits(nats) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(("nats", "expected"), [(0.0, 1.0), (math.log(65), 65.0), (1e4, math.inf)])
def test_perplexity(nats, expected):
    assert perplexity(nats) == pytest.approx(expected, rel=1e-14)


def test_uniform_bytes_cost_eight_bits_each():
    tokenizer = Tokenizer.build("byte")
    ids = tokenizer.encode("größer 日本")
    loss = Loss(len(ids) * math.log(256), len(ids), *tokenizer.counts(ids))
    assert (loss.tokens, loss.characters, loss.bytes) == (15, 9, 15)
    assert loss.nats_per_token == pytest.approx(math.log(256))
    assert loss.bits_per_token == loss.bits_per_byte == pytest.approx(8)
    assert loss.bits_per_character == pytest.approx(8 * 15 / 9)
    assert loss.perplexity == pytest.approx(256)


def test_json_names_every_figure():
    loss = Loss(6.0, 3, 2, 4)
    stored = json.loads(json.dumps(loss.to_json()))
    assert all(stored[name] == getattr(loss, name) for name in stored)
    assert set(stored) >= {"nats", "bits_per_character", "bits_per_byte", "perplexity", "tokens"}


@pytest.mark.parametrize("counts", [(0, 0, 0), (1, 0, 1)])
def test_a_loss_over_nothing_is_refused(counts):
    with pytest.raises(DataError, match="nothing was predicted"):
        Loss(0.0, *counts)


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    vocab_size=st.integers(5, 8),
    order=st.integers(1, 6),
    context=st.lists(st.integers(0, 4), max_size=7),
)
def test_every_distribution_sums_to_one_and_excludes_nothing(ids, vocab_size, order, context):
    distribution = NGram(np.array(ids, np.uint8), vocab_size, order).distribution(np.array(context, np.uint8))
    assert distribution.shape == (vocab_size,)
    assert distribution.min() > 0
    assert distribution.sum() == pytest.approx(1, abs=1e-12)


def test_distributions_of_real_text_sum_to_one():
    text = default_text()[:50_000]
    tokenizer = Tokenizer.build("char", text)
    ids = tokenizer.encode(text)
    model = NGram(ids[:40_000], tokenizer.vocab_size)
    for start in range(40_000, 40_400, 7):
        distribution = model.distribution(ids[start : start + 4])
        assert distribution.min() > 0
        assert distribution.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_nats_are_those_of_the_distributions(order):
    rng = np.random.default_rng(0)
    train, held_out = rng.integers(0, 6, 400), rng.integers(0, 7, 60)
    model = NGram(train, 7, order)
    one_by_one = [-math.log(model.distribution(held_out[:t])[held_out[t]]) for t in range(1, len(held_out))]
    assert model.nats(held_out) == pytest.approx(np.mean(one_by_one), rel=1e-12)


def test_all_sequences_of_a_length_have_probability_one_together():
    model = NGram(np.array([0, 1, 2, 0, 1, 1, 2, 0]), 4, 3)
    total = sum(math.exp(-4 * model.nats(np.array([1, *rest]))) for rest in itertools.product(range(4), repeat=4))
    assert total == pytest.approx(1, abs=1e-12)


def kneser_ney(train: list[int], vocab_size: int, order: int, context: list[int], symbol: int) -> float:
    """The definition, with dictionaries; discounts as where there is no closed form."""
    if not order:
        return 1 / vocab_size
    lower = kneser_ney(train, vocab_size, order - 1, context[1:], symbol)
    key = tuple(context)
    grams = Counter(tuple(train[i : i + len(key) + 1]) for i in range(len(train) - len(key)))
    if order < TOP:
        longer = {tuple(train[i : i + len(key) + 2]) for i in range(len(train) - len(key) - 1)}
        grams = Counter(gram[1:] for gram in longer)
    counts = {gram[-1]: n for gram, n in grams.items() if gram[:-1] == key}
    if not counts:
        return lower
    off = {w: (0, 0.5, 1.0, 1.5)[min(n, 3)] for w, n in counts.items()}
    own = counts[symbol] - off[symbol] if symbol in counts else 0
    return (own + sum(off.values()) * lower) / sum(counts.values())


TOP = 3


def test_against_the_definition():
    train = [0, 1, 2, 0, 1, 2, 0, 1, 1, 0, 2, 2, 1, 0, 1]
    model = NGram(np.array(train), 4, TOP)
    for context in itertools.product(range(4), repeat=TOP - 1):
        expected = [kneser_ney(train, 4, TOP, list(context), symbol) for symbol in range(4)]
        np.testing.assert_allclose(model.distribution(np.array(context)), expected, rtol=1e-12)


def test_closed_form_discounts():
    # 8 symbols occur once, 4 twice, 2 three times, 1 four times: Y = 8 / (8 + 2 · 4) = ½
    occurrences = [1] * 8 + [2] * 4 + [3] * 2 + [4]
    ids = np.repeat(np.arange(15), occurrences)
    d1, d2, d3 = 1 - 2 * 0.5 * 4 / 8, 2 - 3 * 0.5 * 2 / 4, 3 - 4 * 0.5 * 1 / 2
    taken = (8 * d1 + 4 * d2 + 3 * d3) / len(ids)
    own = [n - (d1, d2, d3, d3)[n - 1] for n in occurrences]
    expected = np.array([*own, 0]) / len(ids) + taken / 16
    np.testing.assert_allclose(NGram(ids, 16, 1).distribution(np.array([], int)), expected, rtol=1e-12)


def test_the_first_token_is_not_predicted():
    train = np.array([0, 0, 0, 1])
    assert unigram(train, np.array([1, 0]), 2) == unigram(train, np.array([0, 0]), 2)


def test_what_repeats_is_predicted_well_and_noise_is_not():
    rng = np.random.default_rng(1)
    cycle = np.tile(np.arange(10), 200)
    assert n_gram(cycle[:1800], cycle[1800:], 10) < 0.05
    assert unigram(cycle[:1800], cycle[1800:], 10) == pytest.approx(math.log(10), rel=1e-3)
    noise = rng.integers(0, 10, 20_000)
    assert n_gram(noise[:18_000], noise[18_000:], 10, 2) == pytest.approx(math.log(10), rel=0.01)


def test_baselines_on_real_text_in_seconds():
    text = default_text()
    tokenizer = Tokenizer.build("char", text)
    train, _, held_out = split(tokenizer.encode(text), 0.05, 0.05)
    begin = time.perf_counter()
    first, fifth = (f(train, held_out, tokenizer.vocab_size) for f in (unigram, n_gram))
    assert time.perf_counter() - begin < 5
    assert 4 < bits(first) < 5.5
    assert 1.2 < bits(fifth) < 2.6
    assert n_gram(train, held_out, tokenizer.vocab_size, 1) == first


@pytest.mark.parametrize("order", [0, -1, 2.0, True])
def test_impossible_order(order):
    with pytest.raises(OptionError, match="order"):
        NGram(np.array([0]), 1, order)


def test_bad_ids():
    with pytest.raises(DataError, match="empty"):
        unigram(np.array([], int), np.array([0, 1]), 2)
    with pytest.raises(DataError, match="1 token,"):
        unigram(np.array([0]), np.array([0]), 2)
    for ids in ([2], [-1]):
        with pytest.raises(InputError, match="from 0 to 1"):
            NGram(np.array(ids), 2)
        with pytest.raises(InputError, match="from 0 to 1"):
            NGram(np.array([0, 1]), 2).distribution(np.array(ids))
