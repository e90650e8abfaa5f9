"""A run that is ended at any moment and continued gives the same bytes as one that is not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs_common import TINY, Command, assert_same, content, write_text

from elman.checkpoint import RunDirectory, load_tensors
from processes import started

EVERYTHING = [*TINY, "--set", "report.save_seconds=0", "--log-every", "3", "--quiet"]
SHORT = [*EVERYTHING, "--steps", "9", "--validate-every", "4"]


class PowerCut(BaseException):
    """Ends the process, as far as elman can see."""


def test_same_seed_same_bytes_and_another_seed_others(command: Command, text: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert command("train", "lm", text, "--out", tmp_path / name, "--seed", seed, *SHORT).code == 0
    assert_same(tmp_path / "a", tmp_path / "b")
    assert content(tmp_path / "a")["model"] != content(tmp_path / "c")["model"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_cut_at_every_replacement_of_a_file(
    moment: str, command: Command, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file of a run appears by os.replace; the run is cut before, or after, the k-th, for every k."""
    whole = tmp_path / "whole"
    replace, count = os.replace, 0

    def counting(*names: object) -> None:
        nonlocal count
        count += 1
        if count == cut and moment == "before":
            raise PowerCut
        replace(*names)  # type: ignore[arg-type]
        if count == cut:
            raise PowerCut

    cut = -1
    assert command("train", "lm", text, "--out", tmp_path / "first", *SHORT).code == 0  # fills the token cache
    monkeypatch.setattr(os, "replace", counting)
    assert command("train", "lm", text, "--out", whole, *SHORT).code == 0
    replacements = count
    assert replacements > 15
    for cut in range(1, replacements + 1):
        count, out = 0, tmp_path / f"cut{cut}"
        with pytest.raises(PowerCut):
            command("train", "lm", text, "--out", out, *SHORT)
        count = replacements
        if RunDirectory(out).config_file.exists():
            assert command("resume", out, "--quiet").code == 0
        else:
            assert command("train", "lm", text, "--out", out, *SHORT).code == 0
        assert_same(whole, out)


def test_cuts_while_resuming_and_while_a_line_is_written(
    command: Command, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "cut"
    assert command("train", "lm", text, "--out", whole, *SHORT).code == 0
    replace, left = os.replace, 0

    def limited(*names: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            with open(RunDirectory(out).metrics_file, "a") as file:
                file.write('{"step": 7, "lo')
            raise PowerCut
        replace(*names)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", limited)
    left = 6
    with pytest.raises(PowerCut):
        command("train", "lm", text, "--out", out, *SHORT)
    cuts = 1
    while cuts < 50:
        left = 6
        try:
            assert command("resume", out, "--quiet").code == 0
            break
        except PowerCut:
            cuts += 1
    assert 3 < cuts < 50
    assert_same(whole, out)


LONG = [*EVERYTHING, "--steps", "150", "--validate-every", "20"]


def kill_once(tmp_path: Path, moment: float, *arguments: object) -> bool:
    """Kill the process of a command after so many seconds; False when it had ended by itself."""
    process = started(None, *arguments, folder=tmp_path / "here", ELMAN_CACHE=str(tmp_path / "cache"))
    process.join(moment)
    if process.is_alive():
        process.kill()
        process.join()
        return True
    assert process.exitcode == 0, (tmp_path / "err.txt").read_text()
    return False


def kill_at_random(kills: int, tmp_path: Path, seed: int) -> None:
    text, whole = write_text(tmp_path / "text.txt"), tmp_path / "whole"
    (tmp_path / "here").mkdir()
    assert not kill_once(tmp_path, 300.0, "train", "lm", text, "--out", whole, *LONG)
    draw = random.Random(seed)
    done, number, duration = 0, 0, 3.0
    while done < kills:
        out = tmp_path / f"run{number}"
        number += 1
        train = ["train", "lm", text, "--out", out, *LONG]
        going = True
        while going:
            begun = RunDirectory(out).config_file.exists()
            moment = draw.uniform(0.3, 1.0) * duration if done < kills else 300.0
            begin = time.monotonic()
            going = kill_once(tmp_path, moment, *(["resume", out, "--quiet"] if begun else train))
            if not going:  # the machine is quicker than that
                duration = min(duration, time.monotonic() - begin)
            done += going
        assert_same(whole, out)


def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    kill_at_random(3, tmp_path, seed=1)


@pytest.mark.slow
def test_sigkill_at_twenty_random_moments(tmp_path: Path) -> None:
    kill_at_random(20, tmp_path, seed=2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(number: signal.Signals, tmp_path: Path) -> None:
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "run"
    endless = [*TINY, "--steps", "1000000", "--validate-every", "5", "--log-every", "1"]
    command = [sys.executable, "-m", "elman", "train", "lm", str(text), "--out", str(out), *endless]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line.decode())
        if "validation" in lines[-1]:
            process.send_signal(number)
            break
    out_text, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out_text == b""
    assert f"elman resume {out}" in err.decode()
    assert "Traceback" not in err.decode()
    _, facts = load_tensors(RunDirectory(out).last_file)
    assert facts["progress"]["step"] >= 5
    assert facts["progress"]["finished"] is None
    assert RunDirectory(out).picture_file.exists()


def test_a_finished_run_says_so_and_more_steps_extend_it(command: Command, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert command("train", "lm", text, "--out", out, *SHORT).code == 0
    before = content(out)
    code, shown, err = command("resume", out)
    assert code == 0
    assert "is finished" in err
    assert "--steps" in err
    assert "bits per character" in shown
    assert content(out) == before
    assert command("resume", out, "--steps", "5").code == 1
    assert command("resume", out, "--steps", "14", "--quiet").code == 0
    _, facts = load_tensors(RunDirectory(out).last_file)
    assert facts["progress"]["step"] == 14
    assert RunDirectory(out).config().budget.steps == 14


def test_settings_of_model_and_data_are_fixed(command: Command, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert command("train", "lm", text, "--out", out, *SHORT).code == 0
    code, _, err = command("resume", out, "--set", "model.hidden=16")
    assert code == 2
    assert "fixed once a run has started" in err


def test_a_changed_text_is_not_continued_with(command: Command, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert command("train", "lm", text, "--out", out, *SHORT).code == 0
    text.write_text(text.read_text() + " more")
    code, _, err = command("resume", out, "--steps", "20")
    assert code == 1
    assert "has changed" in err
    assert str(text) in err


def test_two_processes_do_not_train_one_run(command: Command, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert command("train", "lm", text, "--out", out, *SHORT).code == 0
    with RunDirectory(out).lock():
        code, _, err = command("resume", out, "--steps", "20")
    assert code == 1
    assert "another process" in err


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_early_stopping_and_precision(precision: str, command: Command, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    # A learning rate of nearly nothing gains nothing after a while: the weights no longer change in float32.
    options = ["--lr", "1e-30", "--patience", "2", "--steps", "400", "--validate-every", "1", "--quiet"]
    assert command("train", "lm", text, "--out", out, "--precision", precision, *TINY, *options).code == 0
    _, facts = load_tensors(RunDirectory(out).last_file)
    assert facts["progress"]["finished"] == "patience"
    assert facts["progress"]["step"] == 3
    assert all(t.dtype == torch.float32 for name, t in load_tensors(RunDirectory(out).model_file)[0].items())
