"""States that are handed on turn in rings: delays of any length, and whatever else hands its states on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from llvmcells import given
from torch import Tensor, nn

from comparing import assert_same, differentiated, everything, scan_by
from elman.cells import ElmanCell, GRUCell, LSTMCell
from elman.combinators import Delay, Stack
from elman.compiler.compiled import kernels_of
from elman.compiler.llvm import kernel
from elman.compiler.llvm.items import Lowered, Map, Product
from elman.compiler.llvm.rings import chains

F64 = torch.float64
I, H = 3, 5


class Handing(nn.Module):
    """A user's cell with states of one width."""

    count = 3

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(I + 2 * H, H, dtype=F64)

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(batch, H, device=device, dtype=dtype) for _ in range(self.count))

    def new(self, *parts: Tensor) -> Tensor:
        return torch.tanh(self.mix(torch.cat(parts, -1)))


class Between(Handing):
    """Reads h(t-1) and h(t-3)."""

    def forward(self, x: Tensor, state: Any) -> Any:
        third, second, first = state
        h = self.new(x, first, third)
        return h, (second, first, h)


class Stored(Handing):
    """Also gives out what it hands on, and the oldest, before and after that is replaced."""

    def forward(self, x: Tensor, state: Any) -> Any:
        third, second, first = state
        h = self.new(x, third, second)
        return (h, third, second * h), (second, first, h * third)


class Swapped(Handing):
    """Two states change places at every step; a third reads one of them, then leaves its mark on the other."""

    def forward(self, x: Tensor, state: Any) -> Any:
        a, b, c = state
        h = self.new(x, a, c)
        return h, (b, a, h + b)


class Circle(Handing):
    """Four states that change places with one another and never change: all that is done is to read."""

    count = 4

    def forward(self, x: Tensor, state: Any) -> Any:
        a, b, c, d = state
        return self.new(x, a, c), (b, c, d, a)


class Fork(Handing):
    """Two chains that end in the same state, one shorter than the other."""

    count = 5

    def forward(self, x: Tensor, state: Any) -> Any:
        a, b, c, other, last = state
        h = self.new(x, a, other)
        return h, (b, c, last, last, h)


class IntoCircle(Handing):
    """What leads into a circle."""

    count = 5

    def forward(self, x: Tensor, state: Any) -> Any:
        a, b, c, d, e = state
        h = self.new(x, a, e)
        return h, (b, c, d, b, h + a)


class Widths(nn.Module):
    """Chains of several widths and types, one of them of numbers that stand in a square."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ElmanCell(I, H, dtype=F64)

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Any:
        square = [torch.zeros(batch, H, H, device=device, dtype=dtype) for _ in range(2)]
        count = [torch.arange(2, device=device).expand(batch, 2).clone() + i for i in range(3)]
        return [torch.zeros(batch, H, device=device, dtype=dtype) for _ in range(2)], square, count

    def forward(self, x: Tensor, state: Any) -> Any:
        (h, g), (m, n), (i, j, k) = state
        y, new = self.inner(x, torch.tanh(h + m.sum(-1)))
        outer = 0.5 * m + torch.tanh(new.unsqueeze(1) * new.unsqueeze(2)) * (i[:, :1, None] % 2)
        return y, ([g, new], [n, outer], [j, k, i + 1])


USERS = [Between, Stored, Swapped, Circle, Fork, IntoCircle, Widths]


def stack() -> nn.Module:
    return Stack([Delay(GRUCell(I if d == 1 else H, H, dtype=F64), d) for d in (1, 2, 4)])


@pytest.fixture
def cell() -> Callable[[Any], nn.Module]:
    def made(make: Any) -> nn.Module:
        torch.manual_seed(31)
        return make()

    return made


def check(cell: nn.Module, steps: int, batch: int, **options: Any) -> None:
    sources = given(cell, steps, batch, I, F64)
    expected = everything(scan_by("reference"), cell, sources, **options)
    assert_same(everything(scan_by("llvm"), cell, sources, **options), expected)


WAYS = {
    "all alike": {},
    "in reverse": {"reverse": True},
    "lengths": {"lengths": lambda steps: [steps, 0, 1, steps // 2, max(steps - 1, 0)]},
    "lengths in reverse": {"lengths": lambda steps: [0, 1, steps, steps // 2, max(steps - 1, 0)], "reverse": True},
}
ways = pytest.mark.parametrize("way", WAYS)


def options_of(way: str, steps: int) -> dict[str, Any]:
    return {name: value(steps) if callable(value) else value for name, value in WAYS[way].items()}


@ways
@pytest.mark.parametrize("d", [1, 2, 3, 7])
@pytest.mark.parametrize("make", [ElmanCell, LSTMCell])
def test_delay_of_any_length(make: Any, d: int, way: str, cell: Any) -> None:
    """Over fewer steps than the delay, as many, and more."""
    made = cell(lambda: Delay(make(I, H, dtype=F64), d))
    for steps in sorted({1, max(d - 1, 1), d, d + 1, 2 * d + 3}):
        check(made, steps, 5, **options_of(way, steps))


@pytest.mark.parametrize("d", [2, 3])
def test_one_sequence(d: int, cell: Any) -> None:
    check(cell(lambda: Delay(LSTMCell(I, H, dtype=F64), d)), 8, 1)


@ways
@pytest.mark.parametrize("make", [*USERS, stack])
def test_cell_that_hands_its_states_on(make: Any, way: str, cell: Any) -> None:
    check(cell(make), 9, 5, **options_of(way, 9))


@pytest.fixture(params=["rows", "units"])
def two_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Two threads that share the rows of a step, or its units, however little there is to do."""
    monkeypatch.setattr(kernel, "_WORK_TO_SHARE", 0)
    monkeypatch.setattr(kernel, "_WORK_TO_MEET", 0)
    monkeypatch.setattr(kernel, "_FEW", 0 if request.param == "rows" else 100)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield str(request.param)
    torch.set_num_threads(before)


