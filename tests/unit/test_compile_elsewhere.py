"""The delta rule compiles for GPUs other than Hopper, and fits their shared memory. Nothing was run on these."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
# Triton's interpreter, which other tests run in, is chosen when a kernel is defined.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
SHARED = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}  # bytes that a block may ask for
KERNELS = {
    "solve_kernel",
    "products_kernel",
    "leading_products_kernel",
    "_chain_kernel",
    "chains_kernel",
    "scores_kernel",
    "dk_kernel",
    "dq_kernel",
}


@pytest.mark.parametrize(("capability", "dim"), [(80, 128), (89, 256), (90, 128), (100, 128), (100, 64), (120, 128)])
def test_settings_fit(capability: int, dim: int):
    command = [sys.executable, "-m", "tests.compile_rule", str(capability), str(dim)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found.keys() >= KERNELS
    assert ("borders_kernel" in found) == (dim <= 128)
    assert max(map(max, found.values())) <= SHARED[capability]
