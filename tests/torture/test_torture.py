"""A small helping of ``python -m tests.torture``, which see."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, mounts and pipes of Linux")
def test_nothing_is_lost_whatever_happens():
    command = [sys.executable, "-m", "tests.torture", "--tries", "20", "--seed", "1"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout
    first_words = {line.split()[0] for line in ended.stdout.splitlines() if line}
    assert {"kills", "stops", "workers", "flips", "stalls"} <= first_words
