"""Programs stay on the device of their inputs: tried on one that is not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fake_gpu.py")
CELLS = ["lstm with layer norm", "Tokens", "AttendsMasked", "Clockwork", "WeightNorm"]


def test_everything_is_computed_where_the_inputs_are() -> None:
    backends = pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(backends, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch cannot make up a device")
    done = subprocess.run([sys.executable, str(SCRIPT), *CELLS], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[:-1] == CELLS, done.stderr[-2000:]
