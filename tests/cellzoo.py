"""Small cells that between them use everything the engine promises, and how to feed them.

Every cell has ``initial_state`` and ``example(steps, batch) -> (xs, constants)``; ``ZOO`` lists them by name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

__all__ = ["ZOO", "ZooCell", "zoo"]

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


class Accumulate(ZooCell):
    """s = s + x: no weight at all."""

    def initial_state(self, batch: int, *, device: Any = None, dtype: Any = None) -> Any:
        return torch.zeros(batch, D, device=device, dtype=dtype)

    def forward(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        s = s + x
        return s, s


class Leaky(ZooCell):
    """μ = α μ + (1 − α) u with a learned α, one for each unit."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.a, self.U = nn.Parameter(torch.randn(width)), nn.Linear(D, width)

    def forward(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        alpha = torch.sigmoid(self.a)
        s = alpha * s + (1 - alpha) * self.U(x)
        return s, s


class Clockwork(Leaky):
    """Groups of units that move at different rates, by a count carried in the state."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.register_buffer("period", 2 ** (torch.arange(width) // 2))
        self.W = nn.Linear(width, width)

    def initial_state(self, batch: int, *, device: Any = None, dtype: Any = None) -> Any:
        return super().initial_state(batch, device=device, dtype=dtype), torch.zeros(batch, 1, dtype=torch.long)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        h, count = state
        h = torch.where(count % self.period == 0, torch.tanh(self.U(x) + self.W(h)), h)
        return h, (h, count + 1)


class FastWeights(ZooCell):
    """A matrix state (B, width, width) written by outer products (linear attention)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.qkv = nn.Linear(D, 3 * width)
        self.decay = nn.Parameter(torch.randn(width, 1))

    def initial_state(self, batch: int, *, device: Any = None, dtype: Any = None) -> Any:
        return torch.zeros(batch, self.width, self.width, device=device, dtype=dtype)

    def forward(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).chunk(3, -1)
        s = torch.sigmoid(self.decay) * s + k.unsqueeze(-1) * v.unsqueeze(-2)
        return torch.einsum("bk,bkv->bv", q, s), s


class DeltaRule(FastWeights):
    """A matrix state that reads itself before it is written: S += k (v − Sᵀ k)ᵀ."""

    def forward(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).chunk(3, -1)
        k = F.normalize(k, dim=-1)
        old = torch.bmm(k.unsqueeze(1), s).squeeze(1)
        s = s + torch.bmm(k.unsqueeze(2), (v - old).unsqueeze(1))
        return torch.matmul(q.unsqueeze(-2), s).squeeze(-2), s


class Heads(ZooCell):
    """Reshapes into (B, heads, d) and back, with a recurrent matrix for every head (block-diagonal)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(2 * width)
        self.U = nn.Linear(D, 2 * width)
        self.R = nn.Parameter(torch.randn(2, width, width) / 2)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        heads = h.view(-1, 2, self.width // 2)
        mixed = torch.einsum("bnd,nde->bne", heads, self.R).reshape(h.shape[0], self.width)
        h = torch.tanh(self.U(x) + mixed)
        return h.view(h.shape[0], 2, -1).transpose(1, 2).softmax(-1), h


class Shapes(ZooCell):
    """Stack, cat, slice, select, flip, roll, cumsum, pad, repeat, unbind and permute over features."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.U = nn.Linear(D, width)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Any, Tensor]:
        u = self.U(x)
        pair = torch.stack([u, h], 1)  # (B, 2, H)
        first, second = pair.flip(1).unbind(1)
        line = torch.cat([first[:, ::2], second[:, 1::2], first[:, -1:]], -1)
        line = F.pad(line.cumsum(-1), (0, 1))[:, : self.width]
        h = torch.tanh(line.roll(1, -1) + u[:, :1].repeat(1, self.width) - h[:, 0, None] + pair[:, 0])
        return (pair.permute(0, 2, 1), h.narrow(-1, 0, 2)), h


class Reductions(ZooCell):
    """Reductions over features: max, mean, logsumexp, var, norm, prod, argmax."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.U = nn.Linear(D, width)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Any, Tensor]:
        u = self.U(x) + h
        peak, where = u.max(-1, keepdim=True)
        spread = u.var(-1, keepdim=True) + u.norm(dim=-1, keepdim=True) + u.amin(-1, keepdim=True)
        h = torch.tanh(u - peak + torch.logsumexp(u, -1, keepdim=True) * 0.1 + u.mean(-1, keepdim=True) / (1 + spread))
        return (h, where, h.prod(-1), (h > 0).any(-1)), h


class Pointwise(ZooCell):
    """A crowd of elementwise functions."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.U = nn.Linear(D, width)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Any, Tensor]:
        u = self.U(x)
        a = F.softplus(u) + F.elu(h) + F.gelu(u) + F.silu(h) + F.leaky_relu(u - h) + F.hardtanh(u)
        b = torch.exp(-u.abs()) + torch.log1p(h * h) + torch.sqrt(1 + u * u) + torch.rsqrt(2 + h.square()) + torch.atan(h)
        c = torch.maximum(a, b) - torch.minimum(u, h) + torch.clamp(h, -0.5, 0.5) + torch.sin(h) * torch.cos(u)
        d = torch.pow(1 + h * h, 1.5) + torch.erf(u) + (h - u).sign() + torch.lerp(u, h, 0.3) + (2 + u * u).reciprocal().tanh()
        h = torch.tanh(c / (1 + d * d) + F.mish(h) + F.relu6(u) + F.logsigmoid(h) * 0.1)
        return h, h


class SoftmaxGate(ZooCell):
    """Softmax, log-softmax and layer norm inside the recurrence."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.U, self.W, self.norm = nn.Linear(D, width), nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Any, Tensor]:
        a = self.W(self.norm(h)) + self.U(x)
        h = torch.softmax(a, -1) * h + F.log_softmax(a, dim=-1) * 0.1
        return F.layer_norm(h, (self.width,)), h


class Convolution(ZooCell):
    """A convolution over the features of the state."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.U, self.conv = nn.Linear(D, width), nn.Conv1d(2, 2, 3, padding=1)

    def initial_state(self, batch: int, *, device: Any = None, dtype: Any = None) -> Any:
        return torch.zeros(batch, 2, self.width, device=device, dtype=dtype)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Any, Tensor]:
        h = torch.tanh(self.conv(h) + self.U(x).unsqueeze(1))
        return h.flatten(1), h


