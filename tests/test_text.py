"""Text to ids and back: exact round trips, strict files, a cache that is right or made again."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elman import text as text_module
from elman import tokencache
from elman.errors import DataError, InputError, OptionError, RunError, UsageError
from elman.text import (
    StreamDecoder,
    Tokenizer,
    default_text,
    default_text_sha256,
    read_text,
    split,
    tokenise,
    write_default_text,
)

TEXTS = ["a", "naïve café\r\n\r", "日本語 🙂 \ufffd\n", "\t\x00\x7f", "\ufeffmark", "e\u0301 is not \u00e9"]
BYTE = Tokenizer.build("byte")


@pytest.fixture
def write(tmp_path):
    def write(content: bytes | str, name: str = "a.txt") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.fixture(params=[5, 1 << 20], ids=["tiny blocks", "one block"])
def block(request, monkeypatch):
    monkeypatch.setattr(text_module, "BLOCK", request.param)


@pytest.mark.parametrize("kind", ["byte", "char"])
@given(text=st.text(min_size=1))
def test_round_trip_of_any_known_text(kind, text):
    tokenizer = Tokenizer.build(kind, text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.unknown(ids) == 0
    assert tokenizer.counts(ids) == (len(text), len(text.encode()))
    again = Tokenizer.from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again == tokenizer
    np.testing.assert_array_equal(again.encode(text), ids)


@pytest.mark.parametrize(
    ("symbols", "dtype"), [(255, np.uint8), (256, np.uint16), (65535, np.uint16), (65536, np.uint32)]
)
def test_smallest_type_that_holds_the_ids(symbols, dtype):
    text = "".join(chr(0x10000 + i) for i in range(symbols))
    tokenizer = Tokenizer.build("char", text)
    assert tokenizer.vocab_size == symbols + 1
    ids = tokenizer.encode(text)
    assert ids.dtype == dtype == tokenizer.dtype
    assert ids.tolist() == list(range(1, symbols + 1))


def test_byte_ids_are_the_utf8_bytes():
    ids = BYTE.encode("é\n")
    assert (ids.dtype, ids.tolist(), BYTE.vocab_size) == (np.uint8, [0xC3, 0xA9, 10], 256)
    assert ids.flags.writeable


def test_symbols_are_sorted_after_the_unknown_one():
    tokenizer = Tokenizer.build("char", "cab", "bad\n")
    assert tokenizer.symbols == "\nabcd"
    assert tokenizer.encode("a\nd").tolist() == [2, 1, 5]


@pytest.mark.parametrize("unknown", ["z", "\x01", "🙂", "\ufffd", chr(0xDC80)])
def test_unknown_characters_become_id_0_and_are_counted(unknown):
    tokenizer = Tokenizer.build("char", "abc")
    ids = tokenizer.encode(f"a{unknown}b{unknown}")
    assert ids.tolist() == [1, 0, 2, 0]
    assert tokenizer.unknown(ids) == 2
    assert tokenizer.decode(ids) == "a\ufffdb\ufffd"
    assert tokenizer.counts(ids) == (4, 8)


def test_a_replacement_character_of_the_training_text_is_known():
    tokenizer = Tokenizer.build("char", "a\ufffd")
    assert tokenizer.encode("\ufffda").tolist() == [2, 1]


def test_build_takes_texts_files_and_lists_of_both(write):
    path = write("xy\r\n")
    built = [Tokenizer.build("char", *sources) for sources in [(path, "ab"), ([path, "ab"],), ("ab", [path])]]
    assert {tokenizer.symbols for tokenizer in built} == {"\n\rabxy"}


@pytest.mark.parametrize("sources", [(), ("",), ([],)])
def test_char_needs_characters(sources):
    with pytest.raises(DataError, match="no characters"):
        Tokenizer.build("char", *sources)


@pytest.mark.parametrize("kind", ["chars", "word", "Byte"])
def test_unknown_kind_suggests_the_nearest(kind):
    with pytest.raises(OptionError, match=r"'byte'|'char'|Known: byte, char"):
        Tokenizer.build(kind, "a")


def test_smuggled_bytes_of_a_command_line_come_out_as_bytes():
    assert BYTE.encode(b"caf\xe9".decode("utf-8", "surrogateescape")).tolist() == list(b"caf\xe9")


def test_lone_surrogates_are_refused():
    with pytest.raises(InputError, match=r"character 1 .*ud800"):
        BYTE.encode("a\ud800")
    with pytest.raises(InputError, match="surrogates"):
        Tokenizer.build("char", "a\ud800")


@pytest.mark.parametrize("ids", [[256], [-1], [0.5], [[300]]])
def test_decode_refuses_what_is_no_id(ids):
    with pytest.raises(InputError, match="from 0 to 255"):
        BYTE.decode(ids)


def test_decode_of_nothing():
    assert BYTE.decode([]) == Tokenizer.build("char", "a").decode(np.zeros(0, np.uint8)) == ""


@pytest.mark.parametrize(
    "stored",
    [
        None,
        [],
        {},
        {"kind": "word"},
        {"kind": "char"},
        {"kind": "char", "symbols": ""},
        {"kind": "char", "symbols": "ba"},
        {"kind": "char", "symbols": "aa"},
        {"kind": "char", "symbols": ["a"]},
        {"kind": "char", "symbols": "a\ud800"},
    ],
)
def test_damaged_description_is_refused(stored):
    with pytest.raises(RunError, match="tokenizer is damaged"):
        Tokenizer.from_json(stored)


@given(ids=st.lists(st.integers(0, 255)))
def test_stream_decoding_equals_decoding_at_once(ids):
    stream = StreamDecoder(BYTE)
    for _ in range(2):  # finish makes it ready for another text
        assert "".join([*map(stream.feed, ids), stream.finish()]) == BYTE.decode(ids)


def test_stream_decoding_waits_for_whole_characters():
    stream = StreamDecoder(BYTE)
    assert [stream.feed(byte) for byte in "a🙂é".encode()] == ["a", "", "", "", "🙂", "", "é"]
    assert stream.feed(0xC3) == ""
    assert stream.finish() == "\ufffd"
    assert [stream.feed(0xFF), stream.feed(0x41)] == ["\ufffd", "A"]


def test_stream_decoding_of_chars():
    tokenizer = Tokenizer.build("char", "aé")
    stream = StreamDecoder(tokenizer)
    assert [stream.feed(id) for id in (1, 2, 0)] == ["a", "é", "\ufffd"]
    assert stream.finish() == ""


@pytest.mark.parametrize("text", [text for text in TEXTS if "\x00" not in text and text[0] != "\ufeff"])
@pytest.mark.usefixtures("block")
def test_read_text_is_exact(write, text):
    assert read_text(write(text * 3)) == text * 3


@pytest.mark.usefixtures("block")
def test_a_byte_order_mark_is_no_text_but_only_at_the_start(write):
    path = write("\ufeffab\ufeffc")
    assert read_text(path) == "ab\ufeffc"
    tokens = tokenise([path], BYTE, path.parent / "cache")
    assert bytes(tokens.ids) == path.read_bytes()  # bytes are kept, all of them


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.txt is empty"),
        ("\ufeff".encode(), r"a\.txt is empty but for a byte-order mark"),
        (b"one\ntwo\x00three", r"a\.txt is a binary file.*offset 7\..*--tokens byte"),
        ("é".encode() * 20 + b"\x00", r"binary file.*offset 40\b"),
        (b"\x00", r"binary file.*offset 0\b"),
        (
            b"caf\xe9 au lait",
            r"a\.txt is not UTF-8: byte 0xe9 at offset 3, line 1, column 4 .*LATIN1.*--tokens byte",
        ),
        ("ab\nçé".encode() + b"d\xff", r"byte 0xff at offset 8, line 2, column 4 "),
        (b"\xef\xbb\xbf\n\n\xfe", r"byte 0xfe at offset 5, line 3, column 1 "),
        (b"many\nlines\nof text\xc3", r"byte 0xc3 at offset 18, line 3, column 8 \(unexpected end of data\)"),
        (b"\xed\xa0\x80", r"byte 0xed at offset 0, line 1, column 1 "),  # an encoded surrogate
        ("a".encode("utf-16"), r"a\.txt is UTF-16.*offset 0.*iconv -f UTF-16 -t UTF-8"),
        ("a".encode("utf-32"), r"a\.txt is UTF-32.*iconv -f UTF-32"),
    ],
)
@pytest.mark.usefixtures("block")
def test_a_bad_file_is_refused_with_place_and_fix(write, content, message):
    path = write(content)
    for use in (read_text, lambda p: Tokenizer.build("char", p)):
        with pytest.raises(DataError, match=message):
            use(path)


def test_what_is_no_readable_file(tmp_path):
    with pytest.raises(DataError, match=r"none\.txt does not exist"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(DataError, match=r"is a directory.*\*\.txt"):
        read_text(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe is no regular file"):
        read_text(tmp_path / "pipe")
    with pytest.raises(DataError, match="cannot be read"):
        read_text("nul\0name")


@pytest.mark.parametrize("kind", ["byte", "char"])
@pytest.mark.usefixtures("block")
def test_tokenise_once_and_reuse(write, kind, tmp_path):
    paths = [write("eins\r\nzwei ü", "b.txt"), write("日本 drei", "a.txt")]
    whole = "eins\r\nzwei ü日本 drei"
    tokenizer = Tokenizer.build(kind, "eins zweidr\r\nü")
    first, second = (tokenise(paths, tokenizer, tmp_path / "new" / "cache") for _ in range(2))
    assert [first.reused, second.reused] == [False, True]
    for tokens in (first, second):
        np.testing.assert_array_equal(tokens.ids, tokenizer.encode(whole))
        assert isinstance(tokens.ids, np.memmap)
        assert tokens.ids.dtype == tokenizer.dtype
        assert not tokens.ids.flags.writeable
        assert tokens.sha256 == hashlib.sha256(whole.encode()).hexdigest()
        assert (tokens.characters, tokens.bytes) == (len(whole), len(whole.encode()))
        assert tokens.unknown == (0 if kind == "byte" else 2)
        assert tokens.files == tuple(paths)
    assert len(list((tmp_path / "new" / "cache").iterdir())) == 2


def test_the_key_is_content_order_and_tokenizer(write, tmp_path):
    one, two = write("ab", "1.txt"), write("c", "2.txt")
    cache = tmp_path / "cache"
    char = Tokenizer.build("char", "abc")
    tokenise([one, two], char, cache)
    copy = write("ab", "3.txt")
    assert tokenise([copy, two], char, cache).reused
    for paths, tokenizer in [
        ([two, one], char),
        ([one, two], BYTE),
        ([one, two], Tokenizer.build("char", "abcd")),
        ([write("a", "4.txt"), write("bc", "5.txt")], char),
    ]:
        assert not tokenise(paths, tokenizer, cache).reused
    one.write_text("aa")
    assert tokenise([one, two], char, cache).ids.tolist() == [1, 1, 3]


def test_byte_mode_takes_any_file_that_is_not_empty(write, tmp_path):
    everything = bytes(range(256)) * 3
    tokens = tokenise([write(everything)], BYTE, tmp_path / "cache")
    assert bytes(tokens.ids) == everything
    with pytest.raises(DataError, match="empty"):
        tokenise([write(b"")], BYTE, tmp_path / "cache")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _other_count(path: Path) -> None:
    stored = json.loads(path.read_bytes())
    path.write_text(json.dumps({**stored, "characters": 1}))


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".ids", _flip),
        (".ids", Path.unlink),
        (".ids", lambda path: path.write_bytes(b"")),
        (".ids", lambda path: path.write_bytes(path.read_bytes()[:-1])),
        (".ids", lambda path: path.write_bytes(path.read_bytes() + b"\0\0")),
        (".json", _flip),
        (".json", Path.unlink),
        (".json", _other_count),
        (".json", lambda path: path.write_bytes(b"")),
        (".json", lambda path: path.write_bytes(b"\xff")),
        (".json", lambda path: path.write_bytes(b"[]")),
        (".json", lambda path: path.write_bytes(b"{}")),
    ],
)
def test_a_damaged_entry_is_made_again(write, tmp_path, suffix, damage):
    path, cache = write("some text that is not short"), tmp_path / "cache"
    tokenizer = Tokenizer.build("char", path)
    tokenise([path], tokenizer, cache)
    (stored,) = cache.glob(f"*{suffix}")
    damage(stored)
    tokens = tokenise([path], tokenizer, cache)
    assert not tokens.reused
    assert tokenizer.decode(tokens.ids) == path.read_text()
    assert tokens.characters == len(path.read_text())
    assert tokenise([path], tokenizer, cache).reused


def test_a_failed_write_leaves_nothing_behind(write, tmp_path, monkeypatch):
    path, cache = write("text"), tmp_path / "cache"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokencache.os, "replace", full)
    with pytest.raises(DataError, match="No space left on device; free some space"):
        tokenise([path], BYTE, cache)
    assert list(cache.iterdir()) == []


def test_a_bad_file_among_good_ones_leaves_nothing_behind(write, tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match=r"2\.txt is not UTF-8"):
        tokenise([write("ok", "1.txt"), write(b"\xff", "2.txt")], Tokenizer.build("char", "ok"), cache)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_made(write):
    path = write("text")
    with pytest.raises(DataError, match="cannot write the token cache"):
        tokenise([path], BYTE, path / "cache")


def test_no_files():
    with pytest.raises(UsageError, match="at least one"):
        tokenise([], BYTE, "cache")


def test_a_file_that_changes_meanwhile_is_noticed(write, tmp_path, monkeypatch):
    path = write("first")
    monkeypatch.setattr(text_module, "_fingerprint", lambda files: ("0" * 64, [5]))
    with pytest.raises(DataError, match="changed while it was being read"):
        tokenise([path], BYTE, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_a_killed_process_left_is_removed_after_a_day(write, tmp_path):
    path, cache = write("text"), tmp_path / "cache"
    tokenise([path], BYTE, cache)
    (ids,) = cache.glob("*.ids")
    ids.unlink()
    old, young = (cache / f".{ids.name}.{name}.tmp" for name in ("1-old", "2-young"))
    old.touch()
    young.touch()
    os.utime(old, (0, 0))
    tokenise([path], BYTE, cache)
    assert (old.exists(), young.exists()) == (False, True)


def _tokenise_in_process(path: Path, cache: Path) -> bytes:
    return bytes(tokenise([path], BYTE, cache).ids)


def test_several_processes_at_once(write, tmp_path):
    path = write(np.random.default_rng(0).bytes(300_000))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(_tokenise_in_process, [path] * 6, [tmp_path / "cache"] * 6))
    assert results == [path.read_bytes()] * 6
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_memory_stays_bounded(tmp_path):
    path = tmp_path / "large.txt"
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(64):
            file.write("größer " * (1 << 17))
    assert path.stat().st_size > 64 << 20
    program = """
