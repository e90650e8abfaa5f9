"""Pointwise operations of the llvm backend: every row of the table against torch, on every instruction set."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy
import pytest
import torch
from llvmlite import binding as llvm
from llvmlite import ir
from torch import Tensor

from elman.compiler.llvm import isa as isas
from elman.compiler.llvm.code import (
    BOOL,
    BYTE,
    F32,
    F64,
    I32,
    I64,
    PTR,
    VOID,
    at,
    constant,
    counted,
    load,
    store,
    vector,
)
from elman.compiler.llvm.pointwise import OPERATIONS, emit, supports
from elman.errors import UnsupportedError

aten = torch.ops.aten
KINDS = {torch.float32: F32, torch.float64: F64, torch.int64: I64, torch.int32: I32, torch.bool: BOOL}
NAN, INF = math.nan, math.inf
HOST = isas.host()
RUNNABLE = [isa for isa in isas.ISAS.values() if HOST and isa.triple == HOST.triple and isa.bytes <= HOST.bytes]
LIBRARY = "acos acosh asin asinh atan atanh cos cosh erfc lgamma sin sinh tan"


@dataclass(frozen=True)
class Case:
    """An operation on operands and numbers, and by how many ulps it may miss the exact result; 0: torch's own bits.

    Operands: x any real number, m one of moderate size, u one in [-1, 1], b bool, i int64; else a plain number.
    ``scale`` is how large a term the result is a sum of; where the result is smaller, the ulps are of that term.
    """

    name: str
    args: tuple[Any, ...]
    ulps: float = 0
    scale: float = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.args))}{self.options or ''})"


def cases(names: str, *args: Any, ulps: float = 0, scale: float = 0, **options: Any) -> list[Case]:
    return [Case(name, args, ulps, scale, options) for name in names.split()]


BACKWARD: dict[str, Any] = {"ulps": 4, "scale": 32.0}
CASES = [
    *cases("neg abs sign sgn reciprocal floor ceil round trunc frac relu relu6 square", "x"),
    *cases("isnan isinf isfinite signbit logical_not clone alias detach", "x"),
    *cases("mul div maximum minimum fmax fmin copysign", "x", "x"),
    *cases("fmod remainder", "m", "m"),
    *cases("hypot", "x", "x", ulps=1.5),
    *cases("atan2", "x", "m", ulps=1.5),
    *cases("add sub rsub", "x", "x"),
    *cases("add sub rsub", "x", "x", alpha=2),
    *cases("add sub mul div rsub", "x", 0.75),
    *cases("eq ne lt le gt ge logical_and logical_or logical_xor", "x", "x"),
    *cases("eq ne lt le gt ge", "x", 2.0),
    *cases("eq ne lt le gt ge", "x", NAN),
    *cases("fmod remainder", "x", -2.5),
    *cases("div", "x", "x", rounding_mode="trunc"),
    *cases("div", "m", "m", rounding_mode="floor"),
    *cases("div", "x", 3.0, rounding_mode="floor"),
    *(case for e in (0, 1, 2) for case in cases("pow", "x", e)),
    *(case for e in (3, 4, 5, 8, 0.5, -0.5, -1, -2, -3, 1.75, -0.375) for case in cases("pow", "x", e, ulps=4)),
    *cases("pow", "x", "m", ulps=1.5),
    *cases("pow", 2.0, "m", ulps=1.5),
    *cases("exp exp2", "x", ulps=1.2),
    *cases("log log1p", "x", ulps=1.0),
    *cases("expm1 log2 log10", "x", ulps=2.5),
    *cases("tanh sigmoid", "x", ulps=2.6),
    *cases(LIBRARY, "x", ulps=4),
    *cases("asin acos atanh erf erfc sin cos tan lgamma", "m", ulps=4),
    *cases("asin acos atanh", "u", ulps=4),
    *cases("erf", "x", ulps=4),
    *cases("sqrt rsqrt", "x", ulps=1.5),
    *cases("hardtanh leaky_relu hardshrink softshrink", "x"),
    *cases("hardsigmoid", "x", ulps=1.5, scale=1),
    *cases("hardswish", "m", ulps=3, scale=3),
    *cases("elu selu celu silu mish", "x", ulps=4),
    *cases("softplus log_sigmoid", "x", ulps=2.5),
    *cases("gelu", "m", ulps=4, scale=4.0),
    *cases("gelu", "m", ulps=4, scale=4.0, approximate="tanh"),
    *cases("hardtanh", "x", -0.5, 2.0),
    *cases("leaky_relu", "x", 0.3),
    *cases("hardshrink softshrink", "x", 0.25),
    *cases("elu", "x", 0.7, 1.3, 0.9, ulps=4),
    *cases("celu", "x", 0.7, ulps=4),
    *cases("softplus", "x", 2.0, 15.0, ulps=3),
    *cases("threshold", "x", 0.5, 7.0),
    *cases("clamp", "x", -0.5, 2.0),
    *cases("clamp", "x", None, 2.0),
    *cases("clamp", "x", 0.1),
    *cases("clamp", "x", "x", "x"),
    *cases("clamp_min clamp_max", "x", 0.5),
    *cases("clamp_min clamp_max", "x", "x"),
    *cases("sigmoid_backward", "m", "u", **BACKWARD),
    *cases("tanh_backward", "m", "u", **BACKWARD),
    *cases("silu_backward gelu_backward mish_backward", "m", "m", **BACKWARD),
    *cases("gelu_backward", "m", "m", approximate="tanh", **BACKWARD),
    *cases("softplus_backward", "m", "m", 1.5, 20.0, **BACKWARD),
    *cases("elu_backward", "m", 0.7, 1.3, 0.9, False, "m", **BACKWARD),
    *cases("elu_backward", "m", 0.7, 1.3, 0.9, True, "m", **BACKWARD),
    *cases("threshold_backward softshrink_backward hardshrink_backward", "x", "m", 0.5),
    *cases("leaky_relu_backward", "x", "m", 0.1, False),
    *cases("hardtanh_backward", "x", "m", -1.0, 1.0),
    *cases("hardsigmoid_backward", "x", "m", ulps=1.5),
    *cases("log_sigmoid_backward", "m", "m", "m", **BACKWARD),
    *cases("hardswish_backward", "m", "m", **BACKWARD),
    *cases("where", "b", "x", "x"),
    *cases("where", "b", "x", 2.5),
    *cases("where", "b", 2.5, "x"),
    *cases("where", "b", "x", "i"),
    *cases("masked_fill", "x", "b", -INF),
    *cases("lerp", "m", "m", 0.3, **BACKWARD),
    *cases("lerp", "m", "m", "u", **BACKWARD),
    *cases("addcmul", "m", "m", "m", value=0.5, ulps=4, scale=32.0),
    *cases("addcdiv", "m", "m", "m", value=0.5, ulps=4, scale=32.0),
    # operands of other types, which torch promotes
    *cases("add sub mul div maximum minimum remainder", "i", "i"),
    *cases("add mul div", "x", "i", ulps=1.5),
    *cases("div", "i", "i", rounding_mode="floor"),
    *cases("div", "i", "i", rounding_mode="trunc"),
    *cases("remainder fmod", "i", 3),
    *cases("neg abs sign relu isnan bitwise_not floor round logical_not", "i"),
    *cases("eq ne lt le gt ge bitwise_and bitwise_or bitwise_xor", "i", "i"),
    *cases("eq ne lt le gt ge", "i", "x"),
    *cases("eq lt", "i", 2.5),
    *cases("clamp", "i", -1, 3),
    *(case for e in (0, 1, 3, 5, 13) for case in cases("pow", "i", e)),
    *cases("pow", "i", 0.5, ulps=1),
    *cases("eq ne lt le gt ge bitwise_and bitwise_or bitwise_xor logical_and logical_xor add mul maximum", "b", "b"),
    *cases("logical_not bitwise_not clone", "b"),
    *cases("add mul", "b", "x"),
    *cases("add", "b", 1),
    *cases("sub", 1, "x"),
    *(case for kind in KINDS for operand in "mib" for case in cases("_to_copy", operand, dtype=kind)),
    *cases("exp sigmoid", "i", ulps=4),
    *cases("copy", "x", "i"),
    *cases("lift_fresh bfloat16_finite bfloat16_rest", "x"),
]
OWN = {  # what torch offers by no such operation, or computes from less
    "cosh": lambda x: torch.from_numpy(numpy.cosh(x.numpy())),  # torch's own overflows before its result would
    "sinh": lambda x: torch.from_numpy(numpy.sinh(x.numpy())),
    "bfloat16_rest": lambda x: (x.float() - x.bfloat16().float()).nan_to_num(0, 0, 0).to(x.dtype),
    "bfloat16_finite": lambda x: x.bfloat16().nan_to_num(0, 0, 0).to(x.dtype),
    "rsub": lambda x, y, alpha=1: y - x * alpha,
    "log_sigmoid": torch.nn.functional.logsigmoid,
    "log_sigmoid_backward": lambda g, x, _: aten.log_sigmoid_backward(g, x, torch.exp(-x.abs())),
    "hardsigmoid_backward": lambda g, x: torch.where((x > -3) & (x < 3), g / 6, 0),  # torch's sixth is in float32
}


def reals(kind: torch.dtype, seed: int) -> Tensor:
    """Numbers of all exponents and both signs, many of size 1, and the special ones; none denormal."""
    draw = torch.Generator().manual_seed(seed)
    info = torch.finfo(kind)
    low, high = math.frexp(info.tiny)[1], math.frexp(info.max)[1]
    exponents = torch.linspace(low, high - 1, 256, dtype=torch.float64).round()
    every = torch.ldexp(torch.rand(256, generator=draw, dtype=torch.float64) + 1, exponents - 1)
    near = torch.randn(160, generator=draw, dtype=torch.float64) * 10
    large = torch.randn(128, generator=draw, dtype=torch.float64) * (60 if kind == torch.float32 else 500)
    whole = torch.randint(-5, 6, (64,), generator=draw) / 2
    last = [torch.finfo(kind).max, -torch.finfo(kind).max, info.tiny, -info.tiny, info.eps, 3.0, -3.0, 20.0]
    x = torch.cat([every, -every, near, large, whole, torch.tensor(last, dtype=torch.float64)]).to(kind)
    ends = [math.log(info.max), math.log(info.tiny), math.log2(info.max), math.log2(info.tiny), -1.0, 1.0, math.sqrt(2)]
    edges = torch.tensor([*ends, 0.5 * math.log(2), math.sqrt(0.5), 9.0, -9.0, 19.0], dtype=kind)
    up, down, x = edges, edges, torch.cat([x, edges])
    for _ in range(3):  # the numbers before and after those where a function changes its ways
        up, down = torch.nextafter(up, torch.full_like(up, INF)), torch.nextafter(down, torch.full_like(down, -INF))
        x = torch.cat([x, up, down])
    x = torch.cat([x, torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 0.5], dtype=kind).repeat(4)])
    x = torch.cat([x, torch.tensor([INF, NAN, 1.0, INF, -INF, 0.0, -0.0, -1.0], dtype=kind)])
    x = torch.cat([x, torch.ones(-len(x) % 64, dtype=kind)])
    return x[torch.randperm(len(x), generator=draw)]


@lru_cache
def operand(letter: str, kind: torch.dtype, seed: int) -> Tensor:
    x = reals(kind, seed)
    n, draw = len(x), torch.Generator().manual_seed(100 + seed)
    if letter == "m":
        x = torch.randn(n, generator=draw, dtype=kind) * 3
        x[:4] = torch.tensor([NAN, 0.0, -0.0, 1.0], dtype=kind)
    if letter == "u":
        x = torch.rand(n, generator=draw, dtype=kind) * 2 - 1
        x[:4] = torch.tensor([NAN, 0.0, 1.0, -1.0], dtype=kind)
    if letter == "b":
        return torch.rand(n, generator=draw) < 0.5
    if letter == "i":
        x = torch.randint(-50, 50, (n,), generator=draw)
        return torch.where(x == 0, 7, x)
    return x


def operands(case: Case, kind: torch.dtype) -> list[Any]:
    return [operand(arg, kind, place) if isinstance(arg, str) else arg for place, arg in enumerate(case.args)]


@numpy.errstate(over="ignore")
def by_torch(case: Case, args: list[Any]) -> Tensor:
    reference = OWN.get(case.name) or getattr(aten, case.name)
    return reference(*args, **case.options)


def build(case: Case, module: ir.Module, name: str, kind: torch.dtype, lanes: int) -> None:
    """A function(result, operands …, n) that runs the operation over so many lanes at a time."""
    args = operands(case, kind)
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    result = by_torch(case, args)
    f = ir.Function(module, ir.FunctionType(VOID, [PTR] * (len(tensors) + 1) + [I64]), name)
    b = ir.IRBuilder(f.append_basic_block())
    with counted(b, 0, f.args[-1], lanes) as i:
        pointers = iter(f.args[1:])
        values = [_read(b, next(pointers), i, arg.dtype, lanes) if isinstance(arg, Tensor) else arg for arg in args]
        value = emit(b, case.name, values, KINDS[result.dtype], **case.options)
        if result.dtype == torch.bool:
            value = b.zext(value, vector(BYTE, lanes))
        store(b, value, at(b, f.args[0], b.mul(i, constant(I64, result.element_size()))))
    b.ret_void()


def _read(b: ir.IRBuilder, pointer: ir.Value, i: ir.Value, kind: torch.dtype, lanes: int) -> ir.Value:
    place = at(b, pointer, b.mul(i, constant(I64, kind.itemsize)))
    if kind != torch.bool:
        return load(b, place, vector(KINDS[kind], lanes))
    return b.trunc(load(b, place, vector(BYTE, lanes)), vector(BOOL, lanes))


def prepared(isa: isas.Isa, module: ir.Module) -> tuple[Any, Any]:
    """The module as LLVM reads it, and the machine to compile it for."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module.triple = isa.triple
    target = llvm.Target.from_triple(isa.triple)
    machine = target.create_target_machine(cpu=isa.cpu, features=isa.features, opt=2, jit=True)
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    return parsed, machine