@ways
@pytest.mark.parametrize("make", [Between, Fork, lambda: Delay(LSTMCell(I, H, dtype=F64), 3)])
def test_threads_look_in_the_same_slots(make: Any, way: str, two_threads: str, cell: Any) -> None:
    check(cell(make), 7, 5, **options_of(way, 7))


@ways
@pytest.mark.parametrize("make", [Between, lambda: Delay(ElmanCell(I, H, dtype=F64), 3)])
def test_a_call_in_pieces_goes_on_where_it_was(make: Any, way: str, cell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one step: the ring must not begin anew with each."""
    monkeypatch.setattr(kernel, "_WORK_OF_A_CALL", 1)
    check(cell(make), 8, 5, **options_of(way, 8))


def lowered(cell: nn.Module) -> tuple[list[Lowered], list[Lowered]]:
    """The loops of either direction."""
    rule = differentiated(cell, given(cell, 3, 2, I, F64))
    rule.runners(False, True)
    forward, adjoint = ([made.lowered for made in kernels_of(p).made.values()] for p in (rule.forward, rule.adjoint))
    return forward, adjoint


def stores(step: Lowered) -> list[str]:
    """The names of the states that a step writes to, as often as it does."""
    places = [a for item in step.items if isinstance(item, Map) for _, a in item.stores]
    places += [item.out for item in step.items if isinstance(item, Product)]
    return [a.buffer.name for a in places if a.buffer.role == "state"]


def work(step: Lowered) -> list[Any]:
    """How much a step does: the operations and stores of every map, and the sizes of every product."""
    return [
        (item.k, item.n) if isinstance(item, Product) else (item.shape, len(item.ops), len(item.stores))
        for item in step.items
        if isinstance(item, (Map, Product))
    ]


@pytest.mark.parametrize(("make", "leaves"), [(ElmanCell, 1), (GRUCell, 1), (LSTMCell, 2)])
def test_a_step_costs_the_same_for_any_delay(make: Any, leaves: int, cell: Any) -> None:
    """One slot of every ring is written, and no other: what waits is not touched."""
    short, long = (lowered(cell(lambda d=d: Delay(make(I, H, dtype=F64), d))) for d in (2, 40))
    for (few,), (many,) in zip(short, long, strict=True):  # one loop in each direction
        assert work(few) == work(many)
        slots = [buffer.slot for buffer in many.buffers if buffer.slot]
        assert len(slots) == 40 * leaves
        assert sorted((slot.ring, slot.number) for slot in slots) == [(r, n) for r in range(leaves) for n in range(40)]
        assert len(set(stores(many))) == len(stores(many)) == leaves


@pytest.mark.parametrize(("make", "count"), [(Between, 1), (Swapped, 1), (Circle, 0), (Fork, 2), (IntoCircle, 1)])
def test_a_step_writes_what_is_new(make: Any, count: int, cell: Any) -> None:
    """One state for every chain that is not a circle."""
    assert sum(len(stores(step)) for step in lowered(cell(make))[0]) == count


graphs = st.integers(2, 12).flatmap(
    lambda n: st.dictionaries(st.integers(0, n - 1), st.integers(0, n - 1)).map(
        lambda table: {a: b for a, b in table.items() if a != b}
    )
)


@drawn(graphs)
@settings(deadline=None, derandomize=True)
def test_chains_leave_no_more_to_copy_than_must_be(handed: dict[int, int]) -> None:
    """Where k states become the same one, only k - 1 of them are copies."""
    found = chains(handed)
    states = [state for chain in found for state in chain]
    assert len(states) == len(set(states))
    assert all(handed[a] == b for chain in found for a, b in pairwise(chain))
    free = sum(len(chain) - 1 + (handed.get(chain[-1]) == chain[0]) for chain in found)
    assert free == len(set(handed.values()))


def test_the_longest_chain_stays_whole() -> None:
    assert chains({"x": "c", "a": "b", "b": "c", "c": "d"}) == [["a", "b", "c", "d"]]
