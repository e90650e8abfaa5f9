"""How the Jordan network is put together; ``tests/combinators/test_feedback.py`` has its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import elman
from elman.errors import CellError, OptionError
from elman.networks.jordan import jordan

D, H, O = 3, 5, 4
EMBEDDED = {
    "embedding": ({"embed": nn.Embedding(O, 2), "feed": "argmax"}, 2),
    "linear": ({"embed": nn.Linear(O, 6)}, 6),
    "sequential": ({"embed": nn.Sequential(nn.Linear(O, 2), nn.Tanh())}, 2),
    "function": ({"embed": torch.tanh, "width": O}, O),
    "width": ({"width": O}, O),
    "nothing": ({}, O),
}


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_cell_reads_as_much_as_is_fed_back(name: str) -> None:
    options, width = EMBEDDED[name]
    cell = jordan(D, H, O, **options)
    assert (cell.input_size, cell.width, cell.output_size) == (D, width, O)
    assert cell.cell.weight_ih.shape == (H, D + width)
    ys, (_, fed) = elman.scan(cell, torch.randn(6, 2, D), backend="reference")
    assert ys.shape == (6, 2, O)
    assert fed.shape == (2, width)


def test_without_any_input() -> None:
    ys, _ = elman.scan(jordan(0, H, O), torch.empty(6, 2, 0), backend="reference")
    assert ys.shape == (6, 2, O)


MISTAKES: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "input": (("3", H, O), {}, OptionError, "jordan: input_size must be a number of features, 0 or more; got '3'"),
    "hidden": ((D, 0, O), {}, OptionError, "hidden_size must be a positive integer, got 0"),
    "output": ((D, H, 0), {}, OptionError, "jordan: output_size must be a positive integer, got 0"),
    "width": ((D, H, O), {"width": 0}, OptionError, "jordan: width must be a positive integer, got 0"),
    "function": ((D, H, O), {"embed": torch.tanh}, CellError, "jordan cannot see how many features tanh gives"),
    "activation": ((D, H, O), {"embed": nn.Tanh()}, CellError, "how many features Tanh gives.* such as nn.Linear"),
}


@pytest.mark.parametrize(("sizes", "options", "error", "says"), MISTAKES.values(), ids=MISTAKES)
def test_what_does_not_fit(sizes: Any, options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        jordan(*sizes, **options)
