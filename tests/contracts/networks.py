"""Rows of the table of networks: ``tests/test_network_contract.py`` holds each to what is promised of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import elman
from elman.cells import DenseCell, ElmanCell, GRUCell, LSTMCell
from elman.combinators import Conditioned, Feedback, Residual, Stack
from elman.networks import Bidirectional, LanguageModel, SequenceAutoencoder, Summary, Untied, Window, jordan

from . import definitions
from .row import D, numbers

__all__ = ["NETWORKS", "Mine", "Network"]

H, C, V = 4, 2, 5
STEPS = 4
"""Steps of the untied networks."""


def called(network: nn.Module, xs: Any, state: Any, **options: Any) -> tuple[Any, Any]:
    return network(xs, state, **options)


def rebuilt(network: nn.Module, xs: Any, state: Any, *, constants: None = None, **options: Any) -> tuple[Any, Any]:
    """An autoencoder takes and gives no state."""
    return network(*xs, **options), ()


def predicted(network: nn.Module, xs: Any, state: Any, *, constants: None = None, **options: Any) -> tuple[Any, Any]:
    """A language model takes no constants."""
    return network(xs, state, **options)


def plain(steps: int, batch: int) -> tuple[Any, Any]:
    return numbers(steps, batch, D), None


def conditioned(steps: int, batch: int) -> tuple[Any, Any]:
    return numbers(steps, batch, D), numbers(batch, C)


def alone(steps: int, batch: int) -> tuple[Any, Any]:
    return (numbers(steps, batch, D),), None


def forced(steps: int, batch: int) -> tuple[Any, Any]:
    return (numbers(steps, batch, D), numbers(steps, batch, D)), None


def symbols(steps: int, batch: int) -> tuple[Any, Any]:
    return (numbers(steps, batch, D), torch.randint(V, (steps, batch))), None


def tokens(steps: int, batch: int) -> tuple[Any, Any]:
    return torch.randint(V, (steps, batch)), None


def last(pieces: list[Tensor]) -> Tensor:
    return pieces[-1]


@dataclass(frozen=True)
class Network:
    """``make()`` gives the network, seeded beforehand; ``example(T, B)`` gives xs, (T, B, …), and constants, (B, …).

    ``run`` calls it and ``by_hand`` is what it means: (network, xs, state, *, constants, lengths) -> (y, state), both.
    ``joined`` puts the outputs of pieces together; None where y(t) waits for later steps, or may not be cut. ``steps``
    is the only T that it reads, where there is only one, and ``lengths`` whether it reads sequences that differ in it.
    """

    make: Callable[[], nn.Module]
    by_hand: Callable[..., tuple[Any, Any]]
    example: Callable[[int, int], tuple[Any, Any]] = plain
    run: Callable[..., tuple[Any, Any]] = called
    joined: Callable[[list[Tensor]], Tensor] | None = None
    steps: int | None = None
    lengths: bool = True


class Mine(nn.Module):
    """A user's own cell, that says nothing about itself."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(D + H, H)

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"h": torch.full((batch, H), 0.5, device=device, dtype=dtype)}

    def forward(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        h = torch.sin(self.w(torch.cat([x, state["h"]], -1)))
        return h, {"h": h}


def both(forward: Callable[[], nn.Module], backward: Callable[[], nn.Module], *merge: Any, **row: Any) -> Network:
    return Network(lambda: Bidirectional(forward(), backward(), *merge), definitions.bidirectional, **row)


def beside(left: int, right: int, cell: Callable[[int], nn.Module] = lambda n: GRUCell(n, H), **row: Any) -> Network:
    joined = None if right else torch.cat
    make = lambda: Window(cell((left + 1 + right) * D), left, right)  # noqa: E731
    return Network(make, definitions.window, joined=joined, **row)


def summed(cell: Callable[[], nn.Module], readout: Callable[[], nn.Module] | None = None, **row: Any) -> Network:
    make = lambda: Summary(cell(), None if readout is None else readout())  # noqa: E731
    return Network(make, definitions.summary, joined=last, **row)


def coded(make: Callable[[], nn.Module], example: Callable[[int, int], tuple[Any, Any]]) -> Network:
    return Network(make, definitions.autoencoder, example, rebuilt)


def each(cell: Callable[[], nn.Module], **row: Any) -> Network:
    return Network(lambda: Untied(cell() for _ in range(STEPS)), definitions.untied, steps=STEPS, lengths=False, **row)


def modelled(make: Callable[[], nn.Module]) -> Network:
    return Network(make, definitions.language_model, tokens, predicted, torch.cat, lengths=False)


def fed(example: Callable[[int, int], tuple[Any, Any]] = plain, **options: Any) -> Network:
    return Network(lambda: jordan(D, H, V, **options), definitions.one_cell, example, elman.scan, torch.cat)


def conditioned_gru() -> nn.Module:
    return Conditioned(GRUCell(D + C, H), C)


def autoencoder() -> nn.Module:
    return SequenceAutoencoder(LSTMCell(D, H), Feedback(GRUCell(H + D, H), nn.Linear(H, D)))


def symbolic() -> nn.Module:
    encoder = Summary(Stack([GRUCell(D, H), ElmanCell(H, H)]), nn.Linear(H, C))
    return SequenceAutoencoder(encoder, Feedback(LSTMCell(C + V, H), nn.Linear(H, V), feed="softmax"))


NETWORKS = {
    "bidirectional": both(lambda: LSTMCell(D, H), lambda: LSTMCell(D, H)),
    "bidirectional, two kinds": both(lambda: ElmanCell(D, H), lambda: LSTMCell(D, 3)),
    "bidirectional, sum": both(lambda: GRUCell(D, H), lambda: GRUCell(D, H), "sum"),
    "bidirectional, mean, user's own": both(Mine, Mine, "mean"),
    "bidirectional, product, torch's": both(lambda: nn.GRUCell(D, H), lambda: nn.LSTMCell(D, H), "product"),
    "bidirectional, own merge": both(lambda: GRUCell(D, H), Mine, torch.maximum),
    "bidirectional, conditioned": both(conditioned_gru, conditioned_gru, example=conditioned),
    "bidirectional, combinators": both(
        lambda: Stack([GRUCell(D, 3), ElmanCell(3, H)]), lambda: Residual(LSTMCell(D, H)), "sum"
    ),
    "window of one": beside(0, 0),
    "window, before": beside(2, 0),
    "window, further than the sequence": beside(7, 0, lambda n: ElmanCell(n, H)),
    "window, ahead": beside(0, 2, lambda n: LSTMCell(n, H)),
    "window, ahead of the sequence": beside(1, 9),
    "window, torch's": beside(1, 1, lambda n: nn.GRUCell(n, H)),
    "window of a module": beside(1, 2, lambda n: nn.Sequential(nn.Linear(n, H), nn.Tanh())),
    "window of a module, before": beside(2, 0, lambda n: nn.Linear(n, H)),
    "window, dense": beside(1, 1, lambda n: DenseCell(n, H)),
    "window, conditioned": beside(1, 0, lambda n: Conditioned(GRUCell(n + C, H), C), example=conditioned),
    "summary": summed(lambda: LSTMCell(D, H)),
    "summary, read out": summed(lambda: GRUCell(D, H), lambda: nn.Linear(H, C)),
    "summary, torch's": summed(lambda: nn.LSTMCell(D, H), lambda: nn.Sequential(nn.Linear(H, C), nn.Tanh())),
    "summary, conditioned": summed(conditioned_gru, example=conditioned),
    "autoencoder, free": coded(autoencoder, alone),
    "autoencoder, forced": coded(autoencoder, forced),
    "autoencoder of symbols, free": coded(symbolic, alone),
    "autoencoder of symbols, forced": coded(symbolic, symbols),
    "untied": each(lambda: LSTMCell(D, H)),
    "untied, user's own": each(Mine),
    "untied, conditioned": each(conditioned_gru, example=conditioned),
    "language model": modelled(lambda: LanguageModel(V, 3, Stack([LSTMCell(3, H), GRUCell(H, H)]))),
    "language model, tied": modelled(lambda: LanguageModel(V, 3, ElmanCell(3, H), tie=True)),
    "jordan, its probabilities": fed(feed="softmax", squash="relu"),
    "jordan, its likeliest": fed(feed="argmax"),
    "jordan, forced by symbols": fed(symbols),
    "jordan, of some width": fed(embed=torch.nn.Softplus(), width=V),
}
"""The Jordan network is a cell too, and has its rows in the table of cells; here are more of its variants."""
