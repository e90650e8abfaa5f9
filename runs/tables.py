"""Writes the tables of docs/experiments.md, docs/choose-a-cell.md and docs/slow.md anew from the results that are kept.

    python runs/tables.py

A table stands below a comment <!-- RESULT: TABLE -->, RESULT without .json. Figures are as in the file, not rounded.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from kept import DOCS, RESULTS

__all__ = ["PAGES", "TABLES", "renewed"]

PAGES = (DOCS / "choose-a-cell.md", DOCS / "experiments.md", DOCS / "slow.md")
PLACE = re.compile(r"(<!-- (\w+): ([\w ]+) -->)\n+(?:\|.*\n)*\n*")
Table = Iterable[Iterable[object]]


def several(values: Iterable[float]) -> str:
    return ", ".join(map(str, values))


def speed(result: Any) -> Table:
    keys = [f"{name} {what} ms" for name in ("Elman", "Jordan") for what in ("min", "median")]
    yield "B", "H", *keys, "ratio of minima", "ratio of medians"
    for row in result["speed"]:
        yield row["B"], row["H"], *(row[key] for key in keys), row["ratio of minima"], row["ratio of medians"]


def memory(result: Any) -> Table:
    yield "task, network", "right, by seed"
    for name in ("recall, Elman", "recall, Jordan", "parity, Elman", "parity, Jordan"):
        yield name, several(row[name] for row in result["memory"])


def accuracy(result: Any) -> Table:
    yield "transition", "accuracy, by seed"
    for row in result["rows"]:
        yield row["transition"], several(row["accuracy"])


def lengths(result: Any) -> Table:
    yield "transition", "shortest", "longest"
    for row in result["rows"]:
        if "orthogonal" not in row["transition"]:  # a start changes no way
            yield row["transition"], row["path"]["shortest"], row["path"]["longest"]


def named(result: Any) -> Table:
    yield "conditioned on the picture", "named without a wrong letter, by seed"
    places = {"step": "at every step", "start": "in the first state", "both": "both", "none": "not at all"}
    for way, shares in result["named"].items():
        yield places[way], several(shares)


def two_rates(result: Any) -> Table:
    yield "cell", "weights", "unexplained, by seed"
    for name, row in result["two rates"].items():
        yield name, row["weights"], several(row["mean level"])


def forgetting(result: Any) -> Table:
    yield "cell", "weights", "sum: unexplained, by seed", "sum since reset: unexplained, by seed"
    for name, row in result["forgetting"].items():
        yield name, row["weights"], several(row["sum"]), several(row["sum since reset"])


def left(where: str) -> Callable[[Any], Table]:
    def table(result: Any) -> Table:
        shown = [k for k in next(iter(result[where].values())) if k in ("1", "10", "50", "100")]
        yield where, *shown
        for name, curve in result[where].items():
            yield name, *(curve[k] for k in shown)

    return table


def filled(result: Any) -> Table:
    yield "network", "parameters", "blanks filled rightly, by seed"
    for row in result["rows"]:
        yield row["network"], row["parameters"], several(row["accuracy"])


def error(result: Any) -> Table:
    yield "examples", "shared", "untied"
    for row in result["rows"]:
        yield row["examples"], row["shared"], row["untied"]
    yield "one step more", *result["one step more"].values()


def rebuilt(result: Any) -> Table:
    yield "code", *(f"length {length}" for length in result["rows"][0]["rebuilt"])
    for row in result["rows"]:
        yield row["code"], *row["rebuilt"].values()


def cells(result: Any) -> Table:
    yield "cell", "units", "adding: squared error", "copy: share right", "text: bits per character"
    for spec, row in result["cells"].items():
        yield f"`{spec}`", row["units"], row["adding"] or "< 0.0001", row["copy"], row["text"]


def pairs(result: Any) -> Table:
    yield "written so", "ms", "or so", "ms", "ratio"
    for row in result["rows"]:
        yield row["slow"], row["ms"][0], row["fast"], row["ms"][1], row["ratio"]


def rivals(**columns: str) -> Callable[[Any], Table]:
    """The layers of one model, with what is kept of each under some keys."""

    def table(result: Any) -> Table:
        yield "layers", *columns.values(), "seconds of an epoch"
        for name, seconds in result["seconds of an epoch"].items():
            if name != "threads":
                row = result.get(name, {})
                yield name, *(row.get(key.replace("_", " "), "–") for key in columns), seconds

    return table


TABLES: dict[tuple[str, str], Callable[[Any], Table]] = {
    ("choose_a_cell", "cells"): cells,
    ("jordan", "speed"): speed,
    ("jordan", "memory"): memory,
    ("deep_transition", "accuracy"): accuracy,
    ("deep_transition", "lengths"): lengths,
    ("digit_names", "named"): named,
    ("time_scales", "two rates"): two_rates,
    ("time_scales", "forgetting"): forgetting,
    ("gradient_paths", "in time"): left("steps back in time"),
    ("gradient_paths", "in depth"): left("layers back in depth"),
    ("fill_in_the_blank", "filled"): filled,
    ("untied", "error"): error,
    ("sequence_autoencoder", "rebuilt"): rebuilt,
    ("ptb_words", "words"): rivals(valid="validation, nats", test="test, nats", test_perplexity="test perplexity"),
    ("shakespeare_layers", "characters"): rivals(valid="validation, nats"),
    ("slow_cells", "pairs"): pairs,
}


def markdown(table: Table) -> str:
    head, *rows = [list(map(str, row)) for row in table]
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def renewed(page: str) -> str:
    """The page with its tables as the results now are. Raises KeyError for a comment that names no table."""

    def table(place: re.Match[str]) -> str:
        result = json.loads((RESULTS / f"{place[2]}.json").read_text(encoding="utf-8"))
        return f"{place[1]}\n\n{markdown(TABLES[place[2], place[3]](result))}\n"

    return PLACE.sub(table, page)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for page in PAGES:
        page.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"renewed {page}")


if __name__ == "__main__":
    main()
