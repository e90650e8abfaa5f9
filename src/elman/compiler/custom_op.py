"""A compiled step inside ``torch.compile``: one custom operator for a whole sequence.

The program is traced while Dynamo runs, from shapes alone, and the graph holds its number. The operator's backward
runs the forward once more to have what it needs: nothing but inputs crosses the border of the graph. Random draws
are outputs of the forward operator, so that both see the same.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..packing import Rows, rows_of
from ..protocol import Protocol, Tree
from .autograd import Call, chunk_length, run
from .cache import Signature, program_of
from .compiled import Compiled
from .key import fingerprint
from .reference import apart
from .step import Leaf

__all__ = ["in_graph"]

_numbers = itertools.count()
_programs: dict[int, Compiled] = {}
_cells: dict[int, tuple[weakref.ref[nn.Module], Any]] = {}  # whose program it is, and what the cell was like


def in_graph(
    protocol: Protocol,
    rows: Rows,
    constants: list[Tensor],
    parameters: dict[str, Tensor],
    reverse: bool,
    remat: int | str | None,
    lengths: Tensor | None = None,
) -> Any:
    """One call of a cell over uniform rows, as a node of the graph that is being compiled.

    With ``lengths`` the rows are those of padded sequences. Raises what tracing the step raises.
    """
    xs, state = protocol.xs, protocol.state
    leaves = [[_leaf(x, True) for x in part] for part in (xs.leaves, state.leaves, constants)]
    leaves.append([_leaf(p, False) for p in parameters.values()])
    number = _number(
        protocol.cell,
        _skeleton(xs),
        _skeleton(state),
        _skeleton(protocol.constants),
        leaves,
        list(parameters),
        [part.training for part in protocol.cell.modules()],
        protocol.drawn,
    )
    chunk = chunk_length(remat, rows.steps, rows.batch) or 0
    counts = [len(xs.leaves), len(state.leaves), len(parameters)]
    tensors = [*xs.leaves, *state.leaves, *parameters.values(), *constants]
    outs = torch.ops.elman.unfold(tensors, lengths, counts, number, rows.steps, rows.batch, reverse, chunk)
    n_ys, single = _outputs(number), _single(number)
    ys = outs[0] if single else _programs[number].y.rebuild(list(outs[:n_ys]))
    return ys, state.rebuild(list(outs[n_ys : n_ys + len(state.leaves)]))


def _leaf(tensor: Tensor, batched: bool) -> Any:
    shape = tensor.shape[1:] if batched else tensor.shape
    # A graph may be for any T and B, a program is for one number of features: where Dynamo has made that a variable,
    # ``index`` is what makes it a number again.
    return (tuple([operator.index(size) for size in shape]), tensor.dtype, tensor.device, batched)


def _skeleton(tree: Tree | None) -> Any:
    return None if tree is None else (tree.spec, tree.others)


@torch._dynamo.assume_constant_result
def _number(
    cell: nn.Module, xs: Any, state: Any, constants: Any, leaves: Any, names: list[str], modes: Any, drawn: Any
) -> int:
    """Trace the cell, while Dynamo runs, and give its program a number."""
    kept = None if constants is None else Tree.empty(*constants)
    protocol = Protocol(cell, Tree.empty(*xs), Tree.empty(*state), kept, False)
    protocol.drawn = tuple(drawn)
    parts = [tuple(Leaf(torch.Size(leaf[0]), *leaf[1:]) for leaf in part) for part in leaves]
    signature = Signature(parts[0], parts[1], parts[2], parts[3], tuple(names))
    program = program_of(protocol, signature)
    number = next(_numbers)
    _programs[number] = program
    _cells[number] = (weakref.ref(cell), fingerprint(cell))
    return number


@torch._dynamo.assume_constant_result
def _outputs(number: int) -> int:
    return len(_programs[number].step.ys)


@torch._dynamo.assume_constant_result
def _single(number: int) -> bool:
    return _programs[number].y.spec is None


def _call(
    tensors: list[Tensor],
    lengths: Any,
    counts: list[int],
    number: int,
    steps: int,
    batch: int,
    reverse: bool,
    chunk: int,
    draws: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    """The operator's work under ordinary autograd: ys and final state, and the draws; rows are padded."""
    program = _programs[number]
    rows = rows_of(steps, batch, lengths, tensors[0].device)
    a, b = counts[0], counts[0] + counts[1]
    c = b + counts[2]

    def pack(padded: Tensor) -> Tensor:
        return rows.pack(padded.unflatten(0, (steps, batch)))

    xs, state = [pack(x) for x in tensors[:a]], [rows.sort(s) for s in tensors[a:b]]
    device = xs[0].device
    weights = program.weights(batch, [*tensors[b:c], *(rows.sort(leaf) for leaf in tensors[c:])], device.type)
    draws = program.draws(steps * batch, device) if draws is None else draws
    here = [pack(d) for d in draws]
    call = Call(
        program, rows, reverse, chunk or None, (a, len(state), len(weights), len(here)), device, device.type == "cpu"
    )
    ys, final = run(call, [*xs, *state, *weights, *here])
    return [*(rows.unpack(y).flatten(0, 1) for y in ys), *(rows.unsort(s) for s in final)], draws


