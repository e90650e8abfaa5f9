"""Everything that a scan computes, as one flat table of tensors, by each backend and by a loop written here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import elman
from elman.compiler.cache import Signature, program_of
from elman.compiler.compiled import Compiled, Differentiated
from elman.packing import rows_of
from elman.unfold import prepare

__all__ = [
    "assert_reloads",
    "assert_same",
    "by_hand",
    "compiled",
    "differentiable",
    "differentiated",
    "everything",
    "floats",
    "inputs",
    "leaves",
    "operations",
    "part",
    "poisoned",
    "scan_by",
]

# Tensors of a few numbers: a second thread only waits, and on a busy machine a hundred times longer than it works.
torch.set_num_threads(1)

Scan = Callable[..., tuple[Any, Any]]


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of a pytree."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def floats(tree: Any) -> list[Tensor]:
    """The floating-point tensors of a pytree."""
    return [leaf for leaf in leaves(tree) if leaf.is_floating_point()]


def differentiable(tree: Any, dtype: torch.dtype = torch.float64) -> Any:
    """The same numbers, each floating leaf a leaf of autograd that wants its gradient; None stays None."""

    def ready(leaf: Tensor) -> Tensor:
        return leaf.to(dtype).detach().clone().requires_grad_() if leaf.is_floating_point() else leaf

    return None if tree is None else pytree.tree_map_only(Tensor, ready, tree)


def part(tree: Any, cut: Any) -> Any:
    """Some steps of every tensor."""
    return None if tree is None else pytree.tree_map_only(Tensor, lambda leaf: leaf[cut], tree)


def poisoned(tree: Any, lengths: Any) -> Any:
    """NaN in all padding of the floating leaves (T, B, …), which then want their gradients anew."""

    def filled(leaf: Tensor) -> Tensor:
        past = torch.arange(len(leaf))[:, None] >= torch.as_tensor(lengths)
        past = past.view(*past.shape, *[1] * (leaf.dim() - 2))
        return leaf.masked_fill(past, torch.nan) if leaf.is_floating_point() else leaf

    return differentiable(pytree.tree_map_only(Tensor, filled, tree))


def assert_reloads(module: nn.Module, make: Callable[[], nn.Module], run: Callable[[nn.Module], Any]) -> None:
    """Another module, from other draws, gives the same bits once it has the values of this one, written and read."""
    torch.manual_seed(99)
    other = make().double().eval()
    other.load_state_dict(load(save({name: value.contiguous() for name, value in module.state_dict().items()})))
    for found, expected in zip(leaves(run(other)), leaves(run(module)), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def inputs(
    cell: nn.Module, steps: int, batch: int, seed: int = 5, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """xs, a state and constants for a cell of the zoo: random, and every floating leaf wants its gradient."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        xs, constants = cell.example(steps, batch)
        state = cell.initial_state(batch, device=torch.device("cpu"), dtype=dtype)
        state = pytree.tree_map_only(Tensor, lambda s: torch.randn_like(s) if s.is_floating_point() else s, state)
    return {
        "xs": differentiable(xs, dtype),
        "state": differentiable(state, dtype),
        "constants": differentiable(constants, dtype),
    }


def by_hand(
    cell: nn.Module,
    xs: Any,
    state: Any,
    *,
    constants: Any = None,
    lengths: Any = None,
    reverse: bool = False,
) -> tuple[Any, Any]:
    """What ``scan`` means, written without elman: every sequence alone, one step after the other."""
    steps = leaves(xs)[0].shape[0]
    batch = max(leaf.shape[1] for leaf in leaves(xs))
    sizes = [steps] * batch if lengths is None else torch.as_tensor(lengths).tolist()
    ys: list[list[Any]] = [[None] * steps for _ in range(batch)]
    finals = []
    for b, length in enumerate(sizes):

        def row(leaf: Tensor, b: int = b) -> Tensor:
            return leaf[b : b + 1]

        s = pytree.tree_map_only(Tensor, row, state)
        fixed = () if constants is None else (pytree.tree_map_only(Tensor, row, constants),)
        for t in reversed(range(length)) if reverse else range(length):
            x = pytree.tree_map_only(Tensor, lambda leaf, t=t, b=b: leaf[t, b % leaf.shape[1]][None], xs)
            ys[b][t], s = cell(x, s, *fixed)
        finals.append(s)
    like = next(y for row_ in ys for y in row_ if y is not None)
    blank = pytree.tree_map_only(Tensor, torch.zeros_like, like)
    joined = [_join([y if y is not None else blank for y in column]) for column in zip(*ys, strict=True)]
    return _together(torch.stack, joined), _join(finals)


