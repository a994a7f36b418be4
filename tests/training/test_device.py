"""Which device is taken, which GPU this PyTorch serves, and how float32 is computed; GPUs are played."""

import subprocess
import sys

import pytest
import torch

from fastpix2pix import device as devices
from fastpix2pix.device import check_build, choose_device, has_code, why_no_gpu
from fastpix2pix.errors import UserError

CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs of a name and capability; ``current`` holds the index of the current one."""
    current = [0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.__setitem__(0, device.index))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(CU130))
    return current


@pytest.mark.parametrize(("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_the_chosen_gpu_is_the_current_one_and_has_its_index(gpus, name, index):
    assert choose_device(name) == torch.device("cuda", index)
    assert gpus == [index]


def test_cuda_means_the_current_gpu(gpus):
    gpus[0] = 1
    assert choose_device("auto") == torch.device("cuda:1")


def test_absent_devices(gpus, monkeypatch):
    for name, line in {
        "cuda:2": "--device cuda:2: this machine has no such device; it has cuda:0, cuda:1",
        "warp": "--device warp: this machine has no such device; try cpu or auto",
        "meta": "--device meta: this machine has no such device; try cpu or auto",
    }.items():
        with pytest.raises(UserError) as error:
            choose_device(name)
        assert str(error.value) == line
    assert gpus == [0]


@pytest.mark.parametrize(
    ("builds", "capability", "served"),
    [
        (CU130, (7, 0), False),  # Volta
        (CU126, (7, 0), True),
        (CU130, (7, 5), True),
        (CU126, (8, 9), True),  # Ada runs the machine code of sm_86
        (CU126, (10, 0), False),  # Blackwell runs none of Hopper's
        (CU130, (10, 0), True),
        (CU130, (10, 3), True),
        (CU130, (12, 1), True),
        (["sm_90a"], (9, 0), True),
        (["sm_90a"], (9, 1), False),
        (["sm_80", "compute_90"], (12, 0), True),  # the driver compiles PTX for what is newer
        (["sm_86"], (8, 0), False),  # not for an older minor version
        ([], (8, 0), False),
    ],
)
def test_which_builds_serve_which_gpu(builds, capability, served):
    """NVIDIA, "CUDA C++ Programming Guide", binary and PTX compatibility."""
    assert has_code(builds, capability) == served


def test_a_gpu_without_code_is_named_with_the_build_to_install(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(CU130))
    with pytest.raises(UserError) as error:
        check_build("Tesla V100-SXM2-16GB", (7, 0))
    assert "Tesla V100-SXM2-16GB is sm_70" in str(error.value)
    assert "install the build for CUDA 12.6" in str(error.value)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    with pytest.raises(UserError, match="sm_130, and PyTorch .* sm_80 sm_90 only; install a newer PyTorch"):
        check_build("some later GPU", (13, 0))


def test_a_gpu_that_pytorch_does_not_see_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "NVIDIA_DRIVER", tmp_path / "version")
    assert why_no_gpu() is None
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.90.07  Fri May 31\nGCC version: 12\n"
    )
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is a build without CUDA; install one with CUDA" in why_no_gpu()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "driver 550.90.07 may be too old for CUDA 13.0 (it needs 580 or later)" in why_no_gpu()
    with pytest.raises(UserError, match="driver 550.90.07 may be too old"):
        choose_device("cuda")


# ----------------------------------------------------------------------------------------------- float32


INTERFACES = {
    "untouched": "",
    "legacy": "torch.backends.cudnn.allow_tf32 = {on}",
    "new": "torch.backends.cudnn.conv.fp32_precision = {new!r}",
    "new for all": "torch.backends.fp32_precision = {new!r}",
}


@pytest.mark.parametrize("interface", INTERFACES)
@pytest.mark.parametrize("on", [True, False])
def test_tf32_through_either_interface(interface, on):
    """A host that used one interface can read and set the other after us; in a process of its own, as these
    settings are the process's."""
    if "new" in interface and not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip("PyTorch before 2.9 has one interface")
    host = INTERFACES[interface].format(on=on, new="tf32" if on else "ieee")
    # PyTorch's default is tf32; what a setting for all means for convolutions differs between its versions.
    started = {"untouched": True, "new for all": None}.get(interface, on)
    program = f"""
import torch
from fastpix2pix.kernels.deep_conv import float32_convolutions_use_tf32
from fastpix2pix.training.precision import set_float32_math
{host}
assert {started!r} in (None, float32_convolutions_use_tf32())
for precision in ("tf32", "fp32", "bf16", "tf32"):
    set_float32_math(precision)
    tf32 = precision == "tf32"
    assert float32_convolutions_use_tf32() == tf32
    assert torch.backends.cudnn.allow_tf32 == tf32  # the older interface can be read
    assert torch.backends.cuda.matmul.allow_tf32 == tf32
    if hasattr(torch.backends.cudnn, "conv"):
        assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if tf32 else "ieee")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
