"""elman: write the recurrence, get the kernel."""

from .recording import record
from .unfold import scan

__all__ = ["record", "scan"]
__version__ = "0.1.0"
