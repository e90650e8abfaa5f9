"""``scan`` as its contract has it: what it takes, what it gives, and what it says when something does not fit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import elman
from cellzoo import Elman, ZooCell, zoo
from comparing import assert_same, by_hand, everything, inputs, scan_by
from elman.packing import rows_of
from elman.unfold import unfold

BACKENDS = ("reference", "interpret", "auto")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


# Sizes


@every_backend
@pytest.mark.parametrize("batch", [1, 3, 33])
@pytest.mark.parametrize("steps", [1, 2, 63])
@pytest.mark.parametrize("kind", ["Elman", "lstm with layer norm"])
def test_awkward_sizes(kind: str, steps: int, batch: int, backend: str) -> None:
    cell = zoo(kind)
    given = inputs(cell, steps, batch)
    lengths = [(7 * b) % (steps + 1) for b in range(1, batch + 1)]
    for options in ({}, {"lengths": lengths, "reverse": True}):
        expected = everything(scan_by("reference"), cell, given, **options)
        if batch * steps < 100:
            assert_same(expected, everything(by_hand, cell, given, **options))
        assert_same(everything(scan_by(backend), cell, given, **options), expected)


@pytest.mark.parametrize("width", [1, 17, 100])
def test_awkward_widths(width: int) -> None:
    cell = Elman(width).double()
    given = inputs(cell, 7, 3)
    expected = everything(by_hand, cell, given, lengths=[7, 1, 4])
    assert_same(everything(scan_by("interpret"), cell, given, lengths=[7, 1, 4]), expected, rtol=1e-8)


# Properties that hold whatever the backend

CELLS = ("lstm with peepholes", "Gru", "Nested", "Tokens", "FastWeights", "stack of lstm")


@every_backend
@pytest.mark.parametrize("name", CELLS)
def test_padded_equals_unpadded(name: str, backend: str) -> None:
    cell = zoo(name)
    given = inputs(cell, 6, 1)

    def padded(cell: nn.Module, xs: Any, state: Any, *, constants: Any) -> Any:
        longer = pytree.tree_map(lambda x: torch.cat([x, x[:3]]), xs)
        ys, final = elman.scan(cell, longer, state, constants=constants, lengths=[6], backend=backend)
        return pytree.tree_map_only(Tensor, lambda y: y[:6], ys), final

    assert_same(everything(padded, cell, given), everything(scan_by(backend), cell, given))


@every_backend
@pytest.mark.parametrize("name", CELLS)
def test_chunks_with_a_carried_state_equal_the_whole(name: str, backend: str) -> None:
    cell = zoo(name)
    given = inputs(cell, 7, 2)

    def chunked(cell: nn.Module, xs: Any, state: Any, *, constants: Any) -> Any:
        pieces = []
        for first, last in ((0, 1), (1, 4), (4, 7)):
            part = pytree.tree_map(lambda x, a=first, b=last: x[a:b], xs)
            ys, state = elman.scan(cell, part, state, constants=constants, backend=backend)
            pieces.append(ys)
        joined = pytree.tree_map(
            lambda *ys: torch.cat(ys) if isinstance(ys[0], Tensor) else ys[0], pieces[0], *pieces[1:]
        )
        return joined, state

    assert_same(everything(chunked, cell, given), everything(scan_by("reference"), cell, given))


@every_backend
@pytest.mark.parametrize("name", CELLS)
def test_reverse_is_the_forward_of_the_reversed(name: str, backend: str) -> None:
    cell = zoo(name)
    given = inputs(cell, 5, 3)

    def turned(cell: nn.Module, xs: Any, state: Any, *, constants: Any) -> Any:
        back = pytree.tree_map(lambda x: x.flip(0), xs)
        ys, final = elman.scan(cell, back, state, constants=constants, backend=backend)
        return pytree.tree_map_only(Tensor, lambda y: y.flip(0), ys), final

    assert_same(
        everything(scan_by(backend), cell, given, reverse=True), everything(turned, cell, given), rtol=0, atol=1e-12
    )


@every_backend
def test_two_runs_are_equal_to_the_bit(backend: str) -> None:
    cell = zoo("lstm with layer norm")
    given = inputs(cell, 9, 5)
    first = everything(scan_by(backend), cell, given, lengths=[9, 3, 1, 0, 5])
    assert_same(everything(scan_by(backend), cell, given, lengths=[9, 3, 1, 0, 5]), first, rtol=0, atol=0)


@every_backend
def test_inputs_are_left_alone(backend: str) -> None:
    cell = zoo("lstm")
    given = inputs(cell, 4, 3)
    copies = {"xs": given["xs"].detach().clone(), "state": [s.detach().clone() for s in given["state"]]}
    ys, _ = elman.scan(cell, given["xs"], given["state"], lengths=[4, 2, 3], backend=backend)
    ys.sum().backward()
    assert torch.equal(given["xs"], copies["xs"])
    assert all(torch.equal(a, b) for a, b in zip(given["state"], copies["state"], strict=True))


@pytest.mark.parametrize("backend", ["interpret", "auto"])
@pytest.mark.parametrize("name", ["YIsInput", "OldStateItself", "Feedforward", "YTwice", "Accumulate", "Delay"])
def test_results_share_no_memory_with_inputs_or_each_other(name: str, backend: str) -> None:
    cell = zoo(name)
    given = inputs(cell, 4, 2)
    with torch.no_grad():
        ys, final = elman.scan(cell, given["xs"], given["state"], backend=backend)
        expected = [leaf.clone() for leaf in pytree.tree_leaves((ys, final))]
        given["xs"].zero_()
        for leaf in pytree.tree_leaves(given["state"]):
            leaf.zero_()
        torch.testing.assert_close(pytree.tree_leaves((ys, final)), expected)
        pytree.tree_leaves(ys)[0].fill_(3.0)
        torch.testing.assert_close(pytree.tree_leaves(final), expected[-len(pytree.tree_leaves(final)) :])


@every_backend
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_xs_of_any_layout(layout: str, backend: str) -> None:
    cell = zoo("Gru")
    base = {
        "transposed": lambda: torch.randn(3, 5, 3, dtype=torch.float64).transpose(0, 1),
        "strided": lambda: torch.randn(10, 6, 6, dtype=torch.float64)[::2, ::2, 1::2],
        "expanded": lambda: torch.randn(1, 1, 3, dtype=torch.float64).expand(5, 3, 3),
    }[layout]()
    state = torch.zeros(4, 3, dtype=torch.float64).t()
    found = elman.scan(cell, base, state, backend=backend)
    torch.testing.assert_close(found, by_hand(cell, base.contiguous(), state.contiguous()))


# Lengths


@every_backend
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize(
    "name", ["Elman", "lstm with layer norm", "stack of gru", "Attends", "SharedInput", "Delay", "Pointwise"]
)
def test_what_stands_in_the_padding_is_never_read(name: str, poison: float, reverse: bool, backend: str) -> None:
    cell = zoo(name)
    given = inputs(cell, 5, 3)
    lengths = torch.tensor([2, 0, 4])
    expected = everything(scan_by("reference"), cell, given, lengths=lengths, reverse=reverse)
    padding = torch.arange(5)[:, None] >= lengths

    def poisoned(x: Tensor) -> Tensor:
        hidden = padding if x.shape[1] > 1 else padding.all(1, keepdim=True)
        return torch.where(hidden[..., None], poison, x.detach()).requires_grad_()

    bad = {**given, "xs": pytree.tree_map(poisoned, given["xs"])}
    found = everything(scan_by(backend), cell, bad, lengths=lengths, reverse=reverse)
    found["y 0"] = torch.where(padding.reshape(5, 3, *[1] * (found["y 0"].dim() - 2)), 0.0, found["y 0"])
    assert_same(found, expected)
    for i, x in enumerate(pytree.tree_leaves(bad["xs"])):
        grad = found[f"gradient of xs {i}"]
        assert torch.equal(grad[torch.isfinite(x) == 0], torch.zeros_like(grad[torch.isfinite(x) == 0]))


@every_backend
def test_past_the_end_y_is_zero_and_the_state_stays(backend: str) -> None:
    cell = zoo("Elman")
    xs, state = doubles(5, 3, 3), doubles(3, 4)
    ys, final = elman.scan(cell, xs, state, lengths=[2, 0, 5], backend=backend)
    assert torch.equal(ys[2:, 0], torch.zeros(3, 2, dtype=torch.float64))
    assert torch.equal(ys[:, 1], torch.zeros(5, 2, dtype=torch.float64))
    assert torch.equal(final[1], state[1])
    alone, last = elman.scan(cell, xs[:2, :1], state[:1], backend=backend)
    torch.testing.assert_close((ys[:2, :1], final[:1]), (alone, last))


@every_backend
@pytest.mark.parametrize("name", ["Elman", "Nested", "Tokens", "lstm", "Delay", "Stateless", "FastWeights"])
def test_all_lengths_zero(name: str, backend: str) -> None:
    cell = zoo(name)
    given = inputs(cell, 3, 2)
    found = everything(scan_by(backend), cell, given, lengths=[0, 0])
    shapes = everything(scan_by("reference"), cell, given)
    for key, value in found.items():
        assert value.shape == shapes[key].shape
        assert value.dtype == shapes[key].dtype
        if key.startswith(("y", "gradient of parameter", "gradient of xs")):
            assert not value.any()
    leaves = [leaf for leaf in pytree.tree_leaves(given["state"]) if isinstance(leaf, Tensor)]
    for i, leaf in enumerate(leaves):
        assert torch.equal(found[f"final {i}"], leaf)


@every_backend
def test_lengths_may_be_a_list_or_any_integer_tensor(backend: str) -> None:
    cell = zoo("Gru")
    xs = doubles(4, 3, 3)
    expected = elman.scan(cell, xs, lengths=[1, 4, 2], backend=backend)
    for lengths in (torch.tensor([1, 4, 2]), torch.tensor([1, 4, 2], dtype=torch.int32), (1, 4, 2)):
        torch.testing.assert_close(elman.scan(cell, xs, lengths=lengths, backend=backend), expected, rtol=0, atol=0)


@every_backend
def test_full_lengths_are_the_same_as_none(backend: str) -> None:
    cell = zoo("Gru")
    given = inputs(cell, 4, 3)
    expected = everything(scan_by(backend), cell, given)
    assert_same(everything(scan_by(backend), cell, given, lengths=[4, 4, 4]), expected)


@every_backend
def test_the_steps_after_the_longest_sequence_cost_nothing(backend: str) -> None:
    cell = zoo("Gru")
    xs = doubles(50, 2, 3)
    ys, final = elman.scan(cell, xs, lengths=[3, 2], backend=backend)
    short, last = elman.scan(cell, xs[:3], lengths=[3, 2], backend=backend)
    torch.testing.assert_close((ys[:3], final), (short, last))
    assert not ys[3:].any()


def test_padding_costs_nothing() -> None:
    """The step sees only the rows that run."""
    seen = []

    class Spy(Elman):
        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            seen.append(len(x))
            return super().forward(x, h)

    elman.scan(Spy(), torch.randn(4, 3, 3), lengths=[4, 1, 2], backend="reference")
    assert seen == [3, 2, 1, 1]


# Types


@pytest.mark.parametrize("name", ["Elman", "lstm", "lstm with layer norm", "Gru", "stack of lstm", "Attends", "Nested"])
@pytest.mark.parametrize("options", [{}, {"lengths": [6, 2, 5]}, {"remat": 2}], ids=str)
def test_autocast(name: str, options: dict[str, Any]) -> None:
    """Both backends under the same autocast: states stay float32, products run in bfloat16."""
    cell = type(zoo(name)) if name not in ("lstm with layer norm", "stack of lstm") else None
    module = (cell() if cell else _float32(name)).float()
    given = inputs(module, 6, 3, dtype=torch.float32)
    kept = {key: value for key, value in options.items() if key != "remat"}
    with torch.autocast("cpu", torch.bfloat16):
        expected = everything(scan_by("reference"), module, given, **kept)
        found = everything(scan_by("interpret"), module, given, **options)
    exact = everything(scan_by("reference"), module, given, **kept)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert found[key].dtype == torch.float32 or key.startswith("y") or not value.is_floating_point(), key
        # bfloat16 has 8 bits: both differ from float32 by rounding alone, and neither by much more than the other.
        scale = exact[key].float().abs().max() + 1e-3
        theirs = (value.float() - exact[key].float()).abs().max() / scale
        ours = (found[key].float() - exact[key].float()).abs().max() / scale
        assert ours <= 2 * theirs + 0.02, (key, float(ours), float(theirs))


def _float32(name: str) -> ZooCell:
    import copy

    return copy.deepcopy(zoo(name)).float()


@every_backend
def test_the_state_takes_the_type_of_the_parameters(backend: str) -> None:
    for dtype in (torch.float32, torch.float64):
        cell = Elman().to(dtype)
        ys, final = elman.scan(cell, torch.randn(3, 2, 3, dtype=dtype), backend=backend)
        assert ys.dtype == final.dtype == dtype


@every_backend
@pytest.mark.parametrize("kind", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_torch_cells_are_taken_as_they_are(kind: type, backend: str) -> None:
    cell = kind(3, 4).double()
    whole = {nn.RNNCell: nn.RNN, nn.LSTMCell: nn.LSTM, nn.GRUCell: nn.GRU}[kind](3, 4).double()
    whole.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    xs = doubles(6, 3, 3)
    ys, final = elman.scan(cell, xs, backend=backend)
    expected, last = whole(xs)
    torch.testing.assert_close(ys, expected)
    torch.testing.assert_close(final, tuple(s[0] for s in last) if isinstance(last, tuple) else last[0])
    found = torch.autograd.grad(ys.square().sum(), [xs, *cell.parameters()])
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), [xs, *whole.parameters()]))


@every_backend
def test_the_initial_state_may_have_parameters(backend: str) -> None:
    class Learned(Elman):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Parameter(torch.randn(4))

        def initial_state(self, batch: int, *, device: Any = None, dtype: Any = None) -> Tensor:
            return self.start.expand(batch, -1)

    cell = Learned().double()
    xs = doubles(3, 2, 3)
    ys, final = elman.scan(cell, xs, lengths=[3, 1], backend=backend)
    expected, last = by_hand(cell, xs, cell.initial_state(2), lengths=[3, 1])
    torch.testing.assert_close((ys, final), (expected, last))
    found = torch.autograd.grad(final.sum(), cell.start)
    torch.testing.assert_close(found, torch.autograd.grad(last.sum(), cell.start))


@every_backend
def test_packed_rows(backend: str) -> None:
    """``unfold`` over rows that are packed already is what PackedSequence holds."""
    cell = zoo("Gru")
    xs, lengths = doubles(4, 3, 3), [4, 2, 1]
    packed = nn.utils.rnn.pack_padded_sequence(xs, torch.tensor(lengths))
    ys, final = unfold(cell, rows_of(4, 3, lengths), packed.data, torch.zeros(3, 4).double(), backend=backend)
    expected, last = elman.scan(cell, xs, lengths=lengths, backend=backend)
    padded, _ = nn.utils.rnn.pad_packed_sequence(packed._replace(data=ys), total_length=4)
    torch.testing.assert_close((padded, final), (expected, last))


@every_backend
def test_other_parameters_may_stand_in(backend: str) -> None:
    cell = zoo("Elman")
    xs = doubles(4, 2, 3)
    rows = rows_of(4, 2)
    others = {name: (p * 0.5).detach().requires_grad_() for name, p in cell.named_parameters()}
    state = torch.zeros(2, 4, dtype=torch.float64)
    ys, _ = unfold(cell, rows, rows.pack(xs), state, parameters=others, backend=backend)
    twin = Elman().double()
    twin.load_state_dict({name: value.detach() for name, value in others.items()})
    expected, _ = elman.scan(twin, xs, state, backend=backend)
    torch.testing.assert_close(rows.unpack(ys), expected)
    found = torch.autograd.grad(ys.sum(), list(others.values()))
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), list(twin.parameters())))


# Edges


@every_backend
def test_an_empty_batch(backend: str) -> None:
    cell = zoo("Elman")
    ys, final = elman.scan(cell, doubles(3, 0, 3), backend=backend)
    assert ys.shape == (3, 0, 2)
    assert final.shape == (0, 4)
    ys.sum().backward()


@every_backend
def test_xs_without_features(backend: str) -> None:
    class Count(nn.Module):
        def forward(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
            s = s + x.exp()
            return s, s

    xs, s = doubles(4, 2), doubles(2)
    ys, _ = elman.scan(Count(), xs, s, lengths=[3, 4], backend=backend)
    torch.testing.assert_close(ys[2], s + xs[:3].exp().sum(0))


@pytest.mark.parametrize("backend", ["reference", "interpret", "llvm"])
@pytest.mark.parametrize("lengths", [None, [6, 5, 5, 2]], ids=["whole", "lengths"])
def test_another_default_device_changes_nothing(backend: str, lengths: list[int] | None) -> None:
    cell, x = elman.cells.LSTMCell(5, 7), torch.randn(6, 4, 5, requires_grad=True)

    def run() -> tuple[Tensor, Tensor]:
        y, _ = elman.scan(cell, x, lengths=lengths, backend=backend)
        return y, torch.autograd.grad(y.square().sum(), x)[0]

    expected = run()
    for _ in range(3):
        with torch.device("meta"):
            found = run()
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got, wanted)
