"""The scripts of runs/ start, try themselves out without writing, and are quoted as they were kept."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from processes import started

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs"
PAGES = [ROOT / "docs" / name for name in ("choose-a-cell.md", "experiments.md", "slow.md")]
SCRIPTS = sorted(path.stem for path in RUNS.glob("*.py") if path.stem not in ("kept", "rivals"))
SLOW = ("choose_a_cell",)
"""More than ten seconds even with --quick."""

NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")
TABLE = re.compile(r"^<!-- (\w+): [\w ]+ -->\n\n((?:\|.*\n)+)\n", re.MULTILINE)


@pytest.fixture(autouse=True)
def _as_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RUNS))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(RUNS / f"{script}.py"), run_name="__main__")
    assert not left.value.code
    assert f"python runs/{script}.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    "script", [pytest.param(s, marks=[pytest.mark.slow] if s in SLOW else []) for s in SCRIPTS if s != "tables"]
)
def test_quick_runs_and_writes_nothing(script: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkout"
    (folder / "runs").mkdir(parents=True)
    for path in RUNS.glob("*.py"):  # it writes beside itself, and into docs/ beside its folder
        shutil.copy(path, folder / "runs")
    before = sorted(folder.rglob("*"))
    process = started(folder / "runs" / f"{script}.py", "--quick", folder=folder)
    process.join()
    assert process.exitcode == 0, (tmp_path / "err.txt").read_text(encoding="utf-8")
    assert (tmp_path / "out.txt").read_text(encoding="utf-8")
    assert sorted(folder.rglob("*")) == before


def test_a_result_is_kept_with_what_it_ran_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = importlib.import_module("kept")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "some.py"), "--out", "elsewhere"])
    kept.keep(tmp_path / "new" / "some.json", {"rows": [kept.significant(0.123456)], "threads": 7})
    found = json.loads((tmp_path / "new" / "some.json").read_text(encoding="utf-8"))
    assert found["command"] == "python runs/some.py"
    assert found["rows"] == [0.1235]
    assert found["threads"] == 7
    assert found["processor"]
    assert found["torch"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_page_quotes_what_is_kept(path: Path) -> None:
    tables = importlib.import_module("tables")
    page = path.read_text(encoding="utf-8")
    assert tables.renewed(page) == page, "python runs/tables.py writes the tables anew"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_number_of_a_table_is_in_its_result(path: Path) -> None:
    """By another way than the one on which the tables were written."""
    page = path.read_text(encoding="utf-8")
    found = TABLE.findall(page)
    assert len(found) == page.count("\n| --- |"), "a table without the name of its result"
    for result, table in found:
        kept = (RUNS / "results" / f"{result}.json").read_text(encoding="utf-8")
        assert set(NUMBER.findall(table)) <= set(NUMBER.findall(kept)), result


def test_every_script_with_a_result_is_on_a_page() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    missing = {path.stem for path in (RUNS / "results").glob("*.json")} - set(re.findall(r"runs/(\w+)\.py", pages))
    assert not missing
