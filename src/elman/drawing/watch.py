"""Watching a network run on tensors without data: which value is computed from which, step by step.

Nothing is asked of the network but to run. Views keep the atoms that they show, so that x(t), h(t-1) or a register of
past states are recognised wherever they are sliced from and stacked into.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..protocol import output_of
from ..recording import recorder
from ..types import Pytree
from .operations import AFFINE, PRODUCTS, SHAPE_ALONE, after_view, is_view
from .values import Atom, Value, joined

__all__ = ["LEARNED", "Call", "Run", "Watch", "is_cell"]

LEARNED = "learned"
"""The label of a first state that is a parameter."""

_TORCH_CELLS = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)


def is_cell(module: nn.Module) -> bool:
    """Whether a module is one step: it says what state it starts from, or is one of torch.nn's own."""
    return hasattr(module, "initial_state") or isinstance(module, _TORCH_CELLS)


@dataclass(eq=False)
class Run:
    """A cell, unfolded: its steps in the order in which they ran, and what it was given (as shapes) at the first."""

    name: str
    cell: nn.Module
    given: tuple[Pytree, ...]
    calls: list[Call] = field(default_factory=list)


@dataclass(eq=False)
class Call:
    """One step of a cell: its state before and after, leaf by leaf."""

    run: Run
    index: int
    before: list[Value]
    event: int = 0
    xs: list[Value] = field(default_factory=list)
    after: list[Value] = field(default_factory=list)


