"""The figures that are aimed at, beside those that were reached."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .cells import COMPOSED
from .suite import MAIN, written

__all__ = ["Target", "geometric_mean", "ratios", "share_of_peak", "table", "targets"]


@dataclass(frozen=True)
class Target:
    """One figure: of what, against what, at least (or, with ``most``, at most) how much; and how much it is."""

    what: str
    against: str
    target: float
    reached: float
    most: bool = False
    where: str = ""

    @property
    def met(self) -> bool:
        return self.reached <= self.target if self.most else self.reached >= self.target

    def kept(self) -> dict[str, Any]:
        return {**asdict(self), "reached": float(f"{self.reached:.4g}"), "met": self.met}


def geometric_mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.exp(sum(map(math.log, found)) / len(found))


def ratios(
    result: Any, cell: str, way: str, threads: int, than: str = "elman", precision: str = "float32"
) -> dict[str, float]:
    """By shape, how many times as long as ``than`` a training step takes another way, minimum against minimum."""
    return {
        written(row["shape"]): times[way]["training"]["min"] / times[than]["training"]["min"]
        for row in result["rows"]
        if row["cell"] == cell
        and row["threads"] == threads
        and row.get("precision", "float32") == precision
        and way in (times := row["milliseconds"])
    }


def share_of_peak(result: Any) -> dict[tuple[str, int], float]:
    """Of an LSTM's training step, by shape and threads: 6 T B 4H (I + H) operations in its time, over the GEMM peak."""
    shares = {}
    for row in result["rows"]:
        steps, batch, inputs, hidden = row["shape"]
        if row["cell"] == "LSTM" and "precision" not in row:
            operations = 6 * steps * batch * 4 * hidden * (inputs + hidden)
            reached = operations / row["milliseconds"]["elman"]["training"]["min"] / 1e6
            peaks = [result["gemm gflops"][str(row["threads"])], row.get("gemm gflops", {})]
            shares[written(row["shape"]), row["threads"]] = reached / max(max(p.values(), default=0) for p in peaks)
    return shares


def targets(result: Any) -> list[Target]:
    """All for which the result has what they are made of."""
    return [*_rivals(result), *_costs(result), *_once(result)]


def _rivals(result: Any) -> Iterator[Target]:
    most = max(row["threads"] for row in result["rows"])
    for cell, layer, aim in (("LSTM", "nn.LSTM", 1.35), ("GRU", "nn.GRU", 2.5), ("Elman", "nn.RNN", 2.5)):
        found = ratios(result, cell, "torch.nn", most)
        if found:
            yield Target(cell, layer, aim, geometric_mean(found.values()), where="mean of shapes")
        if found and cell == "LSTM":
            least = min(found, key=lambda shape: found[shape])
            yield Target(cell, layer, 1.05, found[least], where=f"the least, {least}")
    for cell in COMPOSED:
        found = ratios(result, cell, "eager", most)
        if found:
            yield Target(cell, "eager loop", 8, geometric_mean(found.values()), where="mean of shapes")
    aims = {"LSTM": 3, "GRU": 4, "Elman": 4, "peephole LSTM": 12, "layer-norm LSTM": 12}
    for cell, aim in aims.items():
        way = "eager" if aim == 12 else "torch.nn"
        found = ratios(result, cell, way, most, precision="bfloat16")
        if found:
            where = "mean of shapes, both under autocast"
            yield Target(f"{cell}, bfloat16", way, aim, geometric_mean(found.values()), where=where)
    for row in result.get("unrolled", ()):
        times = row["milliseconds"]
        ratio = times["compiled loop"]["min"] / times["elman"]["min"]
        yield Target(row["cell"], "unrolled torch.compile", 1.5, ratio, where=written(row["shape"]))
    for cell in COMPOSED:
        for shape, ratio in ratios(result, cell, "JAX", most).items():
            yield Target(cell, "JAX scan", 1.5, ratio, where=shape)


def _costs(result: Any) -> Iterator[Target]:
    most = max(row["threads"] for row in result["rows"])
    large = {written(r["shape"]) for r in result["rows"] if r["shape"][3] >= 256 and r["shape"][1] >= 32}
    shares = {shape: share for (shape, n), share in share_of_peak(result).items() if n == most and shape in large}
    for shape, share in shares.items():
        yield Target("LSTM", "share of the GEMM peak", 0.85, share, where=shape)
    for cell, aim in (("peephole LSTM", 1.05), ("layer-norm LSTM", 1.35)):
        found = ratios(result, cell, "elman", most, than="plain LSTM")
        if found:
            yield Target(cell, "plain LSTM, its cost", aim, geometric_mean(found.values()), True, "mean of shapes")


def _once(result: Any) -> Iterator[Target]:
    if "denormal" in result:
        yield Target("LSTM, gradients underflow", "itself", 1.1, result["denormal"]["elman"], True, written(MAIN))
    first = result.get("first call ms", {})
    if first:
        cells = [name for name in first["T 16"] if name != "fresh process"]
        slowest = max(cells, key=lambda name: first["T 16"][name]["first"])
        yield Target(
            f"first call, s, {slowest}", "", 1.5, first["T 16"][slowest]["first"] / 1e3, True, "nothing cached"
        )
        made = {t: [first[t][n]["first"] - first[t][n]["third"] for n in cells] for t in ("T 16", "T 1024")}
        grown = geometric_mean(late / early for early, late in zip(made["T 16"], made["T 1024"], strict=True))
        yield Target("first call, T 1024", "T 16", 1.25, grown, True, "less the step")
        slowest = max(cells, key=lambda name: first["T 16, cached"][name]["first"])
        cached = first["T 16, cached"][slowest]["first"] / 1e3
        yield Target(f"first call, s, {slowest}", "", 0.2, cached, True, "machine code on disk")
    for name, ways in result.get("one step us", {}).items():
        over = ways["scan"] - ways["the step itself"]
        yield Target(f"call at T = 1, µs, {name}", "the step itself", 30, over, True, "B 1, 64 units")
    for row in result.get("memory", ()):
        own, theirs = row["MiB"]["elman"], row["MiB"]["torch.nn"]
        if own is not None and theirs and row["cell"] == "LSTM":
            yield Target("LSTM, memory", "nn.LSTM", 1.0, own / theirs, True, written(row["shape"]))


def table(found: list[Target]) -> list[str]:
    """The targets as lines of text."""
    lines = [f"{'':<34}{'against':<28}{'target':>9}{'reached':>9}"]
    for t in found:
        sign = "≤" if t.most else "≥"
        mark = "" if t.met else "  missed"
        lines.append(f"{t.what:<34}{t.against:<28}{f'{sign} {t.target:g}':>9}{t.reached:>9.2f}  {t.where}{mark}")
    return lines
