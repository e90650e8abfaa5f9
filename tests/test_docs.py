"""The documentation builds strictly, and reads, without network."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FETCHED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
FETCHED_BY_CSS = re.compile(r"(?:@import\s+|url\()\s*[\"']?(?:https?:)?//[^)\"']*")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= {path.relative_to(site) for path in site.rglob("*.html")}


def test_pages_fetch_nothing(site: Path) -> None:
    found = [
        f"{path.relative_to(site)}: {what}"
        for pattern, ending in ((FETCHED, "*.html"), (FETCHED_BY_CSS, "*.css"))
        for path in site.rglob(ending)
        for what in pattern.findall(path.read_text(encoding="utf-8"))
    ]
    assert not found
