"""Networks: cells put together for a purpose, one per file."""

from .autoencoder import SequenceAutoencoder
from .bidirectional import MERGES, Bidirectional
from .distribution import log_prob, sample
from .jordan import jordan
from .language_model import LanguageModel
from .summary import Summary
from .untied import Untied
from .window import Window, windows

__all__ = [
    "MERGES",
    "Bidirectional",
    "LanguageModel",
    "SequenceAutoencoder",
    "Summary",
    "Untied",
    "Window",
    "jordan",
    "log_prob",
    "sample",
    "windows",
]
