"""The rules of the house: public names, direction of imports, sizes of files, nothing of one machine."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import elman
from elman import errors

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "elman"
MODULES = sorted(SOURCE.rglob("*.py"))
SIZED = sorted(path for folder in ("src", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
MOST_LINES = 520
PIECES = [path for path in MODULES if path.parent.name in ("cells", "combinators")]
MOST_LINES_OF_A_PIECE = 80

PUBLIC = [
    "GRU",
    "LSTM",
    "RNN",
    "Attend",
    "Clockwork",
    "Conditioned",
    "Deep",
    "Delay",
    "DenseCell",
    "ElmanCell",
    "Feedback",
    "GRUCell",
    "Highway",
    "IRNNCell",
    "LRUCell",
    "LSTMCell",
    "Leaky",
    "LearnedState",
    "Masked",
    "MinGRUCell",
    "MinLSTMCell",
    "MinimalGatedCell",
    "Noise",
    "QRNNCell",
    "Recording",
    "Residual",
    "SLSTMCell",
    "SRUCell",
    "Stack",
    "Stream",
    "TimeSkip",
    "VariationalDropout",
    "WeightDrop",
    "Zoneout",
    "draw",
    "explain",
    "load",
    "path_lengths",
    "record",
    "scan",
]

ERRORS = [
    "CapturedTensorError",
    "CellError",
    "DataDependentError",
    "DataError",
    "ElmanError",
    "ForwardModeError",
    "InputError",
    "MixedRowsError",
    "MutationError",
    "OptionError",
    "RunError",
    "StateError",
    "TrainingError",
    "UnfoldError",
    "UnfoldWarning",
    "UnsupportedError",
    "UsageError",
]

# The way of the data. A module imports only from lines above its own, or from its own line.
STAGES = [
    "errors types cachefolder",
    "tokencache text batch metrics",
    "recording drawn packing protocol",
    "compiler",
    "unfold",
    "directions",
    "explaining paths streaming",
    "init cells combinators spec layers bptt penalties",
    "networks",
    "drawing",
    "config machine optim checkpoint progress plots",
    "decode",
    "tasks train",
    "runs",
    "inspect doctor",
    "bench",
    "cli __main__",
]
RANK = {name: rank for rank, names in enumerate(STAGES) for name in names.split()}


def stage(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path) -> set[str]:
    """The stages of elman that a file imports, wherever in the file the import stands."""
    package = ["elman", *path.relative_to(SOURCE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = [*base, *(node.module.split(".") if node.module else [])]
            if target == ["elman"]:
                found |= {alias.name for alias in node.names}
            elif target[:1] == ["elman"]:
                found.add(target[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("elman.")}
    return found


def foreign(path: Path) -> set[str]:
    """The modules from elsewhere that a file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}


def test_public_names_are_frozen() -> None:
    assert sorted(elman.__all__) == sorted(PUBLIC)
    assert sorted(errors.__all__) == sorted(ERRORS)


@pytest.mark.parametrize("public", PUBLIC)
def test_public_names_are_there_and_explained(public: str) -> None:
    assert getattr(elman, public).__doc__


@pytest.mark.parametrize("error", ERRORS)
def test_errors_are_in_the_tree_of_the_docstring(error: str) -> None:
    kind = getattr(errors, error)
    assert issubclass(kind, Warning if error.endswith("Warning") else errors.ElmanError)
    assert error.endswith("Warning") or re.search(rf"\b{error}\b", errors.__doc__ or "")


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_every_module_says_what_it_is_and_what_it_offers(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "open the file with what it is"
    if path.name in ("__init__.py", "__main__.py"):
        return
    module = importlib.import_module(".".join(["elman", *path.relative_to(SOURCE).with_suffix("").parts]))
    assert all(hasattr(module, public) for public in module.__all__)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_go_one_way(path: Path) -> None:
    if path == SOURCE / "__init__.py":
        return
    here = stage(path)
    assert here in RANK, f"{here} has no place in STAGES yet: put it where it stands on the way of the data"
    backward = {other for other in imported(path) if other in RANK and RANK[other] > RANK[here]}
    assert not backward, f"{here} comes before {', '.join(sorted(backward))} and may not import it"


def test_the_architecture_names_every_module() -> None:
    table = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    folders = {path.name for path in SOURCE.iterdir() if path.is_dir()}
    within = {f"`{path.stem}`" for path in (SOURCE / "compiler").glob("*.py") if path.stem != "__init__"}
    stages = {f"`{s}/`" if s in folders else f"`{s}.py`" for s in map(stage, MODULES) if not s.startswith("__")}
    assert {named for named in stages | within if named not in table} == set()


def test_the_compiler_knows_no_concrete_cell_and_decoding_no_text() -> None:
    for path in (SOURCE / "compiler").rglob("*.py"):
        assert not imported(path) & {"cells", "layers", "networks"}, name(path)
    decode = SOURCE / "decode.py"
    assert not decode.exists() or "text" not in imported(decode)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_no_checked_calls_where_torch_compile_passes(path: Path) -> None:
    compiled = {"combinators", "compiler", "unfold", "packing", "recording", "drawn", "cells", "layers", "networks"}
    assert stage(path) not in compiled or "jaxtyping" not in foreign(path)


@pytest.mark.parametrize("path", SIZED, ids=name)
def test_files_stay_small(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{lines} lines: split it by meaning"


@pytest.mark.parametrize("path", PIECES, ids=name)
def test_every_cell_and_combinator_is_small(path: Path) -> None:
    classes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ClassDef)]
    lines = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in classes}
    long = {piece: number for piece, number in lines.items() if number > MOST_LINES_OF_A_PIECE}
    assert not long, f"{long} lines, docstring included; the most is {MOST_LINES_OF_A_PIECE}: find the piece to share"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_nothing_is_unpickled(path: Path) -> None:
    assert not foreign(path) & {"pickle", "dill", "cloudpickle", "shelve", "joblib"}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not calls & {"torch.load", "torch.save"}
    allows = {key.arg for node in ast.walk(tree) if isinstance(node, ast.Call) for key in node.keywords}
    assert "allow_pickle" not in allows or "allow_pickle=True" not in path.read_text(encoding="utf-8")


def test_no_paths_of_one_machine() -> None:
    written = [
        path
        for folder in ("src", "tests", "docs", "scripts", "benchmarks", "runs", ".ci")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in ("", ".py", ".md", ".sh", ".json") and path.is_file() and "out" not in path.parts
    ]
    written += [path for path in ROOT.iterdir() if path.suffix in (".md", ".toml", ".yml", ".txt")]
    homes = "|".join(("home", "root", "work", "Users", "opt", "tmp", "mnt"))
    pattern = re.compile(rf"(?<![\w.$}}/-])/(?:{homes})/\w")
    found = []
    for path in written:
        lines = path.read_text(encoding="utf-8").splitlines()
        found += [f"{name(path)}: {line.strip()}" for line in lines if pattern.search(line)]
    assert not found


def test_import_is_light() -> None:
    """Only torch and small packages load with elman; the rest waits for its first use."""
    heavy = {"matplotlib", "typer", "rich", "pydantic", "yaml", "safetensors", "beartype", "pydoc_data"}
    heavy |= {"sympy", "torch._dynamo", "elman.compiler.trace"}
    code = "import torch, sys; before = set(sys.modules); import elman; elman.scan, elman.LSTM; "
    code += "print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "elman.unfold" in loaded
    assert not loaded & heavy
