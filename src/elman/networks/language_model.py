"""A recurrent language model: embedding, any cell, a distribution over the next symbol."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..combinators import input_size, output_size, start, step
from ..drawn import Dropout
from ..errors import CellError, InputError
from ..streaming import Stream
from ..types import State
from ..unfold import scan
from .unfolding import Unfolding

__all__ = ["LanguageModel"]


class LanguageModel(nn.Module):
    """Predicts the next symbol of a sequence from all symbols before it.

        x(t) = dropout E[token(t)];    h(t), s(t) = cell(x(t), s(t-1));    logits(t) = W dropout h(t) + c

    ``cell`` is any cell that reads the embedding, a ``Stack`` of layers for example. With ``tie=True`` the output
    projection is the embedding ``E`` itself; where the cell's output is not as wide as the embedding, a linear map
    without bias stands between. Tokens are (T, B) integers, logits are (T, B, V), the state is that of the cell.
    Raises InputError for a cell that reads another width than the embedding has, and for what is no tokens.

    Source: Mikolov et al. 2010 (recurrent language model); Press & Wolf 2017 (tying); Zaremba et al. 2014
    (dropout on the connections that do not recur).
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int,
        cell: nn.Module,
        *,
        dropout_input: float = 0.0,
        dropout_output: float = 0.0,
        tie: bool = False,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        self.cell = cell
        self.dropout_input = Dropout(dropout_input)
        self.dropout_output = Dropout(dropout_output)
        width = output_size(cell, embedding_size)
        with suppress(CellError):  # a cell that does not say what it reads
            if input_size(cell) != embedding_size:
                raise InputError(f"the cell reads {input_size(cell)} features, and the embedding has {embedding_size}.")
        self.narrow = nn.Linear(width, embedding_size, bias=False) if tie and width != embedding_size else None
        if tie:
            # Rows of unit variance would give logits of variance H where they serve as output weights.
            nn.init.normal_(self.embedding.weight, std=embedding_size**-0.5)
            self.weight_out = None
        else:
            self.weight_out = nn.Parameter(nn.init.xavier_uniform_(torch.empty(vocab_size, width)))
        self.bias_out = nn.Parameter(torch.zeros(vocab_size))

    def initial_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state of the cell before the first symbol, for ``batch`` sequences."""
        weight = self.embedding.weight
        return start(self.cell, batch, device=device or weight.device, dtype=dtype or weight.dtype)

    def forward(self, tokens: Tensor, state: State = None, **options: Unpack[Unfolding]) -> tuple[Tensor, State]:
        """Tokens (T, B) and the state before them → logits (T, B, V) of each next symbol and the state
        after them."""
        h, state = self.activations(tokens, state, **options)
        return self.logits(self.dropout_output(h)), state

    def activations(self, tokens: Tensor, state: State = None, **options: Unpack[Unfolding]) -> tuple[Tensor, State]:
        """Tokens (T, B) and the state before them → outputs h (T, B, H) of the cell and the state after them."""
        if tokens.dim() != 2 or tokens.is_floating_point():
            raise InputError(
                f"LanguageModel reads tokens, integers (T, B) below {self.vocab_size}; got {tuple(tokens.shape)} of "
                f"{tokens.dtype}."
            )
        return scan(self.cell, self.dropout_input(self.embedding(tokens)), state, **options)

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """One symbol for each sequence, (B,), and the state → logits (B, V) and the next state."""
        h, state = step(self.cell, self.dropout_input(self.embedding(token)), state)
        return self.logits(self.dropout_output(h)), state

    def streamed(self) -> Callable[[Tensor, Stream | State], tuple[Tensor, Stream]]:
        """``step`` for ``decode``, without gradients: the state that it hands on is a ``Stream`` of the cell.

        Ids (B,), and for the first ones a state (B, …) or None → logits (B, V) and the stream. So a state goes on once.
        """

        @torch.no_grad()
        def step(ids: Tensor, stream: Stream | State) -> tuple[Tensor, Stream]:
            if not isinstance(stream, Stream):
                begun = self.initial_state(len(ids)) if stream is None else stream
                stream = Stream(self.cell, begun, copy=False)
            return self.logits(self.dropout_output(stream(self.dropout_input(self.embedding(ids))))), stream

        return step

    def logits(self, h: Tensor) -> Tensor:
        """Outputs of the cell (…, H), after dropout → logits (…, V)."""
        if self.narrow is not None:
            h = self.narrow(h)
        weight = self.embedding.weight if self.weight_out is None else self.weight_out
        return F.linear(h, weight, self.bias_out)
