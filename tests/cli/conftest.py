"""The command in this process, and a small text."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs_common import Command, write_text


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")
