"""When a step is traced again, and when its program is shared."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elman
from elman.compiler import cache


@dataclass
class Settings:
    """A configuration object with a list and a dict in it."""

    scale: float = 1.0
    powers: list[int] = field(default_factory=lambda: [1, 2])
    table: dict[str, Any] = field(default_factory=lambda: {"shift": 0.5})


class Configured(nn.Module):
    """A cell that reads all kinds of Python attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.U, self.W = nn.Linear(3, 4), nn.Linear(4, 4)
        self.settings = Settings()
        self.gain = 1.0
        self.nested = {"deep": [{"x": (1, 2)}]}
        self.activation: Callable[[Tensor], Tensor] = torch.tanh
        self.register_buffer("mask", torch.ones(4))

    def initial_state(self, batch: int, *, device: Any, dtype: Any) -> Tensor:
        return torch.zeros(batch, 4, device=device, dtype=dtype)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        settings = self.settings
        a = self.U(x) * settings.scale + self.W(h) + settings.table["shift"] + sum(settings.powers)
        if self.training:
            a = a * 0.5
        h = self.activation(a * self.gain * self.mask) + self.nested["deep"][0]["x"][0]
        return h, h


def same_as_reference(cell: nn.Module, xs: Tensor, **options: Any) -> None:
    torch.testing.assert_close(
        elman.scan(cell, xs, backend="interpret", **options), elman.scan(cell, xs, backend="reference", **options)
    )


def test_no_retrace_for_another_size(traces: list[int]) -> None:
    cell = Configured()
    for steps, batch in ((2, 1), (5, 3), (63, 33), (3, 1009), (2, 1013)):
        same_as_reference(cell, torch.randn(steps, batch, 3))
    same_as_reference(cell, torch.randn(4, 2, 3), lengths=[4, 1], reverse=True)
    same_as_reference(cell, torch.randn(1, 4, 3))
    assert len(traces) == 1


def test_no_retrace_when_parameters_move(traces: list[int]) -> None:
    cell = Configured()
    optimiser = torch.optim.SGD(cell.parameters(), lr=0.1)
    for _ in range(3):
        ys, _ = elman.scan(cell, torch.randn(5, 2, 3), backend="interpret")
        optimiser.zero_grad()
        ys.square().sum().backward()
        optimiser.step()
        cell.mask.mul_(0.9)
        same_as_reference(cell, torch.randn(3, 2, 3))
    cell.load_state_dict(Configured().state_dict())
    same_as_reference(cell, torch.randn(3, 2, 3))
    assert len(traces) == 1


