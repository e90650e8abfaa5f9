"""Pass 3, derivative: back-propagation through time is itself a recurrence, run in reversed time.

With s(t) = F(s(t−1), x(t)) and y(t) = G(s(t−1), x(t)), the adjoint a(t) = ∇_{s(t)} L obeys

    a(t−1) = (∂F/∂s)ᵀ a(t) + (∂G/∂s)ᵀ ∇_{y(t)} L,

so its step carries a, reads what the forward step kept, and gives the gradient of x(t) as output and the gradients
of the weights as sums over time. PyTorch's own formulas are traced once, through the forward graph; program, plan
and backends then treat the adjoint step like any other.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .independence import annotate, is_varying
from .simplify import fuse, simplify
from .step import Step, arguments, explained
from .tape import Unrecorded
from .trace import functional, recorded

__all__ = ["Derivative", "derive", "ends_of_gradients"]

aten = torch.ops.aten
_VIEWS = {
    aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.t.default,
    aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.expand.default, aten.view.default, aten.alias.default, operator.getitem,
}  # fmt: skip


_SHAPES = {
    aten.ones_like.default, aten.zeros_like.default, aten.full_like.default, aten.empty_like.default,
}  # fmt: skip
"""Operations that read nothing of a value but its shape."""


@dataclass
class Derivative:
    """A forward step that keeps what its adjoint reads, and that adjoint step.

    ``reads`` says where each of the first inputs of the adjoint comes from: ("xs" | "draws", index) or
    ("kept", name); its further inputs are the gradients of the ``floating`` ys, by index. ``x_grads`` are the
    indices of the xs that its outputs are gradients of; ``adjoint.sums`` are gradients by index of the weight.
    """

    forward: Step
    adjoint: Step
    reads: list[tuple[str, Any]]
    floating: list[int]
    x_grads: list[int]


def derive(step: Step, needs_x: Sequence[bool], needs_weight: Sequence[bool]) -> Derivative:
    """The derivative of a hoisted step with respect to the state and to those xs and weights that need one."""
    with explained("the derivative of the step cannot be traced"):
        joint, floating, x_grads = _trace_joint(step, needs_x, needs_weight)
    _part_layer_norm(joint.graph)
    annotate(joint, sums=True)
    return _split(joint, step, floating, x_grads)


def _trace_joint(step: Step, needs_x: Sequence[bool], needs_weight: Sequence[bool]) -> Any:
    """Trace ``(xs, state, weights, draws, ∇ys, ∇next) -> (ys, next, kept, ∇state, ∇xs, ∇weights)`` as one graph."""
    ends = [*(y for y in step.ys if y is not None), *step.next, *step.kept.values()]
    count = (len(step.xs), len(step.state), len(step.weights), len(step.draws))
    ys = [i for i, y in enumerate(step.ys) if y is not None and y.meta["val"].is_floating_point()]
    inputs = [node.meta["val"] for node in (*step.xs, *step.state, *step.weights, *step.draws)]
    wanted = [i for i, need in enumerate(needs_x) if need and inputs[i].is_floating_point()]
    x_grads = list(wanted)
    at = count[0] + count[1]
    w_grads = [i for i, need in enumerate(needs_weight) if need and inputs[at + i].is_floating_point()]
    states = [i for i in range(count[1]) if inputs[count[0] + i].is_floating_point()]
    wanted = [*(count[0] + i for i in states), *x_grads, *(at + i for i in w_grads)]
    graph = _graph(step, ends)
    outputs = [y for i, y in enumerate(step.ys) if y is not None and i in ys] + [step.next[i] for i in states]

    def joint(*args: Tensor) -> list[Any]:
        primals, cotangents = list(args[: len(inputs)]), list(args[len(inputs) :])
        for i in wanted:
            primals[i] = primals[i].detach().requires_grad_()
        with torch.enable_grad():
            values: dict[fx.Node, Tensor] = dict(
                zip(ends, fx.Interpreter(step.root, graph=graph).run(*primals), strict=True)
            )
            pairs = [
                (values[out], cotangent)
                for out, cotangent in zip(outputs, cotangents, strict=True)
                if values[out].requires_grad
            ]
            sources = [primals[i] for i in wanted]
            grads: Sequence[Tensor | None] = [None] * len(wanted)
            if pairs and sources:
                heads, tails = zip(*pairs, strict=True)
                grads = torch.autograd.grad(heads, sources, tails, allow_unused=True)
        filled = [
            torch.zeros(g_of.shape, dtype=g_of.dtype, device=g_of.device) if g is None and k < len(states) else g
            for k, (g, g_of) in enumerate(zip(grads, sources, strict=True))
        ]
        return [*(values[e].detach() for e in ends), *filled]

    mode = next(iter(inputs)).fake_mode
    # Outputs serve as the fake cotangents; a fresh tensor each, because an output may be an input or occur twice.
    cotangents = [_empty_like(node.meta["val"]) for node in outputs]
    device = step.xs[0].meta["val"].device.type
    with mode, torch.autocast(device, enabled=False), torch.no_grad(), fx.traceback.preserve_node_meta():
        try:
            graph, root = recorded(joint, [*inputs, *cotangents])
        except Unrecorded:
            root = functional(joint, [*inputs, *cotangents])
            graph = root.graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    named = [n.name for n in (*step.xs, *step.state, *step.weights, *step.draws)]
    for node, name in zip(placeholders, [*named, *(f"d_{n.name}" for n in outputs)], strict=True):
        node._rename(name)
    results = list(arguments(graph.output_node())[0])
    a, b, c, d = count[0], at, at + count[2], at + count[2] + count[3]
    found = dict(zip(ends, results[: len(ends)], strict=True))
    grads = results[len(ends) :]
    both = Step(
        graph,
        root,
        step.unit,
        xs=[*placeholders[:a], *placeholders[d : d + len(ys)]],
        state=[*placeholders[a:b], *placeholders[d + len(ys) :]],
        weights=placeholders[b:c],
        draws=placeholders[c:d],
        ys=[None if y is None else found[y] for y in step.ys],
        next=[*(found[n] for n in step.next), *grads[: len(states)]],
        kept={name: found[n] for name, n in step.kept.items()},
        sums={},
        precision=step.precision,
    )
    both.ys += grads[len(states) : len(states) + len(x_grads)]
    both.sums = {w: g for w, g in zip(w_grads, grads[len(states) + len(x_grads) :], strict=True) if g is not None}
    return both, ys, x_grads


def _empty_like(value: Tensor) -> Tensor:
    with value.fake_mode:  # type: ignore[attr-defined]
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)


def _graph(step: Step, ends: list[fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in (*step.xs, *step.state, *step.weights, *step.draws):
        env[node] = graph.placeholder(node.name)
    for node in step.graph.nodes:
        if node.op in ("call_function", "get_attr"):
            env[node] = graph.node_copy(node, env.__getitem__)
    graph.output([env[e] for e in ends])
    return graph


def _part_layer_norm(graph: fx.Graph) -> None:
    """Let the gradient of the input and the gradients of the weights be two calls: the first stays in the loop, the
    second becomes one call over all rows."""
    for node in reversed(list(graph.nodes)):
        if node.target is operator.getitem and not node.users:
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.target not in (aten.native_layer_norm_backward.default, aten.convolution_backward.default):
            continue
        parts = {user: user.args[1] for user in node.users}
        if 0 not in parts.values() or len(set(parts.values())) == 1:
            continue
        mask = list(node.args[-1])
        with graph.inserting_before(node):
            of_input = graph.call_function(node.target, (*node.args[:-1], [mask[0], False, False]))
            of_weights = graph.call_function(node.target, (*node.args[:-1], [False, *mask[1:]]))
        value = node.meta["val"]
        of_input.meta = {**node.meta, "val": (value[0], None, None)}
        of_weights.meta = {**node.meta, "val": (None, *value[1:])}
        for user, part in parts.items():
            user.args = (of_weights if part else of_input, part)
        graph.erase_node(node)


def _split(joint: Step, step: Step, floating: list[int], x_grads: list[int]) -> Derivative:
    """Cut the joint graph in two, and choose what the forward step keeps for its adjoint.

    Kept is what the formulas read; of a view, its base where that is there anyway, and the view is made again.
    """
    m, s = len(step.xs), len(step.state)
    ahead = [*(y for y in joint.ys[: len(step.ys)] if y is not None), *joint.next[:s], *joint.kept.values()]
    g_xs, g_next = joint.ys[len(step.ys) :], joint.next[s:]
    behind = [*(g for g in g_xs if g is not None), *g_next, *joint.sums.values()]
    given = {*joint.xs[:m], *joint.state[:s], *joint.draws}
    forward = _reach(ahead) | given
    forward |= {n for n in joint.graph.nodes if n.target is operator.getitem and n.args[0] in forward}
    stored = _stored(behind, forward, given)

    reads: list[tuple[str, Any]] = []
    kept: dict[str, fx.Node] = {}
    for node in stored:
        if node in joint.xs:
            reads.append(("xs", joint.xs.index(node)))
        elif node in joint.draws:
            reads.append(("draws", joint.draws.index(node)))
        else:
            name = f"for backward {len(kept)}"
            kept[name] = node
            reads.append(("kept", name))
    first = _slice(joint, joint.xs[:m], joint.state[:s], joint.draws)
    first_step, env = first
    first_step.ys = [None if y is None else env[y] for y in joint.ys[: len(step.ys)]]
    first_step.next = [env[n] for n in joint.next[:s]]
    first_step.kept = {name: env[n] for name, n in {**joint.kept, **kept}.items()}
    second_step, env = _slice(joint, [*stored, *joint.xs[m:]], joint.state[s:], [])
    second_step.ys = [None if g is None else env[g] for g in g_xs]
    second_step.next = [env[g] for g in g_next]
    second_step.sums = {w: env[g] for w, g in joint.sums.items()}
    for part in (first_step, second_step):
        tidy(part, derived=True)
        fuse(part)
        annotate(part, sums=True)
    return Derivative(first_step, second_step, reads, floating, x_grads)


def tidy(step: Step, *, derived: bool) -> None:
    """Simplify a step, drop what nothing reads, and annotate it anew."""
    annotate(step, sums=derived)
    simplify(step, derived=derived)
    annotate(step, sums=derived)


def _reach(ends: list[fx.Node], stop: set[fx.Node] | None = None) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = list(ends)
    while stack:
        node = stack.pop()
        if node not in seen and not (stop and node in stop):
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


def _stored(behind: list[fx.Node], forward: set[fx.Node], given: set[fx.Node]) -> list[fx.Node]:
    """The values of the forward step that the adjoint step reads."""
    after = _reach(behind, stop=forward)
    wanted = {n for node in after for n in node.all_input_nodes} | set(behind)
    stored = {n for n in wanted if n in forward and is_varying(n)}
    moved = True
    while moved:
        moved = False
        for node in list(stored):
            base = node
            while base.target in _VIEWS and isinstance(base.all_input_nodes[0].meta["val"], (Tensor, list)):
                base = base.all_input_nodes[0]
            if base is not node and (base in given or base in stored):
                stored.discard(node)
                stored.add(base)
                moved = True
    order = {n: i for i, n in enumerate(next(iter(behind)).graph.nodes)}
    return sorted(stored, key=order.__getitem__)


def _slice(
    joint: Step, xs: list[fx.Node], state: list[fx.Node], draws: list[fx.Node]
) -> tuple[Step, dict[fx.Node, fx.Node]]:
    """A step of its own that starts from these values; what cannot be reached from them is left out."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in dict.fromkeys((*xs, *state, *joint.weights, *draws)):
        env[node] = graph.placeholder(node.name)
        env[node].meta = dict(node.meta)
    for node in joint.graph.nodes:
        if node in env or node.op not in ("call_function", "get_attr"):
            continue
        if all(n in env for n in node.all_input_nodes):
            env[node] = graph.node_copy(node, env.__getitem__)
            env[node].meta = dict(node.meta)
    part = Step(
        graph,
        joint.root,
        joint.unit,
        xs=[env[n] for n in xs],
        state=[env[n] for n in state],
        weights=[env[n] for n in joint.weights],
        draws=[env[n] for n in draws],
        precision=joint.precision,
    )
    return part, env


