"""Elementary functions on vectors of float32 and float64, as LLVM code.

Each is ``f(b, x) -> y`` for x of one lane or many. NaN gives NaN, infinities and signed zeros give what torch gives;
a result that would be a denormal number is zero or exact, a denormal argument counts as itself or as zero: the
generated programs run with denormals flushed. The polynomials interpolate at Chebyshev nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llvmlite import ir

from .code import F32, F64, I32, I64
from .lanes import Lanes, polynomial

__all__ = [
    "erf", "exp", "exp2", "expm1", "log", "log1p", "log2", "log10", "log_sigmoid", "sigmoid", "softplus", "tanh",
]  # fmt: skip

INF = math.inf


@dataclass(frozen=True)
class Format:
    """What the functions know about a floating-point format.

    ``ln2`` and ``lg2`` are log 2 and log₁₀ 2 as a short number, whose products with exponents are exact, and the rest.
    ``exp`` is (eʳ - 1 - r) / r² for |r| ≤ ½ log 2; ``log`` is (2 artanh s - 2 s) / s³ in s² for s ≤ 0.1716;
    ``largest`` and ``smallest`` bound the x with a finite and a normal eˣ; ``one`` is where tanh x is 1 - ulp / 4.
    """

    word: ir.Type
    mantissa: int
    bias: int
    ln2: tuple[float, float]
    lg2: tuple[float, float]
    exp: tuple[float, ...]
    log: tuple[float, ...]
    largest: float
    smallest: float
    one: float
    sqrt_half: int

    @property
    def magic(self) -> float:
        """Added to a small number, it leaves the nearest integer in the lowest bits."""
        return 1.5 * 2.0**self.mantissa

    @property
    def tiny(self) -> float:
        """The least normal number."""
        return 2.0 ** (1 - self.bias)


_SINGLE = Format(
    word=I32,
    mantissa=23,
    bias=127,
    ln2=(0.693145751953125, 1.428606765330187e-06),
    lg2=(0.301025390625, 4.605039066518657e-06),
    exp=(0.5, 0.16666576266288757, 0.041666556149721146, 0.008363203145563602, 0.0013926213141530752),
    log=(0.6666668653488159, 0.3998875916004181, 0.29580986499786377),
    largest=88.72283935546875,
    smallest=-87.33654022216797,
    one=9.1,
    sqrt_half=0x3F3504F3,
)
_DOUBLE = Format(
    word=I64,
    mantissa=52,
    bias=1023,
    ln2=(0.693147180559663, 2.8235290563031577e-13),
    lg2=(0.30102999566383914, 1.42050232272661e-13),
    exp=(
        0.5000000000000001,
        0.16666666666666669,
        0.04166666666662399,
        0.008333333333330051,
        0.0013888888917281794,
        0.00019841269863105968,
        2.480152119021773e-05,
        2.7557268378684192e-06,
        2.7620138719733994e-07,
        2.5100424157005067e-08,
    ),
    log=(
        0.666666666666667,
        0.3999999999989889,
        0.28571428626253836,
        0.22222211089379496,
        0.1818289243253687,
        0.15331611722055008,
        0.14617807153417325,
    ),
    largest=709.782712893384,
    smallest=-708.3964185322641,
    one=19.1,
    sqrt_half=0x3FE6A09E667F3BCD,
)
_FORMATS = {F32: _SINGLE, F64: _DOUBLE}


def _near_one(f: Format, r: Lanes) -> Lanes:
    """eʳ - 1 for |r| ≤ ½ log 2."""
    square = r * r
    return square.fma(polynomial(r, square, f.exp), r)


def _reduced(f: Format, x: Lanes, bias: int = 0) -> tuple[Lanes, Lanes]:
    """n + bias in the bits of the exponent, and r, with x = n log 2 + r."""
    magic = f.magic + bias
    shifted = x.fma(math.log2(math.e), magic)
    n = shifted - magic
    r = n.fma(-f.ln2[1], n.fma(-f.ln2[0], x))
    return shifted.bits(f.word) << f.mantissa, r


def _powers(f: Format, x: Lanes) -> tuple[Lanes, Lanes]:
    """2ⁿ and eʳ - 1 with eˣ = 2ⁿ eʳ, for n from -bias, where 2ⁿ is 0, to bias."""
    exponent, r = _reduced(f, x, f.bias)
    return exponent.bits(x.kind), _near_one(f, r)


def _scaled(f: Format, x: Lanes, exponent: Lanes, r: Lanes, largest: float, smallest: float) -> Lanes:
    """eʳ 2ⁿ by adding to the exponent; what adding cannot give is decided by x."""
    y = ((1 + _near_one(f, r)).bits(f.word) + exponent).bits(x.kind)
    y = (x < smallest).where(0.0, y)
    return (x <= largest).where(y, x + INF)  # inf above, NaN for NaN


def exp(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """eˣ."""
    v = Lanes(b, x)
    f = _FORMATS[v.kind]
    return _scaled(f, v, *_reduced(f, v), f.largest, f.smallest).value


def exp2(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """2ˣ."""
    v = Lanes(b, x)
    f = _FORMATS[v.kind]
    shifted = v + f.magic
    r = (v - (shifted - f.magic)) * math.log(2)
    largest = f.bias + 1 - 2.0 ** -(f.mantissa - f.bias.bit_length() + 1)  # the number before bias + 1
    return _scaled(f, v, shifted.bits(f.word) << f.mantissa, r, largest, 1 - f.bias).value


def expm1(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """eˣ - 1, precise for small x too."""
    v = Lanes(b, x)
    f = _FORMATS[v.kind]
    exponent, r = _reduced(f, (v < -40).where(-40.0, v), f.bias - 1)
    half = exponent.bits(v.kind)  # 2ⁿ itself may be inf where the result is not
    y = half.fma(_near_one(f, r), half - 0.5)
    return (v <= f.largest).where((y + y).call("copysign", v), v + INF).value


@dataclass(frozen=True)
class Ratio:
    """An odd function that ends at ±1 as x P(x²) / Q(x²) in float32: minimax for |x| ≤ bound, 1 beyond."""

    bound: float
    above: tuple[float, ...]
    below: tuple[float, ...]

    def __call__(self, x: Lanes) -> Lanes:
        x = _within(x, self.bound)
        square = x * x
        fourth = square * square
        return _within(x * polynomial(square, fourth, self.above) / polynomial(square, fourth, self.below), 1.0)


_TANH = Ratio(
    bound=9.02,
    above=(1.0, 0.1337967813014984, 0.0034939805045723915, 2.0582361685228534e-05, 1.3317137614876629e-08),
    below=(1.0, 0.4671299457550049, 0.02587088569998741, 0.00032829935662448406, 7.761312872389681e-07),
)
_ERF = Ratio(
    bound=3.95,
    above=(
        1.812894344329834,
        0.30767542123794556,
        0.0849403440952301,
        0.006114766467362642,
        0.00045726067037321627,
        3.254835291954805e-06,
    ),
    below=(
        1.6066358089447021,
        0.8082144856452942,
        0.18402305245399475,
        0.02418092079460621,
        0.0018799768295139074,
        6.0774564190069214e-05,
    ),
)


def _within(x: Lanes, bound: float) -> Lanes:
    x = (x > bound).where(bound, x)
    return (x < -bound).where(-bound, x)


def tanh(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """tanh x, never beyond ±1; in float64 as -u / (u + 2) with u = exp(-2 |x|) - 1 and the sign of x."""
    v = Lanes(b, x)
    if v.kind == F32:
        return _TANH(v).value
    f = _FORMATS[v.kind]
    t = v.call("fabs") * -2
    power, near = _powers(f, (t < -2 * f.one).where(-2 * f.one, t))
    u = power.fma(near, power - 1)
    return (u / (u + 2)).call("copysign", v).value


def erf(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """The error function; in float64 by the C library."""
    v = Lanes(b, x)
    return (_ERF(v) if v.kind == F32 else v.by_lane("erf")).value


def sigmoid(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """1 / (1 + exp(-x)), precise for large -x too."""
    v = Lanes(b, x)
    f = _FORMATS[v.kind]
    power, near = _powers(f, -_within(v, f.bias * math.log(2)))
    return (1 / power.fma(near, 1 + power)).value


def _logarithm(f: Format, x: Lanes) -> tuple[Lanes, Lanes, Lanes]:
    """k, h and l with x = 2ᵏ m, √½ ≤ m < √2 and log m = h + l, where l is small beside h; x is normal and positive.

    With m = 1 + h and s = h / (2 + h), log m = 2 artanh s = h - h²/2 + s (h²/2 + R(s²)).
    """
    i = x.bits(f.word) + ((f.bias << f.mantissa) - f.sqrt_half)
    exponent = (i >> f.mantissa) | ((f.bias + f.mantissa) << f.mantissa)  # the lowest bits of 2^mantissa
    k = exponent.bits(x.kind) - (2.0**f.mantissa + f.bias)
    h = ((i & ((1 << f.mantissa) - 1)) + f.sqrt_half).bits(x.kind) - 1
    s = h / (2 + h)
    z = s * s
    half = 0.5 * h * h
    return k, h, s * (half + z * polynomial(z, z * z, f.log)) - half


def _at_the_ends(f: Format, x: Lanes, y: Lanes) -> Lanes:
    """The logarithm y of x put right where x is not normal and positive: -inf at 0, NaN below, inf at inf."""
    y = (x < INF).where(y, x)
    return (x < f.tiny).where((x < 0).where(math.nan, x.like(-INF)), y)


def log(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """log x to the base e."""
    v = Lanes(b, x)
    f = _FORMATS[v.kind]
    k, h, l = _logarithm(f, v)
    return _at_the_ends(f, v, k.fma(f.ln2[0], h + k.fma(f.ln2[1], l))).value


def log2(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """log x to the base 2, exact at powers of two."""
    v = Lanes(b, x)
    f = _FORMATS[v.kind]
    k, h, l = _logarithm(f, v)
    return _at_the_ends(f, v, (h + l).fma(math.log2(math.e), k)).value


def log10(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """log x to the base 10."""
    v = Lanes(b, x)
    f = _FORMATS[v.kind]
    k, h, l = _logarithm(f, v)
    return _at_the_ends(f, v, k.fma(f.lg2[0], (h + l).fma(math.log10(math.e), k * f.lg2[1]))).value


def _log1p(v: Lanes) -> Lanes:
    """log(1 + x) for a normal u = 1 + x: log u + (x - (u - 1)) / u; a zero may have lost its sign."""
    f = _FORMATS[v.kind]
    u = 1 + v
    k, h, l = _logarithm(f, u)
    lost = (v - (u - 1)) / u
    return k.fma(f.ln2[0], h + k.fma(f.ln2[1], l + lost))


def log1p(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """log(1 + x), precise for small x too."""
    v = Lanes(b, x)
    f = _FORMATS[v.kind]
    return _at_the_ends(f, 1 + v, _log1p(v).call("copysign", v)).value


def _soft(v: Lanes) -> Lanes:
    """log(1 + exp(-|x|))."""
    f = _FORMATS[v.kind]
    bound = -f.bias * math.log(2)
    t = -v.call("fabs")
    power, near = _powers(f, (t < bound).where(bound, t))
    return _log1p(power * (1 + near))


def softplus(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """log(1 + eˣ) = max(x, 0) + log(1 + exp(-|x|))."""
    v = Lanes(b, x)
    return ((v < 0).where(0.0, v) + _soft(v)).value


def log_sigmoid(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """log sigmoid x = min(x, 0) - log(1 + exp(-|x|))."""
    v = Lanes(b, x)
    return ((v > 0).where(0.0, v) - _soft(v)).value