class Watch(TorchDispatchMode):
    """Follows every tensor of a network while it runs. ``given`` marks what is put in, ``of`` tells what came out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.values: dict[int, Value] = {}
        self.alive: list[Any] = []  # so that no id is used again
        self.slices: dict[int, tuple[Tensor, int, int, int]] = {}
        self.runs: list[Run] = []
        self.call: Call | None = None
        self.modules: list[str] = []
        self.events = 0
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            self._set(tensor, Value(params=frozenset([name])))

    def of(self, tensor: Tensor) -> Value:
        return self.values.get(id(tensor), Value())

    def given(self, tensor: Tensor, label: str, timed: bool) -> None:
        """``tensor`` is an input of that name: one atom for each step, or one for all."""
        kind = "input" if timed else "constant"
        count = tensor.shape[0] if timed else 1
        atoms = tuple(Atom(kind, label=label, part=t if timed else None) for t in range(count))
        self._set(tensor, Value(atoms, (1,) * count if timed else (tensor.shape[0] if tensor.dim() else 1,), 0))

    def _set(self, tensor: Tensor, value: Value) -> None:
        self.values[id(tensor)] = value
        self.alive.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        outs = _tensors(out)
        if not outs:
            return out
        name = func._schema.name.split("::")[1].removeprefix("unsafe_")
        self.events += 1
        if func._schema.is_mutable:
            self._written(name.rstrip("_"), args, kwargs)
            return out
        if is_view(name):
            found = after_view(name, args, [self.of(t) for t in _tensors(args)], outs, self._join)
        else:
            found = [self._computed(name, args, kwargs, tuple(o.shape)) for o in outs[:1]] * len(outs)
        for tensor, value in zip(outs, found, strict=True):
            self._set(tensor, value)
        if name in ("select", "slice"):
            self._remember_slice(name, outs[0], args)
        return out

    def _computed(self, name: str, args: Any, kwargs: Any, shape: tuple[int, ...]) -> Value:
        tensors = [*_tensors(args), *_tensors(kwargs)]
        values = [self.of(t) for t in tensors]
        varying = [v for v in values if v.varies]
        if name in SHAPE_ALONE:
            return Value()
        if not varying:
            return Value(params=frozenset().union(*(v.params for v in values)))
        if name in PRODUCTS:
            return self._product(name, tensors, values, shape)
        if name in AFFINE and len(varying) == 1:
            return self._aligned(varying[0], tensors[values.index(varying[0])], shape)
        return self._map(name, tensors, values, shape, args)

    def _aligned(self, value: Value, tensor: Tensor, shape: tuple[int, ...]) -> Value:
        """A value whose tensor was broadcast to ``shape``."""
        return value.moved(value.dim + len(shape) - tensor.dim()) if value.several else value.whole(shape)

    def _product(self, name: str, tensors: list[Tensor], values: list[Value], shape: tuple[int, ...]) -> Value:
        bias, factors = ([0], [1, 2]) if name in ("addmm", "baddbmm", "addmv") else ([], [0, 1])
        if name in ("linear", "convolution"):
            factors = [0, 1]
        sides = [values[i] for i in factors]
        weights = sorted(frozenset().union(*(v.params for v in sides if not v.varies)))
        operands = [i for i in factors if values[i].varies]
        added = [i for i in bias if values[i].varies]
        if not operands:
            return self._aligned(values[bias[0]], tensors[bias[0]], shape)
        kept = [self._uncontracted(name, i == factors[0], values[i], tensors[i]) for i in operands]
        op = "product"
        result = self._map(op, [tensors[i] for i in operands], kept, shape, (), tuple(weights), name == "embedding")
        if added:
            return self._map("add", [tensors[added[0]], None], [values[added[0]], result], shape, ())
        return result

    def _uncontracted(self, name: str, left: bool, value: Value, tensor: Tensor) -> Value:
        """What is summed over becomes one."""
        summed = tensor.dim() - 1 if left else max(tensor.dim() - 2, 0)
        if not value.several or name == "embedding" or value.dim != summed:
            return value
        return Value((self._join(value.atoms),), (tensor.shape[0],), 0)

    def _map(
        self,
        op: str,
        tensors: list[Any],
        values: list[Value],
        shape: tuple[int, ...],
        args: Any,
        weights: tuple[str, ...] = (),
        same_dim: bool = False,
    ) -> Value:
        """One new atom, or one for each part where the inputs lie in parts that the operation keeps apart."""
        several = [(v, t) for v, t in zip(values, tensors, strict=True) if v.several]
        ranks = [(v, len(shape) if t is None else t.dim()) for v, t in several]
        dims = {v.dim if same_dim else v.dim + len(shape) - rank for v, rank in ranks}
        sizes = {v.sizes for v, _ in several}
        dim = next(iter(dims), 0)
        kept = len(dims) == len(sizes) == 1 and 0 <= dim < len(shape) and shape[dim] == sum(*sizes)
        if kept and not _reduces(op, args, dim, len(shape)):
            lengths = sizes.pop()
            each = [[v.atoms[i if v.several else 0] for v in values if v.varies] for i in range(len(lengths))]
            parts = (self._new(op, tuple(dict.fromkeys(a)), weights, i) for i, a in enumerate(each))
            return Value(tuple(parts), lengths, dim)
        return Value((self._new(op, joined(values), weights),), (shape[0] if shape else 1,), 0)

    def _new(self, op: str, inputs: tuple[Atom, ...], weights: tuple[str, ...] = (), part: int | None = None) -> Atom:
        event = self.events - (self.call.event if self.call else 0)
        return Atom(op, inputs, weights, self.call, event, part, self.modules[-1] if self.modules else "")

    def _join(self, atoms: tuple[Atom, ...], part: int | None = None) -> Atom:
        atoms = tuple(dict.fromkeys(atoms))
        if len(atoms) == 1:
            return atoms[0]
        return self._new("join", atoms, (), part)

    def _written(self, name: str, args: Any, kwargs: Any) -> None:
        """A tensor was changed in place; so was what it is a slice of."""
        target, sources = args[0], [*_tensors(args[1:]), *_tensors(kwargs)]
        values = [self.of(t) for t in sources]
        if name in ("fill", "zero", "bernoulli", "uniform", "normal", "exponential"):
            value = Value()
        elif name == "copy" and values[0].varies:
            value = self._aligned(values[0], sources[0], tuple(target.shape))
        else:
            value = self._computed(name, (target, *args[1:]), kwargs, tuple(target.shape))
        self._set(target, value)
        while id(target) in self.slices:
            base, dim, start, stop = self.slices[id(target)]
            value = self._overwritten(self.of(base), base, dim, start, stop, value)
            self._set(base, value)
            target = base

    def _overwritten(self, old: Value, base: Tensor, dim: int, start: int, stop: int, new: Value) -> Value:
        size = base.shape[dim]
        if old.several and old.dim != dim:
            return Value((self._join(joined([old, new])),), (base.shape[0],), 0)
        nothing = Atom("nothing")
        sizes = old.sizes if old.several else [size] * len(old.atoms)
        atoms = [atom for atom, n in zip(old.atoms, sizes, strict=True) for _ in range(n)] or [nothing] * size
        atoms[start:stop] = [self._join(new.atoms) if new.varies else nothing] * (stop - start)
        return Value(tuple(atoms), (1,) * size, dim)

    def _remember_slice(self, name: str, out: Tensor, args: Any) -> None:
        base, dim = args[0], args[1] if len(args) > 1 else 0
        start = args[2] if len(args) > 2 and args[2] is not None else 0
        start += base.shape[dim] if start < 0 else 0
        stop = start + 1 if name == "select" else start + out.shape[dim]
        self.slices[id(out)] = (base, dim % base.dim(), start, stop)

    @contextmanager
    def hooked(self, root_is_cell: bool) -> Iterator[None]:
        """While this holds, every call of a cell inside the network is noted as a step of a run."""
        handles = []
        for name, module in self.network.named_modules():
            cell = is_cell(module) and (root_is_cell or module is not self.network)
            if name or cell:
                handles += [
                    module.register_forward_pre_hook(self._entering(name, cell), with_kwargs=True),
                    module.register_forward_hook(self._leaving(cell)),
                ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, name: str, cell: bool) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.modules.append(name if cell or not self.modules else self.modules[-1])
            given = (*args, *kwargs.values())
            if cell and self.call is None and len(given) >= 2:
                self._begin(name, module, given)

        return hook

    def _begin(self, name: str, module: nn.Module, given: tuple[Pytree, ...]) -> None:
        leaves = _tensors(given[1])
        before = [self.of(leaf) for leaf in leaves]
        run = next((r for r in reversed(self.runs) if r.cell is module), None)
        if run is None or [v.atoms for v in run.calls[-1].after] != [v.atoms for v in before]:
            run = Run(name, module, pytree.tree_map_only(Tensor, _shape, given))
            self.runs.append(run)
            before = [self._started(leaf) for leaf in leaves]
        self.call = Call(run, len(run.calls), before, self.events, [self.of(leaf) for leaf in _tensors(given[0])])
        run.calls.append(self.call)
        self.recording = ExitStack()
        self.recorded = self.recording.enter_context(recorder())
        self.depth = len(self.modules)

    def _started(self, leaf: Tensor) -> Value:
        """A first state is something that varies, as all later ones; only a learned one is shown."""
        value = self.of(leaf)
        if not value.varies:
            atom = Atom("constant", label=LEARNED) if value.params else Atom("start")
            self._set(leaf, value := Value((atom,), (leaf.shape[0],), 0))
        return value

    def _leaving(self, cell: bool) -> Any:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            if cell and self.call is not None and len(self.modules) == self.depth:
                self._end(module, result)
            self.modules.pop()

        return hook

    def _end(self, module: nn.Module, result: Any) -> None:
        assert self.call is not None
        self.recording.close()
        for name, tensor in self.recorded.items():
            for atom in self.of(tensor).atoms:
                atom.recorded = atom.recorded or name
        output = output_of(module, result)
        if isinstance(output, tuple) and len(output) == 2:  # anything else the protocol refuses
            self.call.after = [self.of(leaf) for leaf in _tensors(output[1])]
            for atom in joined([self.of(leaf) for leaf in _tensors(output[0])]):
                atom.tags.add("y")
        self.call = None


def _tensors(tree: Pytree) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _shape(leaf: Tensor) -> Tensor:
    return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta") if not isinstance(leaf, nn.Parameter) else leaf


_ALONG = {
    "_softmax", "_log_softmax", "softmax", "log_softmax", "sum", "mean", "amax", "amin", "max", "min", "cumsum",
    "logsumexp", "var", "std", "norm", "linalg_vector_norm", "argmax", "prod", "cumprod", "sort", "topk",
}  # fmt: skip


def _reduces(op: str, args: Any, dim: int, rank: int) -> bool:
    """Whether an operation mixes what lies along ``dim``."""
    if op == "native_layer_norm":
        return dim >= rank - len(args[1])
    if op not in _ALONG:
        return False
    if len(args) < 2 or args[1] is None:
        return True
    given = args[1] if isinstance(args[1], list | tuple) else [args[1]]
    return dim in {d % max(rank, 1) for d in given if isinstance(d, int)}
