"""Rows: how sequences of equal or different lengths lie in one tensor.

Step after step, and within a step only the sequences that are still running. Sequences are sorted by length,
longest first, so that the rows of one step are always the first ones of the batch:

    lengths 3 2 1    step 0: a b c | step 1: a b | step 2: a        batch_sizes (3, 2, 1), N = 6

This is the layout of torch.nn.utils.rnn.PackedSequence. What is packed costs nothing for padding, and whatever
stands in the padding, NaN included, is never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .errors import InputError

__all__ = ["Rows", "extent", "rows_of", "widen"]


@dataclass(frozen=True, eq=False)
class Rows:
    """The layout of a batch of sequences over ``steps`` steps.

    ``sizes`` says how many sequences run at each step, never more than at the step before; None stands for all of
    them at every step. ``gather`` (N,) says which row of the padded, flattened (T·B, …) tensor stands in each packed
    row, and ``order`` (B,) which sequence each sorted one is; both are None when nothing is padded or sorted.
    """

    steps: int
    batch: int
    sizes: tuple[int, ...] | None = None
    gather: Tensor | None = None
    order: Tensor | None = None

    @classmethod
    def packed(cls, sizes: tuple[int, ...], batch: int) -> Rows:
        """The layout of a PackedSequence with these batch sizes."""
        return cls(len(sizes), batch, None if all(size == batch for size in sizes) else sizes)

    @property
    def uniform(self) -> bool:
        """Whether every sequence runs at every step."""
        return self.sizes is None

    @property
    def total(self) -> int:
        """N."""
        return self.steps * self.batch if self.sizes is None else self.offsets[-1]

    @cached_property
    def batch_sizes(self) -> tuple[int, ...]:
        """(T) how many sequences run at each step."""
        return (self.batch,) * self.steps if self.sizes is None else self.sizes

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """(T + 1) first packed row of every step; the last entry is N."""
        return (0, *accumulate(self.batch_sizes))

    def pack(self, padded: Tensor) -> Tensor:
        """(T, B, …) to (N, …)."""
        flat = padded.flatten(0, 1)
        return flat if self.gather is None else flat.index_select(0, self.gather)

    def unpack(self, packed: Tensor) -> Tensor:
        """(N, …) to (T, B, …), with zeros in the padding."""
        if self.gather is None and self.steps == 1:
            return packed.unsqueeze(0)
        rest = packed.shape[1:]
        if self.gather is None:
            return packed.reshape(self.steps, self.batch, *rest)
        padded = packed.new_zeros(self.steps * self.batch, *rest).index_copy(0, self.gather, packed)
        return padded.reshape(self.steps, self.batch, *rest)

    def sort(self, leaf: Tensor) -> Tensor:
        """(B, …) in the caller's order to (B, …) longest first."""
        return leaf if self.order is None else leaf.index_select(0, self.order)

    def unsort(self, leaf: Tensor) -> Tensor:
        """(B, …) longest first to (B, …) in the caller's order."""
        if self.order is None:
            return leaf
        return leaf.index_select(0, torch.argsort(self.order))

    def chunk(self, first: int, last: int) -> Rows:
        """The layout of steps ``first`` to ``last`` alone."""
        return Rows.packed(self.batch_sizes[first:last], self.batch)

    @cached_property
    def sequence(self) -> Tensor:
        """(N,) the sorted sequence that every packed row belongs to."""
        parts = [torch.arange(size, device="cpu") for size in self.batch_sizes]
        return torch.cat(parts or [torch.empty(0, dtype=torch.long, device="cpu")])

    def previous(self, reverse: bool) -> Tensor:
        """(N,) for every packed row, the row of ``cat([states (N, …), initial (B, …)])`` that came before it."""
        rows = self.sequence
        before = torch.full((self.total,), -1, dtype=torch.long, device="cpu")
        for t, size in enumerate(self.batch_sizes):
            here = slice(self.offsets[t], self.offsets[t] + size)
            source = t + 1 if reverse else t - 1
            running = 0 if not 0 <= source < self.steps else min(size, self.batch_sizes[source])
            before[here] = self.total + rows[here]
            if running:
                start = self.offsets[source]
                before[self.offsets[t] : self.offsets[t] + running] = torch.arange(start, start + running, device="cpu")
        return before

    def final(self, reverse: bool) -> Tensor:
        """(B,) for every sequence, the row of ``cat([states (N, …), initial (B, …)])`` that came last."""
        last = torch.arange(self.total, self.total + self.batch, device="cpu")
        for t in reversed(range(self.steps)) if reverse else range(self.steps):
            last[: self.batch_sizes[t]] = torch.arange(self.offsets[t], self.offsets[t + 1], device="cpu")
        return last

    def _on(self, device: torch.device, name: str, *args: bool) -> Tensor:
        """An index of this layout on a device, brought there once."""
        there: dict[Any, Tensor] = self.__dict__.setdefault("_there", {})
        key = (device, name, *args)
        if key not in there:
            index = getattr(self, name)
            there[key] = (index(*args) if args else index).to(device)
        return there[key]

    def shift(self, after: Tensor, first: Tensor, reverse: bool) -> Tensor:
        """(N, …) states after every step and (B, …) the first to (N, …) states before every step."""
        if self.uniform:
            rest = self.total - self.batch
            if rest <= 0:
                return first[: self.total]
            return torch.cat([after[self.batch :], first] if reverse else [first, after[:rest]])
        return torch.cat([after, first]).index_select(0, self._on(after.device, "previous", reverse))

    def last(self, after: Tensor, first: Tensor, reverse: bool) -> Tensor:
        """(N, …) states after every step and (B, …) the first to (B, …) the state after every last step."""
        if self.uniform:
            if self.total == 0:
                return first.clone()
            return after[: self.batch].clone() if reverse else after[self.total - self.batch :].clone()
        return torch.cat([after, first]).index_select(0, self._on(after.device, "final", reverse))

    def repeat(self, value: Tensor, dim: int, k: int) -> Tensor:
        """A value for every sequence, repeated for every packed row; it has k rows for each at ``dim``."""
        if self.uniform:
            if self.steps == 1:
                return value
            shape = list(value.shape)
            return value.unsqueeze(dim).expand(*shape[:dim], self.steps, *shape[dim:]).flatten(dim, dim + 1)
        apart = value.unflatten(dim, (self.batch, k)).index_select(dim, self._on(value.device, "sequence"))
        return apart.flatten(dim, dim + 1)

    def sum_time(self, value: Tensor) -> Tensor:
        """(N, …) to (B, …): the sum over the steps of every sequence."""
        if self.uniform:
            return value.reshape(self.steps, self.batch, *value.shape[1:]).sum(0)
        zeros = value.new_zeros(self.batch, *value.shape[1:])
        return zeros.index_add(0, self._on(value.device, "sequence"), value)


