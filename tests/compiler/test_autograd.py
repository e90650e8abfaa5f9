"""A scan under autograd: second derivatives, torch.func, forward mode, and what wants a gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap
from torch.utils import _pytree as pytree

import elman
from cellzoo import zoo
from comparing import inputs, operations
from elman.errors import ForwardModeError

both = pytest.mark.parametrize("backend", ["interpret", "auto"])
# PyTorch's own, at the first use of forward mode in a process.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def scanned(name: str, backend: str = "interpret", **options: Any) -> tuple[Any, list[Tensor]]:
    """A scan as a function of all its floating inputs, parameters included."""
    cell = zoo(name)
    given = inputs(cell, 3, 2)
    flat, spec = pytree.tree_flatten((given, dict(cell.named_parameters())))
    places = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    start = [flat[i].detach().clone().requires_grad_() for i in places]

    class Scan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, xs: Any, state: Any, constants: Any) -> Any:
            return elman.scan(self.cell, xs, state, constants=constants, backend=backend, **options)

    scan = Scan()

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        filled = list(flat)
        for i, leaf in zip(places, leaves, strict=True):
            filled[i] = leaf
        now, parameters = pytree.tree_unflatten(filled, spec)
        named = {f"cell.{key}": value for key, value in parameters.items()}
        out = functional_call(scan, named, (now["xs"], now["state"], now["constants"]))
        return tuple(leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point())

    return call, start


@pytest.mark.parametrize("options", [{}, {"lengths": [1, 3], "reverse": True}, {"remat": 2}], ids=str)
@pytest.mark.parametrize(
    "name", ["Elman", "lstm with peepholes", "Gru", "lstm with layer norm", "Attends", "Delay", "Nested"]
)
def test_first_and_second_derivatives(name: str, options: dict[str, Any]) -> None:
    call, start = scanned(name, **options)
    assert torch.autograd.gradcheck(call, start, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, start, fast_mode=True)


def test_second_derivatives_in_full() -> None:
    call, start = scanned("Elman")
    assert torch.autograd.gradcheck(call, start)
    assert torch.autograd.gradgradcheck(call, start)


def test_a_gradient_penalty() -> None:
    """The gradient of a gradient's norm in the parameters, as users write it."""
    found = []
    for backend in ("interpret", "reference"):
        cell = zoo("lstm")
        torch.manual_seed(0)
        xs = doubles(4, 3, 3)
        ys, _ = elman.scan(cell, xs, backend=backend)
        (slope,) = torch.autograd.grad(ys.sum(), xs, create_graph=True)
        found.append(torch.autograd.grad(slope.norm(), list(cell.parameters())))
    torch.testing.assert_close(found[0], found[1])


def test_a_gradient_that_is_differentiated_where_inputs_depend_on_one_another() -> None:
    """One state leaf made from the other: the way between them is not the scan's."""
    found = []
    for backend in ("interpret", "reference"):
        cell = zoo("lstm")
        torch.manual_seed(0)
        xs, h = doubles(4, 3, 3), doubles(3, 4)
        ys, _ = elman.scan(cell, xs, (first := h.tanh(), first.sin()), backend=backend)
        slopes = torch.autograd.grad(ys.sin().sum(), [xs, h], create_graph=True)
        found.append([*slopes, *torch.autograd.grad(sum(g.square().sum() for g in slopes), [xs, *cell.parameters()])])
    torch.testing.assert_close(found[0], found[1])


# torch.func


