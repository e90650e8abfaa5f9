"""Attention: a cell that chooses, at every step, what to read of a memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, OptionError
from ..recording import record, scope
from ..types import Pytree, State
from .nested import Make, Wrapper, beside, like, misfit, named, output_size, positive, start, step

__all__ = ["Attend"]

_SCORES = ("additive", "multiplicative")


class Attend(Wrapper):
    """Any cell, reading at every step a mean of memories m_j that its last output q = y(t-1) weighs.

        e_j = vᵀ tanh(W q + U m_j)    additive          e_j = qᵀ W m_j    multiplicative
        α = softmax e,   c(t) = Σ_j α_j m_j,   y(t), s(t) = cell([x(t), c(t)], s(t-1))

    x (B, D); the memory (B, S, M), or a pair of it and a mask (B, S) that is true where there is something to read,
    stands in ``constants`` or in ``constants[key]``. The cell reads D + M features; y is its output (B, O); the state
    is (that of the cell, y). W, U and v are ``query`` (K, O), ``memory`` (K, M), ``energy`` (1, K) with K =
    ``attention_size`` or else O; multiplicative: ``query`` is (M, O). U m_j is computed once for all steps. A sequence
    whose mask is false everywhere weighs all places alike. Records "attention", α (B, S);
    what the cell records as "name" is "cell.name".

    Raises OptionError for another score and an impossible size, InputError for a memory that does not fit.
    Sources: Bahdanau, Cho, Bengio 2015, Neural machine translation by jointly learning to align and translate,
    appendix A.1.2; Luong, Pham, Manning 2015, Effective approaches to attention-based NMT, "general" score.
    """

    def __init__(
        self,
        cell: nn.Module,
        memory_size: int,
        *,
        score: str = "additive",
        attention_size: int | None = None,
        key: str | None = None,
    ) -> None:
        super().__init__(cell)
        if score not in _SCORES:
            raise OptionError.unknown("score of attention", score, _SCORES)
        self.memory_size, self.score, self.key = positive("Attend", "memory_size", memory_size), score, key
        reads = output_size(cell)
        size = positive("Attend", "attention_size", attention_size or reads)
        additive = score == "additive"
        options: dict[str, Any] = {"bias": False, "device": like(cell).device, "dtype": like(cell).dtype}
        self.query = nn.Linear(reads, size if additive else memory_size, **options)
        self.memory = nn.Linear(memory_size, size, **options) if additive else None
        self.energy = nn.Linear(size, 1, **options) if additive else None

    @classmethod
    def build(cls, input_size: int, make: Make, memory_size: int, **options: object) -> Attend:
        return cls(make(input_size + memory_size), memory_size, **options)  # type: ignore[arg-type]

    @property
    def input_size(self) -> int:
        return super().input_size - self.memory_size

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype, constants: Pytree = None) -> State:
        """That of the cell, and a first query of zeros."""
        inner = start(self.cell, batch, device=device, dtype=dtype, constants=constants)
        return inner, torch.zeros(batch, self.output_size, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: State, constants: Pytree = None) -> tuple[Tensor, State]:
        memory, mask = self._memory(constants)
        inner, query = state
        if self.memory is not None and self.energy is not None:
            e = self.energy(torch.tanh(self.query(query)[:, None] + self.memory(memory)))[..., 0]
        else:
            e = (memory @ self.query(query)[..., None])[..., 0]  # (B, S)
        if mask is not None:
            e = e.masked_fill(~mask, torch.finfo(e.dtype).min)
        weights = record("attention", torch.softmax(e, -1))
        c = (weights[:, None] @ memory)[:, 0]  # (B, M)
        beside("Attend", self.cell, x, self.memory_size, "the memory")
        with scope("cell"):
            y, inner = step(self.cell, torch.cat([x, c], -1), inner, constants)
        return y, (inner, y)

    def _memory(self, constants: Pytree) -> tuple[Tensor, Tensor | None]:
        given = named("Attend", constants, self.key)
        memory, mask = given if isinstance(given, tuple | list) and len(given) == 2 else (given, None)
        if not isinstance(memory, Tensor) or memory.dim() != 3 or memory.shape[-1] != self.memory_size:
            raise misfit("Attend", f"a memory (B, S, {self.memory_size})", memory, self.key)
        if mask is not None and (mask.dtype != torch.bool or mask.shape != memory.shape[:2]):
            raise InputError(
                f"Attend needs a mask of booleans {tuple(memory.shape[:2])}, true where the memory may be read; got "
                f"{mask.dtype} {tuple(mask.shape)}."
            )
        return memory, mask
