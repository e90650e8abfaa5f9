"""Cells by spec: what is built, what is printed back, and what is said where a spec is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import elman
from cellspecs import NAMES, spec_of
from elman.cells import CELLS, ElmanCell, GRUCell, LSTMCell
from elman.combinators import COMBINATORS, Highway, Residual, Stack
from elman.errors import CellError, OptionError
from elman.spec import make_cell, parse_spec, usage

MINE = """
import torch

class Mine(torch.nn.Module):
    def __init__(self, input_size, hidden_size, rate=0.5):
        super().__init__()
        self.rate, self.width = rate, hidden_size
        self.read = torch.nn.Linear(input_size, hidden_size)

    def initial_state(self, batch, *, device, dtype):
        return torch.zeros(batch, self.width, device=device, dtype=dtype)

    def forward(self, x, state):
        state = self.rate * state + torch.tanh(self.read(x))
        return torch.cat([state, state], -1), state
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return f"{path}:Mine"


def shape(cell: nn.Module) -> Any:
    """The structure of a cell, as nested tuples."""
    if isinstance(cell, Stack):
        return ("stack", *map(shape, cell.cells))
    if isinstance(cell, Residual):
        return (type(cell).__name__.lower(), shape(cell.cell))
    return (type(cell).__name__, cell.input_size, cell.hidden_size)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("lstm", ("LSTMCell", 5, 8)),
        (" lstm ( 16 ) ", ("LSTMCell", 5, 16)),
        ("gru(reset_after=false)", ("GRUCell", 5, 8)),
        ("stack(lstm)", ("stack", ("LSTMCell", 5, 8))),
        ("stack(2, lstm(7))", ("stack", ("LSTMCell", 5, 7), ("LSTMCell", 7, 7))),
        ("stack(gru(7), elman, dropout=0.1)", ("stack", ("GRUCell", 5, 7), ("ElmanCell", 7, 8))),
        ("stack(layers=2, gru)", ("stack", ("GRUCell", 5, 8), ("GRUCell", 8, 8))),
        ("residual(highway(rnn(5)))", ("residual", ("highway", ("ElmanCell", 5, 5)))),
        ("stack(2, residual(lstm(6, peepholes)))", ("stack", *(("residual", ("LSTMCell", w, 6)) for w in (5, 6)))),
    ],
)
def test_builds(spec: str, expected: Any) -> None:
    assert shape(make_cell(spec, 5, 8)) == expected


def test_options_reach_the_constructor() -> None:
    lstm = make_cell("lstm(peepholes, forget_bias=1, squash=softsign, init=spectral:0.5)", 3, 4)
    assert isinstance(lstm, LSTMCell)
    assert lstm.peepholes is True
    assert lstm.forget_bias == 1
    assert lstm.init == "spectral:0.5"
    assert lstm.squash is nn.functional.softsign
    assert make_cell("gru(reset_after=False)", 3, 4).reset_after is False
    assert make_cell("stack(2, gru, dropout=.5)", 3, 4).dropout == 0.5
    assert make_cell("highway(elman, carry_bias=-2.5e0)", 4, 4).gate.bias.tolist() == [-2.5] * 4
    assert make_cell("leaky(elman, learned)", 3, 4).alpha == "learned"
    assert make_cell("weight_drop(learned_state(gru), 0.2, weights=cell.weight_hh)", 3, 4).p == 0.2
    assert make_cell("elman", 3, 4, dtype=torch.float64, squash="relu").weight_ih.dtype == torch.float64


@pytest.mark.parametrize(
    "spec",
    [
        "lstm",
        "stack(3, residual(lstm(512, peepholes, init=chrono:200)), dropout=0.25)",
        "lstm(4, squash='relu', forget_bias=1.5)",
        "stack(my.py:Cell(3), a/b.py:Other)",
        "clock(gru, [1, 2, 4])",
    ],
)
def test_is_printed_as_it_is_read(spec: str) -> None:
    assert str(parse_spec(spec)) == spec
    assert parse_spec(str(parse_spec(spec))) == parse_spec(spec)


def test_a_users_cell_stands_wherever_a_cell_of_ours_does(mine: str) -> None:
    cell = make_cell(f"stack(2, residual({mine}(6, rate=0.25)), dropout=0.5)", 5, 8)
    assert [residual.cell.rate for residual in cell.cells] == [0.25, 0.25]
    assert [cell.input_size, cell.output_size] == [5, 12]
    assert cell.cells[0].projection.weight.shape == (12, 5)
    assert elman.scan(cell, torch.randn(4, 2, 5))[0].shape == (4, 2, 12)
    assert make_cell(mine, 5, 8).width == 8


