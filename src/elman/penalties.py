"""Training terms: what is added to the loss so that activations stay small and change slowly."""

from __future__ import annotations

from torch import Tensor

from .errors import InputError

__all__ = ["activation_penalty", "temporal_penalty"]


def activation_penalty(h: Tensor) -> Tensor:
    """The mean of h², for activations h (T, B, H): multiplied by α and added to the loss it keeps them small.

    Source: Merity, McCann, Socher 2017, Revisiting activation regularization for language RNNs, section 4 (AR).
    """
    return h.pow(2).mean()


def temporal_penalty(h: Tensor) -> Tensor:
    """The mean of (h(t+1) - h(t))², for activations h (T, B, H): multiplied by β it has them change slowly.

    Zero for a single step. Raises InputError for a tensor without a time dimension. Source: as for
    ``activation_penalty``, section 4 (TAR); Krueger and Memisevic 2016 penalise the change of the norm instead.
    """
    if h.dim() < 2:
        raise InputError(f"temporal_penalty needs activations (T, B, …); got {tuple(h.shape)}.")
    return (h[1:] - h[:-1]).pow(2).mean() if len(h) > 1 else h.sum() * 0.0
