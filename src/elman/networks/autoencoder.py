"""The sequence autoencoder: a sequence becomes a vector, and the vector the sequence again."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ..combinators.feedback import Feedback
from ..combinators.nested import positive, said
from ..errors import CellError, InputError
from ..unfold import scan
from .summary import Summary
from .unfolding import Unfolding

__all__ = ["SequenceAutoencoder"]


class SequenceAutoencoder(nn.Module):
    """A summary network, and a vector-to-sequence network that rebuilds from the code what was read.

        code = readout(y(τ)) of the encoder,    o(t) = decoder([code, f(t-1)], s(t-1))

    ``encoder``: a ``Summary``, or any cell, which then is summarised. ``decoder``: a ``Feedback`` whose input x is the
    code, at every step (the matrix R of R·code is part of its input matrix); f(t-1) is what it fed back. xs leaves
    (T, B, …), code (B, C), o (T, B, O). Symbols: let xs be their embeddings, and targets the symbols.

    Raises CellError for a decoder that is no ``Feedback`` or reads another width than the code has.
    Sources: Srivastava, Mansimov, Salakhutdinov 2015, Unsupervised learning of video representations using LSTMs;
    Dai and Le 2015, Semi-supervised sequence learning; Goodfellow, Bengio, Courville 2016, figure 10.9.
    """

    def __init__(self, encoder: nn.Module, decoder: Feedback) -> None:
        super().__init__()
        self.encoder = encoder if isinstance(encoder, Summary) else Summary(encoder)
        if not isinstance(decoder, Feedback):
            raise CellError(
                f"SequenceAutoencoder: the decoder must be a Feedback, which runs on its own output; got a "
                f"{type(decoder).__name__}."
            )
        readout = self.encoder.readout
        width = said(self.encoder.cell, "output_size") if readout is None else getattr(readout, "out_features", None)
        if width is not None and width != decoder.input_size:
            raise CellError(
                f"SequenceAutoencoder: the code has {width} features, and the decoder reads {decoder.input_size} "
                f"besides the {decoder.width} that it feeds back. Build the decoder's cell with input_size="
                f"{width + decoder.width}."
            )
        self.decoder = decoder

    def encode(self, xs: Any, lengths: Tensor | list[int] | None = None, **options: Unpack[Unfolding]) -> Tensor:
        """The code (B, C) of each sequence."""
        return self.encoder(xs, lengths=lengths, **options)[0]

    def decode(
        self,
        code: Tensor,
        steps: int,
        targets: Tensor | None = None,
        lengths: Tensor | list[int] | None = None,
        **options: Unpack[Unfolding],
    ) -> Tensor:
        """o (T, B, O) for ``steps`` T from codes (B, C): forced by targets (T, B, …) where given, or else free."""
        if positive("decode", "steps", steps) and code.dim() != 2:
            raise InputError(f"decode: a code is (B, C), one for each sequence; got {tuple(code.shape)}.")
        if targets is not None and len(targets) != steps:
            raise InputError(f"decode: targets have {len(targets)} steps, but {steps} were asked for.")
        x = code.expand(steps, *code.shape)
        return scan(self.decoder, x if targets is None else (x, targets), lengths=lengths, **options)[0]

    def forward(
        self,
        xs: Any,
        targets: Tensor | None = None,
        lengths: Tensor | list[int] | None = None,
        **options: Unpack[Unfolding],
    ) -> Tensor:
        """o (T, B, O) where xs had T steps. ``targets`` force the decoder; it is fed each only after that step."""
        code = self.encode(xs, lengths, **options)
        steps = len(torch.utils._pytree.tree_leaves(xs)[0])
        return self.decode(code, steps, targets, lengths, **options)
