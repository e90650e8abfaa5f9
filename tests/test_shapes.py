"""The shapes that functions say are checked in the tests: by the hook that conftest.py installs."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError, install_import_hook

SHAPED = """
from __future__ import annotations
from dataclasses import dataclass
from jaxtyping import Float
from torch import Tensor

@dataclass
class Pair:
    first: Float[Tensor, "T B"]
    second: Float[Tensor, "T B"]

def outer(left: Float[Tensor, " N"], right: Float[Tensor, " M"]) -> Float[Tensor, "N M"]:
    return left[:, None] * right

def transposed(left: Float[Tensor, " N"], right: Float[Tensor, " M"]) -> Float[Tensor, "M N"]:
    return left[:, None] * right

def says_none(number: int) -> int:
    return number
"""


@pytest.fixture
def shaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    (tmp_path / "shaped.py").write_text(SHAPED, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with install_import_hook("shaped", "shapes.check"):
        return importlib.import_module("shaped")


def test_right_shapes_pass(shaped) -> None:
    assert shaped.outer(torch.ones(2), torch.ones(3)).shape == (2, 3)
    assert shaped.Pair(torch.ones(2, 3), torch.zeros(2, 3)).first.shape == (2, 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda shaped: shaped.outer(torch.ones(2, 1), torch.ones(3)),
        lambda shaped: shaped.outer(torch.ones(2), torch.ones(3, dtype=torch.int64)),
        lambda shaped: shaped.transposed(torch.ones(2), torch.ones(3)),
        lambda shaped: shaped.Pair(torch.ones(2, 3), torch.ones(3, 2)),
    ],
    ids=["dimensions", "dtype", "result", "one letter, two sizes"],
)
def test_wrong_shapes_are_found(shaped, call) -> None:
    with pytest.raises(TypeCheckError):
        call(shaped)


def test_what_says_no_shape_is_left_alone(shaped) -> None:
    assert shaped.says_none("one") == "one"
