"""``elman bench``: rivals that agree, turns, figures that are computed as they say, a part that replaces nothing."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from elman.bench import apart
from elman.bench.cells import CELLS, COMPOSED
from elman.bench.jax_scan import STEPS
from elman.bench.rivals import Rival, WrongNumbers, agree, rivals, verify
from elman.bench.suite import MAIN, SHAPES, Plan, written
from elman.bench.targets import Target, geometric_mean, share_of_peak, table, targets
from elman.bench.timing import alternate, gemm_peak, summary
from elman.cli.bench import _sizes
from elman.errors import OptionError

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", CELLS)
def test_rivals_agree_in_float64(name: str) -> None:
    assert verify(name) < 1e-12


@pytest.mark.parametrize("name", ["LSTM", "GRU", "Elman", "peephole LSTM"])
def test_rivals_have_the_same_weights_and_a_wrong_one_is_found(name: str) -> None:
    found = rivals(name, 3, 4, ("elman", "torch.nn", "eager"), torch.float64)
    xs, weight = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True), torch.randn(5, 2, 4).double()
    assert agree(found, xs, weight, 1e-12) < 1e-12
    loop = found["eager"].run
    wrong = {**found, "wrong": Rival(found["eager"].module, lambda xs: loop(xs) * (1 + 1e-6))}
    with pytest.raises(WrongNumbers, match=r"wrong: ys differs"):
        agree(wrong, xs, weight, 1e-9)
    nothing = {**found, "nan": Rival(found["eager"].module, lambda xs: loop(xs) * float("nan"))}
    with pytest.raises(WrongNumbers, match="nan: ys"):
        agree(nothing, xs, weight, 1e-9)


def test_a_training_step_leaves_no_gradients() -> None:
    rival = rivals("GRU", 3, 4, ("elman",))["elman"]
    xs = torch.randn(5, 2, 3, requires_grad=True)
    rival.train(xs, torch.ones(5, 2, 4))
    assert xs.grad is None
    assert all(p.grad is None for p in rival.module.parameters())


def test_calls_take_turns() -> None:
    order: list[str] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b") or 7.0}
    times = alternate(calls, 0.0, least=3, most=9)
    assert order == ["a", "b"] * 4  # the first turn does not count
    assert len(times["a"]) == 3
    assert times["b"] == [7.0] * 3
    assert len(alternate(calls, 1e9, least=1, most=5)["a"]) == 5
    assert summary([3.0, 1.0, 2.0]) == {"min": 1.0, "median": 2.0, "turns": 3}


def test_the_peak_is_of_every_number_of_threads_and_these_are_as_before() -> None:
    before = torch.get_num_threads()
    found = gemm_peak((1, 2), 2, 64)
    assert torch.get_num_threads() == before
    assert list(found) == ["1", "2"]
    assert all(value > 0 for ways in found.values() for value in ways.values())


def row(cell: str, shape: tuple[int, ...], threads: int, **training: float) -> dict[str, Any]:
    times = {way.replace("_", " "): {"training": {"min": t}, "forward": {"min": t / 3}} for way, t in training.items()}
    return {"cell": cell, "shape": list(shape), "threads": threads, "milliseconds": times}


RESULT: dict[str, Any] = {
    "rows": [
        row("LSTM", (64, 16, 64, 64), 2, elman=2, **{"torch.nn": 4}),
        row("LSTM", MAIN, 2, elman=10, **{"torch.nn": 9.0}),
        row("LSTM", MAIN, 1, elman=1, **{"torch.nn": 900}),  # not of the most threads
        row("peephole LSTM", MAIN, 2, elman=12, eager=120, plain_LSTM=10, JAX=24),
    ],
    "gemm gflops": {"1": {"torch.mm": 100.0}, "2": {"torch.mm": 100.0, "oneDNN": 2000.0}},
    "denormal": {"elman": 1.05, "torch.nn": 25.0},
    "one step us": {"LSTM": {"the step itself": 20.0, "scan": 60.0}},
    "memory": [{"cell": "LSTM", "shape": list(MAIN), "MiB": {"elman": 30.0, "torch.nn": 60.0}}],
    "first call ms": {
        "T 16": {"fresh process": {"first": 9e3, "third": 1}, "LSTM": {"first": 801, "third": 1}},
        "T 1024": {"fresh process": {"first": 9e3, "third": 1}, "LSTM": {"first": 1650, "third": 50}},
        "T 16, cached": {"fresh process": {"first": 9e3, "third": 1}, "LSTM": {"first": 150, "third": 1}},
    },
}


def test_what_was_reached_is_computed_from_the_rows() -> None:
    found = {(t.what, t.against, t.where): t for t in targets(RESULT)}
    assert found["LSTM", "nn.LSTM", "mean of shapes"].reached == pytest.approx((2 * 0.9) ** 0.5)
    least = found["LSTM", "nn.LSTM", f"the least, {written(MAIN)}"]
    assert least.reached == pytest.approx(0.9)
    assert not least.met
    assert found["peephole LSTM", "eager loop", "mean of shapes"].met
    assert found["peephole LSTM", "JAX scan", written(MAIN)].reached == pytest.approx(2)
    assert found["peephole LSTM", "plain LSTM, its cost", "mean of shapes"].reached == pytest.approx(1.2)
    operations = 6 * 128 * 32 * 4 * 256 * 512
    assert share_of_peak(RESULT)[written(MAIN), 2] == pytest.approx(operations / 10e-3 / 2000e9)
    assert found["LSTM", "share of the GEMM peak", written(MAIN)].reached == pytest.approx(operations / 10e-3 / 2000e9)
    assert found["first call, T 1024", "T 16", "less the step"].reached == pytest.approx(2)
    assert found["LSTM, memory", "nn.LSTM", written(MAIN)].reached == pytest.approx(0.5)
    assert found["call at T = 1, µs, LSTM", "the step itself", "B 1, 64 units"].reached == pytest.approx(40)
    rows = [{**RESULT["rows"][1], "gemm gflops": {"oneDNN": 4000.0}}]  # a higher peak, beside the row itself
    assert share_of_peak({**RESULT, "rows": rows})[written(MAIN), 2] == pytest.approx(operations / 10e-3 / 4000e9)
    assert geometric_mean([2, 8]) == pytest.approx(4)


def test_a_miss_is_marked() -> None:
    hit, miss = Target("a", "b", 1.05, 1.04, most=True), Target("a", "b", 8, 7.9)
    assert [line.endswith("missed") for line in table([hit, miss])[1:]] == [False, True]
    assert miss.kept()["met"] is False


def test_shapes_and_cells_are_those_of_the_plan() -> None:
    assert MAIN in SHAPES
    assert any(inputs != hidden for _, _, inputs, hidden in SHAPES)
    assert written((128, 32, 64, 256)) == "128·32·256, I 64"
    assert {*COMPOSED, *STEPS} <= set(CELLS)
    assert Plan().whole
    assert not Plan(cells=("LSTM",)).whole
    assert not Plan(shapes=(MAIN,)).whole
    assert not Plan(counts=(2,)).whole
    assert not Plan.quickly().whole


@pytest.mark.parametrize("text", ["1,2", "1,2,x", "0,2,3", "1,2,3,4,5", "-1,2,3"])
def test_shapes_are_checked(text: str) -> None:
    with pytest.raises(OptionError, match="128,32,256"):
        _sizes(text)


def bench(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "elman", "bench", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=os.environ)


def test_quick_runs_and_is_kept_where_asked(tmp_path: Path) -> None:
    done = bench("--quick", "--out", "q.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "q.json").read_text(encoding="utf-8"))
    assert kept["whole"] is False
    assert kept["command"] == "elman bench --quick"
    assert {"processor", "torch", "commit"} <= set(kept["machine"])
    named = [(row["cell"], row.get("precision")) for row in kept["rows"]]
    plan = Plan.quickly()
    assert named == [*((cell, None) for cell in plan.cells), *((cell, "bfloat16") for cell in plan.narrow)]
    for row in kept["rows"]:
        for modes in row["milliseconds"].values():
            assert all(0 < modes[m]["min"] <= modes[m]["median"] for m in ("forward", "training"))
    assert kept["targets"]
    assert "kept in q.json" in done.stdout


def test_a_part_replaces_no_whole(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    out.write_text('{"whole": true}', encoding="utf-8")
    done = bench("--quick", "--out", str(out), cwd=tmp_path)
    assert done.returncode == 2
    assert "part" in done.stderr
    assert out.read_text(encoding="utf-8") == '{"whole": true}'
    assert bench("--cell", "lstm", cwd=tmp_path).returncode == 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell")
def test_memory_is_of_the_step() -> None:
    """Outputs, their gradients and what is kept: more than the 4 gates of 64·32·256 numbers alone, below ten times."""
    found = apart.peak_memory("LSTM", "elman", (64, 32, 256, 256), 1)
    gates = 4 * 64 * 32 * 256 * 4 / 2**20
    assert found is not None
    assert gates < found < 10 * gates


def test_tables_and_picture_are_made_from_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    pages = importlib.import_module("pages")
    result = {**RESULT, "targets": [t.kept() for t in targets(RESULT)], "machine": {"processor": "some"}}
    page = (
        "a\n\n<!-- kernels: rivals -->\n\n| old |\n| --- |\n\n<!-- kernels: aims -->\n\n<!-- kernels: shapes -->\n\nb\n"
    )
    made = pages.renewed(page, result)
    assert pages.renewed(made, result) == made
    assert "| old |" not in made
    assert "| peephole LSTM | 4.0 / 12.0 | – | – | 40.0 / 120.0 | – | 8.0 / 24.0 | 2.00× |" in made
    assert "| LSTM | nn.LSTM | ≥ 1.05 | 0.90 | the least, 128·32·256 |" in made
    assert made.endswith("b\n")
    one, other = tmp_path / "one.svg", tmp_path / "other.svg"
    pages.picture(result, one)
    pages.picture(result, other)
    assert one.read_text(encoding="utf-8") == other.read_text(encoding="utf-8")


def test_the_pages_quote_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    pages = importlib.import_module("pages")
    if not pages.RESULT.exists():
        assert all("<!-- kernels:" not in page.read_text(encoding="utf-8") for page in pages.PAGES)
        return
    result = json.loads(pages.RESULT.read_text(encoding="utf-8"))
    assert result["whole"] is True
    for path in pages.PAGES:
        page = path.read_text(encoding="utf-8")
        assert pages.renewed(page, result) == page, "python benchmarks/pages.py writes the tables anew"
