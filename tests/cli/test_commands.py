"""The commands as a user gives them: results on stdout, progress on stderr, JSON that is JSON."""

from __future__ import annotations

import inspect
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs_common import OWN_CELL, TINY, Command, Outcome, write_text

import elman
from elman.checkpoint import FORMAT, RunDirectory
from elman.runs import load


@pytest.fixture
def run(command: Command, text: Path, tmp_path: Path) -> Path:
    trained = command("train", "lm", text, "--out", tmp_path / "run", *TINY, "--steps", "30", "--quiet")
    assert trained.code == 0, trained.err
    return tmp_path / "run"


def succeeded(outcome: Outcome) -> str:
    assert outcome.code == 0, outcome.err
    return outcome.out


@pytest.mark.parametrize(
    "options",
    [
        ["--cell", "gru", "--layers", "2"],
        ["--cell", "elman", "--tokens", "byte", "--tie"],
        ["--cell", "lstm", "--tie", "--embedding", "5", "--precision", "bf16"],
        ["--cell", "lstm", "--precision", "medium"],
        ["--cell", "gru", "--precision", "high", "--backend", "interpret"],
        ["--cell", "elman", "--backend", "llvm"],
        ["--optimizer", "sgd", "--lr", "0.1", "--epochs", "0.2"],
        ["--optimizer", "adam", "--minutes", "0.01", "--clip", "0.1"],
    ],
    ids=" ".join,
)
def test_train_then_use(options: list[str], command: Command, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    budget = [] if {"--epochs", "--minutes"} & set(options) else ["--steps", "12"]
    result = json.loads(succeeded(command("train", "lm", text, "--out", out, *TINY, *budget, *options, "--json")))
    assert result["ended"] == "budget"
    assert 0 < result["test"]["bits_per_character"] < 20
    assert set(result["baselines"]) == {"unigram", "order-5 back-off"}
    evaluated = json.loads(succeeded(command("evaluate", out, "--json")))
    assert evaluated["nats"] == pytest.approx(result["test"]["nats"], rel=1e-12)
    assert len(succeeded(command("generate", out, "--length", "9", "--seed", "1"))) >= 9


@pytest.mark.parametrize("backend", ["reference", "interpret", "llvm"])
def test_backends_train_to_the_same_model(backend: str, command: Command, text: Path, tmp_path: Path) -> None:
    """And what was trained with one goes on with its own, as its settings say."""
    found = {}
    for name in ("auto", backend):
        options = ["--steps", "20", "--backend", name, "--quiet", "--json"]
        found[name] = json.loads(succeeded(command("train", "lm", text, "--out", tmp_path / name, *TINY, *options)))
    assert RunDirectory(tmp_path / backend).config().machine.backend == backend
    assert found[backend]["test"]["nats"] == pytest.approx(found["auto"]["test"]["nats"], rel=1e-4)


def test_a_backend_that_there_is_not(command: Command, text: Path, tmp_path: Path) -> None:
    code, _, err = command("train", "lm", text, "--out", tmp_path / "run", *TINY, "--backend", "fast")
    assert code == 2
    assert "machine.backend" in err
    assert "interpret" in err
    assert not (tmp_path / "run").exists()


def test_training_learns_and_reports(command: Command, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--steps", "200", "--lr", "0.02", "--warmup", "10", "--hidden", "24", "--log-every", "20"]
    code, shown, err = command("train", "lm", text, "--out", out, *TINY, *options)
    assert code == 0
    assert "bits per character" in shown
    assert "loss.png" in shown
    assert "validation" in err
    assert "sample:" in err
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    logs = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logs] == list(range(20, 201, 20))
    assert logs[-1]["loss"] < 0.7 * logs[0]["loss"]
    assert {"gradient_norm", "learning_rate", "tokens_per_second", "bits_per_character"} <= logs[0].keys()
    assert sum("valid_loss" in line for line in lines) == 20
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "config.json").read_text())["format"] == FORMAT


def test_a_model_that_learned_nothing_is_noted(command: Command, text: Path, tmp_path: Path) -> None:
    options = ["--steps", "60", "--warmup", "0", "--hidden", "24", "--log-every", "20", "--quiet"]
    for rate, noted in (("100", True), ("0.02", False)):
        code, _, err = command("train", "lm", text, "--out", tmp_path / rate, *TINY, *options, "--lr", rate)
        assert code == 0
        assert ("no better than how often each symbol occurs" in err) == noted


