"""What figures are of: processor, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from ..doctor import describe_machine

__all__ = ["commit", "machine"]


def machine() -> dict[str, Any]:
    """What is kept beside figures."""
    facts = describe_machine()
    return {
        "processor": facts["processor"],
        "vectors": facts["vectors"],
        "cores": len(_cores()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": facts["packages"],
        "commit": commit(),
    }


def _cores() -> range | set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def commit() -> str:
    """The commit of this source, with -dirty where files differ from it; empty where it is installed without one."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip()
