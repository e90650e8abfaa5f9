"""Decoding: draw token ids from a step in closed loop on its own output, and score given ids.

Nothing here knows text: ids go in, ids come out. A *step* is any function ``(ids (B,), state) -> (logits
(B, V), state)``; ``state`` is None before the first step, for it to begin with its own initial state. A language
model's is ``LanguageModel.streamed()``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from .errors import InputError, OptionError
from .types import State

__all__ = ["Sampler", "Step", "generate", "score"]

Step: TypeAlias = Callable[[Tensor, State], tuple[Tensor, State]]
"""``(ids (B,), state) -> (logits (B, V), state)``."""

Ids: TypeAlias = Sequence[int] | np.ndarray | Tensor


@dataclass(frozen=True)
class Sampler:
    """Logits (B, V) → ids (B,): one draw from the softmax of each row, after these changes, in this order.

    - ``temperature``: logits are divided by it; below 1 sharper, above 1 flatter, 0 means ``greedy``.
    - ``top_k``: only the k most probable symbols stay.
    - ``top_p``: of what is left, renormalised, only the most probable symbols stay, as few as together
      reach a mass of p, and at least one (nucleus sampling: Holtzman et al. 2020, arXiv 1904.09751).
    - ``greedy``: the most probable symbol, no chance involved.

    Among equal logits the lower id counts as more probable: exactly k symbols stay, and ``top_k=1`` is
    ``greedy``. Softmax and sums are in float64. A row that is drawn takes one uniform number, whatever V
    and the options. Logits of −inf are symbols that are never drawn. OptionError for impossible options.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    greedy: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.temperature, int | float) and 0 <= self.temperature < math.inf):
            raise OptionError(
                f"temperature must be a finite number above 0, or 0 for the most probable symbol; got "
                f"{self.temperature!r}"
            )
        if self.top_k is not None and not (_is_int(self.top_k) and self.top_k >= 1):
            raise OptionError(f"top_k must be a whole number of at least 1, or None; got {self.top_k!r}")
        if self.top_p is not None and not (isinstance(self.top_p, int | float) and 0 < self.top_p <= 1):
            raise OptionError(f"top_p must be above 0 and at most 1, or None; got {self.top_p!r}")

    def __call__(self, logits: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
        """Ids (B,), int64, on the device of ``logits`` (B, V).

        ``generator``: one (on the CPU) for all rows, or one for each; None for torch's default.
        InputError if a row is no distribution: NaN, +inf, or −inf throughout.
        """
        if self._certain:
            _check_logits(logits)
            return logits.argmax(-1)
        uniform = _uniform(len(logits), generator).to(logits.device)
        return _inverse(self.probabilities(logits), uniform)

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distributions (B, V), float64, that the rows are drawn from."""
        largest = _check_logits(logits)
        if self._certain:
            return torch.zeros(logits.shape, dtype=torch.float64, device=logits.device).scatter(
                1, logits.argmax(-1, keepdim=True), 1.0
            )
        centred = logits.double() - largest.double()  # so that no temperature overflows
        # 0 / tiny stays 0 and negatives go to −inf at worst: the maximum is always kept
        probabilities = torch.softmax(centred if self.temperature == 1 else centred / self.temperature, -1)
        if self.top_k is None and self.top_p is None:
            return probabilities
        # ranked by logits, which stay apart where probabilities have rounded to the same
        order = centred.sort(dim=-1, descending=True, stable=True).indices
        ranked = probabilities.gather(1, order)
        if self.top_k is not None:
            ranked[:, self.top_k :] = 0
            ranked /= ranked.sum(-1, keepdim=True)
        if self.top_p is not None and self.top_p < 1:
            reached = ranked.cumsum(-1)[:, :-1] >= self.top_p
            ranked[:, 1:] = ranked[:, 1:].masked_fill(reached, 0)
            ranked /= ranked.sum(-1, keepdim=True)
        return torch.zeros_like(probabilities).scatter(1, order, ranked)

    @property
    def _certain(self) -> bool:
        return self.greedy or self.temperature == 0


def generate(
    step: Step,
    prompt_ids: Ids,
    length: int,
    sampler: Sampler,
    *,
    n: int = 1,
    generator: torch.Generator | None = None,
    start: int | None = None,
    state: State = None,
    device: torch.device | str | None = None,
) -> Iterator[Tensor]:
    """``length`` further ids for each of ``n`` continuations of the prompt: (n,) as soon as they are drawn.

    The prompt is read first, without drawing; where it is empty, ``start`` is read instead. State is
    carried from step to step, beginning with ``state`` (leaves (n, …)) or None. No gradients are kept.

    Sample i has a random generator of its own, seeded with s + i, where s is the initial seed of
    ``generator``; so it is the same for every n, and sample i of seed s is sample 0 of seed s + i. (A
    step that rounds differently for another batch size can still tip a draw that is balanced to the last
    bit.) ``generator`` itself is not advanced. Without one, s is drawn from torch's default generator.

    Raises at once, not at the first draw: InputError for a prompt that is no list of ids, or is empty
    without ``start``; OptionError for an impossible ``length`` or ``n``.
    """
    if not _is_int(length) or length < 0:
        raise OptionError(f"length must be a whole number of at least 0; got {length!r}")
    if not _is_int(n) or n < 1:
        raise OptionError(f"n must be a whole number of at least 1; got {n!r}")
    prompt = _ids(prompt_ids, device)
    if not len(prompt):
        if start is None:
            raise InputError("the prompt is empty: give at least one token, or a start token")
        prompt = _ids([start], prompt.device)
    if generator is None:
        seed = int(torch.randint(2**62, ()))
    else:
        seed = generator.initial_seed()
    generators = [torch.Generator().manual_seed((seed + i) % 2**64) for i in range(n)]
    return _generate(step, prompt, length, sampler, generators, state)


def _generate(
    step: Step,
    prompt: Tensor,
    length: int,
    sampler: Sampler,
    generators: list[torch.Generator],
    state: State,
) -> Iterator[Tensor]:
    if not length:
        return
    n = len(generators)
    for id in prompt:
        logits, state = _advance(step, id.expand(n), state)
    for remaining in range(length - 1, -1, -1):
        ids = sampler(logits, generators)
        yield ids
        if remaining:
            logits, state = _advance(step, ids, state)


def score(
    step: Step,
    ids: Ids,
    *,
    start: int | None = None,
    state: State = None,
    device: torch.device | str | None = None,
) -> list[float]:
    """Nats of each id given all before it, −ln p(id_t | id_<t), in float64.

    The first id is only read, not scored, unless a ``start`` token is given that stands before it; so of
    N ids there are N − 1 numbers, or N with ``start``. An id of probability 0 costs inf. InputError for
    what is no list of ids below V.
    """
    sequence = _ids(ids, device)
    if start is not None:
        sequence = torch.cat([_ids([start], sequence.device), sequence])
    nats = []
    for id, following in pairwise(sequence):
        logits, state = _advance(step, id.expand(1), state)
        _check_logits(logits)
        if following >= logits.shape[1]:
            raise InputError(f"id {int(following)} is outside the {logits.shape[1]} symbols of the model")
        nats.append(-logits[0].double().log_softmax(-1)[following])
    return torch.stack(nats).tolist() if nats else []


def _advance(step: Step, ids: Tensor, state: State) -> tuple[Tensor, State]:
    # around each step alone: a generator function that is left waiting must not leave gradients switched off
    with torch.no_grad():
        logits, state = step(ids, state)
    if logits.dim() != 2 or len(logits) != len(ids):
        raise InputError(f"the step must give logits ({len(ids)}, V); got {tuple(logits.shape)}")
    return logits, state


def _ids(ids: Ids, device: torch.device | str | None) -> Tensor:
    """Ids as int64 (N,)."""
    if isinstance(ids, Tensor):
        valid = not ids.is_floating_point() and ids.dtype != torch.bool
    else:
        ids = np.asarray(ids)
        valid = ids.dtype.kind in "iu" or not ids.size
    if valid and ids.ndim == 1:
        tensor = ids if isinstance(ids, Tensor) else torch.from_numpy(ids.astype(np.int64))
        tensor = tensor.to(device, torch.int64)
        if not bool((tensor < 0).any()):
            return tensor
    raise InputError(f"token ids must be whole numbers from 0, (N,); got {str(ids)[:80]}")


def _check_logits(logits: Tensor) -> Tensor:
    """The largest of each row (B, 1), after a look at whether they are distributions."""
    if logits.dim() != 2 or not logits.shape[1]:
        raise InputError(f"logits must be (B, V); got {tuple(logits.shape)}")
    largest = logits.amax(-1, keepdim=True)  # NaN if any is
    finite = math.isfinite(largest.item()) if len(logits) == 1 else bool(largest.isfinite().all())
    if not finite:
        row = int((~largest.isfinite()).nonzero()[0, 0])
        raise InputError(
            f"the logits of row {row} are no distribution: their largest is {largest[row].item()}; the model "
            "has diverged or a mask leaves nothing to draw"
        )
    return largest


def _uniform(rows: int, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """One number of [0, 1) for each row (B,), float64, from the CPU: the same draws on every device."""
    if generator is None or isinstance(generator, torch.Generator):
        return torch.rand(rows, dtype=torch.float64, generator=generator)
    if len(generator) != rows:
        raise InputError(f"got {len(generator)} generators for {rows} rows: give one for each, or a single one")
    drawn = [torch.rand(1, dtype=torch.float64, generator=own) for own in generator]
    return torch.cat(drawn) if len(drawn) > 1 else drawn[0]


def _inverse(probabilities: Float64[Tensor, "B V"], uniform: Float64[Tensor, " B"]) -> Int64[Tensor, " B"]:
    """Invert the distribution functions: the first id whose cumulated probability exceeds the number (B,)."""
    cumulated = probabilities.cumsum(-1)
    total = cumulated[:, -1:].contiguous()
    ids = torch.searchsorted(cumulated, uniform[:, None] * total, right=True)
    # the product may round up to the total: then it is the last id that has any probability
    last = torch.searchsorted(cumulated, total)
    return torch.minimum(ids, last).squeeze(1)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
