"""Recorded runs: every value as without them, by a stand-in for CUDA graphs that plays ATen calls back in place."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import elman
from cellzoo import ZOO, Lstm, zoo
from comparing import assert_same, compiled, everything, inputs, leaves, operations, scan_by
from elman.compiler import graphed
from elman.compiler.graphed import Graphs
from elman.compiler.interpret import Runner
from elman.errors import UnfoldWarning
from elman.packing import Rows

interpret, reference = scan_by("interpret"), scan_by("reference")


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Tape(TorchDispatchMode):
    """Every ATen call with the very tensors that it read and wrote; ``play`` runs them again, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        read = {storage(t) for t in leaves((args, kwargs))}
        made = [t for t in leaves(out) if storage(t) not in read]
        if made or func._schema.is_mutable:  # the rest are views
            self.calls.append((func, args, kwargs or {}, made))
        return out

    def spoil(self) -> None:
        """While a GPU records it computes nothing."""
        for *_, made in self.calls:
            for t in made:
                spoil(t)

    def play(self) -> None:
        for func, args, kwargs, made in self.calls:
            again = func(*args, **kwargs)
            if func is torch.ops.aten.empty.memory_format:
                spoil(again)
            for mine, new in zip(made, leaves(again), strict=bool(made)):
                mine.copy_(new)


def spoil(tensor: Tensor) -> None:
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))


class StandIn:
    """Does on the CPU what ``graphed.Cuda`` does on a GPU: the same addresses are read and written at every play."""

    def __init__(self) -> None:
        self.recorded = self.played = 0
        self.stream: Hashable | None = "main"
        self.fails: RuntimeError | None = None

    def order(self, device: torch.device) -> Hashable | None:
        return self.stream

    def record(self, work: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
        work()
        if self.fails is not None:
            raise self.fails
        with Tape() as tape:
            results = work()
        tape.spoil()
        self.recorded += 1

        def play() -> None:
            self.played += 1
            tape.play()

        return results, play


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """Pieces of four steps, recorded on the CPU."""
    found = Graphs(StandIn(), longest=4, fewest=2)
    monkeypatch.setitem(graphed._graphs, "cpu", found)
    return found


def counts(graphs: Graphs) -> tuple[int, int]:
    """How often was recorded and played so far."""
    stand_in = graphs.recorder
    assert isinstance(stand_in, StandIn)
    return stand_in.recorded, stand_in.played


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reverse with lengths": {"reverse": True, "lengths": [11, 8, 10]},
    "recomputed": {"remat": 4, "reverse": True, "lengths": [11, 0, 11]},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ZOO)
def test_played_equals_the_definition(name: str, way: str, graphs: Graphs) -> None:
    cell = zoo(name)
    for seed in (5, 6):
        given = inputs(cell, 11, 3, seed=seed)
        expected = everything(reference, cell, given, **WAYS[way])
        assert_same(everything(interpret, cell, given, **WAYS[way]), expected)
    has_loop = bool(compiled(cell, given).program.loops)
    if way != "recomputed":
        assert (counts(graphs)[1] > 0) >= has_loop
    assert len(graphs.known) <= graphs.most


def test_new_sizes_and_new_weights(graphs: Graphs) -> None:
    cell = Lstm(peephole=True).double()
    for steps, batch in ((8, 3), (16, 3), (9, 3), (8, 5), (3, 5), (16, 1), (8, 3)):
        with torch.no_grad():
            for p in cell.parameters():
                p.add_(torch.randn_like(p))  # where it is, as an optimiser does
        cell.W.weight = nn.Parameter(torch.randn_like(cell.W.weight))  # and elsewhere
        given = inputs(cell, steps, batch, seed=steps)
        assert_same(everything(interpret, cell, given), everything(reference, cell, given))
    # B 3, 5 and 1, in pieces of four steps, forward and backward; the rest of 9 steps came once.
    assert counts(graphs)[0] == 6


