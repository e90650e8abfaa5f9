"""A scan among the rest of PyTorch: copies, pickles, worker processes, threads, DDP, torch.compile."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elman
from cellzoo import Elman, Gru, Lstm, Stack, zoo
from comparing import inputs


class Model(nn.Module):
    """Something a user would write around a scan."""

    def __init__(self, cell: nn.Module | None = None, backend: str = "auto") -> None:
        super().__init__()
        self.cell = Lstm(4, peephole=True) if cell is None else cell
        self.head = nn.Linear(4, 2)
        self.backend = backend

    def forward(self, xs: Tensor, lengths: Tensor | None = None) -> Tensor:
        ys, _ = elman.scan(self.cell, xs, lengths=lengths, backend=self.backend)
        return self.head(ys)


def gradients(model: nn.Module, xs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(xs).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_deep_copies_and_pickles_are_models_of_their_own() -> None:
    model = Model()
    xs = torch.randn(5, 3, 3)
    expected = gradients(model, xs)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = Model()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        torch.testing.assert_close(gradients(other, xs), expected)
        with torch.no_grad():
            other.cell.W.weight.mul_(0.5)
        assert not torch.allclose(gradients(other, xs)["head.weight"], expected["head.weight"])
    torch.testing.assert_close(gradients(model, xs), expected)


def test_a_scan_leaves_nothing_on_the_module() -> None:
    model = Model()
    before = {name: set(part.__dict__) for name, part in model.named_modules()}
    keys = set(model.state_dict())
    gradients(model, torch.randn(5, 3, 3))
    assert {name: set(part.__dict__) for name, part in model.named_modules()} == before
    assert set(model.state_dict()) == keys


class Scans(torch.utils.data.Dataset):
    """A data set whose items are computed by a scan, in the worker."""

    def __init__(self) -> None:
        self.cell = Elman()

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        xs = torch.full((4, 1, 3), float(index))
        with torch.no_grad():
            return elman.scan(self.cell, xs, backend="interpret")[0][:, 0]


@pytest.mark.parametrize("traced_before", [True, False])
def test_in_the_workers_of_a_loader(traced_before: bool) -> None:
    data = Scans()
    if traced_before:
        data[0]
    else:
        data.cell.marker = traced_before  # another key: traced in the workers
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork")
    found = torch.cat(list(loader))
    torch.testing.assert_close(found, torch.stack([data[i] for i in range(6)]))


def test_many_threads_at_once() -> None:
    """They share one cell, trace it once between them, and each has its own result, gradient and recording."""
    elman.compiler.cache.forget()
    cell = zoo("Gru")
    results: dict[int, Any] = {}
    barrier = threading.Barrier(6)

    def work(i: int) -> None:
        xs = torch.full((5, 2, 3), float(i), dtype=torch.float64, requires_grad=True)
        barrier.wait()
        for _ in range(5):
            ys, _, recording = elman.scan(cell, xs, backend="interpret", record=True)
            (g,) = torch.autograd.grad(ys.sum(), xs)
            results[i] = (ys.detach(), g, recording.states.detach())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    for i, (ys, g, states) in results.items():
        xs = torch.full((5, 2, 3), float(i), dtype=torch.float64, requires_grad=True)
        expected, _ = elman.scan(cell, xs, backend="reference")
        torch.testing.assert_close(ys, expected.detach())
        torch.testing.assert_close(states, expected.detach())
        torch.testing.assert_close(g, torch.autograd.grad(expected.sum(), xs)[0])


def test_backward_from_another_thread() -> None:
    cell, xs = zoo("lstm"), torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    ys, _ = elman.scan(cell, xs, backend="interpret")
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.extend(torch.autograd.grad(ys.sum(), xs)))
    thread.start()
    thread.join()
    expected = torch.autograd.grad(elman.scan(cell, xs, backend="reference")[0].sum(), xs)
    torch.testing.assert_close(found, list(expected))


# Several processes


def _train(rank: int, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Model().double())
    xs = torch.randn(5, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        model(xs[:, 2 * rank : 2 * rank + 2]).square().mean().backward()
        optimiser.step()
    torch.save({name: p.detach() for name, p in model.module.named_parameters()}, f"{out}/{rank}.pt")
    torch.distributed.barrier()  # neither leaves while the other still listens
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(_train, (str(tmp_path),), nprocs=2, start_method="spawn")
    torch.manual_seed(0)
    model = Model().double()
    xs = torch.randn(5, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        model(xs).square().mean().backward()
        optimiser.step()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, {name: p.detach() for name, p in model.named_parameters()})


# torch.compile


@pytest.fixture
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("compiler", ["aot_eager", "eager"])
@pytest.mark.parametrize("kind", [Elman, Gru, Lstm, Stack])
def test_torch_compile_of_the_whole_model(kind: type, compiler: str) -> None:
    cell = kind()
    model = Model(cell).double()
    if kind is Elman:
        model.head = nn.Linear(2, 2).double()
    fast = torch.compile(model, fullgraph=True, backend=compiler)
    for steps, batch in ((5, 3), (7, 3), (5, 2)):
        xs = torch.randn(steps, batch, 3, dtype=torch.float64, requires_grad=True)
        sources = [xs, *model.parameters()]
        found = fast(xs)
        expected = model(xs)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found.square().sum(), sources), torch.autograd.grad(expected.square().sum(), sources)
        )


@pytest.mark.usefixtures("_fresh_dynamo")
def test_torch_compile_with_lengths() -> None:
    model = Model().double()
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    xs = torch.randn(5, 3, 3, dtype=torch.float64)
    lengths = torch.tensor([5, 1, 3])
    torch.testing.assert_close(fast(xs, lengths), model(xs, lengths))


@pytest.mark.usefixtures("_fresh_dynamo")
def test_torch_compile_without_gradients() -> None:
    model = Model().double().eval()
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    xs = torch.randn(5, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fast(xs), model(xs))


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # PyTorch's own, as it loads inductor
def test_torch_compile_with_inductor() -> None:
    model = Model()
    fast = torch.compile(model, fullgraph=True)
    xs = torch.randn(5, 3, 3)
    found = {name.removeprefix("_orig_mod."): g for name, g in gradients(fast, xs).items()}
    torch.testing.assert_close(found, gradients(model, xs))
    torch.testing.assert_close(fast(xs), model(xs))


class Held(nn.Module):
    """A recurrence that nothing flows back through."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.zeros(batch, 4, device=device, dtype=dtype)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(x @ self.w + h).detach()
        return h, h


