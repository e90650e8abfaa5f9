"""Random small cells for Hypothesis: a step drawn as a list of instructions, which is also how it prints.

Values are (B, width). Whatever becomes the next state is bounded, so that no number of steps makes it overflow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

__all__ = ["Plan", "RandomCell", "plans", "ways"]

_UNARY = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "softplus": F.softplus,
    "negative": torch.neg,
    "bell": lambda a: torch.exp(-a * a),
    "sine": torch.sin,
    "softmax": lambda a: torch.softmax(a, -1),
    "normalise": lambda a: F.layer_norm(a, a.shape[-1:], eps=0.1),
    "cumulate": lambda a: a.cumsum(-1),
    "cut": torch.detach,
    "half": lambda a: 0.5 * a,
    "one minus": lambda a: 1 - a,
}
_BINARY = {
    "add": torch.add,
    "subtract": torch.sub,
    "multiply": torch.mul,
    "larger": lambda a, b: torch.where(a > b, a, b),
    "gate": lambda a, b: torch.where(a > 0, b, torch.zeros_like(b)),
    "divide": lambda a, b: a / (1 + b * b),
}
_NARROW = {
    "mean": lambda a: a.mean(-1, keepdim=True),
    "sum": lambda a: a.sum(-1, keepdim=True),
    "peak": lambda a: a.amax(-1, keepdim=True),
    "norm": lambda a: (0.1 + (a * a).sum(-1, keepdim=True)).sqrt(),
}
_BOUNDED = {"sigmoid", "tanh", "bell", "sine", "softmax", "normalise"}
_KEEPS_BOUND = {"negative", "half", "one minus", "cut", "first", "second", "join", "mean", "peak", "larger", "gate"}


@dataclass(frozen=True)
class Plan:
    """A step: the widths of what goes in, instructions (result, operation, operands, width), and what comes out."""

    xs: tuple[int, ...]
    states: tuple[int, ...]
    constants: tuple[int, ...]
    lines: tuple[tuple[str, str, tuple[str, ...], int], ...]
    next: tuple[str, ...]
    ys: tuple[str, ...]
    seed: int

    def __repr__(self) -> str:
        widths = [f"{r}{i}: {w}" for r in ("x", "s", "c") for i, w in enumerate(self._widths(r))]
        body = [f"    {name} = {op}({', '.join(args)})  # {width}" for name, op, args, width in self.lines]
        return "\n".join([f"\nstep({', '.join(widths)})", *body, f"    y = {self.ys}, next = {self.next}"])

    def _widths(self, role: str) -> tuple[int, ...]:
        return {"x": self.xs, "s": self.states, "c": self.constants}[role]


class RandomCell(nn.Module):
    """The cell of a plan, with parameters by its seed, in float64."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        width = {f"{r}{i}": w for r in ("x", "s", "c") for i, w in enumerate(plan._widths(r))}
        generator = torch.Generator().manual_seed(plan.seed)

        def random(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.7)

        for name, op, args, out in plan.lines:
            width[name] = out
            if op in ("linear", "affine"):
                self.register_parameter(f"{name}_weight", random(out, width[args[0]]))
            if op in ("affine", "shift", "scale"):
                self.register_parameter(f"{name}_vector", random(out))

    def forward(self, xs: Any, states: Any, constants: Any = ()) -> tuple[Any, Any]:
        value = {f"x{i}": x for i, x in enumerate(xs)}
        value |= {f"s{i}": s for i, s in enumerate(states)} | {f"c{i}": c for i, c in enumerate(constants)}
        for name, op, args, _ in self.plan.lines:
            value[name] = self._run(name, op, [value[a] for a in args])
        return tuple(value[y] for y in self.plan.ys), tuple(value[n] for n in self.plan.next)

    def _run(self, name: str, op: str, args: list[Tensor]) -> Tensor:
        for table in (_UNARY, _BINARY, _NARROW):
            if op in table:
                return table[op](*args)
        half = args[0].shape[-1] // 2
        match op:
            case "linear" | "affine":
                return F.linear(args[0], getattr(self, f"{name}_weight"), getattr(self, f"{name}_vector", None))
            case "shift":
                return args[0] + getattr(self, f"{name}_vector")
            case "scale":
                return args[0] * getattr(self, f"{name}_vector")
            case "join":
                return torch.cat(args, -1)
            case "first":
                return args[0].chunk(2, -1)[0]
            case "second":
                return args[0][..., half:]
        raise AssertionError(op)

    def initial_state(self, batch: int, *, device: Any = None, dtype: Any = None) -> Any:
        return tuple(torch.zeros(batch, w, device=device, dtype=dtype) for w in self.plan.states)

    def example(self, steps: int, batch: int) -> tuple[Any, Any]:
        constants = tuple(torch.randn(batch, w) for w in self.plan.constants)
        return tuple(torch.randn(steps, batch, w) for w in self.plan.xs), constants or None


