"""Optimisers, the learning rate over a run, and clipping of gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .config import Optim
from .errors import OptionError

__all__ = ["WARMUP", "clip_gradients", "learning_rate", "load_optimizer", "make_optimizer", "optimizer_state"]


WARMUP = 100
"""Steps of warm-up when none are set."""


def make_optimizer(model: nn.Module, settings: Optim) -> torch.optim.Optimizer:
    """Adam, AdamW or SGD with momentum over the parameters of ``model``.

    Matrices are decayed by ``settings.weight_decay``; biases and other vectors are not.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas)
    if settings.name == "adam":
        return torch.optim.Adam(groups, lr=settings.lr, betas=settings.betas)
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)
    raise OptionError.unknown("optimiser", settings.name, ("adam", "adamw", "sgd"))


def learning_rate(settings: Optim, step: int, fraction: float) -> float:
    """The learning rate of a step.

    ``lr · min(1, (step + 1) / warmup) · (r + (1 − r) (1 + cos π fraction) / 2)`` with ``r = final_lr``

    ``step`` counts from 0, ``fraction`` in [0, 1] is the share of the budget that is spent. The cosine is
    1 all along for the constant schedule.
    """
    warmup = WARMUP if settings.warmup is None else settings.warmup
    warm = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if settings.schedule == "constant":
        return settings.lr * warm
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(0.0, fraction))))
    return settings.lr * warm * (settings.final_lr + (1.0 - settings.final_lr) * cosine)


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """Scale the gradients so that their common 2-norm is at most ``limit`` (0: leave them); the norm before.

    A norm that is not finite is returned as it is, with the gradients untouched: such a step is to be
    skipped.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in with_gradient if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    value = float(norm)
    if limit and math.isfinite(value) and value > limit:
        torch.nn.utils.clip_grads_with_norm_(with_gradient, limit, norm)
    return value


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimiser remembers, as named tensors: ``"<parameter index>.<name>"``."""
    return {
        f"{index}.{name}": value
        for index, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
        if isinstance(value, Tensor)
    }


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """Put back what ``optimizer_state`` gave; the settings of the groups stay those of ``optimizer``."""
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        index, name = key.split(".", 1)
        entries.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
