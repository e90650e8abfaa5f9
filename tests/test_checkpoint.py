"""Files that are whole or absent, and say so when they are damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from elman.checkpoint import RunDirectory, load_tensors, read_json, save_tensors, write_atomic
from elman.config import Config, Model
from elman.errors import RunError

TENSORS = {
    "matrix": torch.arange(6.0).view(2, 3).t(),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "bytes": torch.tensor([0, 255], dtype=torch.uint8),
}
FACTS = {"step": 7, "loss": 0.1 + 0.2, "text": "ü", "nested": {"none": None}}


def test_tensors_and_facts_come_back_exactly(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a", TENSORS, FACTS)
    tensors, facts = load_tensors(tmp_path / "a")
    assert facts == FACTS
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a", TENSORS, FACTS)
    save_tensors(tmp_path / "b", dict(reversed(TENSORS.items())), dict(reversed(FACTS.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_every_byte_is_guarded(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a", TENSORS, FACTS)
    good = (tmp_path / "a").read_bytes()
    for place in range(len(good)):
        (tmp_path / "b").write_bytes(good[:place] + bytes([good[place] ^ 0x11]) + good[place + 1 :])
        try:
            tensors, facts = load_tensors(tmp_path / "b")
        except RunError:
            continue
        # A changed byte of the header's padding or spelling may still say the same; never something else.
        assert facts == FACTS
        assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
        assert tensors.keys() == TENSORS.keys()


@pytest.mark.parametrize("length", [0, 5, 40, -1])
def test_cut_off_files(length: int, tmp_path: Path) -> None:
    save_tensors(tmp_path / "a", TENSORS, FACTS)
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:length])
    with pytest.raises(RunError, match="damaged"):
        load_tensors(tmp_path / "a")


def test_a_failed_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "a", b"old")

    def refuse(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(RunError, match=r"No space left on device.*intact"):
        write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_json_must_be_an_object(tmp_path: Path) -> None:
    for wrong in ("[1]", "{", ""):
        (tmp_path / "a.json").write_text(wrong)
        with pytest.raises(RunError, match="damaged"):
            read_json(tmp_path / "a.json")


def test_what_an_interrupted_beginning_left_is_used(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / ".config.json.tmp").write_text("{")
    assert RunDirectory.create(run, Config()).config() == Config()


@pytest.mark.parametrize("replacements", [0, 1, 2])
@pytest.mark.parametrize("there", [False, True], ids=["new", "overwritten"])
def test_a_beginning_with_cell_files_that_was_interrupted(
    there: bool, replacements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, replace, left = tmp_path / "run", os.replace, replacements
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(f"# {name}")
    spec = f"stack({tmp_path / 'a.py'}:A, {tmp_path / 'b.py'}:B)"
    config = Config(model=Model(cell=spec))
    if there:
        RunDirectory.create(path, config)

    def limited(*names: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        replace(*names)

    monkeypatch.setattr(os, "replace", limited)
    with pytest.raises(KeyboardInterrupt):
        RunDirectory.create(path, config, overwrite=there)
    monkeypatch.undo()
    run = RunDirectory.create(path, config)
    assert [copy.read_text() for copy in sorted(run.cells.glob("*.py"))] == ["# a.py", "# b.py"]
    assert run.trusted_cell(True).files == [str(run.cells / "a.py"), str(run.cells / "b.py")]


def test_a_folder_of_cells_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "mine.py").write_text("mine")
    with pytest.raises(RunError, match="nothing is written there"):
        RunDirectory.create(tmp_path, Config())


def test_overwriting_removes_only_files_of_a_run(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", Config())
    run.metrics_file.write_text("{}")
    (run.path / "notes.txt").write_text("mine")
    RunDirectory.create(tmp_path / "run", Config(), overwrite=True)
    assert not run.metrics_file.exists()
    assert (run.path / "notes.txt").read_text() == "mine"


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "pickle.safetensors")
    with pytest.raises(RunError, match="damaged"):
        load_tensors(tmp_path / "pickle.safetensors")
