"""Initialisation schemes, by name.

    uniform         every parameter from U(-1/√H, 1/√H), torch.nn's own default
    xavier          weights scaled by fan in and fan out, gate by gate; biases zero
    orthogonal      recurrent weights orthogonal, gate by gate
    identity        recurrent weights the identity, small input weights (the IRNN)
    spectral:R      recurrent weights rescaled, gate by gate, to spectral radius R
    chrono:T_MAX    forget (or update) biases for memories of up to T_MAX steps

A scheme works on any cell whose parameters have the names weight_ih (G·H, D), weight_hh (G·H, ·), bias_ih,
bias_hh (G·H), weight_hr, with the gates stacked. Every scheme first draws ``uniform``, in the order in
which the parameters were registered, so what it does not name keeps that.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .errors import OptionError

__all__ = [
    "INITIALISATIONS",
    "chrono_",
    "identity_",
    "initialise",
    "orthogonal_",
    "set_bias_",
    "spectral_",
    "uniform_",
    "xavier_",
]


def initialise(cell: nn.Module, scheme: str = "uniform") -> None:
    """Initialise ``cell`` in place by a scheme's name: ``"orthogonal"``, or with a number ``"spectral:0.9"``.

    A cell on the meta device has no values and is left alone. Raises OptionError for an unknown name, and
    for a number that is missing, superfluous or impossible.
    """
    name, colon, number = scheme.partition(":")
    if name not in INITIALISATIONS:
        raise OptionError.unknown("initialisation", name, sorted(INITIALISATIONS))
    apply = INITIALISATIONS[name]
    meaning = _NUMBERS.get(name)
    if meaning is None and colon:
        raise OptionError(f"initialisation {name!r} takes no number; got {scheme!r}. Write {name!r}.")
    value = None if meaning is None else _number(name, number, meaning)
    if name in _RECURRENT and getattr(cell, "weight_hh", None) is None:
        raise OptionError(
            f"initialisation {name!r} is one of recurrent weights, and {type(cell).__name__} has none: it is "
            "elementwise in time. Use 'uniform' or 'xavier'."
        )
    if any(parameter.is_meta for parameter in cell.parameters(recurse=False)):
        return
    if value is None:
        apply(cell)
    else:
        apply(cell, value)


def _number(name: str, text: str, meaning: str) -> float:
    try:
        return float(text)
    except ValueError:
        given = f"got {text!r}" if text else "got none"
        raise OptionError(
            f"initialisation {name!r} needs {meaning} as a number after a colon, {given}. "
            f"Write for example {_EXAMPLES[name]!r}."
        ) from None


@torch.no_grad()
def uniform_(cell: nn.Module) -> None:
    """Every parameter from U(-1/√H, 1/√H): the draws of torch.nn's cells and layers, in their order."""
    hidden = getattr(cell, "hidden_size", None)
    if not isinstance(hidden, int):
        raise OptionError(f"an initialisation needs {type(cell).__name__}.hidden_size, the number of its units.")
    bound = 1 / math.sqrt(hidden)
    for parameter in cell.parameters(recurse=False):
        nn.init.uniform_(parameter, -bound, bound)


@torch.no_grad()
def xavier_(cell: nn.Module) -> None:
    """Weights from U(-a, a), a = √(6 / (fan in + fan out)) of each gate's block; biases zero.

    Source: Glorot and Bengio 2010, Understanding the difficulty of training deep feedforward neural networks,
    equation 16.
    """
    uniform_(cell)
    _each(cell, nn.init.xavier_uniform_, "weight_ih", "weight_hh", "weight_hr")
    _zero_biases(cell)


@torch.no_grad()
def orthogonal_(cell: nn.Module) -> None:
    """Recurrent weights W with WᵀW = 1, drawn apart for each gate; input weights as ``xavier``; biases zero.

    A projection makes the blocks (H, P): their columns are then orthonormal. Source: Saxe, McClelland and
    Ganguli 2014, Exact solutions to the nonlinear dynamics of learning in deep linear neural networks.
    """
    xavier_(cell)
    _each(cell, nn.init.orthogonal_, "weight_hh", "weight_hr")


@torch.no_grad()
def identity_(cell: nn.Module) -> None:
    """Recurrent weights the identity in each gate, input weights from N(0, 0.001²), biases zero.

    Source: Le, Jaitly and Hinton 2015, A simple way to initialize recurrent networks of rectified linear
    units (the IRNN: use it with squash="relu").
    """
    uniform_(cell)
    _each(cell, nn.init.eye_, "weight_hh")
    _each(cell, lambda block: nn.init.normal_(block, std=0.001), "weight_ih")
    _zero_biases(cell)


