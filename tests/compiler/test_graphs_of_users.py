"""What users do to the graph that a scan leaves behind: hooks, checkpoints, changes in place, freeing it."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import elman
from cellzoo import zoo
from comparing import inputs

both = pytest.mark.parametrize("backend", ["interpret", "llvm"])


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@both
@pytest.mark.parametrize("remat", [None, 2])
def test_backward_twice(backend: str, remat: int | None) -> None:
    cell, xs = zoo("lstm"), doubles(4, 2, 3)
    ys, _ = elman.scan(cell, xs, backend=backend, remat=remat)
    first = torch.autograd.grad(ys.sum(), xs, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(ys.sum(), xs), first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(ys.sum(), xs)


@both
def test_one_cell_twice_in_a_graph(backend: str) -> None:
    cell, xs = zoo("Gru"), doubles(4, 2, 3)

    def call(backend: str) -> tuple[Tensor, ...]:
        there, state = elman.scan(cell, xs, backend=backend)
        back, _ = elman.scan(cell, xs * 2, state, reverse=True, backend=backend)
        return torch.autograd.grad((there * back).sum(), [xs, *cell.parameters()])

    torch.testing.assert_close(call(backend), call("reference"))


@both
def test_hooks_on_parameters_and_outputs(backend: str) -> None:
    cell, xs = copy.deepcopy(zoo("Gru")), doubles(4, 2, 3)
    seen: list[str] = []
    cell.W.weight.register_hook(lambda g: (seen.append("parameter"), g * 2)[1])
    cell.W.weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    ys, _ = elman.scan(cell, xs, backend=backend)
    ys.register_hook(lambda g: (seen.append("output"), g * 3)[1])
    ys.sum().backward()
    assert seen == ["output", "parameter", "accumulated"]
    plain, _ = elman.scan(zoo("Gru"), xs, backend="reference")
    torch.testing.assert_close(cell.W.weight.grad, 6 * torch.autograd.grad(plain.sum(), zoo("Gru").W.weight)[0])


@both
def test_saved_tensor_hooks(backend: str) -> None:
    cell, xs = zoo("Gru"), doubles(4, 2, 3)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ys, _ = elman.scan(cell, xs, backend=backend)
    assert packed
    expected = torch.autograd.grad(elman.scan(cell, xs, backend="reference")[0].sum(), xs)
    torch.testing.assert_close(torch.autograd.grad(ys.sum(), xs), expected)
    with torch.autograd.graph.save_on_cpu():
        ys, _ = elman.scan(cell, xs, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(ys.sum(), xs), expected)


@both
def test_inside_a_checkpoint(backend: str) -> None:
    from torch.utils.checkpoint import checkpoint

    cell, xs = zoo("lstm"), doubles(4, 2, 3)
    ys = checkpoint(lambda x: elman.scan(cell, x, backend=backend)[0], xs, use_reentrant=False)
    expected, _ = elman.scan(cell, xs, backend="reference")
    torch.testing.assert_close(torch.autograd.grad(ys.sum(), xs), torch.autograd.grad(expected.sum(), xs))


@both
@pytest.mark.parametrize("name", ["Elman", "lstm", "YIsInput", "OldStateItself", "YTwice", "Feedforward"])
def test_results_changed_in_place_are_right_or_refused(name: str, backend: str) -> None:
    """ys.mul_(2) before backward: the gradient of what was asked, or an error; never silently another one."""
    cell = zoo(name)
    given = inputs(cell, 4, 2)
    sources = [given["xs"], *cell.parameters()]

    def loss(backend: str, in_place: bool) -> Tensor:
        ys, final = elman.scan(cell, given["xs"], given["state"], backend=backend)
        leaves = pytree.tree_leaves((ys, final))
        total = torch.zeros((), dtype=torch.float64)
        for leaf in leaves:
            total = total + (leaf.mul_(2) if in_place else leaf * 2).sin().sum()
        return total

    expected = torch.autograd.grad(loss("reference", False), sources, allow_unused=True)
    try:
        found = torch.autograd.grad(loss(backend, True), sources, allow_unused=True)
    except RuntimeError as error:
        if "inplace" not in str(error) and "in-place" not in str(error):
            raise
    else:
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None) or not (a if b is None else b).any()
            if a is not None and b is not None:
                torch.testing.assert_close(a, b)


@both
@pytest.mark.parametrize("what", ["xs", "state", "parameter"])
def test_inputs_changed_in_place_are_refused(what: str, backend: str) -> None:
    cell = copy.deepcopy(zoo("lstm with peepholes"))
    xs, state = doubles(4, 2, 3), (doubles(2, 4), doubles(2, 4))
    fed, start = xs * 1, tuple(s * 1 for s in state)
    ys, _ = elman.scan(cell, fed, start, backend=backend)
    with torch.no_grad():
        {"xs": fed, "state": start[0], "parameter": cell.W.weight}[what].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys.sum().backward()


@both
def test_a_graph_is_freed_at_once(backend: str) -> None:
    """Nothing waits for the garbage collector: no cycle holds the tensors of a sequence."""
    cell, xs = zoo("lstm"), doubles(4, 2, 3)
    elman.scan(cell, xs, backend=backend)[0].sum().backward()  # trace
    gc.collect()
    gc.disable()
    try:
        fed = xs * 1
        ys, final = elman.scan(cell, fed, backend=backend)
        ys.sum().backward(retain_graph=True)
        alive = weakref.ref(fed)
        del fed, ys, final
        assert alive() is None
    finally:
        gc.enable()


@both
def test_integer_outputs_take_no_gradient(backend: str) -> None:
    cell = zoo("Tokens")
    given = inputs(cell, 3, 2)
    (logits, token, keep), _ = elman.scan(cell, given["xs"], given["state"], backend=backend)
    assert logits.requires_grad
    assert token.dtype == torch.long
    assert keep.dtype == torch.bool
    assert not token.requires_grad
    assert not keep.requires_grad


@both
def test_undefined_gradients_of_a_function_downstream(backend: str) -> None:
    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor) -> Tensor:
            return a.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> None:
            return None

    cell, xs = zoo("lstm"), doubles(3, 2, 3)
    ys, (h, _) = elman.scan(cell, xs, backend=backend)
    found = torch.autograd.grad(Nothing.apply(ys).sum() + h.sum(), xs)
    expected = torch.autograd.grad(elman.scan(cell, xs, backend="reference")[1][0].sum(), xs)
    torch.testing.assert_close(found, expected)


@both
def test_anomaly_mode(backend: str) -> None:
    cell, xs = zoo("Gru"), doubles(3, 2, 3)
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        elman.scan(cell, xs, backend=backend)[0].sum().backward()


@both
def test_chunks_after_the_longest_sequence_are_not_run(backend: str) -> None:
    cell = zoo("Heads")  # reshapes to (B, 2, −1), which no rows can be
    given = inputs(cell, 5, 3)
    found = []
    for by, remat in ((backend, 2), ("reference", None)):
        y, _ = elman.scan(cell, given["xs"], given["state"], lengths=[4, 4, 1], remat=remat, backend=by)
        found.append((y, torch.autograd.grad((y**2).sum(), [given["xs"], *cell.parameters()])))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


@both
def test_remat_saves_memory(backend: str) -> None:
    """What the graph holds between forward and backward."""
    cell = zoo("lstm")
    xs = doubles(6000, 2, 3)
    held = {}
    for remat in (None, "auto", 40):
        kept: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: (kept.update({t.data_ptr(): t.nbytes}), t)[1], lambda t: t
        ):
            _ys, _ = elman.scan(cell, xs, backend=backend, remat=remat)
        held[remat] = sum(kept.values()) - xs.nbytes
    assert held["auto"] < held[None] / 5
    assert held[40] < held[None] / 5
