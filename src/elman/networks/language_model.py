"""A recurrent language model: embedding, a stack of cells, a distribution over the next symbol."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..types import State
from ..unfold import scan

__all__ = ["LanguageModel", "output_width"]


class LanguageModel(nn.Module):
    """Predicts the next symbol of a sequence from all symbols before it.

    ``x(t) = dropout E[token(t)]``, ``h_l(t) = cell_l(h_{l-1}(t), h_l(t-1))`` with ``h_0 = x``,
    ``logits(t) = W dropout h_L(t) + c``

    ``cells`` are the layers, bottom first; each reads what the one below gives (``output_size``) and runs
    through
    ``elman.scan``. With ``tie=True`` the output projection is the embedding ``E`` itself; where the top
    layer is not as wide as the embedding, a linear map without bias stands between. Tokens are (T, B)
    integers, logits are (T, B, V), the state is a tuple with the state of each layer.

    Source: Mikolov et al. 2010 (recurrent language model); Press & Wolf 2017 (tying); Zaremba et al. 2014
    (dropout on the connections that do not recur).
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int,
        cells: Sequence[nn.Module],
        *,
        dropout_input: float = 0.0,
        dropout_between: float = 0.0,
        dropout_output: float = 0.0,
        tie: bool = False,
    ) -> None:
        super().__init__()
        if not cells:
            raise InputError("a language model needs at least one layer; cells is empty.")
        self.vocab_size = vocab_size
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        self.cells = nn.ModuleList(cells)
        self.dropout_input = nn.Dropout(dropout_input)
        self.dropout_between = nn.Dropout(dropout_between)
        self.dropout_output = nn.Dropout(dropout_output)
        width = embedding_size
        for cell in cells:
            width = output_width(cell, width)
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
        """The state of each layer before the first symbol, for ``batch`` sequences."""
        weight = self.embedding.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        return tuple(cell.initial_state(batch, device=device, dtype=dtype) for cell in self.cells)  # type: ignore[operator]

    def forward(self, tokens: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Tokens (T, B) and the state before them → logits (T, B, V) of each next symbol and the state
        after them."""
        if state is None:
            state = self.initial_state(tokens.shape[1])
        x = self.dropout_input(self.embedding(tokens))
        after = []
        for layer, (cell, before) in enumerate(zip(self.cells, state, strict=True)):
            if layer:
                x = self.dropout_between(x)
            x, last = scan(cell, x, before)
            after.append(last)
        return self._logits(x), tuple(after)

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """One symbol for each sequence, (B,), and the state → logits (B, V) and the next state."""
        x = self.dropout_input(self.embedding(token))
        after = []
        for layer, (cell, before) in enumerate(zip(self.cells, state, strict=True)):
            if layer:
                x = self.dropout_between(x)
            x, new = cell(x, before)
            after.append(new)
        return self._logits(x), tuple(after)

    def _logits(self, h: Tensor) -> Tensor:
        h = self.dropout_output(h)
        if self.narrow is not None:
            h = self.narrow(h)
        weight = self.embedding.weight if self.weight_out is None else self.weight_out
        return F.linear(h, weight, self.bias_out)


def output_width(cell: nn.Module, input_size: int) -> int:
    """Features that ``cell`` gives: its ``output_size``, or, where it does not say, found by one step."""
    width = getattr(cell, "output_size", None)
    if width is not None:
        return int(width)
    x = torch.zeros(1, input_size)
    with torch.no_grad():
        y, _ = cell(x, cell.initial_state(1, device=x.device, dtype=x.dtype))  # type: ignore[operator]
    return int(y.shape[-1])
