"""Settings of a run: a few small sections, from defaults, a YAML file, options and ``--set a.b=c``, in
this order."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import DataError, OptionError

__all__ = [
    "Budget",
    "Config",
    "Data",
    "Machine",
    "Model",
    "Optim",
    "Report",
    "build_config",
    "override",
    "parse_assignments",
    "read_config_file",
]

BUDGETS = ("steps", "epochs", "minutes")
DEFAULT_STEPS = 2000


class Section(BaseModel):
    """Base of all sections: unknown settings are refused, values are checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Data(Section):
    """What is read and how it is cut."""

    files: tuple[str, ...] = Field(default=(), description="training files; none means the built-in English text")
    valid: str | None = Field(default=None, description="validation file; else the block after the training block")
    test: str | None = Field(default=None, description="test file; else the last block")
    valid_fraction: float = Field(default=0.05, gt=0, lt=0.5, description="share of the text held out for validation")
    test_fraction: float = Field(default=0.05, gt=0, lt=0.5, description="share of the text held out for the test")
    tokens: Literal["char", "byte"] = Field(default="char", description="what one symbol is")
    batch: int = Field(default=32, ge=1, description="streams read side by side (B)")
    window: int = Field(default=128, ge=1, description="steps between truncations of back-propagation (T)")


class Model(Section):
    """Embedding, a stack of cells, output projection."""

    cell: str = Field(default="lstm", description="spec of a cell: a name, file.py:MyCell, stack(2, residual(lstm))")
    cell_options: dict[str, Any] = Field(default_factory=dict, description="further options of a cell that is one name")
    layers: int = Field(default=1, ge=1, description="times that the cell stands on top of itself")
    hidden: int = Field(default=256, ge=1, description="units (H) of each cell whose width the spec does not say")
    embedding: int | None = Field(default=None, ge=1, description="width of the embedding; default: hidden")
    dropout_input: float = Field(default=0.0, ge=0, lt=1, description="dropout on the embedded symbols")
    dropout_between: float = Field(default=0.0, ge=0, lt=1, description="dropout between layers")
    dropout_output: float = Field(default=0.0, ge=0, lt=1, description="dropout before the output projection")
    tie: bool = Field(default=False, description="share the embedding with the output projection")


class Optim(Section):
    """Optimiser, schedule and clipping."""

    name: Literal["adam", "adamw", "sgd"] = Field(default="adamw", description="the optimiser")
    lr: float = Field(default=2e-3, gt=0, description="peak learning rate")
    schedule: Literal["cosine", "constant"] = Field(default="cosine", description="what follows the warm-up")
    warmup: int | None = Field(
        default=None,
        ge=0,
        description="steps of warm-up; default: 100, or a 20th of the budget if that is less",
    )
    final_lr: float = Field(default=0.05, ge=0, le=1, description="learning rate at the end, as a share of the peak")
    betas: tuple[float, float] = Field(default=(0.9, 0.99), description="decay of Adam's running moments")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum of sgd")
    weight_decay: float = Field(default=0.01, ge=0, description="decay of matrices; vectors are not decayed")
    clip: float = Field(default=1.0, ge=0, description="largest norm of the gradient; 0 does not clip")
    activation_penalty: float = Field(default=0.0, ge=0, description="times mean h² after dropout, in the gradient")
    temporal_penalty: float = Field(default=0.0, ge=0, description="times mean (h(t+1) - h(t))², in the gradient")
    max_skipped: int = Field(default=25, ge=1, description="steps in a row with a non-finite gradient before giving up")


class Budget(Section):
    """How long to train; exactly one of steps, epochs and minutes is set."""

    steps: int | None = Field(default=None, ge=1, description="optimiser steps")
    epochs: float | None = Field(default=None, gt=0, description="passes over the training text")
    minutes: float | None = Field(default=None, gt=0, description="wall-clock minutes; not reproducible to the byte")
    patience: int | None = Field(default=None, ge=1, description="stop after so many validations without improvement")


class Report(Section):
    """What is written down while training, and how often."""

    log_every: int = Field(default=10, ge=1, description="steps for one line of metrics.jsonl")
    validate_every: int | None = Field(default=None, ge=1, description="steps; default: 20 times in the budget")
    validate_tokens: int = Field(default=500_000, ge=1, description="most symbols per validation while training")
    save_seconds: float = Field(
        default=60.0, ge=0, description="seconds between checkpoints besides those at validations"
    )
    sample: int = Field(default=200, ge=0, description="symbols sampled at a validation; 0 samples nothing")


