"""Every name and users' own cells, nested, from the command line: trained, continued, and used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from runs_common import OWN_CELL, TINY, Command, Outcome, content

from cellspecs import CONSTANTS, NAMES, spec_of
from elman.cells import CELLS
from elman.checkpoint import RunDirectory
from elman.cli.train import free_name
from elman.combinators import COMBINATORS
from elman.runs import load

QUICK = [*TINY, "--quiet", "--set", "report.sample=0", "--validate-every", "2"]


def succeeded(outcome: Outcome) -> str:
    assert outcome.code == 0, outcome.err
    return outcome.out


def refused(outcome: Outcome, code: int, *words: str) -> None:
    assert (outcome.code, outcome.out) == (code, ""), outcome.err
    assert outcome.err.startswith("elman: ")
    assert "Traceback" not in outcome.err
    assert [word for word in words if word not in outcome.err] == [], outcome.err


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "own.py"
    path.write_text(OWN_CELL.replace("self.mix = ", "self.output_size = hidden_size; self.mix = "))
    return f"{path}:Mine"


@pytest.mark.filterwarnings("error::elman.errors.UnfoldWarning")
@pytest.mark.parametrize("name", [name for name in NAMES if name not in CONSTANTS])
def test_every_name_trains_and_writes(name: str, command: Command, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = succeeded(
        command("train", "lm", text, "--out", out, *QUICK, "--steps", 2, "--cell", spec_of(name), "--json")
    )
    model = load(out)
    test = model.corpus().test
    assert model.evaluate(test).nats == pytest.approx(json.loads(result)["test"]["nats"], rel=1e-12)
    assert len(model.generate("the ", 5, seed=1)[0]) == 5


AROUND_OWN = [
    "{own}",
    "stack(2, residual({own}(6)))",
    "stack(gru, variational_dropout({own}(5, gain=0.9), 0.1), learned_state(delay({own}, 2)))",
    "zoneout(leaky(feedback({own})))",
    "highway(time_skip(deep({own}, transition=1), 2))",
]


@pytest.mark.parametrize("spec", AROUND_OWN)
def test_a_users_own_cell_inside_others(spec: str, own: str, command: Command, text: Path, tmp_path: Path) -> None:
    spec, whole, out = spec.format(own=own), tmp_path / "whole", tmp_path / "run"
    constant = ["--set", "optim.schedule=constant", "--warmup", "0"]
    train = ["train", "lm", text, *QUICK, *constant, "--cell", spec]
    succeeded(command(*train, "--out", whole, "--steps", 6))
    succeeded(command(*train, "--out", out, "--steps", 4))
    Path(own.rpartition(":")[0]).unlink()
    refused(command("resume", out, "--steps", 6), 1, "Mine in", str(out / "cells" / "own.py"), "--trust")
    succeeded(command("resume", out, "--steps", 6, "--quiet", "--trust"))
    assert content(out)["last tensors"] == content(whole)["last tensors"]
    refused(command("generate", out, "--length", 3), 1, "--trust")
    moved = shutil.move(out, tmp_path / "moved (1), it's")
    assert len(succeeded(command("generate", moved, "--length", 3, "--prompt", "the ", "--trust"))) == 8
    assert "bits per byte" in succeeded(command("evaluate", moved, "--trust"))


def test_files_of_one_name_from_two_folders(command: Command, text: Path, tmp_path: Path) -> None:
    names = []
    for folder, name, gain in (("a", "own.py", 0.25), ("b", "own.py", 0.5), ("c", "OWN.py", 0.75)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(OWN_CELL.replace("gain=1.0", f"gain={gain}"))
        names.append(f"{tmp_path / folder / name}:Mine")
    out = tmp_path / "run"
    train = ["train", "lm", text, "--out", out, *QUICK, "--steps", 2]
    succeeded(command(*train, "--cell", f"stack({', '.join(names)}, {names[0]})"))
    assert sorted(path.name for path in (out / "cells").iterdir()) == ["OWN-3.py", "own-2.py", "own.py"]
    cells = load(out, trust=True).model.cell.cells[0].cells
    assert [cell.gain for cell in cells] == [0.25, 0.5, 0.75, 0.25]
    assert type(cells[0]) is type(cells[3])
    (out / "cells" / "notes.txt").write_text("mine")
    succeeded(command(*train, "--cell", names[1], "--overwrite"))
    assert sorted(path.name for path in (out / "cells").iterdir()) == ["notes.txt", "own.py"]
    again = f"{out / 'cells' / 'own.py'}:Mine"
    succeeded(command(*train, "--cell", again, "--overwrite"))
    assert load(out, trust=True).model.cell.cells[0].gain == 0.5


def change(run: Path, **settings: object) -> None:
    """Write other things into config.json; ``cell`` is the model's."""
    file = RunDirectory(run).config_file
    config = json.loads(file.read_text())
    if "cell" in settings:
        config["settings"]["model"]["cell"] = settings.pop("cell")
    file.write_text(json.dumps(config | settings))