@torch.no_grad()
def spectral_(cell: nn.Module, radius: float) -> None:
    """Recurrent weights drawn as ``uniform``, then scaled so that max |λ| of each gate's block is ``radius``.

    Source: Jaeger 2001, The "echo state" approach to analysing and training recurrent neural networks. Raises
    OptionError for a radius that is not positive, and for a cell whose blocks are not square (a projection).
    """
    if not (radius > 0 and math.isfinite(radius)):
        raise OptionError(f"the spectral radius must be a positive number, got {radius}.")
    blocks = _blocks(cell, "weight_hh")
    if any(block.shape[0] != block.shape[1] for block in blocks):
        raise OptionError("spectral: only square recurrent weights have eigenvalues; leave proj_size at 0.")
    uniform_(cell)
    for block in blocks:
        block.mul_(radius / torch.linalg.eigvals(block.double()).abs().max().item())


@torch.no_grad()
def chrono_(cell: nn.Module, t_max: float) -> None:
    """Biases that remember for times spread up to ``t_max`` steps; everything else as ``uniform``.

    LSTM: b_f = log U(1, t_max - 1) and b_i = -b_f. GRU: b_u = log U(1, t_max - 1), as its u keeps the old
    state. The value stands in bias_ih, with zero in bias_hh. Source: Tallec and Ollivier 2018, Can
    recurrent neural networks warp time?, equation 16. Raises OptionError for t_max below 2 and for a cell
    without such a gate or without biases.
    """
    if not (t_max >= 2 and math.isfinite(t_max)):
        raise OptionError(f"chrono: t_max, the longest memory in steps, must be at least 2; got {t_max}.")
    gates: tuple[str, ...] = getattr(cell, "gates", ())
    keeps = next((gate for gate in ("forget", "update") if gate in gates), None)
    if keeps is None:
        raise OptionError(
            f"chrono sets the bias of a forget or update gate, and {type(cell).__name__} has none. "
            "Use an lstm or gru cell, or another initialisation."
        )
    uniform_(cell)
    bias = torch.empty_like(_blocks(cell, "weight_ih")[0][:, 0]).uniform_(1, t_max - 1).log_()  # (H,)
    set_bias_(cell, keeps, bias)
    if "input" in gates:
        set_bias_(cell, "input", -bias)


@torch.no_grad()
def set_bias_(cell: nn.Module, gate: str, value: Tensor | float) -> None:
    """Set the bias of one gate: ``value``, a number or (H,), in bias_ih and zero in bias_hh, where there is one.

    Raises OptionError when the cell has no biases, or no gate of that name.
    """
    gates: tuple[str, ...] = getattr(cell, "gates", ())
    if gate not in gates:
        raise OptionError.unknown(f"gate of {type(cell).__name__}", gate, gates)
    ih, hh = _blocks(cell, "bias_ih"), _blocks(cell, "bias_hh")
    if not ih:
        raise OptionError(f"the bias of the {gate} gate cannot be set: {type(cell).__name__} has bias=False.")
    ih[gates.index(gate)].copy_(torch.as_tensor(value))
    if hh:
        hh[gates.index(gate)].zero_()


def _blocks(cell: nn.Module, name: str) -> tuple[Tensor, ...]:
    """The gates' blocks of a parameter, as views; none when the cell has no such parameter."""
    parameter = getattr(cell, name, None)
    if parameter is None:
        return ()
    if name == "weight_hr":  # the projection is shared by all gates
        return (parameter.data,)
    return parameter.data.split(cell.hidden_size)


def _each(cell: nn.Module, draw: Callable[[Tensor], Tensor], *names: str) -> None:
    for name in names:
        for block in _blocks(cell, name):
            draw(block)


def _zero_biases(cell: nn.Module) -> None:
    _each(cell, nn.init.zeros_, "bias_ih", "bias_hh")


INITIALISATIONS: dict[str, Callable[..., None]] = {
    "chrono": chrono_,
    "identity": identity_,
    "orthogonal": orthogonal_,
    "spectral": spectral_,
    "uniform": uniform_,
    "xavier": xavier_,
}
"""From a scheme's name to the function that applies it."""

_RECURRENT = ("identity", "orthogonal", "spectral")
_NUMBERS = {"chrono": "the longest memory in steps", "spectral": "the spectral radius"}
_EXAMPLES = {"chrono": "chrono:200", "spectral": "spectral:0.9"}