def loss_of(cell: nn.Module, backend: str) -> Any:
    def loss(parameters: dict[str, Tensor], xs: Tensor, state: Tensor) -> Tensor:
        class Scan(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.cell = cell

            def forward(self, xs: Tensor, state: Tensor) -> Any:
                return elman.scan(self.cell, xs, state, backend=backend)

        ys, final = functional_call(Scan(), {f"cell.{k}": v for k, v in parameters.items()}, (xs, state))
        return ys.sin().sum() + final.square().sum()

    return loss


@both
def test_func_grad_and_vjp(backend: str) -> None:
    cell = zoo("Gru")
    xs, state = doubles(4, 3, 3).detach(), doubles(3, 4).detach()
    parameters = {name: p.detach() for name, p in cell.named_parameters()}
    found = grad(loss_of(cell, backend), argnums=(0, 1, 2))(parameters, xs, state)
    expected = grad(loss_of(cell, "reference"), argnums=(0, 1, 2))(parameters, xs, state)
    torch.testing.assert_close(found, expected)
    plain = [p.clone().requires_grad_() for p in parameters.values()]
    value = loss_of(cell, "interpret")(dict(zip(parameters, plain, strict=True)), xs, state)
    torch.testing.assert_close(list(found[0].values()), list(torch.autograd.grad(value, plain)))
    _, pull = vjp(lambda x: loss_of(cell, backend)(parameters, x, state), xs)
    torch.testing.assert_close(pull(torch.ones((), dtype=torch.float64))[0], expected[1])


@both
def test_vmap_over_ensembles_and_inputs(backend: str) -> None:
    cell = zoo("Gru")
    xs, state = doubles(5, 4, 3, 3).detach(), doubles(5, 3, 4).detach()
    found = vmap(lambda x, s: elman.scan(cell, x, s, backend=backend)[0])(xs, state)
    expected = torch.stack([elman.scan(cell, x, s, backend="reference")[0] for x, s in zip(xs, state, strict=True)])
    torch.testing.assert_close(found, expected)
    stacked = {name: torch.stack([p, 2 * p]).detach() for name, p in cell.named_parameters()}
    found = vmap(loss_of(cell, backend), (0, None, None))(stacked, xs[0], state[0])
    for i, value in enumerate(found):
        one = {name: p[i] for name, p in stacked.items()}
        torch.testing.assert_close(value, loss_of(cell, "reference")(one, xs[0], state[0]))


@both
def test_gradients_of_every_sample(backend: str) -> None:
    cell = zoo("Elman")
    xs, state = doubles(4, 3, 3).detach(), doubles(3, 4).detach()
    parameters = {name: p.detach() for name, p in cell.named_parameters()}

    def one(parameters: Any, x: Tensor, s: Tensor) -> Tensor:
        return loss_of(cell, backend)(parameters, x.unsqueeze(1), s.unsqueeze(0))

    found = vmap(grad(one), (None, 1, 0))(parameters, xs, state)
    for b in range(3):
        expected = grad(loss_of(cell, "reference"))(parameters, xs[:, b : b + 1], state[b : b + 1])
        torch.testing.assert_close({name: g[b] for name, g in found.items()}, expected)


@both
def test_jacrev(backend: str) -> None:
    cell = zoo("Elman")
    xs, state = doubles(3, 1, 3).detach(), doubles(1, 4).detach()
    found = jacrev(lambda s: elman.scan(cell, xs, s, backend=backend)[1])(state)
    expected = torch.autograd.functional.jacobian(lambda s: elman.scan(cell, xs, s, backend="reference")[1], state)
    torch.testing.assert_close(found, expected)


@forward_mode
def test_jvp_raises_and_the_reference_has_it() -> None:
    cell = zoo("Elman")
    xs, direction = doubles(3, 2, 3).detach(), doubles(3, 2, 3).detach()
    for backend in ("interpret", "auto"):
        with pytest.raises(ForwardModeError, match="reference"):
            jvp(lambda x, b=backend: elman.scan(cell, x, backend=b)[0], (xs,), (direction,))
    _, found = jvp(lambda x: elman.scan(cell, x, backend="reference")[0], (xs,), (direction,))
    step = 1e-6
    ends = [elman.scan(cell, xs + sign * step * direction, backend="reference")[0] for sign in (1, -1)]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-8)


