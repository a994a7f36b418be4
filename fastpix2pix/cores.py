"""How many CPU cores a process may use, and how much of them it gets."""

import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

CROWDED = 0.6
"""The share of its threads' time below which a training on a CPU is told to use fewer: all threads wait for
the slowest at the end of each operator. Not measured; what is single-threaded in a step costs some too."""


def usable_cores(root: Path = Path("/")) -> int:
    """Whole cores that the affinity mask and the CPU quotas of control groups leave this process, at least 1.

    A container's quota (``docker run --cpus``, a Kubernetes limit) is not in the affinity mask. It is
    rounded down: beyond it the kernel stops all threads at once until the next period. root: where /proc
    and /sys are.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(math.floor(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """The quotas, in cores, of this process's control groups and of all groups that those are in.

    Version 2 has one file, "QUOTA PERIOD" or "max PERIOD"; version 1 has two, and a quota of -1 for none.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().split()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = mount / path.strip("/")
        # Seen from inside a container, the path may be the host's: then only the mount itself is there.
        for folder in (group, *group.parents):
            quota = _numbers(folder / "cpu.max") or (
                _numbers(folder / "cpu.cfs_quota_us") + _numbers(folder / "cpu.cfs_period_us")
            )
            if len(quota) == 2 and quota[0] > 0 and quota[1] > 0:
                yield quota[0] / quota[1]
            if folder == mount:
                break


def _numbers(file: Path) -> list[float]:
    """Of a control file; none where it is missing or says "max"."""
    try:
        return [float(word) for word in file.read_text().split()]
    except (OSError, ValueError):
        return []


def use_threads(asked: int | None) -> None:
    """Compute on the CPU with ``asked`` threads; by default with PyTorch's choice, which OMP_NUM_THREADS
    overrules, but with no more than the usable cores."""
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()) if asked is None else asked)


def loader_threads(wanted: int) -> int:
    """How many of ``wanted`` decoding threads to use beside a step that computes on the CPU: half the cores.

    A step there takes the time of a hundred decodings, and threads that take a core away from it hold up all
    of its own.
    """
    return min(wanted, max(1, usable_cores() // 2))


class CoreShare:
    """How much of the time of ``threads`` threads this process has got since it began to watch."""

    def __init__(
        self,
        threads: int,
        *,
        wall: Callable[[], float] = time.perf_counter,
        cpu: Callable[[], float] = time.process_time,
    ):
        self._threads, self._wall, self._cpu = threads, wall, cpu
        self._wall_began, self._cpu_began = wall(), cpu()

    def advice(self) -> str | None:
        """One line when something else uses the cores; None when all is well."""
        wall, cpu = self._wall() - self._wall_began, self._cpu() - self._cpu_began
        got = cpu / wall if wall > 0 else self._threads
        if self._threads == 1 or got >= CROWDED * self._threads:
            return None
        return (
            f"this machine is busy: {self._threads} threads get the time of {got:.1f} cores; "
            f"--threads {max(1, math.floor(got))} may be faster"
        )
