"""Pictures: well-formed, the same bytes every time, readable when big; and what is refused."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor, nn
from typer.testing import CliRunner

import elman
from elman.cells import ElmanCell, GRUCell, LSTMCell
from elman.cli.draw import draw as command
from elman.combinators import Residual, Stack
from elman.combinators.attend import Attend
from elman.combinators.conditioned import Conditioned
from elman.drawing import Diagram, draw, render
from elman.drawing.collapse import MOST_ROWS, MOST_STEPS, collapsed
from elman.drawing.layout import place, ranks
from elman.errors import CellError, DataDependentError, InputError, OptionError, UnfoldError
from elman.spec import parse_spec

from .nets import CELLS, NETWORKS, Branching, D, H, Tree, UserNet, sequence


def picture_of(name: str, steps: int, loss: bool = False):  # type: ignore[no-untyped-def]
    make, options = CELLS[name] if name in CELLS else (NETWORKS[name], {})
    return draw(make(), sequence(), unroll=steps, loss=loss, **options)


@pytest.mark.parametrize("name", ["user", "bidirectional", "autoencoder", "conditioned"])
@pytest.mark.parametrize("steps", [0, 3])
def test_svg_is_well_formed_and_always_the_same(name: str, steps: int) -> None:
    text = picture_of(name, steps, loss=True).svg()
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    assert text == picture_of(name, steps, loss=True).svg()
    assert not re.search(r"\d{4}-\d\d-\d\d", text)


def test_files(tmp_path: Path) -> None:
    picture = draw(UserNet(), path=tmp_path / "net.svg")
    picture.save(tmp_path / "net.PNG")
    assert (tmp_path / "net.svg").read_text(encoding="utf-8") == picture.svg() == picture._repr_svg_()
    assert (tmp_path / "net.PNG").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.png() == picture.png()
    assert repr(picture) == "<circuit of UserNet: 3 nodes, 3 edges>"


@pytest.mark.parametrize("name", [*CELLS, *NETWORKS])
@pytest.mark.parametrize("steps", [0, 4])
def test_no_two_nodes_at_one_place(name: str, steps: int) -> None:
    for detail in (False, True):
        make, options = CELLS[name] if name in CELLS else (NETWORKS[name], {})
        diagram = draw(make(), sequence(), unroll=steps, detail=detail and not steps, loss=True, **options).diagram
        spots = sorted(place(collapsed(diagram.with_delay_nodes())).values())
        near = [(a, b) for i, a in enumerate(spots) for b in spots[:i] if abs(a[0] - b[0]) + abs(a[1] - b[1]) < 0.5]
        assert not near


def test_time_goes_to_the_right_and_values_upward() -> None:
    diagram = draw(UserNet(), unroll=3, loss=True).diagram
    places = place(diagram)
    assert places["h(1)"][0] < places["h(2)"][0] < places["h(3)"][0]
    heights = [places[f"{letter}(2)"][1] for letter in ("x", "h", "o", "L", "y")]
    assert heights == sorted(heights)


def test_the_decoder_stands_after_the_encoder() -> None:
    places = place(draw(NETWORKS["autoencoder"](), sequence(), unroll=3).diagram)
    assert places["h1(3)"][0] < places["h2(1)"][0]


def test_many_steps_become_few() -> None:
    diagram = draw(UserNet(), unroll=40).diagram
    assert len([n for n in diagram.nodes if n.kind == "state"]) == 40
    small = collapsed(diagram)
    states = [n for n in small.nodes if n.kind == "state"]
    assert len(states) < MOST_STEPS
    assert states[0].time == 1
    assert states[-1].time == 40
    assert [(e.source, e.target) for e in small.edges if "more" in e.source + e.target] == [
        ("h(4)", "h(more)"),
        ("h(more)", "h(39)"),
    ]


def test_many_layers_become_few() -> None:
    deep = Stack([GRUCell(D, D) for _ in range(30)])
    diagram = draw(deep).diagram
    assert len(diagram.nodes) == 31
    assert diagram.loops == 30
    small = collapsed(diagram)
    assert max(ranks(small).values()) < MOST_ROWS
    assert {n.label for n in small.nodes} >= {"$x$", "$h_{1}$", "$h_{30}$", r"$\vdots$"}


@pytest.mark.parametrize(
    ("layers", "make"),
    [(6, lambda: Residual(GRUCell(D, D))), (8, lambda: Residual(GRUCell(D, D))), (30, lambda: GRUCell(D, D))],
)
def test_many_steps_of_many_layers_become_few(layers: int, make: Callable[[], nn.Module]) -> None:
    small = collapsed(draw(Stack([make() for _ in range(layers)]), unroll=12).diagram)
    places = place(small)
    columns = {node.time: places[node.name][0] for node in small.nodes if node.kind == "input"}
    assert sorted(t for t in columns if t) == [1, 2, 3, 4, 11, 12]
    dots = [node for node in small.nodes if node.letter == r"$\vdots$"]
    assert {node.time: places[node.name][0] for node in dots} == columns
    assert max(x for x, _ in places.values()) == columns[12]


def test_a_shared_delay_is_one_square() -> None:
    diagram = draw(LSTMCell(D, H), detail=True).diagram.with_delay_nodes()
    squares = [node for node in diagram.nodes if node.kind == "delay"]
    assert len(squares) == 1
    assert {e.source for e in diagram.into(squares[0].name)} == {"h"}
    assert len(diagram.out_of(squares[0].name)) == 4


@pytest.mark.parametrize("steps", [-1, 65, True, 2.0, "3"])
def test_impossible_steps(steps: object) -> None:
    with pytest.raises(OptionError, match="unroll must be a number of steps"):
        draw(UserNet(), unroll=steps)  # type: ignore[arg-type]


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"\.svg or \.png; got .*net\.pdf"):
        draw(UserNet(), path=tmp_path / "net.pdf")


def test_what_is_no_network() -> None:
    with pytest.raises(CellError, match="the class ElmanCell"):
        draw(ElmanCell)  # type: ignore[arg-type]


def test_a_network_that_does_not_say_what_it_reads() -> None:
    with pytest.raises(InputError, match="Tree does not say its input_size; give draw an example"):
        draw(Tree())


def test_wrong_names() -> None:
    with pytest.raises(InputError, match="names must name each of the 1 sequences"):
        draw(UserNet(), sequence(), names=["x", "y"])


def test_wrong_width() -> None:
    with pytest.raises(InputError, match="7"):
        draw(ElmanCell(D, H), sequence(width=7))


def test_a_cell_without_a_batch() -> None:
    with pytest.raises(InputError, match=r"xs must be \(T, B, …\)"):
        draw(UserNet(), torch.zeros(5))


def test_decisions_by_value() -> None:
    with pytest.raises(DataDependentError, match="takes a decision from the value"):
        draw(Branching())


def test_nothing_to_draw() -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x)

    with pytest.raises(InputError, match="nothing that comes out depends on what goes in"):
        draw(Silent(), sequence())


def test_what_cannot_be_compiled_is_drawn_without_marks() -> None:
    class Mixing(UserNet):
        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x - x.mean(0), h)

    with pytest.raises(UnfoldError):
        elman.scan(Mixing(), sequence(), backend="interpret")
    diagram: Diagram = draw(Mixing()).diagram
    assert diagram.loops is None
    assert "MixedRowsError" in diagram.note
    assert {edge.loop for edge in diagram.edges} == {None}


def test_long_names_stay_inside() -> None:
    """The words of a name, as matplotlib measures them, against the shape around them."""
    for names in (["source"], ["temperature"], ["extraordinarily"]):
        for steps in (0, 12):
            options: dict[str, Any] = {"constants": {"speaker": torch.zeros(2, 2)}, "names": names}
            diagram = draw(
                Conditioned(GRUCell(D + 2, H), 2, key="speaker"), sequence(), unroll=steps, **options
            ).diagram
            for words, shape in shapes_and_words(diagram):
                assert shape.x0 <= words.x0 < words.x1 <= shape.x1, names


def shapes_and_words(diagram: Diagram) -> list[tuple[Any, Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_aspect("equal")
    pen = render._Pen(axes, collapsed(diagram))
    pen.draw()
    box = pen.box
    figure.set_size_inches((box[1] - box[0]) * render._INCHES, (box[3] - box[2]) * render._INCHES)
    figure.canvas.draw()
    labels = {t.get_text(): t.get_window_extent() for t in axes.texts}
    at = {node.label: axes.transData.transform(pen.places[node.name]) for node in pen.nodes.values()}
    found = [(labels[n.label], n.label) for n in pen.nodes.values() if n.kind in ("input", "constant", "state")]
    around = [p.get_window_extent() for p in axes.patches]
    return [
        (words, min((s for s in around if s.contains(*at[label])), key=lambda s: s.width)) for words, label in found
    ]


def test_the_legend_counts_the_loops_that_are_seen() -> None:
    """A clockwork has a loop for its counter besides, which no node shows."""
    clock = parse_spec("clockwork(elman(4), [1, 2])")
    assert legend(draw(clock.make(D, H)).diagram) == ["segment: all steps at once", "loop: step after step"]
    both = legend(draw(Stack([clock.make(D, H), clock.make(H, H)])).diagram)
    assert both[1:] == ["loop 1: step after step", "loop 2: step after step"]


def legend(diagram: Diagram) -> list[str]:
    from matplotlib.figure import Figure

    axes = Figure().add_axes((0, 0, 1, 1))
    render._Pen(axes, diagram).draw()
    return [text.get_text() for text in axes.texts if "step after" in text.get_text() or "segment" in text.get_text()]


def test_the_command_makes_up_constants(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, [str(tmp_path / "net.svg"), "--cell", "attend(gru(16), 6)", "--hidden", "8"])
    assert done.exit_code == 0, done.output
    cell = Attend(GRUCell(14, 16), 6)
    assert (tmp_path / "net.svg").read_text(encoding="utf-8") == draw(cell, constants=torch.zeros(1, 8, 6)).svg()


def test_the_command(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, [str(tmp_path / "net.svg"), "--cell", "gru", "--unroll", "2", "--loss"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "net.svg").read_text(encoding="utf-8") == draw(GRUCell(256, 256), unroll=2, loss=True).svg()
