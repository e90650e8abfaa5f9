"""The cells that are measured: each as elman has it, and once more as a PyTorch user writes its loop by hand.

By hand, what does not wait for the step before is computed for all steps at once, and the rest is a step of its own.
The weights are the cell's; the first state is what is put out.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..cells import ElmanCell, GRUCell, LSTMCell, MinimalGatedCell
from ..combinators import Deep, Leaky
from ..layers import GRU, LSTM, RNN

__all__ = ["CELLS", "COMPOSED", "Contestant", "RandomCell", "by_hand"]

States = tuple[Tensor, ...]


@dataclass(frozen=True)
class Contestant:
    """A cell, ``make(inputs, hidden)``, and its loop by hand.

    ``before(cell, xs)`` gives (T, B, ·) for all steps, ``step(cell, a, *states)`` the next (B, H) states. ``layers``
    are elman's layer and torch.nn's, where there are such.
    """

    make: Callable[[int, int], Any]
    before: Callable[[Any, Tensor], Tensor]
    step: Callable[..., States]
    states: int = 1
    layers: tuple[type[nn.Module], type[nn.Module]] | None = None


def by_hand(contestant: Contestant, cell: Any, step: Callable[..., States] | None = None) -> Callable[[Tensor], Tensor]:
    """The loop that everybody writes, around ``step(a, *states)`` or the contestant's own."""

    def run(xs: Tensor) -> Tensor:
        before = contestant.before(cell, xs)
        states: States = (before.new_zeros(xs.shape[1], cell.hidden_size),) * contestant.states
        ys = []
        for a in before.unbind(0):
            states = contestant.step(cell, a, *states) if step is None else step(a, *states)
            ys.append(states[0])
        return torch.stack(ys)

    return run


def _inputs(cell: Any, xs: Tensor) -> Tensor:
    """U x + b + b', all gates."""
    return F.linear(xs, cell.weight_ih, cell.bias_ih + cell.bias_hh)


def _lstm(cell: Any, a: Tensor, h: Tensor, s: Tensor) -> States:
    i, f, n, q = (a + F.linear(h, cell.weight_hh)).chunk(4, -1)
    s = torch.sigmoid(f) * s + torch.sigmoid(i) * torch.tanh(n)
    return torch.sigmoid(q) * torch.tanh(s), s


def _peephole_lstm(cell: Any, a: Tensor, h: Tensor, s: Tensor) -> States:
    p_i, p_f, p_q = cell.weight_peephole
    i, f, n, q = (a + F.linear(h, cell.weight_hh)).chunk(4, -1)
    s = torch.sigmoid(f + p_f * s) * s + torch.sigmoid(i + p_i * s) * torch.tanh(n)
    return torch.sigmoid(q + p_q * s) * torch.tanh(s), s


def _normed_inputs(cell: Any, xs: Tensor) -> Tensor:
    return cell.norm_ih(F.linear(xs, cell.weight_ih)) + (cell.bias_ih + cell.bias_hh)


def _make_layer_norm_lstm(inputs: int, hidden: int) -> LSTMCell:
    """With recurrent gains of 0.1: with 1, as they begin, what differs in the last bit is soon far apart."""
    cell = LSTMCell(inputs, hidden, layer_norm=True)
    nn.init.constant_(cell.norm_hh.weight, 0.1)
    return cell


def _layer_norm_lstm(cell: Any, a: Tensor, h: Tensor, s: Tensor) -> States:
    i, f, n, q = (a + cell.norm_hh(F.linear(h, cell.weight_hh))).chunk(4, -1)
    s = torch.sigmoid(f) * s + torch.sigmoid(i) * torch.tanh(n)
    return torch.sigmoid(q) * torch.tanh(cell.norm_cell(s)), s


def _plain_inputs(cell: Any, xs: Tensor) -> Tensor:
    """U x + b, all gates: what else is added stays inside a product with a gate."""
    return F.linear(xs, cell.weight_ih, cell.bias_ih)


def _gru(cell: Any, a: Tensor, h: Tensor) -> States:
    x_r, x_u, x_n = a.chunk(3, -1)
    h_r, h_u, h_n = F.linear(h, cell.weight_hh, cell.bias_hh).chunk(3, -1)
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    u = torch.sigmoid(x_u + h_u)
    return ((1 - u) * n + u * h,)


def _reset_before(cell: Any, a: Tensor, h: Tensor) -> States:
    gates = 2 * cell.hidden_size
    r, u = torch.sigmoid(a[:, :gates] + F.linear(h, cell.weight_hh[:gates])).chunk(2, -1)
    n = torch.tanh(a[:, gates:] + F.linear(r * h, cell.weight_hh[gates:]))
    return ((1 - u) * n + u * h,)


