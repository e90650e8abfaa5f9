"""Initialisations have the property that they are named after."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from elman.cells import CELLS, ElmanCell, GRUCell, LSTMCell
from elman.errors import OptionError
from elman.init import INITIALISATIONS, initialise, set_bias_
from elman.spec import make_cell

H = 12
WRITTEN = {"chrono": "chrono:50", "spectral": "spectral:0.9"}


def gates(cell: nn.Module, name: str = "weight_hh") -> dict[str, Tensor]:
    return dict(zip(cell.gates, getattr(cell, name).detach().split(cell.hidden_size), strict=True))


@pytest.mark.parametrize("name", sorted({*CELLS} - {"elman", "irnn", "lru"}))  # which start in ways of their own
def test_uniform_stays_in_its_bounds_and_fills_them(name: str) -> None:
    cell = make_cell(name, 40, 64)
    for parameter in cell.parameters():
        assert 0.9 / 8 < parameter.abs().max() <= 1 / 8
        assert abs(parameter.mean()) < 0.05


@pytest.mark.parametrize("name", ["gru", "irnn", "lstm", "mgu", "rnn", "slstm"])
def test_orthogonal(name: str) -> None:
    cell = make_cell(name, 3, H, init="orthogonal", dtype=torch.float64)
    blocks = list(gates(cell).values())
    for block in blocks:
        torch.testing.assert_close(block.T @ block, torch.eye(H, dtype=torch.float64))
    assert all(not a.allclose(b) for a, b in pairwise(blocks))
    assert not cell.bias_ih.any()
    assert not cell.bias_hh.any()


def test_orthogonal_with_a_projection() -> None:
    cell = LSTMCell(3, H, proj_size=5, init="orthogonal", dtype=torch.float64)
    for block in gates(cell).values():
        torch.testing.assert_close(block.T @ block, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(cell.weight_hr @ cell.weight_hr.T, torch.eye(5, dtype=torch.float64))


def test_identity_keeps_the_state_of_relu_units() -> None:
    cell = ElmanCell(3, H, squash="relu", init="identity")
    h = torch.rand(2, H)
    assert cell(torch.zeros(2, 3), h)[0].equal(h)
    assert 0.0005 < cell.weight_ih.std() < 0.002
    for block in gates(GRUCell(3, H, init="identity")).values():
        assert block.equal(torch.eye(H))


@pytest.mark.parametrize("radius", [0.5, 1.0, 1.25])
@pytest.mark.parametrize("name", ["rnn", "gru"])
def test_spectral(name: str, radius: float) -> None:
    for block in gates(make_cell(name, 3, H, init=f"spectral:{radius}")).values():
        assert torch.linalg.eigvals(block.double()).abs().max().item() == pytest.approx(radius, rel=1e-5)


def test_xavier() -> None:
    cell = LSTMCell(30, H, proj_size=5, peepholes=True, init="xavier")
    for name, fan in (("weight_ih", 30 + H), ("weight_hh", 5 + H)):
        for block in gates(cell, name).values():
            assert 0.8 * math.sqrt(6 / fan) < block.abs().max() <= math.sqrt(6 / fan)
    assert cell.weight_hr.abs().max() <= math.sqrt(6 / (5 + H))
    assert not cell.bias_ih.any()
    assert cell.weight_peephole.any()


def test_chrono_spreads_the_memory_of_an_lstm() -> None:
    cell = LSTMCell(3, 400, init="chrono:100")
    bias = {gate: gates(cell, "bias_ih")[gate] + gates(cell, "bias_hh")[gate] for gate in cell.gates}
    times = 1 / (1 - torch.sigmoid(bias["forget"].double()))  # steps until forgotten
    assert 2 <= times.min() < 4
    assert 95 < times.max() <= 100
    assert 45 < times.median() < 56
    assert bias["input"].equal(-bias["forget"])
    assert bias["output"].abs().max() <= 2 / math.sqrt(400)


def test_chrono_sets_the_update_gate_of_a_gru_that_keeps_the_old_state() -> None:
    cell = GRUCell(3, 400, init="chrono:100")
    bias = gates(cell, "bias_ih")["update"] + gates(cell, "bias_hh")["update"]
    assert bias.min() >= 0
    assert math.log(90) < bias.max() <= math.log(99)


def test_forget_bias_wins_over_chrono() -> None:
    cell = LSTMCell(3, H, init="chrono:100", forget_bias=1.0)
    assert gates(cell, "bias_ih")["forget"].equal(torch.ones(H))


@pytest.mark.parametrize("scheme", sorted(INITIALISATIONS))
def test_every_scheme_repeats_with_its_seed_and_fills_all(scheme: str) -> None:
    cells = []
    for _ in range(2):
        torch.manual_seed(4)
        cell = LSTMCell(3, H, peepholes=True)
        for parameter in cell.parameters():
            nn.init.constant_(parameter, torch.nan)
        initialise(cell, WRITTEN.get(scheme, scheme))
        assert all(parameter.isfinite().all() for parameter in cell.parameters())
        cells.append(cell)
    assert all(a.equal(b) for a, b in zip(cells[0].parameters(), cells[1].parameters(), strict=True))


@pytest.mark.parametrize("scheme", sorted(INITIALISATIONS))
def test_a_cell_without_values_draws_nothing(scheme: str) -> None:
    before = torch.get_rng_state()
    cell = GRUCell(3, H, init=WRITTEN.get(scheme, scheme), device="meta")
    assert cell.weight_hh.is_meta
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("scheme", sorted({*INITIALISATIONS} - {"chrono"}))
def test_without_biases(scheme: str) -> None:
    cell = GRUCell(3, H, bias=False, init=WRITTEN.get(scheme, scheme))
    assert cell.weight_hh.isfinite().all()


def test_a_module_inside_keeps_its_own_values() -> None:
    cell = ElmanCell(3, H, squash=nn.PReLU(H))
    assert cell.squash.weight.equal(torch.full((H,), 0.25))


MISTAKES: list[tuple[str, str, dict[str, object], str]] = [
    ("orthogonl", "rnn", {}, "unknown initialisation 'orthogonl': did you mean 'orthogonal'?"),
    ("orthogonal:2", "rnn", {}, "takes no number; got 'orthogonal:2'"),
    ("spectral", "rnn", {}, "needs the spectral radius as a number after a colon, got none"),
    ("spectral:big", "rnn", {}, "got 'big'. Write for example 'spectral:0.9'"),
    ("spectral:-1", "rnn", {}, "must be a positive number, got -1.0"),
    ("spectral:nan", "rnn", {}, "must be a positive number, got nan"),
    ("spectral:0.9", "lstm", {"proj_size": 2}, "only square recurrent weights"),
    ("chrono", "lstm", {}, "needs the longest memory in steps as a number after a colon, got none"),
    ("chrono:1.5", "lstm", {}, "must be at least 2; got 1.5"),
    ("chrono:inf", "lstm", {}, "must be at least 2; got inf"),
    ("chrono:20", "rnn", {}, "ElmanCell has none"),
    ("chrono:20", "gru", {"bias": False}, "the bias of the update gate cannot be set"),
]


@pytest.mark.parametrize(("scheme", "name", "options", "message"), MISTAKES, ids=[case[0] for case in MISTAKES])
def test_mistakes_are_named(scheme: str, name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        make_cell(name, 3, H, init=scheme, **options)
    assert message in str(caught.value)


def test_any_cell_with_these_parameter_names() -> None:
    cell = nn.GRUCell(3, H)
    initialise(cell, "orthogonal")
    block = cell.weight_hh.detach()[:H]
    torch.testing.assert_close(block.T @ block, torch.eye(H))
    with pytest.raises(OptionError, match=r"Linear\.hidden_size"):
        initialise(nn.Linear(3, 4), "uniform")


def test_a_bias_of_a_gate_that_is_not_there() -> None:
    with pytest.raises(OptionError, match="unknown gate of LSTMCell 'forgot': did you mean 'forget'"):
        set_bias_(LSTMCell(3, H), "forgot", 1.0)
