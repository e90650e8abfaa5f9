"""What each network computes, written out: every sequence alone, step after step, without ``scan``."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comparing import by_hand
from elman.networks import Bidirectional, LanguageModel, SequenceAutoencoder, Summary, Untied, Window

__all__ = ["autoencoder", "bidirectional", "language_model", "one_cell", "summary", "untied", "window"]

MERGED: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    "concat": lambda h, g: torch.cat([h, g], -1),
    "sum": lambda h, g: h + g,
    "mean": lambda h, g: 0.5 * h + 0.5 * g,
    "product": lambda h, g: h * g,
    torch.maximum: lambda h, g: torch.where(h > g, h, g),
}


def one_cell(cell: nn.Module, xs: Any, state: Any, **options: Any) -> tuple[Any, Any]:
    """Any cell; those of torch.nn return their state alone."""

    def step(x: Tensor, state: Any, *constants: Any) -> tuple[Any, Any]:
        found = cell(x, state, *constants)
        if isinstance(cell, nn.RNNCellBase):
            return (found[0] if isinstance(found, tuple) else found), found
        return found

    return by_hand(step, xs, state, **options)


def bidirectional(network: Bidirectional, xs: Any, state: Any, **options: Any) -> tuple[Any, Any]:
    h, s = one_cell(network.forward_cell, xs, state[0], **options)
    g, r = one_cell(network.backward_cell, xs, state[1], reverse=True, **options)
    return MERGED[network.merge](h, g), (s, r)


def window(network: Window, xs: Tensor, state: Any, *, constants: Any = None, lengths: Any = None) -> tuple[Any, Any]:
    """Each sequence between what came before it and zeros, cut into windows."""
    steps, batch, features = xs.shape
    width = network.left + 1 + network.right
    w, last = [], []
    for b, n in enumerate(torch.as_tensor([steps] * batch if lengths is None else lengths).tolist()):
        read = torch.cat([state[1][b], xs[:n, b]])
        last.append(read[n:])
        read = torch.cat([read, xs.new_zeros(network.right + steps - n, features)])
        w.append(torch.stack([read[t : t + width].flatten() for t in range(steps)]))
    steps_one_by_one = hasattr(network.cell, "initial_state") or isinstance(network.cell, nn.RNNCellBase)
    cell = network.cell if steps_one_by_one else lambda x, state: (network.cell(x), state)
    ys, inner = one_cell(cell, torch.stack(w, 1), state[0], constants=constants, lengths=lengths)
    return ys, (inner, torch.stack(last))


def summary(network: Summary, xs: Any, state: Any, *, lengths: Any = None, **options: Any) -> tuple[Any, Any]:
    ys, last = one_cell(network.cell, xs, state, lengths=lengths, **options)
    ends = torch.as_tensor([len(ys)] * ys.shape[1] if lengths is None else lengths).tolist()
    code = torch.stack([ys[n - 1, b] if n else torch.zeros_like(ys[0, b]) for b, n in enumerate(ends)])
    return code if network.readout is None else network.readout(code), last


def autoencoder(
    network: SequenceAutoencoder, xs: Any, state: tuple[()], *, constants: None = None, lengths: Any = None
) -> tuple[Any, Any]:
    read, *targets = xs
    zeros = {"device": read.device, "dtype": read.dtype}
    first = network.encoder.cell.initial_state(read.shape[1], **zeros)
    code, _ = summary(network.encoder, read, first, lengths=lengths)
    shown = torch.stack([code] * len(read))
    first = network.decoder.initial_state(read.shape[1], **zeros)
    ys, _ = by_hand(network.decoder, (shown, *targets) if targets else shown, first, lengths=lengths)
    return ys, state


def untied(network: Untied, xs: Any, state: Any, **options: Any) -> tuple[Any, Any]:
    turns = cycle(network.cells)
    return by_hand(lambda *given: next(turns)(*given), xs, state, **options)


def language_model(network: LanguageModel, tokens: Tensor, state: Any, *, constants: None = None) -> tuple[Any, Any]:
    symbols = F.one_hot(tokens, network.vocab_size).double()
    h, state = by_hand(network.cell, symbols @ network.embedding.weight, state)
    if network.narrow is not None:
        h = h @ network.narrow.weight.T
    weight = network.embedding.weight if network.weight_out is None else network.weight_out
    return h @ weight.T + network.bias_out, state