def test_evaluate_counts_and_agrees_with_score(command: Command, run: Path, tmp_path: Path) -> None:
    held_out = write_text(tmp_path / "held_out.txt", 60)
    size = len(held_out.read_text())
    figures = json.loads(succeeded(command("evaluate", run, held_out, "--json")))
    assert figures["tokens"] == figures["characters"] == figures["bytes"] == size - 1
    assert figures["bits_per_character"] == pytest.approx(figures["nats"] / math.log(2) / (size - 1))
    scored = json.loads(succeeded(command("score", run, held_out, "--json")))
    assert scored["tokens"] == size - 1
    assert scored["nats"] == pytest.approx(sum(line["nats"] for line in scored["lines"]))
    assert "".join(line["text"] + "\n" for line in scored["lines"]).rstrip() == held_out.read_text().rstrip()
    model = load(run)
    ids = model.tokenizer.encode(held_out.read_text())
    # One stream with carried state is the definition; parallel streams start without context.
    assert model.score(ids).sum() == pytest.approx(scored["nats"], rel=1e-6)
    assert figures["nats"] == pytest.approx(scored["nats"], rel=0.05)
    assert "bits per byte" in succeeded(command("evaluate", run, held_out))
    assert "in all" in succeeded(command("score", run, held_out))


def test_evaluate_mentions_unknown_symbols(command: Command, run: Path, tmp_path: Path) -> None:
    (tmp_path / "greek.txt").write_text("the sea λ and μ", encoding="utf-8")
    code, _, err = command("evaluate", run, tmp_path / "greek.txt")
    assert code == 0
    assert "2 symbols that the training text has not" in err
    assert json.loads(command("evaluate", run, tmp_path / "greek.txt", "--json").out)["unknown"] == 2


def test_generate_is_repeatable_and_streams_carried_state(command: Command, run: Path) -> None:
    draw = [
        "generate",
        run,
        "--prompt",
        "the sea",
        "--length",
        40,
        "--seed",
        7,
        "--temperature",
        0.8,
        "--top-p",
        0.9,
    ]
    one = succeeded(command(*draw))
    assert one.startswith("the sea")
    assert len(one) == len("the sea") + 40 + 1
    assert succeeded(command(*draw)) == one
    assert succeeded(command(*draw[:-6], "--seed", 8)) != one
    three = json.loads(succeeded(command(*draw, "-n", 3, "--json")))
    assert three["seed"] == 7
    assert len(three["samples"]) == len(set(three["samples"])) == 3
    assert "the sea" + three["samples"][0] + "\n" == one
    shown = succeeded(command(*draw, "-n", 3))
    assert [f"[{i}/3] the sea{text}\n" in shown for i, text in enumerate(three["samples"], 1)] == [True] * 3


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--temperature", "-1"], 2, "temperature"),
        (["--top-p", "1.5"], 2, "top_p"),
        (["--top-k", "0"], 2, "top_k"),
        (["--length", "-3"], 2, "length"),
        (["-n", "0"], 2, "n must"),
    ],
)
def test_generate_refuses(options: list[str], code: int, words: str, command: Command, run: Path) -> None:
    given, _, err = command("generate", run, *options)
    assert given == code
    assert words in err


def test_generate_with_unknown_symbols_in_the_prompt(command: Command, run: Path) -> None:
    code, out, err = command("generate", run, "--prompt", "λ the", "--length", "20", "--seed", "1")
    assert code == 0
    assert "the prompt has 1 symbol that" in err
    assert "�" not in out, "the unknown symbol is never drawn"


def test_the_loaded_model_steps_as_it_scans(run: Path) -> None:
    model = load(run)
    ids = torch.from_numpy(model.tokenizer.encode("the old sea and rope").astype(np.int64))[:, None]
    with torch.no_grad():
        whole, _ = model.model(ids)
        state, steps = model.model.initial_state(1), []
        for token in ids:
            logits, state = model.model.step(token, state)
            steps.append(logits)
    torch.testing.assert_close(torch.stack(steps), whole)
    assert model.generate("the", 12, seed=3, n=2) == model.generate("the", 12, seed=3, n=2)


def test_a_users_own_cell_needs_trust(command: Command, text: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_CELL)
    out = tmp_path / "run"
    options = [
        "--cell",
        f"{tmp_path / 'own.py'}:Mine",
        "--set",
        "model.cell_options.gain=0.9",
        "--layers",
        "2",
    ]
    succeeded(command("train", "lm", text, "--out", out, *TINY, "--steps", "6", "--quiet", *options))
    (tmp_path / "own.py").unlink()
    code, _, err = command("generate", out, "--length", "3")
    assert code == 1
    assert "--trust" in err
    succeeded(command("generate", out, "--length", "3", "--trust"))
    succeeded(command("resume", out, "--steps", "9", "--quiet", "--trust"))
    assert command("resume", out, "--steps", "12", "--quiet").code == 1
    load(out, trust=True)
    cell = RunDirectory(out).cells / "own.py"
    cell.write_text(cell.read_text() + "\nprint('changed')\n")
    code, shown, err = command("generate", out, "--length", "3", "--trust")
    assert code == 1
    assert "changed" not in shown
    assert "SHA-256" in err


