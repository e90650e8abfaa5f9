"""Pass 1, trace: the user's step becomes a graph of ATen operations.

The step runs once on fake tensors (shapes without data) through ``make_fx``. The batch stays symbolic without
symbolic integers: the batch size is a prime that divides no other dimension, so that every dimension and every
integer argument that is a multiple of it *is* a multiple of the batch, k·B. To be sure, the step is run
again with another prime, on a tape: the two runs must agree in everything else. Where they seem not to, it is traced
again, and the two graphs tell. T is no part of the trace at all.
"""

from __future__ import annotations

import logging
import operator
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import core_aten_decompositions, get_decompositions
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import (
    CapturedTensorError,
    DataDependentError,
    ElmanError,
    MixedRowsError,
    MutationError,
    UnsupportedError,
)
from .draws import draws_become_inputs
from .step import Leaf, Step, arguments, batch_multiple, fake, location, user_line
from .tape import Recorder, Tape

__all__ = ["core_decompositions", "decompositions", "functional", "perturb", "recorded", "trace"]

aten = torch.ops.aten
_SMALL = (1, 2)
_PRIMES = (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049, 1051, 1061, 1063, 1069)

_KEPT_WHOLE = (
    # Fused forms that are one kernel in every backend; taken apart they would be five to fifteen.
    aten.sigmoid_backward.default,
    aten.tanh_backward.default,
    aten.threshold_backward.default,
    aten.native_layer_norm_backward.default,
    aten._softmax_backward_data.default,
    aten._log_softmax_backward_data.default,
    aten.slice_backward.default,
    aten.t.default,
    aten.detach.default,
    aten.transpose.int,
    aten.split.Tensor,
    aten.stack.default,
    aten.baddbmm.default,
    aten.silu.default,
    aten.silu_backward.default,
    aten.gelu_backward.default,
    aten.softplus.default,
    aten.softplus_backward.default,
    aten.elu_backward.default,
    aten.embedding_dense_backward.default,
)


_TAKEN_APART = (
    aten.native_dropout,
    aten.native_batch_norm,
    aten._native_batch_norm_legit_no_training,
    aten.native_group_norm,
)


@lru_cache(maxsize=1)
def core_decompositions() -> dict[Any, Callable[..., Any]]:
    """PyTorch's core ATen decompositions; collecting them takes as long as a trace."""
    return dict(core_aten_decompositions())


@lru_cache(maxsize=1)
def decompositions() -> dict[Any, Callable[..., Any]]:
    """PyTorch's core ATen decompositions, less the fused forms that backends keep whole."""
    table = dict(core_decompositions())
    for op in _KEPT_WHOLE:
        table.pop(op, None)
    table.update(get_decompositions(_TAKEN_APART))
    return table


def trace(
    function: Callable[[list[Tensor], list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]],
    xs: Sequence[Leaf],
    state: Sequence[Leaf],
    weights: Sequence[Leaf],
) -> Step:
    """Trace ``function(xs, state, weights) -> (ys, next state)`` into a Step.

    Raises DataDependentError, MutationError, CapturedTensorError or UnsupportedError, each with the user's line;
    what the step itself raises goes through.
    """
    leaves = [*xs, *state, *weights]
    dims = [n for leaf in leaves for n in leaf.shape]
    first, second = [p for p in _PRIMES if all(n % p or not n for n in dims)][:2]
    step = _trace_at(first, function, xs, state, weights)
    _check_autograd(function, xs, state, weights, first)
    tape = _run(first, function, xs, state, weights)
    for unit in (second, *_SMALL):
        if not _repeats(tape, _run(unit, function, xs, state, weights)):  # or so it seems: the graph tells
            compare = _compare if unit == second else _compare_lines
            compare(step, _trace_at(unit, function, xs, state, weights))
    for node in step.graph.nodes:
        _check_numbers(node, first)
    draws_become_inputs(step)
    return step