@forward_mode
@pytest.mark.parametrize("gradients", [True, False])
@both
def test_dual_tensors_raise(backend: str, gradients: bool) -> None:
    cell = zoo("Elman")
    with torch.set_grad_enabled(gradients), torch.autograd.forward_ad.dual_level():
        xs = torch.autograd.forward_ad.make_dual(torch.randn(3, 2, 3).double(), torch.ones(3, 2, 3).double())
        with pytest.raises(ForwardModeError):
            elman.scan(cell, xs, backend=backend)
        xs = torch.randn(3, 2, 3).double()
        parameter = torch.autograd.forward_ad.make_dual(cell.W.weight.detach(), torch.ones(4, 4).double())
        with pytest.raises(ForwardModeError):
            functional_call(Holder(cell, backend), {"cell.W.weight": parameter}, (xs,))


class Holder(nn.Module):
    def __init__(self, cell: nn.Module, backend: str) -> None:
        super().__init__()
        self.cell, self.backend = cell, backend

    def forward(self, xs: Tensor) -> Any:
        return elman.scan(self.cell, xs, backend=self.backend)


@forward_mode
def test_jacfwd_and_hessian_raise() -> None:
    cell = zoo("Elman")
    xs = doubles(2, 1, 3).detach()
    with pytest.raises(ForwardModeError):
        torch.func.jacfwd(lambda x: elman.scan(cell, x)[0])(xs)
    with pytest.raises(ForwardModeError):
        torch.func.hessian(lambda x: elman.scan(cell, x)[0].square().sum())(xs)


# What wants a gradient


@both
def test_frozen_parameters_get_none_and_cost_nothing(backend: str) -> None:
    cell = copy.deepcopy(zoo("Elman"))
    xs = torch.randn(4, 3, 3, dtype=torch.float64)

    def products(module: nn.Module) -> int:
        def run() -> None:
            elman.scan(module, xs, backend=backend)[0].sum().backward()

        run()
        seen = operations(run)
        return seen["mm"] + seen["addmm"]

    full = products(cell)
    cell.U.weight.requires_grad_(False)
    cell.zero_grad()
    assert products(cell) == full - 1
    assert cell.U.weight.grad is None
    assert cell.W.weight.grad is not None
    cell.requires_grad_(False)
    ys, final = elman.scan(cell, xs, backend=backend)
    assert not ys.requires_grad
    assert not final.requires_grad


@both
def test_only_the_state_wants_a_gradient(backend: str) -> None:
    cell = copy.deepcopy(zoo("lstm")).requires_grad_(False)
    xs, state = torch.randn(4, 2, 3).double(), (doubles(2, 4), doubles(2, 4).detach())
    ys, _ = elman.scan(cell, xs, state, backend=backend)
    found = torch.autograd.grad(ys.sum(), state[0])
    expected = torch.autograd.grad(elman.scan(cell, xs, state, backend="reference")[0].sum(), state[0])
    torch.testing.assert_close(found, expected)


@both
def test_gradients_of_some_inputs_alone(backend: str) -> None:
    cell = zoo("Gru")
    xs, state = doubles(4, 2, 3), doubles(2, 4)
    for wanted in ([xs], [state], [cell.W.weight], [cell.R.weight, xs]):
        ys, final = elman.scan(cell, xs, state, backend=backend)
        expected, last = elman.scan(cell, xs, state, backend="reference")
        torch.testing.assert_close(
            torch.autograd.grad(ys.sum() + final.sin().sum(), wanted),
            torch.autograd.grad(expected.sum() + last.sin().sum(), wanted),
        )


@both
@pytest.mark.parametrize("part", ["ys", "the final state", "one of two states", "one step"])
def test_gradients_from_some_outputs_alone(part: str, backend: str) -> None:
    cell = zoo("lstm")
    xs = doubles(4, 2, 3)

    def pick(result: Any) -> Tensor:
        ys, (h, c) = result
        return {"ys": ys, "the final state": h + c, "one of two states": c, "one step": ys[1]}[part].sin().sum()

    sources = [xs, *cell.parameters()]
    found = torch.autograd.grad(pick(elman.scan(cell, xs, backend=backend)), sources)
    torch.testing.assert_close(found, torch.autograd.grad(pick(elman.scan(cell, xs, backend="reference")), sources))


