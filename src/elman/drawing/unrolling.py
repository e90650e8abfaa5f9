"""Running a cell or a network for a few steps under watch: what went in, what came out, and every step between."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils import _pytree as pytree

from ..compiler.step import explained
from ..errors import CellError, DataDependentError, ElmanError, InputError, UnsupportedError
from ..types import Pytree, State
from ..unfold import scan
from .values import Atom
from .watch import Run, Watch, is_cell

__all__ = ["Unrolled", "unroll"]

_BATCH = 2
_CELLS = {nn.RNN: "ElmanCell", nn.LSTM: "LSTMCell", nn.GRU: "GRUCell"}


@dataclass(frozen=True)
class Unrolled:
    """What was seen: the atoms of the outputs, for each leaf in the order of time, and the runs of cells."""

    outputs: list[tuple[Atom, ...]]
    runs: list[Run]
    modules: dict[str, str]

    @property
    def empty(self) -> int:
        """How many parts of the states hold still what they started from: registers that are longer than the run."""
        return sum(a.op == "start" for run in self.runs for value in run.calls[-1].before for a in value.atoms)


def unroll(
    network: nn.Module,
    xs: Pytree,
    steps: int,
    *,
    state: State = None,
    constants: Pytree = None,
    names: Sequence[str] | None = None,
) -> Unrolled:
    """Run ``steps`` steps of a cell, or a network on sequences of so many steps, on tensors without data.

    Only structure, shapes and types of xs count. Where lengths differ, they do by 1, 2, … in the same order. Raises
    CellError, InputError, or UnsupportedError for what cannot run without values.
    """
    if not isinstance(network, nn.Module):
        given = f"the class {network.__name__}" if isinstance(network, type) else repr(network)
        raise CellError(f"draw takes a cell or a network, an nn.Module; got {given}.")
    _layers_refused(network)
    cell = _steps_alone(network)
    xs = _example(network) if xs is None else xs
    other = next((leaf for leaf in pytree.tree_leaves(xs) if not isinstance(leaf, Tensor)), None)
    if other is not None:
        raise InputError(
            f"xs must be an example of what {type(network).__name__} reads, tensors (T, B, …); got {other!r}. "
            "The number of steps to draw is unroll=."
        )
    watch = Watch(network)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    names = _argument_names(network, xs, cell) if names is None else list(names)
    leaves = len(pytree.tree_leaves(xs))
    if len(names) != leaves:
        raise InputError(f"names must name each of the {leaves} sequences in xs; got {names}.")
    name = type(network).__name__
    once = partial(_one_step, network, xs, state, constants) if cell else None
    with _mistakes_named(once), _values_refused(name), explained(f"{name} cannot be drawn"), torch.no_grad(), mode:
        fakes = _resized(xs, steps, cell)
        before = None if state is None else pytree.tree_map_only(Tensor, _rows, state)
        fixed = None if constants is None else pytree.tree_map_only(Tensor, _rows, constants)
        with watch:
            for leaf, label in zip(pytree.tree_leaves(fakes), names, strict=True):
                if leaf.numel():  # a sequence without features only says how long it is
                    watch.given(leaf, label, cell or _timed(leaf))
            for tree, label in ((tree, label) for tree, label in ((before, "h"), (fixed, "c")) if tree is not None):
                for leaf, name in zip(pytree.tree_leaves(tree), _leaf_names(tree, label), strict=True):
                    watch.given(leaf, name, False)
            with watch.hooked(cell):
                if cell:
                    result = scan(network, fakes, before, constants=fixed)[0]
                else:
                    result = network(*fakes) if isinstance(fakes, tuple) else network(fakes)
    if not cell and isinstance(result, tuple):
        result = result[0]
    outputs = [watch.of(leaf).atoms for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    known = {n: m for n, m in network.named_modules() if is_cell(m) and _known(m)}
    return Unrolled(outputs, watch.runs, {name: type(module).__name__ for name, module in known.items()})


def _layers_refused(network: nn.Module) -> None:
    """torch.nn's recurrent layers, and elman's in their place, show nothing of what happens between two steps."""
    name, layer = next(((n, m) for n, m in network.named_modules() if isinstance(m, nn.RNNBase)), ("", None))
    if layer is None:
        return
    kind = type(layer).__name__
    cell = next((c for kind, c in _CELLS.items() if isinstance(layer, kind)), "GRUCell")
    width = layer.proj_size or layer.hidden_size
    reads = [layer.input_size, *[width * (1 + layer.bidirectional)] * (layer.num_layers - 1)]
    cells = [f"{cell}({size}, {layer.hidden_size})" for size in reads]
    net = cells[0] if len(cells) == 1 else f"Stack([{', '.join(cells if len(cells) < 4 else [*cells[:3], '…'])}])"
    where = f"{kind}, the layer {name!r} of {type(network).__name__}," if name else f"{kind} is a layer that"
    if layer.bidirectional:
        net = f"Bidirectional({cells[0]}, {cells[0]})"
    first = " for the first layer" if layer.bidirectional and len(cells) > 1 else ""
    raise InputError(
        f"{where} unfolds its cells inside one operation, so its recurrence cannot be seen. "
        f"Draw the cells instead: draw({net}){first}."
    )


def _known(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("elman.", "torch."))


@contextmanager
def _mistakes_named(once: Callable[[], object] | None) -> Iterator[None]:
    """Where a step fails, ``once`` takes it on real tensors, where ``scan`` tells which sizes do not fit."""
    try:
        yield
    except UnsupportedError:
        if once is not None:
            once()
        raise


def _one_step(cell: nn.Module, xs: Pytree, state: State, constants: Pytree) -> object:
    x = pytree.tree_map_only(Tensor, lambda leaf: leaf.new_zeros((1, _BATCH, *leaf.shape[2:])), xs)
    before, fixed = (
        None if tree is None else pytree.tree_map_only(Tensor, lambda leaf: torch.zeros_like(_rows(leaf)), tree)
        for tree in (state, constants)
    )
    return scan(cell, x, before, constants=fixed)


@contextmanager
def _values_refused(name: str) -> Iterator[None]:
    """Where a network asks for the values of a tensor, say so, whatever else was made of the error."""
    try:
        yield
    except ElmanError as error:
        inner: BaseException | None = error
        while inner is not None and not isinstance(inner, DataDependentOutputException):
            inner = inner.__cause__ or inner.__context__
        if inner is None:
            raise
        raise DataDependentError(
            f"{name} takes a decision from the value of a tensor, so there is not one graph to draw. Use torch.where "
            "instead of a Python branch."
        ) from error


def _steps_alone(network: nn.Module) -> bool:
    """Whether it is a cell, one step, and not a network that reads whole sequences."""
    if not is_cell(network):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = [p for p in inspect.signature(network.forward).parameters.values() if p.kind in positional]
    own = type(network).__module__.startswith("torch.")
    return own or (len(found) >= 2 and found[1].default is inspect.Parameter.empty)


def _example(network: nn.Module) -> Tensor:
    width = getattr(network, "input_size", None)
    if not isinstance(width, int):
        raise InputError(
            f"{type(network).__name__} does not say its input_size; give draw an example of what it reads, "
            "xs (T, B, …)."
        )
    weight = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.empty(1, 1, width, dtype=weight.dtype, device=weight.device)


def _timed(leaf: Tensor) -> bool:
    """Whether what a network is given is a sequence: (T, B, D), or (T, B) integers."""
    return leaf.dim() >= (3 if leaf.is_floating_point() else 2)


def _resized(xs: Pytree, steps: int, cell: bool) -> Pytree:
    lengths = sorted({x.shape[0] for x in pytree.tree_leaves(xs) if isinstance(x, Tensor) and (cell or _timed(x))})

    def other(leaf: Tensor) -> Tensor:
        if not (cell or _timed(leaf)):
            return _rows(leaf)
        if leaf.dim() < 2:
            raise InputError(f"xs must be (T, B, …); got {tuple(leaf.shape)}.")
        length = steps + (0 if cell else lengths.index(leaf.shape[0]))
        return leaf.new_empty((length, _BATCH, *leaf.shape[2:]))

    return pytree.tree_map_only(Tensor, other, xs)


def _rows(leaf: Tensor) -> Tensor:
    return leaf.new_empty((_BATCH, *leaf.shape[1:]))


def _argument_names(network: nn.Module, xs: Pytree, cell: bool) -> list[str]:
    """A name for every leaf of xs: its key, the name of the argument, or x."""
    if cell or not isinstance(xs, tuple):
        return list(_leaf_names(xs, "x"))
    arguments = list(inspect.signature(network.forward).parameters)
    return [name for tree, argument in zip(xs, arguments, strict=False) for name in _leaf_names(tree, argument)]


def _leaf_names(tree: Any, default: str) -> Iterator[str]:
    """Keys of dicts; otherwise ``default``, counted where there are several."""
    paths, _ = pytree.tree_flatten_with_path(tree)
    keyed = [next((str(k.key) for k in reversed(path) if isinstance(k, pytree.MappingKey)), None) for path, _ in paths]
    counter = count(1)
    single = len(paths) == 1
    return iter([key or (default if single else f"{default}_{next(counter)}") for key in keyed])
