"""Small recurrent networks, in the shapes that the field knows and a few that only a test would write."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

D = 3  # features of an input


class ZooCell(nn.Module):
    """A cell with one state of ``width`` units, fed with (T, B, 3) random numbers."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.width = width

    def initial_state(self, batch: int, *, device: Any = None, dtype: Any = None) -> Any:
        return torch.zeros(batch, self.width, device=device, dtype=dtype)

    def example(self, steps: int, batch: int) -> tuple[Any, Any]:
        return torch.randn(steps, batch, D), None


class Elman(ZooCell):
    """h = tanh(U x + W h + b), o = c + V h."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.U = nn.Linear(D, width)
        self.W = nn.Linear(width, width, bias=False)
        self.V = nn.Linear(width, 2)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + self.W(h))
        return self.V(h), h


class ElmanTwoBiases(ZooCell):
    """As torch.nn.RNNCell writes it, with weights used through ``W.t()``."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.U, self.W = nn.Parameter(torch.randn(width, D) / 2), nn.Parameter(torch.randn(width, width) / 2)
        self.b, self.c = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(x @ self.U.t() + self.b + (h @ self.W.t() + self.c))
        return h, h


class Lstm(ZooCell):
    """Long short-term memory; ``peephole`` and ``norm`` are the two usual ways to leave the frozen kernels."""

    def __init__(self, width: int = 4, *, peephole: bool = False, norm: bool = False, features: int = D) -> None:
        super().__init__(width)
        self.U, self.W = nn.Linear(features, 4 * width), nn.Linear(width, 4 * width, bias=False)
        self.peephole = nn.Parameter(torch.randn(3, width)) if peephole else None
        self.norm = nn.LayerNorm(4 * width) if norm else nn.Identity()
        self.norm_c = nn.LayerNorm(width) if norm else nn.Identity()

    def initial_state(self, batch: int, *, device: Any = None, dtype: Any = None) -> Any:
        zeros = partial(torch.zeros, batch, self.width, device=device, dtype=dtype)
        return zeros(), zeros()

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, c = state
        i, f, g, o = self.norm(self.U(x) + self.W(h)).chunk(4, -1)
        if self.peephole is not None:
            i, f = i + self.peephole[0] * c, f + self.peephole[1] * c
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        if self.peephole is not None:
            o = o + self.peephole[2] * c
        h = torch.sigmoid(o) * torch.tanh(self.norm_c(c))
        return h, (h, c)


class Gru(ZooCell):
    """Gated recurrent unit with the reset gate before the product."""

    def __init__(self, width: int = 4, features: int = D) -> None:
        super().__init__(width)
        self.U, self.W = nn.Linear(features, 3 * width), nn.Linear(width, 2 * width, bias=False)
        self.R = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        u, r, n = self.U(x).split(self.width, -1)
        left, right = self.W(h).chunk(2, -1)
        u, r = torch.sigmoid(u + left), torch.sigmoid(r + right)
        h = u * h + (1 - u) * torch.tanh(n + self.R(r * h))
        return h, h


