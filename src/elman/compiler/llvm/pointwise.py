"""The pointwise operations of ATen as LLVM code: one table, an equation a line.

What no row names is not known here. PyTorch's core decompositions take many of the fused operations apart before they
come here; those that backends like to keep whole have rows all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from ...errors import UnsupportedError
from . import elementary
from .code import BOOL, F32, F64, I32, I64, vector
from .lanes import Lanes, Operand, is_float
from .numeric import HALVES

__all__ = ["OPERATIONS", "convert", "emit", "supports"]

Rule = Callable[..., Lanes]


def supports(name: str) -> bool:
    """Whether there is code for the ATen operation of that plain name, as ``add`` or ``sigmoid_backward``."""
    return name in OPERATIONS


def emit(b: ir.IRBuilder, name: str, args: Sequence[Any], kind: ir.Type, **options: Any) -> ir.Value:
    """Code for one ATen operation on vectors of one lane count.

    ``args`` are in the order of the operation's schema: values whose elements are double, float, i64, i32 or i1 (bool),
    at least one, and plain numbers, None and strings for its scalars; ``options`` are further ones by the schema's
    names. ``kind`` is the element type of the result; operands are converted as torch promotes them.
    Raises UnsupportedError for an operation, or a form of it, that has no code.
    """
    if name not in OPERATIONS:
        raise UnsupportedError(f"there is no code for the operation {name}.")
    values = [Lanes(b, arg) if isinstance(arg, ir.Value) else arg for arg in args]
    options = {key: Lanes(b, arg) if isinstance(arg, ir.Value) else arg for key, arg in options.items()}
    if name in _AS_GIVEN:
        result = OPERATIONS[name](*values, **options)
    else:
        computed = _common(values) if name in _TO_BOOL else kind
        options = {key: convert(option, computed) for key, option in options.items()}
        values = [convert(value, computed) for value in values]
        if not isinstance(values[0], Lanes):  # a number is the operand
            values[0] = next(value for value in values if isinstance(value, Lanes)).like(values[0])
        result = OPERATIONS[name](*values, **options)
    return convert(result, kind).value


_RANK = (BOOL, I32, I64, F32, F64)


def _common(values: Sequence[Any]) -> ir.Type:
    """The type in which operands meet; a number raises only what cannot hold its sort, to torch's default."""
    kind = max((value.kind for value in values if isinstance(value, Lanes)), key=_RANK.index)
    for value in values:
        if isinstance(value, float) and not is_float(kind):
            kind = F32
        elif isinstance(value, int) and not isinstance(value, bool) and kind == BOOL:
            kind = I64
    return kind


def convert(x: Any, kind: ir.Type) -> Any:
    """Lanes with elements of that type, as torch casts: what is not 0 is true; what is no lanes stays as it is."""
    if not isinstance(x, Lanes) or x.kind == kind:
        return x
    if kind == BOOL:
        return x.differs(0)
    b, into = x.b, vector(kind, x.count)
    if is_float(x.kind) and is_float(kind):
        return Lanes(b, b.fpext(x.value, into) if kind == F64 else b.fptrunc(x.value, into))
    if is_float(x.kind):
        return Lanes(b, b.fptosi(x.value, into))
    if is_float(kind):
        return Lanes(b, b.uitofp(x.value, into) if x.kind == BOOL else b.sitofp(x.value, into))
    if x.kind.width > kind.width:
        return Lanes(b, b.trunc(x.value, into))
    return Lanes(b, b.zext(x.value, into) if x.kind == BOOL else b.sext(x.value, into))


def _elementary(function: Callable[[ir.IRBuilder, ir.Value], ir.Value]) -> Rule:
    return lambda x: Lanes(x.b, function(x.b, x.value))


exp, expm1, erf = (_elementary(f) for f in (elementary.exp, elementary.expm1, elementary.erf))
tanh, sigmoid = _elementary(elementary.tanh), _elementary(elementary.sigmoid)
log_sigmoid, log1p_exp = _elementary(elementary.log_sigmoid), _elementary(elementary.softplus)


