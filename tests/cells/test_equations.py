"""Every cell against its equation, written out once more, and against torch.nn's own cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elman
from elman.cells import ElmanCell, GRUCell, LeakyCell, LSTMCell
from elman.recording import recorder
from elman.types import Cell

D, H, B = 3, 4, 5
F64 = torch.float64


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


def same(mine: Any, theirs: Any) -> None:
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def product(cell: nn.Module, gate: int, name: str, argument: Tensor) -> Tensor:
    """W v + b for one gate's block, for every row v."""
    rows = slice(gate * H, (gate + 1) * H)
    weight, bias = getattr(cell, f"weight_{name}")[rows], getattr(cell, f"bias_{name}")
    return torch.stack([weight @ v for v in argument]) + (0 if bias is None else bias[rows])


def elman_equation(cell: Any, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    h = cell.squash(product(cell, 0, "ih", x) + product(cell, 0, "hh", h))
    return h, h


def leaky_equation(cell: Any, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    h = cell.alpha * h + (1 - cell.alpha) * elman_equation(cell, x, h)[0]
    return h, h


def gru_equation(cell: Any, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    r = 1 / (1 + torch.exp(-product(cell, 0, "ih", x) - product(cell, 0, "hh", h)))
    u = 1 / (1 + torch.exp(-product(cell, 1, "ih", x) - product(cell, 1, "hh", h)))
    recurrent = r * product(cell, 2, "hh", h) if cell.reset_after else product(cell, 2, "hh", r * h)
    h = u * h + (1 - u) * cell.squash(product(cell, 2, "ih", x) + recurrent)
    return h, h


def lstm_equation(cell: Any, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
    h, s = state
    a = [product(cell, gate, "ih", x) + product(cell, gate, "hh", h) for gate in range(4)]
    p = cell.weight_peephole if cell.peepholes else torch.zeros(3, H, dtype=F64)
    g, f = torch.sigmoid(a[0] + p[0] * s), torch.sigmoid(a[1] + p[1] * s)
    s = f * s + g * cell.squash(a[2])
    h = torch.sigmoid(a[3] + p[2] * s) * torch.tanh(s)
    h = h @ cell.weight_hr.T if cell.proj_size else h
    return h, (h, s)


CASES: list[tuple[type[nn.Module], dict[str, Any], Callable[..., Any]]] = [
    (ElmanCell, {}, elman_equation),
    (ElmanCell, {"squash": "relu", "bias": False}, elman_equation),
    (ElmanCell, {"squash": torch.sin}, elman_equation),
    (ElmanCell, {"squash": nn.PReLU(H, dtype=F64)}, elman_equation),
    (LeakyCell, {"alpha": 0.7}, leaky_equation),
    (LeakyCell, {"alpha": 0, "squash": "softsign", "bias": False}, leaky_equation),
    (GRUCell, {}, gru_equation),
    (GRUCell, {"bias": False, "squash": "sigmoid"}, gru_equation),
    (GRUCell, {"reset_after": False}, gru_equation),
    (GRUCell, {"reset_after": False, "bias": False}, gru_equation),
    (LSTMCell, {}, lstm_equation),
    (LSTMCell, {"bias": False, "squash": "sigmoid"}, lstm_equation),
    (LSTMCell, {"peepholes": True, "forget_bias": 1.0}, lstm_equation),
    (LSTMCell, {"proj_size": 2}, lstm_equation),
    (LSTMCell, {"proj_size": 1, "peepholes": True, "squash": "identity"}, lstm_equation),
]
IDS = [f"{kind.__name__}-{'-'.join(map(str, options))}" for kind, options, _ in CASES]


@pytest.mark.parametrize(("kind", "options", "equation"), CASES, ids=IDS)
def test_step_is_the_equation(kind: Any, options: dict[str, Any], equation: Callable[..., Any]) -> None:
    cell = kind(D, H, **options, dtype=F64)
    assert isinstance(cell, Cell)
    assert (cell.input_size, cell.hidden_size) == (D, H)
    x, state = numbers(B, D), cell.initial_state(B, device=torch.device("cpu"), dtype=F64)
    for _ in range(3):  # from the initial state on, so that the states are those that occur
        expected = equation(cell, x, state)
        y, state = cell(x, state)
        same((y, state), expected)
        assert y.shape == (B, cell.output_size)
        x = numbers(B, D)


@pytest.mark.parametrize(("kind", "options", "equation"), CASES, ids=IDS)
def test_scan_is_the_step_in_a_loop(kind: Any, options: dict[str, Any], equation: Callable[..., Any]) -> None:
    cell = kind(D, H, **options, dtype=F64)
    xs = numbers(4, B, D)
    ys, final = elman.scan(cell, xs)
    state = cell.initial_state(B, device=xs.device, dtype=F64)
    for x, y in zip(xs, ys, strict=True):
        expected, state = equation(cell, x, state)
        same(y, expected)
    same(final, state)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("mine", "theirs"), [(ElmanCell, nn.RNNCell), (LSTMCell, nn.LSTMCell), (GRUCell, nn.GRUCell)])
def test_torchs_cell_with_the_same_weights_and_seed(mine: Any, theirs: Any, bias: bool) -> None:
    torch.manual_seed(1)
    own = mine(D, H, bias=bias, dtype=F64)
    torch.manual_seed(1)
    other = theirs(D, H, bias=bias, dtype=F64)
    assert list(own.state_dict()) == list(other.state_dict())
    assert all(a.equal(b) for a, b in zip(own.parameters(), other.parameters(), strict=True))
    x, h = numbers(B, D).requires_grad_(), numbers(B, H).requires_grad_()
    state: Any = (h, numbers(B, H)) if mine is LSTMCell else h
    y, new = own(x, state)
    expected = other(x, state)
    same(new, expected)
    same(y, expected[0] if mine is LSTMCell else expected)
    assert y is (new[0] if mine is LSTMCell else new)
    weight = numbers(B, H)
    total, other_total = (y * weight).sum(), ((expected[0] if mine is LSTMCell else expected) * weight).sum()
    same(
        torch.autograd.grad(total, [x, h, *own.parameters()]),
        torch.autograd.grad(other_total, [x, h, *other.parameters()]),
    )


def test_the_projection_is_that_of_torchs_layer() -> None:
    torch.manual_seed(1)
    cell = LSTMCell(D, H, proj_size=2, dtype=F64)
    torch.manual_seed(1)
    layer = nn.LSTM(D, H, proj_size=2, dtype=F64)
    assert [name + "_l0" for name in cell.state_dict()] == list(layer.state_dict())
    assert all(a.equal(b) for a, b in zip(cell.parameters(), layer.parameters(), strict=True))


def test_a_sequence_through_relu_units_by_hand() -> None:
    cell = ElmanCell(1, 1, squash="relu", dtype=F64)
    with torch.no_grad():
        for parameter, value in zip(cell.parameters(), (2.0, 3.0, 0.5, -1.5), strict=True):
            parameter.fill_(value)
    ys, final = elman.scan(cell, torch.tensor([1.0, -4.0, 1.0], dtype=F64).reshape(3, 1, 1))
    assert ys.flatten().tolist() == [1.0, 0.0, 1.0]  # 2 - 1; max(0, -8 + 3 - 1); 2 + 0 - 1
    assert final.item() == 1.0


def test_u_keeps_the_old_state() -> None:
    cell = GRUCell(D, H, dtype=F64)
    with torch.no_grad():
        cell.bias_ih[H : 2 * H] = 100.0
    h = numbers(B, H)
    same(cell(numbers(B, D), h)[0], h)


def test_an_alpha_near_one_remembers_for_long() -> None:
    cell = LeakyCell(1, 1, alpha=0.9, squash="identity", bias=False, dtype=F64)
    with torch.no_grad():
        cell.weight_ih.fill_(1.0)
        cell.weight_hh.fill_(0.0)
    impulse = torch.zeros(5, 1, 1, dtype=F64)
    impulse[0] = 1
    same(elman.scan(cell, impulse)[0].flatten(), 0.1 * 0.9 ** torch.arange(5, dtype=F64))


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        (ElmanCell(D, H), {"preactivation"}),
        (LeakyCell(D, H), {"preactivation", "candidate"}),
        (GRUCell(D, H), {"reset", "update", "candidate"}),
        (GRUCell(D, H, reset_after=False), {"reset", "update", "candidate"}),
        (LSTMCell(D, H), {"input", "forget", "candidate", "output", "cell"}),
        (LSTMCell(D, H, peepholes=True), {"input", "forget", "candidate", "output", "cell"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_is_recorded(cell: Any, names: set[str]) -> None:
    state = cell.double().initial_state(B, device=torch.device("cpu"), dtype=F64)
    with recorder() as values:
        y, _ = cell(numbers(B, D), state)
    assert set(values) == names
    assert all(value.shape == (B, H) for value in values.values())
    for gate in {"input", "forget", "output", "reset", "update"} & names:
        assert ((values[gate] > 0) & (values[gate] < 1)).all()
    if isinstance(cell, LSTMCell):
        same(y, values["output"] * values["cell"].tanh())
    elif isinstance(cell, GRUCell):
        same(y, (1 - values["update"]) * values["candidate"])
    else:
        rate = 1 - getattr(cell, "alpha", 0)
        same(y, rate * values["preactivation"].tanh())


def test_forget_bias_is_the_sum_of_both_biases() -> None:
    cell = LSTMCell(D, H, forget_bias=1.5)
    assert torch.equal(cell.bias_ih[H : 2 * H], torch.full((H,), 1.5))
    assert not cell.bias_hh[H : 2 * H].any()
    assert cell.bias_hh[:H].all()
    nn.init.zeros_(cell.bias_ih)
    cell.reset_parameters()
    assert torch.equal(cell.bias_ih[H : 2 * H], torch.full((H,), 1.5))


def test_cells_print_their_options() -> None:
    assert repr(ElmanCell(3, 4, squash="relu", bias=False)) == "ElmanCell(3, 4, squash=relu, bias=False)"
    assert repr(LeakyCell(3, 4, alpha=0.5)) == "LeakyCell(3, 4, squash=tanh, alpha=0.5)"
    assert repr(GRUCell(3, 4, squash=torch.sin)) == "GRUCell(3, 4, squash=sin, reset_after=True)"
    text = "LSTMCell(3, 4, squash=tanh, peepholes=True, proj_size=2, forget_bias=None)"
    assert repr(LSTMCell(3, 4, peepholes=True, proj_size=2)) == text
