"""From LLVM's representation to functions, and their machine code on disk."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import stat
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from elman.compiler.llvm import engine, store
from elman.compiler.llvm.isa import ISAS, Isa, host
from elman.errors import UnfoldError, UnsupportedError

best = host()
if best is None:
    pytest.skip("no machine code for this processor", allow_module_level=True)
HERE: Isa = best
NATIVE = [isa for isa in ISAS.values() if isa.triple == HERE.triple and isa.bytes <= HERE.bytes]
PROCESSES = 4

TEXT = """
define internal i64 @hidden(i64 %x) noinline { %y = add i64 %x, ADDEND
  ret i64 %y }
define i64 @shifted(i64 %x) { %y = call i64 @hidden(i64 %x)
  ret i64 %y }
define double @half(double %x) { %y = fmul double %x, 0.5
  ret double %y }
"""


def text(addend: int = 7) -> str:
    return TEXT.replace("ADDEND", str(addend))


def shifted(library: engine.Library, x: int) -> int:
    call = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(library.address("shifted"))
    return int(call(x))


def entry_of(directory: Path) -> Path:
    (found,) = (path for path in directory.rglob("*") if path.is_file())
    return found


def in_children(work: Callable[[int], None]) -> list[int]:
    """The exit status of some processes that do the same at the same time: 0 where nothing was raised."""
    children = []
    for number in range(PROCESSES):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # newer Python warns of every fork beside threads
            child = os.fork()
        if child == 0:
            status = 1
            try:
                work(number)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    return [os.waitpid(child, 0)[1] for child in children]


@pytest.mark.parametrize("isa", NATIVE, ids=lambda isa: isa.name)
def test_functions_can_be_called_and_outlive_the_module(isa: Isa) -> None:
    library = engine.load(text(), isa)
    gc.collect()
    assert shifted(library, 35) == 42
    assert ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_double)(library.address("half"))(3.0) == 1.5
    assert not library.cached


def test_only_what_a_module_defines_for_others_has_an_address() -> None:
    library = engine.load(text(), HERE)
    for name in ("hidden", "nothing"):
        with pytest.raises(KeyError):
            library.address(name)


def test_functions_of_the_process_and_given_ones_are_found() -> None:
    first = engine.load(text(), HERE)
    source = """declare i64 @labs(i64)
    declare i64 @given(i64)
    define i64 @shifted(i64 %x) { %y = call i64 @labs(i64 %x)
      %z = call i64 @given(i64 %y)
      ret i64 %z }"""
    second = engine.load(source, HERE, symbols={"given": first.address("shifted")})
    assert shifted(second, -5) == 12


@pytest.mark.parametrize("isa", ISAS.values(), ids=lambda isa: isa.name)
def test_the_text_of_every_stage_can_be_read_for_every_instruction_set(isa: Isa) -> None:
    source = "define float @twice(float %x) { %a = alloca float\n store float %x, ptr %a\n %y = load float, ptr %a\n"
    source += "%z = fadd float %y, %y\n ret float %z }"
    assert "alloca" not in engine.optimised(source, isa)
    assert "twice:" in engine.assembly(source, isa)


def test_a_cached_library_has_its_text_too(tmp_path: Path) -> None:
    fresh, kept = (engine.load(text(), HERE, tmp_path) for _ in range(2))
    assert (fresh.cached, kept.cached) == (False, True)
    assert fresh.assembly() == kept.assembly()
    assert fresh.ir() == kept.ir()
    assert "@hidden" in kept.ir()


@pytest.mark.parametrize(
    "source",
    [
        "this is no module",
        "define i64 @f(i64 %x) { ret i64 %y }",
        "define void @f() { br label %on\non:\n %x = phi i64 [ 0, %on ]\n ret void }",
        "declare void @this_is_nowhere()\ndefine void @f() { call void @this_is_nowhere()\n ret void }",
    ],
    ids=["syntax", "name", "structure", "symbol"],
)
def test_what_llvm_refuses_is_an_unsupported_step_with_its_code(source: str) -> None:
    with pytest.raises(UnsupportedError, match=r"LLVM .* refuses") as caught:
        engine.load(source, HERE)
    error = caught.value
    assert isinstance(error, UnfoldError)
    assert isinstance(error, engine.CodeError)
    assert error.source == source
    again = type(error)(*error.args)  # how the cache of programs raises it again
    assert (str(again), again.source) == (str(error), source)
    assert shifted(engine.load(text(), HERE), 1) == 8  # nothing is left broken


def test_several_threads_may_load_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: shifted(engine.load(text(n % 5), HERE, tmp_path), 100), range(40)))
    assert found == [100 + n % 5 for n in range(40)]


def test_an_entry_is_the_object_and_private_to_the_user(tmp_path: Path) -> None:
    engine.load(text(), HERE, tmp_path / "new" / "folder")
    entry = entry_of(tmp_path)
    data = store.read(tmp_path / "new" / "folder", entry.name)
    assert data is not None
    assert entry.read_bytes().endswith(data)
    assert stat.S_IMODE(entry.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600


def test_another_processor_or_text_is_another_entry(tmp_path: Path) -> None:
    assert not engine.load(text(), HERE, tmp_path).cached
    assert not engine.load(text(), replace(HERE, cpu="generic", features=""), tmp_path).cached
    assert not engine.load(text(8), HERE, tmp_path).cached
    assert engine.load(text(), HERE, tmp_path).cached
    assert store.key_of("ab", "c") != store.key_of("a", "bc")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def one_bit_in_the_code(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    path.write_bytes(content)


def one_bit_in_the_checksum(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[30] ^= 1
    path.write_bytes(content)


def of_another_format(path: Path) -> None:
    path.write_bytes(b"x" + path.read_bytes()[1:])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def writable_by_others(path: Path) -> None:
    path.chmod(0o602)


def folder_writable_by_others(path: Path) -> None:
    path.parent.chmod(0o720)


def replaced_by_a_link(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def folder_replaced_by_a_link(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere"
    path.parent.rename(elsewhere)
    path.parent.symlink_to(elsewhere)


@pytest.mark.parametrize(
    "harm",
    [
        truncated, one_bit_in_the_code, one_bit_in_the_checksum, of_another_format, emptied, writable_by_others,
        folder_writable_by_others, replaced_by_a_link, folder_replaced_by_a_link,
    ],
    ids=lambda harm: harm.__name__,
)  # fmt: skip
def test_what_cannot_be_trusted_is_not_loaded(harm: Callable[[Path], None], tmp_path: Path) -> None:
    engine.load(text(), HERE, tmp_path)
    entry = entry_of(tmp_path)
    key = entry.name
    assert store.read(tmp_path, key) is not None
    harm(entry)
    assert store.read(tmp_path, key) is None
    library = engine.load(text(), HERE, tmp_path)
    assert not library.cached
    assert shifted(library, 1) == 8
    if not harm.__name__.startswith("folder"):  # written again, in place of the damaged one
        assert engine.load(text(), HERE, tmp_path).cached


def test_an_entry_under_the_name_of_another_is_not_loaded(tmp_path: Path) -> None:
    engine.load(text(), HERE, tmp_path)
    entry = entry_of(tmp_path)
    entry.rename(entry.parent / ("0" * 64))
    assert store.read(tmp_path, "0" * 64) is None


def test_what_does_not_link_is_made_again(tmp_path: Path) -> None:
    engine.load(text(), HERE, tmp_path)
    key = entry_of(tmp_path).name
    assert store.write(tmp_path, key, b"whole, but no object")
    library = engine.load(text(), HERE, tmp_path)
    assert (library.cached, shifted(library, 1)) == (False, 8)
    assert engine.load(text(), HERE, tmp_path).cached


def test_nothing_is_taken_from_someone_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.load(text(), HERE, tmp_path)
    someone_else = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: someone_else)
    assert store.read(tmp_path, entry_of(tmp_path).name) is None
    assert not store.write(tmp_path, "0" * 64, b"data")
    assert shifted(engine.load(text(), HERE, tmp_path), 1) == 8


def test_a_folder_that_cannot_be_made_means_no_cache(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for _ in range(2):
        library = engine.load(text(), HERE, file / "below")
        assert (library.cached, shifted(library, 1)) == (False, 8)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_means_no_cache(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert not engine.load(text(), HERE, tmp_path).cached
    assert not engine.load(text(), HERE, tmp_path).cached


@pytest.mark.parametrize("failing", ["replace", "mkdir"])
@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_write_that_fails_leaves_nothing(
    failing: str, reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(reason, os.strerror(reason))

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        assert shifted(engine.load(text(), HERE, tmp_path), 1) == 8
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_size_is_bounded_and_what_is_used_stays(tmp_path: Path) -> None:
    keys = [store.key_of(str(number)) for number in range(6)]
    for age, key in enumerate(keys[:5]):
        assert store.write(tmp_path, key, b"x" * 1000)
        path = next(tmp_path.rglob(key))
        os.utime(path, (1_000_000 + age, 1_000_000 + age))
    assert store.read(tmp_path, keys[0]) is not None  # read again: the newest of all
    assert store.write(tmp_path, keys[5], b"x" * 1000, limit=3500)
    assert [store.read(tmp_path, key) is not None for key in keys] == [True, False, False, False, True, True]


def test_what_a_killed_process_left_is_dropped(tmp_path: Path) -> None:
    key = store.key_of("one")
    assert store.write(tmp_path, key, b"x" * 1000)
    left = [next(tmp_path.rglob(key)).with_name(f".{name}") for name in ("long-ago", "just-now")]
    for path in left:
        path.write_bytes(b"x" * 1000)
    os.utime(left[0], (1_000_000, 1_000_000))
    assert store.write(tmp_path, store.key_of("two"), b"x" * 1000, limit=2500)
    assert [path.exists() for path in left] == [False, True]
    assert store.read(tmp_path, key) is not None


def test_processes_share_a_folder(tmp_path: Path) -> None:
    data = {store.key_of(str(number)): bytes([number]) * 100_000 for number in range(4)}

    def work(_: int) -> None:
        for turn in range(60):
            for key, content in data.items():
                assert store.write(tmp_path, key, content, limit=250_000 if turn % 2 else store.LIMIT)
                assert store.read(tmp_path, key) in (None, content)

    assert in_children(work) == [0] * PROCESSES
    assert not any(path.name.startswith(".") for path in tmp_path.rglob("*"))


def test_processes_compile_into_one_folder(tmp_path: Path) -> None:
    engine.load(text(), HERE)

    def work(number: int) -> None:
        for turn in range(8):
            assert shifted(engine.load(text((turn + number) % 4), HERE, tmp_path), 10) == 10 + (turn + number) % 4

    assert in_children(work) == [0] * PROCESSES
    assert all(engine.load(text(number), HERE, tmp_path).cached for number in range(4))


def test_what_is_kept_is_made_once_by_however_many_threads() -> None:
    made: list[object] = []
    together = threading.Barrier(4)

    @engine.kept
    def make(name: str) -> object:
        time.sleep(0.01)  # time for the others to come
        made.append(object())
        return made[-1]

    def one(_: int) -> object:
        together.wait()
        return make("a")

    with ThreadPoolExecutor(4) as pool:
        assert len({id(found) for found in pool.map(one, range(4))}) == 1
    assert len(made) == 1
    assert make("b") is made[1]
