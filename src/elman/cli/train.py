"""``elman train lm`` and ``elman resume``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["app", "lm", "resume"]

app = typer.Typer(
    help="Train a model for a task.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

LM_EXAMPLES = """Examples:

  elman train lm --minutes 2

  elman train lm book.txt more/*.txt --cell gru --layers 2 --epochs 10

  elman train lm book.txt --cell "stack(3, residual(lstm(512, layer_norm)))"

  elman train lm book.txt --cell "stack(2, my.py:MyCell(128))"

  elman train lm book.txt --out runs/book --config settings.yaml
"""

RESUME_EXAMPLES = """Examples:

  elman resume runs/book

  elman resume runs/book --steps 20000

  elman resume runs/book --from best --set optim.lr=5e-4
"""


@app.callback()
def root() -> None:
    """Train a model for a task."""


def _panel(name: str) -> Callable[..., Any]:
    """Options that --help shows together under ``name``."""
    return lambda help, *names, **more: typer.Option(*names, help=help, rich_help_panel=name, **more)


_run, _data, _model = _panel("Run"), _panel("Data"), _panel("Model")
_training, _budget, _machine = (
    _panel("Training"),
    _panel("Budget (steps, epochs or minutes)"),
    _panel("Machine"),
)


@app.command(epilog=LM_EXAMPLES)
def lm(
    files: Annotated[
        list[str] | None,
        typer.Argument(help="Text files to train on; without any, Python's own manual.", show_default=False),
    ] = None,
    out: Annotated[str | None, _run("Run directory to make (default runs/FILE-CELL).")] = None,
    overwrite: Annotated[bool, _run("Replace a run that is there.", "--overwrite")] = False,
    config: Annotated[str | None, _run("YAML file with settings; options win over it.", metavar="FILE")] = None,
    set_: Annotated[
        list[str] | None,
        _run("Any setting, over all else; may be repeated.", "--set", metavar="SECTION.NAME=VALUE"),
    ] = None,
    log_every: Annotated[int | None, _run("Steps for a line of metrics.jsonl (default 10).")] = None,
    validate_every: Annotated[int | None, _run("Steps between validations (default a 20th of the budget).")] = None,
    as_json: Annotated[bool, _run("Print the result as JSON.", "--json")] = False,
    quiet: Annotated[bool, _run("No progress.", "--quiet", "-q")] = False,
    valid: Annotated[str | None, _data("Validation text (default: a 20th of FILES).")] = None,
    test: Annotated[str | None, _data("Test text (default: the last 20th of FILES).")] = None,
    tokens: Annotated[str | None, _data("char or byte (default char).")] = None,
    batch: Annotated[int | None, _data("Streams read side by side (default 32).")] = None,
    window: Annotated[int | None, _data("Steps of back-propagation (default 128).")] = None,
    cell: Annotated[
        str | None,
        _model("A name from 'elman cells', file.py:MyCell, or a spec of them (default lstm).", metavar="SPEC"),
    ] = None,
    layers: Annotated[int | None, _model("Times that the cell stands on top of itself (default 1).")] = None,
    hidden: Annotated[int | None, _model("Units of a cell whose width SPEC does not say (default 256).")] = None,
    embedding: Annotated[int | None, _model("Width of the embedding (default: hidden).")] = None,
    dropout: Annotated[float | None, _model("Dropout on input, between layers, on output (default 0).")] = None,
    tie: Annotated[bool | None, _model("Share embedding and output weights (default no).", "--tie/--no-tie")] = None,
    optimizer: Annotated[str | None, _training("adam, adamw or sgd (default adamw).")] = None,
    lr: Annotated[float | None, _training("Peak learning rate (default 0.002).")] = None,
    warmup: Annotated[int | None, _training("Steps of warm-up (default at most 100).")] = None,
    clip: Annotated[float | None, _training("Largest norm of the gradient; 0: any (default 1).")] = None,
    weight_decay: Annotated[float | None, _training("Decay of matrices (default 0.01).")] = None,
    steps: Annotated[int | None, _budget("Optimiser steps (default 2000).")] = None,
    epochs: Annotated[float | None, _budget("Passes over the training text.")] = None,
    minutes: Annotated[float | None, _budget("Minutes by the clock.")] = None,
    patience: Annotated[int | None, _budget("Stop early after so many validations without gain.")] = None,
    device: Annotated[str | None, _machine("auto, cpu, cuda … (default auto).")] = None,
    precision: Annotated[str | None, _machine("float32, high, medium or bf16 (default float32).")] = None,
    backend: Annotated[str | None, _machine("auto, reference, interpret or llvm (default auto).")] = None,
    threads: Annotated[int | None, _machine("Threads (default: torch's choice).")] = None,
    seed: Annotated[int | None, _machine("Same seed, same model (default 0).")] = None,
) -> None:
    """Train a language model on text FILES.

    The last two twentieths of the text are held out for validation and test. Ctrl-C saves; 'elman resume'
    goes on where it was, to the byte.
    """
    options: dict[str, dict[str, Any]] = {
        "data": {
            "files": files or None,
            "valid": valid,
            "test": test,
            "tokens": tokens,
            "batch": batch,
            "window": window,
        },
        "model": {
            "cell": cell,
            "layers": layers,
            "hidden": hidden,
            "embedding": embedding,
            "dropout_input": dropout,
            "dropout_between": dropout,
            "dropout_output": dropout,
            "tie": tie,
        },
        "optim": {
            "name": optimizer,
            "lr": lr,
            "warmup": warmup,
            "clip": clip,
            "weight_decay": weight_decay,
        },
        "budget": {"steps": steps, "epochs": epochs, "minutes": minutes, "patience": patience},
        "report": {"log_every": log_every, "validate_every": validate_every},
        "machine": {"device": device, "precision": precision, "backend": backend, "threads": threads, "seed": seed},
    }
    from ..config import build_config, parse_assignments, read_config_file

    settings = build_config(read_config_file(config) if config else {}, given(options), parse_assignments(set_ or []))
    from ..progress import Reporter
    from ..runs import start

    directory = Path(out) if out else free_name(settings.data.files, settings.model.cell)
    show_result(start(settings, directory, Reporter(quiet=quiet), overwrite=overwrite), as_json)


def resume(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    steps: Annotated[int | None, typer.Option(help="A larger budget, in steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="A larger budget, in passes over the text.")] = None,
    minutes: Annotated[float | None, typer.Option(help="A larger budget, in minutes in all.")] = None,
    patience: Annotated[int | None, typer.Option(help="Stop after so many validations without gain.")] = None,
    source: Annotated[str | None, typer.Option("--from", help="Checkpoint: last or best.", show_default="last")] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Run the code of the run's own cell file.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Change a setting of optim, budget or report."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Continue a run that was stopped, as if it had not been."""
    from ..config import parse_assignments
    from ..errors import OptionError

    if source not in (None, "last", "best"):
        raise OptionError.unknown("checkpoint", str(source), ("last", "best"))
    options = {"budget": {"steps": steps, "epochs": epochs, "minutes": minutes, "patience": patience}}
    changes = [layer for layer in (given(options), parse_assignments(set_ or [])) if layer]
    from ..progress import Reporter
    from ..runs import resume as continue_run

    result = continue_run(run, changes, Reporter(quiet=quiet), which=source, trust=trust)
    if result.pop("already", False) and result["ended"] != "interrupted":
        print(
            f"{run} is finished: it ended at step {result['steps']:,} ({result['ended']}). "
            f"To train on: {command(result, 'resume', '--steps', 2 * result['steps'])}",
            file=sys.stderr,
        )
    show_result(result, as_json)


resume.__doc__ = f"{resume.__doc__}\n\n{RESUME_EXAMPLES}"


def given(options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The options that were given, by section."""
    chosen = {
        section: {name: value for name, value in settings.items() if value is not None}
        for section, settings in options.items()
    }
    return {section: settings for section, settings in chosen.items() if settings}


def free_name(files: tuple[str, ...], cell: str) -> Path:
    """``runs/book-stack-gru``: text, outermost name and cells of the spec; numbered when that is taken."""
    from ..spec import parse_spec

    text = Path(files[0]).stem[:60] if files else "python-manual"
    name = "-".join([text, *parse_spec(cell).names[:4]])[:100]
    number, path = 1, Path("runs") / name
    while path.exists():
        number += 1
        path = Path("runs") / f"{name}-{number}"
    return path


def show_result(result: dict[str, Any], as_json: bool) -> None:
    """Print how a training ended; leaves with 130 when it was interrupted."""
    interrupted = result["ended"] == "interrupted"
    if as_json:
        print(json.dumps(result))
    elif not interrupted:
        for line in result_lines(result):
            print(line)
    if not interrupted and unlearned(result):
        print(
            "note: the model predicts no better than how often each symbol occurs (unigram). Train for longer, or "
            "lower the learning rate (--lr).",
            file=sys.stderr,
        )
    if interrupted:
        print(
            f"stopped and saved at step {result['steps']:,}. Continue with: {command(result, 'resume')}",
            file=sys.stderr,
        )
        raise typer.Exit(130)


def unlearned(result: dict[str, Any]) -> bool:
    """Whether the model is no better than counted symbols; one whose loss is no number is not."""
    counted = result.get("baselines", {}).get("unigram")
    return counted is not None and not result["test"]["bits_per_character"] < counted


def command(result: dict[str, Any], verb: str, *more: object) -> str:
    """What to type to do more with the run of this result."""
    from ..checkpoint import RunDirectory

    return RunDirectory(result["run"]).command(verb, *more)


def result_lines(result: dict[str, Any]) -> list[str]:
    from ..progress import duration

    test, run = result["test"], result["run"]
    rows = [
        (
            "held-out text",
            f"{test['bits_per_character']:.4f} bits per character   "
            f"({test['nats_per_token']:.4f} nats per symbol, {test['tokens']:,} symbols)",
        )
    ]
    for name, figure in result.get("baselines", {}).items():
        rows.append((f"  {name}", f"{figure:.4f} bits per character, counted on the same training text"))
    ended = {"budget": "budget spent", "patience": "no further gain"}[result["ended"]]
    skipped = f", {result['skipped']} skipped" if result["skipped"] else ""
    best = "none" if result["best_step"] is None else f"{result['best_step']:,}"
    rows += [
        ("steps", f"{result['steps']:,}{skipped}, best at {best}; {duration(result['seconds'])}, {ended}"),
        ("loss curve", f"{run}/loss.png"),
        ("try it", command(result, "generate", "--prompt", "The ", "--temperature", 0.8)),
    ]
    return [f"{name:<20}{text}" for name, text in rows]
