"""The language model as a function: causal, streaming, tied, with dropout where it belongs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from elman.combinators import Stack
from elman.decode import Sampler, generate, score
from elman.errors import InputError
from elman.networks import LanguageModel
from elman.spec import make_cell

VOCAB, EMBEDDING, HIDDEN, STEPS, BATCH = 11, 5, 7, 6, 3


def build(cell: str = "lstm", layers: int = 2, **options: object) -> LanguageModel:
    dropout = options.pop("dropout_between", 0.0)
    stack = make_cell(f"stack({layers}, {cell}, dropout={dropout})", EMBEDDING, HIDDEN)
    return LanguageModel(VOCAB, EMBEDDING, stack, **options)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (STEPS, BATCH))


@pytest.mark.parametrize("cell", ["elman", "gru", "lstm"])
@pytest.mark.parametrize("tie", [False, True])
def test_a_chunk_at_a_time_and_a_step_at_a_time_is_the_whole(cell: str, tie: bool, tokens: torch.Tensor) -> None:
    model = build(cell, tie=tie).double().eval()
    whole, end = model(tokens)
    assert whole.shape == (STEPS, BATCH, VOCAB)
    first, state = model(tokens[:2])
    second, last = model(tokens[2:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    state, steps = model.initial_state(BATCH), []
    for token in tokens:
        logits, state = model.step(token, state)
        steps.append(logits)
    torch.testing.assert_close(torch.stack(steps), whole)
    for other in (last, state):
        torch.testing.assert_close(pytree.tree_leaves(other), pytree.tree_leaves(end))


def test_predictions_do_not_see_the_future_or_other_rows(tokens: torch.Tensor) -> None:
    model = build().eval()
    changed = tokens.clone()
    changed[3, 1] = (changed[3, 1] + 1) % VOCAB
    same = (model(tokens)[0] == model(changed)[0]).all(-1)
    assert same[:3].all()
    assert same[:, [0, 2]].all()
    assert not same[3:, 1].any()


def test_tying_shares_one_matrix(tokens: torch.Tensor) -> None:
    tied, untied = build(tie=True), build()
    assert tied.weight_out is None
    assert tied.narrow is not None
    assert tied.narrow.weight.shape == (EMBEDDING, HIDDEN)
    assert untied.weight_out is not None
    assert untied.weight_out.shape == (VOCAB, HIDDEN)
    tied(tokens)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in tied.parameters())


def test_logits_of_a_new_model_are_small(tokens: torch.Tensor) -> None:
    for tie in (False, True):
        assert build(tie=tie)(tokens)[0].abs().max() < 2


@pytest.mark.parametrize("place", ["input", "between", "output"])
def test_each_dropout_acts_in_training_only(place: str, tokens: torch.Tensor) -> None:
    model = build(**{f"dropout_{place}": 0.5})
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    model.eval()
    assert torch.equal(model(tokens)[0], model(tokens)[0])


def test_a_cell_that_does_not_say_how_wide_it_is() -> None:
    class Wide(nn.Module):
        def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(batch, 1, device=device, dtype=dtype)

        def forward(self, x: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.cat([x, x, s], -1), s + 1

    wide = Stack([Wide(), make_cell("gru", 2 * EMBEDDING + 1, HIDDEN)])
    assert LanguageModel(VOCAB, EMBEDDING, wide)(torch.zeros(2, 1, dtype=torch.int64))[0].shape == (2, 1, VOCAB)
    assert LanguageModel(VOCAB, EMBEDDING, Wide()).weight_out.shape == (VOCAB, 2 * EMBEDDING + 1)


def test_a_cell_that_reads_another_width() -> None:
    with pytest.raises(InputError, match="reads 6 features, and the embedding has 5"):
        LanguageModel(VOCAB, EMBEDDING, make_cell("gru", 6, HIDDEN))


@pytest.mark.parametrize("given", [torch.zeros(4, dtype=torch.int64), torch.zeros(4, 2)])
def test_what_is_no_tokens(given: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"reads tokens, integers \(T, B\) below 11; got \(4"):
        build()(given)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_its_streamed_step_is_its_step(tie: bool, training: bool, tokens: torch.Tensor) -> None:
    model = build("gru", tie=tie).double().train(training)
    state, stream, streamed = model.initial_state(BATCH), None, model.streamed()
    for token in tokens:
        expected, state = model.step(token, state)
        logits, stream = streamed(token, stream)
        torch.testing.assert_close(logits, expected.detach(), rtol=1e-10, atol=1e-10)
        assert not logits.requires_grad
    assert stream is not None
    torch.testing.assert_close(pytree.tree_leaves(stream.state), [s.detach() for s in pytree.tree_leaves(state)])


def test_it_draws_the_same_symbols_streamed() -> None:
    model = build("lstm").eval()

    def step(ids: torch.Tensor, state: object) -> tuple[torch.Tensor, object]:
        return model.step(ids, model.initial_state(len(ids)) if state is None else state)

    drawn = [
        torch.stack([*generate(way, [3, 1], 60, Sampler(top_p=0.9), n=2, generator=torch.Generator().manual_seed(5))])
        for way in (step, model.streamed())
    ]
    assert torch.equal(*drawn)
    ids = drawn[0][:, 0]
    assert score(model.streamed(), ids) == pytest.approx(score(step, ids), rel=1e-5)