import resource, sys
from pathlib import Path
from elman.text import Tokenizer, tokenise

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

path, before = Path(sys.argv[1]), peak()
tokens = tokenise([path], Tokenizer.build("char", path), path.parent / "cache")
print(peak() - before)
"""
    result = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 40 << 10  # KiB


@pytest.mark.parametrize("kind", ["array", "tokens"])
def test_split_into_contiguous_blocks(kind, write, tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(103))
    tokens = tokenise([write(text)], BYTE, tmp_path / "cache")
    blocks = split(tokens if kind == "tokens" else np.asarray(tokens.ids), 0.1, 0.05)
    assert [len(block) for block in blocks] == [88, 10, 5]
    assert BYTE.decode(np.concatenate(blocks)) == text
    assert blocks.train.base is not None  # a view: nothing is copied


def test_split_without_held_out_text():
    train, valid, test = split(np.arange(7), 0.0, 0.0)
    assert [len(train), len(valid), len(test)] == [7, 0, 0]


@pytest.mark.parametrize(("valid", "test"), [(-0.1, 0), (1, 0), (0, 1.5), (float("nan"), 0), (0.5, 0.5)])
def test_split_refuses_impossible_fractions(valid, test):
    with pytest.raises(OptionError):
        split(np.arange(100), valid, test)


@pytest.mark.parametrize(("tokens", "valid", "name"), [(10, 0.05, "valid"), (10, 0.95, "train"), (0, 0, "train")])
def test_split_refuses_blocks_without_a_prediction(tokens, valid, name):
    with pytest.raises(DataError, match=f"its {name} block.*--set data.valid_fraction=.*--valid FILE"):
        split(np.arange(tokens), valid, 0)


def test_counts_of_parts_add_up():
    ids = BYTE.encode("größer 日本")
    whole = BYTE.counts(ids)
    assert whole == (9, 15)
    for cut in range(len(ids) + 1):
        parts = [BYTE.counts(part) for part in (ids[:cut], ids[cut:])]
        assert tuple(map(sum, zip(*parts, strict=True))) == whole


def test_default_text_is_stable_english():
    text = default_text()
    assert 300_000 < len(text) < 1_500_000
    assert text.count(" the ") > 1_000
    assert hashlib.sha256(text.encode()).hexdigest() == default_text_sha256()


def test_default_text_as_a_file(tmp_path):
    path = write_default_text(tmp_path / "data")
    assert read_text(path) == default_text()
    before = path.stat().st_mtime_ns
    assert write_default_text(tmp_path / "data") == path
    assert path.stat().st_mtime_ns == before  # left alone
    path.write_text("other")
    write_default_text(tmp_path / "data")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == default_text_sha256()


def test_python_without_its_manual(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="name a text file"):
        default_text()
