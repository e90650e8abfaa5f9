"""Where and how numbers are computed: device, threads, seed, precision, cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .cachefolder import cache_directory
from .config import Config, Machine
from .errors import OptionError

__all__ = ["arithmetic", "cache_directory", "prepare", "resolve"]


def resolve(config: Config) -> Config:
    """``config`` with 'auto' and defaults replaced by what this machine gives, so that a run can record them.

    Raises OptionError for a device that torch does not know or this machine does not have.
    """
    machine = config.machine
    changes = {"device": _device(machine.device), "threads": machine.threads or torch.get_num_threads()}
    return config.model_copy(update={"machine": machine.model_copy(update=changes)})


def prepare(machine: Machine) -> torch.device:
    """Set the number of threads, the seed and the precision of products of torch; the device to compute on."""
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    torch.manual_seed(machine.seed)
    torch.set_float32_matmul_precision(_products(machine))  # of back-propagation too
    return torch.device(_device(machine.device))


@contextmanager
def arithmetic(machine: Machine, device: torch.device) -> Iterator[None]:
    """The context in which a model runs: the precision of its products, autocast to bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(_products(machine))
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=machine.precision == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _products(machine: Machine) -> str:
    return machine.precision if machine.precision in ("high", "medium") else "highest"


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        kinds = ["auto", "cpu"] + (["cuda"] if torch.cuda.is_available() else [])
        if name.split(":")[0] not in ("cpu", "cuda", "mps", "xpu"):
            raise OptionError.unknown("device", name, kinds) from error
        raise OptionError(
            f"device {name!r} is not available on this machine; use one of {', '.join(kinds)}."
        ) from error
    return name