def rows_of(
    steps: int, batch: int, lengths: Tensor | list[int] | None = None, device: torch.device | None = None
) -> Rows:
    """The layout of ``batch`` sequences padded to ``steps``, with their lengths (B,) if they differ.

    Lengths may be on any device; the layout is for tensors on ``device``, or where the lengths are. Raises InputError
    when lengths are not B integers between 0 and T.
    """
    if lengths is None:
        return Rows(steps, batch)
    try:
        given = lengths if isinstance(lengths, Tensor) else torch.as_tensor(lengths, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"lengths must be {batch} integers, one for each sequence; got {lengths!r:.80}.") from error
    if given.is_meta:
        raise InputError(f"lengths must be {batch} integers; got a tensor on device meta, which holds no data.")
    whole = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
    if given.dim() != 1 or given.numel() != batch or not whole:
        raise InputError(
            f"lengths must be {batch} integers, one for each sequence of the batch; "
            f"got shape {tuple(given.shape)} of {given.dtype}."
        )
    device, host = device or given.device, given.detach().to("cpu", torch.long)
    if batch and (int(host.min()) < 0 or int(host.max()) > steps):
        raise InputError(
            f"lengths must lie between 0 and T = {steps}; got {int(host.min())} to {int(host.max())}. "
            "Pad xs to the longest sequence, or cut the lengths."
        )
    if bool((host == steps).all()):
        return Rows(steps, batch)
    ordered, order = torch.sort(host, descending=True, stable=True)
    running = torch.arange(steps, device="cpu").unsqueeze(1) < ordered  # (T, B)
    gather = (torch.arange(steps, device="cpu").unsqueeze(1) * batch + order)[running]
    sizes = tuple(running.sum(1).tolist())
    return Rows(steps, batch, sizes, gather.to(device), order.to(device))


def extent(leaves: list[Any]) -> tuple[int, int]:
    """T and B of the leaves of xs, (T, B, …) or (T, 1, …). Raises InputError where they have none, or do not agree."""
    if not leaves:
        raise InputError("xs holds no tensor; scan needs at least one (T, B, …) tensor to know how far to unfold.")
    shapes = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise InputError(f"every leaf of xs must be a tensor (T, B, …); got a {type(leaf).__name__}.")
        shape = leaf.shape
        if len(shape) < 2:
            raise InputError(f"every leaf of xs must be a tensor (T, B, …); got {tuple(shape)}. Add a batch dimension.")
        shapes.append(shape)
    steps, batch = shapes[0][0], max([shape[1] for shape in shapes])
    if len(shapes) > 1 and any(shape[0] != steps or shape[1] not in (1, batch) for shape in shapes):
        raise InputError(f"the leaves of xs must agree in T and B; got {[tuple(shape) for shape in shapes]}.")
    if steps == 0:
        raise InputError("xs has no steps (T = 0); there is nothing to unfold.")
    return steps, batch


def widen(leaf: Tensor, steps: int, batch: int) -> Tensor:
    """A leaf (T, B, …), or (T, 1, …) for all rows, as (T, B, …)."""
    return leaf if leaf.shape[1] == batch else leaf.expand(steps, batch, *leaf.shape[2:])
