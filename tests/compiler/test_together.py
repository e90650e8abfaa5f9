"""Calls side by side: the numbers of one after the other on one thread, every gradient, and when they are not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import elman
from elman.combinators import Noise, VariationalDropout
from elman.compiler import autograd, together
from elman.compiler.llvm import sides, threads
from elman.compiler.llvm.isa import host
from elman.directions import scan_both
from elman.errors import UnfoldWarning
from elman.networks.bidirectional import Bidirectional

if host() is None or threads.openmp() is None:
    pytest.skip("no machine code for this processor, or PyTorch runs without OpenMP", allow_module_level=True)

STEPS, BATCH, D, H = 9, 3, 4, 6
LENGTHS = [STEPS, 2, 6]


@pytest.fixture(autouse=True)
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads, and work enough for them however little it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(together, "_WORK", 1)
    monkeypatch.setattr(together, "_UNEQUAL", 100)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


@pytest.fixture
def sided(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many ran at once, for each time that some did."""
    found: list[int] = []
    at_once = sides.at_once

    def counted(functions: Any) -> Any:
        found.append(len(functions))
        return at_once(functions)

    monkeypatch.setattr(sides, "at_once", counted)
    return found


def pair() -> Bidirectional:
    return Bidirectional(elman.LSTMCell(D, H), elman.LSTMCell(D, H))


def random_pair() -> Bidirectional:
    """With numbers drawn for every step, and masks drawn for every call."""
    return Bidirectional(*(VariationalDropout(Noise(elman.LSTMCell(D, H), state=0.1), 0.5, 0.5) for _ in range(2)))


