"""What every network that is no single step promises, checked for each row of its table, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from comparing import assert_reloads, assert_same, differentiable, everything, floats, part, poisoned
from contracts.networks import NETWORKS, Network
from elman.unfold import unfold

STEPS, BATCH = 6, 4
ROWS = [pytest.param(row, id=name) for name, row in NETWORKS.items()]
table = pytest.mark.parametrize("row", ROWS)


def made(row: Network) -> nn.Module:
    torch.manual_seed(11)
    return row.make().double().eval()


def given(row: Network, network: nn.Module, steps: int = STEPS, batch: int = BATCH) -> dict[str, Any]:
    """xs, constants and a random first state, whose floating leaves want their gradients."""
    torch.manual_seed(12)
    xs, constants = row.example(row.steps or steps, batch)
    with torch.no_grad():
        _, state = row.run(network, xs, None, constants=constants)
    state = pytree.tree_map_only(Tensor, torch.randn_like, state)
    return {"xs": differentiable(xs), "state": differentiable(state), "constants": differentiable(constants)}


@table
@pytest.mark.parametrize(("steps", "batch"), [(STEPS, BATCH), (1, 1), (STEPS, 1)])
def test_equals_every_sequence_alone_by_hand(row: Network, steps: int, batch: int) -> None:
    """Outputs, final states and every gradient: of a batch at once, and of each sequence alone, step by step."""
    network = made(row)
    sources = given(row, network, steps, batch)
    expected = everything(row.by_hand, network, sources)
    for backend in ("reference", "interpret", "llvm"):
        assert_same(everything(row.run, network, sources, backend=backend), expected)
    if steps > 1:
        assert_same(everything(row.run, network, sources, remat=2), expected)


@pytest.mark.parametrize("row", [row for row in ROWS if row.values[0].lengths])
@pytest.mark.parametrize("backend", ["reference", "interpret", "llvm"])
def test_padding_changes_nothing(row: Network, backend: str) -> None:
    network = made(row)
    sources = given(row, network)
    lengths = torch.tensor([STEPS, 1, 0, STEPS - 2])
    expected = everything(row.by_hand, network, sources, lengths=lengths)
    sources["xs"] = poisoned(sources["xs"], lengths)
    assert_same(everything(row.run, network, sources, lengths=lengths, backend=backend), expected)


@pytest.mark.parametrize("row", [row for row in ROWS if row.values[0].joined])
@pytest.mark.parametrize("ends", [(2, 3, STEPS), (*range(1, STEPS + 1),)], ids=["chunked", "streamed"])
def test_in_pieces_equals_whole(row: Network, ends: tuple[int, ...]) -> None:
    """Values and every gradient, through the states that are handed on."""
    network = made(row)
    sources = given(row, network)

    def in_pieces(network: nn.Module, xs: Any, state: Any, *, constants: Any) -> tuple[Any, Any]:
        ys = []
        for start, end in zip((0, *ends), ends, strict=False):
            y, state = row.run(network, part(xs, slice(start, end)), state, constants=constants)
            ys.append(y)
        return row.joined(ys), state

    assert_same(everything(in_pieces, network, sources), everything(row.run, network, sources))


@pytest.mark.parametrize("row", [row for row in ROWS if not row.values[0].joined and not row.values[0].steps])
def test_what_cannot_be_read_in_pieces_looks_ahead(row: Network) -> None:
    network = made(row)
    sources = given(row, network)
    ys, _ = row.run(network, sources["xs"], sources["state"], constants=sources["constants"])
    (gradient,) = torch.autograd.grad(ys[0].sum(), floats(sources["xs"])[0])
    assert gradient[1].any()


@pytest.mark.parametrize("row", [row for row in ROWS if "of a module" not in row.id])
def test_every_scan_is_unfolded_as_asked(row: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    network = made(row)
    xs, constants = row.example(row.steps or STEPS, BATCH)
    asked = []

    def watched(*args: Any, **options: Any) -> Any:
        asked.append((options["backend"], options["remat"]))
        return unfold(*args, **options)

    monkeypatch.setattr("elman.unfold.unfold", watched)
    row.run(network, xs, None, constants=constants, backend="reference", remat=3)
    assert set(asked) == {("reference", 3)}


@table
def test_saved_equals_loaded(row: Network) -> None:
    network = made(row)
    sources = given(row, network)
    xs, state, constants = sources.values()
    assert_reloads(network, row.make, lambda network: row.run(network, xs, state, constants=constants))