@pytest.mark.usefixtures("_fresh_dynamo")
def test_torch_compile_where_no_gradient_flows_back() -> None:
    cell, head, xs = Held(), nn.Linear(4, 1), torch.randn(5, 3, 4)
    fast = torch.compile(lambda xs: head(elman.scan(cell, xs)[0]).sum(), fullgraph=True, backend="aot_eager")
    fast(xs).backward()
    assert cell.w.grad is None or not cell.w.grad.any()
    found = head.weight.grad
    assert found is not None
    (expected,) = torch.autograd.grad(head(elman.scan(cell, xs)[0]).sum(), head.weight)
    torch.testing.assert_close(found, expected)


# Wrappers of the module


def test_functional_call_of_the_model() -> None:
    model = Model().double()
    xs = torch.randn(4, 2, 3, dtype=torch.float64)
    halves = {name: p.detach() * 0.5 for name, p in model.named_parameters()}
    found = torch.func.functional_call(model, halves, (xs,))
    twin = copy.deepcopy(model)
    twin.load_state_dict(halves)
    torch.testing.assert_close(found, twin(xs))


def test_averaged_and_swapped_weights() -> None:
    model = Model().double()
    xs = torch.randn(4, 2, 3, dtype=torch.float64)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged(xs), model(xs))


def test_forward_and_backward_hooks_of_modules() -> None:
    """A hook on the whole model sees what it always saw."""
    model, seen = Model().double(), []
    model.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    model.head.register_full_backward_hook(lambda module, into, out: seen.append("backward"))
    model(torch.randn(4, 2, 3, dtype=torch.float64)).sum().backward()
    assert seen == [(4, 2, 2), "backward"]


def test_a_parameter_that_is_tied_to_another() -> None:
    cell = Elman(3).double()
    cell.W.weight = cell.U.weight
    given = inputs(cell, 4, 2)
    sources = [given["xs"], *cell.parameters()]
    found = torch.autograd.grad(elman.scan(cell, given["xs"], backend="interpret")[0].sum(), sources)
    expected = torch.autograd.grad(elman.scan(cell, given["xs"], backend="reference")[0].sum(), sources)
    torch.testing.assert_close(found, expected)


def test_parameters_set_by_hand() -> None:
    """Someone replaces .data, or the parameter itself: the next call sees it."""
    cell = Elman().double()
    xs = torch.randn(4, 2, 3, dtype=torch.float64)
    elman.scan(cell, xs, backend="interpret")
    cell.W.weight.data = torch.randn(4, 4).double()
    torch.testing.assert_close(*(elman.scan(cell, xs, backend=b) for b in ("interpret", "reference")))
    cell.W.weight = nn.Parameter(torch.randn(4, 4).double())
    torch.testing.assert_close(*(elman.scan(cell, xs, backend=b) for b in ("interpret", "reference")))
