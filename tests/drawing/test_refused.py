"""What cannot be drawn, or not be saved, says why and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import elman
from elman.cells import ElmanCell
from elman.drawing import draw
from elman.errors import InputError, OptionError

from .nets import D, H, UserNet, sequence

LAYERS: list[tuple[nn.Module, str]] = [
    (nn.LSTM(D, H), "LSTM is a layer that unfolds its cells inside one operation.* draw(LSTMCell(3, 4))."),
    (elman.LSTM(D, H), "draw(LSTMCell(3, 4))."),
    (elman.GRU(D, H, num_layers=2), "draw(Stack([GRUCell(3, 4), GRUCell(4, 4)]))."),
    (elman.RNN(D, H, num_layers=5), "draw(Stack([ElmanCell(3, 4), ElmanCell(4, 4), ElmanCell(4, 4), …]))."),
    (nn.LSTM(D, H, 2, proj_size=2), "draw(Stack([LSTMCell(3, 4), LSTMCell(2, 4)]))."),
    (nn.GRU(D, H, bidirectional=True), "draw(Bidirectional(GRUCell(3, 4), GRUCell(3, 4)))."),
    (nn.RNN(D, H, 2, bidirectional=True), "draw(Bidirectional(ElmanCell(3, 4), ElmanCell(3, 4))) for the first layer."),
    (nn.Sequential(nn.Linear(D, D), elman.RNN(D, H)), "RNN, the layer '1' of Sequential, unfolds.* draw(ElmanCell("),
]  # fmt: skip


@pytest.mark.parametrize(("network", "says"), LAYERS)
@pytest.mark.parametrize("steps", [0, 3])
def test_layers_are_no_cells(network: nn.Module, says: str, steps: int) -> None:
    with pytest.raises(InputError) as caught:
        draw(network, sequence(), unroll=steps)
    place = -1
    for part in says.split(".*"):
        place = str(caught.value).index(part, place + 1)


@pytest.mark.parametrize("xs", [3, (sequence(), "x"), [1.0]])
def test_examples_are_tensors(xs: object) -> None:
    with pytest.raises(InputError, match=r"what UserNet reads, tensors \(T, B, …\); got .*unroll="):
        draw(UserNet(), xs)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"there is no folder '.*missing' to save a picture in; make it first"):
        draw(ElmanCell(D, H), path=tmp_path / "missing" / "net.svg")
    assert not list(tmp_path.iterdir())


def test_names_of_files_in_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw(ElmanCell(D, H), torch.zeros(1, 1, D), path="net.svg")
    assert Path("net.svg").read_text(encoding="utf-8").startswith("<?xml")
