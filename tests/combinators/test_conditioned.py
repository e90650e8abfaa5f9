"""Conditioning against its formula, written out with R, G and the cell's own matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elman
from elman.cells import ElmanCell, GRUCell, LSTMCell
from elman.combinators import Conditioned, LearnedState, Stack
from elman.errors import InputError, OptionError
from elman.spec import make_cell

D, H, C, T, B = 3, 4, 2, 5, 3


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("where", ["step", "start", "both"])
def test_an_elman_cell_on_a_vector(where: str) -> None:
    """a(t) = U x(t) + R c + W h(t-1) + b and h(0) = G c, with every gradient."""
    inner = ElmanCell(D + (C if where != "start" else 0), H, dtype=torch.float64)
    cell = Conditioned(inner, C, where=where)
    xs, c = numbers(T, B, D), numbers(B, C)
    u, r = inner.weight_ih[:, :D], inner.weight_ih[:, D:]
    h = c @ cell.initial[0].weight.T if where != "step" else torch.zeros(B, H, dtype=torch.float64)
    expected = []
    for x in xs:
        a = x @ u.T + inner.bias_ih + h @ inner.weight_hh.T + inner.bias_hh
        h = torch.tanh(a + c @ r.T if where != "start" else a)
        expected.append(h)
    ys, last = elman.scan(cell, xs, constants=c, backend="interpret")
    same(ys, torch.stack(expected))
    same(last, h)
    wanted = [xs, c, *cell.parameters()]
    weights = torch.randn_like(ys)
    same(
        torch.autograd.grad((ys * weights).sum(), wanted),
        torch.autograd.grad((torch.stack(expected) * weights).sum(), wanted),
    )


def test_the_product_with_the_context_runs_once() -> None:
    cell = Conditioned(ElmanCell(D + C, H), C)
    text = elman.explain(cell, torch.zeros(T, B, D), constants=torch.zeros(B, C))
    once = text[text.index("once per call") : text.index("forward")]
    assert "mm" in once, text


def test_a_sequence_as_context() -> None:
    cell = Conditioned(GRUCell(D + C, H, dtype=torch.float64), C)
    xs, c = numbers(T, B, D), numbers(T, B, C)
    same(elman.scan(cell, (xs, c)), elman.scan(cell.cell, torch.cat([xs, c], -1)))


def test_every_floating_leaf_begins_where_the_context_says() -> None:
    cell = Conditioned(LSTMCell(D, H, proj_size=2), C, where="start")
    c = torch.randn(B, C)
    h, s = cell.initial_state(B, device=c.device, dtype=c.dtype, constants={"c": c}["c"])
    assert [g.weight.shape for g in cell.initial] == [(2, C), (H, C)]
    same(h, c @ cell.initial[0].weight.T)
    same(s, c @ cell.initial[1].weight.T)


class Counts(nn.Module):
    """A user's cell that counts its steps; its sizes are nowhere written."""

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Any:
        return {"n": torch.zeros(batch, dtype=torch.int64, device=device), "m": torch.zeros(batch, 2, dtype=dtype)}

    def forward(self, x: Tensor, state: Any) -> Any:
        m = state["m"] + x[:, :2]
        return m, {"n": state["n"] + 1, "m": m}


def test_a_users_cell_with_a_counter() -> None:
    cell = Conditioned(Counts(), C, where="start")
    ys, last = elman.scan(cell, torch.ones(T, B, D), constants=torch.ones(B, C))
    assert last["n"].tolist() == [T] * B
    same(ys[0], 1 + cell.initial[0](torch.ones(B, C)) if not isinstance(cell.initial[0], nn.Identity) else ys[0])
    learned = LearnedState(Counts())
    assert [p.shape for p in learned.parameters()] == [(1, 2)]
    assert elman.scan(learned, torch.ones(T, B, D))[1]["n"].tolist() == [T] * B


def test_a_learned_state_is_learned() -> None:
    cell = LearnedState(ElmanCell(D, H, dtype=torch.float64))
    xs = numbers(T, B, D)
    same(elman.scan(cell, xs), elman.scan(cell.cell, xs))  # it begins at the cell's own
    with torch.no_grad():
        cell.initial[0].normal_()
    ys, _ = elman.scan(cell, xs, backend="interpret")
    expected, _ = elman.scan(cell.cell, xs, cell.initial[0].expand(B, H), backend="reference")
    same(ys, expected)
    same(torch.autograd.grad(ys.sum(), cell.initial[0]), torch.autograd.grad(expected.sum(), cell.initial[0]))


@pytest.mark.parametrize("lengths", [None, [2, 5, 3]])
def test_contexts_stay_with_their_sequences(lengths: list[int] | None) -> None:
    cell = Stack([Conditioned(GRUCell(D + C, H), C, where="both"), Conditioned(ElmanCell(H, 2), C, where="start")])
    xs, c = torch.randn(T, B, D), torch.randn(B, C)
    ys, _ = elman.scan(cell, xs, constants=c, lengths=lengths)
    for b in range(B):
        n = T if lengths is None else lengths[b]
        alone, _ = elman.scan(cell, xs[:n, b : b + 1], constants=c[b : b + 1])
        torch.testing.assert_close(ys[:n, b : b + 1], alone)


def test_mistakes() -> None:
    with pytest.raises(OptionError, match="did you mean 'start'"):
        Conditioned(ElmanCell(D, H), C, where="strat")
    with pytest.raises(OptionError, match="context_size must be a positive integer"):
        Conditioned(ElmanCell(D, H), 0)
    cell = Conditioned(ElmanCell(D + C, H), C, key="c")
    with pytest.raises(InputError, match=r"Conditioned reads constants\['c'\]; got none"):
        elman.scan(cell, torch.zeros(T, B, D))
    with pytest.raises(InputError, match=r"reads constants\['c'\]; there are 'd'"):
        elman.scan(cell, torch.zeros(T, B, D), constants={"d": torch.zeros(B, C)})
    with pytest.raises(InputError, match=r"x has 3 features and the context 2, but ElmanCell reads 3.*input_size=5"):
        elman.scan(Conditioned(ElmanCell(D, H), C), torch.zeros(T, B, D), constants=torch.zeros(B, C))
    with pytest.raises(InputError, match=r"got \(3, 7\)"):
        elman.scan(cell, torch.zeros(T, B, D), constants={"c": torch.zeros(B, 7)})


def test_by_spec() -> None:
    cell = make_cell("conditioned(stack(2, gru), 6, where=both, key=to)", 5, 8)
    assert isinstance(cell, Conditioned)
    assert (cell.input_size, cell.output_size, cell.cell.input_size, cell.key) == (5, 8, 11, "to")