def _run(unit: int, function: Callable[..., Any], xs: Any, state: Any, weights: Any) -> Tape | None:
    """What the step does with a batch of that size; None if it fails."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = [[fake(mode, leaf, unit) for leaf in part] for part in (xs, state, weights)]
    tape = Tape(decompositions(), unit)
    try:
        with _translated(), mode, torch.enable_grad(), _Watch():
            tape.run(function, inputs)
    except ElmanError:
        return None
    return tape


def _repeats(mine: Tape | None, theirs: Tape | None) -> bool:
    """Whether two runs are of the same operations on the same values; with one row or two, of the same lines."""
    if mine is None or theirs is None:
        return False
    return mine.lines == theirs.lines if theirs.unit in _SMALL else _same_entries(mine, theirs)


def _same_entries(tape: Tape, again: Tape) -> bool:
    pairs = zip(tape.entries, again.entries, strict=False)
    return len(tape.entries) == len(again.entries) and all(
        mine.target is theirs.target
        and mine.structure == theirs.structure
        and all(_same(a, b, tape.unit, again.unit) for a, b in zip(mine.given, theirs.given, strict=True))
        for mine, theirs in pairs
    )


def _check_autograd(function: Callable[..., Any], xs: Any, state: Any, weights: Any, unit: int) -> None:
    """Refuse gradients that are not those of the step's operations: a user's own Function, or a hook."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def outputs(learned: int) -> list[Tensor]:
        inputs = [[fake(mode, leaf, unit) for leaf in part] for part in (xs, state, weights)]
        for leaf in (leaf for part in inputs[:learned] for leaf in part if leaf.is_floating_point()):
            leaf.requires_grad_()
        with mode, torch.enable_grad(), _Watch():
            ys, new = function(*inputs)
        return [*ys, *new]

    try:
        ends = outputs(3)
    except RuntimeError:  # a buffer among the weights that must not require gradients
        with _translated():
            ends = outputs(2)
    stack = [out.grad_fn for out in ends]
    seen: set[Any] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            raise UnsupportedError(
                f"the step calls a torch.autograd.Function with a gradient of its own ({type(node).__name__}), which "
                "the derivative, taken from ATen operations, would not follow. Write it with ordinary operations."
            )
        stack.extend(parent for parent, _ in node.next_functions)


def _trace_at(unit: int, function: Callable[..., Any], xs: Any, state: Any, weights: Any) -> Step:
    counts = (len(xs), len(state), len(weights))
    sizes: list[int] = []

    def flat(*leaves: Tensor) -> list[Tensor]:
        a, b = counts[0], counts[0] + counts[1]
        ys, new = function(list(leaves[:a]), list(leaves[a:b]), list(leaves[b:]))
        sizes[:] = [len(ys), len(new)]
        return [*ys, *new]

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = [fake(mode, leaf, unit) for leaf in (*xs, *state, *weights)]
    root = _traced(flat, mode, inputs)
    _check(root)
    placeholders = [node for node in root.graph.nodes if node.op == "placeholder"]
    outputs: list[fx.Node] = list(arguments(root.graph.output_node())[0])
    a, b = counts[0], counts[0] + counts[1]
    y, s = sizes
    return Step(
        root.graph,
        root,
        unit,
        xs=placeholders[:a],
        state=placeholders[a:b],
        weights=placeholders[b:],
        ys=[*outputs[:y]],
        next=outputs[y : y + s],
        precision=torch.get_float32_matmul_precision(),
    )


