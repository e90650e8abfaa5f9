"""Every mistake in using ``scan`` raises its named exception, whatever the backend: one paragraph, the user's line."""

from __future__ import annotations

import linecache
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn, zeros

import elman
from elman.errors import CellError, InputError, OptionError, StateError, UnfoldWarning, UsageError

BACKENDS = ("reference", "interpret", "auto")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
B, D, H = 2, 3, 4
X = torch.randn(5, B, D)
S = zeros(B, H)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.U, self.W = nn.Linear(D, H), nn.Linear(H, H)

    def initial_state(self, batch: int, *, device: Any, dtype: Any) -> Any:
        return zeros(batch, H, device=device, dtype=dtype)

    def forward(self, x: Any, h: Any) -> Any:
        before = self.W(h)
        h = torch.tanh(before + self.U(x))
        return h, h


class Joined(Plain):
    """x and state in one product."""

    def __init__(self) -> None:
        super().__init__()
        self.V = nn.Linear(D + H, H)

    def forward(self, x: Any, h: Any) -> Any:
        h = self.V(torch.cat([x, h], -1))
        return h, h


class Pointwise(Plain):
    """Without a product: types are promoted, and sizes of one broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.rand(H))

    def forward(self, x: Any, h: Any) -> Any:
        h = self.a * x + self.a * h
        return h, h


class Two(Plain):
    """Carries two tensors."""

    def initial_state(self, batch: int, *, device: Any, dtype: Any) -> Any:
        return 2 * (super().initial_state(batch, device=device, dtype=dtype),)

    def forward(self, x: Any, state: Any) -> Any:
        h, c = state
        c = self.W(h) + self.U(x) + c
        return c, (torch.tanh(c), c)


class TwoGiven(nn.Module):
    """Carries two tensors, and has no state to start from."""

    def forward(self, x: Any, state: Any) -> Any:
        h, c = state
        return h, (c, h)


class Named(nn.Module):
    def initial_state(self, batch: int, *, device: Any, dtype: Any) -> Any:
        return {"h": zeros(batch, H, device=device, dtype=dtype)}

    def forward(self, x: Any, state: Any) -> Any:
        h = state["h"].tanh()
        return h, {"h": h}


class Told(Plain):
    """Reads constants."""

    def forward(self, x: Any, h: Any, context: Any) -> Any:
        h = torch.tanh(self.U(x) + self.W(h) + context)
        return h, h


class Symbols(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.E = nn.Embedding(5, D)

    def forward(self, x: Any, h: Any) -> Any:
        return super().forward(self.E(x), h)


class OneArgument(Plain):
    def forward(self, x: Any) -> Any:  # type: ignore[override]  # that is the mistake
        return x, x


class OldStart(Plain):
    def initial_state(self, batch: int) -> Any:  # type: ignore[override]  # that is the mistake
        return zeros(batch, H)


class NoStart(nn.Module):
    def forward(self, x: Any, s: Any) -> Any:
        return x, s


class Returns(Plain):
    """A step whose result is given."""

    def __init__(self, result: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Any, h: Any) -> Any:
        return self.result(x, h)


def starts(make: Callable[[int], Any], kind: type[Plain] = Plain) -> nn.Module:
    """A cell of that kind with another initial state."""

    class Starts(kind):  # type: ignore[valid-type, misc]  # a class made at run time
        def initial_state(self, batch: int, *, device: Any, dtype: Any) -> Any:
            return make(batch)

    return Starts()


class Mistake(NamedTuple):
    """What is raised, what it says, what was given; and what stands on the user's line that it names, if any."""

    error: type[UsageError]
    pattern: str
    given: tuple[Any, ...]
    options: dict[str, Any] = {}  # noqa: RUF012  (read only)
    line: str | None = None


W, U, START, STEP = "before = self.W(h)", "h = torch.tanh(before + self.U(x))", "def initial_state", "def forward"

