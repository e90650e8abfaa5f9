"""Runs that are noted down and played: the same numbers to the last bit, whatever is given, and no memory shared."""

from __future__ import annotations

import random
import threading
from array import array
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from llvmcells import ALL_MACHINE_CODE, KINDS, given, made
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import elman
from cellzoo import zoo
from comparing import assert_same, everything, inputs, scan_by
from elman.cells import ElmanCell, LSTMCell
from elman.compiler import cache
from elman.compiler.compiled import Compiled
from elman.compiler.interpret import Runner
from elman.compiler.llvm import calls, matmul, replay


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(matmul, "_worth_it", lambda *operands: True)  # PyTorch's products cannot be noted
    before = torch.get_num_threads()
    cache.forget()
    yield
    torch.set_num_threads(before)


class _Watched(TorchDispatchMode):
    """Someone who wants to see every operation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def plain(*args: Any) -> dict[str, Tensor]:
    """Everything of a scan by machine code that was called as the program came to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "run", lambda runner, *args: runner(*args))
        return everything(scan_by("llvm"), *args)


def played() -> list[replay.Played]:
    return [found for found in known() if isinstance(found, replay.Played)]


def known() -> list[Any]:
    """What is remembered of the runs of all programs."""
    return [found for runner in runners() for found in runner.known.values()]


def runners() -> list[Runner]:
    """The generated functions of all programs."""
    found: list[Runner] = []
    for program in cache._programs.values():
        assert isinstance(program, Compiled)
        found += program._forward.values()
        for rule in program._derivatives.values():
            found += [runner for pair in vars(rule).get("_runners", {}).values() for runner in pair]
    return found


def renewed(sources: dict[str, Any], seed: int) -> dict[str, Any]:
    """Other numbers of the same shapes, in other memory."""
    generator = torch.Generator().manual_seed(seed)

    def other(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point():
            return leaf.clone()
        return torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype).requires_grad_(leaf.requires_grad)

    return torch.utils._pytree.tree_map_only(Tensor, other, sources)  # type: ignore[no-any-return]