@torch.library.custom_op("elman::unfold", mutates_args=())
def _unfold(
    tensors: list[Tensor],
    lengths: Tensor | None,
    counts: list[int],
    number: int,
    steps: int,
    batch: int,
    reverse: bool,
    chunk: int,
) -> list[Tensor]:
    cell, before = _cells[number][0](), _cells[number][1]
    if cell is not None and fingerprint(cell) != before:
        raise UsageError(
            f"an attribute of {type(cell).__name__} was changed after torch.compile had traced it, and the compiled "
            "model does not follow. Call torch._dynamo.reset() after such a change, or make it a tensor."
        )
    with torch.no_grad():
        outs, draws = _call(tensors, lengths, counts, number, steps, batch, reverse, chunk, None)
    return [*outs, *draws]


@_unfold.register_fake
def _(
    tensors: Any, lengths: Any, counts: Any, number: int, steps: int, batch: int, reverse: bool, chunk: int
) -> list[Tensor]:
    step = _programs[number].step
    total = steps * batch
    first = tensors[0]
    flat = [*(y for y in step.ys if y is not None), *step.draws]
    made = [first.new_empty((total, *n.meta["val"].shape[1:]), dtype=n.meta["val"].dtype) for n in flat]
    states = [torch.empty_like(s) for s in tensors[counts[0] : counts[0] + counts[1]]]
    n = len(flat) - len(step.draws)
    return [*made[:n], *states, *made[n:]]


@torch.library.custom_op("elman::unfold_backward", mutates_args=())
def _unfold_backward(
    tensors: list[Tensor],
    lengths: Tensor | None,
    draws: list[Tensor],
    grads: list[Tensor],
    counts: list[int],
    number: int,
    steps: int,
    batch: int,
    reverse: bool,
    chunk: int,
    needs: list[bool],
) -> list[Tensor]:
    # An operator runs below autograd; the invariant part of the step needs it back.
    autograd = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with torch.enable_grad(), autograd:
        inputs = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
        outs, _ = _call(inputs, lengths, counts, number, steps, batch, reverse, chunk, draws)
        pairs = [(o, g) for o, g in zip(outs, grads, strict=True) if o.requires_grad]
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        gradients: Sequence[Tensor | None] = [None] * len(wanted)
        if pairs:
            heads, tails = zip(*pairs, strict=True)
            gradients = torch.autograd.grad(heads, wanted, tails, allow_unused=True)
    found = iter(gradients)
    result = []
    for t, need in zip(tensors, needs, strict=True):
        g = next(found) if need else None
        result.append(torch.zeros_like(t) if g is None else g.contiguous())
    return apart(result, [*tensors, *draws, *grads])


@_unfold_backward.register_fake
def _(tensors: Any, *_: Any) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    tensors, ctx.lengths, ctx.counts, ctx.number, ctx.steps, ctx.batch, ctx.reverse, ctx.chunk = inputs
    step = _programs[ctx.number].step
    ctx.draws = len(step.draws)
    ctx.needs = [t.requires_grad and t.is_floating_point() for t in tensors]
    ctx.save_for_backward(*tensors, *output[len(output) - ctx.draws :])


def _backward(ctx: Any, grads: list[Tensor]) -> Any:
    saved = ctx.saved_tensors
    n = len(saved) - ctx.draws
    tensors, draws, of_results = list(saved[:n]), list(saved[n:]), list(grads[: len(grads) - ctx.draws])
    found = torch.ops.elman.unfold_backward(
        tensors,
        ctx.lengths,
        draws,
        of_results,
        ctx.counts,
        ctx.number,
        ctx.steps,
        ctx.batch,
        ctx.reverse,
        ctx.chunk,
        ctx.needs,
    )
    return [g if need else None for g, need in zip(found, ctx.needs, strict=True)], *[None] * 7


_unfold.register_autograd(_backward, setup_context=_keep)