MISTAKES = {
    # the cell
    "not a module": Mistake(CellError, r"nn.Module.*function", (lambda x, s: (x, s), X, S)),
    "a class for an instance": Mistake(CellError, r"nn.Module.*type", (Plain, X, S)),
    "no initial state": Mistake(CellError, r"NoStart.*initial_state.*state=", (NoStart(), X)),
    "forward of one argument": Mistake(CellError, r"takes \(x.*forward\(x, state\)", (OneArgument(), X), line=STEP),
    "y alone": Mistake(CellError, r"pair \(y, state\).*Tensor", (Returns(lambda x, s: x), X), line=STEP),
    "nothing": Mistake(CellError, r"pair \(y, state\).*NoneType", (Returns(lambda x, s: None), X), line=STEP),
    "a triple": Mistake(CellError, r"pair \(y, state\).*tuple of 3", (Returns(lambda x, s: (x, s, s)), X), line=STEP),
    "a list": Mistake(CellError, r"pair \(y, state\).*list", (Returns(lambda x, s: [x, s]), X), line=STEP),
    "y a number": Mistake(CellError, r"y that holds a float", (Returns(lambda x, s: (1.0, s)), X), line=STEP),
    "a number in y": Mistake(CellError, r"y that holds a int", (Returns(lambda x, s: ((x, 2), s)), X), line=STEP),
    "y of one row": Mistake(CellError, r"\(B, …\).*B = 2", (Returns(lambda x, s: (x.sum(), s)), X), line=STEP),
    "y turned": Mistake(CellError, r"\(3, 2\).*\(B, …\)", (Returns(lambda x, s: (x.t(), s)), X), line=STEP),
    # initial_state
    "start without keywords": Mistake(CellError, r"unexpected keyword.*device, dtype\)", (OldStart(), X), line=START),
    "start with nothing": Mistake(StateError, r"is None.*Plain|is None.*Starts", (starts(lambda b: None), X), line=W),
    "two from nothing": Mistake(StateError, r"is None", (starts(lambda b: None, Two), X), line="h, c = state"),
    "start with a number": Mistake(StateError, r"is 0\.0", (starts(lambda b: 0.0), X), line=W),
    "start too wide": Mistake(StateError, r"state \(2, 5\).*initial_state", (starts(lambda b: zeros(b, 5)), X), line=W),
    "second too wide": Mistake(
        StateError,
        r"add\(a value \(2, 4\) float32, state \(2, 5\)",
        (starts(lambda b: (zeros(b, H), zeros(b, 5)), Two), X),
        line="c = self.W(h)",
    ),
    "too wide for x": Mistake(
        InputError, r"state is \(2, 5\)", (starts(lambda b: zeros(b, 5), Joined), X), line="h = self.V("
    ),
    "start too narrow": Mistake(
        StateError,
        r"\(2, 1\) and became \(2, 4\)",
        (starts(lambda b: zeros(b, 1), Pointwise), torch.randn(5, B, H)),
        line=STEP,
    ),
    "start of float64": Mistake(
        StateError,
        r"state \(2, 4\) float64.*\.to\(torch.float32\)",
        (starts(lambda b: zeros(b, H).double()), X),
        line=W,
    ),
    "start of integers": Mistake(
        StateError, r"state \(2, 4\) int64.*\.to\(torch.float32\)\.$", (starts(lambda b: zeros(b, H).long()), X), line=W
    ),
    "start elsewhere": Mistake(
        StateError, r"on cpu.*on meta is the state", (starts(lambda b: zeros(b, H, device="meta")), X), line=W
    ),
    "start of one row": Mistake(StateError, r"B = 2.*\(1, 4\)", (starts(lambda b: zeros(1, H)), X), line=START),
    "start of one row, lengths": Mistake(
        StateError, r"B = 2.*\(1, 4\)", (starts(lambda b: zeros(1, H)), X), {"lengths": [5, 2]}, START
    ),
    # state
    "two for one": Mistake(StateError, r"starts from.*was given \(\(2, 4\)", (Plain(), X, (S, S)), line=W),
    "one for two": Mistake(StateError, r"structure.*instead of tensor", (Two(), X, S), line=STEP),
    "one for two, of three rows": Mistake(
        StateError, r"starts from.*was given \(3", (Two(), torch.randn(5, 3, D), zeros(3, H)), line="h, c = state"
    ),
    "one for two, given": Mistake(
        StateError, r"unbind\(state \(3", (TwoGiven(), torch.randn(5, 3, D), zeros(3, H)), line="h, c = state"
    ),
    "another name": Mistake(StateError, r"KeyError: 'h'", (Named(), X, {"H": S}), line='h = state["h"]'),
    "two for torch.nn's one": Mistake(StateError, r"starts from.*was given \(\(", (nn.GRUCell(D, H), X, (S, S))),
    "one for torch.nn's two": Mistake(StateError, r"starts from.*was given \(2", (nn.LSTMCell(D, H), X, S)),
    "state too wide": Mistake(
        StateError, r"from the state \(2, 4\).*given \(2, 5\)", (Plain(), X, zeros(B, 5)), line=W
    ),
    "state of float64": Mistake(StateError, r"state \(2, 4\) float64", (Plain(), X, S.double()), line=W),
    "state elsewhere": Mistake(StateError, r"on cpu.*on meta is the state", (Plain(), X, S.to("meta")), line=W),
    "state of another batch": Mistake(StateError, r"B = 2.*\(3, 4\)", (NoStart(), X, zeros(3, H))),
    "state of another batch, lengths": Mistake(
        StateError, r"B = 2.*\(3, 4\)", (NoStart(), X, zeros(3, H)), {"lengths": [5, 2]}
    ),
    "state of no dimension": Mistake(StateError, r"B = 2", (NoStart(), X, zeros(()))),
    "another structure": Mistake(StateError, r"structure", (Returns(lambda x, s: (x, (s, s))), X), line=STEP),
    "no state any more": Mistake(StateError, r"structure.*None", (Returns(lambda x, s: (x, None)), X), line=STEP),
    "another shape": Mistake(
        StateError, r"\(2, 4\) and became \(2, 8\)", (Returns(lambda x, s: (x, torch.cat([s, s], -1))), X), line=STEP
    ),
    "another type": Mistake(StateError, r"float32.*float64", (Returns(lambda x, s: (x, s.double())), X), line=STEP),
    # constants
    "constants for none": Mistake(InputError, r"\(x, state\), but constants", (Plain(), X), {"constants": S}, STEP),
    "no constants": Mistake(InputError, r"context.*Pass constants=", (Told(), X), line=STEP),
    "constants too wide": Mistake(
        InputError, r"constants \(2, 5\) float32", (Told(), X), {"constants": zeros(B, 5)}, "h = torch.tanh(self.U(x)"
    ),
    "constants elsewhere": Mistake(
        InputError, r"on meta is constants", (Told(), X), {"constants": S.to("meta")}, "h = torch.tanh(self.U(x)"
    ),
    "constants of another batch": Mistake(
        InputError, r"constants.*B = 2.*\(3,\)", (NoStart(), X, S), {"constants": zeros(3)}
    ),
    "constants of another batch, lengths": Mistake(
        InputError, r"constants.*B = 2.*\(3, 4\)", (Told(), X), {"constants": zeros(3, H), "lengths": [5, 2]}
    ),
    # xs
    "no batch": Mistake(InputError, r"\(T, B, …\).*\(5,\)", (NoStart(), X[:, 0, 0], S)),
    "no batch but features": Mistake(
        InputError, r"\(\d, 3\) are \(T, B\).*unsqueeze\(1\)", (Plain(), X[:, 0]), line=STEP
    ),
    "no batch, joined": Mistake(
        InputError, r"got \(\d, 3\)\. Features.*unsqueeze\(1\)", (Joined(), X[:, 0]), line="h = self.V("
    ),
    "no batch, torch.nn": Mistake(InputError, r"got \(\d, 3\)\. Features.*unsqueeze\(1\)", (nn.GRUCell(D, H), X[:, 0])),
    "empty": Mistake(InputError, r"no tensor", (NoStart(), {}, S)),
    "a list of numbers": Mistake(InputError, r"\(T, B, …\).*float", (NoStart(), [1.0, 2.0], S)),
    "an array": Mistake(InputError, r"\(T, B, …\).*ndarray", (NoStart(), X.numpy(), S)),
    "no steps": Mistake(InputError, r"T = 0", (NoStart(), X[:0], S)),
    "two T": Mistake(InputError, r"\(5, 2, 3\).*\(4, 2, 3\)", (NoStart(), (X, X[1:]), S)),
    "two B": Mistake(InputError, r"\(5, 2, 3\).*\(5, 3, 3\)", (NoStart(), (X, zeros(5, 3, 3)), S)),
    "x too wide": Mistake(InputError, r"x \(2, 6\).*got \(\d, 2, 6\)", (Plain(), torch.randn(5, B, 6)), line=U),
    "x too wide, joined": Mistake(
        InputError, r"a value \(2, 10\).*got \(\d, 2, 6\)", (Joined(), torch.randn(5, B, 6)), line="h = self.V("
    ),
    "x too wide, pointwise": Mistake(
        InputError, r"mul\(weight \(4,\) float32, x \(2, 6\)", (Pointwise(), torch.randn(5, B, 6)), line="h = self.a"
    ),
    "x too wide, torch.nn": Mistake(InputError, r"got \(\d, 2, 6\)", (nn.GRUCell(D, H), torch.randn(5, B, 6))),
    "x too deep": Mistake(InputError, r"got \(\d, 2, 3, 1\)", (Plain(), X[..., None]), line=U),
    "integers": Mistake(InputError, r"x \(2, 3\) int64.*whole.*Embedding.*\.float\(\)", (Plain(), X.long()), line=U),
    "float64": Mistake(InputError, r"x \(2, 3\) float64.*float32.*cell.*float64", (Plain(), X.double()), line=U),
    "float64, joined": Mistake(InputError, r"xs.*float32.*cell.*float64", (Joined(), X.double()), line="h = self.V("),
    "float64, pointwise": Mistake(
        InputError, r"xs are torch.float64 and the parameters", (Pointwise(), torch.randn(5, B, H).double()), line=STEP
    ),
    "x elsewhere": Mistake(InputError, r"on cpu, and on meta is xs", (Plain(), X.to("meta")), line=W),
    "no symbols": Mistake(
        InputError, r"embedding\(x.*\.long\(\)", (Symbols(), X[..., 0]), line="return super().forward"
    ),
    "an unknown symbol": Mistake(
        InputError, r"from 1 to 9", (Symbols(), torch.tensor([[9, 1]] * 5)), line="return super().forward"
    ),
    # lengths
    "too few lengths": Mistake(InputError, r"2 integers.*\(1,\)", (NoStart(), X, S), {"lengths": [3]}),
    "one length": Mistake(InputError, r"2 integers.*\(\)", (NoStart(), X, S), {"lengths": 3}),
    "a matrix of lengths": Mistake(
        InputError, r"integers.*\(2, 1\)", (NoStart(), X, S), {"lengths": zeros(2, 1).int()}
    ),
    "lengths with a fraction": Mistake(InputError, r"integers.*float", (NoStart(), X, S), {"lengths": [3.0, 2.0]}),
    "complex lengths": Mistake(InputError, r"integers.*complex", (NoStart(), X, S), {"lengths": [3j, 2j]}),
    "lengths as a mask": Mistake(InputError, r"integers.*bool", (NoStart(), X, S), {"lengths": zeros(2).bool()}),
    "lengths as words": Mistake(InputError, r"integers.*'a'", (NoStart(), X, S), {"lengths": ["a", "b"]}),
    "lengths of nothing": Mistake(InputError, r"integers.*None", (NoStart(), X, S), {"lengths": [None, 1]}),
    "lengths beyond numbers": Mistake(InputError, r"integers", (NoStart(), X, S), {"lengths": [2**70, 1]}),
    "lengths without data": Mistake(InputError, r"meta", (NoStart(), X, S), {"lengths": zeros(2, device="meta").int()}),
    "lengths beyond T": Mistake(InputError, r"T = \d.*7", (NoStart(), X, S), {"lengths": [7, 2]}),
    "negative lengths": Mistake(InputError, r"0.*-1", (NoStart(), X, S), {"lengths": [-1, 1]}),
    # options
    "an unknown backend": Mistake(
        OptionError, r"'interpet': did you mean 'interpret'\? Known: ", (NoStart(), X, S), {"backend": "interpet"}
    ),
    "a backend like none": Mistake(OptionError, r"'cuda'\. Known: auto", (NoStart(), X, S), {"backend": "cuda"}),
    "a backend that is no name": Mistake(OptionError, r"backend", (NoStart(), X, S), {"backend": 3}),
    "remat of zero": Mistake(OptionError, r"remat.*0", (NoStart(), X, S), {"remat": 0}),
    "remat below zero": Mistake(OptionError, r"remat.*-2", (NoStart(), X, S), {"remat": -2}),
    "remat as a word": Mistake(OptionError, r"remat.*'sqrt'", (NoStart(), X, S), {"remat": "sqrt"}),
    "remat as a fraction": Mistake(OptionError, r"remat.*2.5", (NoStart(), X, S), {"remat": 2.5}),
    "remat as a truth value": Mistake(OptionError, r"remat.*True", (NoStart(), X, S), {"remat": True}),
}


