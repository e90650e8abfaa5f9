"""Whatever is wrong: one paragraph on stderr, exit code 1 or 2, no traceback, earlier checkpoints intact."""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs_common import TINY, Command

from elman.checkpoint import RunDirectory, load_tensors
from elman.tasks.language_model import LanguageModelling

QUICK = [*TINY, "--steps", "4", "--quiet", "--set", "report.sample=0"]


def refused(outcome: tuple[int, str, str], code: int, *words: str) -> None:
    """One paragraph on stderr that holds these words; nothing on stdout."""
    given, out, err = outcome
    assert given == code, err
    assert out == ""
    assert err.startswith("elman: ")
    assert err.count("\n") == 1, "one paragraph"
    assert "Traceback" not in err
    for word in words:
        assert word in err


BAD_TEXTS = {
    "empty": (b"", ["is empty"]),
    "binary": (b"abc\x00\x01\x02def" * 50, ["binary", "offset 3"]),
    "latin1": (b"caf\xe9 noir " * 50, ["not UTF-8", "0xe9", "offset 3", "iconv -f LATIN1", "--tokens byte"]),
    "short": (b"too short", ["9 tokens", "hold out more", "--set data.valid_fraction=", "--valid"]),
    "one character": (b"a", ["1 token,", "hold out less", "Give more text"]),
}


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_bad_texts(kind: str, command: Command, tmp_path: Path) -> None:
    data, words = BAD_TEXTS[kind]
    (tmp_path / "bad.txt").write_bytes(data)
    run = tmp_path / "run"
    refused(command("train", "lm", tmp_path / "bad.txt", "--out", run, *QUICK), 1, *words)
    assert not run.exists(), "nothing is left behind"


def test_missing_text(command: Command, tmp_path: Path) -> None:
    refused(command("train", "lm", tmp_path / "no.txt", "--out", tmp_path / "run"), 1, "no.txt", "does not exist")


BAD_OPTIONS = {
    "cell": (["--cell", "lstmm"], ["lstmm", "did you mean 'lstm'"]),
    "cell option": (["--set", "model.cell_options.biass=true"], ["biass", "did you mean 'bias'"]),
    "setting": (["--set", "model.hiden=4"], ["model.hiden", "did you mean 'model.hidden'"]),
    "value": (["--hidden", "0"], ["model.hidden", "greater than or equal to 1"]),
    "choice": (["--tokens", "chars"], ["chars", "did you mean 'char'"]),
    "optimiser": (["--optimizer", "adamm"], ["adamm", "did you mean 'adam'"]),
    "form": (["--set", "hidden"], ["section.name=value"]),
    "two budgets": (["--epochs", "2"], ["steps and epochs", "exactly one"]),
    "device": (["--device", "cpux"], ["cpux", "did you mean 'cpu'"]),
    "no such device": (["--device", "cuda:77"], ["cuda:77", "not available"]),
}


@pytest.mark.parametrize("kind", BAD_OPTIONS)
def test_bad_options(kind: str, command: Command, text: Path, tmp_path: Path) -> None:
    options, words = BAD_OPTIONS[kind]
    refused(command("train", "lm", text, "--out", tmp_path / "run", *QUICK, *options), 2, *words)
    assert not (tmp_path / "run").exists()


def test_texts_to_evaluate(command: Command, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert command("train", "lm", text, "--out", run, *QUICK).code == 0
    for name, (data, words) in BAD_TEXTS.items():
        if name not in ("short", "one character"):
            (tmp_path / "it's bad.txt").write_bytes(data)
            refused(command("evaluate", run, tmp_path / "it's bad.txt"), 1, "it's bad.txt", *words)
    (tmp_path / "one.txt").write_text("a")
    refused(command("score", run, tmp_path / "one.txt"), 1, "1 symbol,", "at least 2")
    refused(command("evaluate", run, tmp_path), 1, "is a directory")
    refused(command("evaluate", run, text, "--device", "cpux"), 2, "cpux", "did you mean 'cpu'")


def test_the_conversion_that_is_suggested_works(command: Command, tmp_path: Path) -> None:
    bad = tmp_path / "it's bad.txt"
    bad.write_bytes(b"caf\xe9 noir " * 50)
    _, _, err = command("train", "lm", bad, "--out", tmp_path / "run", *QUICK)
    conversion = err.partition("(iconv")[2].partition("), or")[0]
    subprocess.run(f"iconv{conversion}", shell=True, check=True, cwd=tmp_path)
    assert (tmp_path / "new.txt").read_text(encoding="utf-8") == "café noir " * 50


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["train", "lm", "--hiden", "3"],
            ["--hiden. Did you mean --hidden?", "Usage: elman train lm", "train lm --help"],
        ),
        (["train", "lm", "--batch-size", "3"], ["Did you mean --batch?"]),
        (["train", "lm", "--no-tye"], ["Did you mean --no-tie?"]),
        (["evaluate", "run", "--xyzzy"], ["no such option: --xyzzy. Usage: elman evaluate"]),
        (["generate", "run", "--length", "many"], ["'--length'", "Usage: elman generate"]),
        (["evaluate"], ["missing argument", "Usage: elman evaluate"]),
        (["evalute", "run"], ["evalute", "evaluate, "]),
        (["train", "ml"], ["'ml'", "(commands: lm)"]),
        (["train", "lm", "--lr"], ["'--lr' requires an argument"]),
        (["explain", "--level", "plam"], ["did you mean 'plan'"]),
    ],
)
def test_words_that_are_not_understood(arguments: list[str], words: list[str], command: Command) -> None:
    refused(command(*arguments), 2, *words)


