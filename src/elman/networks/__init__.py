"""Networks: cells put together for a purpose, one per file."""

from .language_model import LanguageModel

__all__ = ["LanguageModel"]