def test_no_code_runs_that_was_not_trusted_and_hashed(own: str, command: Command, text: Path, tmp_path: Path) -> None:
    out, evil = tmp_path / "run", tmp_path / "evil.py"
    succeeded(command("train", "lm", text, "--out", out, *QUICK, "--steps", 2, "--cell", f"stack(gru, {own})"))
    config = RunDirectory(out).config_file.read_text()
    files = json.loads(config)["cell_files"]
    (only,) = files.values()
    evil.write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n{OWN_CELL}")
    (out / "cells" / "evil.py").write_text(evil.read_text())
    for changes in (
        {"cell": f"stack(gru, {evil}:Mine)"},
        {"cell": f"{evil}:Mine", "cell_files": {}},
        {"cell": "gru", "cell_files": files},
        {"cell_files": {name: only | {"copy": "../../evil.py"} for name in files}},
        {"cell_files": {name: {"copy": "evil.py"} for name in files}},
        {"cell_files": None},
        {"cell_files": [*files]},
    ):
        change(out, **changes)
        for trust in ([], ["--trust"]):
            refused(command("generate", out, *trust), 1, "config.json", "damaged")
        RunDirectory(out).config_file.write_text(config)
    change(out, cell="stack(gru")
    refused(command("generate", out), 1, "config.json", "damaged")
    RunDirectory(out).config_file.write_text(config)
    (out / "cells" / "own.py").write_text(evil.read_text())
    refused(command("generate", out, "--trust"), 1, "own.py", "SHA-256")
    (out / "cells" / "own.py").unlink()
    refused(command("generate", out, "--trust"), 1, "own.py", "No such file")
    assert not (tmp_path / "executed").exists()


