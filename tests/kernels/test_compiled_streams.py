"""The machine code of tanh_l1 and Adam: nothing spilled, full vectors wherever values lie side by side.

One older and one newer architecture; test_report.py has all of them, in its slow test.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastpix2pix.kernels import launch

pytestmark = pytest.mark.skipif(not launch.HAS_TRITON, reason="Triton is not installed")

SLICES = {"tanh_l1_forward_map"}
"""What these write is three channels of six, which no vector holds."""

SUMS = {"tanh_l1_sums"}
"""What these read fits in one cache line per thread or two."""


def test_streams_move_in_full_vectors(tmp_path: Path):
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "fastpix2pix.kernels.report", "--json", str(file)]
    command += [
        "--arch",
        "70",
        "100",
        "--dtype",
        "fp16",
        "fp32",
        "--layer",
        "256x256x3",
        "weight 512x512x4x4",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())
    kernels = {row["kernel"] for row in rows}
    assert kernels == SLICES | SUMS | {"tanh_l1_backward_map", "adam_update", "adam_mark_non_finite"}
    for row in rows:
        assert row["stack"] == 0, row
        if row["kernel"] not in SUMS:
            assert row["load_bits"] == 128, row
            writes_stream = row["kernel"] not in SLICES | {"adam_mark_non_finite"}
            assert row["store_bits"] == 128 or not writes_stream, row
            # At most 64 registers: half of an H100's warps or more.
            assert row["registers"] <= 64, row