def test_settings_file_options_and_set(command: Command, text: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(
        "model: {hidden: 9, cell: gru}\ndata: {batch: 2, window: 8}\nbudget: {epochs: 2}\n"
    )
    out, settings = tmp_path / "run", tmp_path / "settings.yaml"
    options = ["--hidden", "7", "--steps", "3", "--set", "model.hidden=5", "--quiet"]
    succeeded(command("train", "lm", text, "--out", out, "--config", settings, *options))
    config = RunDirectory(out).config()
    assert (config.model.hidden, config.model.cell) == (5, "gru")
    assert (config.budget.steps, config.budget.epochs) == (3, None)
    assert config.machine.threads == torch.get_num_threads()


def test_own_validation_and_test_texts(command: Command, text: Path, tmp_path: Path) -> None:
    valid, test = write_text(tmp_path / "v.txt", 50), write_text(tmp_path / "t.txt", 60)
    train = ["train", "lm", text, *TINY, "--steps", "2", "--quiet", "--json", "--valid", valid]
    both = json.loads(succeeded(command(*train, "--test", test, "--out", tmp_path / "a")))
    assert both["test"]["tokens"] == len(test.read_text()) - 1
    one = json.loads(succeeded(command(*train, "--out", tmp_path / "b")))
    assert one["test"]["tokens"] == len(valid.read_text()) - 1


def test_without_files_the_built_in_text_is_used(command: Command, tmp_path: Path) -> None:
    succeeded(command("train", "lm", "--out", tmp_path / "run", *TINY, "--steps", "1", "--quiet"))
    assert json.loads((tmp_path / "run" / "data.json").read_text())["train"]["characters"] > 300_000


@pytest.mark.parametrize("level", ["plan", "program", "code"])
def test_explain_says_what_the_library_says(level: str, command: Command) -> None:
    shown = succeeded(command("explain", "--cell", "gru", "--hidden", 4, "--input", 3, "--level", level))
    assert shown.rstrip() == elman.explain(elman.GRUCell(3, 4), torch.zeros(2, 2, 3), level=level).rstrip()


def test_doctor(command: Command) -> None:
    shown = succeeded(command("doctor"))
    assert "ok" in shown
    assert "missing" not in shown
    report = json.loads(succeeded(command("doctor", "--json")))
    assert report["checks"]
    assert all(check["ok"] for check in report["checks"])
    assert any(package.startswith("torch ") for package in report["packages"])


def test_doctor_finds_wrong_numbers(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from elman import doctor

    right = doctor.scan

    def wrong(*arguments: object, **options: object) -> object:
        ys, state = right(*arguments, **options)
        return ys * (1 + 1e-8), state

    monkeypatch.setattr(doctor, "scan", wrong)
    code, out, _ = command("doctor")
    assert code == 1
    assert "WRONG" in out


@pytest.mark.parametrize(
    "path",
    [
        [],
        ["train"],
        ["train", "lm"],
        ["resume"],
        ["evaluate"],
        ["generate"],
        ["score"],
        ["cells"],
        ["explain"],
        ["doctor"],
    ],
)
def test_help(path: list[str], command: Command) -> None:
    shown = succeeded(command(*path, "--help"))
    assert "Usage: elman" in shown
    assert "--help" in shown


def test_help_leads_with_training(command: Command) -> None:
    assert re.findall(r"^  (\w+)  ", succeeded(command("--help")).partition("Commands:")[2], re.MULTILINE)[0] == "train"


def test_help_gives_examples_on_one_line(command: Command) -> None:
    """A command that help breaks in two would not work when it is pasted."""
    for verb in ("train lm", "resume", "evaluate", "generate", "score", "cells", "explain"):
        examples = re.findall(
            r"^\s*(?:Example: )?(elman .*)$", succeeded(command(*verb.split(), "--help")), re.MULTILINE
        )
        source = "".join(path.read_text(encoding="utf-8") for path in Path(elman.cli.__file__).parent.glob("*.py"))
        assert examples
        assert all(f"{example}\n" in source for example in examples)


def test_the_parameters_of_load_are_explained() -> None:
    for name in inspect.signature(elman.load).parameters:
        assert f"``{name}" in (elman.load.__doc__ or "")


def test_version(command: Command) -> None:
    assert succeeded(command("--version")).strip() == elman.__version__


def test_the_module_runs_as_a_program() -> None:
    process = subprocess.run([sys.executable, "-m", "elman", "--help"], capture_output=True, check=True)
    assert b"Usage: elman" in process.stdout
