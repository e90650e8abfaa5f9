"""Attention against its formula, one place of the memory at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import elman
from elman.cells import ElmanCell, GRUCell
from elman.combinators import Attend, Stack
from elman.errors import InputError, OptionError
from elman.spec import make_cell

D, H, S, M, T, B = 3, 4, 5, 2, 6, 3


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def by_hand(cell: Attend, xs: Tensor, memory: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Every sequence alone, every e_j alone, and the softmax written out: (ys, weights)."""
    inner, ys, weights = cell.cell, [], []
    for b in range(B):
        h = q = torch.zeros(H, dtype=torch.float64)
        places = [j for j in range(S) if mask[b, j]] or list(range(S))
        for x in xs[:, b]:
            if cell.score == "additive":
                w, u, v = cell.query.weight, cell.memory.weight, cell.energy.weight[0]
                e = torch.stack([v @ torch.tanh(w @ q + u @ memory[b, j]) for j in places])
            else:
                e = torch.stack([(cell.query.weight @ q) @ memory[b, j] for j in places])
            alpha = torch.exp(e) / torch.exp(e).sum()
            c = sum(a * memory[b, j] for a, j in zip(alpha, places, strict=True))
            h = torch.tanh(inner.weight_ih @ torch.cat([x, c]) + inner.bias_ih + inner.weight_hh @ h + inner.bias_hh)
            q = h
            ys.append(h)
            weights.append(torch.zeros(S, dtype=torch.float64).index_put((torch.tensor(places),), alpha))
    return torch.stack(ys).view(B, T, H).transpose(0, 1), torch.stack(weights).view(B, T, S).transpose(0, 1)


@pytest.mark.parametrize("score", ["additive", "multiplicative"])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_formula(score: str, masked: bool) -> None:
    cell = Attend(ElmanCell(D + M, H, dtype=torch.float64), M, score=score).double()
    xs, memory = numbers(T, B, D), numbers(B, S, M)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0, 0, 1, 0, 0]], dtype=torch.bool) if masked else None
    expected, alpha = by_hand(cell, xs, memory, torch.ones(B, S, dtype=torch.bool) if mask is None else mask)
    constants = memory if mask is None else (memory, mask)
    ys, _, recording = elman.scan(cell, xs, constants=constants, record=True, backend="interpret")
    torch.testing.assert_close(ys, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(recording.values["attention"], alpha, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(ys)
    wanted = [xs, memory, *cell.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad((ys * weights).sum(), wanted),
        torch.autograd.grad((expected * weights).sum(), wanted),
        rtol=1e-9,
        atol=1e-10,
    )


def test_what_is_masked_is_never_read() -> None:
    cell = Attend(GRUCell(D + M, H), M)
    xs, memory = torch.randn(T, B, D), torch.randn(B, S, M)
    mask = torch.arange(S).expand(B, S) < 3
    ys, _ = elman.scan(cell, xs, constants=(memory, mask))
    other, _ = elman.scan(cell, xs, constants=(memory.masked_fill(~mask[..., None], 1e4), mask))
    torch.testing.assert_close(ys, other)
    short, _ = elman.scan(cell, xs, constants=memory[:, :3])
    torch.testing.assert_close(ys, short)


def test_the_map_of_the_memory_is_computed_once() -> None:
    text = elman.explain(Attend(GRUCell(D + M, H), M), torch.zeros(T, B, D), constants=torch.zeros(B, S, M))
    assert "mm" in text[text.index("once per call") : text.index("forward")], text


def test_a_row_with_nothing_to_read_weighs_all_alike() -> None:
    cell = Attend(ElmanCell(D + M, H), M)
    *_, recording = elman.scan(
        cell, torch.randn(T, B, D), constants=(torch.randn(B, S, M), torch.zeros(B, S, dtype=torch.bool)), record=True
    )
    torch.testing.assert_close(recording.values["attention"], torch.full((T, B, S), 1 / S))


def test_in_a_stack_two_attend_to_memories_of_their_own() -> None:
    cell = Stack([Attend(GRUCell(D + M, H), M, key="a"), Attend(GRUCell(H + M, H), M, key="b")])
    constants = {"a": torch.randn(B, S, M), "b": torch.randn(B, S + 2, M)}
    ys, _, recording = elman.scan(cell, torch.randn(T, B, D), constants=constants, record=True)
    assert ys.shape == (T, B, H)
    assert recording.values["0.attention"].shape == (T, B, S)
    assert recording.values["1.attention"].shape == (T, B, S + 2)


def test_mistakes() -> None:
    inner = GRUCell(D + M, H)
    with pytest.raises(OptionError, match="did you mean 'additive'"):
        Attend(inner, M, score="aditive")
    with pytest.raises(OptionError, match="attention_size must be a positive integer"):
        Attend(inner, M, attention_size=-1)
    cell = Attend(inner, M)
    with pytest.raises(InputError, match=r"needs a memory \(B, S, 2\) in constants; got \(3, 5, 7\)"):
        elman.scan(cell, torch.zeros(T, B, D), constants=torch.zeros(B, S, 7))
    with pytest.raises(InputError, match=r"mask of booleans \(3, 5\).*got torch.float32 \(3, 4\)"):
        elman.scan(cell, torch.zeros(T, B, D), constants=(torch.zeros(B, S, M), torch.zeros(B, 4)))


def test_by_spec() -> None:
    cell = make_cell("attend(gru(7), 6, score=multiplicative, key=source)", 5, 8)
    assert isinstance(cell, Attend)
    assert (cell.input_size, cell.output_size, cell.cell.input_size) == (5, 7, 11)