def _library(name: str) -> Rule:
    """A function of the C library."""
    return lambda x, *others: x.by_lane(name, *others)


def _rounded(name: str) -> Rule:
    """An intrinsic that rounds; integers stay."""
    return lambda x: x.call(name) if is_float(x.kind) else x


def _half(function: Callable[[ir.IRBuilder, ir.Value], ir.Value]) -> Rule:
    """Part of a float32, as a float32."""
    return lambda x: Lanes(x.b, function(x.b, convert(x, F32).value))


floor, trunc = _rounded("floor"), _rounded("trunc")


def _round(x: Lanes, decimals: int = 0) -> Lanes:
    if not is_float(x.kind):
        return x
    unit = 10.0 ** abs(decimals)
    scaled = (x * unit if decimals > 0 else x / unit).call("roundeven") if decimals else x.call("roundeven")
    return scaled if not decimals else scaled / unit if decimals > 0 else scaled * unit


def absolute(x: Lanes) -> Lanes:
    return x.call("fabs") if is_float(x.kind) else (x < 0).where(-x, x)


def sign(x: Lanes) -> Lanes:
    return (x > 0).where(1, (x < 0).where(-1, x.like(0)))


def isnan(x: Lanes) -> Lanes:
    return x.differs(x)


def isinf(x: Lanes) -> Lanes:
    return absolute(x).equals(math.inf) if is_float(x.kind) else x.differs(x)


def maximum(x: Lanes, other: Operand) -> Lanes:
    """The larger one; NaN where either is."""
    return isnan(x).where(x, (x > other).where(x, other))


def minimum(x: Lanes, other: Operand) -> Lanes:
    """The smaller one; NaN where either is."""
    return isnan(x).where(x, (x < other).where(x, other))


def fmax(x: Lanes, other: Lanes) -> Lanes:
    """The larger one, of what is not NaN."""
    return isnan(other).where(x, (x > other).where(x, other))


def fmin(x: Lanes, other: Lanes) -> Lanes:
    """The smaller one, of what is not NaN."""
    return isnan(other).where(x, (x < other).where(x, other))


def clamp(x: Lanes, min: Operand | None = None, max: Operand | None = None) -> Lanes:
    """Within bounds; the upper one wins."""
    for bound, beyond, choose in ((min, "<", maximum), (max, ">", minimum)):
        if isinstance(bound, Lanes):
            x = choose(x, bound)
        elif bound is not None:
            x = x.compare(beyond, bound).where(bound, x)
    return x


def _divisor(y: Operand) -> Operand:
    """Of integers, one that does not trap: lanes beyond the data divide too."""
    return y.equals(0).where(1, y) if isinstance(y, Lanes) and not is_float(y.kind) else y


def fmod(x: Lanes, other: Operand) -> Lanes:
    return x % _divisor(other)


def remainder(x: Lanes, other: Operand) -> Lanes:
    """x - y ⌊x / y⌋, with the sign of y."""
    y = x.like(other)
    rest = fmod(x, y)
    return (rest.differs(0) & ((rest < 0) ^ (y < 0))).where(rest + y, rest)


def _floor_divide(x: Lanes, y: Lanes) -> Lanes:
    """⌊x / y⌋ from the exact remainder: the quotient itself may have been rounded up to an integer."""
    rest = fmod(x, y)
    down = rest.differs(0) & ((rest < 0) ^ (y < 0))
    if not is_float(x.kind):
        quotient = x / _divisor(y)
        return down.where(quotient - 1, quotient)
    quotient = (x - rest) / y
    quotient = down.where(quotient - 1, quotient)
    whole = floor(quotient)
    whole = (quotient - whole > 0.5).where(whole + 1, whole)
    whole = quotient.equals(0).where(x.like(0).call("copysign", x / y), whole)
    return y.equals(0).where(x / y, whole)