def _elman(cell: Any, a: Tensor, h: Tensor) -> States:
    return (torch.tanh(a + F.linear(h, cell.weight_hh)),)


def _leaky(cell: Any, a: Tensor, h: Tensor) -> States:
    (u,) = _elman(cell.cell, a, h)
    return (cell.alpha * h + (1 - cell.alpha) * u,)


def _deep(cell: Any, a: Tensor, h: Tensor) -> States:
    for layer in cell.transition.layers:
        h = torch.tanh(layer(h))
    return _elman(cell.cell, a, h)


def _minimal(cell: Any, a: Tensor, h: Tensor) -> States:
    a_f, a_n = a.chunk(2, -1)
    w_f, w_n = cell.weight_hh.chunk(2)
    f = torch.sigmoid(a_f + F.linear(h, w_f))
    return ((1 - f) * h + f * torch.tanh(a_n + F.linear(f * h, w_n)),)


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "bell": lambda a: torch.exp(-a * a),
    "softmax": lambda a: torch.softmax(a, -1),
    "mean": lambda a: a - a.mean(-1, keepdim=True),
}
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "multiply": torch.mul,
    "larger": torch.maximum,
    "divide": lambda a, b: a / (1 + b * b),
}


class RandomCell(nn.Module):
    """A cell that nobody has a kernel for: ten operations drawn by ``seed``, two of them products with weights.

    Two states (B, H); the step reads U x + b, and bounds what it hands on.
    """

    def __init__(self, inputs: int, hidden: int, seed: int = 4) -> None:
        super().__init__()
        self.hidden_size = hidden
        self.U = nn.Linear(inputs, hidden)
        self.W = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(2))
        draw = random.Random(seed)
        drawn = ["linear 0", "linear 1", *draw.choices([*_UNARY, *_BINARY], k=8)]
        draw.shuffle(drawn)
        self.lines = [(name, draw.randrange(3 + at)) for at, name in enumerate(drawn)]
        """What is applied to the value before, and which value, counted from the three first, goes in beside it."""

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> States:
        h = torch.zeros(batch, self.hidden_size, device=device, dtype=dtype)
        return h, torch.zeros_like(h)

    def forward(self, x: Tensor, state: States) -> tuple[Tensor, States]:
        states = self.step(self.U(x), *state)
        return states[0], states

    def step(self, a: Tensor, h: Tensor, s: Tensor) -> States:
        values = [s, h, a + h]
        for name, beside in self.lines:
            if name in _UNARY:
                values.append(_UNARY[name](values[-1]))
            elif name in _BINARY:
                values.append(_BINARY[name](values[-1], values[beside]))
            else:
                values.append(self.W[int(name[-1])](values[-1]))
        h = torch.tanh(values[-1] + a)
        return h, 0.5 * (s + h * torch.sigmoid(values[-2]))


CELLS: dict[str, Contestant] = {
    "LSTM": Contestant(LSTMCell, _inputs, _lstm, 2, (LSTM, nn.LSTM)),
    "GRU": Contestant(GRUCell, _plain_inputs, _gru, 1, (GRU, nn.GRU)),
    "Elman": Contestant(ElmanCell, _inputs, _elman, 1, (RNN, nn.RNN)),
    "peephole LSTM": Contestant(lambda d, h: LSTMCell(d, h, peepholes=True), _inputs, _peephole_lstm, 2),
    "layer-norm LSTM": Contestant(_make_layer_norm_lstm, _normed_inputs, _layer_norm_lstm, 2),
    "GRU, reset before": Contestant(lambda d, h: GRUCell(d, h, reset_after=False), _inputs, _reset_before),
    "leaky": Contestant(lambda d, h: Leaky(ElmanCell(d, h)), lambda c, xs: _inputs(c.cell, xs), _leaky),
    "2-layer transition": Contestant(
        lambda d, h: Deep(ElmanCell(d, h), transition=2), lambda c, xs: _inputs(c.cell, xs), _deep
    ),
    "random": Contestant(RandomCell, lambda c, xs: c.U(xs), lambda c, a, h, s: c.step(a, h, s), 2),
    "minimal gated": Contestant(MinimalGatedCell, _inputs, _minimal),
}

COMPOSED = ("peephole LSTM", "layer-norm LSTM", "GRU, reset before", "leaky", "2-layer transition", "random")
"""Those without a kernel in any library."""
