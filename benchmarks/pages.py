"""The tables of README.md and the picture docs/pictures/throughput.svg, made from benchmarks/results/kernels.json.

    python benchmarks/pages.py

A table stands below its comment, <!-- kernels: NAME -->.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from elman.bench.cells import CELLS
from elman.bench.suite import MAIN, NARROW, SHAPES, written
from elman.bench.targets import ratios

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "kernels.json"
PAGES = (ROOT / "README.md",)
PICTURE = ROOT / "docs" / "pictures" / "throughput.svg"

PLACE = re.compile(r"(<!-- kernels: (\w+) -->)\n+(?:\|.*\n)*\n*")
RIVALS = {
    "elman": "elman",
    "interpret": "`interpret`",
    "torch.nn": "torch.nn",
    "eager": "loop by hand",
    "compiled step": "torch.compile",
    "JAX": "JAX",
}
"""The ways to unfold a cell, and how they are called in tables."""

MODES = ("forward", "training")
Table = Iterable[Iterable[object]]


def threads(result: Any) -> int:
    """Of the rows that are shown: the most."""
    return max(row["threads"] for row in result["rows"])


def main_rows(result: Any) -> dict[str, Any]:
    """Milliseconds at MAIN, by cell: ways, modes, minimum and median."""
    most = threads(result)
    at_main = [
        row
        for row in result["rows"]
        if row["shape"] == list(MAIN) and row["threads"] == most and "precision" not in row
    ]
    return {row["cell"]: row["milliseconds"] for row in at_main}


def best_other(times: Any) -> str:
    """The fastest in training of those that are not elman."""
    others = [way for way in RIVALS if way in times and way not in ("elman", "interpret")]
    return min(others, key=lambda way: times[way]["training"]["min"])


def milliseconds(times: Any, mode: str) -> str:
    return f"{times[mode]['min']:.1f}" if mode in times else "–"


def rivals(result: Any) -> Table:
    """Forward / training of every rival, at MAIN."""
    yield "", *RIVALS.values(), "training, best other against elman"
    for cell, times in main_rows(result).items():
        shown = [" / ".join(milliseconds(times[w], m) for m in MODES) if w in times else "–" for w in RIVALS]
        best = times[best_other(times)]["training"]["min"] / times["elman"]["training"]["min"]
        yield cell, *shown, f"{best:.2f}×"


def shapes(result: Any) -> Table:
    """Training at every shape against torch.nn's layer, or else the loop by hand."""
    yield "T·B·H", *(f"{cell}" for cell in CELLS)
    columns = [
        ratios(result, cell, "torch.nn" if contestant.layers else "eager", threads(result))
        for cell, contestant in CELLS.items()
    ]
    for shape in map(written, SHAPES):
        yield shape, *(f"{column[shape]:.2f}×" if shape in column else "–" for column in columns)


def narrow(result: Any) -> Table:
    """The same for both under autocast to bfloat16."""
    yield "T·B·H", *NARROW
    columns = [
        ratios(result, cell, "torch.nn" if CELLS[cell].layers else "eager", threads(result), precision="bfloat16")
        for cell in NARROW
    ]
    for shape in map(written, SHAPES):
        yield shape, *(f"{column[shape]:.2f}×" if shape in column else "–" for column in columns)


def aims(result: Any) -> Table:
    """What was aimed at and what was reached."""
    yield "", "against", "aim", "reached", "where"
    for row in result["targets"]:
        sign = "≤" if row["most"] else "≥"
        yield row["what"], row["against"], f"{sign} {row['target']:g}", f"{row['reached']:.2f}", row["where"]


TABLES: dict[str, Callable[[Any], Table]] = {"rivals": rivals, "shapes": shapes, "narrow": narrow, "aims": aims}


def markdown(table: Table) -> str:
    head, *rows = [list(map(str, row)) for row in table]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rows))


def renewed(page: str, result: Any) -> str:
    """The page with its tables as the result now is. Raises KeyError for a comment that names no table."""
    return PLACE.sub(lambda place: f"{place[1]}\n\n{markdown(TABLES[place[2]](result))}\n", page)


def picture(result: Any, path: Path) -> None:
    """Million training steps of a unit a second, T B H over the time, of elman and of the best other, at MAIN."""
    matplotlib.rcParams["svg.hashsalt"] = "elman"  # the same picture from the same result
    found = main_rows(result)
    steps, batch, _, hidden = MAIN
    figure = Figure(figsize=(7, 0.45 * len(found) + 1.2), layout="constrained")
    axes = figure.subplots()

    def rate(times: Any, way: str) -> float:
        return steps * batch * hidden / times[way]["training"]["min"] / 1e3

    for at, times in enumerate(found.values()):
        other = best_other(times)
        axes.barh(at - 0.2, rate(times, "elman"), 0.38, color="#1f77b4", label="elman" if at == 0 else None)
        bar = axes.barh(at + 0.2, rate(times, other), 0.38, color="#b0b0b0", label="best other" if at == 0 else None)
        axes.bar_label(bar, [RIVALS[other]], padding=3, fontsize=8)
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xlabel("million unit steps trained per second")
    axes.set_title(
        f"T·B·H {written(MAIN)}, float32, {threads(result)} threads, {result['machine']['processor']}", fontsize=9
    )
    figure.legend(loc="outside lower right", ncols=2, frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    for page in PAGES:
        page.write_text(renewed(page.read_text(encoding="utf-8"), result), encoding="utf-8")
    picture(result, PICTURE)
    print(f"renewed {', '.join(path.name for path in (*PAGES, PICTURE))}")


if __name__ == "__main__":
    main()
