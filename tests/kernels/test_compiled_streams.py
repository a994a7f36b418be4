"""The machine code of tanh_l1 and Adam: nothing spilled, full vectors wherever values lie side by side.

One older and one newer architecture; test_compile_report.py has all of them, in its slow test.
"""

import json
import re
import subprocess
import sys

import pytest

from fastpix2pix.kernels.language import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

SLICES = {"tanh_l1_forward_map"}
"""What these write is three channels of six, which no vector holds."""

SUMS = {"tanh_l1_sums"}
"""What these read fits in one cache line per thread or two."""

ADAM = {"adam_update", "adam_mark_non_finite"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Of the launches of both networks, as their weights are grouped."""
    file = tmp_path_factory.mktemp("report") / "rows.json"
    command = [sys.executable, "-m", "fastpix2pix.kernels.report", "--json", str(file)]
    command += ["--arch", "70", "100", "--dtype", "fp16", "fp32", "--layer", "tanh_l1", *ADAM]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


def values(row: dict) -> int:
    """Elements that an Adam launch works on."""
    return int(re.search(r"(\d+) values", row["label"])[1])


def test_streams_move_in_full_vectors(rows):
    assert {row["kernel"] for row in rows} == SLICES | SUMS | ADAM | {"tanh_l1_backward_map"}
    for row in rows:
        assert row["stack"] == 0, row
        if row["kernel"] in SUMS or (row["kernel"] in ADAM and values(row) % 16):
            continue
        assert row["load_bits"] == 128, row
        writes_stream = row["kernel"] not in SLICES | {"adam_mark_non_finite"}
        assert row["store_bits"] == 128 or not writes_stream, row
        # At most 64 registers: half of an H100's warps or more.
        assert row["registers"] <= 64, row


def test_only_the_last_biases_are_updated_without_vectors(rows):
    """They have 3 values and 1. In a launch with others, they would cost those their vectors too."""
    rows = [row for row in rows if row["kernel"] in ADAM]
    assert {values(row) for row in rows if row["load_bits"] < 128} == {1, 3}
    assert {values(row) for row in rows if values(row) % 16} == {1, 3}
    assert len({row["label"] for row in rows if "tensors" in row["label"]}) >= 4


def test_adam_converts_no_layouts(rows):
    """Results go to memory from the threads that computed them, not through shared memory."""
    updates = [row for row in rows if row["kernel"] == "adam_update"]
    assert updates and all(row["conversions"] == row["shared"] == 0 for row in updates)
