"""``python -m elman`` is ``elman``."""

from .cli import main

main()
