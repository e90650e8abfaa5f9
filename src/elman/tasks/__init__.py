"""Tasks: what a network is trained for, one per file."""

from .language_model import LanguageModelling, TrainedLanguageModel

__all__ = ["LanguageModelling", "TrainedLanguageModel"]