class _Writer:
    """A plan while it is drawn: what values there are, how wide, and which of them are bounded."""

    def __init__(self, draw: Any, widths: Any) -> None:
        self.draw, self.widths = draw, widths
        self.width: dict[str, int] = {}
        self.bounded: set[str] = set()
        self.lines: list[tuple[str, str, tuple[str, ...], int]] = []

    def pick(self, names: list[str]) -> str:
        return self.draw(st.sampled_from(names))

    def write(self, op: str, args: tuple[str, ...], width: int) -> str:
        name = f"v{len(self.lines)}"
        self.lines.append((name, op, args, width))
        self.width[name] = width
        if op in _BOUNDED or (op in _KEEPS_BOUND and all(a in self.bounded for a in args)):
            self.bounded.add(name)
        return name

    def line(self) -> None:
        kind = self.pick(
            ["linear", "affine", "unary", "unary", "binary", "binary", "binary", "narrow", "vector", "shape"]
        )
        a = self.pick(list(self.width))
        if kind in ("linear", "affine"):
            self.write(kind, (a,), self.draw(self.widths))
        elif kind == "unary":
            self.write(self.pick(list(_UNARY)), (a,), self.width[a])
        elif kind == "narrow":
            self.write(self.pick(list(_NARROW)), (a,), 1)
        elif kind == "vector":
            self.write(self.pick(["shift", "scale"]), (a,), self.width[a])
        elif kind == "binary":
            fits = [n for n, w in self.width.items() if w in (1, self.width[a]) or self.width[a] == 1]
            b = self.pick(fits)
            op = self.pick(list(_BINARY))
            wide = max(self.width[a], self.width[b])
            # zeros_like(b) has the width of b, which is that of the result only when b is the wider one.
            self.write(op, (b, a) if op == "gate" and self.width[a] == wide else (a, b), wide)
        elif self.width[a] % 2 == 0:
            self.write(self.pick(["first", "second"]), (a,), self.width[a] // 2)
        else:
            b = self.pick(list(self.width))
            self.write("join", (a, b), self.width[a] + self.width[b])

    def state(self, width: int) -> str:
        """Some value that may be carried on: bounded and of that width."""
        fits = [n for n, w in self.width.items() if w == width and n in self.bounded]
        if fits and self.draw(st.booleans()):
            return self.pick(fits)
        source = self.pick(list(self.width))
        if self.width[source] != width:
            source = self.write("affine", (source,), width)
        return self.write("tanh", (source,), width)


_WIDE = st.integers(1, 4) | st.sampled_from([7, 8, 16, 17, 33])
"""Below, at and above the vectors and tiles of machine code."""


@st.composite
def plans(draw: Any, most: int = 9, wide: bool = False) -> Plan:
    """A random step of up to ``most`` free instructions, one to three states, inputs, and perhaps constants."""
    widths = _WIDE if wide else st.integers(1, 4)
    writer = _Writer(draw, widths)
    xs = tuple(draw(st.lists(widths, min_size=1, max_size=2)))
    states = tuple(draw(st.lists(widths, min_size=1, max_size=3)))
    constants = tuple(draw(st.lists(widths, max_size=1)))
    for role, sizes in (("x", xs), ("s", states), ("c", constants)):
        writer.width |= {f"{role}{i}": w for i, w in enumerate(sizes)}
    writer.bounded |= set(writer.width)
    for _ in range(draw(st.integers(1, most))):
        writer.line()
    following = tuple(writer.state(w) for w in states)
    ys = tuple(writer.pick(list(writer.width)) for _ in range(draw(st.integers(1, 2))))
    return Plan(xs, states, constants, tuple(writer.lines), following, ys, draw(st.integers(0, 99)))


@st.composite
def ways(draw: Any, most: int = 4) -> dict[str, Any]:
    """A random way to run a scan: T, B up to ``most``, lengths, direction and recomputation."""
    steps, batch = draw(st.integers(1, 5)), draw(st.integers(1, most))
    lengths = draw(st.none() | st.lists(st.integers(0, steps), min_size=batch, max_size=batch))
    if lengths is not None and max(lengths) == 0:
        lengths[0] = steps
    remat = draw(st.sampled_from([None, None, 1, 2, 3, "auto"]))
    return {"steps": steps, "batch": batch, "lengths": lengths, "reverse": draw(st.booleans()), "remat": remat}
