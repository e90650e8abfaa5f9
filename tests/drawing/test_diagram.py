"""The diagram of a network: its nodes, edges and delays, exactly; and who can influence whom, against gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import elman
from elman.cells import ElmanCell, GRUCell, LSTMCell
from elman.combinators.attend import Attend
from elman.combinators.delay import Delay
from elman.drawing import Diagram, draw
from elman.networks.jordan import jordan
from elman.spec import parse_spec

from .nets import CELLS, NETWORKS, D, H, Tree, UserNet, sequence

# (source, target, delay, label, loop), in any order.
CIRCUITS: dict[str, set[tuple[str, str, int, str, int]]] = {
    "elman": {("x", "h", 0, "U", 0), ("h", "h", 1, "W", 1)},
    "torch's gru": {("x", "h", 0, "U", 0), ("h", "h", 1, "W", 1)},
    "lstm": {("x", "h", 0, "U", 0), ("h", "h", 1, "W", 1)},
    "gru, reset before": {("x", "h", 0, "U", 0), ("h", "h", 1, "W", 1)},
    "user": {("x", "h", 0, "U", 0), ("h", "h", 1, "W", 1), ("h", "o", 0, "V", 0)},
    "register": {("x", "h", 0, "U", 0), ("h", "h", 3, "W", 1), ("h", "o", 0, "V", 0)},
    "delays": {
        ("x", "h1", 0, "U_{1}", 0),
        ("h1", "h1", 1, "W_{1}", 1),
        ("h1", "h2", 0, "U_{2}", 0),
        ("h2", "h2", 2, "W_{2}", 2),
    },
    "skip through time": {("x", "h", 0, "U", 0), ("h", "h", 1, "W_{1}", 1), ("h", "h", 2, "W_{2}", 1)},
    "jordan": {("x", "h", 0, "U", 0), ("h", "o", 0, "V", 1), ("o", "h", 1, "W", 1)},
    "learned state": {("x", "h", 0, "U", 0), ("h", "h", 1, "W", 1)},
    "conditioned": {("x", "h", 0, "U", 0), ("c", "h", 0, "R", 0), ("c", "h", 0, "G", 0), ("h", "h", 1, "W", 1)},
    "bidirectional": {
        ("x", "h", 0, "U", 0),
        ("x", "g", 0, "U'", 0),
        ("h", "h", 1, "W", 1),
        ("g", "g", -1, "W'", 2),
    },
    "shifted": {("y", "h", 1, "W_{1}", 0), ("h", "h", 1, "W_{2}", 1), ("h", "o", 0, "V", 0)},
    "window": {
        ("x", "h", 0, "U", 0),
        ("x", "h", 1, "U", 0),
        ("x", "h", -1, "U", 0),
        ("h", "h", 1, "W", 1),
    },
}


def drawn(name: str, steps: int = 0, network: nn.Module | None = None) -> Diagram:
    xs = sequence().double() if network is not None else sequence()
    if name in CELLS:
        make, options = CELLS[name]
        options = pytree.tree_map(lambda value: value.to(xs.dtype), options)
        return draw(network or make(), xs, unroll=steps, **options).diagram
    names = ["y"] if name == "shifted" else None
    return draw(network or NETWORKS[name](), xs, unroll=steps, names=names).diagram


@pytest.mark.parametrize("name", CIRCUITS)
def test_circuit(name: str) -> None:
    diagram = drawn(name)
    found = [(e.source, e.target, e.delay, e.label.strip("$"), e.loop) for e in diagram.edges if e.label]
    assert set(found) == CIRCUITS[name]
    assert len(found) == len(set(found))


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("user", {"x": "input", "h": "state", "o": "output"}),
        ("jordan", {"x": "input", "h": "hidden", "o": "output"}),
        ("conditioned", {"x": "input", "c": "constant", "h": "state"}),
        ("bidirectional", {"x": "input", "h": "state", "g": "state"}),
    ],
)
def test_kinds_of_nodes(name: str, kinds: dict[str, str]) -> None:
    nodes = {node.name: node.kind for node in drawn(name).nodes}
    assert kinds.items() <= nodes.items()


def test_when() -> None:
    summary, code = drawn("summary"), drawn("autoencoder")
    assert [(e.source, e.target, e.when) for e in summary.edges if e.when != "every"] == [("h", "o", "last")]
    assert [(e.source, e.target, e.when) for e in code.edges if e.when != "every"] == [("h1", "h2", "last")]
    assert {e.label: e.when for e in drawn("conditioned").edges if e.source == "c"} == {"$R$": "every", "$G$": "first"}


@pytest.mark.parametrize("name", [*CELLS, *NETWORKS])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_unrolled_steps(name: str, steps: int) -> None:
    diagram = drawn(name, steps)
    assert diagram.unrolled
    assert not any(edge.delay for edge in diagram.edges)
    inputs = [node for node in diagram.nodes if node.kind == "input"]
    reads = steps - 1 if name == "shifted" else steps  # the last one is nowhere read
    assert [node.time for node in inputs] == list(range(1, reads + 1)) or name == "shifted"
    names = [node.name for node in diagram.nodes]
    assert len(names) == len(set(names))
    assert {name for edge in diagram.edges for name in (edge.source, edge.target)} <= set(names)


def reaches(diagram: Diagram, source: str, targets: set[str]) -> bool:
    seen, stack = {source}, [source]
    while stack:
        for edge in diagram.out_of(stack.pop()):
            if edge.target not in seen:
                seen.add(edge.target)
                stack.append(edge.target)
    return bool(seen & targets)


def gradients(network: nn.Module, name: str, steps: int) -> Tensor:
    """Whether y(u) depends on x(t), (T, U), by autograd of the network itself."""
    xs = torch.randn(steps, 2, D, dtype=torch.float64, requires_grad=True)
    if name in CELLS:
        options = pytree.tree_map(lambda v: torch.randn(2, *v.shape[1:], dtype=torch.float64), CELLS[name][1])
        ys = elman.scan(network, xs, backend="reference", **options)[0]
    else:
        ys = network(xs)
        ys = ys[0] if isinstance(ys, tuple) else ys
        ys = ys if ys.dim() == 3 else ys[None]
    rows = [torch.autograd.grad(y.sum(), xs, retain_graph=True, allow_unused=True)[0] for y in ys]
    return torch.stack([torch.zeros(steps) if g is None else g.abs().sum((1, 2)) for g in rows], 1) > 0


@pytest.mark.parametrize("name", [*CELLS, *NETWORKS])
def test_the_graph_tells_who_influences_whom(name: str) -> None:
    steps = 5
    torch.manual_seed(0)
    network = (CELLS[name][0] if name in CELLS else NETWORKS[name])().double()
    depends = gradients(network, name, steps)
    diagram = drawn(name, steps, network)
    letter = "y" if name == "shifted" else "x"
    outputs: dict[int, set[str]] = {}
    for node in diagram.nodes:
        if node.output:
            outputs.setdefault(node.time or 1, set()).add(node.name)
    assert len(outputs) == depends.shape[1]
    known = {node.name for node in diagram.nodes}
    for t in range(steps):
        for u in range(depends.shape[1]):
            source = f"{letter}({t + 1})"
            assert (source in known and reaches(diagram, source, outputs[u + 1])) == bool(depends[t, u]), (t, u)


def test_loss_and_target() -> None:
    diagram = draw(UserNet(), unroll=2, loss=True).diagram
    assert {(e.source, e.target) for e in diagram.edges if e.target.startswith("L")} == {
        ("o(1)", "L(1)"),
        ("y(1)", "L(1)"),
        ("o(2)", "L(2)"),
        ("y(2)", "L(2)"),
    }
    assert diagram.node("y(2)").kind == "target"


def test_the_target_that_is_fed_is_the_target_of_the_loss() -> None:
    pair = (sequence(), sequence(width=2))
    diagram = draw(jordan(D, H, 2), pair, names=["x", "y"], loss=True).diagram
    assert {(e.source, e.target, e.delay) for e in diagram.edges if e.source == "y"} == {("y", "h", 1), ("y", "L", 0)}
    assert diagram.loops == 0
    assert {e.loop for e in diagram.edges} == {0}


def test_first_state_is_shown_where_it_is_made() -> None:
    assert {(e.source, e.target) for e in drawn("conditioned", 2).edges if "0" in e.source + e.target} == {
        ("c", "h(0)"),
        ("h(0)", "h(1)"),
    }
    assert ("h(0)", "h(1)") in {(e.source, e.target) for e in drawn("learned state", 2).edges}
    assert "h(0)" not in {node.name for node in drawn("elman", 2).nodes}


def test_inside_of_an_lstm() -> None:
    diagram = draw(LSTMCell(D, H), detail=True).diagram
    gates = {node.name for node in diagram.nodes if node.kind == "gate"}
    assert gates == {"input", "forget", "candidate", "output", "tanh"}
    assert {e.target for e in diagram.out_of("x")} == gates - {"tanh"}
    assert {e.target for e in diagram.out_of("h")} == gates - {"tanh"}
    assert {e.delay for e in diagram.out_of("h")} == {1}
    assert sorted(e.delay for e in diagram.out_of("s")) == [0, 1]
    assert {node.loop for node in diagram.nodes if node.kind != "input"} == {1}


def test_attention_reads_all_steps() -> None:
    class Translate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = ElmanCell(D, H), Attend(ElmanCell(D + H, H), H)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            memory = elman.scan(self.encoder, x)[0].transpose(0, 1)
            return elman.scan(self.decoder, z, constants=memory)[0]

    network = Translate()
    whole = draw(network, (sequence(5), sequence(4))).diagram
    assert "all" in {e.when for e in whole.out_of("h1")}
    steps = draw(network, (sequence(4), sequence(5)), unroll=3).diagram
    assert max(node.time or 0 for node in steps.nodes if node.name.startswith("z")) == 4
    assert reaches(steps, "x(3)", {n.name for n in steps.nodes if n.output and n.time == 1})


def test_tree() -> None:
    diagram = draw(Tree(), sequence(), unroll=4, loss=True).diagram
    joins = [n for n in diagram.nodes if len({e.source for e in diagram.into(n.name)}) == 2 and n.kind != "loss"]
    assert len(joins) == 3
    assert diagram.loops is None
    assert [n.kind for n in diagram.nodes].count("loss") == 1


def test_nothing_is_left_behind() -> None:
    network = NETWORKS["bidirectional"]()
    before: dict[str, Any] = {name: p.clone() for name, p in network.named_parameters()}
    draw(network, sequence())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in network.named_parameters())


@pytest.mark.parametrize("cell", [GRUCell, LSTMCell])
@pytest.mark.parametrize(("delay", "steps"), [(4, 5), (4, 9), (2, 3), (2, 2), (1, 3)])
def test_a_delay_seen_once_is_a_delay(cell: Any, delay: int, steps: int) -> None:
    """Whether the run is long enough for many steps to read a late state, or for one alone."""
    diagram = draw(Delay(cell(D, H), delay), unroll=steps).diagram
    late = [(e.source, e.target, e.label) for e in diagram.edges if not e.source.startswith("x")]
    assert late == [(f"h({t})", f"h({t + delay})", "$W$") for t in range(1, steps - delay + 1)]


@pytest.mark.parametrize("delay", [7, 95])
def test_a_circuit_is_followed_until_every_delay_is_seen(delay: int) -> None:
    diagram = draw(Delay(ElmanCell(D, H), delay)).diagram
    assert {(e.source, e.target, e.delay, e.label) for e in diagram.edges} == {
        ("x", "h", 0, "$U$"),
        ("h", "h", delay, "$W$"),
    }


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_a_first_state_that_is_made_is_no_delay(steps: int) -> None:
    class Handed(nn.Module):
        """The last state of one cell, by a matrix, is the first of another."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.make = GRUCell(D, H), GRUCell(D, H), nn.Linear(H, H)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return elman.scan(self.other, z, self.make(elman.scan(self.one, x)[1]))[0]

    diagram = draw(Handed(), (sequence(4), sequence(5)), unroll=steps).diagram
    made = [(e.source, e.target) for e in diagram.edges if e.label.startswith("$G")]
    assert made == [(f"h1({steps})", "h2(0)")]


def test_operations_are_named_as_people_do() -> None:
    cells = [LSTMCell(D, H, layer_norm=True), parse_spec("minlstm(4)").make(D, H), parse_spec("mingru(4)").make(D, H)]
    letters = {n.letter for cell in cells for n in draw(cell, detail=True).diagram.nodes if n.kind == "gate"}
    assert "layer norm" in letters
    assert not [word for word in letters if "_" in word or "native" in word or "split" in word]
