"""How good a language model is: units of its loss, and two baselines counted on the same text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .errors import DataError, InputError, OptionError, counted

__all__ = ["Loss", "NGram", "bits", "n_gram", "perplexity", "unigram"]


def bits(nats: float) -> float:
    """Nats in bits: nats / ln 2."""
    return nats / math.log(2)


def perplexity(nats: float) -> float:
    """exp of nats per token; inf where that is beyond a float."""
    return math.exp(nats) if nats < 709 else math.inf


@dataclass(frozen=True)
class Loss:
    """The loss on a text: ``nats`` in total over ``tokens`` predicted tokens, Σ −ln p(token | all before it).

    ``characters`` and ``bytes`` are what the predicted tokens stand for: where the first token of a text is
    not predicted, ``Tokenizer.counts(ids[1:])``. Figures per token depend on what a token is; bits per
    character and per byte compare across kinds of tokens. DataError if nothing was predicted.
    """

    nats: float
    tokens: int
    characters: int
    bytes: int

    def __post_init__(self) -> None:
        if min(self.tokens, self.characters, self.bytes) < 1:
            raise DataError(
                f"nothing was predicted ({self.tokens} tokens, {self.characters} characters, {self.bytes} "
                "bytes): evaluate on at least two tokens and one whole character"
            )

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def bits_per_token(self) -> float:
        return bits(self.nats_per_token)

    @property
    def bits_per_character(self) -> float:
        return bits(self.nats / self.characters)

    @property
    def bits_per_byte(self) -> float:
        return bits(self.nats / self.bytes)

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return perplexity(self.nats_per_token)

    def to_json(self) -> dict[str, float | int]:
        """All figures by name."""
        return {
            "nats": self.nats,
            "tokens": self.tokens,
            "characters": self.characters,
            "bytes": self.bytes,
            "nats_per_token": self.nats_per_token,
            "bits_per_token": self.bits_per_token,
            "bits_per_character": self.bits_per_character,
            "bits_per_byte": self.bits_per_byte,
            "perplexity": self.perplexity,
        }


class NGram:
    """A back-off n-gram model with interpolated modified Kneser–Ney smoothing, counted on ``ids`` (N,).

    The probability of symbol w after the last k − 1 ≤ ``order`` − 1 symbols c, with c′ for c without its
    first:

        p_k(w | c) = max(n(c w) − D(n(c w)), 0) / n(c) + λ(c) p_{k−1}(w | c′),    p_0 = 1/V

    At the highest order n counts occurrences, below it the different symbols seen before c w. D takes one
    value for n of 1, 2 and more each, in closed form from how many n-grams occur once to four times, so
    that nothing is tuned on anything but the training text; where these numbers do not allow it (few
    symbols, little text) D is ½, 1, 1½. λ(c) is the mass taken off, so that probabilities sum to one and
    none is zero; a context never seen leaves p_{k−1}(w | c′). ``order`` 5 is the 5-gram model: four
    symbols of context.

    About 200 bytes of memory for each training token. InputError for ids outside the vocabulary,
    DataError without ids to count.

    Source: Chen and Goodman 1998, An Empirical Study of Smoothing Techniques for Language Modeling (Harvard
    TR-10-98); the values where D has no closed form are KenLM's fallback (Heafield et al. 2013).
    """

    def __init__(self, ids: np.ndarray, vocab_size: int, order: int = 5) -> None:
        if isinstance(order, bool) or not isinstance(order, int) or order < 1:
            raise OptionError(f"the order of an n-gram model must be a whole number of at least 1; got {order!r}")
        if not len(ids):
            raise DataError("an n-gram model is counted on a text, and this one is empty")
        self.vocab_size = vocab_size
        symbols = self._symbols(ids)
        grams = [np.zeros(len(symbols) + 1, np.int64)]  # grams[k][m]: number of the k-gram that starts at m
        keys = []
        for k in range(1, min(order, len(symbols)) + 1):
            pairs = grams[-1][: len(symbols) - k + 1] * vocab_size + symbols[k - 1 :]
            unique, numbers = np.unique(pairs, return_inverse=True)
            keys.append(unique)
            grams.append(numbers)
        self._levels = []
        for k in range(1, len(keys) + 1):
            occurrences = np.bincount(grams[k], minlength=len(keys[k - 1]))
            if k < len(keys):
                occurrences = _different_before(grams[k], grams[k + 1], len(keys[k - 1]), len(keys[k]))
            contexts = len(keys[k - 2]) if k > 1 else 1
            self._levels.append(_level(keys[k - 1], occurrences, contexts, vocab_size))

    def nats(self, ids: np.ndarray) -> float:
        """−ln p per token of ``ids``, over all of them but the first; contexts do not reach before the
        first."""
        if len(ids) < 2:
            raise DataError(f"the held-out text has {counted(len(ids))}, and the first is not predicted: give 2")
        symbols = self._symbols(ids)
        probabilities = np.full(len(symbols), 1 / self.vocab_size)
        contexts = np.zeros(len(symbols) + 1, np.int64)  # number of the (k−1)-gram that starts at m, or −1
        for k, level in enumerate(self._levels, 1):
            if k > len(symbols):
                break
            contexts = contexts[: len(symbols) - k + 1]
            found = level.find(contexts, symbols[k - 1 :], self.vocab_size)
            probabilities[k - 1 :] = level.interpolate(contexts, found, probabilities[k - 1 :])
            contexts = found
        return float(-np.log(probabilities[1:]).mean())

    def distribution(self, context: np.ndarray) -> np.ndarray:
        """p(w | context) for every symbol w (V,)."""
        given = self._symbols(context)
        probabilities = np.full(self.vocab_size, 1 / self.vocab_size)
        for k, level in enumerate(self._levels[: len(given) + 1], 1):
            number = np.zeros(1, np.int64)
            for shorter, symbol in zip(self._levels, given[len(given) - k + 1 :], strict=False):
                number = shorter.find(number, symbol, self.vocab_size)
            contexts = np.repeat(number, self.vocab_size)
            found = level.find(contexts, np.arange(self.vocab_size), self.vocab_size)
            probabilities = level.interpolate(contexts, found, probabilities)
        return probabilities

    def _symbols(self, ids: np.ndarray) -> np.ndarray:
        symbols = np.asarray(ids, np.int64)
        if len(symbols) and (symbols.min() < 0 or symbols.max() >= self.vocab_size):
            raise InputError(f"ids must be from 0 to {self.vocab_size - 1}; got {symbols.min()} to {symbols.max()}")
        return symbols


@dataclass(frozen=True, eq=False)
class _Level:
    """All k-grams of a text, for one k.

    ``keys`` (G,), sorted: number of the context · V + last symbol; a k-gram's number is its place there.
    ``own`` (G,): its probability before interpolation. ``rest`` (C,): λ of each context, 1 if nothing
    follows it.
    """

    keys: np.ndarray
    own: np.ndarray
    rest: np.ndarray

    def find(self, contexts: np.ndarray, symbols: np.ndarray, vocab_size: int) -> np.ndarray:
        """Numbers of the k-grams, −1 for those that do not occur."""
        wanted = np.where(contexts < 0, -1, contexts * vocab_size + symbols)
        places = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where(self.keys[places] == wanted, places, -1)

    def interpolate(self, contexts: np.ndarray, found: np.ndarray, lower: np.ndarray) -> np.ndarray:
        return np.where(found < 0, 0, self.own[found]) + np.where(contexts < 0, 1, self.rest[contexts]) * lower


def _level(keys: np.ndarray, counts: np.ndarray, contexts: int, vocab_size: int) -> _Level:
    discounts = _discounts(counts)[np.minimum(counts, 3)]
    of = keys // vocab_size
    total = np.bincount(of, counts, contexts)
    taken = np.bincount(of, discounts, contexts)
    divisor = np.maximum(total, 1)
    return _Level(keys, (counts - discounts) / divisor[of], np.where(total > 0, taken / divisor, 1.0))


def _discounts(counts: np.ndarray) -> np.ndarray:
    """What is taken off counts of 0, 1, 2 and more."""
    n1, n2, n3, n4 = (int((counts == c).sum()) for c in (1, 2, 3, 4))
    if n1 and n2 and n3 and n4:
        y = n1 / (n1 + 2 * n2)
        closed = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        if all(0 < discount <= c for c, discount in enumerate(closed, 1)):
            return np.array([0.0, *closed])
    return np.array([0.0, 0.5, 1.0, 1.5])


def _different_before(grams: np.ndarray, longer: np.ndarray, kinds: int, longer_kinds: int) -> np.ndarray:
    """For each of the k-grams the number of different symbols before it: of different (k+1)-grams that
    end so."""
    somewhere = np.zeros(longer_kinds, np.int64)
    somewhere[longer] = np.arange(len(longer))
    return np.bincount(grams[somewhere + 1], minlength=kinds)


def unigram(train: np.ndarray, held_out: np.ndarray, vocab_size: int) -> float:
    """Nats per token of ``held_out``, its first excepted, by how often each symbol occurs in
    ``train``."""
    return NGram(train, vocab_size, 1).nats(held_out)


def n_gram(train: np.ndarray, held_out: np.ndarray, vocab_size: int, order: int = 5) -> float:
    """Nats per token of ``held_out``, its first excepted, by the :class:`NGram` counted on ``train``."""
    return NGram(train, vocab_size, order).nats(held_out)
