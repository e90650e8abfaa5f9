"""The code and the commands of README.md and docs/ run as they stand.

```python     runs; the blocks of a page share their names, in order
```pycon      runs, and what it prints is compared, as in doctest
```console    every line after `$ ` runs in bash, in a folder with three small texts; budgets are cut first. On pages
              after README.md, `elman` is a fork of a process that has loaded PyTorch
```text       is not run
"""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from processes import started

ROOT = Path(__file__).resolve().parents[1]

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
NOT_RUN = ("git clone ", "cd ", "scripts/install", "scripts/test", "scripts/bench", "PIP_")
"""What fetches something, or runs these tests themselves."""
ONCE = "scripts/demo"
"""Needs nothing of the page that names it, and makes nothing for it: README.md's is run for all."""

CUTS = [
    (re.compile(r"--(minutes|epochs|steps) \S+"), "--steps 3"),
    (re.compile(r"--hidden \S+"), "--hidden 8"),
    (re.compile(r"(?<=\()\d{3}(?=[,)])"), "8"),  # the units of a cell within --cell
    (re.compile(r"^scripts/demo$"), f"{ROOT}/scripts/demo demo-run --steps 3 --hidden 8"),
]
SHELL = re.compile(r"[|;<>&]")
SENTENCE = "It was the best of times, it was the worst of times, it was the age of wisdom.\n"


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """(language, text, line number) of every fenced block of a page, an indented one without its indent."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        indent, language, body = match.groups()
        line = text.count("\n", 0, match.start()) + 1
        found.append((language, re.sub(f"^{indent}", "", body, flags=re.MULTILINE), line))
    return found


def commands(page: Path) -> list[str]:
    """The command lines of a page's console blocks, without what must not or need not run here."""
    lines = [
        line.removeprefix("$ ").split("  #")[0].strip()
        for language, text, _ in blocks(page)
        if language == "console"
        for line in text.replace("\\\n", " ").splitlines()
        if line.startswith("$ ")
    ]
    left_out = NOT_RUN if page.name == "README.md" else (*NOT_RUN, ONCE)
    kept = [part.strip() for line in lines for part in line.split("&&") if not part.strip().startswith(left_out)]
    for pattern, short in CUTS:
        kept = [pattern.sub(short, line) for line in kept]
    return kept


def having(*languages: str) -> list[pytest.ParameterSet]:
    return [
        pytest.param(page, id=page.relative_to(ROOT).as_posix())
        for page in PAGES
        if any(language in languages for language, _, _ in blocks(page))
    ]


def test_blocks_are_of_a_known_kind() -> None:
    kinds = {language for page in PAGES for language, _, _ in blocks(page)}
    assert kinds <= {"python", "pycon", "console", "text"}
    assert {"pycon", "console"} <= {language for language, _, _ in blocks(ROOT / "README.md")}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", having("python", "pycon"))
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for language, text, line in blocks(page):
        if language == "python":
            exec(compile("\n" * line + text, str(page), "exec"), names)
        elif language == "pycon":
            session = doctest.DocTestParser().get_doctest(text, names, page.name, str(page), line)
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
            report: list[str] = []
            runner.run(session, out=report.append, clear_globs=False)
            assert not runner.failures, "".join(report)
            names = session.globs


@pytest.mark.parametrize("page", having("console"))
def test_commands_run(page: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "more").mkdir(parents=True)
    for file in ("book.txt", "more/second.txt", "held_out.txt"):
        (folder / file).write_text(SENTENCE * 200, encoding="utf-8")
    programs = [text for language, text, _ in blocks(ROOT / "docs" / "write-a-cell.md") if language == "python"]
    (folder / "cell.py").write_text("".join(programs[:1]), encoding="utf-8")
    for command in commands(page):
        forked = page.name != "README.md" and command.startswith("elman ") and not SHELL.search(command)
        code, said = (in_a_fork if forked else in_bash)(command, folder)
        assert code == 0, f"$ {command}\n{said}"


def in_bash(command: str, folder: Path) -> tuple[int, str]:
    """The exit code of a command as it stands, and all it says."""
    binaries = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "ELMAN_PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-e", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def in_a_fork(command: str, folder: Path) -> tuple[int | None, str]:
    """The same of ``elman`` with words that bash has made of the rest, in a process that starts sooner."""
    code, words = in_bash(command.replace("elman ", r"printf '%s\0' ", 1), folder)
    assert code == 0, words
    process = started(None, *words.split("\0")[:-1], folder=folder)
    process.join()
    return process.exitcode, "".join((folder.parent / name).read_text("utf-8") for name in ("out.txt", "err.txt"))
