"""What the tests of runs share: a small text, a small run, the command in this process, equality of runs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from elman.checkpoint import RunDirectory, load_tensors
from elman.cli import main

WORDS = ("the", "sea", "and", "a", "ship", "went", "over", "under", "long", "night,", "day.\n", "old", "rope")
TINY = ["--hidden", "8", "--batch", "2", "--window", "8", "--threads", "1", "--dropout", "0.1"]

OWN_CELL = """
import torch

class Mine(torch.nn.Module):
    def __init__(self, input_size, hidden_size, gain=1.0):
        super().__init__()
        self.mix = torch.nn.Linear(input_size + hidden_size, hidden_size)
        self.gain = gain

    def initial_state(self, batch, *, device, dtype):
        return torch.zeros(batch, self.mix.out_features, device=device, dtype=dtype)

    def forward(self, x, h):
        h = torch.tanh(self.gain * self.mix(torch.cat([x, h], -1)))
        return h, h
"""
"""The file of a user's own cell, with one option."""


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


class Command:
    """``elman`` with these arguments, in this process: exit code, stdout and stderr."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Outcome:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = self._capsys.readouterr()
        return Outcome(int(ended.value.code or 0), out, err)


def write_text(path: Path, words: int = 700) -> Path:
    draw = random.Random(1)
    path.write_text(" ".join(draw.choice(WORDS) for _ in range(words)), encoding="utf-8")
    return path


def content(path: Path) -> dict[str, Any]:
    """Everything a run has produced, as comparable bytes and facts; what depends on the clock is left out."""
    run = RunDirectory(path)
    found: dict[str, Any] = {"model": run.model_file.read_bytes()}
    for name, file in (("last", run.last_file), ("best", run.best_file)):
        tensors, facts = load_tensors(file)
        facts["progress"].pop("seconds")
        facts.pop("metrics_bytes")
        found[name] = facts
        found[f"{name} tensors"] = {
            key: (str(tensor.dtype), tuple(tensor.shape), tensor.numpy().tobytes()) for key, tensor in tensors.items()
        }
    found["metrics"] = [
        {key: value for key, value in json.loads(line).items() if key not in ("seconds", "tokens_per_second")}
        for line in run.metrics_file.read_text(encoding="utf-8").splitlines()
    ]
    result = json.loads(run.result_file.read_text(encoding="utf-8"))
    found["result"] = {key: value for key, value in result.items() if key not in ("run", "seconds")}
    return found


def assert_same(first: Path, second: Path) -> None:
    one, other = content(first), content(second)
    assert one.keys() == other.keys()
    for key in one:
        assert one[key] == other[key], key
