"""Masks that stay the same over time, against the formula written out with the masks that were drawn."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elman
from elman.cells import ElmanCell, GRUCell, LSTMCell, SLSTMCell
from elman.combinators import Leaky, Residual, Stack, VariationalDropout, WeightDrop
from elman.drawn import DropMask, Dropout, bernoulli
from elman.errors import OptionError
from elman.spec import make_cell

D, H, T, B = 3, 4, 7, 5
F64 = torch.float64


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def drawn(cell: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[tuple[DropMask, Tensor]]:
    """All masks that are drawn from here on, with the module that drew each."""
    found: list[tuple[DropMask, Tensor]] = []
    draw = DropMask.draw

    def spy(self: DropMask, batch: int, like: Tensor) -> Tensor:
        found.append((self, draw(self, batch, like)))
        return found[-1][1]

    monkeypatch.setattr(DropMask, "draw", spy)
    return found


@pytest.mark.parametrize("backend", ["reference", "interpret"])
def test_variational_dropout_is_its_formula(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = VariationalDropout(ElmanCell(D, H, dtype=F64), input=0.4, state=0.5, output=0.3)
    found = drawn(cell, monkeypatch)
    xs = torch.randn(T, B, D, dtype=F64, requires_grad=True)
    ys, last = elman.scan(cell, xs, backend=backend)
    assert len(found) == 3
    masks = {name: next(value for module, value in found if module is cell.masks[name]) for name in cell.masks}
    for name, width in (("input", D), ("state", H), ("output", H)):
        p = cell.p[name]
        assert masks[name].shape == (B, width)
        assert set(masks[name].unique().tolist()) <= {0.0, torch.tensor(1 / (1 - p), dtype=F64).item()}
    h, expected, inner = torch.zeros(B, H, dtype=F64), [], cell.cell
    for x in xs:
        a = (masks["input"] * x) @ inner.weight_ih.T + (masks["state"] * h) @ inner.weight_hh.T
        h = torch.tanh(a + inner.bias_ih + inner.bias_hh)
        expected.append(masks["output"] * h)
    same(ys, torch.stack(expected))
    same(last, h)
    wanted = [xs, *cell.parameters()]
    same(torch.autograd.grad(ys.sum(), wanted), torch.autograd.grad(torch.stack(expected).sum(), wanted))


@pytest.mark.parametrize("backend", ["reference", "interpret"])
def test_weight_drop_is_its_formula(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = WeightDrop(LSTMCell(D, H, dtype=F64), 0.5, weights="weight_hh weight_ih")
    found = drawn(cell, monkeypatch)
    xs = torch.randn(T, B, D, dtype=F64, requires_grad=True)
    ys, _ = elman.scan(cell, xs, backend=backend)
    assert [tuple(value.shape) for _, value in found] == [(4 * H, H), (4 * H, D)]
    plain = copy.deepcopy(cell.cell)
    with torch.no_grad():
        plain.weight_hh.mul_(found[0][1])
        plain.weight_ih.mul_(found[1][1])
    expected, _ = elman.scan(plain, xs, backend="reference")
    same(ys, expected)
    weight, input = torch.autograd.grad(ys.sum(), [cell.cell.weight_hh, xs])
    weight_kept, input_kept = torch.autograd.grad(expected.sum(), [plain.weight_hh, xs])
    same(weight, weight_kept * found[0][1])
    same(input, input_kept)


CELLS = {
    "variational": lambda: VariationalDropout(LSTMCell(D, H), 0.3, 0.3, 0.3),
    "weight drop": lambda: WeightDrop(GRUCell(D, H), 0.4),
    "both in a stack": lambda: Stack(
        [VariationalDropout(WeightDrop(LSTMCell(D, H)), 0.2), VariationalDropout(ElmanCell(H, 2), output=0.5)]
    ),
}
each = pytest.mark.parametrize("make", CELLS.values(), ids=CELLS)


@each
def test_every_scan_draws_anew_and_evaluation_does_not_draw(make: Any) -> None:
    torch.manual_seed(0)
    cell, xs = make(), torch.randn(T, B, D)
    assert not torch.equal(elman.scan(cell, xs)[0], elman.scan(cell, xs)[0])
    torch.manual_seed(1)
    first = elman.scan(cell, xs, backend="interpret")[0]
    torch.manual_seed(1)
    torch.testing.assert_close(elman.scan(cell, xs, backend="reference")[0], first)
    cell.eval()
    torch.testing.assert_close(elman.scan(cell, xs)[0], elman.scan(cell, xs, backend="reference")[0])
    assert torch.equal(elman.scan(cell, xs)[0], elman.scan(cell, xs)[0])


@pytest.mark.parametrize("backend", ["reference", "interpret"])
def test_masks_are_the_same_at_every_step_and_differ_between_sequences(backend: str) -> None:
    """With no memory and the same input at every step, an output changes only where a mask does."""
    torch.manual_seed(3)
    cell = VariationalDropout(ElmanCell(20, 30), input=0.5, output=0.5)
    nn.init.zeros_(cell.cell.weight_hh)
    ys, _ = elman.scan(cell, torch.ones(T, B, 20), backend=backend)
    assert torch.equal(ys, ys[:1].expand_as(ys))
    assert not any(torch.equal(ys[0, 0], ys[0, b]) for b in range(1, B))
    assert not any(mask.drawn_once.numel() for mask in cell.masks.values())  # nothing stays behind


@each
@pytest.mark.parametrize("options", [{"lengths": [3, 7, 1, 7, 5]}, {"reverse": True}, {"remat": 3}])
def test_with_every_option(make: Any, options: dict[str, Any]) -> None:
    cell, results = make().double(), []
    xs = torch.randn(T, B, D, dtype=F64, requires_grad=True)
    for backend in ("reference", "interpret"):
        torch.manual_seed(2)
        ys, _ = elman.scan(cell, xs, backend=backend, **options)
        results.append([ys, *torch.autograd.grad(ys.square().sum(), [xs, *cell.parameters()], allow_unused=True)])
    same(results[1], results[0])


@each
def test_second_derivatives_see_the_same_masks(make: Any) -> None:
    cell = make().double()
    xs = torch.randn(3, 2, D, dtype=F64, requires_grad=True)

    def scan(xs: Tensor) -> Tensor:
        torch.manual_seed(4)
        return elman.scan(cell, xs, backend="interpret")[0]

    assert torch.autograd.gradcheck(scan, xs)
    assert torch.autograd.gradgradcheck(scan, xs)


@each
def test_one_graph_under_torch_compile(make: Any) -> None:
    cell, xs = make(), torch.randn(T, B, D)
    compiled = torch.compile(lambda xs: elman.scan(cell, xs)[0], fullgraph=True, backend="aot_eager")
    torch.manual_seed(5)
    first = compiled(xs)
    assert not torch.equal(compiled(xs), first)
    cell.eval()
    torch._dynamo.reset()
    torch.testing.assert_close(compiled(xs), elman.scan(cell, xs)[0])


@each
def test_a_step_by_itself_copying_and_saving(make: Any) -> None:
    cell = make()
    state = cell.initial_state(B, device=torch.device("cpu"), dtype=torch.float32)
    assert cell(torch.randn(B, D), state)[0].shape[0] == B
    assert not any("drawn_once" in name for name in cell.state_dict())
    xs = torch.randn(T, B, D)
    for other in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        torch.manual_seed(6)
        expected = elman.scan(cell, xs)[0]
        torch.manual_seed(6)
        assert torch.equal(elman.scan(other, xs)[0], expected)


@pytest.mark.parametrize("backend", ["reference", "interpret"])
def test_a_scan_inside_a_step_draws_once_for_each_of_its_scans(backend: str) -> None:
    class Words(nn.Module):
        """Reads a word at every step, (B, letters, D), letter by letter, and gives what was made of each letter."""

        def __init__(self) -> None:
            super().__init__()
            self.letters = VariationalDropout(ElmanCell(D, H, dtype=F64), output=0.5)

        def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            ys, _ = elman.scan(self.letters, x.transpose(0, 1), state)
            return ys.transpose(0, 1), state

    torch.manual_seed(0)
    ys, _ = elman.scan(Words(), torch.randn(T, B, 6, D, dtype=F64), torch.zeros(B, H, dtype=F64), backend=backend)
    kept = ys != 0  # (T, B, letters, H)
    same(kept, kept[:, :, :1].expand_as(kept))
    assert not kept.all()
    assert not kept[0].equal(kept[1])


def test_mistakes_and_specs() -> None:
    with pytest.raises(OptionError, match="VariationalDropout: state must be in"):
        VariationalDropout(GRUCell(D, H), state=1.0)
    with pytest.raises(OptionError, match="WeightDrop: p must be in"):
        WeightDrop(GRUCell(D, H), -0.1)
    with pytest.raises(OptionError, match="unknown parameter of GRUCell 'weight_h'"):
        WeightDrop(GRUCell(D, H), weights="weight_h")
    cell = make_cell("variational_dropout(weight_drop(lstm(7), 0.4), input=0.1, output=0.2)", 5, 8)
    assert (cell.p, cell.cell.p) == ({"input": 0.1, "state": 0.0, "output": 0.2}, 0.4)


@pytest.mark.parametrize("make", [GRUCell, nn.GRUCell, lambda d, h: Residual(Leaky(ElmanCell(d, h)))])
def test_no_mask_on_a_state_that_is_handed_on(make: Any) -> None:
    """A factor 1 / (1 - p) at every step would have a unit whose gate stays open grow without bound."""
    VariationalDropout(make(D, H), input=0.2, output=0.2)
    with pytest.raises(OptionError, match="hands its state on"):
        VariationalDropout(make(D, H), state=0.2)


@pytest.mark.parametrize("make", [ElmanCell, LSTMCell, nn.LSTMCell, SLSTMCell])
def test_states_stay_small_under_a_mask(make: Any) -> None:
    torch.manual_seed(0)
    cell = VariationalDropout(make(D, 32), state=0.5)
    ys, _ = elman.scan(cell, torch.randn(1, 1, D).expand(300, 4, D))
    assert ys.abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.97, 1.0])
def test_ones_come_as_often_as_they_should(p: float, dtype: torch.dtype) -> None:
    ones = bernoulli((400, 500), p, dtype, torch.device("cpu"))
    assert ones.dtype == dtype
    assert set(ones.unique().tolist()) <= {0.0, 1.0}
    assert abs(float(ones.double().mean()) - p) <= 5 * (p * (1 - p) / ones.numel()) ** 0.5
    rows, columns = ones.double().mean(1), ones.double().mean(0)
    assert float((rows - p).abs().max()) <= 6 * (p * (1 - p) / 500) ** 0.5
    assert float((columns - p).abs().max()) <= 6 * (p * (1 - p) / 400) ** 0.5


def test_dropout_is_that_of_pytorch_with_another_mask() -> None:
    x = torch.randn(50, 40, dtype=torch.float64, requires_grad=True)
    ours = Dropout(0.3)
    assert ours.eval()(x) is x
    torch.manual_seed(3)
    y = ours.train()(x)
    torch.manual_seed(3)
    assert torch.equal(ours(x), y)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / 0.7)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, kept.double() / 0.7)
    assert 0.6 < float(kept.double().mean()) < 0.8
    assert not Dropout(1.0)(x).any()
    assert Dropout(0.0)(x) is x or torch.equal(Dropout(0.0)(x), x)