def _join(trees: list[Any]) -> Any:
    return _together(torch.cat, trees)


def _together(join: Callable[[list[Tensor]], Tensor], trees: list[Any]) -> Any:
    def one(*parts: Any) -> Any:
        return join(list(parts)) if isinstance(parts[0], Tensor) else parts[0]

    return pytree.tree_map(one, trees[0], *trees[1:])


def everything(scan: Scan, cell: nn.Module, given: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Outputs, final states, and the gradient of a random sum of them in xs, state, constants and parameters."""
    ys, final = scan(cell, given["xs"], given["state"], constants=given["constants"], **options)
    found = {f"y {i}": leaf for i, leaf in enumerate(leaves(ys))}
    found |= {f"final {i}": leaf for i, leaf in enumerate(leaves(final))}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        ends = [leaf for leaf in found.values() if leaf.is_floating_point()]
        loss = sum((leaf * torch.randn(leaf.shape, dtype=leaf.dtype)).sum() for leaf in ends)
    sources = {f"{role} {i}": leaf for role in given for i, leaf in enumerate(floats(given[role]))}
    sources |= {f"parameter {name}": p for name, p in cell.named_parameters() if p.requires_grad}
    sources = {name: leaf for name, leaf in sources.items() if leaf.requires_grad}
    grads: Sequence[Tensor | None] = [None] * len(sources)  # no way to a source is a gradient of zero
    if isinstance(loss, Tensor) and loss.requires_grad and sources:
        grads = torch.autograd.grad(loss, list(sources.values()), allow_unused=True)
    for (name, leaf), grad in zip(sources.items(), grads, strict=True):
        found[f"gradient of {name}"] = torch.zeros_like(leaf) if grad is None else grad
    return {name: leaf.detach() for name, leaf in found.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-9, atol: float = 1e-10) -> None:
    """Every tensor by name; float64 by default, where only the order of sums may differ."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def scan_by(backend: str) -> Scan:
    """``elman.scan`` on one backend."""

    def scan(cell: nn.Module, xs: Any, state: Any, **options: Any) -> tuple[Any, Any]:
        return elman.scan(cell, xs, state, backend=backend, **options)

    return scan


def compiled(cell: nn.Module, given: dict[str, Any], record: bool = False) -> Compiled:
    """The program that ``scan`` runs for a cell that is given these."""
    first = leaves(given["xs"])[0]
    rows = rows_of(first.shape[0], max(leaf.shape[1] for leaf in leaves(given["xs"])))
    xs = pytree.tree_map_only(Tensor, lambda leaf: leaf.expand(rows.steps, rows.batch, *leaf.shape[2:]), given["xs"])
    xs = pytree.tree_map_only(Tensor, rows.pack, xs)
    protocol, constants = prepare(cell, rows, xs, given["state"], given["constants"], record)
    return program_of(protocol, Signature.of(protocol.xs.leaves, protocol.state.leaves, constants, protocol.tensors))


def differentiated(cell: nn.Module, given: dict[str, Any]) -> Differentiated:
    """The programs of both directions, with every gradient."""
    found = compiled(cell, given)
    return found.derivative((True,) * len(found.step.xs), (True,) * len(found.step.weights))


class Operations(TorchDispatchMode):
    """Counts every ATen operation that runs, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations(call: Callable[[], Any]) -> Counter[str]:
    """How often each ATen operation runs during a call."""
    with Operations() as mode:
        call()
    return mode.seen
