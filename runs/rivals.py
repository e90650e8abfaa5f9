"""One language model with rival recurrent layers: ours at each precision, and PyTorch's. Trained alike, timed by turns.

Only the layers differ between the rivals: embedding, softmax, order of the text and first weights are the same.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from kept import RESULTS, keep, options
from torch import Tensor, nn
from torch.nn import functional as F

import elman

__all__ = ["DATA", "RIVALS", "TIMES", "Task", "run"]

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

RIVALS = {
    "float32": (elman.LSTM, "highest", False),
    "high": (elman.LSTM, "high", False),
    "medium": (elman.LSTM, "medium", False),
    "bfloat16": (elman.LSTM, "highest", True),
    "torch.nn.LSTM": (nn.LSTM, "highest", False),
    "torch.nn.LSTM, bfloat16": (nn.LSTM, "highest", True),
}
"""Layer, precision of products in float32, and whether the layers run under autocast to bfloat16."""

TIMES = "seconds of an epoch"


@dataclass(frozen=True)
class Task:
    """What is learned and how: two layers of ``hidden`` units read ``streams`` of a text, ``steps`` at a time.

    ``dropout``: of what the layers are given, between them, and of what they give. ``rate``: by how many epochs are
    over. ``scale``: of the loss per symbol, before its gradient is cut at norm ``clip``. ``turn``: windows between two
    looks at the clock where rivals take turns.
    """

    name: str
    hidden: int
    streams: int
    steps: int
    epochs: int
    first: float
    dropout: tuple[float, float, float]
    optimiser: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    rate: Callable[[float], float]
    clip: float
    scale: float = 1.0
    turn: int = 40
    turns: int = 7
    seed: int = 1


class Model(nn.Module):
    """Embedding, two recurrent layers, softmax over the symbols."""

    def __init__(self, kind: type[nn.LSTM], symbols: int, task: Task, autocast: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, task.hidden)
        self.layers = kind(task.hidden, task.hidden, 2, dropout=task.dropout[1])
        self.readout = nn.Linear(task.hidden, symbols)
        self.dropout, self.autocast = task.dropout, autocast
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -task.first, task.first)

    def forward(self, symbols: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x = F.dropout(self.embedding(symbols), self.dropout[0], self.training)
        narrow: AbstractContextManager[object] = (
            torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext()
        )
        with narrow:
            h, state = self.layers(x, state)
        return self.readout(F.dropout(h.float(), self.dropout[2], self.training)), state


def windows(ids: Tensor, task: Task) -> Iterator[tuple[Tensor, Tensor]]:
    """(T, B) symbols and the ones after them, stream after stream from left to right."""
    length = (len(ids) - 1) // task.streams
    xs, ys = (ids[i : i + length * task.streams].view(task.streams, length).t() for i in (0, 1))
    for first in range(0, length, task.steps):
        yield xs[first : first + task.steps], ys[first : first + task.steps]


def loss_of(model: Model, ids: Tensor, task: Task) -> float:
    """Nats per symbol, read in as many streams as in training."""
    total, count, state = 0.0, 0, None
    model.eval()
    with torch.no_grad():
        for xs, ys in windows(ids, task):
            logits, state = model(xs, state)
            total += float(F.cross_entropy(logits.flatten(0, 1), ys.flatten(), reduction="sum"))
            count += ys.numel()
    return total / count


class Rival:
    """A model and how it is trained."""

    def __init__(self, name: str, symbols: int, task: Task) -> None:
        kind, self.precision, autocast = RIVALS[name]
        torch.manual_seed(task.seed)
        self.task, self.model = task, Model(kind, symbols, task, autocast)
        self.optimiser = task.optimiser(self.model.parameters())

    def steps(self, text: Iterable[tuple[Tensor, Tensor]], epoch: int = 0, count: int = 1) -> None:
        """Train on windows that follow one another, ``count`` of which are an epoch."""
        torch.set_float32_matmul_precision(self.precision)
        model, state = self.model.train(), None
        for number, (xs, ys) in enumerate(text):
            for group in self.optimiser.param_groups:
                group["lr"] = self.task.rate(epoch + number / count)
            logits, state = model(xs, state)
            state = (state[0].detach(), state[1].detach())
            loss = F.cross_entropy(logits.flatten(0, 1), ys.flatten())
            model.zero_grad(set_to_none=True)
            (loss * self.task.scale).backward()
            nn.utils.clip_grad_norm_(model.parameters(), self.task.clip)
            self.optimiser.step()


def trained(name: str, parts: dict[str, Tensor], task: Task) -> dict[str, Any]:
    """The losses of a rival on the other parts, in nats per symbol, and of words the perplexity of the test."""
    rival = Rival(name, symbols_of(parts), task)
    count = sum(1 for _ in windows(parts["train"], task))
    begun = time.perf_counter()
    valid = loss_of(rival.model, parts["valid"], task)
    for epoch in range(task.epochs):
        rival.steps(windows(parts["train"], task), epoch, count)
        valid = loss_of(rival.model, parts["valid"], task)
        spent = time.perf_counter() - begun
        print(f"{name:<24} epoch {epoch + 1:>2}  {spent:6.0f} s  valid {valid:.4f} {math.exp(valid):8.2f}", flush=True)
    found = {"valid": round(valid, 4)}
    if "test" in parts:
        test = loss_of(rival.model, parts["test"], task)
        found |= {"test": round(test, 4), "test perplexity": round(math.exp(test), 2)}
    return found


def epoch_seconds(names: Iterable[str], parts: dict[str, Tensor], task: Task) -> dict[str, float]:
    """The time of an epoch of each rival, from windows in which they take turns; the least of the turns."""
    text = list(windows(parts["train"], task))
    some = text[: task.turn]
    rivals = {name: Rival(name, symbols_of(parts), task) for name in names}
    least = dict.fromkeys(rivals, math.inf)
    for turn in range(task.turns + 1):
        for name, rival in rivals.items():
            begun = time.perf_counter()
            rival.steps(some)
            if turn:  # the first one compiles
                least[name] = min(least[name], time.perf_counter() - begun)
    return {name: round(seconds * len(text) / len(some), 1) for name, seconds in least.items()}


def symbols_of(parts: dict[str, Tensor]) -> int:
    """How many there are."""
    return 1 + max(int(ids.max()) for ids in parts.values())


def run(doc: str | None, task: Task, read: Callable[[Path], dict[str, Tensor]], text: Path) -> None:
    """The command: train the rivals, look at the clock, keep what came out."""
    parser = options(doc, RESULTS / f"{task.name}.json", "one epoch of few made-up symbols")
    parser.add_argument("--text", type=Path, default=text, help="where the text is")
    parser.add_argument(
        "--only", choices=list(RIVALS), action="append", help="may be repeated; what is kept of others stays"
    )
    parser.add_argument(
        "--epochs", type=int, default=task.epochs, help="another number keeps nothing; 0 measures the time alone"
    )
    parser.add_argument("--seed", type=int, default=task.seed, help="of the first weights; another one keeps nothing")
    given = parser.parse_args()
    parts = _made_up() if given.quick else read(given.text)
    names = given.only or list(RIVALS)
    epochs = min(given.epochs, 1) if given.quick else given.epochs
    found = _found(names, parts, replace(task, epochs=epochs, seed=given.seed), given)
    print(json.dumps(found, indent=1))
    if not given.quick and epochs in (0, task.epochs) and given.seed == task.seed:
        before = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
        keep(given.out, {**{name: before[name] for name in (*RIVALS, TIMES) if name in before}, **found})


def _found(names: list[str], parts: dict[str, Tensor], task: Task, given: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {name: trained(name, parts, task) for name in names} if task.epochs else {}
    if not (given.quick or (given.only and task.epochs)):
        found[TIMES] = {"threads": torch.get_num_threads(), **epoch_seconds(names, parts, task)}
    return found


def _made_up() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {part: torch.randint(50, (900,)) for part in ("train", "valid", "test")}