class Gathers(ZooCell):
    """gather and one-hot scatter by integer inputs, index by a fixed permutation."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.register_buffer("order", torch.arange(width).flip(0))
        self.W = nn.Linear(width, width)

    def example(self, steps: int, batch: int) -> tuple[Any, Any]:
        return torch.randint(self.width, (steps, batch)), None

    def forward(self, x: Tensor, h: Tensor) -> tuple[Any, Tensor]:
        read = h.gather(1, x.unsqueeze(1))
        hot = F.one_hot(x, self.width).to(h.dtype)
        h = torch.tanh(self.W(h[:, self.order]) + hot - read)
        return (read, h.index_select(1, self.order)), h


class InPlace(ZooCell):
    """A step that writes into tensors of its own."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.U = nn.Linear(D, width)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Any, Tensor]:
        u = self.U(x)
        u.mul_(0.5).add_(h)
        u[:, 0] = h[:, 1] * 2
        room = torch.zeros_like(u)
        room[:, 1:3] = torch.tanh(u[:, 1:3])
        room.masked_fill_(u > 1, 0.25)
        return room, torch.tanh(u)


class Constants(ZooCell):
    """Tensors made inside the step and kept as attributes: arange, eye, full, a plain tensor attribute."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.U = nn.Linear(D, width)
        self.ramp = torch.linspace(-1, 1, width, dtype=torch.float64)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Any, Tensor]:
        mix = torch.eye(self.width, dtype=h.dtype).roll(1, 0) * 0.5
        steps = torch.arange(self.width, dtype=h.dtype) / self.width
        half = torch.full((h.shape[0], 1), 0.5, dtype=h.dtype)
        h = torch.tanh(self.U(x) + h @ mix + steps - self.ramp.to(h.dtype) + torch.tensor(0.1, dtype=h.dtype))
        return h * half, h


class WeightNorm(ZooCell):
    """A recurrent matrix under the weight_norm parametrisation."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.U, self.W = nn.Linear(D, width), weight_norm(nn.Linear(width, width))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + self.W(h))
        return h, h