class Stack(ZooCell):
    """Layers written as one cell."""

    def __init__(self, width: int = 4, layer: type = Gru, layers: int = 3) -> None:
        super().__init__(width)
        self.layers = nn.ModuleList([layer(width, features=D if i == 0 else width) for i in range(layers)])

    def initial_state(self, batch: int, *, device: Any = None, dtype: Any = None) -> Any:
        return tuple(layer.initial_state(batch, device=device, dtype=dtype) for layer in self.layers)

    def forward(self, x: Tensor, state: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        new = []
        for layer, s in zip(self.layers, state, strict=True):
            x, s = layer(x, s)
            new.append(s)
        return x, tuple(new)


class LstmLayer(Lstm):
    """An LSTM with its number of features by keyword, for ``Stack``."""

    def __init__(self, width: int = 4, features: int = D) -> None:
        super().__init__(width, features=features)


class ElmanLayer(ZooCell):
    """The plainest layer, without a bias, so that the sum of two products is all there is."""

    def __init__(self, width: int = 4, features: int = D) -> None:
        super().__init__(width)
        self.U, self.W = nn.Linear(features, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + self.W(h))
        return h, h


class Feedforward(ZooCell):
    """No recurrence: the state goes through untouched and unread."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.U = nn.Linear(D, width)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.U(x)), h


class JordanTeacherForced(ZooCell):
    """Output recurrence whose previous output is given: the recurrence goes through the input alone."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.U, self.W, self.V = nn.Linear(D, width), nn.Linear(2, width), nn.Linear(width, 2)

    def initial_state(self, batch: int, *, device: Any = None, dtype: Any = None) -> Any:
        return torch.zeros(batch, 2, device=device, dtype=dtype)

    def example(self, steps: int, batch: int) -> tuple[Any, Any]:
        return {"x": torch.randn(steps, batch, D), "target": torch.randn(steps, batch, 2)}, None

    def forward(self, x: dict[str, Tensor], before: Tensor) -> tuple[Tensor, Tensor]:
        return self.V(torch.tanh(self.U(x["x"]) + self.W(before))), x["target"]


class JordanFree(JordanTeacherForced):
    """The same net running on its own output."""

    def forward(self, x: dict[str, Tensor], before: Tensor) -> tuple[Tensor, Tensor]:
        y = self.V(torch.tanh(self.U(x["x"]) + self.W(before)))
        return y, y


class Delay(ZooCell):
    """A delay register: s(t) = x(t), y(t) = tanh(x(t) − s(t−1))."""

    def initial_state(self, batch: int, *, device: Any = None, dtype: Any = None) -> Any:
        return torch.zeros(batch, D, device=device, dtype=dtype)

    def forward(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(x - s), x


class DelayLine(ZooCell):
    """Three registers one after the other, the first fed by a layer: still no loop."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.U = nn.Linear(D, width)

    def initial_state(self, batch: int, *, device: Any = None, dtype: Any = None) -> Any:
        return [torch.zeros(batch, self.width, device=device, dtype=dtype) for _ in range(3)]

    def forward(self, x: Tensor, s: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return s[2] * torch.sigmoid(s[0]), [self.U(x), s[0], torch.tanh(s[1])]


class OneProduct(ZooCell):
    """Two states that are slices of one product."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.U, self.W = nn.Linear(D, 3 * width), nn.Linear(3 * width, 3 * width)

    def initial_state(self, batch: int, *, device: Any = None, dtype: Any = None) -> Any:
        zeros = partial(torch.zeros, device=device, dtype=dtype)
        return zeros(batch, self.width), zeros(batch, 2 * self.width)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        both = torch.tanh(self.U(x) + self.W(torch.cat(state, -1)))
        return both[:, 1:4], (both[:, : self.width], both[:, self.width :])


class Swap(ZooCell):
    """Two states that change places."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.U = nn.Linear(D, width)

    def initial_state(self, batch: int, *, device: Any = None, dtype: Any = None) -> Any:
        return tuple(torch.zeros(batch, self.width, device=device, dtype=dtype) for _ in range(2))

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        a, b = state
        return a * b, (torch.tanh(b + self.U(x)), a)


class PureSwap(Swap):
    """Two states that change places and nothing else: the loop has no operation."""

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        a, b = state
        return self.U(x) * a, (b, a)


class SharedNext(Swap):
    """One value is the next of two states, and a third is a delay register."""

    def initial_state(self, batch: int, *, device: Any = None, dtype: Any = None) -> Any:
        return tuple(torch.zeros(batch, self.width, device=device, dtype=dtype) for _ in range(3))

    def forward(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...]]:
        a, b, c = state
        half = 0.5 * c
        return (torch.sin(a), b), (half, torch.tanh(self.U(x)), half)


class TwoIndependent(Swap):
    """Two recurrences that do not read one another: two loops."""

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        a, b = state
        u = self.U(x)
        a, b = torch.tanh(a * 0.5 + u), torch.sigmoid(b - u)
        return torch.cat([a, b], -1), (a, b)


class Feeds(Swap):
    """The old state of one loop feeds the next: loop, segment, loop."""

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        a, b = state
        new_b = torch.tanh(b * 0.9 + torch.sin(a) * 2)
        return new_b + a, (torch.tanh(a * 0.5 + self.U(x)), new_b)


class OldState(Elman):
    """y reads the state before the step."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.V(h), torch.tanh(self.U(x) + self.W(h))


class OldStateItself(Elman):
    """y *is* the state before the step."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return h, torch.tanh(self.U(x) + self.W(h))


class YIsInput(Elman):
    """y is the input itself."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.tanh(self.U(x) + self.W(h))


class YTwice(Elman):
    """y holds one tensor twice, and views of it."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Any, Tensor]:
        h = torch.tanh(self.U(x) + self.W(h))
        return {"a": h, "b": (h, h[:, 1:], x)}, h


class YFixed(Elman):
    """y is the same at every step: a parameter, one for each row."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Any, Tensor]:
        h = torch.tanh(self.U(x) + self.W(h))
        return (self.V.bias.expand(h.shape[0], 2), h.new_ones(h.shape[0], 1)), h


class StateFixed(Elman):
    """The next state is a parameter, whatever happened."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Any, Tensor]:
        return torch.tanh(self.U(x) + self.W(h)), self.U.bias.expand_as(h)


class Nested(ZooCell):
    """States and inputs in nested structures, of different widths, with None and an integer count among them."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.U, self.W, self.V = nn.Linear(D, width), nn.Linear(width, width), nn.Linear(width + 2, 2)

    def initial_state(self, batch: int, *, device: Any = None, dtype: Any = None) -> Any:
        zeros = partial(torch.zeros, device=device, dtype=dtype)
        count = torch.zeros(batch, dtype=torch.long, device=device)
        return {"h": (zeros(batch, self.width), None), "small": [zeros(batch, 2)], "count": count, "s": zeros(batch)}

    def example(self, steps: int, batch: int) -> tuple[Any, Any]:
        return (torch.randn(steps, batch, D), {"gate": torch.rand(steps, batch)}), None

    def forward(self, x: Any, state: Any) -> tuple[Any, Any]:
        (h, nothing), (small,), count, s = state["h"], state["small"], state["count"], state["s"]
        h = torch.tanh(self.U(x[0]) + self.W(h)) * x[1]["gate"].unsqueeze(-1)
        small = torch.tanh(self.V(torch.cat([small, h], -1))) / (1 + count.unsqueeze(-1))
        s = s * 0.5 + small.sum(-1)
        new = {"h": (h, nothing), "small": [small], "count": count + 1, "s": s}
        return {"y": small * s.unsqueeze(1), "count": count, "none": None}, new


class Tokens(ZooCell):
    """Integer inputs through an embedding, and a boolean one as a mask that resets the state."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.embedding = nn.Embedding(7, width)
        self.W = nn.Linear(width, width)

    def example(self, steps: int, batch: int) -> tuple[Any, Any]:
        return (torch.randint(7, (steps, batch)), torch.rand(steps, batch) < 0.3), None

    def forward(self, x: tuple[Tensor, Tensor], h: Tensor) -> tuple[Any, Tensor]:
        token, reset = x
        h = torch.where(reset.unsqueeze(-1), torch.zeros_like(h), h)
        h = torch.tanh(self.embedding(token) + self.W(h))
        return (h @ self.embedding.weight.t(), token + 1, ~reset), h


class SharedInput(Elman):
    """One of the inputs is shared by the rows: (T, 1, …)."""

    def example(self, steps: int, batch: int) -> tuple[Any, Any]:
        return (torch.randn(steps, batch, D), torch.randn(steps, 1, self.width)), None

    def forward(self, x: Any, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x[0]) + self.W(h) * x[1])
        return self.V(h), h


class Conditioned(Elman):
    """A vector that does not change over time is added at every step: a(t) += R c."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.R = nn.Linear(2, width)

    def example(self, steps: int, batch: int) -> tuple[Any, Any]:
        return torch.randn(steps, batch, D), {"context": torch.randn(batch, 2), "scale": torch.rand(batch)}

    def forward(self, x: Tensor, h: Tensor, constants: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + self.W(h) + self.R(constants["context"]))
        return self.V(h) * constants["scale"].unsqueeze(-1), h


class Attends(Elman):
    """Additive attention over an encoder's states, which are a constant (B, S, width)."""

    def example(self, steps: int, batch: int) -> tuple[Any, Any]:
        return torch.randn(steps, batch, D), torch.randn(batch, 5, self.width)

    def forward(self, x: Tensor, h: Tensor, source: Tensor) -> tuple[Any, Tensor]:
        scores = torch.tanh(self.W(h).unsqueeze(1) + source).sum(-1)
        weights = torch.softmax(scores, -1)
        context = torch.bmm(weights.unsqueeze(1), source).squeeze(1)
        h = torch.tanh(self.U(x) + context)
        return (self.V(h), weights), h


class AttendsMasked(Attends):
    """Multiplicative attention with a padding mask of the source among the constants."""

    def example(self, steps: int, batch: int) -> tuple[Any, Any]:
        mask = torch.rand(batch, 5) < 0.6
        mask[:, 0] = True
        return torch.randn(steps, batch, D), (torch.randn(batch, 5, self.width), mask)

    def forward(self, x: Tensor, h: Tensor, constants: Any) -> tuple[Any, Tensor]:
        source, mask = constants
        scores = torch.einsum("bh,bsh->bs", self.W(h), source).masked_fill(~mask, -torch.inf)
        context = torch.einsum("bs,bsh->bh", torch.softmax(scores, -1), source)
        h = torch.tanh(self.U(x) + context)
        return self.V(h), h


class MultiHead(Elman):
    """torch.nn.MultiheadAttention over a constant source."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def example(self, steps: int, batch: int) -> tuple[Any, Any]:
        return torch.randn(steps, batch, D), torch.randn(batch, 5, self.width)

    def forward(self, x: Tensor, h: Tensor, source: Tensor) -> tuple[Any, Tensor]:
        read, weights = self.attention(h.unsqueeze(1), source, source)
        h = torch.tanh(self.U(x) + read.squeeze(1))
        return (self.V(h), weights), h
