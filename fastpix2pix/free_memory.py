"""How much memory this process can still take: of the machine, of its container, of its own limits."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch


def free_memory(device: torch.device, root: Path = Path("/")) -> tuple[float, str]:
    """Bytes that this process can still take on ``device``, infinite where nobody says, and who sets that
    limit. root: where Linux' /proc and /sys are."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept), torch.cuda.get_device_name(device)
    found = [
        (math.inf, "this machine"),
        *((left, "this machine") for left in _of_the_machine(root / "proc")),
        *((left, "this container (cgroup)") for left in _of_cgroups(root)),
        *((left, "the limit of this process (ulimit)") for left in _of_limits(root / "proc" / "self")),
    ]
    return min(found, key=lambda one: one[0])


def _of_the_machine(proc: Path) -> Iterator[float]:
    fields = _fields(proc / "meminfo")
    if "MemAvailable" in fields:
        yield 1024.0 * (fields["MemAvailable"] + fields.get("SwapFree", 0))


def _of_cgroups(root: Path) -> Iterator[float]:
    """Of the process's control group and of all above it, version 2 or 1."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, limit, usage, cached = "", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit, usage = "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        top = root / "sys/fs/cgroup" / mount
        group = top / path.strip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(top))):
            most, used = _read(folder / limit).strip(), _read(folder / usage).strip()
            if most.isdigit() and used.isdigit():
                freed = _fields(folder / "memory.stat").get(cached, 0)  # pages of files are given back
                yield max(0.0, float(most) - int(used) + freed)


def _of_limits(process: Path) -> Iterator[float]:
    used = _fields(process / "status")
    for name, field in (("Max address space", "VmSize"), ("Max data size", "VmData")):
        found = re.search(rf"^{name} +(\d+) ", _read(process / "limits"), re.MULTILINE)
        if found and field in used:
            yield max(0.0, float(found[1]) - 1024 * used[field])


def _fields(path: Path) -> dict[str, int]:
    """The lines of a file of numbers: a name, perhaps a colon, the number, perhaps a unit."""
    return {name: int(number) for name, number in re.findall(r"^(\w+):?\s+(\d+)", _read(path), re.MULTILINE)}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def in_words(size: float) -> str:
    """Bytes, for people."""
    if size >= 2**60:
        return f"10^{math.log10(size) - 9:.0f} GiB"
    number, unit = (size / 2**30, "GiB") if size >= 2**30 else (size / 2**20, "MiB")
    return f"{number:.3g} {unit}" if number < 1000 else f"{number:.0f} {unit}"
