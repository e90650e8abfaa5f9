"""A whole run, from settings to the figures on held-out text: start one, continue one, load one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .checkpoint import RunDirectory, read_json, write_json
from .config import Config, Machine, override
from .errors import RunError
from .machine import cache_directory, prepare, resolve
from .metrics import bits, n_gram, unigram
from .networks import LanguageModel
from .progress import Reporter
from .spec import Spec
from .tasks.language_model import (
    Corpus,
    LanguageModelling,
    TrainedLanguageModel,
    build_model,
    open_corpus,
    store_corpus,
)
from .train import Outcome, Trainer

__all__ = ["load", "resume", "start"]

CHANGEABLE = ("budget", "optim", "report")
"""Sections whose settings may change when a run is continued."""

COUNTABLE = 5_000_000
"""Most training symbols for which the baselines are counted: they take about 200 bytes each."""


def load(run_directory: str | Path, *, trust: bool = False, device: str = "cpu") -> TrainedLanguageModel:
    """A trained model, ready to use, from its run directory.

    ``run_directory``: what ``elman train`` made. ``trust=True`` runs the code of the run's own cell, which a run
    with a cell from a user's file needs and no other does; read RUN/cells first. ``device``: where the weights
    go and the model computes, as torch names it ("cpu", "cuda", "cuda:1", "mps"), or "auto".

    Raises RunError when the directory holds no run, a damaged one, or one that needs ``trust``; OptionError for
    a device that this machine does not have.
    """
    run = RunDirectory.open(run_directory)
    known = str(resolve(Config(machine=Machine(device=device))).machine.device)
    return TrainedLanguageModel.load(run, trust=trust, device=known)


def start(config: Config, out: Path, reporter: Reporter, *, overwrite: bool = False) -> dict[str, Any]:
    """Train from the beginning into the new run directory ``out``; the result, as in its result.json.

    Whatever is wrong with settings or data is found before the directory is made. Raises ElmanError of the
    kind that fits: OptionError, DataError, RunError, TrainingError.
    """
    RunDirectory.check_free(out, overwrite=overwrite)
    config = _absolute(resolve(config))
    corpus = open_corpus(config.data, cache_directory())
    task = _task(config, corpus)
    task.try_step()
    run = RunDirectory.create(out, config, overwrite=overwrite)
    with run.lock():
        store_corpus(corpus, run)
        return _fit(Trainer(task, run, config, reporter), task.model, corpus)


def resume(
    path: Path,
    changes: Sequence[Mapping[str, Any]],
    reporter: Reporter,
    *,
    which: str | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Continue a run from its checkpoint 'last' (or ``which``), with some settings changed.

    A run that spent its budget is only continued when ``changes`` give it a larger one; otherwise its
    result is returned, with ``"already": True``. Raises RunError when it cannot be continued.
    """
    run = RunDirectory.open(path)
    cell = run.trusted_cell(trust)
    with run.lock():
        config = override(run.config(), *changes, sections=CHANGEABLE)
        corpus = open_corpus(config.data, cache_directory(), run)
        task = _task(config, corpus, cell)
        trainer = Trainer(task, run, config, reporter)
        if run.last_file.exists() or which is not None:
            trainer.restore(which or "last", _as_options(changes))
        store_corpus(corpus, run)
        progress = trainer.progress
        if progress.finished is not None and not changes:
            if run.result_file.exists():
                return read_json(run.result_file) | {"run": str(run.path), "already": True}
            trainer.draw()
            return _finish(trainer, task.model, corpus, trainer.outcome()) | {"already": True}
        asked = progress.finished is not None or any("budget" in change for change in changes)
        if asked and trainer.fraction() >= 1.0:
            raise RunError(
                f"{run.path} stands at step {progress.step:,} after {progress.seconds / 60:.1f} minutes, so "
                f"its budget is spent. Give a larger one, for example: "
                f"{run.command('resume', '--steps', 2 * progress.step)}"
            )
        if changes:
            run.write_config(config, run.cell_files())
            progress.stale = 0
        return _fit(trainer, task.model, corpus)


def _as_options(changes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Changed settings as they stand on a command line."""
    pairs = [
        (f"{section}.{name}", value)
        for change in changes
        for section, settings in change.items()
        for name, value in settings.items()
    ]
    return [word for name, value in pairs for word in ("--set", f"{name}={json.dumps(value)}")]


def _task(config: Config, corpus: Corpus, cell: Spec | None = None) -> LanguageModelling:
    device = prepare(config.machine)
    return LanguageModelling(config, corpus, build_model(config.model, corpus.tokenizer.vocab_size, cell), device)


def _fit(trainer: Trainer, model: LanguageModel, corpus: Corpus) -> dict[str, Any]:
    run, reporter, data = trainer.run, trainer.reporter, corpus.facts["train"]
    parameters = sum(p.numel() for p in model.parameters())
    reporter.note(
        f"{run.path}: {parameters:,} parameters; {len(corpus.train):,} symbols to train on, "
        f"{corpus.tokenizer.vocab_size} different; text {data['sha256'][:12]}"
    )
    try:
        outcome = trainer.fit()
    finally:
        reporter.close()
    if outcome.reason == "interrupted":
        return _summary(trainer, outcome)
    return _finish(trainer, model, corpus, outcome)


def _finish(trainer: Trainer, model: LanguageModel, corpus: Corpus, outcome: Outcome) -> dict[str, Any]:
    """Evaluate the best weights on the test text, and write result.json.

    Ctrl-C leaves a trained run without result.json, which ``resume`` then finishes.
    """
    result = _summary(trainer, outcome)
    try:
        trained = TrainedLanguageModel.of(trainer.run, model)
        result["test"] = trained.evaluate(corpus.test).to_json()
        if len(corpus.train) <= COUNTABLE:
            result["baselines"] = _baselines(corpus)
    except KeyboardInterrupt:
        return result | {"ended": "interrupted"}
    write_json(trainer.run.result_file, result)
    return result


def _baselines(corpus: Corpus) -> dict[str, float]:
    """Bits per character on the test text of two models that are counted on the training text."""
    size, test = corpus.tokenizer.vocab_size, corpus.test
    characters, _ = corpus.tokenizer.counts(test[1:])
    per_character = (len(test) - 1) / max(1, characters)
    return {
        "unigram": bits(unigram(corpus.train, test, size)) * per_character,
        "order-5 back-off": bits(n_gram(corpus.train, test, size, 5)) * per_character,
    }


def _summary(trainer: Trainer, outcome: Outcome) -> dict[str, Any]:
    best = outcome.best_loss
    return {
        "run": str(trainer.run.path),
        "ended": outcome.reason,
        "steps": outcome.step,
        "best_step": outcome.best_step,
        "valid_nats_per_token": best,
        "valid_bits_per_character": None if best is None else trainer.task.bits(best, "valid"),
        "skipped": outcome.skipped,
        "seconds": round(outcome.seconds, 3),
    }


def _absolute(config: Config) -> Config:
    """File names that stay true wherever the run is continued from."""

    def full(name: str | None) -> str | None:
        return None if name is None else str(Path(name).absolute())

    files = tuple(str(Path(file).absolute()) for file in config.data.files)
    changes = {"files": files, "valid": full(config.data.valid), "test": full(config.data.test)}
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})