@pytest.mark.parametrize("arguments", [[], ["train"]], ids=["elman", "elman train"])
def test_no_words_at_all_are_answered_with_help(arguments: list[str], command: Command) -> None:
    code, out, err = command(*arguments)
    assert code in (0, 2), "as the version of typer has it"
    assert "Commands:" in out + err
    assert "elman: " not in err


def test_a_name_that_no_checkpoint_can_have(command: Command, text: Path, tmp_path: Path) -> None:
    run = tmp_path / os.fsdecode(b"bad\xff")
    refused(command("train", "lm", text, "--out", run, *QUICK), 1, "UTF-8", "--out")
    assert not run.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse such a name")
def test_a_text_whose_name_is_not_utf8(command: Command, text: Path, tmp_path: Path) -> None:
    name = text.rename(tmp_path / os.fsdecode(b"bad\xff.txt"))
    assert command("train", "lm", name, "--out", tmp_path / "run", *QUICK).code == 0
    assert command("resume", tmp_path / "run", "--steps", "6", "--quiet").code == 0


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is of Linux")
@pytest.mark.parametrize(
    ("words", "streams", "code", "said"),
    [
        ("generate run", "| true", 1, b""),
        ("evaluate run", "| true", 1, b""),
        ("evaluate run", "> /dev/full", 1, b"elman: No space left on device.\n"),
        ("evaluate run", ">&-", 0, b""),
        ("resume run --steps 6", "> /dev/null 2>&-", 0, b""),
    ],
)
def test_streams_that_take_nothing(
    words: str, streams: str, code: int, said: bytes, command: Command, text: Path, tmp_path: Path
) -> None:
    assert command("train", "lm", text, "--out", tmp_path / "run", *QUICK).code == 0
    process = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {shlex.quote(sys.executable)} -m elman {words} {streams}"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        check=False,
    )
    assert (process.returncode, process.stderr) == (code, said)


