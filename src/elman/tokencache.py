"""One entry of the token cache: an array of ids on disk, and facts about it that prove it whole."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

__all__ = ["Entry", "write_atomically"]

FORMAT = 1
ABANDONED = 24 * 3600  # seconds after which a half-written file is nobody's


@contextmanager
def write_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under its name complete or not at all; nothing is left behind on an
    error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Entry:
    """``KEY.ids``, the bare little-endian ids, and ``KEY.json``, their facts with a checksum of both.

    The facts are written last: without them there is no entry.
    """

    folder: Path
    key: str
    dtype: np.dtype

    @classmethod
    def of(cls, folder: Path, identity: dict[str, Any], dtype: np.dtype) -> Entry:
        """The entry named by ``identity``, whatever determines the ids."""
        name = {"format": FORMAT, **identity}
        return cls(folder, _digest(name)[:32], dtype.newbyteorder("<"))

    @property
    def ids(self) -> Path:
        return self.folder / f"{self.key}.ids"

    @property
    def facts(self) -> Path:
        return self.folder / f"{self.key}.json"

    @contextmanager
    def writer(self) -> Iterator[BinaryIO]:
        """The file of ids, to be written; it is no entry before ``seal``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f".{self.key}.*.tmp"):  # by processes that were killed while they wrote
            with suppress(FileNotFoundError):
                if left.stat().st_mtime < time.time() - ABANDONED:
                    left.unlink()
        with write_atomically(self.ids) as file:
            yield file

    def seal(self, facts: dict[str, int]) -> None:
        """Make the ids that were written an entry."""
        stored: dict[str, Any] = {**facts, "dtype": self.dtype.str, "ids": _file_digest(self.ids)}
        stored["facts"] = _digest(stored)
        with write_atomically(self.facts) as file:
            file.write(json.dumps(stored, indent=1).encode())

    def load(self) -> tuple[np.ndarray, dict[str, Any]] | None:
        """The mapped ids (N,) and their facts; None if there is no entry or it is not whole."""
        try:
            stored = json.loads(self.facts.read_bytes())
            facts = {name: value for name, value in stored.items() if name != "facts"}
            if stored["facts"] != _digest(facts) or facts["ids"] != _file_digest(self.ids):
                return None
            return np.memmap(self.ids, self.dtype, mode="r"), facts
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return None  # whatever is wrong with the entry, the remedy is the same: make it again


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
