"""Tasks: what a network is trained for, one per file; and ``load``, a trained model from its run."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint import RunDirectory
from .language_model import TrainedLanguageModel

__all__ = ["load"]


def load(run_directory: str | Path, *, trust: bool = False, device: str = "cpu") -> TrainedLanguageModel:
    """A trained model, ready to use, from its run directory.

    A run with the user's own cell holds code; it is executed only with ``trust=True``. Raises RunError
    when the directory holds no run, a damaged one, or one that is not trusted.
    """
    return TrainedLanguageModel.load(RunDirectory.open(run_directory), trust=trust, device=device)