class Machine(Section):
    """Where and how numbers are computed."""

    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, mps …")
    precision: Literal["float32", "high", "medium", "bf16"] = Field(
        default="float32",
        description="high, medium: products of float32 as torch.set_float32_matmul_precision; bf16: autocast",
    )
    backend: Literal["auto", "reference", "interpret", "llvm"] = Field(
        default="auto", description="how cells are unfolded (see elman.scan); it changes the speed alone"
    )
    threads: int | None = Field(default=None, ge=1, description="threads of torch; default: torch's own choice")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of initialisation, dropout and samples")


class Config(Section):
    """All settings of a run, as they stand in its ``config.json``."""

    task: Literal["lm"] = "lm"
    data: Data = Data()
    model: Model = Model()
    optim: Optim = Optim()
    budget: Budget = Budget.model_validate({"steps": DEFAULT_STEPS})
    report: Report = Report()
    machine: Machine = Machine()


def build_config(*layers: Mapping[str, Any]) -> Config:
    """Settings from nested mappings, later ones winning; a later budget replaces an earlier one as a whole.

    Raises OptionError for an unknown setting (naming the nearest known one) or an impossible value.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        _check_names(layer, Config, "")
        _merge(merged, layer)
    budget = merged.setdefault("budget", {})
    kinds = [kind for kind in BUDGETS if budget.get(kind) is not None]
    if len(kinds) > 1:
        raise OptionError(
            f"the budget is given as {' and '.join(kinds)} at once; give exactly one of steps, epochs and minutes."
        )
    if not kinds:
        budget["steps"] = DEFAULT_STEPS
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise OptionError(_explain(error)) from error


def override(config: Config, *layers: Mapping[str, Any], sections: tuple[str, ...]) -> Config:
    """``config`` with some settings changed; only those of ``sections`` may change.

    Raises OptionError when another section is named: a trained model and its data position depend on it.
    """
    for layer in layers:
        _check_names(layer, Config, "")
        for name in layer:
            if name not in sections:
                raise OptionError(
                    f"settings of {name!r} are fixed once a run has started; "
                    f"only {', '.join(sections)} may change. Start a new run with --out for another {name}."
                )
    return build_config(config.model_dump(mode="json"), *layers)


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The settings of a YAML (or JSON) file. Raises DataError when it cannot be read as a mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except OSError as error:
        raise DataError(f"cannot read the settings file {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a settings file: byte {error.start} is not UTF-8.") from error
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise DataError(f"{path} should hold sections such as 'model:' with settings, not {type(content).__name__}.")
    return content


def parse_assignments(assignments: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """``["model.hidden=64", "budget.steps=100"]`` as nested settings; values are read as YAML.

    Raises OptionError for what is not of the form ``section.name=value``.
    """
    settings: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        keys = name.strip().split(".")
        if not equals or len(keys) < 2 or not all(keys):
            raise OptionError(f"--set {assignment!r} is not of the form section.name=value, as in model.hidden=512.")
        place = settings
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        try:
            place[keys[-1]] = _scalar(value)
        except yaml.YAMLError as error:
            raise OptionError(f"--set {assignment!r}: the value is not valid YAML.") from error
    return settings


def _scalar(text: str) -> Any:
    """A YAML value, and numbers such as 1e-3, which YAML 1.1 takes for text."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _merge(into: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for name, value in layer.items():
        if not isinstance(value, Mapping):
            into[name] = value
            continue
        place = into.setdefault(name, {})
        if name == "budget" and any(value.get(kind) is not None for kind in BUDGETS):
            for kind in BUDGETS:
                place.pop(kind, None)
        _merge(place, value)


def _check_names(settings: Mapping[str, Any], model: type[BaseModel], prefix: str) -> None:
    known = list(model.model_fields)
    for name, value in settings.items():
        if name not in known:
            raise OptionError.unknown("setting", f"{prefix}{name}", [prefix + field for field in known])
        kind = model.model_fields[name].annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if not isinstance(value, Mapping):
                fields = ", ".join(kind.model_fields)
                raise OptionError(f"{prefix}{name} is a section with the settings {fields}; it was given {value!r}.")
            _check_names(value, kind, f"{prefix}{name}.")


def _explain(error: ValidationError) -> str:
    """One sentence for each setting that has an impossible value."""
    parts = []
    for detail in error.errors():
        place = ".".join(str(key) for key in detail["loc"])
        if detail["type"] == "literal_error" and isinstance(detail["input"], str):
            known = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
            parts.append(str(OptionError.unknown(f"value of {place}", detail["input"], known)))
            continue
        expected = detail["msg"][0].lower() + detail["msg"][1:]
        parts.append(f"{place} was given {detail['input']!r}: {expected}.")
    return " ".join(parts)
