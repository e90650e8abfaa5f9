"""What a step falls apart into, seen in the program itself and in the operations that run."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import elman
from cellzoo import ZooCell, zoo
from comparing import assert_same, by_hand, compiled, differentiated, everything, inputs, operations, scan_by
from elman.compiler.program import Loop, Program


def shape(program: Program) -> str:
    """The parts of a program in order: S for a segment, L for a loop."""
    return "".join("L" if isinstance(part, Loop) else "S" for part in program.parts)


def names(nodes: Any) -> Counter[str]:
    """The ATen operations of some nodes; views cost nothing and are left out."""
    views = {"t", "slice", "split", "chunk", "view", "select", "unsqueeze", "expand", "getitem", "squeeze", "detach"}
    found = Counter(n.target.overloadpacket.__name__ for n in nodes if hasattr(n.target, "overloadpacket"))
    return Counter({name: count for name, count in found.items() if name not in views})


FORWARD = {
    "Elman": "SLS",
    "lstm": "SL",
    "lstm with peepholes": "SL",
    "Gru": "SL",
    "stack of gru": "SLSLSL",
    "stack of lstm": "SLSLSL",
    "Feedforward": "S",
    "Stateless": "S",
    "JordanTeacherForced": "S",
    "JordanFree": "SL",
    "Delay": "S",
    "DelayLine": "S",
    "TwoIndependent": "SLLS",
    "Feeds": "SLSLS",
    "Swap": "SLS",
    "Accumulate": "L",
    "OldState": "SLS",
    "YIsInput": "SL",
    "Conditioned": "SLS",
    "StateFixed": "S",
    "stack without biases": "SLSL",
}


@pytest.mark.parametrize("name", FORWARD)
def test_segments_and_loops(name: str) -> None:
    cell = zoo(name)
    assert shape(compiled(cell, inputs(cell, 3, 2)).program) == FORWARD[name]


@pytest.mark.parametrize("name", FORWARD)
def test_the_adjoint_has_a_loop_for_every_loop(name: str) -> None:
    cell = zoo(name)
    both = differentiated(cell, inputs(cell, 3, 2))
    loops = FORWARD[name].count("L")
    assert len(both.forward.loops) == loops
    assert len(both.adjoint.loops) == loops


def test_the_adjoint_of_an_elman_net_mirrors_it() -> None:
    cell = zoo("Elman")
    both = differentiated(cell, inputs(cell, 3, 2))
    assert shape(both.forward) == shape(both.adjoint) == "SLS"
    first, loop, last = both.adjoint.parts
    assert names(first.nodes) == {"mm": 2, "sum": 1}  # Vᵀ ∇o, ∇V, ∇c
    assert names(loop.nodes) == {"mm": 1, "add": 1, "tanh_backward": 1}  # Wᵀ diag(1 − h²) (∇h + Vᵀ ∇o)
    assert names(last.nodes) == {"mm": 3, "sum": 1}  # ∇U, ∇W, ∇x, ∇b


def test_the_hoisted_product_adds_its_bias() -> None:
    for name in ("Elman", "lstm", "Gru"):
        cell = zoo(name)
        first = compiled(cell, inputs(cell, 3, 2)).program.parts[0]
        assert names(first.nodes) == {"addmm": 1}


class Beside(torch.nn.Module):
    """An Elman cell with one weight for its input and its state, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.both = torch.nn.Linear(3 + 4, 4, dtype=torch.float64)

    def example(self, steps: int, batch: int) -> Any:
        return torch.randn(steps, batch, 3), None

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(batch, 4, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.tanh(self.both(torch.cat([x, h], -1)))
        return h, h


def test_the_product_with_the_input_leaves_the_loop_though_the_state_stands_beside_it() -> None:
    given = inputs(Beside(), 3, 2)
    program = compiled(Beside(), given).program
    assert shape(program) == "SL"
    assert names(program.segments[0].nodes) == {"addmm": 1}
    assert names(program.loops[0].nodes) == {"addmm": 1, "tanh": 1}
    cell = Beside()
    assert_same(everything(scan_by("interpret"), cell, given), everything(by_hand, cell, given))


def test_the_order_of_a_stack_in_backward() -> None:
    cell = zoo("stack of gru")
    both = differentiated(cell, inputs(cell, 3, 2))
    assert [loop.carried for loop in both.forward.loops] == [[0], [1], [2]]
    assert [loop.carried for loop in both.adjoint.loops] == [[2], [1], [0]]


@pytest.mark.parametrize(
    "name", ["Elman", "ElmanTwoBiases", "lstm", "lstm with peepholes", "stack of lstm", "stack without biases"]
)
def test_one_product_a_layer_in_every_loop(name: str) -> None:
    """Products with inputs and gradients of parameters leave the loops, forward and backward."""
    cell = zoo(name)
    both = differentiated(cell, inputs(cell, 3, 2))
    for loop in (*both.forward.loops, *both.adjoint.loops):
        found = names(loop.nodes)
        assert found["mm"] + found["addmm"] == 1, found


def per_step(cell: ZooCell, backward: bool) -> Counter[str]:
    """Operations that run once more when there is one step more."""

    def run(steps: int) -> Counter[str]:
        given = inputs(cell, steps, 2)

        def call() -> None:
            ys, _final = elman.scan(cell, given["xs"], given["state"], backend="interpret")
            if backward:
                torch.autograd.grad(ys.sum(), [given["xs"], given["state"], *cell.parameters()])

        run_quietly = call if backward else torch.no_grad()(call)
        run_quietly()  # trace
        return operations(run_quietly)

    views = ("split", "detach", "alias", "slice", "view", "t", "unsqueeze", "transpose", "select", "narrow")
    more = run(12)
    more.subtract(run(11))
    return Counter({name: count for name, count in more.items() if count and name not in views})


def test_an_elman_net_runs_two_operations_a_step() -> None:
    assert per_step(zoo("Elman"), backward=False) == {"addmm": 1, "tanh": 1}
    assert per_step(zoo("Elman"), backward=True) == {"addmm": 1, "tanh": 1, "mm": 1, "add": 1, "tanh_backward": 1}


def test_what_has_no_loop_runs_nothing_per_step() -> None:
    for name in ("Feedforward", "Delay"):
        cell = zoo(name)
        assert per_step(cell, backward=False) == {}


class Invariants(ZooCell):
    """Many operations on weights alone."""

    def __init__(self) -> None:
        super().__init__()
        self.U, self.W = nn.Linear(3, 4), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Any, h: Any, constant: Any) -> Any:
        w = torch.linalg.matrix_exp(self.W - self.W.t()) * torch.sigmoid(self.U.bias)
        h = torch.tanh(self.U(x) + h @ w + torch.cos(constant))
        return h, h