def test_a_terminal_that_cannot_show_every_symbol(command: Command, tmp_path: Path) -> None:
    run, text = tmp_path / "run", tmp_path / "text.txt"
    text.write_text("süß und süß " * 60, encoding="utf-8")
    assert command("train", "lm", text, "--out", run, *QUICK).code == 0
    process = subprocess.run(
        [sys.executable, "-m", "elman", "generate", str(run), "--prompt", "süß", "--length", "9"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        check=True,
    )
    assert process.stdout.startswith(rb"s\xfc\xdf")


def test_an_existing_run_is_not_written_over(command: Command, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train = ["train", "lm", text, "--out", run, *QUICK]
    assert command(*train).code == 0
    before = RunDirectory(run).model_file.read_bytes()
    refused(command(*train, "--seed", "5"), 1, "already holds a run", "elman resume", "--out", "--overwrite")
    assert RunDirectory(run).model_file.read_bytes() == before
    assert command(*train, "--seed", "5", "--overwrite").code == 0
    assert RunDirectory(run).model_file.read_bytes() != before


def test_a_directory_of_other_things_is_never_replaced(command: Command, text: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    outcome = command("train", "lm", text, "--out", tmp_path / "home", "--overwrite", *QUICK)
    refused(outcome, 1, "not a run directory")
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-50] ^= 0xFF
    path.write_bytes(data)


def break_json(path: Path) -> None:
    path.write_text(path.read_text()[:-20])


DAMAGE = {
    "truncated checkpoint": ("checkpoints/last.safetensors", cut_off, "resume", ["damaged", "--from best"]),
    "changed checkpoint": ("checkpoints/last.safetensors", flip, "resume", ["checksum", "--from best"]),
    "missing checkpoint": ("checkpoints/best.safetensors", Path.unlink, "best", ["does not exist"]),
    "truncated model": ("model.safetensors", cut_off, "evaluate", ["damaged"]),
    "changed model": ("model.safetensors", flip, "generate", ["checksum"]),
    "broken config": ("config.json", break_json, "generate", ["config.json", "not valid JSON"]),
    "broken tokenizer": ("tokenizer.json", break_json, "evaluate", ["tokenizer.json", "not valid JSON"]),
    "no run": ("config.json", Path.unlink, "resume", ["not a run directory"]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_runs(kind: str, command: Command, text: Path, tmp_path: Path) -> None:
    file, damage, verb, words = DAMAGE[kind]
    run = tmp_path / "run"
    assert command("train", "lm", text, "--out", run, *QUICK).code == 0
    damage(run / file)
    arguments = {
        "resume": ["resume", run, "--steps", "9"],
        "best": ["resume", run, "--steps", "9", "--from", "best"],
        "evaluate": ["evaluate", run, text],
        "generate": ["generate", run, "--length", "3"],
    }[verb]
    refused(command(*arguments), 1, *words)


def test_the_way_out_of_a_damaged_checkpoint(command: Command, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert command("train", "lm", text, "--out", run, *QUICK).code == 0
    cut_off(RunDirectory(run).last_file)
    assert command("resume", run, "--from", "best", "--steps", "7", "--quiet").code == 0
    assert load_tensors(RunDirectory(run).last_file)[1]["progress"]["step"] == 7


def test_a_newer_format_is_refused(command: Command, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert command("train", "lm", text, "--out", run, *QUICK).code == 0
    content = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(content | {"format": 99}))
    refused(command("generate", run), 1, "format 99")


def test_a_full_disk_leaves_the_earlier_checkpoint(
    command: Command,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    fsync, left = os.fsync, 12

    def full(handle: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    always = ["--set", "report.save_seconds=0"]
    monkeypatch.setattr(os, "fsync", full)
    outcome = command("train", "lm", text, "--out", run, *QUICK, *always)
    refused(outcome, 1, "No space left on device", "intact", "elman resume")
    monkeypatch.undo()
    monkeypatch.setenv("ELMAN_CACHE", str(tmp_path / "cache"))
    assert load_tensors(RunDirectory(run).last_file)[1]["progress"]["finished"] is None
    assert not list(run.rglob("*.tmp"))
    assert command("resume", run, "--quiet").code == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 300 kB, where this user may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs the rights to do so")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(command: Command, text: Path, small_disk: Path) -> None:
    run = small_disk / "run"
    options = [*QUICK, "--hidden", "32", "--set", "report.save_seconds=0", "--steps", "30"]
    refused(command("train", "lm", text, "--out", run, *options), 1, "No space left on device")
    load_tensors(RunDirectory(run).last_file)


def test_a_loss_that_is_no_number(
    command: Command,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    ordinary = LanguageModelling.next_loss
    calls = 0

    def spoiled(self: LanguageModelling) -> tuple[torch.Tensor, int]:
        nonlocal calls
        calls += 1
        loss, symbols = ordinary(self)
        return (loss * float("nan"), symbols) if calls > 6 else (loss, symbols)

    monkeypatch.setattr(LanguageModelling, "next_loss", spoiled)
    options = ["--set", "optim.max_skipped=5", "--steps", "100", "--validate-every", "3"]
    outcome = command("train", "lm", text, "--out", run, *QUICK, *options)
    refused(outcome, 1, "not finite", "5 steps in a row", "optim.lr", "--from best")
    tensors, facts = load_tensors(RunDirectory(run).last_file)
    assert facts["progress"]["step"] == 9
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())
    monkeypatch.undo()
    monkeypatch.setenv("ELMAN_CACHE", str(tmp_path / "cache"))
    assert command("resume", run, "--steps", "12", "--set", "optim.lr=1e-4", "--quiet").code == 0


def test_a_few_gradients_that_are_not_finite_are_skipped(
    command: Command,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ordinary, calls = LanguageModelling.next_loss, 0

    def spoiled(self: LanguageModelling) -> tuple[torch.Tensor, int]:
        nonlocal calls
        calls += 1
        loss, symbols = ordinary(self)
        # Finite itself, with an infinite gradient: the square root at 0.
        return (loss + (loss - loss.detach()).abs().sqrt(), symbols) if calls in (2, 3) else (loss, symbols)

    monkeypatch.setattr(LanguageModelling, "next_loss", spoiled)
    code, out, _ = command("train", "lm", text, "--out", tmp_path / "run", *QUICK, "--steps", "10", "--json")
    assert code == 0
    assert json.loads(out)["skipped"] == 2


def test_a_bug_in_elman_is_shown_with_debug(command: Command, text: Path, tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "elman", "generate", str(tmp_path), "--debug"],
        capture_output=True,
        check=False,
    )
    assert process.returncode == 1
    assert b"Traceback" in process.stderr
    assert b"RunError" in process.stderr
