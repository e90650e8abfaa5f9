"""Settings from several places, and what is said about wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from elman.config import Config, build_config, override, parse_assignments, read_config_file
from elman.errors import DataError, OptionError


def test_later_layers_win_and_a_budget_is_replaced_as_a_whole() -> None:
    file = {"model": {"hidden": 3, "layers": 2}, "budget": {"minutes": 5, "patience": 4}}
    config = build_config(file, {"model": {"hidden": 4}, "budget": {"steps": 7}})
    assert (config.model.hidden, config.model.layers) == (4, 2)
    assert (config.budget.steps, config.budget.minutes, config.budget.patience) == (7, None, 4)


def test_defaults_have_exactly_one_budget() -> None:
    assert build_config() == Config()
    budget = build_config({"budget": {"patience": 3}}).budget
    assert (budget.steps, budget.epochs, budget.minutes) == (2000, None, None)


def test_settings_survive_json() -> None:
    config = build_config({"model": {"cell_options": {"squash": "tanh"}}, "data": {"files": ["a", "b"]}})
    assert build_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"modle": {}}, "did you mean 'model'"),
        ({"optim": {"lrr": 1}}, "did you mean 'optim.lr'"),
        ({"model": 5}, "is a section"),
        ({"optim": {"lr": -1}}, "optim.lr was given -1"),
        ({"optim": {"lr": float("nan")}}, "optim.lr"),
        ({"optim": {"name": "adan"}}, "did you mean 'adam'"),
        ({"machine": {"precision": "fp8"}}, "value of machine.precision 'fp8'"),
        ({"budget": {"steps": 1, "minutes": 2}}, "steps and minutes at once"),
    ],
)
def test_wrong_settings(settings: dict[str, object], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        build_config(settings)


def test_assignments_are_yaml() -> None:
    given = parse_assignments(["optim.lr=1e-3", "model.tie=true", "model.cell=a.py:B", "model.cell_options.x=[1, 2]"])
    expected = {
        "optim": {"lr": 1e-3},
        "model": {"tie": True, "cell": "a.py:B", "cell_options": {"x": [1, 2]}},
    }
    assert given == expected


@pytest.mark.parametrize("wrong", ["hidden=3", "model.hidden", ".a=3", "model.x=[1"])
def test_wrong_assignments(wrong: str) -> None:
    with pytest.raises(OptionError, match="--set"):
        parse_assignments([wrong])


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"a: [", "not valid YAML"), (b"- a", "sections"), (b"\xff", "byte 0 is not UTF-8")],
)
def test_wrong_files(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_config_file(tmp_path / "c.yaml")


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_config_file(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert read_config_file(tmp_path / "empty.yaml") == {}


def test_only_named_sections_may_change() -> None:
    config = build_config({"budget": {"epochs": 2}})
    assert override(config, {"budget": {"steps": 5}}, sections=("budget",)).budget.epochs is None
    with pytest.raises(OptionError, match="fixed once a run has started"):
        override(config, {"data": {"batch": 5}}, sections=("budget",))