def divide(x: Lanes, other: Operand, rounding_mode: str | None = None) -> Lanes:
    if rounding_mode == "floor":
        return _floor_divide(x, x.like(other))
    quotient = x / _divisor(other)
    return trunc(quotient) if rounding_mode == "trunc" else quotient


def power(x: Lanes, exponent: Operand) -> Lanes:
    """x to the exponent: by multiplications where that is a small number, by the C library elsewhere."""
    if isinstance(exponent, Lanes):
        if not is_float(x.kind):
            raise UnsupportedError("there is no code for powers of integers with exponents that are tensors.")
        return x.by_lane("pow", exponent)
    if not is_float(x.kind) or exponent in range(_MOST_FACTORS + 1):
        return _whole_power(x, int(exponent))
    if exponent in _POWERS:
        return _POWERS[exponent](x)
    return x.by_lane("pow", exponent)


_MOST_FACTORS = 8
_POWERS: dict[float, Rule] = {
    0.5: lambda x: x.call("sqrt"),
    -0.5: lambda x: 1 / x.call("sqrt"),
    -1: lambda x: 1 / x,
    -2: lambda x: (1 / x) * (1 / x),  # x * x would be flushed to 0 early
}


def _whole_power(x: Lanes, exponent: int) -> Lanes:
    if exponent < 0:
        raise UnsupportedError("there is no code for negative powers of integers.")
    total, square = None, x
    while exponent:
        if exponent & 1:
            total = square if total is None else total * square
        exponent >>= 1
        square = square * square if exponent else square
    return x.like(1) if total is None else total


def lerp(x: Lanes, end: Lanes, weight: Operand) -> Lanes:
    """x + w (end - x), from the nearer end."""
    w, way = x.like(weight), end - x
    return (absolute(w) < 0.5).where(x + w * way, end - way * (1 - w))


def softplus(x: Lanes, beta: float = 1, threshold: float = 20) -> Lanes:
    """log(1 + exp(βx)) / β, and x itself beyond the threshold."""
    return (x * beta > threshold).where(x, log1p_exp(x * beta) / beta)


def softplus_backward(g: Lanes, x: Lanes, beta: float, threshold: float) -> Lanes:
    return (x * beta > threshold).where(g, g * sigmoid(x * beta))


def elu(x: Lanes, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Lanes:
    return (x <= 0).where(expm1(x * input_scale) * (alpha * scale), x * scale)


def elu_backward(
    g: Lanes, alpha: float, scale: float, input_scale: float, is_result: bool, self_or_result: Lanes
) -> Lanes:
    below = self_or_result + alpha * scale if is_result else exp(self_or_result * input_scale) * (alpha * scale)
    return (self_or_result <= 0).where(g * input_scale * below, g * scale)


def _normal(x: Lanes) -> Lanes:
    """The distribution function of the normal distribution."""
    return 0.5 * (1 + erf(x * math.sqrt(0.5)))


_GELU = math.sqrt(2 / math.pi), 0.044715


def gelu(x: Lanes, approximate: str = "none") -> Lanes:
    if approximate == "none":
        return x * _normal(x)
    return 0.5 * x * (1 + tanh(_GELU[0] * (x + _GELU[1] * (x * x * x))))


def gelu_backward(g: Lanes, x: Lanes, approximate: str = "none") -> Lanes:
    if approximate == "none":
        return g * (_normal(x) + x * exp(x * x * -0.5) * (1 / math.sqrt(2 * math.pi)))
    t = tanh(_GELU[0] * (x + _GELU[1] * (x * x * x)))
    slope = _GELU[0] * (1 + 3 * _GELU[1] * (x * x))
    return g * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope)


def silu_backward(g: Lanes, x: Lanes) -> Lanes:
    s = sigmoid(x)
    return g * s * (1 + x * (1 - s))


