"""``elman bench`` with its result kept where the documentation is made from: benchmarks/results/kernels.json.

    python benchmarks/kernels.py [options of elman bench]

Without options everything is measured, which takes about fifteen minutes; a part of it is printed, and kept only where
--out says so. ``python benchmarks/pages.py`` then writes the tables of README.md and the picture anew.
"""

from __future__ import annotations

import sys
from pathlib import Path

from elman.cli import main

RESULT = Path(__file__).resolve().parent / "results" / "kernels.json"

if __name__ == "__main__":
    given = sys.argv[1:]
    main(["bench", *(given or ["--out", str(RESULT)])])
