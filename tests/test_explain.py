"""``explain``: what ran, why, the program, and the generated code, as text that stays the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import elman
from cellzoo import zoo
from comparing import inputs
from elman.errors import CellError, InputError, OptionError


def explained(name: str, level: str = "plan") -> str:
    cell = zoo(name)
    given = inputs(cell, 3, 2)
    return elman.explain(cell, given["xs"], given["state"], constants=given["constants"], level=level)


def part_names(text: str) -> list[str]:
    """The first word of every part of the forward program."""
    forward = text.split("forward\n")[1].split("\n\n")[0]
    return [line.split()[0] for line in forward.splitlines() if line.startswith("  ") and line[2] != " "]


def test_an_elman_net_is_segment_loop_segment() -> None:
    text = explained("Elman")
    assert text.startswith("Elman: backend interpret")
    assert part_names(text) == ["segment", "loop", "segment"]
    assert "products: addmm; pointwise: tanh" in text
    assert "carries s" in text


@pytest.mark.parametrize(
    ("name", "loops"), [("stack of gru", 3), ("Feedforward", 0), ("JordanTeacherForced", 0), ("lstm", 1)]
)
def test_the_loops_are_counted(name: str, loops: int) -> None:
    assert part_names(explained(name)).count("loop") == loops


def test_stages_of_a_loop() -> None:
    """LSTM one stage; GRU with the reset before the product two; layer-norm LSTM three."""
    for name, stages in (("lstm", "1 stage"), ("Gru", "2 stages"), ("lstm with layer norm", "3 stages")):
        forward = explained(name).split("backward")[0]
        assert stages in forward, forward


@pytest.mark.parametrize("level", ["plan", "program", "code"])
def test_the_text_does_not_depend_on_sizes_or_repetition(level: str) -> None:
    cell = zoo("lstm")
    first = elman.explain(cell, torch.randn(3, 2, 3).double(), level=level)
    assert elman.explain(cell, torch.randn(9, 5, 3).double(), level=level) == first
    assert not any(str(prime) in first for prime in (1009, 1013))


def test_the_code_is_what_runs() -> None:
    text = explained("Elman", "code")
    assert "for t in times:" in text
    assert "torch.addmm(" in text
    body = text.split("forward\n")[1].split("\nbackward")[0]
    compile("\n".join(line[2:] for line in body.splitlines()), "forward", "exec")


def test_a_step_that_cannot_be_unfolded_says_why() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
            return (x, s + x) if s.sum() > 0 else (x, s)

    text = elman.explain(Branches(), torch.randn(3, 2, 4), torch.zeros(2, 4))
    assert "backend reference" in text
    assert "DataDependentError" in text
    assert "test_explain.py:" in text


def test_mistakes() -> None:
    cell = zoo("Elman")
    with pytest.raises(OptionError, match=r"'plam'.*'plan'"):
        elman.explain(cell, torch.randn(3, 2, 3).double(), level="plam")
    with pytest.raises(InputError):
        elman.explain(cell, torch.randn(3))
    with pytest.raises(CellError):
        elman.explain(torch.tanh, torch.randn(3, 2, 3))


def test_a_shared_input_and_constants() -> None:
    for name in ("SharedInput", "Attends", "Nested"):
        assert "backend interpret" in explained(name)
