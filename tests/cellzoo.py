"""Small cells that between them use everything the engine promises, and how to feed them.

Every cell has ``initial_state`` and ``example(steps, batch) -> (xs, constants)``; ``ZOO`` lists them by name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch

from zoo_networks import (
    Attends,
    AttendsMasked,
    Conditioned,
    Delay,
    DelayLine,
    Elman,
    ElmanLayer,
    ElmanTwoBiases,
    Feedforward,
    Feeds,
    Gru,
    JordanFree,
    JordanTeacherForced,
    Lstm,
    LstmLayer,
    MultiHead,
    Nested,
    OldState,
    OldStateItself,
    OneProduct,
    PureSwap,
    SharedInput,
    SharedNext,
    Stack,
    StateFixed,
    Swap,
    Tokens,
    TwoIndependent,
    YFixed,
    YIsInput,
    YTwice,
    ZooCell,
)
from zoo_operations import (
    Accumulate,
    Bilinear,
    Clockwork,
    Constants,
    Convolution,
    Dead,
    DeltaRule,
    Detached,
    FastWeights,
    Gathers,
    Heads,
    InPlace,
    Leaky,
    LowRank,
    Pointwise,
    Reductions,
    Scalar,
    Shapes,
    SharedWeight,
    SoftmaxGate,
    Stateless,
    Truncated,
    WeightNorm,
)

__all__ = ["ZOO", "Elman", "Gru", "Lstm", "Stack", "ZooCell", "zoo"]


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
            Elman, ElmanTwoBiases, Gru, Feedforward, JordanTeacherForced, JordanFree, Delay, DelayLine,
            OneProduct, Swap, PureSwap, SharedNext, TwoIndependent, Feeds, OldState, OldStateItself, YIsInput,
            YTwice, YFixed, StateFixed, Nested, Tokens, SharedInput, Conditioned, Attends, AttendsMasked,
            MultiHead, Accumulate, Leaky, Clockwork, FastWeights, DeltaRule, Heads, Shapes, Reductions,
            Pointwise, SoftmaxGate, Convolution, Gathers, InPlace, Constants, WeightNorm, LowRank, Bilinear,
            Scalar, Stateless, Dead, Detached, Truncated, SharedWeight,
        )
    },
}  # fmt: skip


@cache
def zoo(name: str) -> ZooCell:
    """The cell of that name in float64; the same object every time, so that it is traced once."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return ZOO[name]().double()
