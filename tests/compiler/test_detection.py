"""What one program cannot follow is found, named with the user's own line, and never silently wrong."""

from __future__ import annotations

import inspect
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import elman
from cellzoo import zoo
from elman.errors import (
    CapturedTensorError,
    DataDependentError,
    MixedRowsError,
    MutationError,
    UnfoldError,
    UnfoldWarning,
    UnsupportedError,
)

OUTSIDE = torch.randn(4, requires_grad=True)


@pytest.fixture(autouse=True)
def _warns_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elman.unfold, "_warned", set())


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.U = nn.Linear(3, 4)
        self.count = 0
        self.history: list[int] = []
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(4))


class Counter(Base):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        self.count += 1
        h = torch.tanh(self.U(x) + h / self.count)
        return h, h


class Remembers(Base):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        self.history.append(len(self.history))
        h = torch.tanh(self.U(x) + h * len(self.history))
        return h, h


class KeepsTensor(Base):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + h)
        self.last = h
        return h, h


class WritesBuffer(Base):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        self.seen += 1  # here
        h = torch.tanh(self.U(x) + h + self.seen)
        return h, h


class ReplacesBuffer(Base):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        self.seen = self.seen + 1
        h = torch.tanh(self.U(x) + h + self.seen)
        return h, h


class BatchNormTraining(Base):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.norm(self.U(x)) + h)  # here
        return h, h


class Captures(Base):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + h * OUTSIDE)  # here
        return h, h


class Branches(Base):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + h)
        if h.sum() > 0:  # here
            h = -h
        return h, h


class Item(Base):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + h * math.tanh(h.mean().item()))  # here
        return h, h


class ToNumpy(Base):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        scale = float(x.detach().numpy()[0, 0])  # here
        h = torch.tanh(self.U(x) + h * scale)
        return h, h


class Selects(Base):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        chosen = h[h > 0]  # here
        h = torch.tanh(self.U(x) + h + chosen.sum())
        return h, h


class MeanOverRows(Base):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + h.mean(0))  # here
        return h, h


class SumOfAll(Base):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + h / h.norm())  # here
        return h, h


class Neighbours(Base):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + h.roll(1, 0))  # here
        return h, h


class Flipped(Base):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + h.flip(0))  # here
        return h, h


class Gram(Base):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + torch.softmax(h @ h.t(), -1) @ h)  # here
        return h, h


class Transposed(Base):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + h.t().reshape(h.shape))  # here
        return h, h


class FirstRow(Base):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + h[0])  # here
        return h, h


class AcrossSoftmax(Base):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + h.softmax(0))  # here
        return h, h


class CumulatesRows(Base):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + h.cumsum(0))  # here
        return h, h


class RegroupsRows(Base):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        pairs = h.reshape(2, -1, 4)  # here
        h = torch.tanh(self.U(x) + pairs.flip(0).reshape(h.shape))
        return h, h


class ShiftsRows(Base):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + torch.cat([h[1:], h[:1]]))  # here
        return h, h


class PermutesRows(Base):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + h[torch.argsort(x[:, 0])])  # here
        return h, h


class KnowsTheBatch(Base):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + h / x.shape[0])
        return h, h


class CountsRows(Base):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + h * torch.arange(x.shape[0]).unsqueeze(1))
        return h, h


class KnowsTheBatchOutsideTheLoop(Base):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) / x.shape[0] + h)
        return h, h


class SpecialCasesOneRow(Base):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + h)
        return (h * 2, h) if x.shape[0] == 1 else (h, h)


class BranchesOnTheBatch(Base):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + h)
        return (h, h) if x.shape[0] % 2 else (h * 2, h)


CASES: list[tuple[type[Base], type[UnfoldError]]] = [
    (Counter, MutationError),
    (Remembers, MutationError),
    (KeepsTensor, MutationError),
    (WritesBuffer, MutationError),
    (ReplacesBuffer, MutationError),
    (BatchNormTraining, UnfoldError),
    (Captures, CapturedTensorError),
    (Branches, DataDependentError),
    (Item, DataDependentError),
    (ToNumpy, DataDependentError),
    (Selects, DataDependentError),
    (MeanOverRows, MixedRowsError),
    (SumOfAll, MixedRowsError),
    (Neighbours, MixedRowsError),
    (Flipped, MixedRowsError),
    (Gram, MixedRowsError),
    (Transposed, MixedRowsError),
    (FirstRow, MixedRowsError),
    (AcrossSoftmax, MixedRowsError),
    (CumulatesRows, MixedRowsError),
    (RegroupsRows, UnfoldError),
    (ShiftsRows, MixedRowsError),
    (PermutesRows, UnfoldError),
    (KnowsTheBatch, MixedRowsError),
    (KnowsTheBatchOutsideTheLoop, MixedRowsError),
    (CountsRows, MixedRowsError),
    (SpecialCasesOneRow, UnfoldError),
    (BranchesOnTheBatch, UnfoldError),
]
KINDS = [kind for kind, _ in CASES]


def line_of(kind: type) -> int | None:
    """The line of the class that is marked with a comment."""
    source, first = inspect.getsourcelines(kind)
    return next((first + i for i, text in enumerate(source) if "# here" in text), None)


def feed() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 4, 3), torch.randn(4, 4)


@pytest.mark.parametrize(("kind", "error"), CASES)
def test_named_error(kind: type[Base], error: type[UnfoldError]) -> None:
    with pytest.raises(error) as caught:
        elman.scan(kind(), *feed(), backend="interpret")
    message = str(caught.value)
    line = line_of(kind)
    if line is not None:
        assert f"test_detection.py:{line}:" in message, message
    assert len(message.splitlines()) == 1
    assert message.endswith("."), message