def test_a_run_of_an_older_format(command: Command, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train = ["train", "lm", text, "--out", out, *QUICK, "--steps", 2]
    succeeded(command(*train))
    change(out, format=1)
    (out / "cell.py").write_text("")
    for verb in ("resume", "generate", "evaluate"):
        refused(command(verb, out), 1, "format 1", "reads format 2", "--overwrite")
    refused(command(*train), 1, "already holds a run")
    succeeded(command(*train, "--overwrite"))
    assert not (out / "cell.py").exists()


WRONG = {
    "attend": ("attend(lstm, 8)", ["Attend in attend(lstm, 8) reads constants", "Leave it away"]),
    "conditioned": ("stack(2, conditioned(gru, 8))", ["Conditioned in", "reads constants"]),
    "word": ("stack(2, lsttm(3))", ["did you mean 'lstm'"]),
    "form": ("stack(2, lstm", ["is missing here", "^"]),
    "need": ("delay(gru)", ["delay needs d. It is written delay(cell, d)"]),
    "fit": ("clockwork(elman(7), [1, 2])", ["7 units"]),
    "no file": ("stack(2, nowhere.py:Mine)", ["'nowhere.py' does not exist"]),
    "no class": ("residual({folder}/own.py:Mien)", ["did you mean 'Mine'"]),
    "syntax": ("stack(2, {folder}/syntax.py:Mine)", ["SyntaxError", "syntax.py:2: class Mine(:"]),
    "constants": ("residual({folder}/own.py:Asks)", ["Asks reads constants"]),
    "pair": ("residual({folder}/own.py:Single)", ["Single.forward", "own.py:", "must return a pair (y, state)"]),
    "step": ("residual({folder}/own.py:Wrong)", ["Wrong does not say its output_size", "shapes cannot be multiplied"]),
    "said": ("residual({folder}/own.py:Said)", ["own.py:", "shapes cannot be multiplied"]),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_with_a_cell_is_found_before_anything_is_written(
    kind: str, own: str, command: Command, text: Path, tmp_path: Path
) -> None:
    spec, words = WRONG[kind]
    others = """
class Asks(Mine):
    def forward(self, x, h, constants):
        return super().forward(x, h)

class Single(Mine):
    def forward(self, x, h):
        return super().forward(x, h)[0]

class Wrong(Mine):
    def forward(self, x, h):
        return super().forward(torch.cat([x, x], -1), h)

class Said(Wrong):
    def __init__(self, input_size, hidden_size):
        super().__init__(input_size, hidden_size)
        self.output_size = hidden_size
"""
    (tmp_path / "own.py").write_text(OWN_CELL + others)
    (tmp_path / "syntax.py").write_text("import torch\nclass Mine(:\n    pass\n")
    out = tmp_path / "run"
    train = ["train", "lm", text, "--out", out, *QUICK, "--cell", spec.format(folder=tmp_path)]
    refused(command(*train), 2, *words)
    assert not out.exists()


def test_a_mistake_of_syntax_is_one_line(command: Command, text: Path, tmp_path: Path) -> None:
    (tmp_path / "syntax.py").write_text("import torch\nclass Mine(:\n    pass\n")
    shown = command("explain", "--cell", f"{tmp_path / 'syntax.py'}:Mine").err
    assert shown.count("\n") == 1


def test_options_beside_a_spec(command: Command, text: Path, tmp_path: Path) -> None:
    train = ["train", "lm", text, "--out", tmp_path / "run", *QUICK, "--steps", 2]
    options = ["--set", "model.cell_options.peepholes=true"]
    refused(command(*train, "--cell", "stack(2, lstm)", *options), 2, "whose peepholes is meant", "into the spec")
    assert not (tmp_path / "run").exists()
    succeeded(command(*train, "--cell", "lstm(5)", *options, "--layers", 2))
    (stack,) = [load(tmp_path / "run").model.cell]
    assert [(cell.hidden_size, cell.peepholes) for cell in stack.cells] == [(5, True)] * 2


def test_layers_of_a_stack(command: Command, text: Path, tmp_path: Path) -> None:
    train = ["train", "lm", text, "--out", tmp_path / "run", *QUICK, "--steps", 2]
    succeeded(command(*train, "--cell", "stack(2, residual(gru(5)), elman)", "--layers", 2, "--hidden", 7))
    outer = load(tmp_path / "run").model.cell
    assert [cell.output_size for stack in outer.cells for cell in stack.cells] == [5, 7, 5, 7] * 2


def test_names_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for files, spec, name in (
        ((), "lstm", "python-manual-lstm"),
        (("a/book.txt",), "own.py:Mine", "book-mine"),
        (("a/book.txt",), "stack(3, residual(lstm(512, layer_norm)))", "book-stack-lstm"),
        (("a/book.txt",), "stack(gru, '../a b/own.py:Mine'(4), gru)", "book-stack-gru-mine"),
        (("x" * 200 + ".txt",), "stack(elman, gru, lstm, sru, qrnn)", "x" * 60 + "-stack-elman-gru-lstm"),
    ):
        assert free_name(files, spec) == Path("runs") / name
    Path("runs/book-mine").mkdir(parents=True)
    assert free_name(("a/book.txt",), "own.py:Mine") == Path("runs/book-mine-2")


def test_the_table_of_names(command: Command) -> None:
    shown = succeeded(command("cells"))
    table = json.loads(succeeded(command("cells", "--json")))
    assert set(table["cells"]) == set(CELLS)
    assert set(table["combinators"]) == set(COMBINATORS)
    for name, entry in (table["cells"] | table["combinators"]).items():
        assert entry["usage"].startswith(f"{name}(")
        assert 10 < len(entry["says"]) < 200
        assert f"  {name}" in shown
    assert "  rnn  is elman" in shown
    assert "delay(cell, d)" in shown


def test_explain_stacks_layers_as_training_does(command: Command) -> None:
    small = ["--hidden", 4, "--input", 3]
    layered = succeeded(command("explain", "--cell", "residual(gru)", "--layers", 2, *small))
    assert layered == succeeded(command("explain", "--cell", "stack(2, residual(gru))", *small))
    assert layered.count("  loop ") == 4
    refused(command("explain", "--cell", "stack(gru)", "--option", "bias=false"), 2, "whose bias is meant")


@pytest.mark.parametrize("spec", ["attend(lstm, 8)", "stack(conditioned(gru, 3, key=a), attend(gru, 2, key=b))"])
def test_explain_makes_up_the_constants(spec: str, command: Command) -> None:
    assert "  loop " in succeeded(command("explain", "--cell", spec, "--hidden", 4, "--input", 3))