def _tanh_softplus(x: Lanes) -> Lanes:
    """tanh(log(1 + eˣ)) = n / (n + 2) with n = eˣ (eˣ + 2); from x = 20 on it is 1."""
    w = exp((x > 20).where(20, x))
    n = w * (w + 2)
    return n / (n + 2)


def mish_backward(g: Lanes, x: Lanes) -> Lanes:
    t = _tanh_softplus(x)
    return g * (t + x * sigmoid(x) * (1 - t * t))


def threshold_backward(g: Lanes, x: Lanes, threshold: float) -> Lanes:
    return (x <= threshold).where(0, g)


def hardswish_backward(g: Lanes, x: Lanes) -> Lanes:
    return (x <= -3).where(0, (x < 3).where(g * (x / 3 + 0.5), g))


def hardshrink(x: Lanes, lambd: float = 0.5) -> Lanes:
    return ((x >= -lambd) & (x <= lambd)).where(0, x)


def softshrink(x: Lanes, lambd: float = 0.5) -> Lanes:
    return (x > lambd).where(x - lambd, (x < -lambd).where(x + lambd, x * 0))


def shrink_backward(g: Lanes, x: Lanes, lambd: float) -> Lanes:
    return ((x < -lambd) | (x > lambd)).where(g, 0)


def where(condition: Lanes, x: Operand, other: Operand) -> Lanes:
    sample = [side for side in (x, other) if isinstance(side, Lanes)]
    kind = _common(sample) if sample else F64
    if not is_float(kind) and any(isinstance(side, float) for side in (x, other)):
        kind = F64  # exact, whatever the result is
    sides = [convert(side, kind) if isinstance(side, Lanes) else _full(condition, side, kind) for side in (x, other)]
    return condition.where(*sides)


def _full(like: Lanes, number: float, kind: ir.Type) -> Lanes:
    return convert(like, kind).like(number)


def _truth(x: Operand) -> Any:
    return convert(x, BOOL) if isinstance(x, Lanes) else bool(x)


_AS_GIVEN: dict[str, Rule] = {
    "_to_copy": lambda x, **_: x,
    "alias": lambda x: x,
    "clone": lambda x, **_: x,
    **{f"bfloat16_{name}": _half(function) for name, function in HALVES.items()},  # ours alone
    "copy": lambda x, src, *_: src if isinstance(src, Lanes) else x.like(src),
    "detach": lambda x: x,
    "lift_fresh": lambda x: x,
    "where": where,
    "masked_fill": lambda x, mask, value: where(mask, convert(value, x.kind), x),
    "logical_and": lambda x, y: _truth(x) & _truth(y),
    "logical_or": lambda x, y: _truth(x) | _truth(y),
    "logical_xor": lambda x, y: _truth(x) ^ _truth(y),
    "logical_not": lambda x: ~_truth(x),
}
"""Operations whose operands are of several types, or of any."""

_TO_BOOL: dict[str, Rule] = {
    "eq": lambda x, y: x.equals(y),
    "ne": lambda x, y: x.differs(y),
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "isnan": isnan,
    "isinf": isinf,
    "isfinite": lambda x: ~(isnan(x) | isinf(x)),
    "signbit": lambda x: (x.bits(I32 if x.kind == F32 else I64) if is_float(x.kind) else x) < 0,
}
"""Operations computed in the type in which their operands meet; all others are in the type of the result."""

_LIBRARY = "acos acosh asin asinh atan atan2 atanh cos cosh erfc hypot lgamma sin sinh tan"