LASTING = {"lengths beyond T", "no steps", "two T", "empty", "a list of numbers", "an array", "two B", "no batch"}
CASES = [
    pytest.param(mistake, backend, steps, id=f"{name}, {backend}, T = {steps}")
    for name, mistake in MISTAKES.items()
    for backend, steps in (*((backend, 5) for backend in BACKENDS), ("auto", 1))  # one step is the step itself
    if steps == 5 or not (name in LASTING or "lengths" in mistake.options)
]


@pytest.mark.parametrize(("mistake", "backend", "steps"), CASES)
def test_mistakes(mistake: Mistake, backend: str, steps: int) -> None:
    cell, xs, *state = mistake.given
    with pytest.raises(UsageError, match=mistake.pattern) as caught:
        elman.scan(cell, xs[:1] if steps == 1 else xs, *state, **{"backend": backend, **mistake.options})
    assert caught.type is mistake.error
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 600
    assert message.endswith(".")
    named = [linecache.getline(__file__, int(n)) for n in re.findall(re.escape(__file__) + r":(\d+)", message)]
    assert bool(named) == (mistake.line is not None)
    assert mistake.line is None or any(mistake.line in source for source in named)


# What the user's own code raises comes through as it is.


def raises(x: Tensor, h: Tensor) -> Any:
    raise RuntimeError("mat1 and mat2: my own words")


