"""Delays and skips through time against a loop that remembers everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elman
from comparing import assert_same, leaves
from elman.cells import ElmanCell, GRUCell, LSTMCell
from elman.combinators import Stack, Wrapper, step
from elman.combinators.delay import Delay
from elman.combinators.time_skip import TimeSkip
from elman.errors import CellError, OptionError
from elman.paths import path_lengths

F64 = torch.float64
T, B, D, H = 7, 2, 3, 4


def found(cell: nn.Module, xs: Tensor) -> dict[str, Tensor]:
    """Outputs, final states and every gradient of a cell from where it begins."""
    ys, final = elman.scan(cell, xs)
    return gradients(cell, xs, ys, leaves(final))


def gradients(cell: nn.Module, xs: Tensor, ys: Tensor, final: list[Tensor]) -> dict[str, Tensor]:
    values = {"y": ys} | {f"final {i}": leaf for i, leaf in enumerate(final)}
    weights = dict(cell.named_parameters()) | {"x": xs}
    ends = torch.cat([value.flatten() for value in values.values()])
    loss = (ends * torch.linspace(-1, 1, len(ends), dtype=F64)).sum()
    grads = torch.autograd.grad(loss, list(weights.values()))
    return values | {f"gradient of {name}": grad for name, grad in zip(weights, grads, strict=True)}


@pytest.fixture
def xs() -> Tensor:
    torch.manual_seed(3)
    return torch.randn(T, B, D, dtype=F64, requires_grad=True)


@pytest.mark.parametrize("d", [1, 2, 3, T, T + 2])
def test_delay_is_d_interleaved_recurrences(xs: Tensor, d: int) -> None:
    inner = ElmanCell(D, H, dtype=F64)
    ys: list[Tensor] = []
    for t in range(T):
        h = ys[t - d] if t >= d else torch.zeros(B, H, dtype=F64)
        a = xs[t] @ inner.weight_ih.T + inner.bias_ih + h @ inner.weight_hh.T + inner.bias_hh
        ys.append(a.tanh())
    final = [ys[t] if t >= 0 else torch.zeros(B, H, dtype=F64) for t in range(T - d, T)]
    assert_same(found(Delay(inner, d), xs), gradients(Delay(inner, d), xs, torch.stack(ys), final))


def test_an_interleaved_recurrence_runs_alone(xs: Tensor) -> None:
    cell = LSTMCell(D, H, dtype=F64)
    ys, _ = elman.scan(Delay(cell, 2), xs)
    for part in (slice(0, None, 2), slice(1, None, 2)):
        torch.testing.assert_close(ys[part], elman.scan(cell, xs[part])[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("d", [1, 3])
def test_the_state_is_exactly_what_the_delay_needs(d: int) -> None:
    options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": F64}
    assert sum(leaf.numel() for leaf in leaves(Delay(GRUCell(D, H), d).initial_state(B, **options))) == d * B * H
    skip = TimeSkip(LSTMCell(D + H, H), d).initial_state(B, **options)
    assert sum(leaf.numel() for leaf in leaves(skip)) == (2 + d) * B * H


@pytest.mark.parametrize("d", [1, 2, 4])
def test_skip_reads_the_output_of_d_steps_ago(xs: Tensor, d: int) -> None:
    inner = ElmanCell(D + H, H, dtype=F64)
    u, skip = inner.weight_ih[:, :D], inner.weight_ih[:, D:]
    zero = torch.zeros(B, H, dtype=F64)
    ys = [zero] * d  # from y(1 - d) to y(0)
    for x in xs:
        a = x @ u.T + ys[-d] @ skip.T + inner.bias_ih + ys[-1] @ inner.weight_hh.T + inner.bias_hh
        ys.append(a.tanh())
    cell = TimeSkip(inner, d)
    assert (cell.input_size, cell.output_size) == (D, H)
    assert_same(found(cell, xs), gradients(cell, xs, torch.stack(ys[d:]), [ys[-1], *ys[-d:]]))


def test_skip_is_built_as_wide_as_it_reads() -> None:
    cell = TimeSkip.build(D, lambda size: GRUCell(size, H), d=2)
    assert (cell.input_size, cell.cell.input_size, cell.output_size) == (D, D + H, H)


def test_an_influence_takes_one_application_for_d_steps() -> None:
    xs = torch.zeros(2, 1, D)
    plain, delay = path_lengths(ElmanCell(D, H), xs), path_lengths(Delay(ElmanCell(D, H), 4), xs)
    assert (plain.over(12), delay.over(12), delay.over(11)) == ((13, 13), (4, 4), None)
    assert path_lengths(TimeSkip(ElmanCell(D + H, H), 4), xs).over(12) == (4, 13)
    dilated = Stack([Delay(ElmanCell(D if d == 1 else H, H), d) for d in (1, 2, 4, 8)])
    assert path_lengths(dilated, xs).over(15) == (8, 19)


class Late(Wrapper):
    """A user's cell around a cell, with a state of its own."""

    def initial_state(self, batch: int, **options: Any) -> Any:
        return {"inner": super().initial_state(batch, **options), "last": torch.zeros(batch, D, dtype=F64)}

    def forward(self, x: Any, state: Any, constants: Any = None) -> Any:
        y, inner = step(self.cell, state["last"], state["inner"])
        return y, {"inner": inner, "last": x}


def test_around_a_users_cell(xs: Tensor) -> None:
    late, cell = Late(GRUCell(D, H, dtype=F64)), GRUCell(D, H, dtype=F64)
    late.cell.load_state_dict(cell.state_dict())
    ys, state = elman.scan(Delay(late, 2), xs, backend="interpret")
    before = torch.cat([torch.zeros(2, B, D, dtype=F64), xs[:-2]])
    torch.testing.assert_close(ys, elman.scan(Delay(cell, 2), before)[0], rtol=1e-12, atol=1e-12)
    assert torch.equal(state[1]["last"], xs[-1])


@pytest.mark.parametrize("d", [0, -1, 1.5, "2", True])
def test_a_delay_is_a_number_of_steps(d: Any) -> None:
    with pytest.raises(OptionError, match="Delay: d must be a positive integer, got"):
        Delay(ElmanCell(D, H), d)
    with pytest.raises(OptionError, match="TimeSkip: d must be a positive integer, got"):
        TimeSkip(ElmanCell(D + H, H), d)


def test_a_skip_needs_a_cell_that_reads_it() -> None:
    with pytest.raises(CellError, match=r"ElmanCell reads 3 features and gives 4.*input_size = D \+ 4"):
        TimeSkip(ElmanCell(D, H), 2)
    with pytest.raises(CellError, match="Delay goes around a cell; got the class ElmanCell"):
        Delay(ElmanCell, 2)  # type: ignore[arg-type]
