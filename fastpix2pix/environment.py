"""What a run runs on: the record that stands beside what was asked for."""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch

import fastpix2pix

PACKAGES = {"triton": "triton", "dali": "nvidia-dali-cuda120", "numpy": "numpy"}
FILE = "environment.json"


def version(package: str) -> str | None:
    """Of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Of everything that decides how a step is computed."""
    return {
        "fastpix2pix": fastpix2pix.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a plain string, which a checkpoint may hold
        "cuda": torch.version.cuda,
        **{name: version(package) for name, package in PACKAGES.items()},
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or what vector instructions PyTorch uses on the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.backends.cpu.get_cpu_capability()}"


def describe(device: torch.device, resolved: dict[str, Any]) -> dict:
    """The environment block of a run: device and versions, and what was ``resolved`` on them."""
    return {
        **resolved,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def verified_before(saved: dict | None, device: torch.device, precision: str, *, graph: bool) -> bool:
    """Whether the environment block of a checkpoint is of this kind of device, these versions and this
    precision, with nothing given up: then the self-check has passed here."""
    if saved is None:
        return False
    now = {"device_name": device_name(device), "precision": precision, "versions": versions()}
    captured = saved.get("cuda_graph") == "yes" or not graph
    return (
        captured
        and saved.get("kernels") == "Triton"
        and all(saved.get(name) == value for name, value in now.items())
    )


def save(environment: dict, run_folder: Path) -> None:
    """Write the block into the run's folder."""
    (run_folder / FILE).write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")


def read(run_folder: Path) -> dict | None:
    """The block in a run's folder, or None where there is none that can be read."""
    try:
        found = json.loads((run_folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
