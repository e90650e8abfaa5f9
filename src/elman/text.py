"""Text: files → characters → token ids, exactly and with bounded memory.

A :class:`Tokenizer` turns text into ids and back: ``byte`` (256 ids, any file) or ``char`` (one id for
each symbol of the training text, id 0 for all others). :func:`tokenise` does it once per content, into a
memory-mapped array.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .errors import DataError, InputError, OptionError, RunError, UsageError, counted
from .tokencache import Entry, write_atomically

__all__ = [
    "Split",
    "StreamDecoder",
    "Tokenizer",
    "Tokens",
    "default_text",
    "default_text_sha256",
    "read_text",
    "split",
    "tokenise",
    "write_default_text",
]

KINDS = ("byte", "char")
UNKNOWN = "\ufffd"
_SURROGATE = re.compile("[\ud800-\udfff]")
BLOCK = 1 << 20  # bytes read, or ids looked at, at a time

Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Tokenizer:
    """Text ↔ ids, without loss.

    ``byte``: the 256 bytes of the UTF-8 form. ``char``: id 0 stands for every unknown character and is
    decoded to U+FFFD; ids 1, 2, … are ``symbols``, the sorted Unicode code points of the training text.
    Newlines are symbols like any other and are never translated.
    """

    kind: str
    symbols: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise OptionError.unknown("kind of tokens", str(self.kind), KINDS)

    @classmethod
    def build(cls, kind: str, *sources: Source | Iterable[Source]) -> Tokenizer:
        """The tokenizer for ``sources``: each a ``str``, text, or a ``Path``, a file; or lists of them.

        ``byte`` needs no text and reads none. Raises OptionError (unknown kind) and DataError (no
        characters, or a file that :func:`read_text` would not take).
        """
        tokenizer = cls(kind)
        if kind == "byte":
            return tokenizer
        seen: set[str] = set()
        for source in _flat(sources):
            for piece in [source] if isinstance(source, str) else _characters(Path(source)):
                seen.update(piece)
        if not seen:
            raise DataError("char tokens need the training text, and it holds no characters: name a text file")
        symbols = "".join(sorted(seen))
        if _SURROGATE.search(symbols):
            raise InputError("the text holds lone surrogates, which are not Unicode characters: decode it as UTF-8")
        return cls(kind, symbols)

    @property
    def vocab_size(self) -> int:
        """Number of ids V, the unknown symbol included."""
        return 256 if self.kind == "byte" else len(self.symbols) + 1

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned integer type that holds every id."""
        return np.min_scalar_type(self.vocab_size - 1)

    def encode(self, text: str) -> np.ndarray:
        """The ids of ``text``, of type ``dtype``; unknown characters become id 0 (``char``).

        Bytes that Python smuggled into a string (``surrogateescape``, as in ``sys.argv``) come out as
        those bytes in byte mode. Other lone surrogates have no bytes: InputError.
        """
        if self.kind == "char":
            points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
            return self._id_of_point[np.minimum(points, len(self._id_of_point) - 1)]
        try:
            return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8).copy()
        except UnicodeEncodeError as error:
            raise InputError(
                f"character {error.start} of the text is the lone surrogate {text[error.start]!r}, which "
                "has no UTF-8 form; remove it"
            ) from error

    def decode(self, ids: Any) -> str:
        """The text of ``ids``, the inverse of ``encode``; U+FFFD for invalid UTF-8 and unknown symbols."""
        array = self._checked(ids)
        if self.kind == "byte":
            return array.astype(np.uint8).tobytes().decode("utf-8", "replace")
        return self._point_of_id[array].tobytes().decode("utf-32-le")

    def decode_bytes(self, ids: Any) -> bytes:
        """The bytes of ``ids``: in byte mode exactly those encoded, in char mode the UTF-8 of ``decode``."""
        if self.kind == "byte":
            return self._checked(ids).astype(np.uint8).tobytes()
        return self.decode(ids).encode("utf-8")

    def counts(self, ids: np.ndarray) -> tuple[int, int]:
        """Characters and UTF-8 bytes that ``ids`` stand for; what parts of a text count adds up to the whole.

        In byte mode a character is counted at its first byte (every byte but 10xxxxxx). An unknown symbol
        counts as the three bytes of U+FFFD.
        """
        if self.kind == "byte":
            return sum(_leading(block) for block in _slices(ids)), len(ids)
        return len(ids), sum(int(self._width_of_id[block].sum(dtype=np.int64)) for block in _slices(ids))

    def unknown(self, ids: np.ndarray) -> int:
        """How many of ``ids`` stand for characters outside the vocabulary; never any in byte mode."""
        return 0 if self.kind == "byte" else sum(int((block == 0).sum()) for block in _slices(ids))

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` makes the same tokenizer of."""
        return {"kind": self.kind} if self.kind == "byte" else {"kind": self.kind, "symbols": self.symbols}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Tokenizer:
        """The tokenizer that ``to_json`` described; RunError if it is none."""
        match stored:
            case {"kind": "byte"}:
                return cls("byte")
            case {"kind": "char", "symbols": str(symbols)} if (
                symbols and list(symbols) == sorted(set(symbols)) and not _SURROGATE.search(symbols)
            ):
                return cls("char", symbols)
        raise RunError(
            f"the stored tokenizer is damaged: expected kind 'byte', or kind 'char' with its sorted symbols, "
            f"and got {str(stored)[:80]!r}; take it from a backup or train again"
        )

    @cached_property
    def _id_of_point(self) -> np.ndarray:
        """Code point → id; one entry more than the largest known code point, for all beyond it."""
        points = self._point_of_id[1:]
        table = np.zeros(int(points.max()) + 2, self.dtype)
        table[points] = np.arange(1, self.vocab_size)
        return table

    @cached_property
    def _point_of_id(self) -> np.ndarray:
        return np.frombuffer((UNKNOWN + self.symbols).encode("utf-32-le"), "<u4")

    @cached_property
    def _width_of_id(self) -> np.ndarray:
        """Bytes of each symbol in UTF-8."""
        return 1 + np.digitize(self._point_of_id, [0x80, 0x800, 0x10000]).astype(np.uint8)

    def _checked(self, ids: Any) -> np.ndarray:
        array = np.asarray(ids).reshape(-1)
        if not array.size:
            return np.zeros(0, np.int64)
        if array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= self.vocab_size:
            raise InputError(
                f"ids must be integers from 0 to {self.vocab_size - 1}; got {array.dtype} "
                f"from {array.min()} to {array.max()}"
            )
        return array


class StreamDecoder:
    """Text from ids that arrive one by one.

    ``feed`` gives the characters that have become certain: in byte mode nothing until a character is
    complete, and U+FFFD for bytes that are no UTF-8. All that is fed, then ``finish``, makes the same
    text as ``Tokenizer.decode``.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int) -> str:
        if self._tokenizer.kind == "char":
            return self._tokenizer.decode([int(id)])
        return self._utf8.decode(self._tokenizer.decode_bytes([int(id)]))

    def finish(self) -> str:
        """What is left: U+FFFD if the last character is incomplete. The decoder can then be used anew."""
        rest = self._utf8.decode(b"", True)
        self._utf8.reset()
        return rest


@dataclass(frozen=True, eq=False)
class Tokens:
    """A tokenised text.

    ``ids`` (N,) is mapped from disk, read-only. ``sha256`` is that of the files' contents one after the
    other (``cat FILES | sha256sum``). ``characters`` and ``bytes`` count the text that became tokens (a
    byte-order mark is no part of it in char mode), ``unknown`` the tokens outside the vocabulary.
    ``reused`` says that nothing had to be tokenised.
    """

    ids: np.ndarray
    sha256: str
    characters: int
    bytes: int
    unknown: int
    files: tuple[Path, ...]
    reused: bool


class Split(NamedTuple):
    """Contiguous blocks of a text, in this order."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


def read_text(path: Source) -> str:
    """The text of a UTF-8 file: newlines as they are, a byte-order mark at the start left out.

    Raises DataError, naming the file and the place, if it is missing, a directory, empty, binary or not
    UTF-8.
    """
    return "".join(_characters(Path(path)))


def tokenise(paths: Sequence[Source], tokenizer: Tokenizer, cache: Source) -> Tokens:
    """The ids of the files, one after the other and nothing between, as an array mapped from ``cache``.

    The entry there is named by the contents of the files and the tokenizer, so that a second call only checks
    it (sha256) and maps it; a damaged entry is made again. Each file is written under another name and
    then moved into place, and equal names mean equal contents: any number of processes may do so at once.
    Memory stays bounded whatever the size of the files. Byte mode takes every byte of any file that is
    not empty.

    Raises DataError for a file that cannot be used and for a cache that cannot be written.
    """
    files = tuple(Path(path) for path in paths)
    if not files:
        raise UsageError("no file to tokenise was given: name at least one text file")
    sha256, sizes = _fingerprint(files)
    entry = Entry.of(Path(cache), {"sha256": sha256, "sizes": sizes, "tokenizer": tokenizer.to_json()}, tokenizer.dtype)
    found = entry.load()
    if found is None:
        try:
            _tokenise_into(entry, files, tokenizer, sha256)
        except OSError as error:
            raise DataError(
                f"cannot write the token cache in {cache}: {error.strerror or error}; free some space "
                "there or choose another directory with the environment variable ELMAN_CACHE"
            ) from error
        found = entry.load()
        if found is None:
            raise DataError(f"the token cache in {cache} does not hold what was written to it: check that disk")
        reused = False
    else:
        reused = True
    ids, facts = found
    return Tokens(ids, sha256, facts["characters"], facts["bytes"], facts["unknown"], files, reused)


def split(tokens: Tokens | np.ndarray, valid: float, test: float) -> Split:
    """Cut a text into contiguous blocks: training, then the fractions ``valid`` and ``test`` of it.

    Raises OptionError for impossible fractions and DataError if a block that is asked for gets fewer than
    two tokens, since the first token of a block is not predicted.
    """
    ids = tokens.ids if isinstance(tokens, Tokens) else tokens
    for name, fraction in (("valid", valid), ("test", test)):
        if not 0 <= fraction < 1:
            raise OptionError(f"{name} must be a fraction of the text, from 0 to below 1; got {fraction}")
    if valid + test >= 1:
        raise OptionError(f"valid {valid} and test {test} leave nothing to train on; together they must stay below 1")
    sizes = {"valid": round(len(ids) * valid), "test": round(len(ids) * test)}
    sizes["train"] = len(ids) - sizes["valid"] - sizes["test"]
    for name, fraction in (("train", 1 - valid - test), ("valid", valid), ("test", test)):
        if fraction and sizes[name] < 2:
            raise DataError(
                f"the text is too short: its {name} block, {fraction:.3g} of {counted(len(ids))}, has {sizes[name]} "
                f"and needs at least 2. Give more text, hold out {'less' if name == 'train' else 'more'} of it "
                "(--set data.valid_fraction=…, --set data.test_fraction=…) or name held-out texts of their own "
                "(--valid FILE, --test FILE)"
            )
    end = sizes["train"] + sizes["valid"]
    return Split(ids[: sizes["train"]], ids[sizes["train"] : end], ids[end:])


def default_text() -> str:
    """The interpreter's own manual: the texts of ``pydoc_data.topics``, by name, a newline between two.

    About 465,000 characters; the text depends on the version of Python, so record
    ``default_text_sha256``. The manual repeats itself: about a fifth of its paragraphs stand in more than
    one topic. DataError where Python was installed without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError("this Python was installed without its manual (pydoc_data): name a text file") from error
    return "\n".join(topics[name] for name in sorted(topics))


def default_text_sha256() -> str:
    """sha256 of ``default_text`` in UTF-8."""
    return hashlib.sha256(default_text().encode()).hexdigest()


def write_default_text(folder: Source) -> Path:
    """``default_text`` as ``pydoc_topics.txt`` in ``folder``, so that it takes the way of any other file."""
    path = Path(folder) / "pydoc_topics.txt"
    content = default_text().encode()
    try:
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            with write_atomically(path) as file:
                file.write(content)
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror or error}; choose another directory with the environment "
            "variable ELMAN_CACHE"
        ) from error
    return path


def _flat(sources: Iterable[Source | Iterable[Source]]) -> Iterator[Source]:
    for source in sources:
        if isinstance(source, str | os.PathLike):
            yield source
        else:
            yield from source


def _slices(ids: np.ndarray) -> Iterator[np.ndarray]:
    """Views that together are ``ids``, so that what is computed of one stays small."""
    return (ids[start : start + BLOCK] for start in range(0, len(ids), BLOCK))


def _leading(bytes: np.ndarray) -> int:
    return int(((bytes & 0xC0) != 0x80).sum())


def _blocks(path: Path, digest: Any = None) -> Iterator[bytes]:
    """The bytes of a file, ``BLOCK`` at a time; ``digest`` is fed with them. DataError if there are none
    to have."""
    try:
        if path.is_dir():
            raise DataError(f"{path} is a directory: name the files in it, for example {path}/*.txt")
        if path.exists() and not path.is_file():
            raise DataError(f"{path} is no regular file and can be read only once: store its text in a file first")
        with open(path, "rb") as file:
            block = file.read(BLOCK)
            if not block:
                raise DataError(f"{path} is empty: name a file with text in it")
            while block:
                if digest is not None:
                    digest.update(block)
                yield block
                block = file.read(BLOCK)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist (looked for in {Path.cwd()}): check its name") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _characters(path: Path, digest: Any = None) -> Iterator[str]:
    """The characters of a strict UTF-8 file, piece by piece."""
    offset, line, column, pending, empty = 0, 1, 1, b"", True
    for block in _blocks(path, digest):
        if offset == 0:
            _check_start(path, block)
            if block.startswith(codecs.BOM_UTF8):
                block, offset = block[3:], 3
        nul = block.find(0)
        if nul >= 0:
            raise DataError(
                f"{path} is a binary file: it holds a NUL byte at offset {offset + len(pending) + nul}. Name "
                "a text file, or train with --tokens byte, which reads every file as it is"
            )
        data = pending + block
        piece, used = _decode(path, data, offset, line, column, final=False)
        offset, line, column, pending = offset + used, *_advance(piece, line, column), data[used:]
        empty = empty and not piece
        yield piece
    _decode(path, pending, offset, line, column, final=True)
    if empty:
        raise DataError(f"{path} is empty but for a byte-order mark: name a file with text in it")


def _check_start(path: Path, block: bytes) -> None:
    if block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        code = "UTF-32" if block.startswith(codecs.BOM_UTF32_LE) else "UTF-16"
        raise DataError(f"{path} is {code}, by its byte-order mark at offset 0, and not UTF-8. {_way_out(path, code)}")


def _decode(path: Path, data: bytes, offset: int, line: int, column: int, *, final: bool) -> tuple[str, int]:
    """Characters and how many bytes they took; what may be the start of a character waits unless
    ``final``."""
    try:
        return codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as error:
        line, column = _advance(data[: error.start].decode(), line, column)
        raise DataError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {offset + error.start}, line "
            f"{line}, column {column} ({error.reason}). {_way_out(path, 'LATIN1')}"
        ) from error


def _way_out(path: Path, code: str) -> str:
    """What to do with a text in another code than UTF-8."""
    convert = f"iconv -f {code} -t UTF-8 {shlex.quote(str(path))} > new.txt"
    return f"Convert the file ({convert}), or train with --tokens byte, which reads every file as it is"


def _advance(piece: str, line: int, column: int) -> tuple[int, int]:
    """Line and column (from 1) of the character after ``piece``."""
    newlines = piece.count("\n")
    return line + newlines, len(piece) - piece.rfind("\n") if newlines else column + len(piece)


def _fingerprint(files: Sequence[Path]) -> tuple[str, list[int]]:
    digest = hashlib.sha256()
    sizes = [sum(len(block) for block in _blocks(path, digest)) for path in files]
    return digest.hexdigest(), sizes


def _tokenise_into(entry: Entry, files: Sequence[Path], tokenizer: Tokenizer, sha256: str) -> None:
    digest = hashlib.sha256()
    facts = {"characters": 0, "bytes": 0, "unknown": 0}
    with entry.writer() as file:
        for path in files:
            if tokenizer.kind == "byte":
                for block in _blocks(path, digest):
                    file.write(block)
                    facts["characters"] += _leading(np.frombuffer(block, np.uint8))
                    facts["bytes"] += len(block)
            else:
                for piece in _characters(path, digest):
                    ids = tokenizer.encode(piece)
                    file.write(ids.astype(entry.dtype, copy=False).tobytes())
                    facts["characters"] += len(piece)
                    facts["bytes"] += len(piece.encode())
                    facts["unknown"] += int((ids == 0).sum())
        if digest.hexdigest() != sha256:
            names = ", ".join(map(str, files))
            raise DataError(f"a file changed while it was being read ({names}): run again when it is complete")
    entry.seal(facts)