CHANGES: dict[str, Callable[[Configured], Any]] = {
    "evaluation mode": lambda cell: cell.eval(),
    "an attribute": lambda cell: setattr(cell, "gain", 2.0),
    "inside a dataclass": lambda cell: setattr(cell.settings, "scale", 0.3),
    "inside a list": lambda cell: cell.settings.powers.append(3),
    "inside a dict": lambda cell: cell.settings.table.update(shift=0.1),
    "deep inside containers": lambda cell: cell.nested["deep"][0].update(x=(4, 2)),
    "the activation": lambda cell: setattr(cell, "activation", torch.relu),
    "a lambda": lambda cell: setattr(cell, "activation", lambda a: a * 0.25),
    "the type": lambda cell: cell.double(),
    "the shape of a parameter": lambda cell: setattr(cell, "U", nn.Linear(3, 1)),
    "a parameter taken away": lambda cell: setattr(cell, "U", nn.Linear(3, 4, bias=False)),
    "another kind of submodule": lambda cell: setattr(cell, "W", nn.Identity()),
    "an attribute more": lambda cell: setattr(cell, "extra", 1),
    "a forward hook": lambda cell: cell.W.register_forward_hook(lambda module, args, out: out * 0.5),
    "a tensor attribute for a number": lambda cell: setattr(cell, "gain", torch.tensor(0.5)),
    "a parameter frozen by a new method": lambda cell: setattr(cell, "forward", lambda x, h: (x, h * 0.5)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_retrace_when_something_changes(what: str, traces: list[int]) -> None:
    cell = Configured()
    same_as_reference(cell, torch.randn(4, 2, 3))
    CHANGES[what](cell)
    for _ in range(2):
        xs = torch.randn(4, 2, 3, dtype=cell.mask.dtype)
        same_as_reference(cell, xs)
    assert len(traces) == 2


def test_retrace_under_autocast(traces: list[int]) -> None:
    cell = Configured()
    xs = torch.randn(4, 2, 3)
    plain, _ = elman.scan(cell, xs, backend="interpret")
    with torch.autocast("cpu", torch.bfloat16):
        narrow, state = elman.scan(cell, xs, backend="interpret")
        again, _ = elman.scan(cell, xs, backend="interpret")
    assert len(traces) == 2
    assert not torch.equal(plain, narrow)
    assert torch.equal(narrow, again)
    assert state.dtype == torch.float32


def test_retrace_for_another_structure(traces: list[int]) -> None:
    class Sum(nn.Module):
        def forward(self, x: Any, s: Tensor) -> tuple[Tensor, Tensor]:
            x = sum(x.values()) if isinstance(x, dict) else x
            return s + x, s + x

    cell = Sum()
    x, s = torch.randn(3, 2, 4), torch.zeros(2, 4)
    torch.testing.assert_close(elman.scan(cell, x, s, backend="interpret")[1], x.sum(0))
    both = {"a": x, "b": 2 * x}
    torch.testing.assert_close(elman.scan(cell, both, s, backend="interpret")[1], 3 * x.sum(0))
    named = {"a": x, "c": 3 * x}
    torch.testing.assert_close(elman.scan(cell, named, s, backend="interpret")[1], 4 * x.sum(0))
    assert len(traces) == 3


def test_a_program_is_shared_by_equal_cells(traces: list[int]) -> None:
    first, second = Configured(), Configured()
    third = copy.deepcopy(first)
    fourth = pickle.loads(pickle.dumps(first))
    for cell in (first, second, third, fourth):
        same_as_reference(cell, torch.randn(4, 2, 3))
    assert len(traces) == 1


def test_cells_that_differ_share_nothing(traces: list[int]) -> None:
    class Other(Configured):
        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            y, h = super().forward(x, h)
            return y * 2, h

    for cell in (Configured(), Other()):
        same_as_reference(cell, torch.randn(4, 2, 3))
    assert len(traces) == 2


def test_a_mode_that_comes_back_is_not_traced_again(traces: list[int]) -> None:
    cell = Configured()
    for _ in range(3):
        for mode in (True, False):
            same_as_reference(cell.train(mode), torch.randn(4, 2, 3))
    assert len(traces) == 2


def test_a_failure_is_remembered(traces: list[int]) -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
            s = s + x if s.sum() > 0 else s - x
            return s, s

    cell = Branches()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            elman.scan(cell, torch.randn(3, 2, 4), torch.zeros(2, 4))
    assert len(traces) == 1
    assert [w.category for w in caught] == [elman.errors.UnfoldWarning]


def test_a_replaced_function_of_the_class_is_seen(traces: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Configured()
    same_as_reference(cell, torch.randn(4, 2, 3))
    monkeypatch.setattr(Configured, "forward", lambda self, x, h: (self.U(x), h * 0.5))
    same_as_reference(cell, torch.randn(4, 2, 3))


def test_a_changed_default_type_is_seen(traces: list[int]) -> None:
    class Made(nn.Module):
        def forward(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
            return s + torch.ones(4), s

    cell, xs, s = Made(), torch.randn(3, 2, 4), torch.zeros(2, 4)
    assert elman.scan(cell, xs, s, backend="interpret")[0].dtype == torch.float32
    try:
        torch.set_default_dtype(torch.float64)
        assert elman.scan(cell, xs, s, backend="interpret")[0].dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_old_programs_make_room(traces: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_MOST", 5)

    class Scaled(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = by

        def forward(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
            return x * self.by, s

    cell = Scaled(0.0)
    xs, s = torch.randn(2, 1, 1), torch.zeros(1, 1)
    for i in (0, 1, 2, 3, 4, 0, 5, 6):
        cell.by = float(i)
        elman.scan(cell, xs, s, backend="interpret")
        assert len(cache._programs) <= 5
    assert len(traces) == 7
    cell.by = 6.0
    elman.scan(cell, xs, s, backend="interpret")
    assert len(traces) == 7