class _Watch(TorchFunctionMode):
    """Refuses what an ATen graph does not show: gradients switched off, or changed by a hook, inside the step."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled and not args[0]:
            what, instead = "switches gradients off", "Use .detach() on the values instead"
        elif (func is torch.autograd.grad and not (kwargs or {}).get("create_graph")) or func is Tensor.backward:
            what, instead = "takes a gradient as a constant", "Use create_graph=True, and .detach() what is constant"
        elif func is Tensor.register_hook:
            what, instead = "registers a hook on a tensor", "Register it on what scan returns, or on a parameter"
        else:
            return func(*args, **(kwargs or {}))
        line = user_line("".join(traceback.format_stack()))
        raise UnsupportedError(f"the step {what}, at {line}. {instead}.")


def functional(function: Callable[..., Any], inputs: list[Tensor]) -> fx.GraphModule:
    """``make_fx`` without operations that change a tensor in place, those inside decompositions included.

    Inputs that the function itself changes stay visible as copy_ to a placeholder.
    """
    root = make_fx(function, decomposition_table=decompositions(), record_stack_traces=True)(*inputs)
    _refuse_input_changes(root)
    if any(_mutates(node) for node in root.graph.nodes):
        again = torch.func.functionalize(fx.Interpreter(root).run, remove="mutations")
        with fx.traceback.preserve_node_meta():
            root = make_fx(again)(*inputs)
        _copies_become_views(root.graph)
    _correct_statistics(root.graph)
    return root


def recorded(function: Callable[..., Any], inputs: list[Tensor]) -> tuple[fx.Graph, nn.Module]:
    """What ``functional`` gives, for a function that runs a graph of its results and differentiates it.

    An operation has the user's line of the node that runs it, or of the caller. Raises Unrecorded.
    """
    graph, root = fx.Graph(), nn.Module()
    recorder = Recorder(decompositions(), graph, root)
    recorder.meta = {"stack_trace": "".join(traceback.format_stack())}
    for i, value in enumerate(inputs):
        node = graph.placeholder(f"arg{i}_1")
        node.meta = {"val": value}
        recorder.give(value, node)
    with recorder:
        results = function(*inputs)
    graph.output(pytree.tree_map(recorder.node_of, results))
    _correct_statistics(graph)
    return graph, root


def _correct_statistics(graph: fx.Graph) -> None:
    """Fake tensors give the statistics of a layer norm the type of its input; kernels for mixed types give float32."""
    for node in graph.nodes:
        if node.target is operator.getitem and node.args[0].target is aten.native_layer_norm.default and node.args[1]:
            source, weight = node.args[0].args[0], node.args[0].args[2]
            narrow = source.meta["val"].dtype in (torch.bfloat16, torch.float16)
            mixed = weight is not None and weight.meta["val"].dtype == torch.float32
            if narrow and (mixed or source.meta["val"].device.type != "cpu"):
                node.meta["val"] = node.meta["val"].to(torch.float32)


def _copies_become_views(graph: fx.Graph) -> None:
    """What is left of ``a.copy_(b)`` is the value b, in the shape and type of a."""
    for node in list(graph.nodes):
        if node.target is aten.copy.default:
            to, source = node.meta["val"], node.args[1]
            with graph.inserting_before(node):
                if source.meta["val"].dtype != to.dtype:
                    source = graph.call_function(aten._to_copy.default, (source,), {"dtype": to.dtype})
                    source.meta = {**node.meta, "val": node.args[1].meta["val"].to(to.dtype)}
                if source.meta["val"].shape != to.shape:
                    source = graph.call_function(aten.expand.default, (source, list(to.shape)))
                    source.meta = dict(node.meta)
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _changes_input(node: fx.Node) -> bool:
    target = node.args[0] if node.args else None
    return isinstance(target, fx.Node) and target.op == "placeholder"


def _traced(function: Callable[..., Any], mode: FakeTensorMode, inputs: list[Tensor]) -> fx.GraphModule:
    with _translated(), mode, torch.enable_grad(), _Watch():
        return functional(function, inputs)


_READS_VALUES = ("tracing tensor", "data-dependent", ".numpy()", "memory address", "fake tensor")


@contextmanager
def _translated() -> Iterator[None]:
    """What tracing cannot follow becomes an UnfoldError that says so, with the user's line."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    silent, logger.disabled = logger.disabled, True  # what goes wrong is said here
    try:
        yield
    except ElmanError:
        raise
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise DataDependentError(
            "the step takes a decision or a shape from the value of a tensor, so one program cannot hold for all "
            f"steps, at {_raised_at(error)}. Use torch.where instead of a Python branch."
        ) from error
    except Exception as error:  # whatever a user's step may raise; the plain loop shows it as it is
        text = str(error)
        if any(sign in text for sign in _READS_VALUES):
            raise DataDependentError(
                f"the step reads the value of a tensor in Python, at {_raised_at(error)}. Keep it a tensor: use "
                "torch.where instead of a branch, and tensor operations instead of .item() or .numpy()."
            ) from error
        said = f": {text.splitlines()[0]}" if text else ""
        for prime in _PRIMES:  # what the user knows it as
            said = said.replace(str(prime), "B")
        raise UnsupportedError(
            f"the step cannot be traced for a batch of any size, at {_raised_at(error)} ({type(error).__name__}{said})."
        ) from error
    finally:
        logger.disabled = silent


def _raised_at(error: BaseException) -> str:
    return user_line("".join(traceback.format_tb(error.__traceback__)))


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _refuse_input_changes(root: fx.GraphModule) -> None:
    for node in root.graph.nodes:
        if _mutates(node) and _changes_input(node):
            raise MutationError(
                f"the step changes one of its inputs or buffers in place ({node.target}), at {location(node)}. "
                "Return the new value as part of the state instead."
            )