OPERATIONS: dict[str, Rule] = {
    **_AS_GIVEN,
    **_TO_BOOL,
    **{name: _library(name) for name in _LIBRARY.split()},
    **{name: _elementary(getattr(elementary, name)) for name in ("exp2", "log", "log1p", "log2", "log10")},
    "abs": absolute,
    "add": lambda x, y, alpha=1: x + (y if alpha == 1 else x.like(y) * alpha),
    "addcdiv": lambda x, y, z, value=1: x + (y if value == 1 else y * value) / z,
    "addcmul": lambda x, y, z, value=1: x + (y if value == 1 else y * value) * z,
    "bitwise_and": lambda x, y: x & y,
    "bitwise_not": lambda x: ~x,
    "bitwise_or": lambda x, y: x | y,
    "bitwise_xor": lambda x, y: x ^ y,
    "ceil": _rounded("ceil"),
    "celu": lambda x, alpha=1: elu(x, alpha, 1, 1 / alpha),
    "clamp": clamp,
    "clamp_max": lambda x, max: clamp(x, None, max),
    "clamp_min": lambda x, min: clamp(x, min),
    "copysign": lambda x, y: x.call("copysign", y),
    "div": divide,
    "elu": elu,
    "elu_backward": elu_backward,
    "erf": erf,
    "exp": exp,
    "expm1": expm1,
    "floor": floor,
    "fmax": lambda x, y: fmax(x, x.like(y)),
    "fmin": lambda x, y: fmin(x, x.like(y)),
    "fmod": fmod,
    "frac": lambda x: x - trunc(x),
    "gelu": gelu,
    "gelu_backward": gelu_backward,
    "hardshrink": hardshrink,
    "hardshrink_backward": shrink_backward,
    "hardsigmoid": lambda x: clamp(x + 3, 0, 6) / 6,
    "hardsigmoid_backward": lambda g, x: ((x > -3) & (x < 3)).where(g * (1 / 6), 0),
    "hardswish": lambda x: x * (clamp(x + 3, 0, 6) / 6),
    "hardswish_backward": hardswish_backward,
    "hardtanh": lambda x, min_val=-1, max_val=1: clamp(x, min_val, max_val),
    "hardtanh_backward": lambda g, x, low, high: ((x > low) & (x < high)).where(g, 0),
    "leaky_relu": lambda x, slope=0.01: (x > 0).where(x, x * slope),
    "leaky_relu_backward": lambda g, x, slope, self_is_result: (x > 0).where(g, g * slope),
    "lerp": lerp,
    "log_sigmoid": log_sigmoid,
    "log_sigmoid_backward": lambda g, x, buffer: g * sigmoid(-x),
    "maximum": maximum,
    "minimum": minimum,
    "mish": lambda x: x * _tanh_softplus(x),
    "mish_backward": mish_backward,
    "mul": lambda x, y: x * y,
    "neg": lambda x: -x,
    "pow": power,
    "reciprocal": lambda x: 1 / x,
    "relu": lambda x: (x < 0).where(0, x),
    "relu6": lambda x: clamp(x, 0, 6),
    "remainder": remainder,
    "round": _round,
    "rsqrt": lambda x: 1 / x.call("sqrt"),
    "rsub": lambda x, y, alpha=1: y - (x if alpha == 1 else x * alpha),
    "selu": lambda x: elu(x, 1.6732632423543772848, 1.0507009873554804934),
    "sgn": sign,
    "sigmoid": sigmoid,
    "sigmoid_backward": lambda g, y: g * (1 - y) * y,
    "sign": sign,
    "silu": lambda x: x * sigmoid(x),
    "silu_backward": silu_backward,
    "softplus": softplus,
    "softplus_backward": softplus_backward,
    "softshrink": softshrink,
    "softshrink_backward": shrink_backward,
    "sqrt": lambda x: x.call("sqrt"),
    "square": lambda x: x * x,
    "sub": lambda x, y, alpha=1: x - (y if alpha == 1 else x.like(y) * alpha),
    "tanh": tanh,
    "tanh_backward": lambda g, y: g * (1 - y * y),
    "threshold": lambda x, threshold, value: (x <= threshold).where(value, x),
    "threshold_backward": threshold_backward,
    "trunc": trunc,
}
"""By the plain name of the ATen operation, in the order of arguments of its schema."""
