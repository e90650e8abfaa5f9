"""The step as a graph: what the passes hand to one another."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import ElmanError, UnsupportedError

__all__ = [
    "Leaf", "Step", "arguments", "batch_multiple", "explained", "fake", "level_of_the_caller", "location", "ours",
    "user_line",
]  # fmt: skip

_PACKAGE = str(Path(__file__).parents[1])  # not by name: a user's folder may be called elman too


class Leaf(NamedTuple):
    """What is known of a tensor before any data: its shape past the batch, dtype and device."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    batched: bool


@dataclass
class Step:
    """One step as a graph, and the role of each of its ends.

    Placeholders: ``xs`` differ at every time and row, ``state`` is what the last step left, ``weights`` hold for
    all steps (parameters without, constants with a batch dimension), ``draws`` are random numbers, new at every
    step. Outputs: ``ys``, the ``next`` state, values ``kept`` by name, and ``sums`` over time, by weight index.
    ``unit`` is the prime that stands for the batch size. ``precision`` is PyTorch's for products of float32, as it was
    when the step was traced.
    """

    graph: fx.Graph
    root: nn.Module
    unit: int
    xs: list[fx.Node]
    state: list[fx.Node]
    weights: list[fx.Node]
    draws: list[fx.Node] = field(default_factory=list)
    ys: list[fx.Node | None] = field(default_factory=list)
    next: list[fx.Node] = field(default_factory=list)
    kept: dict[str, fx.Node] = field(default_factory=dict)
    sums: dict[int, fx.Node] = field(default_factory=dict)
    precision: str = "highest"

    def outputs(self) -> list[fx.Node]:
        """Every node that leaves the step."""
        found = [*(y for y in self.ys if y is not None), *self.next, *self.kept.values(), *self.sums.values()]
        return list(dict.fromkeys(found))


def batch_multiple(value: Any, unit: int) -> int:
    """k where an integer of the graph stands for k·B; 0 where it is an ordinary integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        return 0
    return value // unit if value and value % unit == 0 else 0


def fake(mode: FakeTensorMode, leaf: Leaf, unit: int) -> Tensor:
    """A tensor of that shape without data; its batch dimension, if any, is ``unit``."""
    shape = (unit, *leaf.shape) if leaf.batched else leaf.shape
    with mode:
        return torch.empty(shape, dtype=leaf.dtype, device=leaf.device)


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """The positional arguments of a node, of whatever kind its operation takes."""
    return node.args


def location(node: fx.Node) -> str:
    """The user's own line behind a node: ``file.py:12: h = h.mean(0)``."""
    return user_line(node.meta.get("stack_trace") or "")


def user_line(stack: str) -> str:
    lines = stack.splitlines()
    for i in range(len(lines) - 1, -1, -1):
        line = lines[i].strip()
        if line.startswith('File "') and not ours(line.split('"')[1]):
            name, number = line.split('"')[1], line.split("line ")[1].split(",")[0]
            code = lines[i + 1].strip() if i + 1 < len(lines) else ""
            return f"{name}:{number}" + (f": {code}" if code and not code.startswith('File "') else "")
    return "a line that was not recorded"


def ours(filename: str) -> bool:
    """Whether code of that file is the engine's or PyTorch's, or was generated."""
    path = filename.replace("\\", "/")
    engine = ("/elman/compiler/", "/elman/unfold.py", "/elman/protocol.py", "/elman/recording.py")
    typed = path.startswith(("<stdin", "<ipython", "<python-input"))  # a user's session
    return "/torch/" in path or (path.startswith("<") and not typed) or any(part in path for part in engine)


def level_of_the_caller() -> int:
    """The ``stacklevel`` of a warning that points at the code that is neither elman's nor PyTorch's."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and (ours(file := frame.f_code.co_filename) or file.startswith(_PACKAGE)):
        frame, level = frame.f_back, level + 1
    return level


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Errors of PyTorch inside a pass become UnsupportedError; elman's own go through."""
    try:
        yield
    except ElmanError:
        raise
    except (RuntimeError, NotImplementedError, AssertionError, IndexError) as error:
        raise UnsupportedError(
            f"{what}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
