"""The sequence autoencoder: what it computes, that it rebuilds what it read, and its mistakes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import elman
from elman.cells import ElmanCell, GRUCell
from elman.combinators.feedback import Feedback
from elman.errors import CellError, InputError, OptionError
from elman.networks.autoencoder import SequenceAutoencoder
from elman.networks.summary import Summary

STEPS, BATCH, V, C = 5, 3, 4, 6


def build(code: int | None = None, hidden: int = C) -> SequenceAutoencoder:
    encoder = GRUCell(V, hidden)
    width = code or hidden
    decoder = Feedback(GRUCell(width + V, hidden), nn.Linear(hidden, V), feed="argmax")
    return SequenceAutoencoder(Summary(encoder, nn.Linear(hidden, code)) if code else encoder, decoder)


def one_hot(symbols: Tensor) -> Tensor:
    return F.one_hot(symbols, V).to(torch.get_default_dtype())


@pytest.mark.parametrize("code", [None, 2])
def test_the_decoder_reads_the_code_at_every_step_and_what_came_before(code: int | None) -> None:
    torch.manual_seed(1)
    model = build(code)
    symbols, lengths = torch.randint(V, (STEPS, BATCH)), torch.tensor([5, 2, 4])
    found = model(one_hot(symbols), symbols, lengths)
    for b, n in enumerate(lengths.tolist()):
        h = torch.zeros(1, C)
        for x in one_hot(symbols)[:n, b]:
            _, h = model.encoder.cell(x[None], h)
        given = h if code is None else model.encoder.readout(h)
        h, before = torch.zeros(1, C), torch.zeros(1, V)
        for t in range(n):
            y, h = model.decoder.cell(torch.cat([given, before], -1), h)
            torch.testing.assert_close(found[t, b], model.decoder.readout(y)[0])
            before = one_hot(symbols)[t, b][None]
    assert not found[2:, 1].any()


def test_it_rebuilds_what_it_read_running_free() -> None:
    torch.manual_seed(2)
    model = build(hidden=32)
    symbols = torch.cartesian_prod(*[torch.arange(V)] * 3).T  # all sequences of three symbols
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        loss = F.cross_entropy(model(one_hot(symbols), symbols).flatten(0, 1), symbols.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    free = model(one_hot(symbols)).argmax(-1)
    assert torch.equal(free, symbols)
    assert model.encode(one_hot(symbols)).shape == (V**3, 32)


def test_decoders_that_do_not_fit() -> None:
    with pytest.raises(CellError, match=r"must be a Feedback.* got a GRUCell"):
        SequenceAutoencoder(GRUCell(V, C), GRUCell(C, V))
    narrow = Feedback(ElmanCell(9, V))
    for encoder in (GRUCell(V, C), Summary(GRUCell(V, 3), nn.Linear(3, C))):
        with pytest.raises(CellError, match=r"code has 6 features, and the decoder reads 5 .*input_size=10"):
            SequenceAutoencoder(encoder, narrow)
    with pytest.raises(InputError, match="targets have 2 steps, but 3"):
        build().decode(torch.zeros(1, C), 3, torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(OptionError, match="decode: steps must be a positive integer, got 0"):
        build().decode(torch.zeros(1, C), 0)
    with pytest.raises(InputError, match=r"a code is \(B, C\), one for each sequence; got \(6,\)"):
        build().decode(torch.zeros(C), 3)


def test_it_is_the_cell_that_is_scanned() -> None:
    model = build()
    code = torch.randn(BATCH, C)
    expected, _ = elman.scan(model.decoder, code.expand(STEPS, -1, -1))
    torch.testing.assert_close(model.decode(code, STEPS), expected, rtol=0, atol=0)
