"""Run directories and checkpoints: safetensors and JSON only, each file whole or absent, nothing unpickled.

RUN/config.json               format version, settings, the user's own cell file and its hash
RUN/data.json                 hash of the text that was trained on
RUN/tokenizer.json            symbols and their numbers
RUN/model.safetensors         the best weights so far (by validation)
RUN/checkpoints/last.safetensors, best.safetensors
                              everything that continuing needs
RUN/metrics.jsonl, loss.png   what happened
RUN/result.json               held-out figures of a finished run
RUN/cell.py                   copy of the user's own cell file, where there is one
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .config import Config, build_config
from .errors import OptionError, RunError

__all__ = [
    "FORMAT",
    "RunDirectory",
    "cannot_write",
    "load_tensors",
    "read_json",
    "save_tensors",
    "write_atomic",
    "write_json",
]

FORMAT = 1

_KNOWN = (
    "model.safetensors",
    "metrics.jsonl",
    "loss.png",
    "result.json",
    "tokenizer.json",
    "data.json",
    "cell.py",
    "checkpoints/last.safetensors",
    "checkpoints/best.safetensors",
    "config.json",  # last: while it stands, the directory is still a run that can be overwritten
)


class RunDirectory:
    """One training run on disk; knows names and formats, nothing about what is trained."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.json"
        self.data_file = self.path / "data.json"
        self.tokenizer_file = self.path / "tokenizer.json"
        self.model_file = self.path / "model.safetensors"
        self.metrics_file = self.path / "metrics.jsonl"
        self.picture_file = self.path / "loss.png"
        self.result_file = self.path / "result.json"
        self.cell_file = self.path / "cell.py"
        self.last_file = self.path / "checkpoints" / "last.safetensors"
        self.best_file = self.path / "checkpoints" / "best.safetensors"

    @classmethod
    def create(cls, path: str | Path, config: Config, *, overwrite: bool = False) -> RunDirectory:
        """A new run directory holding ``config`` and a copy of the user's own cell file, if one is named.

        Raises RunError when the directory already holds a run (``overwrite=True`` removes its files first) or
        anything else (never removed).
        """
        run = cls.check_free(path, overwrite=overwrite)
        if run.config_file.exists():
            run._clear()
        try:
            run.last_file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"cannot create {run.path}: {error.strerror}. Choose another directory with --out."
            ) from error
        cell = None
        file, name = split_cell(config.model.cell)
        if file is not None:
            source = _read(file, "the cell file")
            write_atomic(run.cell_file, source)
            cell = {"class": name, "sha256": hashlib.sha256(source).hexdigest()}
        run.write_config(config, cell)
        return run

    @classmethod
    def check_free(cls, path: str | Path, *, overwrite: bool = False) -> RunDirectory:
        """The directory as a place for a new run. Raises RunError as ``create`` does; changes nothing."""
        run = cls(path)
        if any("\ud800" <= mark <= "\udfff" for mark in str(run.path)):
            raise RunError(
                f"{str(run.path)!r} has bytes in it that are not UTF-8, and checkpoints need a name that is. "
                f"Choose another directory with --out."
            )
        if run.config_file.exists():
            if not overwrite:
                raise RunError(
                    f"{run.path} already holds a run. Choose another directory with --out, replace the run with "
                    f"--overwrite, or continue it with: {run.command('resume')}"
                )
        elif run.path.exists() and not (run.path.is_dir() and all(map(_leftover, run.path.iterdir()))):
            raise RunError(
                f"{run.path} exists and is not a run directory of elman, so nothing is written there. "
                f"Choose another directory with --out."
            )
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """An existing run directory. Raises RunError when there is none, or one of another format version."""
        run = cls(path)
        if not run.config_file.is_file():
            raise RunError(f"{run.path} is not a run directory: it has no config.json. Train one with 'elman train'.")
        content = read_json(run.config_file)
        if content.get("format") != FORMAT:
            raise RunError(
                f"{run.path} has run format {content.get('format')!r}, and this version of elman reads "
                f"format {FORMAT}. Use the version that wrote it: {content.get('elman', 'unknown')}."
            )
        return run

    def write_config(self, config: Config, cell: Mapping[str, str] | None) -> None:
        from . import __version__

        content = {
            "format": FORMAT,
            "elman": __version__,
            "cell_file": cell,
            "settings": config.model_dump(mode="json"),
        }
        write_json(self.config_file, content)

    def config(self) -> Config:
        """The settings of the run. Raises RunError when the file is damaged."""
        try:
            return build_config(read_json(self.config_file)["settings"])
        except (KeyError, TypeError, OptionError) as error:
            raise RunError(f"{self.config_file} is damaged: {error}. Restore it, or train again.") from error

    def cell(self) -> dict[str, str] | None:
        """Class and hash of the user's own cell file; None for a run with a cell of elman."""
        return read_json(self.config_file).get("cell_file")

    def trusted_cell(self, trust: bool) -> str | None:
        """``RUN/cell.py:Class`` when the run has the user's own cell; None when it has not.

        Raises RunError without ``trust``, because loading runs the code of that file, and when the file is no
        longer the one that was trained with.
        """
        cell = self.cell()
        if cell is None:
            return None
        if not trust:
            raise RunError(
                f"{self.path} was trained with its own cell, {cell['class']} in {self.cell_file}, and "
                f"loading it runs that code. Read the file, and if you trust it, add --trust (in Python: "
                f"trust=True)."
            )
        if hashlib.sha256(_read(self.cell_file, "the cell file")).hexdigest() != cell["sha256"]:
            raise RunError(
                f"{self.cell_file} is not the file this run was trained with: its SHA-256 is not the "
                f"recorded {cell['sha256'][:16]}…. Restore the file, or train again with the changed one."
            )
        return f"{self.cell_file}:{cell['class']}"

    def command(self, verb: str, *more: object) -> str:
        """The command line ``elman VERB RUN MORE``, to be pasted into a shell: quoted, and with --trust where the
        run has the user's own cell."""
        name = str(self.path)
        words = ["elman", verb, f"./{name}" if name.startswith("-") else name, *map(str, more)]
        # A damaged config.json is reported by what opens the run, not by what only mentions it.
        with suppress(RunError):
            words += ["--trust"] if self.cell() is not None else []
        return shlex.join(words)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for one training process; the system lets go of it when the process ends in any way.

        Raises RunError when another process holds it.
        """
        if sys.platform == "win32":
            yield
            return
        import fcntl

        with open(self.path / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunError(f"another process is training {self.path}; wait for it or stop it first.") from error
            yield

    def _clear(self) -> None:
        with self.lock():
            for name in _KNOWN:
                (self.path / name).unlink(missing_ok=True)


def split_cell(cell: str) -> tuple[str | None, str]:
    """``"my.py:MyCell"`` → ``("my.py", "MyCell")``; the name of a cell of elman → ``(None, name)``."""
    file, colon, name = cell.rpartition(":")
    return (file, name) if colon and file else (None, cell)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that at any moment the old or the new content stands there in full.

    Raises RunError when the system cannot write (no space left, no permission); the old content stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> RunError:
    """What to say when the system does not write a file of a run."""
    run = RunDirectory(path.parent.parent if path.parent.name == "checkpoints" else path.parent)
    way_out = f"continue with: {run.command('resume')}" if run.config_file.exists() else "train again."
    return RunError(
        f"cannot write {path}: {error.strerror or error}. What was saved before is intact; make room or "
        f"change the permissions, then {way_out}"
    )


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, indented, with a line end."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # A file name that is no UTF-8 holds lone surrogates; replaced like this they are JSON's own escapes.
    write_atomic(path, text.encode(errors="backslashreplace"))


def read_json(path: Path) -> Any:
    """Content of a JSON object file. Raises RunError when it is missing or damaged."""
    try:
        content = json.loads(_read(path, "a file of the run"))
    except ValueError as error:
        raise RunError(f"{path} is damaged: it is not valid JSON ({error}). Restore it, or train again.") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged: it should hold a JSON object. Restore it, or train again.")
    return content


def save_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Named tensors and JSON facts in one safetensors file, with a checksum over both, written atomically."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(facts, sort_keys=True)
    # One metadata entry only: the order of several is not fixed, and equal runs must give equal bytes.
    metadata = {"elman": json.dumps({"facts": text, "sha256": _digest(plain, text)}, sort_keys=True)}
    write_atomic(path, save(plain, metadata=metadata))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``save_tensors`` wrote. Raises RunError when the file is missing, cut off or changed."""
    if not path.is_file():
        raise RunError(f"{path} does not exist: nothing was saved there.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies, because a tensor in the mapped file starts at any byte, and how some kernels round
            # depends on the alignment of their operands: a resumed run would differ in the last bit.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
        header = json.loads(metadata["elman"])
        text, digest = header["facts"], header["sha256"]
        facts = json.loads(text)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise RunError(f"{path} is damaged: {error}.") from error
    if _digest(tensors, text) != digest:
        raise RunError(f"{path} is damaged: its checksum does not match its content.")
    return tensors, facts


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: str | Path, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise RunError(f"cannot read {what}, {path}: {error.strerror}.") from error


def _leftover(path: Path) -> bool:
    """What an interrupted ``create`` may have left before config.json stood."""
    if path.name == "checkpoints":
        return not any(path.iterdir())
    return path.name in (".config.json.tmp", ".cell.py.tmp", "cell.py", ".lock")


def _sync_directory(path: Path) -> None:
    if sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
