"""Affine loops: which are recognised, and that running them in chunks of time changes nothing but the speed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elman
from comparing import assert_same, by_hand, differentiated, everything, operations, scan_by
from elman.cells import ElmanCell, GRUCell, LRUCell, LSTMCell, MinGRUCell, MinLSTMCell, QRNNCell, SRUCell
from elman.compiler import affine, cache
from elman.compiler.affine import chunks, is_affine

D, H, B = 3, 4, 2
F64 = torch.float64
AFFINE = {kind.__name__: kind for kind in (LRUCell, MinGRUCell, MinLSTMCell, QRNNCell, SRUCell)}


class Forms(nn.Module):
    """States that are affine, each written in another way, with a constant, a number and a learned factor in them."""

    def __init__(self, *_: int) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.rand(D, dtype=F64))

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(batch, D, device=device, dtype=dtype) for _ in range(5))

    def forward(self, x: Tensor, state: tuple[Tensor, ...], constant: Tensor | None = None) -> tuple[Tensor, Any]:
        a, b, c, d, e = state
        a = self.rate * a + x
        b = x - b / 2
        c = -(c * torch.sigmoid(x)) + (1.0 if constant is None else constant)
        d, e = 0.5 * d - 0.8 * e, (e + x) * 0.5 + 0.8 * d  # two that mix
        return torch.cat([a, b, c, d, e], -1), (a, b, c, d, e)


class Grows(nn.Module):
    """s(t) = 10³⁰ s(t-1) + x(t): the product of a few factors overflows."""

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.zeros(batch, 1, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = 1e30 * state + x
        return state, state


class Squares(Grows):
    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = state * (0.1 * state) + x
        return state, state


class Averages(Grows):
    """Its factor depends on a state: on that of another loop it may, on its own it may not."""

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        s = torch.zeros(batch, 1, device=device, dtype=dtype)
        return s, s.clone()

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        a, b = state
        a = torch.tanh(a + x)
        b = torch.sigmoid(a) * b + x
        return b, (a, b)


def sources(cell: nn.Module, steps: int, width: int = D) -> dict[str, Any]:
    torch.manual_seed(steps)
    state = cell.initial_state(B, device=torch.device("cpu"), dtype=F64)
    state = torch.utils._pytree.tree_map(lambda s: torch.randn_like(s).requires_grad_(), state)
    xs = torch.randn(steps, B, width, dtype=F64).requires_grad_()
    return {"xs": xs, "state": state, "constants": None}


def affine_loops(cell: nn.Module, width: int = D) -> list[list[bool]]:
    found = differentiated(cell.double(), sources(cell, 2, width))
    return [[is_affine(p.step, loop) for loop in p.loops] for p in (found.forward, found.adjoint)]


@pytest.mark.parametrize("kind", AFFINE.values(), ids=AFFINE)
def test_recognised_in_both_directions(kind: Any) -> None:
    assert affine_loops(kind(D, H)) == [[True], [True]]


@pytest.mark.parametrize(
    "cell",
    [GRUCell(D, H), ElmanCell(D, H), ElmanCell(D, H, squash="identity"), LSTMCell(D, H), SRUCell(D, H, peepholes=True)],
    ids=lambda cell: type(cell).__name__,
)
def test_not_affine_unit_by_unit(cell: nn.Module) -> None:
    assert affine_loops(cell)[0] == [False]


def test_other_forms() -> None:
    assert affine_loops(Forms()) == [[True] * 4, [True] * 4]
    assert affine_loops(Squares(), 1)[0] == [False]
    assert affine_loops(Averages(), 1)[0] == [False, True]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks from two steps on."""
    monkeypatch.setattr(affine, "FEWEST_STEPS", 2)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", [*AFFINE.values(), Forms], ids=[*AFFINE, "Forms"])
def test_equals_the_plain_loop(kind: Any, reverse: bool) -> None:
    cell = kind(D, H).double()
    for steps in (1, 2, 3, 63, 64, 65, 1000):
        given = sources(cell, steps)
        expected = everything(scan_by("reference"), cell, given, reverse=reverse)
        assert_same(everything(scan_by("interpret"), cell, given, reverse=reverse), expected)


