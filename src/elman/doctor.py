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
from .spec import make_cell
from .unfold import BACKENDS, scan

__all__ = ["check_numbers", "describe_machine"]

PACKAGES = ("elman", "torch", "llvmlite", "numpy", "safetensors", "pydantic", "typer", "rich", "matplotlib")

CHECKED = (*{kind: name for name, kind in reversed(CELLS.items())}.values(), "stack(2, residual(lstm))")[::-1]
"""Every cell, under one of its names, and a combination."""

TOLERANCE = 1e-10
"""Largest deviation allowed in float64, relative to the largest value: far above rounding, far below a
mistake."""


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

    The figures are the largest deviations relative to the largest value, in float64.
    """
    checks = []
    for backend in BACKENDS:
        if backend == "auto":
            continue
        for name in CHECKED:
            values, gradients = _deviation(name, backend)
            ok = values <= TOLERANCE and gradients <= TOLERANCE
            checks.append({"backend": backend, "cell": name, "values": values, "gradients": gradients, "ok": ok})
    return checks


def _deviation(name: str, backend: str) -> tuple[float, float]:
    steps, batch, inputs, hidden = 7, 3, 5, 6
    generator = torch.Generator().manual_seed(1)
    cell = make_cell(name, inputs, hidden).double()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3)
    xs = torch.randn(steps, batch, inputs, generator=generator, dtype=torch.float64, requires_grad=True)
    ys, state = scan(cell, xs, _start(cell, batch), backend=backend)
    expected_ys, expected_state = _by_hand(cell, xs, _start(cell, batch))
    got, expected = [ys, *pytree.tree_leaves(state)], [expected_ys, *pytree.tree_leaves(expected_state)]
    inputs_and_weights = [xs, *cell.parameters()]
    return (
        _largest(got, expected),
        _largest(_gradients(got, inputs_and_weights), _gradients(expected, inputs_and_weights)),
    )


def _start(cell: nn.Module, batch: int) -> Any:
    cpu = torch.device("cpu")
    return cell.initial_state(batch, device=cpu, dtype=torch.float64)  # type: ignore[operator]


def _by_hand(cell: nn.Module, xs: Tensor, state: Any) -> tuple[Tensor, Any]:
    ys = []
    for x in xs:
        y, state = cell(x, state)
        ys.append(y)
    return torch.stack(ys), state


def _gradients(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    loss = torch.stack([(output * output).sum() for output in outputs]).sum()
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
