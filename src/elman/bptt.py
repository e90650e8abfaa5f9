"""Back-propagation through time, written out: the formulas of the textbook, one line each.

For reading, and as the oracle that the derived gradients are tested against; ``scan`` is what trains. The network is
the Elman network with a softmax over symbols:

    a(t) = b + W h(t-1) + U x(t)    h(t) = tanh a(t)    o(t) = c + V h(t)    ŷ(t) = softmax o(t)
    L = Σ_t L(t) = -Σ_t log ŷ(t)[y(t)]

A row of a batch is a row vector, so that the W h of a text is h Wᵀ here, and sums over t are sums over t and rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InputError

__all__ = ["Gradients", "Parameters", "Unrolled", "backward", "forward"]


@dataclass(frozen=True)
class Parameters:
    """U (H, D), W (H, H), V (O, H), b (H), c (O)."""

    U: Tensor
    W: Tensor
    V: Tensor
    b: Tensor
    c: Tensor


@dataclass(frozen=True)
class Unrolled:
    """The forward pass: x (T, B, D), y (T, B) symbols, h (T + 1, B, H) with h(0), o and ŷ (T, B, O), L(t) (T, B)."""

    x: Tensor
    y: Tensor
    h: Tensor
    o: Tensor
    y_hat: Tensor
    losses: Tensor

    @property
    def loss(self) -> Tensor:
        """L, summed over steps and sequences."""
        return self.losses.sum()


@dataclass(frozen=True)
class Gradients:
    """∇L in the parameters (each as ``Parameters`` has it), in x and h(0), and the adjoints: h, o (T, B, …)."""

    U: Tensor
    W: Tensor
    V: Tensor
    b: Tensor
    c: Tensor
    x: Tensor
    h0: Tensor
    h: Tensor
    o: Tensor


def forward(p: Parameters, x: Tensor, y: Tensor, h0: Tensor | None = None) -> Unrolled:
    """Unroll over x (T, B, D) from h(0) (B, H) or zeros, with targets y (T, B).

    Raises InputError where they do not fit. Source: Goodfellow, Bengio, Courville 2016, equations 10.8 to 10.14.
    """
    if x.dim() != 3 or y.shape != x.shape[:2] or y.is_floating_point():
        raise InputError(
            f"x must be (T, B, D) and y symbols (T, B); got {tuple(x.shape)} and {tuple(y.shape)} of {y.dtype}."
        )
    h = [torch.zeros(x.shape[1], len(p.W), dtype=x.dtype, device=x.device) if h0 is None else h0]
    for x_t in x:
        h.append(torch.tanh(p.b + h[-1] @ p.W.T + x_t @ p.U.T))
    hs = torch.stack(h)
    o = p.c + hs[1:] @ p.V.T
    y_hat = torch.softmax(o, -1)
    losses = -torch.log_softmax(o, -1).gather(-1, y[..., None])[..., 0]  # log of a softmax that cannot underflow
    return Unrolled(x, y, hs, o, y_hat, losses)


def backward(p: Parameters, run: Unrolled) -> Gradients:
    """∇L by back-propagation through time: O(T) steps, O(T) memory.

        ∇_{o(t)} L = ŷ(t) - 1[y(t)]
        ∇_{h(τ)} L = Vᵀ ∇_{o(τ)} L
        ∇_{h(t)} L = Wᵀ diag(1 - h(t+1)²) ∇_{h(t+1)} L + Vᵀ ∇_{o(t)} L
        ∇_c = Σ ∇_{o(t)} L                  ∇_V = Σ ∇_{o(t)} L h(t)ᵀ
        ∇_b = Σ ∇_{a(t)} L                  ∇_W = Σ ∇_{a(t)} L h(t-1)ᵀ      ∇_U = Σ ∇_{a(t)} L x(t)ᵀ
        with ∇_{a(t)} L = diag(1 - h(t)²) ∇_{h(t)} L, and ∂L/∂L(t) = 1

    Source: Goodfellow, Bengio, Courville 2016, equations 10.17 to 10.28.
    """
    h, before = run.h[1:], run.h[:-1]
    grad_o = run.y_hat - torch.nn.functional.one_hot(run.y, len(p.c))
    grad_h = torch.empty_like(h)
    later = torch.zeros_like(run.h[0])  # what comes from h(t+1): nothing at the last step
    for t in reversed(range(len(h))):
        grad_h[t] = later + grad_o[t] @ p.V
        later = ((1 - h[t] ** 2) * grad_h[t]) @ p.W
    grad_a = (1 - h**2) * grad_h
    return Gradients(
        U=_outer(grad_a, run.x),
        W=_outer(grad_a, before),
        V=_outer(grad_o, h),
        b=grad_a.sum((0, 1)),
        c=grad_o.sum((0, 1)),
        x=grad_a @ p.U,
        h0=later,
        h=grad_h,
        o=grad_o,
    )


def _outer(g: Tensor, v: Tensor) -> Tensor:
    """Σ_t g(t) v(t)ᵀ, over steps and sequences."""
    return torch.einsum("tbi,tbj->ij", g, v)
