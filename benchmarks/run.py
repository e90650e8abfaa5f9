"""Speed and memory of one recurrence unfolded in different ways: correctness first, then the rivals in one run.

    python benchmarks/run.py [--shape T,B,H ...] [--cells NAME ...] [--threads N] [--repeats N] [--out FILE]

Each cell runs as a plain hand-written loop ("eager"), on both backends, and as torch.nn's layer where there is one.
Rivals take turns within every repeat, so that a slow moment of the machine hits all of them; a row gives minimum and
median, and the ratio to the eager loop of the minima. Training is forward and backward with all gradients, of xs too.
Peak memory is what one training step adds to the resident size of a fresh process. Nothing is timed before the
compiled results, outputs and every gradient, equal the eager loop's in float64.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import elman

RESULTS = Path(__file__).parent / "results"


class LayerNormLSTM(nn.Module):
    """An LSTM whose stacked gates are normalised: in no library as a fast kernel."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.U = nn.Linear(input_size, 4 * hidden_size)
        self.W = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.norm = nn.LayerNorm(4 * hidden_size)

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        h = torch.zeros(batch, self.hidden_size, device=device, dtype=dtype)
        return h, torch.zeros_like(h)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, s = state
        i, f, n, q = self.norm(self.U(x) + self.W(h)).chunk(4, -1)
        s = torch.sigmoid(f) * s + torch.sigmoid(i) * torch.tanh(n)
        h = torch.sigmoid(q) * torch.tanh(s)
        return h, (h, s)


CELLS: dict[str, Callable[[int, int], nn.Module]] = {
    "peephole LSTM": lambda d, h: elman.LSTMCell(d, h, peepholes=True),
    "layer-norm LSTM": LayerNormLSTM,
    "LSTM": elman.LSTMCell,
    "GRU": elman.GRUCell,
    "Elman": elman.ElmanCell,
}
LAYERS: dict[str, type[nn.Module]] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "Elman": nn.RNN}


def eager(cell: nn.Module, xs: Tensor) -> Tensor:
    """The loop that everybody writes."""
    state = cell.initial_state(xs.shape[1], device=xs.device, dtype=xs.dtype)
    ys = []
    for x in xs.unbind(0):
        y, state = cell(x, state)
        ys.append(y)
    return torch.stack(ys)


def rivals(name: str, size: int) -> dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """The ways to unfold one cell: a module and a function of xs each."""
    torch.manual_seed(0)
    cell = CELLS[name](size, size)
    found = {
        "eager": (cell, lambda xs: eager(cell, xs)),
        "reference": (cell, lambda xs: elman.scan(cell, xs, backend="reference")[0]),
        "interpret": (cell, lambda xs: elman.scan(cell, xs, backend="interpret")[0]),
    }
    if name in LAYERS:
        layer = LAYERS[name](size, size)
        found["torch.nn"] = (layer, lambda xs: layer(xs)[0])
    return found


def train(module: nn.Module, run: Callable[[Tensor], Tensor], xs: Tensor, weight: Tensor) -> None:
    """One forward and backward; gradients are dropped again."""
    run(xs).backward(weight)
    xs.grad = None
    module.zero_grad(set_to_none=True)


def verify(name: str) -> float:
    """The largest difference between interpret and the eager loop in float64, over outputs and all gradients."""
    cell = CELLS[name](24, 24).double()
    xs = torch.randn(9, 5, 24, dtype=torch.float64, requires_grad=True)
    results = []
    for run in (lambda: eager(cell, xs), lambda: elman.scan(cell, xs, backend="interpret")[0]):
        ys = run()
        results.append([ys, *torch.autograd.grad(ys.sin().sum(), [xs, *cell.parameters()])])
    worst = max(float((a - b).detach().abs().max()) for a, b in zip(*results, strict=True))
    if worst > 1e-10:
        raise SystemExit(f"{name}: interpret differs from the eager loop by {worst:.1e}; nothing is timed.")
    return worst


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def measure(name: str, shape: tuple[int, int, int], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of every rival, forward and training, taking turns."""
    steps, batch, size = shape
    xs = torch.randn(steps, batch, size, requires_grad=True)
    plain, weight = xs.detach(), torch.randn(steps, batch, size)
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for rival, (module, run) in rivals(name, size).items():
        calls[rival, "forward"] = torch.no_grad()(lambda run=run: run(plain))
        calls[rival, "training"] = lambda module=module, run=run: train(module, run, xs, weight)
    for call in calls.values():
        call()
        call()
    times: dict[str, dict[str, list[float]]] = {}
    for _ in range(repeats):
        for (rival, mode), call in calls.items():
            times.setdefault(rival, {}).setdefault(mode, []).append(timed(call))
    return times


def peak(name: str, rival: str, shape: tuple[int, int, int]) -> float:
    """MiB that a training step adds to a fresh process, after a first step on one twentieth of the length."""
    steps, batch, size = shape
    module, run = rivals(name, size)[rival]
    short = torch.randn(max(2, steps // 20), batch, size, requires_grad=True)
    train(module, run, short, torch.ones(short.shape))
    xs, weight = torch.randn(steps, batch, size, requires_grad=True), torch.ones(steps, batch, size)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from the present size
    before = resident("VmRSS")
    train(module, run, xs, weight)
    return (resident("VmHWM") - before) / 1024


def resident(which: str) -> int:
    """VmRSS, the present resident size of this process, or VmHWM, its peak, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(which)).split()[1])


