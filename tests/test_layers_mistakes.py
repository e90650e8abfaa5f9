"""Mistakes in using elman.layers: the same errors as torch.nn's, of the same type and in the same words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from elman import layers
from elman.errors import InputError

KINDS = {"RNN": (nn.RNN, layers.RNN), "LSTM": (nn.LSTM, layers.LSTM), "GRU": (nn.GRU, layers.GRU)}


def small(kind: str, ours: bool) -> nn.Module:
    return KINDS[kind][ours](4, 2, dtype=torch.float64)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def state_of(kind: str, *shape: int, dtype: torch.dtype = torch.float64) -> Any:
    h = torch.zeros(*shape, dtype=dtype)
    return (h, h.clone()) if kind == "LSTM" else h


WRONG_OPTIONS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "dropout above one": ((4, 2), {"dropout": 1.5}),
    "dropout a boolean": ((4, 2), {"dropout": True}),
    "bias a number": ((4, 2), {"bias": 1}),
    "batch_first a word": ((4, 2), {"batch_first": "yes"}),
    "input_size a float": ((4.0, 2), {}),
    "input_size zero": ((0, 2), {}),
    "hidden_size a word": ((4, "2"), {}),
    "hidden_size negative": ((4, -2), {}),
    "no layer": ((4, 2), {"num_layers": 0}),
    "projection too wide": ((4, 2), {"proj_size": 2}),
    "projection negative": ((4, 2), {"proj_size": -1}),
    "nonlinearity unknown": ((4, 2), {"nonlinearity": "sine"}),
    "option unknown": ((4, 2), {"peepholes": True}),
    "size missing": ((4,), {}),
}


def raised(act: Callable[[], object]) -> tuple[type[BaseException], str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011  (which one it is, is what is compared)
        act()
    return caught.type, str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mistake", WRONG_OPTIONS)
def test_wrong_options_raise_what_torch_raises(kind: str, mistake: str) -> None:
    positional, options = WRONG_OPTIONS[mistake]
    theirs, mine = KINDS[kind]
    assert raised(lambda: mine(*positional, **options)) == raised(lambda: theirs(*positional, **options))


def packing(*shape: int, sort: bool = True, dtype: torch.dtype = torch.float64) -> PackedSequence:
    lengths = [3, 2] if sort else [2, 3]
    return pack_padded_sequence(torch.zeros(*shape, dtype=dtype), lengths, enforce_sorted=sort)


# What is passed, and whether torch.nn checks it: if not, a kernel speaks, and only types are compared.
WRONG_CALLS: dict[str, tuple[bool, Callable[[str], tuple[Any, ...]]]] = {
    "one dimension": (True, lambda kind: (numbers(4),)),
    "four dimensions": (True, lambda kind: (numbers(3, 2, 4, 1),)),
    "features": (True, lambda kind: (numbers(3, 2, 5),)),
    "features, unbatched": (True, lambda kind: (numbers(3, 5),)),
    "dtype": (True, lambda kind: (numbers(3, 2, 4).float(),)),
    "integers": (True, lambda kind: (torch.zeros(3, 2, 4, dtype=torch.long),)),
    "a list": (True, lambda kind: ([1.0, 2.0],)),
    "nothing": (True, lambda kind: (None,)),
    "no argument": (False, lambda kind: ()),
    "state for another batch": (True, lambda kind: (numbers(3, 2, 4), state_of(kind, 1, 3, 2))),
    "state for more layers": (True, lambda kind: (numbers(3, 2, 4), state_of(kind, 2, 2, 2))),
    "state of another width": (True, lambda kind: (numbers(3, 2, 4), state_of(kind, 1, 2, 3))),
    "state unbatched": (True, lambda kind: (numbers(3, 2, 4), state_of(kind, 1, 2))),
    "state batched, input not": (True, lambda kind: (numbers(3, 4), state_of(kind, 1, 1, 2))),
    "state of another dtype": (
        False,
        lambda kind: (numbers(3, 2, 4), state_of(kind, 1, 2, 2, dtype=torch.float32)),
    ),
    "state of the other kind": (
        True,
        lambda kind: (numbers(3, 2, 4), state_of("GRU" if kind == "LSTM" else "LSTM", 1, 2, 2)),
    ),
    "no step": (True, lambda kind: (numbers(0, 2, 4),)),
    "no step, unbatched": (True, lambda kind: (numbers(0, 4),)),
    "packed features": (False, lambda kind: (packing(3, 2, 5),)),
    "packed dtype": (False, lambda kind: (packing(3, 2, 4, dtype=torch.float32),)),
    "packed, state for more layers": (False, lambda kind: (packing(3, 2, 4), state_of(kind, 2, 2, 2))),
    "packed, state for another batch": (False, lambda kind: (packing(3, 2, 4), state_of(kind, 1, 3, 2))),
    "packed, state of another width": (False, lambda kind: (packing(3, 2, 4), state_of(kind, 1, 2, 3))),
    "unsorted, state for a smaller batch": (
        True,
        lambda kind: (packing(3, 2, 4, sort=False), state_of(kind, 1, 1, 2)),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mistake", WRONG_CALLS)
def test_wrong_calls_raise_what_torch_raises(kind: str, mistake: str) -> None:
    text, arguments = WRONG_CALLS[mistake]
    theirs, mine = (raised(lambda ours=ours: small(kind, ours)(*arguments(kind))) for ours in (False, True))
    assert mine[0] is theirs[0]
    assert mine[1] == theirs[1] or not text


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_without_a_second_layer_warns_as_in_torch(kind: str) -> None:
    texts = []
    for layer in KINDS[kind]:
        with pytest.warns(UserWarning, match="num_layers greater than 1") as caught:
            layer(4, 2, dropout=0.5)
        texts.append(str(caught[0].message))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("lengths", [[3], [4, 1], [-1, 2], [1.5, 2.0], [[1, 2]]])
def test_lengths_that_do_not_fit(lengths: Any) -> None:
    with pytest.raises(InputError, match="lengths must"):
        small("GRU", True)(numbers(3, 2, 4), lengths=lengths)


def test_a_packed_sequence_has_its_lengths() -> None:
    with pytest.raises(InputError, match="already has its lengths"):
        small("GRU", True)(packing(3, 2, 4), lengths=[3, 2])
