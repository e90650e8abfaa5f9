"""The demonstration; that it runs to its end is tested with the commands of README.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from elman import demo


def test_help_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        demo.main(["--help"])
    assert end.value.code == 0
    assert "--minutes" in capsys.readouterr().out


def test_a_failing_command_ends_it_with_that_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("not a run", encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        demo.main(["--out", str(tmp_path), "--steps", "1"])
    assert end.value.code == 1
    said = capfd.readouterr()
    assert said.out.startswith("$ elman train lm")
    assert "not a run directory" in said.err
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "not a run"
