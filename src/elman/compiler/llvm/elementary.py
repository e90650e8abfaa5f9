"""Elementary functions on vectors of float32 and float64, as LLVM code.

Each is ``f(b, x) -> y`` for x of one lane or many. NaN gives NaN, infinities and signed zeros give what torch gives;
the generated programs run with denormals flushed: an argument that is one counts as itself or as zero, and so does a
result. None calls a library but erf in float64. The polynomials interpolate at Chebyshev nodes.

Largest errors met on some ten million arguments of all sizes, in units in the last place of the result:

===========  =======  =======
function     float32  float64
===========  =======  =======
exp exp2         1.1      1.2
expm1            1.8      2.4
log log1p        0.9      0.9
log2 log10       2.0      1.9
sigmoid          2.4      2.4
tanh             2.1      2.2
softplus         2.1      2.0
log_sigmoid      2.1      2.0
erf              5.6        -
===========  =======  =======
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
    ``exp`` is (eʳ - 1 - r) / r² for |r| ≤ ½ log 2; ``log`` is (2 artanh s - 2 s) / s³ in s² for |s| ≤ ⅓;
    ``largest`` and ``smallest`` bound the x with a finite and a normal eˣ;
    beyond ``one``, tanh x is 1; ``sqrt_half`` are the bits of √½.
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
    log=(0.6666666865348816, 0.3999970555305481, 0.28592365980148315, 0.21706460416316986, 0.2322492152452469),
    largest=88.72283172607422,
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
        0.6666666666666666,
        0.3999999999999952,
        0.28571428571600266,
        0.22222222198216113,
        0.1818181989926796,
        0.15384543917753166,
        0.13335179661515711,
        0.11734265179376593,
        0.10845291032779812,
        0.07491639460673266,
        0.15631534707431224,
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


def _reduced(f: Format, x: Lanes, bias: int, *ln2: float) -> tuple[Lanes, Lanes]:
    """n + bias in the bits of the exponent, and r, with x = n log 2 + r; log 2 is given as a sum."""
    magic = f.magic + bias
    shifted = x.fma(math.log2(math.e), magic)
    n, r = shifted - magic, x
    for part in ln2:
        r = n.fma(-part, r)
    return shifted.bits(f.word) << f.mantissa, r


def _powers(f: Format, x: Lanes, *ln2: float) -> tuple[Lanes, Lanes]:
    """2ⁿ and eʳ - 1 with eˣ = 2ⁿ eʳ, for n from -bias, where 2ⁿ is 0, to bias."""
    exponent, r = _reduced(f, x, f.bias, *ln2)
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
    return _scaled(f, v, *_reduced(f, v, 0, *f.ln2), f.largest, f.smallest).value


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
    exponent, r = _reduced(f, (v < -40).where(-40.0, v), f.bias - 1, *f.ln2)
    half = exponent.bits(v.kind)  # 2ⁿ itself may be inf where the result is not
    y = half.fma(_near_one(f, r), half - 0.5)
    return (v <= f.largest).where((y + y).call("copysign", v), v + INF).value


def _within(x: Lanes, bound: float) -> Lanes:
    x = (x > bound).where(bound, x)
    return (x < -bound).where(-bound, x)


def tanh(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """tanh x = -u / (u + 2) with u = exp(-2 |x|) - 1 and the sign of x; never beyond ±1."""
    v = Lanes(b, x)
    f = _FORMATS[v.kind]
    bound = -2 * f.one
    t = -v.call("fabs")
    t = t + t
    power, near = _powers(f, (t < bound).where(bound, t), math.log(2))  # the rest of log 2 counts where eˣ does not
    u, two_more = power.fma(near, power - 1), power.fma(near, power + 1)
    return (u / two_more).call("copysign", v).value


_ERF_ABOVE = (
    1.812894344329834,
    0.30767542123794556,
    0.0849403440952301,
    0.006114766467362642,
    0.00045726067037321627,
    3.254835291954805e-06,
)
_ERF_BELOW = (
    1.6066358089447021,
    0.8082144856452942,
    0.18402305245399475,
    0.02418092079460621,
    0.0018799768295139074,
    6.0774564190069214e-05,
)


def erf(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """The error function: in float32 x P(x²) / Q(x²), minimax up to where it is 1; in float64 the C library's."""
    v = Lanes(b, x)
    if v.kind == F64:
        return v.by_lane("erf").value
    end = 3.92
    x1 = _within(v, end)
    square = x1 * x1
    fourth = square * square
    y = x1 * (polynomial(square, fourth, _ERF_ABOVE) / polynomial(square, fourth, _ERF_BELOW))
    return _within((v.call("fabs") >= end).where(v, y), 1.0).value


def sigmoid(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """1 / (1 + exp(-x)), precise for large -x too."""
    v = Lanes(b, x)
    f = _FORMATS[v.kind]
    power, near = _powers(f, -_within(v, f.bias * math.log(2)), *f.ln2)
    return (1 / power.fma(near, 1 + power)).value


def _correction(f: Format, h: Lanes) -> tuple[Lanes, Lanes]:
    """s = h / (2 + h) and R with log(1 + h) = 2 artanh s = h - s (h - R), for h in [-½, 1]."""
    s = h / (2 + h)
    z = s * s
    return s, z * polynomial(z, z * z, f.log)


def _logarithm(f: Format, x: Lanes) -> tuple[Lanes, Lanes, Lanes]:
    """k, h and l with x = 2ᵏ m, √½ ≤ m < √2 and log m = h + l, where l is small beside h; x is normal and positive.

    With m = 1 + h, log m = h - s (h - R) = h - h²/2 + s (h²/2 + R).
    """
    i = x.bits(f.word) + ((f.bias << f.mantissa) - f.sqrt_half)
    exponent = (i >> f.mantissa) | ((f.bias + f.mantissa) << f.mantissa)  # the lowest bits of 2^mantissa
    k = exponent.bits(x.kind) - (2.0**f.mantissa + f.bias)
    h = ((i & ((1 << f.mantissa) - 1)) + f.sqrt_half).bits(x.kind) - 1
    s, rest = _correction(f, h)
    half = 0.5 * h * h
    return k, h, s * (half + rest) - half


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


def log1p(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """log(1 + x), precise for small x too: with u = 1 + x as rounded, log u + (x - (u - 1)) / u."""
    v = Lanes(b, x)
    f = _FORMATS[v.kind]
    u = 1 + v
    k, h, l = _logarithm(f, u)
    y = k.fma(f.ln2[0], h + k.fma(f.ln2[1], l + (v - (u - 1)) / u))
    return _at_the_ends(f, u, y.call("copysign", v)).value


def _soft(v: Lanes) -> Lanes:
    """log(1 + exp(-|x|))."""
    f = _FORMATS[v.kind]
    bound = -f.bias * math.log(2)
    t = -v.call("fabs")
    power, near = _powers(f, (t < bound).where(bound, t), *f.ln2)
    h = power * (1 + near)
    s, rest = _correction(f, h)
    return h - s * (h - rest)


def softplus(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """log(1 + eˣ) = max(x, 0) + log(1 + exp(-|x|))."""
    v = Lanes(b, x)
    return ((v < 0).where(0.0, v) + _soft(v)).value


def log_sigmoid(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """log sigmoid x = min(x, 0) - log(1 + exp(-|x|))."""
    v = Lanes(b, x)
    return ((v > 0).where(0.0, v) - _soft(v)).value
