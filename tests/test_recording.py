"""``record``: marked values, all states, and the total adjoint of every state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import elman
from cellzoo import Elman, zoo
from comparing import by_hand, compiled, inputs
from elman.errors import CellError, InputError

every_backend = pytest.mark.parametrize("backend", ["reference", "interpret", "auto"])


class Marked(nn.Module):
    """A leaky unit that records its gate, a value of the input alone, and one of weights alone."""

    def __init__(self) -> None:
        super().__init__()
        self.U, self.W, self.F = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(3, 4)
        self.double()

    def initial_state(self, batch: int, *, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch, 4, device=device, dtype=dtype)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        f = elman.record("forget", torch.sigmoid(self.F(x)))
        g = elman.record("candidate", torch.tanh(self.U(x) + self.W(h)))
        elman.record("norm", h.norm(dim=-1))
        h = f * h + (1 - f) * g
        return h[:, :2], h


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def by_loop(cell: Marked, xs: Tensor, h: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    values: dict[str, list[Tensor]] = {"forget": [], "candidate": [], "norm": []}
    states = []
    for x in xs:
        f, g = torch.sigmoid(cell.F(x)), torch.tanh(cell.U(x) + cell.W(h))
        for name, value in (("forget", f), ("candidate", g), ("norm", h.norm(dim=-1))):
            values[name].append(value)
        h = f * h + (1 - f) * g
        states.append(h)
    return {name: torch.stack(leaves) for name, leaves in values.items()}, torch.stack(states)


@every_backend
@pytest.mark.parametrize("remat", [None, 2])
def test_values_and_states(backend: str, remat: int | None) -> None:
    cell, xs, h = Marked(), doubles(5, 3, 3), doubles(3, 4)
    ys, final, recording = elman.scan(cell, xs, h, record=True, backend=backend, remat=remat)
    values, states = by_loop(cell, xs, h)
    assert set(recording.values) == set(values)
    torch.testing.assert_close(recording.values, values)
    torch.testing.assert_close(recording.states, states)
    torch.testing.assert_close((ys, final), elman.scan(cell, xs, h, backend="reference"))


@every_backend
def test_recorded_values_have_gradients(backend: str) -> None:
    cell, xs, h = Marked(), doubles(5, 3, 3), doubles(3, 4)
    _, _, recording = elman.scan(cell, xs, h, record=True, backend=backend)
    values, states = by_loop(cell, xs, h)
    sources = [xs, h, *cell.parameters()]
    loss = sum(v.square().sum() for v in recording.values.values()) + recording.states.sin().sum()
    expected = sum(v.square().sum() for v in values.values()) + states.sin().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, sources), torch.autograd.grad(expected, sources))


@every_backend
@pytest.mark.parametrize("reverse", [False, True])
def test_with_lengths_padding_is_zero(backend: str, reverse: bool) -> None:
    cell, xs = Marked(), doubles(5, 3, 3)
    _, final, recording = elman.scan(cell, xs, lengths=[2, 5, 0], record=True, reverse=reverse, backend=backend)
    padding = torch.arange(5)[:, None] >= torch.tensor([2, 5, 0])
    for value in (*recording.values.values(), recording.states):
        assert value.shape[:2] == (5, 3)
        assert not value[padding].any()
    torch.testing.assert_close(recording.states[0 if reverse else 1, 0], final[0])
    torch.testing.assert_close(recording.states[0 if reverse else 4, 1], final[1])


@every_backend
def test_the_structure_of_the_states_is_kept(backend: str) -> None:
    cell = zoo("Nested")
    given = inputs(cell, 4, 2)
    _, final, recording = elman.scan(cell, given["xs"], given["state"], record=True, backend=backend)
    assert recording.states["h"][1] is None
    assert recording.states["count"].shape == (4, 2)
    last = pytree.tree_map_only(Tensor, lambda s: s[-1], recording.states)
    torch.testing.assert_close(pytree.tree_leaves(last)[:1], pytree.tree_leaves(final)[:1])
    torch.testing.assert_close(last["s"], final["s"])


def test_nothing_is_recorded_unasked() -> None:
    cell = Marked()
    given = {"xs": doubles(3, 2, 3), "state": doubles(2, 4), "constants": None}
    kept = {"forget", "candidate", "norm"}
    assert not compiled(cell, given).recorded
    assert kept == set(compiled(cell, given, record=True).recorded)
    assert len(elman.scan(cell, given["xs"])) == 2


def test_record_returns_its_value() -> None:
    value = torch.randn(2, 3)
    assert elman.record("anything", value) is value


@every_backend
def test_one_name_twice_is_an_error(backend: str) -> None:
    class Twice(Marked):
        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            elman.record("a", x)
            elman.record("a", h)
            return h, h

    elman.scan(Twice(), doubles(3, 2, 3), backend=backend)
    with pytest.raises(CellError, match=r"'a'.*twice"):
        elman.scan(Twice(), doubles(3, 2, 3), record=True, backend=backend)


# The total adjoint


def test_adjoint_of_an_elman_net_is_that_of_back_propagation_through_time() -> None:
    """∇h(τ) = Vᵀ ∇o(τ);  ∇h(t) = Wᵀ diag(1 − h(t+1)²) ∇h(t+1) + Vᵀ ∇o(t), and all gradients from it."""
    cell = Elman().double()
    xs, h0 = doubles(6, 3, 3), doubles(3, 4)
    labels = torch.randint(2, (6, 3))
    for backend in ("reference", "interpret"):
        o, _, recording = elman.scan(cell, xs, h0, record=True, backend=backend)
        loss = nn.functional.cross_entropy(o.flatten(0, 1), labels.flatten(), reduction="sum")
        found = recording.adjoint(loss)

        h, V, W, U = recording.states.detach(), cell.V.weight, cell.W.weight, cell.U.weight
        g_o = torch.softmax(o, -1) - nn.functional.one_hot(labels, 2)
        g_h = torch.zeros_like(h)
        for t in reversed(range(6)):
            g_h[t] = g_o[t] @ V
            if t < 5:
                g_h[t] += ((1 - h[t + 1] ** 2) * g_h[t + 1]) @ W
        torch.testing.assert_close(found, g_h)

        before = torch.cat([h0[None], h[:-1]])
        g_a = (1 - h**2) * g_h
        expected = {
            "V.bias": g_o.sum((0, 1)),
            "U.bias": g_a.sum((0, 1)),
            "V.weight": torch.einsum("tbi,tbj->ij", g_o, h),
            "W.weight": torch.einsum("tbi,tbj->ij", g_a, before),
            "U.weight": torch.einsum("tbi,tbj->ij", g_a, xs),
        }
        loss.backward()
        for name, parameter in cell.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], msg=lambda m, n=name: f"{n}: {m}")
            parameter.grad = None
        torch.testing.assert_close(xs.grad, g_a @ U)
        torch.testing.assert_close(h0.grad, g_a[0] @ W)
        xs.grad = h0.grad = None


NAMES = (
    "Elman", "lstm with peepholes", "Gru", "stack of lstm", "Swap", "TwoIndependent", "Feeds",
    "Delay", "DelayLine", "OldState", "OldStateItself", "YTwice", "Feedforward", "FastWeights",
    "Nested", "Attends", "JordanTeacherForced", "StateFixed", "Accumulate", "OneProduct",
)  # fmt: skip


class Kept(nn.Module):
    """A cell that keeps every next state; one that was handed through is a new value of its own."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell
        self.states: list[list[Tensor]] = []

    def forward(self, x: Any, state: Any, *constants: Any) -> tuple[Any, Any]:
        y, new = self.cell(x, state, *constants)
        given = {id(leaf) for leaf in pytree.tree_leaves((x, state))}
        new = pytree.tree_map(lambda s: s.clone() if is_float(s) and id(s) in given else s, new)
        self.states.append([s for s in pytree.tree_leaves(new) if is_float(s)])
        return y, new