def test_a_piece_is_played_whatever_t_is(graphs: Graphs) -> None:
    cell = zoo("Elman")
    for steps in (8, 12, 16, 20):
        with torch.no_grad():
            elman.scan(cell, torch.randn(steps, 2, 3, dtype=torch.float64), backend="interpret")
    assert counts(graphs) == (1, 1 + 3 + 4 + 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_casts_are_new_tensors_at_every_call(dtype: torch.dtype, graphs: Graphs, monkeypatch: Any) -> None:
    cell = Lstm()
    for seed in range(4):
        with torch.no_grad():
            cell.W.weight.mul_(1.1)
        given = inputs(cell, 4, 3, seed=seed, dtype=torch.float32)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found = everything(interpret, cell, given)
            with monkeypatch.context() as context:
                context.setenv(graphed.SWITCH, "0")
                expected = everything(interpret, cell, given)
        assert_same(found, expected, rtol=0, atol=0)  # one piece: the same operations
    assert counts(graphs) == (2, 6)


def test_inputs_that_lie_in_any_order(graphs: Graphs) -> None:
    cell = zoo("lstm")
    for seed in range(3):
        torch.manual_seed(seed)
        xs = torch.randn(3, 5, 8, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
        shared = torch.randn(8, 1, 3, dtype=torch.float64, requires_grad=True).expand(8, 5, 3)
        for given in (xs, shared, xs.detach()[:, ::2]):
            found, expected = (scan(cell, given, None)[0] for scan in (interpret, reference))
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
            grads = [torch.autograd.grad(y.sum(), list(cell.parameters())) for y in (found, expected)]
            torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-10)


def test_results_are_the_callers_own(graphs: Graphs) -> None:
    cell = zoo("lstm")
    first, second = (inputs(cell, 4, 3, seed=seed) for seed in (1, 2))
    everything(interpret, cell, first)
    kept = everything(interpret, cell, first)
    before = {name: value.clone() for name, value in kept.items()}
    everything(interpret, cell, second)
    assert counts(graphs) == (2, 4)
    assert_same(kept, before, rtol=0, atol=0)


def test_two_calls_before_their_backward(graphs: Graphs) -> None:
    cell = zoo("Gru")
    for _ in range(2):
        both = [inputs(cell, 9, 3, seed=seed) for seed in (1, 2)]
        found, expected = (
            torch.autograd.grad(
                sum((scan(cell, given["xs"], given["state"])[0] ** 2).sum() for given in both),
                [given["xs"] for given in both],
            )
            for scan in (interpret, reference)
        )
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert counts(graphs)[1] > 0


def test_second_derivatives(graphs: Graphs) -> None:
    cell = zoo("lstm with layer norm")
    given = inputs(cell, 8, 2)
    found = []
    for scan in (interpret, interpret, reference):
        y, _ = scan(cell, given["xs"], given["state"])
        (first,) = torch.autograd.grad((y**3).sum(), given["xs"], create_graph=True)
        found.append((first.detach(), *torch.autograd.grad((first**2).sum(), [given["xs"], *cell.parameters()])))
    assert counts(graphs)[1] > 0
    for seen in found[:2]:
        torch.testing.assert_close(seen, found[2], rtol=1e-9, atol=1e-10)


def test_both_directions_of_time(graphs: Graphs) -> None:
    cell = zoo("lstm")
    for seed in range(3):
        given = inputs(cell, 8, 2, seed=seed)
        for reverse in (False, True):
            expected = everything(reference, cell, given, reverse=reverse)
            assert_same(everything(interpret, cell, given, reverse=reverse), expected)
    assert counts(graphs)[0] == 4


def test_made_in_inference_mode_and_used_outside(graphs: Graphs) -> None:
    cell = zoo("lstm")
    with torch.inference_mode():
        xs = torch.randn(8, 3, 3, dtype=torch.float64)  # a tensor that autograd never sees
        for _ in range(2):
            assert interpret(cell, xs, None)[0].is_inference()
    assert counts(graphs) == (1, 3)
    with torch.no_grad():
        torch.testing.assert_close(interpret(cell, xs.clone(), None), reference(cell, xs, None), rtol=1e-9, atol=1e-10)
    assert counts(graphs) == (1, 5)


class Noisy(Lstm):
    """An LSTM whose output is drawn around what it computes."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, (h, c) = super().forward(x, state)
        return y + torch.randn_like(y), (h + 0.1 * torch.randn_like(h), c)


def test_draws_are_new_at_every_play(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Noisy().double()
    xs = torch.randn(12, 3, 3, dtype=torch.float64)
    played = []
    for seed in range(3):
        torch.manual_seed(seed)
        played.append(elman.scan(cell, xs, backend="interpret")[0])
    assert counts(graphs)[1] > 0
    monkeypatch.setenv(graphed.SWITCH, "0")
    for seed in range(3):
        torch.manual_seed(seed)
        torch.testing.assert_close(played[seed], elman.scan(cell, xs, backend="interpret")[0], rtol=1e-9, atol=1e-10)
    assert not torch.equal(played[0], played[1])


def test_those_played_last_are_kept(graphs: Graphs) -> None:
    cell, graphs.most = zoo("Elman"), 2

    def call(batch: int) -> int:
        xs = torch.randn(4, batch, 3, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(interpret(cell, xs, None), reference(cell, xs, None), rtol=1e-9, atol=1e-10)
        return counts(graphs)[0]

    assert [call(b) for b in (1, 1, 2, 2)] == [0, 1, 1, 2]
    assert [call(b) for b in (1, 3, 1, 1)] == [2, 2, 2, 2]  # 3 pushed out 2, not 1, which was played after it
    assert [call(b) for b in (2, 2)] == [2, 3]
    assert len(graphs.known) == 2
    graphed.forget()
    assert not graphs.known


PLAIN: dict[str, Callable[[Graphs, pytest.MonkeyPatch], None]] = {
    "switched off": lambda graphs, patch: patch.setenv(graphed.SWITCH, "0"),
    "being recorded by someone else": lambda graphs, patch: setattr(graphs.recorder, "stream", None),
    "too few steps": lambda graphs, patch: setattr(graphs, "fewest", 5),
}


@pytest.mark.parametrize("why", PLAIN)
def test_what_is_not_recorded(why: str, graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    PLAIN[why](graphs, monkeypatch)
    cell = zoo("lstm")
    for seed in range(3):
        given = inputs(cell, 8, 3, seed=seed)
        assert_same(everything(interpret, cell, given), everything(reference, cell, given))
    assert counts(graphs) == (0, 0)


def test_who_watches_operations_sees_them(graphs: Graphs) -> None:
    cell, xs = zoo("Elman"), torch.randn(8, 2, 3, dtype=torch.float64)
    for _ in range(3):
        with torch.no_grad():
            seen = operations(lambda: elman.scan(cell, xs, backend="interpret"))
        assert seen["tanh"] == 8
    assert counts(graphs) == (0, 0)


def test_subclasses_of_tensors_are_left_alone(graphs: Graphs) -> None:
    class Marked(Tensor):
        pass

    cell = zoo("Elman")
    xs = torch.randn(8, 2, 3, dtype=torch.float64).as_subclass(Marked)
    with torch.no_grad():
        for _ in range(3):
            y = elman.scan(cell, xs, backend="interpret")[0]
    torch.testing.assert_close(y, elman.scan(cell, xs.as_subclass(Tensor), backend="reference")[0])
    assert counts(graphs) == (0, 0)


ERRORS = {
    "there is no memory for it": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    "operation not permitted": RuntimeError("operation not permitted\nwhen a stream is recorded"),
    "RuntimeError": RuntimeError(),
}


@pytest.mark.parametrize("why", ERRORS)
def test_what_cannot_be_recorded_runs_with_one_warning(why: str, graphs: Graphs) -> None:
    cell = zoo("lstm")
    graphs.recorder.fails = ERRORS[why]  # type: ignore[attr-defined]
    given = inputs(cell, 8, 3)
    with pytest.warns(UnfoldWarning, match=why) as caught:
        found = [everything(interpret, cell, given) for _ in range(3)]
    expected = everything(reference, cell, given)
    for one in found:
        assert_same(one, expected)
    assert len(caught) == 1
    assert graphed.SWITCH in str(caught[0].message)
    assert counts(graphs) == (0, 0)
    assert list(graphs.known.values()) == ["never"] * 2  # forward and backward: neither is tried again


def test_a_number_read_on_the_host_cannot_be_recorded(graphs: Graphs) -> None:
    def reads(rows: Rows, reverse: bool, xs: Any, state: Any, weights: Any, draws: Any) -> Any:
        return [xs[0] * float(state[0].sum())], state, {}, {}

    runner, xs, state = Runner(reads, "", loops=True), torch.randn(16, 2), torch.randn(2)
    with pytest.warns(UnfoldWarning, match="operation not permitted when stream is capturing"):
        found = [graphs.run(runner, Rows(8, 2), False, [xs], [state * i], [], [])[0][0] for i in range(4)]
    for i in range(4):
        torch.testing.assert_close(found[i], xs * (state * i).sum())


def test_the_first_of_two_errors_is_told(graphs: Graphs) -> None:
    def record(work: Callable[[], Any], device: torch.device) -> Any:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("the recording is not valid")

    graphs.recorder.record = record  # type: ignore[method-assign]
    cell, xs = zoo("Elman"), torch.randn(8, 2, 3, dtype=torch.float64)
    with torch.no_grad(), pytest.warns(UnfoldWarning, match="no memory"):
        interpret(cell, xs, None)


def test_settings_that_choose_kernels_are_kept_apart(graphs: Graphs) -> None:
    cell, xs = zoo("Elman"), torch.randn(4, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(2):
            elman.scan(cell, xs, backend="interpret")
        torch.use_deterministic_algorithms(True)
        try:
            for _ in range(2):
                elman.scan(cell, xs, backend="interpret")
        finally:
            torch.use_deterministic_algorithms(False)
    assert counts(graphs)[0] == 2


def test_each_stream_has_its_own(graphs: Graphs) -> None:
    cell, xs = zoo("Elman"), torch.randn(4, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        for stream in ("main", "side", "main", "side", "side"):
            graphs.recorder.stream = stream  # type: ignore[attr-defined]
            elman.scan(cell, xs, backend="interpret")
    assert counts(graphs) == (2, 3)


def test_threads_take_turns(graphs: Graphs) -> None:
    cell = zoo("Gru")
    work = [inputs(cell, 8, 3, seed=seed) for seed in range(4)]
    expected = [everything(reference, cell, given) for given in work]
    everything(interpret, cell, work[0])
    found: list[list[Any]] = [[], [], [], []]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def job(i: int) -> None:
        y = [scan_and_grad(cell, work[i]) for _ in range(20)]
        found[i] = y

    threads = [threading.Thread(target=job, args=(i,)) for i in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for i in range(4):
        assert len(found[i]) == 20
        for y, gradient in found[i]:
            torch.testing.assert_close(y, expected[i]["y 0"], rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(gradient, scan_and_grad(cell, work[i])[1], rtol=1e-9, atol=1e-10)
    assert counts(graphs)[0] == 2


def scan_and_grad(cell: nn.Module, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    y, _ = interpret(cell, given["xs"], given["state"])
    return y.detach(), torch.autograd.grad((y**2).sum(), given["xs"])[0]


def values(scan: Any, cell: nn.Module, given: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Outputs, final states and gradients, on whatever device they are."""
    found = dict(enumerate(leaves(scan(cell, given["xs"], given["state"], constants=given["constants"], **options))))
    loss = sum(((leaf + 1) ** 2).sum() for leaf in found.values() if leaf.requires_grad)
    wanted = [t for t in (*leaves(given), *cell.parameters()) if t.requires_grad]
    if isinstance(loss, Tensor):
        found |= {-1 - i: g for i, g in enumerate(torch.autograd.grad(loss, wanted, materialize_grads=True))}
    return {str(name): value.detach() for name, value in found.items()}


ON_GPU = [name for name in ZOO if name != "Constants"]  # which makes tensors on the CPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ON_GPU)
def test_on_a_gpu(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(name, way, monkeypatch, graphed.Cuda(), "cuda")


def on_gpu(name: str, way: str, monkeypatch: pytest.MonkeyPatch, recorder: graphed.Recorder, device: str) -> None:
    graphs = Graphs(recorder, longest=4, fewest=2)
    monkeypatch.setitem(graphed._graphs, device, graphs)
    cell = ZOO[name]().double().to(device)
    options = dict(WAYS[way])
    if "lengths" in options:
        options["lengths"] = torch.tensor(options["lengths"], device=device)
    for seed in range(3):
        given = pytree.tree_map_only(
            Tensor, lambda t: t.detach().to(device).requires_grad_(t.requires_grad), inputs(zoo(name), 11, 3, seed=seed)
        )
        assert_same(values(interpret, cell, given, **options), values(reference, cell, given, **options))
    if way != "recomputed" and compiled(cell, given).program.loops:
        assert any(isinstance(found, graphed.Recorded) for found in graphs.known.values())


@pytest.mark.parametrize("way", WAYS)
def test_the_test_for_a_gpu_with_the_stand_in(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu("lstm", way, monkeypatch, StandIn(), "cpu")