class Compiled:
    """All cases as functions of one module."""

    def __init__(self, isa: isas.Isa, kind: torch.dtype, lanes: int, wanted: list[Case]) -> None:
        module = ir.Module()
        for index, case in enumerate(wanted):
            build(case, module, f"f{index}", kind, lanes)
        self.engine = llvm.create_mcjit_compiler(*prepared(isa, module))
        self.engine.finalize_object()

    def __call__(self, index: int, result: Tensor, args: list[Any]) -> Tensor:
        tensors = [result, *(arg for arg in args if isinstance(arg, Tensor))]
        prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * len(tensors), ctypes.c_int64)
        with flushed():
            address = self.engine.get_function_address(f"f{index}")
            prototype(address)(*(tensor.data_ptr() for tensor in tensors), len(result))
        return result


@contextmanager
def flushed() -> Iterator[None]:
    """Denormal numbers are zero, as in the programs that the backend makes."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


EITHER_ZERO = ("maximum", "minimum", "fmax", "fmin", "clamp", "clamp_min", "clamp_max", "remainder", "softshrink")


def wrong(case: Case, got: Tensor, args: list[Any]) -> Tensor:
    """The places where the result is not what the case asks for."""
    with flushed():
        exact = by_torch(case, args)
    if not exact.is_floating_point():
        return got != exact
    info = torch.finfo(exact.dtype)
    if case.ulps and exact.dtype == torch.float32:
        exact = by_torch(case, [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args])
    same = (got == exact.to(got.dtype)) | (got.isnan() & exact.isnan())
    if not case.ulps:
        signs = (got.signbit() == exact.signbit()) | got.isnan()
        return ~(same & (signs | (case.name in EITHER_ZERO)))
    got, exact = got.double(), exact.double()
    tolerance = case.ulps * info.eps if info.bits == 32 else 1e-12
    close = (got - exact).abs() <= tolerance * exact.abs().clamp(min=case.scale)
    least, most = 1024 * info.tiny, info.max * (1 - 4 * info.eps)  # of a product with a factor that is flushed; rounded
    ends = ((exact.abs() < least) & (got.abs() <= least)) | ((exact.abs() > most) & (got * exact.sign() > most))
    return ~(same | (close & exact.isfinite()) | ends)


CONFIGURATIONS = [
    *((isa, kind, isa.lanes(kind.itemsize * 8)) for isa in RUNNABLE for kind in (torch.float32, torch.float64)),
    *((isa, kind, 1) for isa in RUNNABLE[:1] for kind in (torch.float32, torch.float64)),
]


@pytest.mark.parametrize(("isa", "kind", "lanes"), CONFIGURATIONS, ids=lambda value: getattr(value, "name", str(value)))
def test_every_operation_is_that_of_torch(isa: isas.Isa, kind: torch.dtype, lanes: int) -> None:
    compiled, failed = Compiled(isa, kind, lanes, CASES), {}
    for index, case in enumerate(CASES):
        args = operands(case, kind)
        got = compiled(index, torch.empty_like(by_torch(case, args)), args)
        places = wrong(case, got, args)
        if places.any():
            failed[str(case)] = [(a[places][:3] if isinstance(a, Tensor) else a) for a in [*args, got]]
    assert not failed


def test_every_row_of_the_table_has_a_case() -> None:
    assert {case.name for case in CASES} == set(OPERATIONS)
    assert all(supports(name) for name in OPERATIONS)
    assert not supports("mm")


INLINE = "exp exp2 expm1 log log2 log10 log1p sigmoid log_sigmoid softplus tanh"


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_denormal_arguments_count_as_themselves_or_as_zero(kind: torch.dtype) -> None:
    tiny = torch.finfo(kind).tiny
    x = torch.tensor([tiny / 2, -tiny / 2, tiny / 1024, -tiny / 1024, tiny * torch.finfo(kind).eps] * 16, dtype=kind)
    wanted = cases(INLINE + " erf silu relu neg", "x", ulps=6)
    compiled = Compiled(RUNNABLE[0], kind, RUNNABLE[0].lanes(kind.itemsize * 8), wanted)
    for index, case in enumerate(wanted):
        got = compiled(index, torch.empty_like(x), [x])
        assert not (wrong(case, got, [x]) & wrong(case, got, [x * 0])).any(), case


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_squashing_functions_stay_within_their_bounds(kind: torch.dtype) -> None:
    x = torch.linspace(-40, 40, 1 << 16, dtype=kind)
    compiled = Compiled(RUNNABLE[0], kind, 4, cases("tanh sigmoid erf", "x"))
    tanh, sigmoid, erf = (compiled(index, torch.empty_like(x), [x]) for index in range(3))
    assert tanh.abs().max() == erf.abs().max() == sigmoid.max() == 1
    assert sigmoid.min() > 0
    assert torch.equal(tanh, -compiled(0, torch.empty_like(x), [-x]))


@pytest.mark.parametrize("isa", isas.ISAS.values(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_elementary_functions_call_no_library(isa: isas.Isa, kind: torch.dtype) -> None:
    if isa.triple.startswith("aarch64"):
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
    module, wanted = ir.Module(), cases(f"{INLINE} sqrt rsqrt silu maximum", "x", "x")
    for index, case in enumerate(wanted):
        unary = Case(case.name, case.args[: 2 if case.name == "maximum" else 1])
        build(unary, module, f"f{index}", kind, isa.lanes(kind.itemsize * 8))
    parsed, machine = prepared(isa, module)
    calls = [line for line in machine.emit_assembly(parsed).splitlines() if re.match(r"\s+(callq?|bl|blr)\s", line)]
    assert not calls


def test_what_has_no_code_is_refused() -> None:
    x = ir.Constant(ir.VectorType(I64, 4), [2] * 4)
    b = ir.IRBuilder(ir.Function(ir.Module(), ir.FunctionType(VOID, []), "f").append_basic_block())
    with pytest.raises(UnsupportedError, match="digamma"):
        emit(b, "digamma", [x], F32)
    with pytest.raises(UnsupportedError, match="negative powers"):
        emit(b, "pow", [x, -1], I64)
    with pytest.raises(UnsupportedError, match="exponents that are tensors"):
        emit(b, "pow", [x, x], I64)