class LowRank(ZooCell):
    """A recurrent matrix that is a product of parameters: (A B) is invariant."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.U, self.A, self.B = nn.Linear(D, width), nn.Linear(2, width), nn.Linear(width, 2)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + h @ (self.A.weight @ self.B.weight).t())
        return h, h


class Bilinear(ZooCell):
    """A product of input and state through a third-order tensor."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.bilinear = nn.Bilinear(D, width, width)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.bilinear(x, h))
        return h, h


class Scalar(ZooCell):
    """A state with no feature dimension: (B,)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.w = nn.Parameter(torch.randn(D))
        self.a = nn.Parameter(torch.tensor(0.7))

    def initial_state(self, batch: int, *, device: Any = None, dtype: Any = None) -> Any:
        return torch.zeros(batch, device=device, dtype=dtype)

    def forward(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.tanh(self.a * s + x @ self.w)
        return s, s


class Stateless(ZooCell):
    """A cell whose state is empty."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.U = nn.Linear(D, width)

    def initial_state(self, batch: int, *, device: Any = None, dtype: Any = None) -> Any:
        return ()

    def forward(self, x: Tensor, state: tuple[()]) -> tuple[Tensor, tuple[()]]:
        return torch.tanh(self.U(x)), ()


class Dead(Elman):
    """Computes things nobody reads, and has a parameter that is never used."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.unused = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        (self.V(h) * 2).sum(-1)
        h = torch.tanh(self.U(x) + self.W(h))
        return self.V(h), h


class Detached(Elman):
    """The gradient is cut in the step: with respect to the state in one path only."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + self.W(h.detach()) + 0.3 * h)
        return self.V(h), h


class Truncated(Elman):
    """The gradient through time is cut altogether."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.U(x) + self.W(h.detach()))
        return self.V(h), h


class SharedWeight(ZooCell):
    """One matrix used twice: for the input and for the state."""

    def __init__(self, width: int = D) -> None:
        super().__init__(D)
        self.W = nn.Linear(D, D)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.W(x) + self.W(h))
        return self.W(h), h


ZOO: dict[str, Callable[[], ZooCell]] = {
    "lstm": Lstm,
    "lstm with peepholes": partial(Lstm, peephole=True),
    "lstm with layer norm": partial(Lstm, norm=True),
    "stack of gru": Stack,
    "stack of lstm": partial(Stack, layer=LstmLayer),
    "stack without biases": partial(Stack, layer=ElmanLayer, layers=2),
    **{
        kind.__name__: kind
        for kind in (
            Elman, ElmanTwoBiases, Gru, Feedforward, JordanTeacherForced, JordanFree, Delay, DelayLine, OneProduct, Swap,
            PureSwap, SharedNext, TwoIndependent, Feeds, OldState, OldStateItself, YIsInput, YTwice, YFixed, StateFixed, Nested,
            Tokens, SharedInput, Conditioned, Attends, AttendsMasked, MultiHead, Accumulate, Leaky, Clockwork, FastWeights,
            DeltaRule, Heads, Shapes, Reductions, Pointwise, SoftmaxGate, Convolution, Gathers, InPlace, Constants,
            WeightNorm, LowRank, Bilinear, Scalar, Stateless, Dead, Detached, Truncated, SharedWeight,
        )
    },
}  # fmt: skip


@lru_cache(maxsize=None)
def zoo(name: str) -> ZooCell:
    """The cell of that name in float64; the same object every time, so that it is traced once."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return ZOO[name]().double()
