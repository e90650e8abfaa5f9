"""Small cells that between them use the operations and structures that a step may be made of."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from zoo_networks import D, Elman, ZooCell


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
        b = (
            torch.exp(-u.abs())
            + torch.log1p(h * h)
            + torch.sqrt(1 + u * u)
            + torch.rsqrt(2 + h.square())
            + torch.atan(h)
        )
        c = torch.maximum(a, b) - torch.minimum(u, h) + torch.clamp(h, -0.5, 0.5) + torch.sin(h) * torch.cos(u)
        d = (
            torch.pow(1 + h * h, 1.5)
            + torch.erf(u)
            + (h - u).sign()
            + torch.lerp(u, h, 0.3)
            + (2 + u * u).reciprocal().tanh()
        )
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
