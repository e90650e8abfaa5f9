"""The cells that are elementwise in time, each against its equation, and what is known of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from by_equation import F64, B, D, H, assert_is_the_equation, numbers, product, same
from torch import Tensor

import elman
from elman.cells import LRUCell, MinGRUCell, MinLSTMCell, QRNNCell, SRUCell
from elman.errors import OptionError


def sru_equation(cell: Any, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    v = cell.weight_peephole if cell.peepholes else torch.zeros(2, H, dtype=F64)
    f = torch.sigmoid(product(cell, 0, "ih", x) + v[0] * s)
    r = torch.sigmoid(product(cell, 1, "ih", x) + v[1] * s)
    s = f * s + (1 - f) * product(cell, 2, "ih", x)
    skip = x if cell.input_size == H else product(cell, 3, "ih", x)
    return r * cell.squash(s) + (1 - r) * skip, s


def qrnn_equation(cell: Any, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
    before, s = state
    n, f, q = (product(cell, gate, "ih", x) + product(cell, gate, "before", before) for gate in range(3))
    # bias_before does not exist: the bias is counted once
    s = torch.sigmoid(f) * s + (1 - torch.sigmoid(f)) * cell.squash(n)
    return torch.sigmoid(q) * s, (x, s)


def mingru_equation(cell: Any, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    z = torch.sigmoid(-product(cell, 0, "ih", x))
    h = (1 - z) * h + z * cell.squash(product(cell, 1, "ih", x))
    return h, h


def minlstm_equation(cell: Any, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    i, f = torch.sigmoid(product(cell, 0, "ih", x)), torch.sigmoid(product(cell, 1, "ih", x))
    h = f / (f + i) * h + i / (f + i) * cell.squash(product(cell, 2, "ih", x))
    return h, h


def lru_equation(cell: Any, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
    """In complex numbers, as it is published."""
    rate = torch.exp(torch.complex(-torch.exp(cell.log_decay), torch.exp(cell.log_angle)))
    b = torch.complex(product(cell, 0, "ih", x), product(cell, 1, "ih", x))
    s = rate * torch.complex(*state) + torch.exp(cell.log_scale) * b
    c = torch.complex(cell.weight_ho[:, :H], -cell.weight_ho[:, H:])
    return cell.squash((s @ c.T).real + x @ cell.weight_io.T), (s.real, s.imag)


CASES: list[tuple[type[Any], int, dict[str, Any], Callable[..., Any]]] = [
    (SRUCell, D, {}, sru_equation),
    (SRUCell, H, {"bias": False}, sru_equation),
    (SRUCell, D, {"peepholes": True}, sru_equation),
    (SRUCell, H, {"peepholes": True, "squash": "tanh"}, sru_equation),
    (QRNNCell, D, {}, qrnn_equation),
    (QRNNCell, H, {"bias": False, "squash": "sigmoid"}, qrnn_equation),
    (MinGRUCell, D, {}, mingru_equation),
    (MinGRUCell, D, {"bias": False, "squash": "tanh"}, mingru_equation),
    (MinLSTMCell, D, {}, minlstm_equation),
    (MinLSTMCell, D, {"bias": False, "squash": "tanh"}, minlstm_equation),
    (LRUCell, D, {}, lru_equation),
    (LRUCell, H, {"bias": True, "squash": "tanh", "r_min": 0.5, "max_phase": 0.3}, lru_equation),
]
IDS = [f"{kind.__name__}-{inputs}-{'-'.join(options)}" for kind, inputs, options, _ in CASES]


@pytest.mark.parametrize(("kind", "inputs", "options", "equation"), CASES, ids=IDS)
def test_is_the_equation(kind: Any, inputs: int, options: dict[str, Any], equation: Callable[..., Any]) -> None:
    cell = kind(inputs, H, **options, dtype=F64)
    assert (cell.input_size, cell.hidden_size, cell.output_size) == (inputs, H, H)
    assert_is_the_equation(cell, equation)


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        (SRUCell(D, H), {"forget", "reset", "cell"}),
        (QRNNCell(D, H), {"candidate", "forget", "output", "cell"}),
        (MinGRUCell(D, H), {"update", "candidate"}),
        (MinLSTMCell(D, H), {"forget", "candidate"}),
        (LRUCell(D, H), {"decay"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else "",
)
def test_what_is_recorded(cell: Any, names: set[str]) -> None:
    _, _, record = elman.scan(cell, torch.randn(6, B, D), record=True)
    assert set(record.values) == names
    for value in record.values.values():
        assert value.shape == (6, B, H)
    for gate in {"forget", "reset", "update", "output", "decay"} & names:
        assert ((record.values[gate] > 0) & (record.values[gate] < 1)).all()


def test_gates_that_are_both_shut_share_evenly() -> None:
    cell = MinLSTMCell(D, H)
    with torch.no_grad():
        cell.weight_ih.zero_()
        cell.bias_ih[: 2 * H] = -200.0  # σ is 0 in float32
        cell.bias_ih[2 * H :] = 1.0
    y, _ = cell(torch.randn(B, D), torch.zeros(B, H))
    same(y, torch.full((B, H), 0.5))


def test_the_ring_keeps_white_noise_at_unit_variance() -> None:
    torch.manual_seed(0)
    cell = LRUCell(1, 64, r_min=0.6, r_max=0.95, max_phase=1.0, dtype=F64)
    radius, angle = torch.exp(-torch.exp(cell.log_decay)), torch.exp(cell.log_angle)
    assert 0.6 <= radius.min() < 0.65 < 0.9 < radius.max() <= 0.95
    assert 0 <= angle.min() < 0.1 < 0.9 < angle.max() <= 1.0
    with torch.no_grad():
        cell.weight_ih[:64], cell.weight_ih[64:] = 1.0, 0.0
    _, (real, imaginary) = elman.scan(cell, numbers(200, 4000, 1))
    torch.testing.assert_close((real**2 + imaginary**2).mean(0), torch.ones(64, dtype=F64), rtol=0.1, atol=0)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (LRUCell, {"r_min": 0.9, "r_max": 0.5}, "0 <= r_min < r_max <= 1 and max_phase > 0; got r_min=0.9, r_max=0.5"),
        (LRUCell, {"r_max": 1.5}, "got r_min=0.0, r_max=1.5"),
        (LRUCell, {"max_phase": 0.0}, "max_phase=0.0"),
        (SRUCell, {"init": "orthogonal"}, "'orthogonal' is one of recurrent weights, and SRUCell has none"),
        (MinGRUCell, {"init": "spectral:0.9"}, "'spectral' is one of recurrent weights, and MinGRUCell has none"),
        (QRNNCell, {"init": "identity"}, "'identity' is one of recurrent weights, and QRNNCell has none"),
        (LRUCell, {"init": "chrono:9"}, "chrono sets the bias of a forget or update gate, and LRUCell has none"),
        (SRUCell, {"bias": False, "init": "chrono:9"}, "the bias of the forget gate cannot be set"),
    ],
)
def test_impossible_options(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        kind(D, H, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(("kind", "gate"), [(SRUCell, 0), (QRNNCell, 1), (MinGRUCell, 0), (MinLSTMCell, 1)])
def test_chrono_keeps_the_state_for_long(kind: Any, gate: int) -> None:
    cell = kind(D, 400, init="chrono:100")
    bias = cell.bias_ih.detach()[gate * 400 : (gate + 1) * 400]
    assert 0 <= bias.min() < 1
    assert 4.5 < bias.max() <= 4.6  # log 99