@pytest.mark.usefixtures("short")
def test_with_constants_for_each_sequence() -> None:
    cell = Forms()
    given = sources(cell, 40) | {"constants": torch.randn(B, D, dtype=F64).requires_grad_()}
    assert_same(everything(scan_by("interpret"), cell, given), everything(by_hand, cell, given))


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("options", [{"lengths": [50, 33]}, {"lengths": [50, 50]}, {"remat": 20}, {"remat": "auto"}])
def test_other_ways_to_run(options: dict[str, Any]) -> None:
    cell = LRUCell(D, H, dtype=F64)
    given = sources(cell, 50)
    expected = everything(scan_by("reference"), cell, given, lengths=options.get("lengths"))
    assert_same(everything(scan_by("interpret"), cell, given, **options), expected)


@pytest.mark.usefixtures("short")
def test_carried_on_from_piece_to_piece() -> None:
    cell = QRNNCell(D, H, dtype=F64)
    given = sources(cell, 70)
    whole, last = elman.scan(cell, given["xs"], given["state"])
    first, state = elman.scan(cell, given["xs"][:33], given["state"])
    second, state = elman.scan(cell, given["xs"][33:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)


def test_what_overflows_runs_step_by_step() -> None:
    xs = torch.zeros(100, B, 1)
    assert not elman.scan(Grows(), xs)[0].any()
    xs[90, 0] = 1
    ys, _ = elman.scan(Grows(), xs)
    assert ys[:91].isfinite().all()
    assert ys[95:, 0].isinf().all()
    assert not ys[:, 1].any()


@pytest.mark.parametrize("first", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("leaf", [0, 3, 4])
def test_what_is_not_finite_spreads_as_in_the_plain_loop(leaf: int, first: float) -> None:
    torch.manual_seed(0)
    cell, xs = Forms(), torch.randn(40, B, D, dtype=F64)
    state = list(cell.initial_state(B, device=xs.device, dtype=F64))
    state[leaf][0, 1] = first
    expected = by_hand(cell, xs, tuple(state))
    found = elman.scan(cell, xs, tuple(state), backend="interpret")
    for one, other in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_a_gate_that_is_shut_keeps_what_comes_after_exact() -> None:
    cell = MinGRUCell(1, 1, dtype=F64)
    with torch.no_grad():
        for parameter, value in zip(cell.parameters(), ([[0.0], [1.0]], [-800.0, 0.0]), strict=True):  # u is 0
            parameter.copy_(torch.tensor(value))
    xs = torch.randn(200, B, 1, dtype=F64)
    assert elman.scan(cell, xs, torch.full((B, 1), 1e9, dtype=F64))[0].equal(xs)


def test_many_steps_in_few_operations() -> None:
    cell, xs = MinGRUCell(D, H), torch.randn(1000, B, D)
    elman.scan(cell, xs, backend="interpret")
    assert operations(lambda: elman.scan(cell, xs, backend="interpret")).total() < 700
    wide = torch.randn(1000, affine.MOST_NUMBERS // H + 1, D)
    assert operations(lambda: elman.scan(cell, wide, backend="interpret")).total() > 2000


@pytest.mark.parametrize("steps", [1, 2, 3, 31, 32, 63, 64, 65, 997, 1000, 4096])
def test_chunks_cover_nearly_all_steps(steps: int) -> None:
    count, length = chunks(steps, 10)
    if steps < affine.FEWEST_STEPS:
        assert (count, length) == (0, 0)
    else:
        assert 0 <= steps - count * length < length
        assert 2 * length + count < 5 * steps**0.5
    assert chunks(steps, affine.MOST_NUMBERS + 1) == chunks(steps, 0) == (0, 0)


@pytest.mark.filterwarnings("ignore:the loop over .* there is no machine code")
def test_explain_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elman.compiler.llvm.kernel.chosen", lambda: None)  # where there is machine code, it runs
    cache._programs.clear()
    xs = torch.randn(5, B, D)
    words = "affine: scanned in parallel over time where a step is short of work"
    assert elman.explain(MinGRUCell(D, H), xs).count(words) == 2
    assert words not in elman.explain(GRUCell(D, H), xs)
