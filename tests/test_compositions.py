"""Random compositions: combinators around random cells, up to four deep, by every backend and by a loop by hand."""

from __future__ import annotations

import copy
import pickle
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import elman
from comparing import assert_same, by_hand, everything, floats, scan_by
from contracts.row import FAST
from elman.cells import (
    DenseCell,
    ElmanCell,
    GRUCell,
    LRUCell,
    LSTMCell,
    MinGRUCell,
    MinimalGatedCell,
    MinLSTMCell,
    QRNNCell,
    SLSTMCell,
    SRUCell,
)
from elman.combinators import (
    Attend,
    Clockwork,
    Conditioned,
    Deep,
    Delay,
    Feedback,
    Highway,
    Leaky,
    LearnedState,
    Masked,
    Noise,
    Residual,
    Stack,
    TimeSkip,
    VariationalDropout,
    WeightDrop,
    Zoneout,
    output_size,
    start,
)
from elman.errors import CellError, InputError, OptionError

C, S, M = 2, 3, 2
"""Features of the context, places and features of the memory."""
QUICK, MANY = 30, 400


class Counting(nn.Module):
    """A user's cell: a dict for a state, with an integer in it, and an output that is no state."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size, self.output_size, self.hidden_size = input_size, hidden_size, hidden_size
        self.read, self.back = nn.Linear(input_size, hidden_size), nn.Linear(hidden_size, hidden_size, bias=False)
        self.decay = nn.Parameter(torch.tensor(0.3))

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            "h": torch.zeros(batch, self.hidden_size, device=device, dtype=dtype),
            "n": torch.zeros(batch, device=device, dtype=torch.int64),
        }

    def forward(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        odd = (state["n"] % 2).unsqueeze(-1).to(x.dtype)
        h = torch.tanh(self.decay + self.read(x) + self.back(state["h"]) * (1 + odd))
        elman.record("odd", odd)
        return h * 2 + x.mean(-1, keepdim=True), {"h": h, "n": state["n"] + 1}


class Compositions:
    """Draws cells. ``free`` is what draws: the same numbers draw the same cell."""

    def __init__(self, free: random.Random, width: int = 4) -> None:
        self.free, self.width = free, width
        self.around: list[Callable[[int, int], nn.Module]] = [
            lambda reads, depth: self.stack(reads, depth),
            lambda reads, depth: Residual(self.cell(reads, depth)),
            lambda reads, depth: Highway(self.cell(reads, depth)),
            lambda reads, depth: Delay(self.cell(reads, depth), free.randint(1, 3)),
            lambda reads, depth: self.skip(reads, depth),
            lambda reads, depth: Leaky(self.cell(reads, depth), free.choice([0, 0.6, "learned", "sampled"])),
            lambda reads, depth: Zoneout(self.cell(reads, depth), 0.3),
            lambda reads, depth: Noise(self.cell(reads, depth), 0.1, 0.1),
            lambda reads, depth: VariationalDropout(self.cell(reads, depth), *free.choices([0.0, 0.4], k=3)),
            lambda reads, depth: self.weights(WeightDrop, reads, depth, 0.3),
            lambda reads, depth: self.weights(Masked, reads, depth, 0.6),
            lambda reads, depth: self.clockwork(reads, depth),
            lambda reads, depth: self.deep(reads, depth),
            lambda reads, depth: self.attend(reads, depth),
            lambda reads, depth: self.conditioned(reads, depth),
            lambda reads, depth: LearnedState(self.cell(reads, depth)),
            lambda reads, depth: self.feedback(reads, depth),
        ]

    def cell(self, reads: int, depth: int) -> nn.Module:
        """One of the combinators around a cell that is less deep; some cannot stand around every cell."""
        while depth:
            try:
                return self.free.choice(self.around)(reads, depth - 1)
            except (CellError, InputError, OptionError):
                continue
        return self.innermost(reads)

    def innermost(self, reads: int) -> nn.Module:
        free, width = self.free, self.width
        kinds: list[Callable[[int, int], nn.Module]] = [
            ElmanCell, GRUCell, LSTMCell, MinimalGatedCell, SLSTMCell, MinGRUCell, MinLSTMCell, QRNNCell, SRUCell,
            LRUCell, DenseCell, nn.RNNCell, nn.LSTMCell, nn.GRUCell, Counting,
            lambda d, h: ElmanCell(d, h, squash="silu", init="orthogonal"),
            lambda d, h: GRUCell(d, h, reset_after=False, bias=False),
            lambda d, h: LSTMCell(d, h, peepholes=True, proj_size=h // 2),
            lambda d, h: LSTMCell(d, h, layer_norm=True, coupled=True),
            lambda d, h: LSTMCell(d, h, forget_gate=False, squash="softsign"),
            lambda d, h: SLSTMCell(d, h, heads=2, exponential_forget=True),
            lambda d, h: SRUCell(d, h, peepholes=True, squash="tanh"),
        ]  # fmt: skip
        return free.choice(kinds)(reads, width)

    def alike(self, depth: int) -> Callable[[int], nn.Module]:
        """What makes the same composition at every call, for combinators that make the cell inside twice."""
        seed = self.free.random()
        return lambda reads: Compositions(random.Random(seed), self.width).cell(reads, depth)

    def stack(self, reads: int, depth: int) -> nn.Module:
        cells = [self.cell(reads, depth)]
        for _ in range(self.free.randint(0, 2)):
            cells.append(self.cell(output_size(cells[-1], reads), self.free.randint(0, depth)))
        return Stack(cells, dropout=0.5)

    def clockwork(self, reads: int, depth: int) -> nn.Module:
        cell = self.cell(reads, depth)
        state = start(cell, 1, device=torch.device("cpu"), dtype=torch.float32)
        even = all(leaf.shape[-1] % 2 == 0 for leaf in floats(state))
        return Clockwork(cell, self.free.choice([[1, 2], [3, 1], [2]] if even else [[2]]))

    def skip(self, reads: int, depth: int) -> nn.Module:
        return TimeSkip.build(reads, self.alike(depth), self.free.randint(1, 3))

    def weights(self, kind: Callable[..., nn.Module], reads: int, depth: int, share: float) -> nn.Module:
        cell = self.cell(reads, depth)
        names = [name for name, _ in cell.named_parameters()]
        return kind(cell, share, weights=" ".join(self.free.sample(names, min(2, len(names)))))

    def deep(self, reads: int, depth: int) -> nn.Module:
        layers = dict(zip(("input", "transition", "output"), self.free.choices([0, 1, 2], k=3), strict=True))
        return Deep(self.cell(reads, depth), **layers, skip=self.free.random() < 0.5, width=5)

    def attend(self, reads: int, depth: int) -> nn.Module:
        score = self.free.choice(["additive", "multiplicative"])
        return Attend.build(reads, lambda d: self.cell(d, depth), M, score=score, key="over")

    def conditioned(self, reads: int, depth: int) -> nn.Module:
        where = self.free.choice(["step", "start", "both"])
        return Conditioned.build(reads, lambda d: self.cell(d, depth), C, where=where, key="to")

    def feedback(self, reads: int, depth: int) -> nn.Module:
        options = self.free.choice([{}, {"feed": "softmax"}, {"outputs": 3}, {"outputs": 3, "feed": "argmax"}])
        return Feedback.build(reads, self.alike(depth), **options)


def drawn(seed: int, width: int = 4, depth: int | None = None) -> tuple[nn.Module, random.Random]:
    """A composition in a stack of one, which hands constants on to whatever is inside."""
    free = random.Random(seed)
    torch.manual_seed(seed)
    cell = Stack([Compositions(free, width).cell(3, depth or free.randint(2, 4))])
    for parameter in cell.parameters():  # away from zero and one, where mistakes cannot hide
        parameter.data += 0.1 * torch.randn_like(parameter)
    return cell, free


def given(cell: nn.Module, steps: int, batch: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    def ready(leaf: Tensor) -> Tensor:
        return leaf.detach().clone().requires_grad_() if leaf.is_floating_point() else leaf

    constants = {"to": torch.randn(batch, C, dtype=dtype), "over": torch.randn(batch, S, M, dtype=dtype)}
    state = start(cell, batch, device=torch.device("cpu"), dtype=dtype, constants=constants)
    state = pytree.tree_map(lambda s: s + 0.3 * torch.randn_like(s) if s.is_floating_point() else s, state)
    trees = {"xs": torch.randn(steps, batch, 3, dtype=dtype), "state": state, "constants": constants}
    return {role: pytree.tree_map(ready, tree) for role, tree in trees.items()}


def options_of(free: random.Random, steps: int, batch: int) -> dict[str, Any]:
    options: dict[str, Any] = {"reverse": free.random() < 0.4}
    if free.random() < 0.5:
        options["lengths"] = [steps if free.random() < 0.2 else free.randint(0, steps) for _ in range(batch)]
        options["lengths"][0] = max(options["lengths"][0], 1)
    return options


def cases(count: int) -> Any:
    quick = [pytest.param(seed, id=str(seed)) for seed in range(count)]
    return [*quick, *(pytest.param(seed, id=str(seed), marks=pytest.mark.slow) for seed in range(count, MANY))]


by_both = pytest.mark.parametrize("backend", FAST)


@by_both
@pytest.mark.parametrize("seed", cases(QUICK))
def test_equals_a_loop_by_hand(seed: int, backend: str) -> None:
    """Outputs, final states and every gradient, also recomputed from a few states, and in two chunks."""
    cell, free = drawn(seed)
    cell.double().eval()
    steps, batch = free.choice([1, 2, 5, 9, 33]), free.randint(1, 4)
    sources, options = given(cell, steps, batch), options_of(free, steps, batch)
    expected = everything(by_hand, cell, sources, **options)
    remat = free.choice([None, 1, 3, "auto"])
    assert_same(everything(scan_by("reference"), cell, sources, **options), expected)
    assert_same(everything(scan_by(backend), cell, sources, **options, remat=remat), expected)
    if "lengths" not in options and not options["reverse"]:
        cut = free.randint(1, steps)

        def in_chunks(cell: nn.Module, xs: Tensor, state: Any, *, constants: Any, reverse: bool) -> Any:
            ys, state = elman.scan(cell, xs[:cut], state, constants=constants, backend=backend)
            if cut == steps:
                return ys, state
            rest, state = elman.scan(cell, xs[cut:], state, constants=constants, backend=backend)
            return torch.cat([ys, rest]), state

        assert_same(everything(in_chunks, cell, sources, **options), expected)


@by_both
@pytest.mark.parametrize("seed", cases(QUICK // 2))
def test_records_the_same(seed: int, backend: str) -> None:
    """Marked values, all states, and the total adjoint of each."""
    cell, free = drawn(seed)
    cell.double().eval()
    steps, batch = free.choice([1, 2, 5, 9]), free.randint(1, 4)
    sources, options = given(cell, steps, batch), options_of(free, steps, batch)

    def recorded(cell: nn.Module, xs: Tensor, state: Any, **options: Any) -> tuple[Any, Any]:
        ys, final, recording = elman.scan(cell, xs, state, record=True, **options)
        adjoint = recording.adjoint(ys.sin().sum() + sum(s.sin().sum() for s in floats(final)))
        values = sorted(recording.values.items())
        return (ys, *(value for _, value in values), recording.states, pytree.tree_map(torch.detach, adjoint)), final

    try:
        expected = everything(recorded, cell, sources, backend="reference", **options)
    except CellError as twice:  # a combinator that records, around one of its kind
        with pytest.raises(CellError, match=re.escape(str(twice))):
            everything(recorded, cell, sources, backend=backend, **options)
        return
    assert_same(everything(recorded, cell, sources, backend=backend, **options), expected)


@by_both
@pytest.mark.parametrize("seed", cases(QUICK // 3))
def test_second_derivatives(seed: int, backend: str) -> None:
    cell, free = drawn(seed, depth=2)
    cell.double().eval()
    sources, options = given(cell, 3, 2), options_of(free, 3, 2)

    def curvature(by: str) -> list[Tensor]:
        ys, final = elman.scan(
            cell, sources["xs"], sources["state"], constants=sources["constants"], backend=by, **options
        )
        wanted = [*floats(sources), *cell.parameters()]
        loss = ys.sin().sum() + sum(s.sin().sum() for s in floats(final))
        slopes = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True, materialize_grads=True)
        return list(
            torch.autograd.grad(
                sum((g.sin() * (1 + g)).sum() for g in slopes), wanted, allow_unused=True, materialize_grads=True
            )
        )

    for found, expected in zip(curvature(backend), curvature("reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@by_both
@pytest.mark.parametrize("seed", cases(QUICK // 3))
def test_masks_of_training(seed: int, backend: str) -> None:
    """Masks that are drawn once are the same by both backends: they are drawn before either begins."""
    cell, free = drawn(seed)
    cell.double().eval()
    for part in cell.modules():
        if isinstance(part, (VariationalDropout, WeightDrop)):
            part.training = True
            part.masks.train()
    sources, options = given(cell, 5, 3), options_of(free, 5, 3)

    def seeded(by: str) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return everything(scan_by(by), cell, sources, **options)

    assert_same(seeded(backend), seeded("reference"))


@pytest.mark.parametrize("seed", cases(QUICK // 3))
@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
def test_single_and_half_precision(seed: int, narrow: bool) -> None:
    """No further from float64 than the plain loop is, up to what another order of sums may do."""
    cell, free = drawn(seed, width=8 if narrow else 128, depth=2)
    cell.eval()
    steps, batch = free.choice([3, 12]), 3
    options = options_of(free, steps, batch)
    sources = given(cell, steps, batch, torch.float32)
    exact = everything(
        scan_by("reference"),
        copy.deepcopy(cell).double(),
        pytree.tree_map(
            lambda leaf: leaf.detach().double().requires_grad_() if leaf.is_floating_point() else leaf, sources
        ),
        **options,
    )
    found = {}
    for backend in ("reference", *FAST):
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            found[backend] = everything(scan_by(backend), cell, sources, **options)
    for name, value in exact.items():
        size = float(value.abs().max()) if value.numel() else 0.0
        far = {b: float((found[b][name].double() - value).abs().max()) if value.numel() else 0.0 for b in found}
        for backend in FAST:
            assert found[backend][name].dtype == found["reference"][name].dtype
            bound = 4 * far["reference"] + (2e-2 if narrow else 1e-5) * size + 1e-12
            assert far[backend] <= bound, (backend, name, far, size)


@pytest.mark.parametrize("seed", cases(QUICK // 6))
def test_copied_saved_and_compiled(seed: int) -> None:
    """A deep copy, and one by pickle, compute the same; so does a graph of torch.compile."""
    cell, free = drawn(seed, depth=2)
    cell.double().eval()
    sources, reverse = given(cell, 4, 3), free.random() < 0.5
    expected = everything(scan_by("interpret"), cell, sources, reverse=reverse)
    for other in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        assert_same(everything(scan_by("interpret"), other, sources, reverse=reverse), expected, rtol=0, atol=0)

    def scanned(cell: nn.Module, xs: Tensor, state: Any, *, constants: Any) -> tuple[Any, Any]:
        return elman.scan(cell, xs, state, constants=constants, reverse=reverse)

    torch._dynamo.reset()
    assert_same(everything(torch.compile(scanned, fullgraph=True, backend="aot_eager"), cell, sources), expected)


@pytest.mark.parametrize(
    "around",
    [Residual, Highway, lambda cell: Attend(cell, 1), lambda cell: Deep(cell, input=1), LearnedState],
    ids=["residual", "highway", "attend", "deep", "learned state"],
)
def test_what_is_built_around_a_cell_has_its_type(around: Callable[[nn.Module], nn.Module]) -> None:
    cell = around(LSTMCell(3, 4, dtype=torch.float64))
    assert {parameter.dtype for parameter in cell.parameters()} == {torch.float64}
