"""Runs cells on a device that is not there: tensors without data, which refuse to meet those of another device.

``python fake_gpu.py NAME…``. A process of its own, because a device cannot be taken back. Prints the names that ran.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

sys.path.append(str(Path(__file__).resolve().parents[1]))

from cellzoo import zoo
from comparing import inputs, leaves
from elman.compiler.autograd import Call, run
from elman.compiler.cache import Signature, program_of
from elman.packing import rows_of
from elman.unfold import prepare

_setup_privateuseone_for_python_backend("gpu")
torch.gpu.get_amp_supported_dtype = lambda: [torch.bfloat16]  # type: ignore[attr-defined]
torch.random.fork_rng = contextlib.nullcontext  # type: ignore[assignment]  # it would ask the device for its state


def check(name: str) -> None:
    """Both directions of a cell, whole and with lengths; everything stays on the device."""
    cell, mode, device = zoo(name), FakeTensorMode(), torch.device("gpu:0")
    given = inputs(cell, 5, 3)

    def moved(tree: Any) -> Any:
        def there(t: Tensor) -> Tensor:
            return torch.empty(t.shape, dtype=t.dtype, device=device, requires_grad=t.is_floating_point())

        with mode:
            return pytree.tree_map_only(Tensor, there, tree)

    def packed(x: Tensor) -> Tensor:
        return x.expand(5, 3, *x.shape[2:]).flatten(0, 1)[: rows.total]

    for lengths, reverse, chunk in ((None, False, None), ([5, 2, 0], True, None), ([4, 4, 1], False, 2)):
        rows = rows_of(5, 3, lengths)
        xs = moved(pytree.tree_map_only(Tensor, packed, given["xs"]))
        state, constants = moved(given["state"]), moved(given["constants"])
        own = moved({**dict(cell.named_parameters()), **dict(cell.named_buffers())})
        protocol, fixed = prepare(cell, rows, xs, state, constants, False, own)
        program = program_of(protocol, Signature.of(protocol.xs.leaves, protocol.state.leaves, fixed, own))
        with mode:
            parts = [protocol.xs.leaves, protocol.state.leaves, program.weights(3, [*own.values(), *fixed], "gpu")]
            parts.append(program.draws(rows.total, device))
            counts = tuple(len(part) for part in parts)
            ys, final = run(Call(program, rows, reverse, chunk, counts, device), [t for part in parts for t in part])
            ends = [leaf for leaf in (*ys, *final) if leaf.requires_grad]
            wanted = [t for t in leaves((xs, state, constants, own)) if t.requires_grad]
            grads = torch.autograd.grad([e.sum() for e in ends], wanted, allow_unused=True) if ends else ()
        assert all(leaf.device == device for leaf in (*ys, *final, *grads) if leaf is not None), name


for each in sys.argv[1:]:
    check(each)
    print(each, flush=True)
os._exit(0)  # the threads that autograd keeps for a device do not know how to end without it