def test_what_reads_only_weights_runs_once_a_call() -> None:
    cell = Invariants()
    xs, constant = torch.randn(9, 2, 3), torch.randn(2, 4)

    def call() -> None:
        elman.scan(cell, xs, constants=constant, backend="interpret")

    call()
    for backward in (False, True):

        def run(backward: bool = backward) -> None:
            ys, _ = elman.scan(cell, xs, constants=constant, backend="interpret")
            if backward:
                ys.sum().backward()

        seen = operations(run)
        assert seen["linalg_matrix_exp"] == (2 if backward else 1)  # its derivative is one more of twice the size
        assert seen["sigmoid"] == 1
        assert seen["cos"] == 1
        assert seen["tanh"] == 9


def test_weight_norm_is_computed_once_a_call() -> None:
    cell = zoo("WeightNorm")
    given = inputs(cell, 9, 2)

    def run() -> None:
        elman.scan(cell, given["xs"], given["state"], backend="interpret")

    run()
    seen = operations(run)
    whole = seen["_weight_norm_interface"] + seen["_weight_norm"] + seen["linalg_vector_norm"] + seen["norm"]
    assert whole == 1, seen


def test_casts_of_weights_run_once_a_call() -> None:
    cell = zoo("Elman")
    xs = torch.randn(9, 2, 3)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        module = type(cell)()

        def run() -> None:
            elman.scan(module, xs, backend="interpret")

        run()
        seen = operations(run)
    weights = len(list(module.parameters()))
    assert (
        seen["_to_copy"] == weights + 1 + 2 * 9
    )  # the input once for all steps; in the loop the state, there and back


def test_frozen_weights_cost_nothing() -> None:
    cell = zoo("Elman")
    given = inputs(cell, 3, 2)
    found = compiled(cell, given)
    none = found.derivative((False,), (False,) * len(found.step.weights))
    assert not none.rule.adjoint.sums
    assert not none.rule.x_grads
    all_ = found.derivative((True,), (True,) * len(found.step.weights))
    assert (
        names(n for p in none.adjoint.parts for n in p.nodes)["mm"]
        < names(n for p in all_.adjoint.parts for n in p.nodes)["mm"]
    )


def test_programs_are_readable() -> None:
    cell = zoo("Elman")
    given = inputs(cell, 3, 2)
    elman.scan(cell, given["xs"], backend="interpret")
    source = compiled(cell, given).forward(False).source
    assert source.index("# segment") < source.index("# loop") < source.index("for t in times:")
    assert source.count("# segment") == 2
    assert source.count("for t in times:") == 1
