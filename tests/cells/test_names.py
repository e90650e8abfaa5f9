"""Cells by name, and a user's own cell from a file: what is found, and what is said when it is not."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import elman
from elman.cells import CELLS, ElmanCell, GRUCell, IRNNCell, LSTMCell, SRUCell, load_user_cell
from elman.cells.squash import SQUASHES
from elman.errors import CellError, OptionError
from elman.spec import make_cell

GOOD = '''
import torch
from torch import nn


class Decay(nn.Module):
    """A running sum that halves at each step."""

    def __init__(self, input_size, hidden_size, rate=0.5):
        super().__init__()
        self.hidden_size = hidden_size
        self.rate = rate
        self.read = nn.Linear(input_size, hidden_size)

    def initial_state(self, batch, *, device, dtype):
        return torch.zeros(batch, self.hidden_size, device=device, dtype=dtype)

    def forward(self, x, state):
        state = self.rate * state + self.read(x)
        return state, state


class Stateless(nn.Module):
    def __init__(self, input_size, hidden_size):
        super().__init__()

    def forward(self, x, state):
        return x, state


class Stepless(nn.Module):
    def initial_state(self, batch, *, device, dtype):
        return torch.zeros(batch, 1)


class Narrow(Decay):
    def __init__(self, input_size):
        super().__init__(input_size, 3)


class Broken(Decay):
    def __init__(self, input_size, hidden_size):
        super().__init__(input_size, hidden_size)
        self.bias = torch.zeros(hidden_size) + torch.zeros(hidden_size + 1)


class Plain:
    pass


def factory(input_size, hidden_size):
    return Decay(input_size, hidden_size)
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(GOOD, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("elman", ElmanCell),
        ("rnn", ElmanCell),
        ("irnn", IRNNCell),
        ("lstm", LSTMCell),
        ("gru", GRUCell),
        ("sru", SRUCell),
    ],
)
def test_short_names(name: str, kind: type) -> None:
    cell = make_cell(name, 3, 4)
    assert type(cell) is kind is CELLS[name]
    assert (cell.input_size, cell.hidden_size, cell.output_size) == (3, 4, 4)


def test_options_reach_the_cell() -> None:
    cell = make_cell("lstm", 3, 4, peepholes=True, proj_size=2, forget_bias=1, squash="relu", init="xavier")
    assert repr(cell) == "LSTMCell(3, 4, squash=relu, peepholes=True, proj_size=2, forget_bias=1)"
    assert not cell.bias_ih[:4].any()
    assert make_cell("gru", 3, 4, reset_after=False, dtype=torch.float64).weight_hh.dtype == torch.float64
    assert make_cell("irnn", 3, 4).weight_hh.equal(torch.eye(4))
    assert repr(make_cell("irnn", 3, 4, bias=False)) == "IRNNCell(3, 4, squash=relu, bias=False)"
    assert not make_cell("irnn", 3, 4, init="uniform").weight_hh.equal(torch.eye(4))


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("lstmm", {}, "unknown cell 'lstmm': did you mean 'lstm'? Known: "),
    ("GRU", {}, "unknown cell 'GRU': did you mean 'gru'?"),
    ("", {}, "a cell is missing here"),
    ("lstm", {"peephole": True}, "unknown option of 'lstm' 'peephole': did you mean 'peepholes'?"),
    ("gru", {"alpha": 0.5}, "unknown option of 'gru' 'alpha'"),
    ("rnn", {"squash": "tan"}, "unknown squashing function 'tan': did you mean 'tanh'?"),
    ("rnn", {"squash": 3}, "squash must be a function of one tensor or a name"),
    ("rnn", {"init": "ortogonal"}, "unknown initialisation 'ortogonal': did you mean 'orthogonal'?"),
    ("lstm", {"proj_size": 4}, "proj_size must be 0 (none) or an integer below hidden_size; got 4"),
    ("lstm", {"proj_size": -1}, "proj_size must be 0 (none) or an integer below hidden_size; got -1"),
    ("lstm", {"forget_bias": 1.0, "bias": False}, "the bias of the forget gate cannot be set"),
    ("mine.py", {}, "Write file and class, for example 'mine.py:MyCell'"),
    ("nowhere.py:Mine", {}, "cell file 'nowhere.py' does not exist."),
]


@pytest.mark.parametrize(("spec", "options", "message"), WRONG)
def test_mistakes_are_named(spec: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        make_cell(spec, 3, 4, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("size", [0, -1, 2.0, "3", True])
@pytest.mark.parametrize("name", CELLS)
def test_sizes_are_positive_integers(name: str, size: Any) -> None:
    with pytest.raises(OptionError, match="input_size must be a positive integer"):
        make_cell(name, size, 4)
    with pytest.raises(OptionError, match="hidden_size must be a positive integer"):
        make_cell(name, 3, size)


@pytest.mark.parametrize("name", SQUASHES)
def test_squashing_functions_are_pointwise(name: str) -> None:
    a = torch.linspace(-3, 3, 7)
    expected = torch.stack([SQUASHES[name](number) for number in a])
    torch.testing.assert_close(SQUASHES[name](a), expected)


def test_a_users_cell_is_built_and_unfolded(file: Path) -> None:
    cell = make_cell(f"{file}:Decay", 3, 4, rate=0.25)
    ys, _ = elman.scan(cell, torch.randn(6, 2, 3))
    assert (ys.shape, cell.rate) == ((6, 2, 4), 0.25)


def test_what_was_executed_is_what_is_kept(file: Path) -> None:
    loaded = load_user_cell(file, "Decay")
    file.write_text(GOOD.replace("0.5", "0.75"), encoding="utf-8")
    again = load_user_cell(file, "Decay")
    assert loaded.source == GOOD
    assert loaded.sha256 == hashlib.sha256(GOOD.encode()).hexdigest() != again.sha256
    assert (loaded.make(3, 4).rate, again.make(3, 4).rate) == (0.5, 0.75)
    assert sorted(entry.name for entry in file.parent.iterdir()) == ["mine.py"]


def line_of(text: str) -> int:
    return GOOD.splitlines().index(text) + 1


CONSTRUCTOR = line_of("    def __init__(self, input_size):")
SUM = line_of("        self.bias = torch.zeros(hidden_size) + torch.zeros(hidden_size + 1)")
USER_MISTAKES: list[tuple[str, type[Exception], list[str]]] = [
    (
        "Decai",
        OptionError,
        ["unknown class in", "'Decai': did you mean 'Decay'?", "Broken, Decay, Narrow"],
    ),
    ("Plain", CellError, ["Plain in", "is not a torch.nn.Module", "def forward(self, x, state)"]),
    ("factory", CellError, ["factory in", "is not a torch.nn.Module"]),
    ("Stateless", CellError, ["Stateless in", "has no initial_state", "def initial_state(self, batch"]),
    ("Stepless", CellError, ["Stepless in", "has no forward"]),
    (
        "Narrow",
        CellError,
        [
            "Narrow(3, 4) failed with TypeError",
            f"mine.py:{CONSTRUCTOR}: def __init__(self",
        ],
    ),
    (
        "Broken",
        CellError,
        ["Broken(3, 4) failed with RuntimeError", f"mine.py:{SUM}: self.bias ="],
    ),
]


@pytest.mark.parametrize(("name", "kind", "parts"), USER_MISTAKES, ids=[case[0] for case in USER_MISTAKES])
def test_users_mistakes_show_the_line(file: Path, name: str, kind: Any, parts: list[str]) -> None:
    with pytest.raises(kind) as caught:
        make_cell(f"{file}:{name}", 3, 4)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_an_option_that_the_users_cell_does_not_take(file: Path) -> None:
    with pytest.raises(OptionError, match=r"unknown option of 'Decay' 'speed'\. Known: rate"):
        make_cell(f"{file}:Decay", 3, 4, speed=2)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("import torch\nclass A(:\n    pass\n", ["cannot be executed: SyntaxError", "mine.py:2: class A(:"]),
        ("x = 1\ny = undefined + x\n", ["cannot be executed: NameError", "mine.py:2: y = undefined + x"]),
        (
            "import not_installed\n",
            ["ModuleNotFoundError", "mine.py:1: import not_installed"],
        ),
        ("x = 1\n", ["defines no class 'A', and no other"]),
        ("", ["defines no class 'A'"]),
        ("from torch.nn import LSTM\n", ["defines no class 'A'"]),
    ],
)
def test_files_that_are_no_cells(file: Path, text: str, parts: list[str]) -> None:
    file.write_text(text, encoding="utf-8")
    before = set(sys.modules)
    with pytest.raises((CellError, OptionError)) as caught:
        load_user_cell(file, "A")
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    if "cannot be executed" in str(caught.value):
        assert set(sys.modules) == before


def test_a_file_that_is_no_text(file: Path) -> None:
    file.write_bytes(b"import torch\n\xff\xfe")
    with pytest.raises(CellError, match=r"is not UTF-8 text \(byte 13\)"):
        load_user_cell(file, "A")


def test_a_missing_file(file: Path) -> None:
    with pytest.raises(OptionError, match=r"does not exist\. Did you mean '.*mine\.py'\?"):
        make_cell(f"{file.parent / 'nine.py'}:Decay", 3, 4)
    with pytest.raises(OptionError, match=r"does not exist\.$"):
        make_cell(f"{file.parent / 'nowhere' / 'mine.py'}:Decay", 3, 4)
    with pytest.raises(OptionError, match="does not exist"):
        make_cell(f"{file.parent}:Decay", 3, 4)