def _check(root: fx.GraphModule) -> None:
    _refuse_input_changes(root)
    for node in root.graph.nodes:
        if isinstance(value := node.meta.get("val"), Tensor) and value.is_complex():
            raise UnsupportedError(f"the step computes with complex numbers, at {location(node)}.")
        if _mutates(node):
            raise UnsupportedError(f"{node.target} changes a tensor in place, at {location(node)}.")
        if node.op == "get_attr":
            captured = getattr(root, str(node.target))
            if isinstance(captured, Tensor) and captured.requires_grad:
                raise CapturedTensorError(
                    f"the step uses a tensor of shape {tuple(captured.shape)} that requires gradients but is not "
                    f"a parameter of the module, at {_user_of(node)}. Register it with nn.Parameter, or pass it "
                    "through constants=, so that its gradient is known."
                )
        elif node.op == "call_module":
            raise UnsupportedError(f"the step calls a module that cannot be traced, {node.target}.")


def _user_of(node: fx.Node) -> str:
    return location(next(iter(node.users), node))


def _compare(step: Step, other: Step) -> None:
    """The two traces may differ only where both hold the same multiple of their own prime as a size."""
    pairs = zip(step.graph.nodes, other.graph.nodes, strict=False)
    same = len(step.graph.nodes) == len(other.graph.nodes)
    for mine, theirs in pairs:
        agree = same and mine.target == theirs.target and _alike(mine, theirs, step.unit, other.unit)
        if agree and mine.op == "get_attr":
            one, two = (getattr(of.root, str(mine.target)) for of in (step, other))
            agree = _same(one, two, step.unit, other.unit)
        if not agree:
            raise _batch_dependent(mine)
        _check_numbers(mine, step.unit)


def _batch_dependent(node: fx.Node) -> MixedRowsError:
    return MixedRowsError(
        f"what the step does depends on the size of the batch ({node.target}), at {location(node)}. "
        "Let every row be computed the same way, whatever the batch."
    )


def _check_numbers(node: fx.Node, unit: int) -> None:
    """The size of the batch may be part of a shape; as a number to compute with it would mix the rows."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    schema = node.target._schema.arguments
    given = [
        *zip(schema, node.args, strict=False),
        *((a, node.kwargs[a.name]) for a in schema if a.name in node.kwargs),
    ]
    for argument, value in given:
        if batch_multiple(value, unit) and "SymInt" not in str(argument.real_type):
            raise _batch_dependent(node)


def _compare_lines(step: Step, other: Step) -> None:
    """With one row, and with two, the step must run the same lines of the user's code."""
    mine = list(dict.fromkeys(location(n) for n in step.graph.nodes if n.op == "call_function"))
    theirs = list(dict.fromkeys(location(n) for n in other.graph.nodes if n.op == "call_function"))
    for line in [*mine, *theirs]:
        if (line in mine) != (line in theirs):
            raise MixedRowsError(
                f"the step runs other lines for a batch of {other.unit} than for a large one, at {line}. "
                "Let every row be computed the same way, whatever the batch."
            )


def _alike(mine: fx.Node, theirs: fx.Node, unit: int, other: int) -> bool:
    left, right = (pytree.tree_leaves((node.args, node.kwargs)) for node in (mine, theirs))
    return len(left) == len(right) and all(_same(a, b, unit, other) for a, b in zip(left, right, strict=True))


def _same(a: Any, b: Any, unit: int, other: int) -> bool:
    if isinstance(a, fx.Node):
        return isinstance(b, fx.Node) and a.name == b.name
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        return a is b or (alike and bool(((a == b) | ((a != a) & (b != b))).all()))
    multiple = batch_multiple(a, unit)
    return multiple == batch_multiple(b, other) if multiple else bool(a == b or (a != a and b != b))


def perturb(step: Step) -> None:
    """Add to every state leaf, right where it is computed, a further input: its gradient is the total adjoint.

    The states themselves are the last ys.
    """
    for i, node in enumerate(list(step.next)):
        if not node.meta["val"].is_floating_point():
            continue
        node = step.next[i]
        before = step.xs[-1]
        with step.graph.inserting_after(before):
            extra = step.graph.placeholder(f"perturb_{i}")
        value = node.meta["val"]
        with value.fake_mode:
            fresh = torch.empty(value.shape, dtype=value.dtype, device=value.device)
        extra.meta = {**node.meta, "val": fresh}
        where = node if node.op == "call_function" else next(n for n in reversed(step.graph.nodes) if n.op != "output")
        with step.graph.inserting_after(where):
            total = step.graph.call_function(aten.add.Tensor, (node, extra))
        total.meta = dict(node.meta)
        if node.op == "call_function":
            node.replace_all_uses_with(total)
            total.args = (node, extra)
            step.ys = [total if y is node else y for y in step.ys]
            step.next = [total if n is node else n for n in step.next]
        step.next[i] = total
        step.ys[len(step.ys) - len(step.next) + i] = total
        step.xs.append(extra)