@every_backend
@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"lengths": [3, 4, 1]}, {"remat": 2}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_adjoints_are_gradients_of_every_state(name: str, options: dict[str, Any], backend: str) -> None:
    cell = zoo(name)
    given = inputs(cell, 4, 3)
    xs, state, constants = given["xs"], given["state"], given["constants"]
    ys, final, recording = elman.scan(cell, xs, state, constants=constants, record=True, backend=backend, **options)
    found = [leaf for leaf in pytree.tree_leaves(recording.adjoint(total(ys, final))) if is_float(leaf)]

    kept = Kept(cell)
    plain = {key: value for key, value in options.items() if key != "remat"}
    loss = total(*by_hand(kept, xs, state, constants=constants, **plain))
    expected = [torch.zeros_like(leaf) for leaf in found]
    one_by_one = iter(kept.states)
    for b, length in enumerate(options.get("lengths", [4, 4, 4])):
        for t in reversed(range(length)) if options.get("reverse") else range(length):
            grads = torch.autograd.grad(loss, next(one_by_one), retain_graph=True, allow_unused=True)
            for leaf, grad in zip(expected, grads, strict=True):
                leaf[t, b] = 0 if grad is None else grad[0]
    torch.testing.assert_close(found, expected)


def total(*trees: Any) -> Tensor:
    return sum(leaf.sin().sum() for leaf in pytree.tree_leaves(trees) if is_float(leaf))


