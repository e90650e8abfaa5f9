"""What a kernel may be handed: views of any strides, rows that are very far apart; what it refuses."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from llvmcells import given, made
from torch import Tensor, nn

from comparing import assert_same, everything, scan_by
from elman.compiler.llvm import threads
from elman.compiler.llvm.kernel import Kernel
from elman.packing import Rows

T, B, D, H = 5, 3, 4, 19


def wants(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


VIEWS: dict[str, Callable[..., Tensor]] = {
    "transposed": lambda *shape: torch.randn(*shape[::-1], dtype=torch.float64).permute(*reversed(range(len(shape)))),
    "every second feature": lambda *shape: torch.randn(*shape[:-1], 2 * shape[-1], dtype=torch.float64)[..., ::2],
    "part of the features": lambda *shape: torch.randn(*shape[:-1], shape[-1] + 3, dtype=torch.float64)[..., 2:-1],
    "one for all rows": lambda *shape: torch.randn(*shape[:-2], 1, shape[-1], dtype=torch.float64).expand(*shape),
    "one for all": lambda *shape: torch.randn(shape[-1], dtype=torch.float64).expand(*shape),
    "one number": lambda *shape: torch.randn((), dtype=torch.float64).expand(*shape),
    "every second of the first": lambda *shape: torch.randn(2 * shape[0], *shape[1:], dtype=torch.float64)[1::2],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("kind", ["lstm", "gru", "sru", "lstm, layer norm", "leaky"])
def test_views_of_any_strides(kind: str, view: str) -> None:
    """xs, states and parameters, in turn and all at once; as values and under autograd."""
    torch.manual_seed(4)
    make = VIEWS[view]
    cell = made(kind, D, H, torch.float64)
    sources = given(cell, T, B, D, torch.float64)
    viewed = {**sources, "xs": wants(make(T, B, D))}
    assert not viewed["xs"].is_contiguous()
    state = sources["state"]
    viewed["state"] = tuple(wants(make(*s.shape)) for s in state) if isinstance(state, tuple) else wants(make(B, H))
    for lengths in (None, [2, 5, 3]):
        expected = everything(scan_by("reference"), cell, viewed, lengths=lengths)
        assert_same(everything(scan_by("llvm"), cell, viewed, lengths=lengths), expected)
    if "one" in view:  # an optimiser could not write to such a parameter
        return
    for name, parameter in list(cell.named_parameters()):
        owner = cell.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], nn.Parameter(make(*parameter.shape).mul_(0.3)))
    assert any(not parameter.is_contiguous() for parameter in cell.parameters())
    assert_same(everything(scan_by("llvm"), cell, viewed), everything(scan_by("reference"), cell, viewed))


FAR = 2**28
"""Numbers from row to row: the last of 13 rows begins beyond 2**31 numbers."""


def apart(tensor: Tensor) -> tuple[Tensor, mmap.mmap]:
    """The same numbers, in rows that are FAR apart in memory of which the system gives what is touched."""
    rows, item = tensor.shape[0], tensor.element_size()
    size = ((rows - 1) * FAR + tensor[0].numel()) * item
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, size, flags=flags)
    flat = torch.frombuffer(memory, dtype=tensor.dtype)
    made = flat.as_strided(tensor.shape, (FAR, *torch.empty(tensor.shape[1:], device="meta").stride()))
    made.copy_(tensor)
    return made, memory


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["lstm", "sru", "lstm, layer norm"])
def test_rows_beyond_two_to_the_thirty_one(kind: str, reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every input and output of every step, forward and backward."""
    cell = made(kind, D, H, torch.float32)
    sources = given(cell, 7, 2, D)
    expected = everything(scan_by("llvm"), cell, sources, reverse=reverse)
    plain, moved = Kernel.__call__, []

    def far(self: Kernel, rows: Rows, reverse: bool, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        steps = {(b.role, b.number) for b in self.lowered.buffers if b.kind == "time"}
        own = [apart(t)[0] if ("input", i) in steps else t for i, t in enumerate(inputs)]
        results = [apart(t)[0] if ("output", i) in steps else t for i, t in enumerate(outputs)]
        plain(self, rows, reverse, own, results)
        for result, there in zip(outputs, results, strict=True):
            if there is not result:
                result.copy_(there)
                moved.append(there)

    monkeypatch.setattr(Kernel, "__call__", far)
    assert_same(everything(scan_by("llvm"), cell, sources, reverse=reverse), expected, rtol=0, atol=0)
    assert moved
    assert all((len(m) - 1) * m.stride(0) > 2**31 for m in moved)


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> tuple[Kernel, list[Any]]:
    """A kernel and what it was called with; from here on no machine code may run."""
    calls: list[Any] = []
    plain = Kernel.__call__

    def kept(self: Kernel, *args: Any) -> None:
        calls.append((self, *args))
        plain(self, *args)

    cell = made("lstm", D, H)
    with monkeypatch.context() as patch:
        patch.setattr(Kernel, "__call__", kept)
        everything(scan_by("llvm"), cell, given(cell, T, B, D))
    kernel, *args = calls[0]

    def none(*_: Any) -> None:
        raise RuntimeError("machine code would have run")

    monkeypatch.setattr(threads, "run", none)
    return kernel, args


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "type": lambda t: t.double(),
    "integers": lambda t: t.long(),
    "a row less": lambda t: t[1:],
    "a row more": lambda t: torch.cat([t, t[:1]]),
    "a feature less": lambda t: t[..., 1:],
    "device": lambda t: t.to("meta"),
    "sparse": lambda t: t.detach().to_sparse(),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("role", ["inputs", "outputs"])
def test_what_does_not_fit_is_refused_before_anything_runs(
    handed: tuple[Kernel, list[Any]], role: str, wrong: str
) -> None:
    kernel, (rows, reverse, inputs, outputs) = handed
    with pytest.raises(RuntimeError, match="would have run"):
        kernel(rows, reverse, inputs, outputs)
    several = {"inputs": inputs, "outputs": outputs}
    for number in range(len(several[role])):
        changed = [WRONG[wrong](t) if i == number else t for i, t in enumerate(several[role])]
        with pytest.raises((AssertionError, RuntimeError), match=r"expected|side by side|memory format"):
            kernel(rows, reverse, *({**several, role: changed}).values())
