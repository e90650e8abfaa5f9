"""Where elman keeps what it can make again: tokenised texts, machine code."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_directory"]


def cache_directory() -> Path:
    """$ELMAN_CACHE, else $XDG_CACHE_HOME/elman, else ~/.cache/elman; it need not exist yet."""
    own = os.environ.get("ELMAN_CACHE")
    if own:
        return Path(own)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "elman"