def plays(kind: str, size: tuple[int, int, int, int], dtype: torch.dtype, autocast: bool = False) -> int:
    """Four runs of a cell on (T, B, I, H) against plain ones, to the last bit; how many directions were noted down."""
    steps, batch, d, h = size
    cache.forget()
    cell = made(kind, d, h, dtype)
    sources = given(cell, steps, batch, d, dtype)
    for seed in range(4):
        here = renewed(sources, seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert_same(everything(scan_by("llvm"), cell, here), plain(cell, here), rtol=0, atol=0)
    return len(played())


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_to_the_last_bit(kind: str, dtype: torch.dtype, count: int) -> None:
    torch.set_num_threads(count)
    for size in [(12, 33, 16, 100), (8, 2, 33, 500), (16, 17, 19, 97)]:
        expected = 0 if kind == "sru" else 2  # forward and backward; that cell has work for PyTorch outside its loop
        assert plays(kind, size, dtype) == expected, size


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("autocast", [False, True], ids=["tensors", "autocast"])
@pytest.mark.parametrize("kind", ["elman", "gru", "lstm", "lstm, layer norm"])
def test_bfloat16_is_converted_on_the_way(kind: str, autocast: bool, count: int) -> None:
    torch.set_num_threads(count)
    left_to_pytorch = "norm" in kind and not autocast  # gradients of a norm's own weights, of bfloat16
    for size in [(12, 33, 16, 100), (5, 3, 7, 9), (40, 17, 60, 64)]:
        found = plays(kind, size, torch.float32 if autocast else torch.bfloat16, autocast)
        assert found == 2 - left_to_pytorch, size


def test_numbers_are_converted_as_pytorch_converts_them() -> None:
    """Every bfloat16 there is; and float32 around every one of them, denormal, infinite and none at all."""
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    near = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    words = ((halves.int() << 16)[:, None] + near).flatten()[:-3].int()
    for count in (1, 2, 3):
        for name, numbers, expected in (
            ("widen", halves.view(torch.bfloat16), halves.view(torch.bfloat16).float()),
            ("narrow", words.view(torch.float32), words.view(torch.float32).bfloat16()),
        ):
            out = torch.full_like(expected, 7.0)
            told = array("q", (out.data_ptr(), numbers.data_ptr(), numbers.numel()))
            calls.call(calls.address_of(name), told, (0, 1), count)
            torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
            bits = torch.int16 if name == "narrow" else torch.int32
            same = out.view(bits) == expected.view(bits)
            assert bool((same | expected.isnan()).all())


@pytest.mark.parametrize("name", ALL_MACHINE_CODE)
def test_every_cell_of_the_zoo(name: str) -> None:
    cell = zoo(name)
    for seed in range(3):
        sources = inputs(cell, 5, 3)
        torch.manual_seed(seed)
        found = everything(scan_by("llvm"), cell, sources)
        torch.manual_seed(seed)
        assert_same(found, plain(cell, sources), rtol=0, atol=0)


def test_what_is_given_may_lie_anywhere_and_be_the_same_twice() -> None:
    cell = LSTMCell(20, 40)
    zeros = torch.zeros(16, 40)
    wide = torch.randn(16, 6, 50).transpose(0, 1)
    for i in range(5):
        torch.manual_seed(i)
        state = (zeros, zeros) if i < 3 else (torch.randn(16, 40), torch.randn(16, 40))
        x = wide[..., i : i + 20]
        y, last = elman.scan(cell, x, state)
        expected, expected_last = elman.scan(cell, x, state, backend="reference")
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(last, expected_last)
        with torch.no_grad():  # weights in other memory
            cell.weight_hh.data = cell.weight_hh * 1.1
    assert played()


def test_no_run_writes_into_the_results_of_another() -> None:
    cell = LSTMCell(20, 40)
    xs = [torch.randn(6, 16, 20) for _ in range(5)]
    with torch.no_grad():
        found = [elman.scan(cell, x) for x in xs]
        kept = [(y.clone(), s[0].clone(), s[1].clone()) for y, s in found]
        again = [elman.scan(cell, x) for x in xs]
    assert played()
    for (y, s), copy, (other, _) in zip(found, kept, again, strict=True):
        assert torch.equal(y, copy[0])
        assert torch.equal(s[0], copy[1])
        assert torch.equal(s[1], copy[2])
        assert torch.equal(y, other)


def test_an_expanded_gradient_and_a_second_derivative() -> None:
    cell = ElmanCell(16, 32)
    for _ in range(4):
        x = torch.randn(8, 16, 16, requires_grad=True)
        y, _ = elman.scan(cell, x)
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        y, _ = elman.scan(cell, x, backend="reference")
        (expected,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        torch.testing.assert_close(first, expected)
        torch.testing.assert_close(second, torch.autograd.grad(expected.square().sum(), x)[0])


def test_long_work_is_called_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, x = LSTMCell(20, 40), torch.randn(6, 16, 20)
    expected = plain(cell, {"xs": x, "state": None, "constants": None})
    monkeypatch.setattr(replay, "_WORK_OF_A_CALL", 1.0)
    for _ in range(3):
        assert_same(
            everything(scan_by("llvm"), cell, {"xs": x, "state": None, "constants": None}), expected, rtol=0, atol=0
        )
    assert all(len(found.groups) > 1 for found in played())


@pytest.mark.filterwarnings("ignore:the loop over:elman.errors.UnfoldWarning")
def test_what_is_not_noted_runs_as_it_did() -> None:
    cell = LSTMCell(20, 40)
    for _ in range(3):
        elman.scan(cell, torch.randn(6, 4, 20), lengths=[6, 3, 2, 1])
        with _Watched(), torch.no_grad():
            elman.scan(cell, torch.randn(6, 4, 20))
    assert not known()
    gathers = zoo("Gathers")
    for _ in range(3):
        sources = inputs(gathers, 5, 3)
        expected = everything(scan_by("reference"), gathers, sources)
        assert_same(everything(scan_by("llvm"), gathers, sources), expected)


def test_other_sizes_and_threads_are_other_runs_and_few_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = ElmanCell(16, 32)
    with torch.no_grad():
        for count, steps, batch in ((1, 6, 16), (2, 6, 16), (2, 7, 16), (2, 7, 17)):
            torch.set_num_threads(count)
            for _ in range(3):
                elman.scan(cell, torch.randn(steps, batch, 16))
        assert len(played()) == 4
        monkeypatch.setattr(replay, "_MOST", 2)
        elman.scan(cell, torch.randn(9, 16, 16))
    assert len(known()) == 2


def test_several_threads_of_python_play_at_once() -> None:
    cell = LSTMCell(20, 40)
    xs = [torch.randn(6, 16, 20) for _ in range(8)]
    with torch.no_grad():
        expected = [elman.scan(cell, x)[0] for x in xs]
    right: list[bool] = []

    def work(i: int) -> None:
        with torch.no_grad():
            right.append(all(torch.equal(elman.scan(cell, xs[i])[0], expected[i]) for _ in range(50)))

    torch.set_num_threads(1)
    with torch.no_grad():
        expected = [elman.scan(cell, x)[0] for x in xs]
    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert right == [True] * 8


def test_memory_that_is_needed_at_one_time_is_apart() -> None:
    choose = random.Random(0)
    for _ in range(200):
        notes = replay._Notes([])
        notes.memories = [torch.empty(choose.randint(1, 900), dtype=torch.uint8) for _ in range(12)]
        for _ in range(20):
            places = [(i, choose.randrange(12), 0) for i in range(3)]
            notes.made.append(replay._Call(0, [0, 0, 0], places, 1, 0.0))
        found = replay._inside(notes, ())
        uses = {n: [i for i, call in enumerate(notes.made) if n in [p[1] for p in call.places]] for n in found}
        for n, (first, size) in found.items():
            assert size >= len(notes.memories[n])
            assert first % 64 == 0
            for m, (other, more) in found.items():
                if n < m and uses[n][0] <= uses[m][-1] and uses[m][0] <= uses[n][-1]:
                    assert first + size <= other or other + more <= first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 15, 16, 1000])
