"""Machine code on disk: objects by the hash of all that they are made from.

An entry is never trusted for being there. Its folder and its file must belong to the user and be writable by no one
else, and it opens with a checksum over its key and its content, so that what is truncated, damaged or renamed counts as
missing. Entries appear whole or not at all (a new name, then a rename), so processes may share a folder without locks.
Where a folder cannot be used there is simply no cache: nothing here raises. On systems without POSIX ownership there is
none either.
"""

from __future__ import annotations

import os
import secrets
import stat
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

__all__ = ["LIMIT", "key_of", "read", "write"]

LIMIT = 256 << 20
"""Bytes that a folder may hold; beyond it, what was read longest ago is dropped."""

_FORMAT = "1"
_MAGIC = b"elman machine code " + _FORMAT.encode() + b"\n"
_DIGEST = sha256().digest_size
_ABANDONED = 3600.0  # seconds after which what was not renamed never will be


def key_of(*parts: str) -> str:
    """A name for what is made from these texts, and in this format."""
    digest = sha256()
    for part in (_FORMAT, *parts):
        text = part.encode()
        digest.update(len(text).to_bytes(8, "little") + text)  # the length, so that no two lists read the same
    return digest.hexdigest()


def read(directory: Path, key: str) -> bytes | None:
    """What was written under a key; None where there is nothing, or nothing to be trusted."""
    folder = _opened(directory)
    if folder is None:
        return None
    try:
        content = _content(folder, key)
    except OSError:
        return None
    finally:
        os.close(folder)
    start = len(_MAGIC) + _DIGEST
    if content[: len(_MAGIC)] != _MAGIC or content[len(_MAGIC) : start] != _checksum(key, content[start:]):
        return None
    return content[start:]


def write(directory: Path, key: str, data: bytes, limit: int = LIMIT) -> bool:
    """Keep some bytes under a key; False where that is not possible."""
    folder = _opened(directory, create=True)
    if folder is None:
        return False
    temporary = f".{key}.{secrets.token_hex(8)}"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode=0o600, dir_fd=folder)
        with open(descriptor, "wb") as file:
            file.write(_MAGIC + _checksum(key, data) + data)
        os.replace(temporary, key, src_dir_fd=folder, dst_dir_fd=folder)
        _drop_oldest(folder, limit)
    except OSError:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        return False
    finally:
        os.close(folder)
    return True


def _checksum(key: str, data: bytes) -> bytes:
    return sha256(key.encode() + data).digest()


def _opened(directory: Path, create: bool = False) -> int | None:
    """The folder of this format, held open so that no other can be put in its place; None if it is not the user's."""
    if os.name != "posix":
        return None
    path = directory / "machine-code" / f"v{_FORMAT}"
    try:
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=0o700, exist_ok=True)
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    if _own(os.fstat(folder)):
        return folder
    os.close(folder)
    return None


def _own(status: os.stat_result) -> bool:
    """Whether it is the user's and nobody else may write to it."""
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _content(folder: int, key: str) -> bytes:
    descriptor = os.open(key, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not (stat.S_ISREG(status.st_mode) and _own(status)):
            return b""
        with suppress(OSError):
            os.utime(descriptor)  # read just now: the last to be dropped
        return file.read()


def _drop_oldest(folder: int, limit: int) -> None:
    found = []
    now = time.time()
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # another process drops entries too
                status = entry.stat(follow_symlinks=False)
                if entry.name.startswith(".") and now - status.st_mtime < _ABANDONED:
                    continue  # another process writes it
                found.append((status.st_mtime_ns, status.st_size, entry.name))
    excess = sum(size for _, size, _ in found) - limit
    for _, size, name in sorted(found):
        if excess <= 0:
            break
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)
        excess -= size