class Constant(nn.Module):
    """Reads a constant of each sequence besides."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.U, self.W, self.V = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden), nn.Linear(2, hidden)

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.zeros(batch, H, device=device, dtype=dtype)

    def forward(self, x: Tensor, h: Tensor, constant: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + self.W(h) + self.V(constant))
        return h, h


def flat(found: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(found) if isinstance(leaf, Tensor)]


def everything(network: nn.Module, run: Callable[[nn.Module, Tensor], Any], dtype: torch.dtype) -> list[Tensor]:
    """Results and every gradient."""
    torch.manual_seed(1)
    xs = torch.randn(STEPS, BATCH, D, dtype=dtype, requires_grad=True)
    outs = [leaf for leaf in flat(run(network, xs)) if leaf.is_floating_point()]
    heads = [torch.randn(out.shape, dtype=out.dtype) for out in outs]
    inputs = [xs, *network.parameters()]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, inputs, heads)]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Any]]] = {
    "cells": (pair, lambda n, xs: n(xs)),
    "lengths": (pair, lambda n, xs: n(xs, lengths=LENGTHS)),
    "an empty sequence": (pair, lambda n, xs: n(xs, lengths=[0, STEPS, 1])),
    "states": (pair, lambda n, xs: n(xs, tuple((xs[i, :, :1].expand(-1, H), xs.new_ones(BATCH, H)) for i in (0, 1)))),
    "different cells": (
        lambda: Bidirectional(elman.GRUCell(D, H), elman.ElmanCell(D, 2 * H)),
        lambda n, xs: n(xs, lengths=LENGTHS),
    ),
    "constants": (
        lambda: Bidirectional(Constant(D, H), Constant(D, H), "sum"),
        lambda n, xs: n(xs, lengths=LENGTHS, constants=xs[0, :, :2]),
    ),
    "draws and masks": (random_pair, lambda n, xs: n(xs)),
    "LSTM": (lambda: elman.LSTM(D, H, num_layers=2, bidirectional=True, proj_size=2), lambda n, xs: n(xs)),
    "GRU, batch first": (
        lambda: elman.GRU(D, H, num_layers=2, bidirectional=True, batch_first=True),
        lambda n, xs: n(xs.transpose(0, 1), lengths=LENGTHS),
    ),
    "RNN, packed": (
        lambda: elman.RNN(D, H, bidirectional=True),
        lambda n, xs: n(pack_padded_sequence(xs, LENGTHS, enforce_sorted=False)),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("make", "run"), NETWORKS.values(), ids=NETWORKS)
def test_the_same_digits_as_one_after_the_other_on_one_thread(
    make: Any, run: Any, dtype: torch.dtype, sided: list[int]
) -> None:
    network = make().to(dtype)
    found = everything(network, run, dtype)
    assert sided
    assert set(sided) == {2}
    assert len(sided) % 2 == 0  # forward and backward
    count = len(sided)
    torch.set_num_threads(1)
    expected = everything(network, run, dtype)
    torch.set_num_threads(2)
    assert len(sided) == count
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_layers_are_those_of_torch(kind: str, sided: list[int]) -> None:
    torch.manual_seed(0)
    theirs = getattr(nn, kind)(D, H, num_layers=3, bidirectional=True, dtype=torch.float64)
    ours = getattr(elman, kind)(D, H, num_layers=3, bidirectional=True, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    found, expected = (everything(layer, lambda n, xs: n(xs), torch.float64) for layer in (ours, theirs))
    assert sided == [2] * 6
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any, sided: list[int]) -> None:
    network, xs = pair(), torch.randn(STEPS, BATCH, D)
    with mode():
        found = network(xs, lengths=LENGTHS)
        assert sided == [2]
        torch.set_num_threads(1)
        expected = network(xs, lengths=LENGTHS)
        torch.set_num_threads(2)
    for ours, theirs in zip(flat(found), flat(expected), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.is_inference() == theirs.is_inference()


def test_under_autocast(sided: list[int]) -> None:
    network, xs = pair(), torch.randn(STEPS, BATCH, D)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(network(xs)[0].float().sum(), list(network.parameters()))
        assert sided == [2, 2]
        torch.set_num_threads(1)
        expected = torch.autograd.grad(network(xs)[0].float().sum(), list(network.parameters()))
        torch.set_num_threads(2)
    assert all(map(torch.equal, found, expected))


def test_second_derivatives(sided: list[int]) -> None:
    network, xs = pair().double(), torch.randn(STEPS, BATCH, D, dtype=torch.float64, requires_grad=True)

    def second(backend: str) -> list[Tensor]:
        ys, _ = network(xs, lengths=LENGTHS, backend=backend)
        (first,) = torch.autograd.grad(ys.square().sum(), xs, create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), [xs, *network.parameters()]))

    found = second("auto")
    assert sided  # the forward pass; what is differentiated twice is the plain loop
    for ours, theirs in zip(found, second("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_a_part_of_the_outputs_and_a_graph_that_is_kept(sided: list[int]) -> None:
    network, xs = pair().double(), torch.randn(STEPS, BATCH, D, dtype=torch.float64, requires_grad=True)
    _, ((_, s), _) = network(xs)
    found = [torch.autograd.grad(s.sum(), xs, retain_graph=True)[0] for _ in range(2)]
    _, ((_, s), _) = network(xs, backend="reference")
    (expected,) = torch.autograd.grad(s.sum(), xs)
    assert sided == [2, 2, 2]
    for ours in found:
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def under(context: Any) -> Callable[[Bidirectional, Tensor], Any]:
    def run(network: Bidirectional, xs: Tensor) -> Any:
        with context():
            return network(xs)

    return run


def half_frozen(network: Bidirectional, xs: Tensor) -> Any:
    network.forward_cell.requires_grad_(False)
    return network(xs)


def on_one_thread(network: Bidirectional, xs: Tensor) -> Any:
    torch.set_num_threads(1)
    try:
        return network(xs)
    finally:
        torch.set_num_threads(2)


def of_unequal_work(network: Bidirectional, xs: Tensor) -> Any:
    together._UNEQUAL = 1  # monkeypatched already, so it is put back
    network.backward_cell = elman.LSTMCell(D, 2 * H)
    return network(xs)


def of_many_rows(network: Bidirectional, xs: Tensor) -> Any:
    return network(xs.repeat(1, 4, 1))


def of_little_work(network: Bidirectional, xs: Tensor) -> Any:
    together._WORK = 10_000_000
    return network(xs)


APART: dict[str, Callable[[Bidirectional, Tensor], Any]] = {
    "interpret": lambda n, xs: n(xs, backend="interpret"),
    "reference": lambda n, xs: n(xs, backend="reference"),
    "recomputed": lambda n, xs: n(xs, remat=2),
    "one step": lambda n, xs: n(xs[:1]),
    "nothing to run": lambda n, xs: n(xs, lengths=[0, 0, 0]),
    "an operation watched": under(Watching),
    "a default device": under(lambda: torch.device("cpu")),
    "vmap": lambda n, xs: torch.vmap(lambda x: n(x)[0], 1)(xs.unsqueeze(2)),
    "derivatives of one alone": half_frozen,
    "one thread": on_one_thread,
    "unequal work": of_unequal_work,
    "many rows": of_many_rows,
    "little work": of_little_work,
    "compiled": lambda n, xs: torch.compile(n, backend="eager", fullgraph=True)(xs),
}


@pytest.mark.parametrize("run", APART.values(), ids=APART)
def test_one_after_the_other(run: Callable[[Bidirectional, Tensor], Any], sided: list[int]) -> None:
    network, xs = pair(), torch.randn(STEPS, BATCH, D)
    found = flat(run(network, xs))
    assert sided == []
    assert all(leaf.isfinite().all() for leaf in found)


class Asks(nn.Module):
    """Takes a way that depends on a number: no program can follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = elman.ElmanCell(D, H)
        self.initial_state = self.cell.initial_state

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.cell(x, h) if x.abs().sum() >= 0 else (h, h)