def test_what_threads_summed_is_added_up(size: int, dtype: torch.dtype) -> None:
    partial = torch.randn(5, size + 16, dtype=dtype)
    out = torch.empty(1, size, dtype=dtype)
    calls.together(out, partial)
    torch.testing.assert_close(out[0], partial[:, :size].sum(0))


def test_a_failure_while_noting_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, x = ElmanCell(16, 32), torch.randn(6, 16, 16)

    def fails(*args: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        expected, _ = elman.scan(cell, x)
        with monkeypatch.context() as patch:
            patch.setattr(replay._Notes, "note", fails)
            with pytest.raises(KeyboardInterrupt):
                elman.scan(cell, x)
        assert calls.listening.listener is None
        for _ in range(3):
            assert torch.equal(elman.scan(cell, x)[0], expected)


class Handed(torch.nn.Module):
    """A step that computes nothing."""

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :2], state


def test_a_run_without_any_call() -> None:
    x, state = torch.randn(5, 3, 4), torch.randn(3, 2)
    for _ in range(3):
        y, last = elman.scan(Handed(), x, state)
        assert torch.equal(y, x[..., :2])
        assert torch.equal(last, state)


def test_numbers_that_stand_with_the_other_sign_in_memory() -> None:
    cell = ElmanCell(16, 128)
    with torch.no_grad():
        for i in range(5):
            x, state = torch.randn(6, 16, 16), torch.randn(16, 128)
            expected = elman.scan(cell, x, state, backend="reference")[0]
            given = state if i < 3 else torch._neg_view(-state)
            torch.testing.assert_close(elman.scan(cell, x, given)[0], expected)
            torch.testing.assert_close(elman.scan(cell, torch._neg_view(-x), state)[0], expected)


def test_tensors_of_another_class_are_not_played() -> None:
    cell, x = ElmanCell(16, 32), torch.randn(6, 16, 16)
    with torch.no_grad():
        expected = [elman.scan(cell, x)[0] for _ in range(3)]
        found = [key for runner in runners() for key in runner.known]
        elman.scan(cell, x.as_subclass(Marked))
    assert len([key for runner in runners() for key in runner.known]) == len(found) + 1
    assert torch.equal(expected[0], expected[-1])


class Marked(Tensor):
    """A class of tensors."""


def test_a_machine_without_machine_code_notes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "host", lambda: None)
    for _ in range(3):
        elman.scan(ElmanCell(16, 32), torch.randn(6, 16, 16))
    assert known()[0] == "never"