def test_files_are_found_and_moved(mine: str) -> None:
    spec = parse_spec("stack(a.py:A, residual(b.py:B(3)), a.py:C, gru)")
    assert spec.files == ["a.py", "b.py"]
    moved = spec.moved({"a.py": "run/one.py", "b.py": "run/two.py"})
    assert str(moved) == "stack(run/one.py:A, residual(run/two.py:B(3)), run/one.py:C, gru)"
    path = mine.rpartition(":")[0]
    spaced = Path(path).with_name("my own (1).py")
    spaced.write_text(MINE)
    assert isinstance(make_cell(f"{spaced}:Mine", 3, 4), nn.Module)
    assert isinstance(make_cell(f'stack(2, "{spaced}:Mine"(5))', 3, 4), Stack)
    assert isinstance(make_cell(str(parse_spec("x.py:Mine(5)").moved({"x.py": str(spaced)})), 3, 4), nn.Module)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "a cell is missing here"),
        ("3", "a spec begins with the name of a cell"),
        ("lstm(", "an argument is missing here"),
        ("stack(2, lstm", r"',' or '\)' is missing here"),
        ("lstm)", "nothing may follow a cell"),
        ("lstm, gru", r"several cells in stack"),
        ("lstm(16,,)", "an argument is missing here"),
        ("lstm(16 17)", r"',' or '\)' is missing here"),
        ("lstm(16, $)", "this cannot be read"),
        ("lstm(16=3)", "before '=' stands the name of an option"),
        ("lstm(squash=)", "a value is missing here"),
        ("lstmm", "did you mean 'lstm'"),
        ("stack(2, lsttm(3))", "did you mean 'lstm'"),
        ("stak(2, lstm)", "did you mean 'stack'"),
        ("stack(2, lstm, drop=0.1)", "did you mean 'dropout'"),
        ("lstm(16, peephole)", "did you mean 'peepholes'"),
        ("lstm(16, squash=thanh)", "did you mean 'tanh'"),
        ("lstm(16, 17)", "takes a value without a name only for its width"),
        ("lstm(1.5)", "takes a value without a name only for its width, a whole number"),
        ("residual(lstm, 3)", "takes a value without a name for none of its options"),
        ("delay(gru)", r"needs d\. It is written delay\(cell, d\)"),
        ("delay(gru, two)", "unknown cell or option in delay"),
        ("highway(lstm, carry_bias=much)", "carry_bias must be a number, got much"),
        ("highway(lstm, carry_bias)", "carry_bias must be a number, got True"),
        ("clockwork(elman, 3)", r"periods must be a list, each a whole number, got 3"),
        ("clockwork(elman, [1, two])", r"periods must be a list, each a whole number, got \[1, two\]"),
        ("lstm(peepholes=1)", "peepholes must be true or false, got 1"),
        ("feedback(gru, readout=tanh)", "unknown option of 'feedback' 'readout'"),
        ("leaky(lsttm, learned)", "did you mean 'lstm'"),
        ("stack(2, mine.py)", "which class of this file"),
        ("lstm(gru)", "lstm is no combinator, so gru cannot stand in it"),
        ("lstm(peepholes, peepholes=true)", "peepholes is given twice"),
        ("residual", "goes around one cell; it was given none"),
        ("residual(lstm, gru)", "goes around one cell; it was given 2: lstm, gru"),
        ("stack(3)", "goes around cells; it was given none"),
        ("stack(0, gru)", "layers must be a positive integer"),
        ("lstm(0)", "hidden_size must be a positive integer"),
        ("mine.py", "which class of 'mine.py'"),
        ("nowhere.py:Mine", "'nowhere.py' does not exist"),
    ],
)
def test_what_is_wrong_is_said(spec: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make_cell(spec, 5, 8)


def test_options_beside_a_spec_of_several_cells_are_refused() -> None:
    with pytest.raises(OptionError, match=r"stack\(2, lstm\) is made of several cells, so whose peepholes is meant"):
        make_cell("stack(2, lstm)", 5, 8, peepholes=True)


@pytest.mark.parametrize("name", NAMES)
def test_usage_names_every_option_with_a_default_that_can_be_written(name: str) -> None:
    spec = spec_of(name)
    _, _, inside = usage(name).rstrip(")").partition("(")
    defaults = [part for part in inside.split(", ") if "=" in part and part.partition("=")[0] not in spec]
    written = make_cell(", ".join([spec.rstrip(")"), *defaults]) + ")", 6, 8)
    assert repr(written) == repr(make_cell(spec, 6, 8))


def test_names_for_directories() -> None:
    spec = parse_spec("stack(residual(lstm(5, layer_norm)), highway(a/My.py:Own), lstm)")
    assert spec.names == ["stack", "lstm", "own"]
    assert parse_spec("gru").names == ["gru"]


def test_the_place_is_shown() -> None:
    with pytest.raises(OptionError) as caught:
        make_cell("stack(2, lstm(16 peepholes))", 5, 8)
    _, shown, mark, _ = str(caught.value).splitlines()
    assert shown[mark.index("^") :].startswith("peepholes")


def test_a_users_cell_with_an_unknown_option(mine: str) -> None:
    with pytest.raises(OptionError, match="did you mean 'rate'"):
        make_cell(f"{mine}(8, raten=3)", 5, 8)


def test_a_users_cell_that_must_be_given_more(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(MINE.replace("rate=0.5", "rate, *, slow=False"))
    with pytest.raises(OptionError, match=r"Mine needs rate\. It is written Mine\(width, rate, slow=false\)"):
        make_cell(f"{path}:Mine", 5, 8)
    assert make_cell(f"stack({path}:Mine(8, 0.25))", 5, 8).cells[0].rate == 0.25


def test_a_file_runs_once_until_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    below, above = make_cell(f"stack(2, {path}:Mine)", 5, 8).cells
    assert type(below) is type(above)
    path.write_text(MINE.replace("0.5", "0.75"))
    assert make_cell(f"{path}:Mine", 5, 8).rate == 0.75


def test_parts_that_do_not_fit() -> None:
    with pytest.raises(CellError, match=r"cell 1 \(ElmanCell\) reads 5 features, and cell 0 \(GRUCell\) gives 4"):
        Stack([GRUCell(3, 4), ElmanCell(5, 2)])
    with pytest.raises(CellError, match="goes around a cell; got the class GRUCell"):
        Highway(GRUCell)  # type: ignore[arg-type]
    with pytest.raises(CellError, match="does not say its input_size"):
        Residual(nn.Identity())


@pytest.mark.parametrize("name", NAMES)
def test_no_name_means_two_things(name: str) -> None:
    assert (name in CELLS) != (name in COMBINATORS)
    assert name == name.lower()
