"""Results are data: JSON that says by itself on what, with what and from which commit it was measured."""

import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fastpix2pix.errors import UserError

FOLDER = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "nvidia-dali-cuda120")


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, commit and date; nothing that names the machine or its owner."""
    return {
        "device": device.type,
        "cpu": _cpu(),
        "gpu": _gpu() if device.type == "cuda" else None,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "system": platform.system(),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _cpu() -> dict[str, Any]:
    try:
        from cpuinfo import get_cpu_info  # comes with pytest-benchmark
    except ModuleNotFoundError as error:
        raise UserError('the benchmarks need their packages; pip install -e ".[bench]"') from error

    return {
        "name": get_cpu_info().get("brand_raw") or platform.machine(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        # Of the last minute: how many others wanted the cores.
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    } | _driver("driver_version", "power.limit", "power.draw", "clocks.sm", "clocks.mem")


def _driver(*fields: str) -> dict[str, str]:
    """What nvidia-smi says, where it is to be had; power and clocks are those of this moment."""
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(fields, answer.split(", "), strict=False))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """With a + where what is measured has been changed since."""
    measured = (":/fastpix2pix", ":/kernels", ":/benchmarks/*.py")
    try:
        return _git("rev-parse", "--short=12", "HEAD") + "+" * bool(
            _git("status", "--porcelain", "-uno", *measured)
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def rounded(value: Any) -> Any:
    """``value`` with every float in it cut to five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def save(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


def committed(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The results of the repository, in the order of their file names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
