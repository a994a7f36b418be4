"""What is freed stays with the process, so that the next step need not map it again."""

import resource
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
from fastpix2pix.host_memory import keep_freed_memory

keep_freed_memory()
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts the page faults of Linux")
def test_large_blocks_are_not_mapped_again():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    faults = list(map(int, done.stdout.split()))
    if faults[0] < 2**26 / resource.getpagesize() / 2:
        pytest.skip("this system maps more than a page at a time")
    # Not from the second on: an aligned block needs a gap somewhat larger than the last one left.
    assert sum(faults[10:]) < faults[0] / 10