@pytest.mark.parametrize("kind", [kind for kind, error in CASES if error is MutationError and line_of(kind) is None])
def test_a_mutation_names_the_attribute(kind: type[Base]) -> None:
    with pytest.raises(MutationError, match=r"count|history|last|seen|container"):
        elman.scan(kind(), *feed(), backend="interpret")


def by_eager_loop(cell: nn.Module, xs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    ys = []
    for x in xs:
        y, state = cell(x, state)
        ys.append(y)
    return torch.stack(ys), state


@pytest.mark.parametrize("kind", KINDS)
def test_auto_warns_once_and_is_right(kind: type[Base]) -> None:
    torch.manual_seed(1)
    cell, other = kind(), kind()
    other.load_state_dict(cell.state_dict())
    xs, state = feed()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(2)
        found = elman.scan(cell, xs, state)
        torch.manual_seed(2)
        expected = by_eager_loop(other, xs, state)
        torch.testing.assert_close(found, expected)
        # The module itself moved on exactly as in the loop: counters counted, running statistics ran.
        torch.testing.assert_close(cell.state_dict(), other.state_dict())
        assert (cell.count, cell.history) == (other.count, other.history)
        torch.testing.assert_close(elman.scan(cell, xs, state), by_eager_loop(other, xs, state))
    ours = [w for w in caught if issubclass(w.category, UnfoldWarning)]
    assert len(ours) == 1
    for w in ours:
        assert kind.__name__ in str(w.message)
        assert w.filename == __file__


@pytest.mark.parametrize("kind", [kind for kind, error in CASES if error is MixedRowsError])
def test_mixed_rows_with_lengths_are_an_error_also_with_auto(kind: type[Base]) -> None:
    xs, state = feed()
    with pytest.raises(MixedRowsError):
        elman.scan(kind(), xs, state, lengths=[5, 3, 2, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnfoldWarning)
        elman.scan(kind(), xs, state, lengths=[5, 5, 5, 5])  # nothing is padded: nothing can go wrong


@pytest.mark.parametrize("kind", KINDS)
def test_tracing_leaves_the_module_alone(kind: type[Base]) -> None:
    cell = kind()
    before = {name: dict(part.__dict__) for name, part in cell.named_modules()}
    buffers = {name: value.clone() for name, value in cell.named_buffers()}
    with pytest.raises(UnfoldError):
        elman.scan(cell, *feed(), backend="interpret")
    assert cell.count == 0
    for name, part in cell.named_modules():
        assert part.__dict__.keys() == before[name].keys()
        for key, value in part.__dict__.items():
            assert value is before[name][key]
    torch.testing.assert_close(dict(cell.named_buffers()), buffers)


def test_a_list_that_the_step_appends_to_is_put_back() -> None:
    cell = Remembers()
    with pytest.raises(MutationError):
        elman.scan(cell, *feed(), backend="interpret")
    assert cell.history == []


def test_batch_norm_in_evaluation_runs() -> None:
    cell = BatchNormTraining().eval()
    xs, state = feed()
    torch.testing.assert_close(elman.scan(cell, xs, state, backend="interpret"), by_eager_loop(cell, xs, state))


def test_a_captured_tensor_without_gradient_is_fine() -> None:
    fixed = torch.randn(4)

    class Fixed(Base):
        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(self.U(x) + h * fixed)
            return h, h

    cell = Fixed()
    xs, state = feed()
    torch.testing.assert_close(elman.scan(cell, xs, state, backend="interpret"), by_eager_loop(cell, xs, state))


def test_a_captured_tensor_is_read_anew() -> None:
    """Its values are read at every call, like a buffer's."""
    fixed = torch.ones(4)

    class Fixed(Base):
        def __init__(self) -> None:
            super().__init__()
            self.fixed = fixed

        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(self.U(x) + h * self.fixed)
            return h, h

    cell = Fixed()
    xs, state = feed()
    elman.scan(cell, xs, state, backend="interpret")
    fixed.mul_(0.5)
    torch.testing.assert_close(elman.scan(cell, xs, state, backend="interpret"), by_eager_loop(cell, xs, state))


def test_an_unknown_operation_names_itself() -> None:
    class Inverts(Base):
        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            matrix = torch.eye(4) + h.unsqueeze(-1) * h.unsqueeze(-2)
            h = torch.tanh(self.U(x) + torch.linalg.solve(matrix, h))
            return h, h

    cell = Inverts()
    xs, state = feed()
    with pytest.raises(UnsupportedError, match=r"linalg_solve.*test_detection.py:\d+"):
        elman.scan(cell, xs, state, backend="interpret")
    with pytest.warns(UnfoldWarning, match="linalg_solve"):
        ys, _ = elman.scan(cell, xs, state)
    torch.testing.assert_close(ys, by_eager_loop(cell, xs, state)[0])


def test_a_normal_cell_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        elman.scan(zoo("lstm"), torch.randn(3, 2, 3, dtype=torch.float64))


@pytest.mark.parametrize("kind", [SpecialCasesOneRow, BranchesOnTheBatch, KnowsTheBatch, KnowsTheBatchOutsideTheLoop])
def test_a_step_that_looks_at_the_batch_is_right_for_every_batch(kind: type[Base]) -> None:
    cell = kind()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnfoldWarning)
        for batch in (4, 1, 2, 3):
            xs, state = torch.randn(5, batch, 3), torch.randn(batch, 4)
            torch.testing.assert_close(elman.scan(cell, xs, state), by_eager_loop(cell, xs, state))
