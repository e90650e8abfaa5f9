"""Every command that is printed works when it is pasted: a run with its own cell, in a directory with a space."""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch
from runs_common import OWN_CELL, TINY, Command, Outcome, write_text

from elman.checkpoint import RunDirectory, load_tensors
from elman.tasks.language_model import LanguageModelling, TrainedLanguageModel

QUICK = ["--quiet", "--set", "report.sample=0", "--set", "report.save_seconds=0"]
COMMAND = re.compile(r"elman (?:train|resume|evaluate|generate|score) .*$", re.MULTILINE)


@pytest.fixture
def train(command: Command, tmp_path: Path) -> list[object]:
    """The words that train the run ``out``."""
    home = tmp_path / "two words"
    home.mkdir()
    (home / "own cell.py").write_text(OWN_CELL)
    text = write_text(home / "the text.txt")
    words = ["train", "lm", text, "--out", home / "a run's ü", "--cell", f"{home / 'own cell.py'}:Mine"]
    return [*words, *TINY, *QUICK, "--steps", "6", "--validate-every", "3"]


@pytest.fixture
def out(train: list[object]) -> Path:
    return Path(str(train[4]))


def paste(command: Command, shown: str) -> Outcome:
    """What the one command in ``shown`` does when it is pasted into a shell."""
    (line,) = COMMAND.findall(shown)
    outcome = command(*shlex.split(line)[1:])
    assert outcome.code == 0, (line, outcome.err)
    return outcome


def test_after_training_and_after_its_end(command: Command, train: list[object], out: Path) -> None:
    trained = command(*train)
    assert len(paste(command, trained.out).out) > 400
    finished = command("resume", out, "--trust")
    paste(command, finished.out)
    paste(command, finished.err)
    assert load_tensors(RunDirectory(out).last_file)[1]["progress"]["step"] == 12


def test_a_run_that_was_moved_is_called_by_its_new_name(command: Command, train: list[object], out: Path) -> None:
    assert command(*train).code == 0
    moved = shutil.move(out, out.with_name("moved here"))
    assert "moved here" in paste(command, command("resume", moved, "--trust").err).out


def test_a_directory_that_is_taken(command: Command, train: list[object]) -> None:
    assert command(*train).code == 0
    paste(command, command(*train).err)


def test_a_budget_that_is_spent(command: Command, train: list[object], out: Path) -> None:
    assert command(*train).code == 0
    spent = command("resume", out, "--steps", "6", "--trust")
    assert spent.code == 1
    paste(command, spent.err)


@pytest.mark.parametrize("moment", ["training", "evaluation"])
def test_ctrl_c(moment: str, command: Command, train: list[object], out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, name = {"training": (LanguageModelling, "next_loss"), "evaluation": (TrainedLanguageModel, "evaluate")}[
        moment
    ]
    ordinary = getattr(kind, name)

    def stopped(*given: object) -> object:
        signal.raise_signal(signal.SIGINT)
        return ordinary(*given)

    with monkeypatch.context() as patched:
        patched.setattr(kind, name, stopped)
        first = command(*train)
    assert first.code == 130
    assert "stopped and saved" in first.err
    assert not RunDirectory(out).result_file.exists()
    assert "held-out text" in paste(command, first.err).out
    assert RunDirectory(out).result_file.exists()


@pytest.mark.parametrize("rate", [1e30, 0.004])
def test_a_loss_that_is_not_finite(
    rate: float, command: Command, train: list[object], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordinary = LanguageModelling.next_loss

    def spoiled(self: LanguageModelling) -> tuple[torch.Tensor, int]:
        loss, symbols = ordinary(self)
        return loss * float("nan"), symbols

    with monkeypatch.context() as patched:
        patched.setattr(LanguageModelling, "next_loss", spoiled)
        failed = command(*train, "--lr", rate, "--set", "optim.max_skipped=2")
    assert failed.code == 1
    assert "0.0001 to 0.01 is usual" in failed.err
    paste(command, failed.err)
    assert RunDirectory(out).config().optim.lr == min(rate / 10, 1e-3)


@pytest.mark.parametrize("options", [[], ["--steps", "9", "--set", "optim.betas=[0.8, 0.9]"]], ids=["as it was", "on"])
def test_a_damaged_checkpoint(options: list[str], command: Command, train: list[object], out: Path) -> None:
    assert command(*train).code == 0
    RunDirectory(out).result_file.unlink()
    last = RunDirectory(out).last_file
    last.write_bytes(last.read_bytes()[:-100])
    damaged = command("resume", out, *options, "--trust")
    assert damaged.code == 1
    paste(command, damaged.err)
    config = RunDirectory(out).config()
    assert (config.budget.steps, config.optim.betas) == ((9, (0.8, 0.9)) if options else (6, (0.9, 0.99)))
    assert RunDirectory(out).result_file.exists()


def test_a_full_disk(command: Command, train: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, left = os.fsync, 14

    def full(handle: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        failed = command(*train)
    assert "No space left on device" in failed.err
    paste(command, failed.err)


@pytest.mark.parametrize(
    ("path", "shown"),
    [("runs/book", "elman resume runs/book"), ("-x", "elman resume ./-x"), ("a $b", "elman resume 'a $b'")],
)
def test_the_name_of_a_run_is_quoted(path: str, shown: str) -> None:
    assert RunDirectory(path).command("resume") == shown


def test_a_run_that_cannot_be_read_is_still_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert RunDirectory(tmp_path).command("resume", "--steps", 3) == f"elman resume {tmp_path} --steps 3"