@pytest.mark.parametrize("at", [0, 1])
def test_one_of_them_runs_on_the_plain_loop(at: int, sided: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["elman.unfold"], "_warned", set())
    cells: list[nn.Module] = [elman.LSTMCell(D, H), elman.LSTMCell(D, H)]
    cells[at] = Asks()
    network, xs = Bidirectional(*cells), torch.randn(STEPS, BATCH, D)
    with pytest.warns(UnfoldWarning, match="Asks runs on the plain loop"):
        found = network(xs)
    torch.testing.assert_close(found, network(xs, backend="reference"))
    assert sided == []


@pytest.mark.parametrize("at", [0, 1])
def test_what_fails_is_tried_alone_and_raised_by_its_own_scan(
    at: int, sided: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, xs = pair(), torch.randn(STEPS, BATCH, D)
    expected = network(xs)
    ran: list[bool] = []
    run_forward = autograd.run_forward

    def fails(call: Any, *rest: Any) -> Any:
        ran.append(call.reverse)
        if call.reverse == bool(at):
            raise RuntimeError("no memory for it")
        return run_forward(call, *rest)

    monkeypatch.setattr(together, "run_forward", fails)
    torch.testing.assert_close(network(xs), expected)
    assert set(ran) == {False, True}
    monkeypatch.setattr(autograd, "run_forward", fails)
    with pytest.raises(RuntimeError, match="no memory for it"):
        network(xs)


@pytest.mark.parametrize("at", [0, 1])
def test_what_a_gradient_raises(at: int, sided: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    network, xs = pair(), torch.randn(STEPS, BATCH, D)
    run_backward = together.run_backward

    def fails(call: Any, *rest: Any) -> Any:
        if call.reverse == bool(at):
            raise KeyError("of the gradient")
        return run_backward(call, *rest)

    ys, _ = network(xs)
    monkeypatch.setattr(together, "run_backward", fails)
    with pytest.raises(KeyError, match="of the gradient"):
        ys.sum().backward()
    assert sided == [2, 2]


def test_several_threads_of_python_with_one_network() -> None:
    network, xs = pair(), torch.randn(STEPS, BATCH, D)

    def one(_: int) -> list[Tensor]:
        torch.set_num_threads(2)  # a number of each thread's own
        return list(torch.autograd.grad(network(xs)[0].sum(), list(network.parameters())))

    expected = one(0)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(one, range(12)):
            assert all(map(torch.equal, found, expected))


def test_what_has_no_gradient_alone_has_none_beside_another(sided: list[int]) -> None:
    """Whether a result asks for a gradient is the same for any number of threads."""

    class Detached(elman.GRUCell):
        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            _, h = super().forward(x, h)
            return h, h.detach()

    xs = torch.randn(STEPS, BATCH, D)
    for count in (1, 2):
        torch.set_num_threads(count)
        for y, last in scan_both(Detached(D, H), Detached(D, H), xs):
            assert y.requires_grad
            assert not last.requires_grad
    assert sided
