"""What is freed stays with the process, so that the next step need not map it again; in huge pages."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says about memory")

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

PROGRAM = """
import resource
import torch
from pathlib import Path
from fastpix2pix.host_memory import keep_freed_memory

{keep}
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = torch.ones(2**24)  # 64 MiB
    del block
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
block = torch.ones(2**24)
print(Path("/proc/self/smaps_rollup").read_text())
"""


def page_faults_and_memory(keep: str, **limits) -> tuple[list[int], str]:
    command = [sys.executable, "-c", PROGRAM.format(keep=keep)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, **limits)
    *faults, memory = done.stdout.split("\n", 20)
    return list(map(int, faults)), memory


@pytest.fixture(scope="module")
def kept() -> tuple[list[int], str]:
    return page_faults_and_memory("keep_freed_memory()")


def test_large_blocks_are_not_mapped_again(kept):
    mapped_again, _ = page_faults_and_memory("")
    # Not from the second on: an aligned block needs a gap somewhat larger than the last one left.
    assert sum(kept[0][10:]) < sum(mapped_again[10:]) / 10


IN_A_THREAD = """
import resource
from concurrent.futures import ThreadPoolExecutor
import torch
from fastpix2pix.host_memory import keep_freed_memory

keep_freed_memory()
with ThreadPoolExecutor(1) as loader:
    blocks = None
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = loader.submit(lambda: [torch.ones(3 * 2**20) for _ in range(2)]).result()  # 12 MiB each
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_nor_are_those_of_another_thread():
    """The loader's batches are made in one."""
    done = subprocess.run([sys.executable, "-c", IN_A_THREAD], capture_output=True, text=True, check=True)
    faults = [int(line) for line in done.stdout.split()]
    assert sum(faults[3:]) < 6144  # the pages of 24 MiB: the first three rounds may be new memory


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="no transparent huge pages"
)
def test_large_blocks_lie_in_huge_pages(kept):
    assert int(re.search(r"AnonHugePages:\s+(\d+) kB", kept[1])[1]) >= 60 * 1024


def test_a_limit_of_the_process_does_no_harm():
    def limit():
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))  # less than the heap would grow by

    faults, _ = page_faults_and_memory("keep_freed_memory()", preexec_fn=limit)
    assert sum(faults[10:]) < 1000