def peak_apart(name: str, rival: str, shape: tuple[int, int, int], threads: int) -> float:
    command = [sys.executable, __file__, "--peak", name, rival, ",".join(map(str, shape)), "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def overhead(calls: int = 300, repeats: int = 15) -> dict[str, dict[str, float]]:
    """Microseconds of a call with one step, beside the step itself: B 1, 64 units, without gradients."""
    result = {}
    x = torch.randn(1, 1, 64)
    for name in ("Elman", "LSTM", "peephole LSTM"):
        cell = CELLS[name](64, 64)
        state = cell.initial_state(1, device=x.device, dtype=x.dtype)
        ways = {
            "the step itself": lambda cell=cell, state=state: cell(x[0], state),
            "scan, auto": lambda cell=cell, state=state: elman.scan(cell, x, state),
            "scan, interpret": lambda cell=cell, state=state: elman.scan(cell, x, state, backend="interpret"),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        with torch.no_grad():
            for _ in range(repeats):
                for way, call in ways.items():
                    times[way].append(timed(lambda call=call: [call() for _ in range(calls)]) * 1e3 / calls)
        result[name] = {way: min(found) for way, found in times.items()}
    return result


def machine(threads: int) -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    a = torch.randn(2048, 2048)
    gemm = min(timed(lambda: a @ a) for _ in range(9))
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": cpu or platform.processor(),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "sgemm_gflops": round(2 * 2048**3 / gemm / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="T,B,H; may be repeated (default 128,32,256)")
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--out", type=Path, help=f"JSON file (default, for all cells and shapes, {RESULTS.name}/unfold.json)"
    )
    parser.add_argument("--peak", nargs=3, metavar=("CELL", "RIVAL", "SHAPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        name, rival, shape = options.peak
        print(peak(name, rival, tuple(map(int, shape.split(",")))))  # type: ignore[arg-type]
        return
    about = machine(options.threads)
    print(about)
    rows = []
    for text in options.shape or ["128,32,256"]:
        shape = tuple(map(int, text.split(",")))
        for name in options.cells:
            worst = verify(name)
            times = measure(name, shape, options.repeats)  # type: ignore[arg-type]
            print(f"\n{name}, T·B·H {'·'.join(map(str, shape))}   (float64 difference {worst:.0e})")
            print(f"{'':12}{'forward ms':>20}{'training ms':>20}{'against eager':>15}{'memory MiB':>12}")
            for rival, modes in times.items():
                memory = peak_apart(name, rival, shape, options.threads)  # type: ignore[arg-type]
                ratio = min(times["eager"]["training"]) / min(modes["training"])
                cells = [f"{min(v):8.1f} ({statistics.median(v):.1f})" for v in (modes["forward"], modes["training"])]
                print(f"{rival:12}{cells[0]:>20}{cells[1]:>20}{ratio:>14.2f}×{memory:>12.0f}")
                row = {"cell": name, "shape": shape, "rival": rival, "peak_mib": memory, "against_eager": ratio}
                rows.append({**row, "milliseconds": modes, "float64_difference": worst})
    print("\none step, microseconds (minimum)")
    calls = overhead()
    for name, ways in calls.items():
        print(f"{name:16}" + "   ".join(f"{way} {value:.0f}" for way, value in ways.items()))
    whole = not options.shape and options.cells == list(CELLS)
    out = options.out or (RESULTS / "unfold.json" if whole else None)
    if out is None:
        return  # a part does not replace the whole; --out keeps it elsewhere
    out.parent.mkdir(exist_ok=True)
    out.write_text(
        json.dumps({"command": sys.argv, "machine": about, "rows": rows, "one_step_us": calls}, indent=1) + "\n"
    )
    print(f"\nkept in {out}")


if __name__ == "__main__":
    main()
