"""What this machine has, and whether ``scan`` computes on it what a loop written by hand computes."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .cells import CELLS
from .compiler.llvm.isa import chosen
from .config import Machine
from .machine import arithmetic
from .spec import make_cell
from .unfold import BACKENDS, scan

__all__ = ["check_numbers", "describe_machine"]

PACKAGES = ("elman", "torch", "llvmlite", "numpy", "safetensors", "pydantic", "typer", "rich", "matplotlib")

CHECKED = (*{kind: name for name, kind in reversed(CELLS.items())}.values(), "stack(2, residual(lstm))")[::-1]
"""Every cell, under one of its names, and a combination."""

TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "high": 2e-4, "medium": 5e-2, "bf16": 5e-2}
"""Largest deviation allowed, relative to the largest value, by precision: far above rounding, far below a mistake."""

NARROW = ("lstm", "gru")
"""Cells that are checked with less precision than float64 too, on the backend whose arithmetic is its own."""


def describe_machine() -> dict[str, Any]:
    """Versions, processor, devices, threads and backends, as JSON-able facts."""
    devices = ["cpu"]
    devices += [
        f"cuda:{i} {torch.cuda.get_device_name(i)}"
        for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return {
        "python": f"{platform.python_version()} on {platform.platform()}",
        "packages": [f"{name} {_version(name)}" for name in PACKAGES],
        "processor": _processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "machine code": machine.name if (machine := chosen()) else "none for this processor",
        "threads": f"{torch.get_num_threads()} of torch",
        "devices": devices,
        "backends": [name for name in BACKENDS if name != "auto"],
    }


def check_numbers() -> list[dict[str, Any]]:
    """What is CHECKED, on each backend, against a loop written by hand: values, final state and every gradient.

    The figures are the largest deviations relative to the largest value, in float64. The machine code of NARROW is
    checked at every other precision as well: of products, "high" and "medium", or under autocast, "bf16".
    """
    wanted = [(backend, name, "float64") for backend in BACKENDS if backend != "auto" for name in CHECKED]
    wanted += [("llvm", name, precision) for name in NARROW for precision in TOLERANCES if precision != "float64"]
    checks = []
    for backend, name, precision in wanted:
        values, gradients = _deviation(name, backend, precision)
        ok = max(values, gradients) <= TOLERANCES[precision]
        found = {"backend": backend, "cell": name, "precision": precision, "values": values, "gradients": gradients}
        checks.append({**found, "ok": ok})
    return checks


def _deviation(name: str, backend: str, precision: str) -> tuple[float, float]:
    wide = precision == "float64"
    steps, batch, inputs, hidden = (7, 3, 5, 6) if wide else (7, 35, 20, 70)  # more than one tile
    generator = torch.Generator().manual_seed(1)
    cell = make_cell(name, inputs, hidden).double()
    with torch.no_grad():
        for parameter in cell.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(drawn / (3 if wide else hidden**0.5))
    xs = torch.randn(steps, batch, inputs, generator=generator, dtype=torch.float64, requires_grad=True)
    expected_ys, expected_state = _by_hand(cell, xs, _start(cell, batch, torch.float64))
    expected = [expected_ys, *pytree.tree_leaves(expected_state)]
    expected_gradients = _gradients(expected, [xs, *cell.parameters()])
    kind = torch.float64 if wide else torch.float32
    cell, xs = cell.to(kind), xs.detach().to(kind).requires_grad_()
    with arithmetic(Machine(precision="float32" if wide else precision), xs.device):  # type: ignore[arg-type]
        ys, state = scan(cell, xs, _start(cell, batch, kind), backend=backend)
    got = [ys, *pytree.tree_leaves(state)]
    gradients = _gradients(got, [xs, *cell.parameters()])
    return _largest(got, expected), _largest(gradients, expected_gradients)


def _start(cell: nn.Module, batch: int, dtype: torch.dtype) -> Any:
    return cell.initial_state(batch, device=torch.device("cpu"), dtype=dtype)  # type: ignore[operator]


def _by_hand(cell: nn.Module, xs: Tensor, state: Any) -> tuple[Tensor, Any]:
    ys = []
    for x in xs:
        y, state = cell(x, state)
        ys.append(y)
    return torch.stack(ys), state


def _gradients(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    loss = torch.stack([(output.double() ** 2).sum() for output in outputs]).sum()
    return list(torch.autograd.grad(loss, inputs))


def _largest(got: list[Tensor], expected: list[Tensor]) -> float:
    scale = max(float(tensor.detach().abs().max()) for tensor in expected)
    differences = (float((a.detach() - b.detach()).abs().max()) for a, b in zip(got, expected, strict=True))
    return max(differences) / scale


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _processor() -> str:
    """The name of the processor, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
