"""Penalties on activations, by their formulas."""

from __future__ import annotations

import pytest
import torch

from elman.errors import InputError
from elman.penalties import activation_penalty, temporal_penalty


def test_the_formulas() -> None:
    h = torch.randn(5, 3, 4, dtype=torch.float64)
    total = sum(h[t, b, i] ** 2 for t in range(5) for b in range(3) for i in range(4))
    torch.testing.assert_close(activation_penalty(h), total / (5 * 3 * 4))
    moved = sum((h[t + 1, b, i] - h[t, b, i]) ** 2 for t in range(4) for b in range(3) for i in range(4))
    torch.testing.assert_close(temporal_penalty(h), moved / (4 * 3 * 4))


def test_one_step_changes_nothing() -> None:
    h = torch.randn(1, 3, 4, requires_grad=True)
    penalty = temporal_penalty(h)
    assert penalty == 0
    penalty.backward()
    assert torch.equal(h.grad, torch.zeros_like(h))
    with pytest.raises(InputError, match=r"needs activations \(T, B, …\)"):
        temporal_penalty(torch.zeros(3))