@both
def test_no_grad_and_inference_mode(backend: str) -> None:
    cell, xs = zoo("lstm"), doubles(4, 2, 3)
    expected = elman.scan(cell, xs, backend="reference")[0].detach()
    with torch.no_grad():
        ys, _ = elman.scan(cell, xs, backend=backend)
    assert not ys.requires_grad
    torch.testing.assert_close(ys, expected)
    with torch.inference_mode():
        ys, _ = elman.scan(cell, xs, backend=backend)
        assert ys.is_inference()
    torch.testing.assert_close(ys.clone(), expected)
    torch.testing.assert_close(elman.scan(cell, xs, backend=backend)[0].detach(), expected)


def test_traced_in_inference_mode_first() -> None:
    class Fresh(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W = nn.Linear(3, 3)
            self.offset = 0.123

        def forward(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
            s = torch.tanh(self.W(x) + s) + self.offset
            return s, s

    cell, xs, s = Fresh(), torch.randn(3, 2, 3), torch.zeros(2, 3)
    with torch.inference_mode():
        elman.scan(cell, xs, s, backend="interpret")
    elman.scan(cell, xs, s, backend="interpret")[0].sum().backward()
    found = cell.W.weight.grad
    cell.zero_grad()
    elman.scan(cell, xs, s, backend="reference")[0].sum().backward()
    torch.testing.assert_close(found, cell.W.weight.grad)


@both
def test_truncated_back_propagation(backend: str) -> None:
    cell = zoo("Gru")
    xs = doubles(6, 2, 3)
    _first, state = elman.scan(cell, xs[:3], backend=backend)
    second, _ = elman.scan(cell, xs[3:], state.detach(), backend=backend)
    (found,) = torch.autograd.grad(second.sum(), xs, allow_unused=True)
    assert not found[:3].any()
    assert found[3:].any()


class Ways(nn.Module):
    """A state that learns, one that counts, and one that only watches the first."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(batch, 3, device=device, dtype=dtype) for _ in range(3))

    def forward(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        h, n, seen = state
        h, n, seen = torch.tanh(x + h @ self.w), 0.5 * n + torch.ones_like(x), 0.9 * seen + h.detach()
        return (h, n, seen, n + seen, 2 * x, n + h), (h, n, seen)


def test_the_last_state_of_a_sequence_without_steps_is_its_first() -> None:
    state = tuple(torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    x = torch.randn(4, 3, 3, dtype=torch.float64)
    for backend in ("interpret", "llvm", "reference"):
        _, last = elman.scan(Ways(), x, state, lengths=[4, 0, 2], backend=backend)
        assert all(s.requires_grad for s in last)
        (found,) = torch.autograd.grad(last[1].sum(), state[1])
        torch.testing.assert_close(found, torch.tensor([0.5**4, 1, 0.25]).double()[:, None].expand(3, 3))


@pytest.mark.parametrize("needs_x", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("backend", ["interpret", "llvm"])
def test_what_no_gradient_flows_through_does_not_ask_for_one(backend: str, frozen: bool, needs_x: bool) -> None:
    cell = Ways()
    cell.w.requires_grad_(not frozen)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=needs_x)
    found, expected = ([*y, *s] for y, s in (elman.scan(cell, x, backend=b) for b in (backend, "reference")))
    assert [t.requires_grad for t in found] == [t.requires_grad for t in expected]
    torch.testing.assert_close(found, expected)
    wanted = [t for t in (cell.w, x) if t.requires_grad]
    if wanted:
        sums = (sum(t.sum() for t in some if t.requires_grad) for some in (found, expected))
        torch.testing.assert_close(*(torch.autograd.grad(total, wanted) for total in sums))
