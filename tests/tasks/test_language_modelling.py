"""The language modelling task: its corpus, its units, its place in the text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elman.checkpoint import RunDirectory
from elman.config import Config, build_config
from elman.errors import DataError, OptionError, RunError
from elman.tasks.language_model import (
    LanguageModelling,
    build_model,
    closed_step,
    evaluate,
    open_corpus,
    start_id,
    store_corpus,
)
from elman.text import Tokenizer

TEXT = "ein Häuschen, zwei Häuschen, drei Mäuse\n" * 30
SMALL = {"model": {"hidden": 6, "cell": "gru"}, "data": {"batch": 3, "window": 7}}


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def make(file: str, tmp_path: Path, *more: dict[str, Any], **data: object) -> tuple[Config, LanguageModelling]:
    config = build_config(SMALL, {"data": {"files": [file], **data}}, *more)
    corpus = open_corpus(config.data, tmp_path / "cache")
    model = build_model(config.model, corpus.tokenizer.vocab_size)
    return config, LanguageModelling(config, corpus, model, torch.device("cpu"))


def test_the_parts_are_contiguous_and_in_order(file: str, tmp_path: Path) -> None:
    _, task = make(file, tmp_path)
    corpus = task.corpus
    whole = np.concatenate([corpus.train, corpus.valid, corpus.test])
    assert corpus.tokenizer.decode(whole) == TEXT
    assert [round(len(part) / len(whole), 2) for part in (corpus.train, corpus.valid, corpus.test)] == [
        0.9,
        0.05,
        0.05,
    ]


@pytest.mark.parametrize("tokens", ["char", "byte"])
def test_bits_per_character_do_not_depend_on_what_a_token_is(tokens: str, file: str, tmp_path: Path) -> None:
    _, task = make(file, tmp_path, tokens=tokens)
    ids = task.corpus.train[1:]
    characters = len(task.corpus.tokenizer.decode(ids))
    assert task.bits(1.0, "train") == pytest.approx(len(ids) / characters / math.log(2))


def test_the_first_loss_is_that_of_a_uniform_guess(file: str, tmp_path: Path) -> None:
    _, task = make(file, tmp_path)
    loss, symbols = task.next_loss()
    assert symbols == 21
    assert float(loss.detach()) == pytest.approx(math.log(task.corpus.tokenizer.vocab_size), rel=0.1)


def test_the_state_is_carried_and_cut(file: str, tmp_path: Path) -> None:
    """Two windows with carried state are one window of twice the length, but for the gradient."""
    _, task = make(file, tmp_path)
    _, long = make(file, tmp_path, window=14)
    long.model.load_state_dict(task.model.state_dict())
    short = (task.next_loss()[0] + task.next_loss()[0]) / 2
    whole, _ = long.next_loss()
    torch.testing.assert_close(short, whole)


def test_continuing_gives_the_same_losses(file: str, tmp_path: Path) -> None:
    _, task = make(file, tmp_path)
    _, other = make(file, tmp_path)
    other.model.load_state_dict(task.model.state_dict())
    for _ in range(5):
        task.next_loss()
    tensors, facts = task.state()
    other.load_state({name: tensor.clone() for name, tensor in tensors.items()}, facts)
    for _ in range(task.steps_per_epoch):
        assert torch.equal(task.next_loss()[0], other.next_loss()[0])


def test_evaluating_counts_every_symbol_but_the_first_once(file: str, tmp_path: Path) -> None:
    config, task = make(file, tmp_path)
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.zero_()
    nats, symbols = evaluate(task.model, task.corpus.valid, config, torch.device("cpu"))
    assert symbols == len(task.corpus.valid) - 1
    assert nats == pytest.approx(symbols * math.log(task.corpus.tokenizer.vocab_size))


def test_samples_are_the_same_for_the_same_step_and_draw_nothing_else(file: str, tmp_path: Path) -> None:
    _, task = make(file, tmp_path)
    before = torch.get_rng_state()
    assert task.sample(30, step=4) == task.sample(30, step=4)
    assert task.sample(30, step=4) != task.sample(30, step=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_unknown_symbol_is_never_drawn(file: str, tmp_path: Path) -> None:
    _, task = make(file, tmp_path)
    logits, _ = closed_step(task.model, task.corpus.tokenizer)(torch.ones(2, dtype=torch.int64), None)
    assert (logits[:, 0] == -math.inf).all()
    assert logits[:, 1:].isfinite().all()


@pytest.mark.parametrize(("symbols", "start"), [("\n ab", "\n"), (" ab", " "), ("ab", "a")])
def test_what_a_text_of_its_own_starts_after(symbols: str, start: str) -> None:
    tokenizer = Tokenizer.build("char", symbols)
    assert tokenizer.decode([start_id(tokenizer)]) == start
    assert start_id(Tokenizer.build("byte")) == ord("\n")


def test_a_text_that_is_too_short_for_its_parts(tmp_path: Path) -> None:
    (tmp_path / "tiny.txt").write_text("abcdefgh")
    with pytest.raises(DataError, match="needs at least 2"):
        make(str(tmp_path / "tiny.txt"), tmp_path)


def test_the_text_of_a_run_must_stay_the_same(file: str, tmp_path: Path) -> None:
    config, task = make(file, tmp_path)
    run = RunDirectory.create(tmp_path / "run", config)
    store_corpus(task.corpus, run)
    assert open_corpus(config.data, tmp_path / "cache", run).facts == task.corpus.facts
    Path(file).write_text(TEXT + "!", encoding="utf-8")
    with pytest.raises(RunError, match="has changed"):
        open_corpus(config.data, tmp_path / "cache", run)


def test_unknown_cells_and_options() -> None:
    for settings, words in (
        ({"cell": "gruu"}, "did you mean 'gru'"),
        ({"cell_options": {"biass": 1}}, "'bias'"),
    ):
        with pytest.raises(OptionError, match=words):
            build_model(build_config({"model": settings}).model, 9)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.7), (0.5, 0.7)])
@pytest.mark.parametrize("window", [7, 1])
def test_penalties_are_in_the_gradient_and_not_in_the_loss(
    alpha: float, beta: float, window: int, file: str, tmp_path: Path
) -> None:
    settings = {
        "optim": {"activation_penalty": alpha, "temporal_penalty": beta},
        "model": {"cell": "stack(gru(4), elman(5))", "dropout_output": 0.3},
    }
    _, task = make(file, tmp_path, settings, window=window)
    model = task.model.double()
    parameters = dict(model.named_parameters())
    torch.manual_seed(3)
    loss, symbols = task.next_loss()
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    _, other = make(file, tmp_path, settings, window=window)
    read = other.streams.next()
    state, outputs = model.initial_state(3), []
    for token in read.inputs:
        h, state = model.cell(parameters["embedding.weight"][token], state)
        outputs.append(h)
    torch.manual_seed(3)
    h = torch.stack(outputs)
    dropped = model.dropout_output(h)  # tests/combinators/test_dropout.py has its formula
    logits = dropped @ parameters["weight_out"].T + parameters["bias_out"]
    chosen = torch.log_softmax(logits, -1).gather(-1, read.targets[..., None])
    change = (h[1:] - h[:-1]).square().mean() if window > 1 else 0.0
    whole = -chosen.mean() + alpha * dropped.square().mean() + beta * change
    expected = torch.autograd.grad(whole, list(parameters.values()))
    assert symbols == 3 * window
    torch.testing.assert_close(loss, -chosen.mean(), rtol=1e-12, atol=0)
    for name, got, right in zip(parameters, gradients, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-13, msg=name)


def test_a_penalty_makes_the_activations_small(file: str, tmp_path: Path) -> None:
    sizes = []
    for alpha in (0.0, 50.0):
        torch.manual_seed(0)
        _, task = make(file, tmp_path, {"optim": {"activation_penalty": alpha}})
        optimizer = torch.optim.Adam(task.model.parameters(), lr=0.01)
        for _ in range(30):
            optimizer.zero_grad()
            task.next_loss()[0].backward()
            optimizer.step()
        h, _ = task.model.activations(task.streams.next().inputs)
        sizes.append(float(h.detach().square().mean()))
    assert sizes[1] < 0.2 * sizes[0]


def test_trying_a_step_changes_nothing(file: str, tmp_path: Path) -> None:
    _, task = make(file, tmp_path, {"model": {"cell": "zoneout(gru)", "dropout_input": 0.5, "dropout_output": 0.5}})
    before, drawn = task.state(), torch.get_rng_state()
    task.try_step()
    assert task.state() == before
    assert torch.get_rng_state().equal(drawn)
