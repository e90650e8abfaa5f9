"""Every cell against its equation, written out once more, and against torch.nn's own cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from by_equation import F64, B, D, H, assert_is_the_equation, numbers, product, same
from torch import Tensor, nn
from torch.nn import functional as F

import elman
from elman.cells import ElmanCell, GRUCell, LSTMCell, MinimalGatedCell, SLSTMCell
from elman.errors import OptionError
from elman.recording import recorder


def elman_equation(cell: Any, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    h = cell.squash(product(cell, 0, "ih", x) + product(cell, 0, "hh", h))
    return h, h


def gru_equation(cell: Any, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    r = 1 / (1 + torch.exp(-product(cell, 0, "ih", x) - product(cell, 0, "hh", h)))
    u = 1 / (1 + torch.exp(-product(cell, 1, "ih", x) - product(cell, 1, "hh", h)))
    recurrent = r * product(cell, 2, "hh", h) if cell.reset_after else product(cell, 2, "hh", r * h)
    h = u * h + (1 - u) * cell.squash(product(cell, 2, "ih", x) + recurrent)
    return h, h


def lstm_equation(cell: Any, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
    h, s = state
    if cell.layer_norm:
        a = layer_normalised(cell, x, h)
    else:
        a = {n: product(cell, i, "ih", x) + product(cell, i, "hh", h) for i, n in enumerate(cell.gates)}
    p = dict.fromkeys(cell.gates, torch.zeros(H, dtype=F64))
    if cell.peepholes:
        p |= dict(zip([gate for gate in cell.gates if gate != "candidate"], cell.weight_peephole, strict=True))
    f = torch.sigmoid(a["forget"] + p["forget"] * s) if "forget" in a else torch.ones(())
    g = torch.sigmoid(a["input"] + p["input"] * s) if "input" in a else 1 - f
    s = f * s + g * cell.squash(a["candidate"])
    h = torch.sigmoid(a["output"] + p["output"] * s) * torch.tanh(
        normalised(s, cell.norm_cell) if cell.layer_norm else s
    )
    h = h @ cell.weight_hr.T if cell.proj_size else h
    return h, (h, s)


def normalised(a: Tensor, norm: nn.LayerNorm) -> Tensor:
    apart = a - a.mean(-1, keepdim=True)
    scaled = norm.weight * apart / ((apart**2).mean(-1, keepdim=True) + 1e-5) ** 0.5
    return scaled if norm.bias is None else scaled + norm.bias


def layer_normalised(cell: Any, x: Tensor, h: Tensor) -> dict[str, Tensor]:
    a = normalised(x @ cell.weight_ih.T, cell.norm_ih) + normalised(h @ cell.weight_hh.T, cell.norm_hh)
    a = a if cell.bias_ih is None else a + cell.bias_ih + cell.bias_hh
    return {name: a[:, i * H : (i + 1) * H] for i, name in enumerate(cell.gates)}


def minimal_equation(cell: Any, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    f = 1 / (1 + torch.exp(-product(cell, 0, "ih", x) - product(cell, 0, "hh", h)))
    h = (1 - f) * h + f * cell.squash(product(cell, 1, "ih", x) + product(cell, 1, "hh", f * h))
    return h, h


def slstm_equation(cell: Any, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, Any]:
    """Without a stabiliser: s and n are those of the cell times exp(m)."""
    h, s, n, m = state
    heads = h.chunk(cell.heads, -1)
    blocks = [w.chunk(cell.heads) for w in cell.weight_hh.chunk(4)]
    read = [torch.cat([h @ w.T for h, w in zip(heads, gate, strict=True)], -1) for gate in blocks]
    shift = torch.zeros(4, H) if cell.bias_hh is None else cell.bias_hh.view(4, H)
    g, f, z, q = [product(cell, i, "ih", x) + read[i] + shift[i] for i in range(4)]
    f = torch.exp(f) if cell.exponential_forget else torch.sigmoid(f)
    s_true = f * s * m.exp() + g.exp() * cell.squash(z)
    n_true = f * n * m.exp() + g.exp()
    h = torch.sigmoid(q) * s_true / n_true
    m = torch.where(f.log() + m > g, f.log() + m, g)
    return h, (h, s_true * torch.exp(-m), n_true * torch.exp(-m), m)


CASES: list[tuple[type[nn.Module], dict[str, Any], Callable[..., Any]]] = [
    (ElmanCell, {}, elman_equation),
    (ElmanCell, {"squash": "relu", "bias": False}, elman_equation),
    (ElmanCell, {"squash": torch.sin}, elman_equation),
    (ElmanCell, {"squash": nn.PReLU(H, dtype=F64)}, elman_equation),
    (GRUCell, {}, gru_equation),
    (GRUCell, {"bias": False, "squash": "sigmoid"}, gru_equation),
    (GRUCell, {"reset_after": False}, gru_equation),
    (GRUCell, {"reset_after": False, "bias": False}, gru_equation),
    (LSTMCell, {}, lstm_equation),
    (LSTMCell, {"bias": False, "squash": "sigmoid"}, lstm_equation),
    (LSTMCell, {"peepholes": True, "forget_bias": 1.0}, lstm_equation),
    (LSTMCell, {"proj_size": 2}, lstm_equation),
    (LSTMCell, {"proj_size": 1, "peepholes": True, "squash": "identity"}, lstm_equation),
    (LSTMCell, {"forget_gate": False}, lstm_equation),
    (LSTMCell, {"forget_gate": False, "peepholes": True, "bias": False}, lstm_equation),
    (LSTMCell, {"coupled": True}, lstm_equation),
    (LSTMCell, {"coupled": True, "peepholes": True, "proj_size": 2, "forget_bias": 1}, lstm_equation),
    (LSTMCell, {"layer_norm": True}, lstm_equation),
    (LSTMCell, {"layer_norm": True, "bias": False, "peepholes": True}, lstm_equation),
    (LSTMCell, {"layer_norm": True, "coupled": True, "proj_size": 3}, lstm_equation),
    (MinimalGatedCell, {}, minimal_equation),
    (MinimalGatedCell, {"bias": False, "squash": "relu"}, minimal_equation),
    (SLSTMCell, {}, slstm_equation),
    (SLSTMCell, {"exponential_forget": True, "bias": False}, slstm_equation),
    (SLSTMCell, {"heads": 2}, slstm_equation),
    (SLSTMCell, {"heads": 4, "bias": False, "squash": "identity"}, slstm_equation),
]
IDS = [f"{kind.__name__}-{'-'.join(map(str, options))}" for kind, options, _ in CASES]


@pytest.mark.parametrize(("kind", "options", "equation"), CASES, ids=IDS)
def test_is_the_equation(kind: Any, options: dict[str, Any], equation: Callable[..., Any]) -> None:
    cell = kind(D, H, **options, dtype=F64)
    assert (cell.input_size, cell.hidden_size) == (D, H)
    with torch.no_grad():  # gains of norms too are away from where they start
        for parameter in cell.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    assert_is_the_equation(cell, equation)


@pytest.mark.parametrize(("kind", "recurrence"), [(LSTMCell, lstm_equation), (GRUCell, gru_equation)])
def test_recurrent_dropout_drops_the_candidate(kind: Any, recurrence: Any) -> None:
    cell = kind(D, H, recurrent_dropout=0.4, dtype=F64)
    x, state = numbers(B, D), cell.initial_state(B, device=torch.device("cpu"), dtype=F64)
    torch.manual_seed(2)
    y, _ = cell(x, state)
    torch.manual_seed(2)
    kept = F.dropout(torch.ones(B, H, dtype=F64), 0.4)
    assert 0 < kept.count_nonzero() < kept.numel()
    squash = cell.squash
    cell.squash = lambda a: kept * squash(a)
    same(y, recurrence(cell, x, state)[0])
    cell.squash = squash
    same(cell.eval()(x, state)[0], recurrence(cell, x, state)[0])


def test_recurrent_dropout_is_drawn_anew_for_every_step_and_row() -> None:
    cell = GRUCell(1, 8, recurrent_dropout=0.25)
    with torch.no_grad():
        cell.bias_ih[8:16] = -100.0  # u = 0: the output is the candidate
    dropped = elman.scan(cell, torch.randn(40, 30, 1))[0] == 0
    assert abs(dropped.double().mean().item() - 0.25) < 0.02
    for dim in range(3):
        assert 0.2 < (dropped.roll(1, dim) ^ dropped).double().mean() < 0.55


def test_exponential_gates_stay_finite() -> None:
    cell = SLSTMCell(D, H)
    with torch.no_grad():
        cell.weight_ih.mul_(400)  # e to hundreds, which float32 cannot hold
    ys, _ = elman.scan(cell, torch.randn(50, B, D).requires_grad_())
    assert ys.isfinite().all()
    assert ys.abs().max() <= 1  # an average of candidates, let out in part
    ys.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in cell.parameters())


def test_a_coupled_cell_holds_an_average() -> None:
    _, (_, s) = elman.scan(LSTMCell(D, H, coupled=True), 10 * torch.randn(50, B, D))
    assert s.abs().max() <= 1


def test_without_a_forget_gate_the_cell_only_adds() -> None:
    cell = LSTMCell(D, H, forget_gate=False, squash="sigmoid")
    cells = elman.scan(cell, torch.randn(30, B, D), record=True)[2].values["cell"]
    assert (cells.diff(dim=0) > 0).all()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (LSTMCell, {"forget_gate": False, "coupled": True}, "coupled=True is about the forget gate"),
        (LSTMCell, {"forget_gate": False, "forget_bias": 1.0}, "forget_bias=1.0 is about the forget gate"),
        (LSTMCell, {"recurrent_dropout": 1}, r"LSTMCell: recurrent_dropout must be in \[0, 1\), got 1"),
        (GRUCell, {"recurrent_dropout": "x"}, r"GRUCell: recurrent_dropout must be in \[0, 1\), got 'x'"),
        (LSTMCell, {"forget_gate": False, "init": "chrono:20"}, "chrono sets the bias of a forget or update gate"),
        (SLSTMCell, {"heads": 3}, "heads must divide the 4 units; got heads=3"),
        (SLSTMCell, {"heads": 0}, "heads must divide the 4 units; got heads=0"),
    ],
)
def test_impossible_options(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        kind(D, H, **options)


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


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        (ElmanCell(D, H), {"preactivation"}),
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
        same(y, values["preactivation"].tanh())


def test_forget_bias_is_the_sum_of_both_biases() -> None:
    cell = LSTMCell(D, H, forget_bias=1.5)
    assert torch.equal(cell.bias_ih[H : 2 * H], torch.full((H,), 1.5))
    assert not cell.bias_hh[H : 2 * H].any()
    assert cell.bias_hh[:H].all()
    nn.init.zeros_(cell.bias_ih)
    cell.reset_parameters()
    assert torch.equal(cell.bias_ih[H : 2 * H], torch.full((H,), 1.5))


def test_cells_print_the_options_that_are_not_as_usual() -> None:
    assert repr(ElmanCell(3, 4, squash="relu", bias=False)) == "ElmanCell(3, 4, squash=relu, bias=False)"
    assert repr(GRUCell(3, 4, squash=torch.sin)) == "GRUCell(3, 4, squash=sin)"
    assert repr(GRUCell(3, 4, reset_after=False)) == "GRUCell(3, 4, squash=tanh, reset_after=False)"
    assert repr(LSTMCell(3, 4, peepholes=True, proj_size=2)) == (
        "LSTMCell(3, 4, squash=tanh, peepholes=True, proj_size=2)"
    )
    assert repr(SLSTMCell(3, 4, heads=2)) == "SLSTMCell(3, 4, squash=tanh, heads=2)"