def is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


@every_backend
def test_an_adjoint_is_the_response_to_a_perturbation(backend: str) -> None:
    cell = zoo("Gru")
    xs = doubles(5, 2, 3).detach()
    _, _, recording = elman.scan(cell, xs, record=True, backend=backend)
    ys, final, recording = elman.scan(cell, xs, record=True, backend=backend)
    adjoint = recording.adjoint(ys.sin().sum() + final.sum())
    states = recording.states.detach()
    for t in (0, 2, 4):
        poke = torch.zeros(2, 4, dtype=torch.float64)
        poke[1, 3] = 1e-6

        def after(change: Tensor, t: int = t) -> Tensor:
            h = states[t] + change
            rest, last = by_hand(cell, xs[t + 1 :], h) if t < 4 else (torch.zeros(()), h)
            return h.sin().sum() + rest.sin().sum() + last.sum()

        with torch.no_grad():
            slope = (after(poke) - after(-poke)) / 2e-6
        torch.testing.assert_close(adjoint[t, 1, 3], slope, rtol=1e-6, atol=1e-8)


@every_backend
def test_the_gradient_of_the_states_is_only_the_local_part(backend: str) -> None:
    cell = zoo("Elman")
    ys, _, recording = elman.scan(cell, doubles(4, 2, 3), record=True, backend=backend)
    assert not torch.allclose(recording.adjoint(ys.sum()), torch.ones(2, dtype=torch.float64) @ cell.V.weight)


@every_backend
def test_a_loss_that_does_not_depend_on_the_scan(backend: str) -> None:
    _, _, recording = elman.scan(zoo("Elman"), doubles(4, 2, 3), record=True, backend=backend)
    with pytest.raises(InputError, match="does not depend"):
        recording.adjoint(torch.ones(()))
    with pytest.raises(InputError, match="does not depend"):
        recording.adjoint(torch.ones((), requires_grad=True) * 2)


@every_backend
def test_the_adjoint_of_a_state_that_no_gradient_enters(backend: str) -> None:
    """What is fed back is a choice, which has no gradient; what comes of it later depends on it all the same."""
    torch.manual_seed(0)
    cell = elman.Feedback(elman.ElmanCell(3 + 4, 4), feed="argmax").double()
    ys, _, recording = elman.scan(cell, doubles(4, 2, 3), record=True, backend=backend)
    (h, fed), weight = recording.adjoint(ys.sum()), cell.cell.weight_ih[:, 3:]
    before = (h[1:] * (1 - ys[1:].square())).detach()  # at the preactivation, which reads what was fed a step before
    torch.testing.assert_close(fed[:-1], before @ weight)
    torch.testing.assert_close(fed[-1], torch.zeros_like(fed[-1]))


@every_backend
def test_recording_without_gradients(backend: str) -> None:
    with torch.no_grad():
        ys, _, recording = elman.scan(zoo("Elman"), doubles(4, 2, 3), record=True, backend=backend)
    assert recording.states.shape == (4, 2, 4)
    with pytest.raises(InputError, match="does not depend"):
        recording.adjoint(ys.sum())


@every_backend
def test_adjoint_and_backward_of_one_loss(backend: str) -> None:
    cell, xs = zoo("Gru"), doubles(4, 2, 3)
    ys, _, recording = elman.scan(cell, xs, record=True, backend=backend)
    loss = ys.square().sum()
    first = recording.adjoint(loss)
    loss.backward(inputs=[xs], retain_graph=True)
    torch.testing.assert_close(recording.adjoint(loss, retain_graph=False), first)
    plain, _ = elman.scan(cell, xs, backend=backend)
    torch.testing.assert_close(xs.grad, torch.autograd.grad(plain.square().sum(), xs)[0])


@every_backend
def test_the_adjoint_can_be_differentiated_no_further_or_rightly(backend: str) -> None:
    """It is handed out as a constant: the information-flow regulariser treats it so."""
    ys, _, recording = elman.scan(zoo("Elman"), doubles(4, 2, 3), record=True, backend=backend)
    assert not recording.adjoint(ys.square().sum()).requires_grad


def test_a_combinator_inside_one_of_its_kind_records_apart() -> None:
    cell = elman.Highway(elman.Highway(elman.ElmanCell(3, 3)))
    _, _, recording = elman.scan(cell, torch.randn(4, 2, 3), record=True, backend="interpret")
    assert list(recording.values) == ["cell.cell.preactivation", "cell.transform", "transform"]
