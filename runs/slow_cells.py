"""What makes a cell slow, and what it takes when it is written otherwise: one pair of times for every piece of advice.

    python runs/slow_cells.py [--quick]

Milliseconds of forward and backward with all gradients, float32, one thread where not said otherwise; the two sides of
a pair take turns, and the least counts. Sides that mean the same are compared first. Takes two minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial

import torch
from kept import RESULTS, keep, options, significant
from torch import Tensor, nn

import elman
from elman.bench.timing import alternate

RESULT = RESULTS / "slow_cells.json"
Call = Callable[[], object]
Pair = tuple[Call, Call]
TURNS = (5, 40, 3.0)
"""Least and most turns, and the seconds in which they should be done."""


class Cell(nn.Module):
    """h ← tanh(U x + W h), the start of them all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.U, self.W, self.V = (nn.Linear(width, width, bias=False) for _ in range(3))

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.zeros(batch, self.W.in_features, device=device, dtype=dtype)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + self.W(h))
        return h, h


class Branch(Cell):
    """Halves the states of all sequences when those of one are large."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + self.W(h))
        if h.abs().max() > 2:
            h = h / 2
        return h, h


class Where(Cell):
    """The same for each sequence alone."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + self.W(h))
        return (h := torch.where(h.abs().amax(-1, keepdim=True) > 2, h / 2, h)), h


class Sticks(Cell):
    """A stick that is broken off feature by feature: what is left of it is a running product."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        left = torch.cumprod(torch.sigmoid(self.W(h)), -1)
        return (h := torch.tanh(self.U(x) + left * h)), h


class LogSticks(Cell):
    """The same, as the exponential of a running sum."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        left = torch.exp(torch.cumsum(nn.functional.logsigmoid(self.W(h)), -1))
        return (h := torch.tanh(self.U(x) + left * h)), h


class OutputInside(Cell):
    """Keeps its last output in the state, although nothing needs it there."""

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        zeros = super().initial_state(batch, device=device, dtype=dtype)
        return zeros, zeros

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # type: ignore[override]
        h, y = state
        h = torch.tanh(self.U(x) + self.W(h) + 0 * y)
        return (y := self.V(h)), (h, y)


class OutputAfter(Cell):
    """The same output, of which no state knows."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + self.W(h))
        return self.V(h), h


class Counted(Cell):
    """Reads a Python attribute."""

    calls = 0

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + self.W(h)) * (1 + self.calls)
        return h, h


def trained(cell: nn.Module, xs: Tensor, **given: object) -> Call:
    def call() -> None:
        cell.zero_grad()
        elman.scan(cell, xs, **given)[0].square().sum().backward()

    return call


def without_gradient(call: Call) -> Call:
    def run() -> None:
        with torch.no_grad():
            call()

    return run


def same(first: nn.Module, second: nn.Module, xs: Tensor) -> Pair:
    """Both, with the same weights, after a look at whether they give the same."""
    second.load_state_dict({**second.state_dict(), **first.state_dict()})
    torch.testing.assert_close(elman.scan(first, xs)[0], elman.scan(second, xs)[0])
    return trained(first, xs), trained(second, xs)


def step_by_step(cell: nn.Module, xs: Tensor) -> None:
    state = None
    for x in xs:
        _, state = elman.scan(cell, x[None], state)


def counting(cell: Counted, xs: Tensor) -> None:
    cell.calls += 1
    trained(cell, xs)()


def pairs() -> dict[tuple[str, str], Callable[[], Pair]]:
    """By what is compared, what makes the slow side and the fast one."""

    def xs(steps: int, batch: int, width: int) -> Tensor:
        return torch.randn(steps, batch, width)

    def unlike(**given: object) -> Pair:
        return trained(lstm, usual, **given), trained(lstm, usual)

    def outputs() -> Pair:
        return same(OutputInside(512), OutputAfter(512), xs(256, 1, 512))

    def numbers() -> Pair:
        return trained(elman.LSTMCell(256, 256).double(), usual.double()), trained(lstm, usual)

    def streamed() -> Pair:
        cell, given = elman.GRUCell(64, 64), xs(128, 1, 64)
        return without_gradient(partial(step_by_step, cell, given)), without_gradient(partial(elman.scan, cell, given))

    def calls() -> Pair:
        cell, given = Counted(64), xs(16, 4, 64)
        return partial(counting, cell, given), trained(cell, given)

    def layers() -> Pair:
        deep, given = elman.Stack([elman.GRUCell(16, 16) for _ in range(8)]), xs(4, 1, 16)
        return trained(deep, given), trained(elman.GRUCell(16, 16), given)

    def units() -> Pair:
        return trained(elman.GRUCell(33, 33), xs(1024, 8, 33)), trained(elman.GRUCell(32, 32), xs(1024, 8, 32))

    def rows() -> Pair:
        return trained(lstm, xs(16 * 128, 1, 256)), trained(lstm, xs(128, 16, 256))

    lstm, usual = elman.LSTMCell(256, 256), xs(128, 32, 256)
    return {
        ("a branch on values", "`torch.where`"): lambda: same(Branch(128), Where(128), xs(128, 8, 128)),
        ("`cumprod`", "the exponential of a sum of logarithms"): lambda: same(
            Sticks(128), LogSticks(128), xs(128, 8, 128)
        ),
        ("an output in the state", "after the loop"): outputs,
        ("an attribute new at every call", "the same one"): calls,
        ("128 scans of one step", "one scan"): streamed,
        ("a stack of 8, 16 units, 4 steps", "one cell"): layers,
        ("33 units", "32 units"): units,
        ("16 times as many steps of 1", "a batch of 16"): rows,
        ("`float64`", "`float32`"): numbers,
        ("`record=True`", "without"): lambda: unlike(record=True),
        ('`remat="auto"`', "without"): lambda: unlike(remat="auto"),
    }  # fmt: skip


FIRST = """
import time, torch, elman
cell, xs = elman.LSTMCell(256, 256), torch.randn(128, 32, 256)
times = []
for _ in range(2):
    begun = time.perf_counter()
    elman.scan(cell, xs)[0].square().sum().backward()
    times.append(1e3 * (time.perf_counter() - begun))
print(*times)
"""


def first_calls() -> dict[str, float]:
    """Milliseconds of the first calls of a process, whose cache is empty or full."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"ELMAN_CACHE": folder, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", FIRST]
        ran = [subprocess.run(command, env=environment, capture_output=True, check=True).stdout for _ in range(2)]
    (cold, _), (warm, later) = (map(float, out.split()) for out in ran)
    return {"nothing on disk": cold, "machine code on disk": warm, "the second call": later}


def main() -> None:
    given = options(__doc__, RESULT, "one turn of each").parse_args()
    warnings.simplefilter("ignore", elman.errors.UnfoldWarning)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    least, most, seconds = (1, 1, 0.0) if given.quick else TURNS
    rows = []
    for names, make in pairs().items():
        slow, fast = (min(times) for times in alternate(dict(enumerate(make())), seconds, least, most).values())
        ms = [significant(slow, 3), significant(fast, 3)]
        rows.append({"slow": names[0], "fast": names[1], "ms": ms, "ratio": significant(slow / fast, 2)})
        print(f"{'; '.join(names):54} {slow:8.2f} {fast:8.2f} {slow / fast:6.1f}")
    first = {name: significant(ms, 3) for name, ms in first_calls().items()}
    print(f"first call, ms: {first}")
    if not given.quick:
        keep(given.out, {"rows": rows, "first call, ms": first})


if __name__ == "__main__":
    main()
