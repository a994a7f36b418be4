"""The machine code of tanh_l1 and Adam: nothing spilled, full vectors wherever values lie side by side.

One older and one newer architecture, a sample of Adam's launches; the slow test has all of them.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastpix2pix.kernels.language import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

SLICES = {"tanh_l1_forward_map"}
"""What these write is three channels of six, which no vector holds."""

SUMS = {"tanh_l1_sums"}
"""What these read fits in one cache line per thread or two."""

ADAM = {"adam_update", "adam_mark_non_finite"}

LAYERS = (
    "tanh_l1",
    "tutorial 4194304 values",  # a large weight
    "tutorial 33 tensors",  # all small ones of the generator, in fp32
    "tutorial 29 tensors",  # those that stay in fp32 in a 16-bit generator, its last bias among them
    "tutorial 3 values",  # its last bias
)


def compiled(file: Path, *arguments: str) -> list[dict]:
    command = [sys.executable, "-m", "fastpix2pix.kernels.report", "--json", str(file), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


def values(row: dict) -> int:
    """Elements that an Adam launch works on."""
    return int(re.search(r"(\d+) values", row["label"])[1])


def check(rows: list[dict]) -> None:
    assert {row["kernel"] for row in rows} == SLICES | SUMS | ADAM | {"tanh_l1_backward_map"}
    odd = [row for row in rows if row["kernel"] in ADAM and values(row) % 16]
    assert all(values(row) < 2**14 for row in odd), "the last biases, alone or with the norms' parameters"
    for row in rows:
        assert row["stack"] == 0, row
        if row["kernel"] not in SUMS and row not in odd:
            assert row["load_bits"] == 128, row
            writes_stream = row["kernel"] not in SLICES | {"adam_mark_non_finite"}
            assert row["store_bits"] == 128 or not writes_stream, row
            # At most 64 registers: half of an H100's warps or more.
            assert row["registers"] <= 64, row
        if row["kernel"] == "adam_update":
            # Results go to memory from the threads that computed them, not through shared memory.
            assert row["conversions"] == row["shared"] == 0, row


def test_streams_move_in_full_vectors(tmp_path):
    rows = compiled(
        tmp_path / "rows.json", "--arch", "70", "100", "--dtype", "bf16", "fp16", "fp32", "--layer", *LAYERS
    )
    check(rows)
    assert all(any(layer in f"{row['kernel']} {row['label']}" for row in rows) for layer in LAYERS)


@pytest.mark.slow
def test_streams_move_in_full_vectors_on_all_gpus(tmp_path):
    check(compiled(tmp_path / "rows.json", "--layer", "tanh_l1", *ADAM))
