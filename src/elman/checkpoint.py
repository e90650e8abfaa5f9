"""Run directories and checkpoints: safetensors and JSON only, each file whole or absent, nothing unpickled.

RUN/config.json               format version, settings, the users' own cell files and their hashes
RUN/data.json                 hash of the text that was trained on
RUN/tokenizer.json            symbols and their numbers
RUN/model.safetensors         the best weights so far (by validation)
RUN/checkpoints/last.safetensors, best.safetensors
                              everything that continuing needs
RUN/metrics.jsonl, loss.png   what happened
RUN/result.json               held-out figures of a finished run
RUN/cells/NAME.py             copies of the users' own cell files, where the cell names any
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
from .spec import Spec, parse_spec

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

FORMAT = 2
"""Version of the layout of a run directory and of the names of its weights. 2: a network holds one cell, a stack of
layers; the files of users' cells lie in cells/."""

_KNOWN = (
    "model.safetensors",
    "metrics.jsonl",
    "loss.png",
    "result.json",
    "tokenizer.json",
    "data.json",
    "cell.py",  # of format 1
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
        self.cells = self.path / "cells"
        self.last_file = self.path / "checkpoints" / "last.safetensors"
        self.best_file = self.path / "checkpoints" / "best.safetensors"

    @classmethod
    def create(cls, path: str | Path, config: Config, *, overwrite: bool = False) -> RunDirectory:
        """A new run directory holding ``config`` and copies of the users' own cell files that its cell names.

        Raises RunError when the directory already holds a run (``overwrite=True`` removes its files first) or
        anything else (never removed).
        """
        sources = {file: _read(file, "the cell file") for file in parse_spec(config.model.cell).files}
        run = cls.check_free(path, overwrite=overwrite)
        if run.config_file.exists():
            run._clear()
        try:
            run.last_file.parent.mkdir(parents=True, exist_ok=True)
            if sources:
                run.cells.mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(
                f"cannot create {run.path}: {error.strerror}. Choose another directory with --out."
            ) from error
        files = _copies(sources)
        for file, source in sources.items():
            write_atomic(run.cells / files[file]["copy"], source)
        run.write_config(config, files)
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
        elif run.path.exists() and not (run.path.is_dir() and _leftover(run.path)):
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
                f"format {FORMAT}. Train it again, with --overwrite, or use the version of elman that wrote it "
                f"({content.get('elman', 'unknown')})."
            )
        return run

    def write_config(self, config: Config, files: Mapping[str, Mapping[str, str]]) -> None:
        """Write settings and, as ``cell_files`` gives them, the records of the users' own cell files."""
        from . import __version__

        content = {
            "format": FORMAT,
            "elman": __version__,
            "cell_files": files,
            "settings": config.model_dump(mode="json"),
        }
        write_json(self.config_file, content)

    def config(self) -> Config:
        """The settings of the run. Raises RunError when the file is damaged."""
        try:
            return build_config(read_json(self.config_file)["settings"])
        except (KeyError, TypeError, OptionError) as error:
            raise RunError(f"{self.config_file} is damaged: {error}. Restore it, or train again.") from error

    def spec(self) -> Spec:
        """The cell of the run as it was given. Raises RunError when the file is damaged."""
        try:
            return parse_spec(self.config().model.cell)
        except OptionError as error:
            raise RunError(f"{self.config_file} is damaged: {error} Restore it, or train again.") from error

    def cell_files(self) -> dict[str, dict[str, str]]:
        """For each user's own cell file, as the cell names it, its ``copy`` (a name in RUN/cells) and ``sha256``.

        Raises RunError when these are not the files that the cell names, or the copy of one lies elsewhere.
        """
        files = read_json(self.config_file).get("cell_files")
        try:
            sound = sorted(files) == sorted(self.spec().files) and all(
                Path(file["copy"]).name == file["copy"] and isinstance(file["sha256"], str) for file in files.values()
            )
        except (AttributeError, KeyError, TypeError):
            sound = False
        if not sound:
            raise RunError(
                f"{self.config_file} is damaged: its cell_files are not those that its cell names. Restore it, or "
                f"train again."
            )
        return files

    def trusted_cell(self, trust: bool) -> Spec:
        """The cell of the run; where it names users' own files, they are the run's copies of them.

        Raises RunError without ``trust`` where it names any, because loading then runs their code, and when a copy is
        no longer the file that was trained with.
        """
        files = self.cell_files()
        copies = {given: self.cells / file["copy"] for given, file in files.items()}
        if files and not trust:
            places = " and ".join(map(str, copies.values()))
            raise RunError(
                f"{self.path} was trained with a cell of its own, {_classes(self.spec())} in {places}, and "
                f"loading it runs that code. Read it, and if you trust it, add --trust (in Python: trust=True)."
            )
        for given, file in files.items():
            if hashlib.sha256(_read(copies[given], "the cell file")).hexdigest() != file["sha256"]:
                raise RunError(
                    f"{copies[given]} is not the file this run was trained with: its SHA-256 is not the "
                    f"recorded {file['sha256'][:16]}…. Restore the file, or train again with the changed one."
                )
        return self.spec().moved({given: str(copy) for given, copy in copies.items()})

    def command(self, verb: str, *more: object) -> str:
        """The command line ``elman VERB RUN MORE``, to be pasted into a shell: quoted, and with --trust where the
        run has a cell of a user's own."""
        name = str(self.path)
        words = ["elman", verb, f"./{name}" if name.startswith("-") else name, *map(str, more)]
        # A damaged config.json is reported by what opens the run, not by what only mentions it.
        with suppress(RunError):
            words += ["--trust"] if self.spec().files else []
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
            copies: list[str] = []
            with suppress(RunError):  # the copies of a damaged run, or of one of another format, are left
                copies = [f"{self.cells.name}/{file['copy']}" for file in self.cell_files().values()]
            for name in (*copies, *_KNOWN):
                (self.path / name).unlink(missing_ok=True)
        with suppress(OSError):  # where something else lies there too
            self.cells.rmdir()


def _copies(sources: Mapping[str, bytes]) -> dict[str, dict[str, str]]:
    """Under what name each file is copied, none twice even where capitals do not count, and its hash."""
    found: dict[str, dict[str, str]] = {}
    taken: set[str] = set()
    for file, source in sources.items():
        path, number = Path(file), 1
        name = path.name
        while name.lower() in taken:
            number += 1
            name = f"{path.stem}-{number}{path.suffix}"
        taken.add(name.lower())
        found[file] = {"copy": name, "sha256": hashlib.sha256(source).hexdigest()}
    return found


def _classes(spec: Spec) -> str:
    return ", ".join(dict.fromkeys(inner.name for inner in spec.nested() if inner.file is not None))


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
    """Whether a directory holds no more than an interrupted ``create`` may leave before config.json stands."""
    found = {entry.name: entry for entry in path.iterdir()}
    empty = all(not any(entry.iterdir()) for name, entry in found.items() if name == "checkpoints")
    begun = not found or ".lock" in found or "checkpoints" in found  # what is made first
    return begun and empty and found.keys() <= {".config.json.tmp", "checkpoints", "cells", ".lock"}


def _sync_directory(path: Path) -> None:
    if sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