def asserts(x: Tensor, h: Tensor) -> Any:
    assert x.shape[-1] == 7, "seven features"


def misspells(x: Tensor, h: Tensor) -> Any:
    return x.tanhh(), h


def looks_up(x: Tensor, h: Tensor) -> Any:
    return {"a": x}["b"], h


def divides(x: Tensor, h: Tensor) -> Any:
    return x * (1 // 0), h


def multiplies_its_own(x: Tensor, h: Tensor) -> Any:
    y = x @ zeros(D, 2) + h @ zeros(H, 2)
    return y @ y, h


def multiplies_with_its_own(x: Tensor, h: Tensor) -> Any:
    return x @ zeros(7, 2), h


def calls_wrongly(x: Tensor, h: Tensor) -> Any:
    return math.sqrt(2, 3), h


def unpacks_its_own(x: Tensor, h: Tensor) -> Any:
    a, b = [x, x, x]
    return a + b, h


OWN: dict[str, tuple[type[Exception], str, Callable[[Tensor, Tensor], Any]]] = {
    "raised": (RuntimeError, r"^mat1 and mat2: my own words$", raises),
    "asserted": (AssertionError, r"seven features", asserts),
    "misspelt": (AttributeError, r"tanhh", misspells),
    "not there": (KeyError, r"b", looks_up),
    "divided": (ZeroDivisionError, r"zero", divides),
    "two values of the step": (RuntimeError, r"3x2 and 3x2", multiplies_its_own),
    "a tensor of the step": (RuntimeError, r"3x3 and 7x2", multiplies_with_its_own),
    "a wrong call": (TypeError, r"sqrt", calls_wrongly),
    "unpacked": (ValueError, r"unpack", unpacks_its_own),
}


@every_backend
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("name", OWN)
def test_what_the_users_step_raises_goes_through(name: str, steps: int, backend: str) -> None:
    error, pattern, step = OWN[name]
    with pytest.raises(error, match=pattern) as caught:
        elman.scan(Returns(step), torch.randn(steps, 3, D), backend=backend)
    assert caught.type is error
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert not hasattr(caught.value, "__notes__")
    stack = [entry for entry in caught.traceback if "torch" not in entry.path.parts]
    assert stack[-1].name == step.__name__
    assert not any("compiler" in entry.path.parts and entry.path.name != "reference.py" for entry in stack)


@every_backend
def test_what_initial_state_raises_goes_through(backend: str) -> None:
    def start(batch: int) -> Tensor:
        return len(batch)  # type: ignore[arg-type]  # a mistake inside, of the same class as a wrong call

    with pytest.raises(TypeError, match=r"^object of type 'int' has no len\(\)$"):
        elman.scan(starts(start), X, backend=backend)


@every_backend
def test_the_error_of_pytorch_is_the_cause(backend: str) -> None:
    with pytest.raises(InputError) as caught:
        elman.scan(Plain(), torch.randn(5, B, 6), backend=backend)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert "2x6 and 3x4" in str(caught.value.__cause__)
    assert caught.value.__context__ is caught.value.__cause__
    assert caught.value.__cause__.__context__ is None


def test_a_mistake_of_a_later_step_is_named_as_well() -> None:
    xs = torch.tensor([[1, 2], [3, 4], [0, 6]])
    for backend in BACKENDS:
        with pytest.raises(InputError, match=r"embedding.*from 0 to 6"):
            elman.scan(Symbols(), xs, backend=backend)


def test_features_that_broadcast_against_the_batch_are_warned_of() -> None:
    """Nothing fails, so nothing is sure: the warning that the step is not compiled says what may be the cause."""
    with pytest.warns(UnfoldWarning, match=r"\(T, B\); \(T, D\).*unsqueeze\(1\)"):
        elman.scan(Pointwise(), torch.randn(5, H))


@every_backend
def test_numbers_without_features_are_no_mistake(backend: str) -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
            s = s + self.scale(x.unsqueeze(-1)).squeeze(-1)
            return s, s

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(1, 1)

    cell, xs = Sum(), torch.randn(4, 3)
    ys, _ = elman.scan(cell, xs, zeros(3), backend=backend)
    torch.testing.assert_close(ys[-1], cell.scale(xs.unsqueeze(-1)).squeeze(-1).sum(0))


@every_backend
def test_a_wide_state_of_a_narrow_cell_is_no_mistake(backend: str) -> None:
    """A state may be kept in float64 where the step allows it."""
    cell = starts(lambda b: zeros(b, H, dtype=torch.float64), Pointwise)
    ys, final = elman.scan(cell, torch.randn(5, B, H), backend=backend)
    assert ys.dtype == final.dtype == torch.float64


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (elman.LSTM(3, 4), "LSTM is a layer, not one step of a recurrence. Use LSTMCell"),
        (nn.RNN(3, 4), "RNN is a layer, not one step of a recurrence. Use ElmanCell"),
        (nn.Linear(3, 4), "Linear is no step of a recurrence: it has no state. Use DenseCell"),
    ],
)
def test_a_layer_is_no_cell(layer: nn.Module, message: str) -> None:
    with pytest.raises(CellError, match=message):
        elman.scan(layer, torch.zeros(2, 2, 3))
