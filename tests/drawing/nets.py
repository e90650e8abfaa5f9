"""Networks that the tests of drawing draw: written as a user would, and put together from elman's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import elman
from elman.cells import ElmanCell, GRUCell, LSTMCell
from elman.combinators import Residual, Stack
from elman.combinators.attend import Attend
from elman.combinators.conditioned import Conditioned
from elman.combinators.deep import Deep
from elman.combinators.delay import Delay
from elman.combinators.feedback import Feedback
from elman.combinators.learned_state import LearnedState
from elman.combinators.time_skip import TimeSkip
from elman.networks.autoencoder import SequenceAutoencoder
from elman.networks.bidirectional import Bidirectional
from elman.networks.jordan import jordan
from elman.networks.summary import Summary
from elman.networks.window import Window

__all__ = ["CELLS", "NETWORKS", "Branching", "D", "H", "Register", "Tree", "UserNet", "WritesInPlace", "sequence"]

D, H = 3, 4


def sequence(steps: int = 5, width: int = D) -> Tensor:
    return torch.zeros(steps, 2, width)


class UserNet(nn.Module):
    """h = tanh(U x + W h), o = V h, without any help from elman."""

    input_size = D

    def __init__(self) -> None:
        super().__init__()
        self.U, self.W, self.V = nn.Linear(D, H), nn.Linear(H, H), nn.Linear(H, 2)

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.zeros(batch, H, device=device, dtype=dtype)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + self.W(h))
        return self.V(h), h


class Register(UserNet):
    """Keeps its last three states in one tensor (B, 3, H) and reads the oldest."""

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.zeros(batch, 3, H, device=device, dtype=dtype)

    def forward(self, x: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + self.W(last[:, 0]))
        return self.V(h), torch.cat([last[:, 1:], h.unsqueeze(1)], 1)


class WritesInPlace(nn.Module):
    """A network that fills a tensor step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(D, H)

    def forward(self, xs: Tensor) -> Tensor:
        h = xs.new_zeros(xs.shape[1], H)
        out = xs.new_zeros(xs.shape[0], xs.shape[1], H)
        for t in range(len(xs)):
            h = self.cell(xs[t], h)
            out[t] = h
        return out


class Branching(UserNet):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x if x.sum() > 0 else -x, h)


class Tree(nn.Module):
    """The same composition at every node of a binary tree."""

    def __init__(self) -> None:
        super().__init__()
        self.leaf, self.left, self.right = nn.Linear(D, H), nn.Linear(H, H), nn.Linear(H, H)

    def forward(self, xs: Tensor) -> Tensor:
        level = [torch.tanh(self.leaf(x)) for x in xs]
        while len(level) > 1:
            pairs = zip(level[::2], level[1::2], strict=True)
            level = [torch.tanh(self.left(a) + self.right(b)) for a, b in pairs]
        return level[0]


class Shifted(nn.Module):
    """Reads the sequence of the step before: teacher forcing written out."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = ElmanCell(D, H), nn.Linear(H, D)

    def forward(self, y: Tensor) -> Tensor:
        before = torch.cat([torch.zeros_like(y[:1]), y[:-1]])
        return self.out(elman.scan(self.cell, before)[0])


# Cells, with what they read beside a plain sequence.
CELLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "elman": (lambda: ElmanCell(D, H), {}),
    "torch's gru": (lambda: nn.GRUCell(D, H), {}),
    "lstm": (lambda: LSTMCell(D, H), {}),
    "lstm, peepholes and projection": (lambda: LSTMCell(D, H, peepholes=True, proj_size=2), {}),
    "gru, reset before": (lambda: GRUCell(D, H, reset_after=False), {}),
    "user": (UserNet, {}),
    "register": (Register, {}),
    "stack": (lambda: Stack([LSTMCell(D, H), Residual(GRUCell(H, H))]), {}),
    "delays": (lambda: Stack([Delay(ElmanCell(D, H), 1), Delay(ElmanCell(H, H), 2)]), {}),
    "skip through time": (lambda: TimeSkip(ElmanCell(D + H, H), 2), {}),
    "deep": (lambda: Deep(ElmanCell(D, H), input=1, transition=2, output=1, skip=True), {}),
    "jordan": (lambda: jordan(D, H, 2), {}),
    "learned state": (lambda: LearnedState(ElmanCell(D, H)), {}),
    "conditioned": (lambda: Conditioned(ElmanCell(D + 2, H), 2, where="both"), {"constants": torch.zeros(2, 2)}),
    "attend, conditioned": (
        lambda: Conditioned(Attend(GRUCell(D + 7, H), 5, key="m"), 2, key="s"),
        {"constants": {"m": torch.zeros(2, 6, 5), "s": torch.zeros(2, 2)}},
    ),
    "attend": (lambda: Attend(GRUCell(D + 5, H), 5), {"constants": torch.zeros(2, 6, 5)}),
}

NETWORKS: dict[str, Any] = {
    "bidirectional": lambda: Bidirectional(ElmanCell(D, H), GRUCell(D, H)),
    "summary": lambda: Summary(LSTMCell(D, H), nn.Linear(H, 2)),
    "autoencoder": lambda: SequenceAutoencoder(ElmanCell(D, H), Feedback(GRUCell(H + D, H), nn.Linear(H, D))),
    "window": lambda: Window(ElmanCell(3 * D, H), 1, 1),
    "in place": WritesInPlace,
    "shifted": Shifted,
}
