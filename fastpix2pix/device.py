"""Choosing the device, setting it once, and what it and the installed PyTorch can do together."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch

from fastpix2pix.errors import UserError

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")

VOLTA_BUILD = "the build for CUDA 12.6"
"""What PyTorch's install page calls the wheels that still carry code for sm_50 to sm_70."""


def choose_device(name: str) -> torch.device:
    """The device called ``name``, or for "auto" a GPU where there is one; a GPU becomes the current device.

    Everything that allocates, launches or captures later relies on that: Triton launches, streams and
    pinned copies go to the *current* GPU, whatever GPU their tensors are on.

    Raises UserError if there is no such device, or if this PyTorch has no code for it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: this machine has no such device; try cpu or auto") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UserError(f"--device {name}: this machine has no such device; try cpu or auto")
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: this machine has no such device; {why_no_gpu() or 'try cpu'}")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        names = ", ".join(f"cuda:{i}" for i in range(torch.cuda.device_count()))
        raise UserError(f"--device {name}: this machine has no such device; it has {names}")
    device = torch.device("cuda", index)
    check_build(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    torch.cuda.set_device(device)
    return device


def device_of_rank(name: str, local_rank: int, local_size: int) -> torch.device:
    """``choose_device`` for one of ``local_size`` processes on this machine: each has a GPU of its own.

    Raises UserError if ``name`` says which GPU, or if there are fewer of them, and as ``choose_device`` does.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        if name != "cuda":
            raise UserError(f"--device {name}: each of several processes has a GPU of its own; drop the flag")
        if torch.cuda.is_available() and torch.cuda.device_count() < local_size:
            raise UserError(
                f"--device cuda: {local_size} processes on this machine, which has "
                f"{torch.cuda.device_count()} GPUs; give torchrun as many as there are by --nproc_per_node"
            )
        name = f"cuda:{local_rank}"
    return choose_device(name)


def why_no_gpu() -> str | None:
    """Why PyTorch does not see the GPU that an NVIDIA driver serves here; None without such a driver."""
    if torch.cuda.is_available() or not NVIDIA_DRIVER.exists():
        return None
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is a build without CUDA; install one with CUDA to use the GPU"
    found = re.search(r"Kernel Module\D*(\d+[.\d]*)", NVIDIA_DRIVER.read_text(errors="replace"))
    driver = f"driver {found[1]}" if found else "the driver"
    return (
        f"PyTorch {torch.__version__} finds no usable GPU: {driver} may be too old for CUDA "
        f"{torch.version.cuda} (it needs {minimum_driver(torch.version.cuda)} or later); update the driver"
    )


def minimum_driver(cuda: str) -> int:
    """The oldest Linux driver of a CUDA release (NVIDIA, "CUDA Toolkit Release Notes", minor version
    compatibility): 525 for CUDA 12, 580 for CUDA 13."""
    return 525 if int(cuda.split(".")[0]) < 13 else 580


def has_code(builds: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether a PyTorch compiled for ``builds`` (``torch.cuda.get_arch_list()``) runs on this GPU.

    Machine code (sm_XY) runs on GPUs of its generation from its own minor version on; PTX (compute_XY) is
    compiled by the driver for every later GPU. Suffixed builds (sm_90a) are for that GPU alone.
    """
    for build in builds:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", build)
        if not found:
            continue
        major, minor = int(found[2]), int(found[3])
        if found[4]:
            if (major, minor) == capability:
                return True
        elif found[1] == "compute":
            if (major, minor) <= capability:
                return True
        elif major == capability[0] and minor <= capability[1]:
            return True
    return False


def check_build(gpu: str, capability: tuple[int, int]) -> None:
    """Raise UserError, naming the build to install, if this PyTorch has no code for the GPU."""
    builds = torch.cuda.get_arch_list()
    if has_code(builds, capability):
        return
    major, minor = capability
    remedy = f"install {VOLTA_BUILD}" if capability < (7, 5) else "install a newer PyTorch"
    raise UserError(
        f"{gpu} is sm_{major}{minor}, and PyTorch {torch.__version__} has code for {' '.join(builds)} only; "
        f"{remedy} (PyTorch's install page, Compute Platform)"
    )
