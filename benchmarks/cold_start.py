"""One variant in a process of its own: when its first step is done, and how much memory it takes.

    python -m benchmarks.cold_start "tuned PyTorch"     (without a name: the fastest of ours)

Prints JSON: seconds from the start of this program, without Python's own, to the imports' end and to the
losses of the first step; peak memory after three steps in MB, on a GPU PyTorch's there, else the process's
beyond what it had after its imports.
"""

import time

BEGAN = time.perf_counter()

import json  # noqa: E402 (PyTorch's import takes seconds, which count)
import re  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

from benchmarks.timing import clock  # noqa: E402
from benchmarks.variants import RunningVariant, all_variants, our_variants  # noqa: E402
from benchmarks.workload import Workload  # noqa: E402

STEPS = 3


def _resident_peak() -> int:
    """Bytes of memory that this process has held at most."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts from the parent on
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main(name: str) -> None:
    imported = clock()
    device = _device()
    before = 0 if device.type == "cuda" else _resident_peak()
    variant = next(one for one in all_variants(device, compiled=True) if one.name == name)
    running = RunningVariant(variant, Workload(), device)
    running.step()
    first = clock()
    for _ in range(STEPS - 1):
        running.step()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident_peak()
    answer = {
        "imports_s": imported - BEGAN,
        "first_step_s": first - BEGAN,
        "peak_memory_mb": (peak - before) / 1e6,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else our_variants(_device())[-1].name)