def ends_of_gradients(step: Step, ragged: bool) -> list[frozenset[int]]:
    """For each of the ys, then of the last states, which of xs, state and weights a gradient of it may flow to.

    They are counted in this order. Over all steps: what a state is made of, its next one is made of too. In a
    ``ragged`` batch there may be sequences without a step, whose last state is their first.
    """
    none: frozenset[int] = frozenset()
    ends = {node: frozenset([i]) for i, node in enumerate([*step.xs, *step.state, *step.weights])}
    nexts = list(zip(step.state, step.next, strict=True))
    while True:
        found = dict(ends)
        for node in step.graph.nodes:
            value = node.meta.get("val")
            stops = (
                node.target is aten.detach.default
                or (isinstance(value, Tensor) and not value.is_floating_point())
                or node.target in _SHAPES
            )
            if node.op == "call_function":
                found[node] = none if stops else none.union(*(found.get(n, none) for n in node.all_input_nodes))
        wider = {s: ends[s] | found.get(n, none) for s, n in nexts}
        if all(ends[s] == wider[s] for s in wider):
            ys = [y for y in step.ys if y is not None]
            reached = [
                *(found.get(y, none) for y in ys),
                *(wider[s] if ragged else found.get(n, none) for s, n in nexts),
            ]
            return [
                some if n.meta["val"].is_floating_point() else none
                for n, some in zip([*ys, *step.next], reached, strict=True)
            ]
        ends |= wider
