"""``python -m fastpix2pix.doctor``: what this machine can run, and whether it computes right."""

import importlib
import importlib.metadata
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastpix2pix import cli
from fastpix2pix.config import TrainConfig
from fastpix2pix.data import LoaderOptions, open_loader
from fastpix2pix.data.synthetic import synthetic_dataset
from fastpix2pix.errors import UserError
from fastpix2pix.graph import CapturedStep, set_float32_math
from fastpix2pix.kernels import launch
from fastpix2pix.models import build_networks
from fastpix2pix.precision import WORKING_TYPES, choose_precision
from fastpix2pix.selfcheck import TOLERANCE, disagreement, random_pairs
from fastpix2pix.step import TrainStep

STEPS = 20


@dataclass(frozen=True)
class DoctorConfig:
    """Check versions, kernels, the captured step and the loaders of this machine; exit code 0 if all pass."""

    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""


class Skipped(Exception):
    """A check that this machine cannot run; the message says why."""


def _on_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Skipped("no NVIDIA GPU")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def versions(device: torch.device) -> str:
    dali = _version("nvidia-dali-cuda120")
    text = f"Python {platform.python_version()}, torch {torch.__version__}"
    text += f", Triton {_version('triton')}, DALI {dali}"
    if device.type != "cuda":
        return f"{text}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    major, minor = torch.cuda.get_device_capability(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = (
        subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0] or "unknown"
    )
    name = torch.cuda.get_device_name(device)
    return f"{text}, CUDA {torch.version.cuda}, driver {driver}, {name} (sm_{major}{minor})"


def precisions(device: torch.device) -> str:
    return f"default {choose_precision(None, device)}"


def kernels_compile(device: torch.device) -> str:
    """In a process of its own: it takes a while, and must not depend on what this one has set."""
    if not launch.HAS_TRITON:
        raise Skipped("Triton is not installed")
    arch = "80"
    if device.type == "cuda":
        arch = "".join(map(str, torch.cuda.get_device_capability(device)))
    command = [sys.executable, "-m", "fastpix2pix.kernels.report", "--arch", arch, "--dtype", "bf16"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(done.stderr.strip().split("\n")[-1])
    return f"all compile for sm_{arch}"


def agrees_with_reference(device: torch.device, preset: str) -> str:
    _on_gpu(device)
    config = TrainConfig(preset=preset)
    config = replace(config, precision=choose_precision(None, device))
    set_float32_math(config.precision)
    difference = disagreement(config, device)
    assert difference <= TOLERANCE[config.precision], f"losses differ by {difference:.1e}"
    return f"{config.precision}, losses within {difference:.1e} of fp32 on the CPU"


def captured_equals_eager(device: torch.device) -> str:
    _on_gpu(device)
    config = replace(TrainConfig(), precision=choose_precision(None, device))
    dtype = WORKING_TYPES[config.precision]
    eager, captured = (TrainStep(*build_networks(config, device), config) for _ in range(2))
    replayed = CapturedStep(captured)
    worst = 0.0
    for source, target in random_pairs(config, STEPS):
        images = [image.to(device, dtype, memory_format=torch.channels_last) for image in (source, target)]
        expected, losses = torch.stack(eager(*images)), torch.stack(replayed(*images))
        worst = max(worst, ((losses - expected).abs() / expected.abs()).max().item())
    assert worst <= TOLERANCE[config.precision], f"losses differ by {worst:.1e} over {STEPS} steps"
    return f"{STEPS} steps, losses within {worst:.1e}"


def dropout_advances(device: torch.device) -> str:
    config = TrainConfig(netG="unet_32", crop_size=32, load_size=32, ngf=8, ndf=8, lr=0.0)
    step = TrainStep(*build_networks(config, device), config)
    run = CapturedStep(step) if device.type == "cuda" else step
    images = [image.to(device) for image in random_pairs(config, 1)[0]]
    fakes = []
    for _ in range(2):
        run(*images)
        fakes.append(step.fake.clone())
    assert not torch.equal(*fakes), "two steps dropped the same values"
    return "two steps on the same pair draw two masks"


def loaders_agree(device: torch.device) -> str:
    """DALI, on the GPU while a step is being captured where there is one, against the portable loader."""
    if _version("nvidia-dali-cuda120") == "absent":
        raise Skipped("DALI is not installed; the portable loader serves")
    with tempfile.TemporaryDirectory() as folder:
        root = synthetic_dataset(Path(folder) / "pairs", train=16, val=1, test=1)
        streams = {}
        loaders = {kind: open_loader(root, LoaderOptions(loader=kind, chunk=8), device=where)
                   for kind, where in (("dali", device), ("portable", torch.device("cpu")))}  # fmt: skip
        try:
            streams = {kind: loader.stream() for kind, loader in loaders.items()}
            next(streams["dali"])
            next(streams["portable"])
            if device.type == "cuda":
                captured_equals_eager(device)
            worst = 0.0
            for _ in range(15):
                ours, theirs = (next(stream) for stream in streams.values())
                worst = max(worst, (ours.source.cpu() - theirs.source).abs().mean().item() * 127.5)
        finally:
            for loader in loaders.values():
                loader.close()
    assert worst < 2, f"mean difference of {worst:.2f} grey levels"
    return f"DALI and the portable loader give the same samples, within {worst:.2f} grey levels on average"


CHECKS: dict[str, Callable[[torch.device], str]] = {
    "versions": versions,
    "precision": precisions,
    "kernels": kernels_compile,
    "step, tutorial": lambda device: agrees_with_reference(device, "tutorial"),
    "step, junyanz": lambda device: agrees_with_reference(device, "junyanz"),
    "captured step": captured_equals_eager,
    "dropout": dropout_advances,
    "loaders": loaders_agree,
}


def examine(config: DoctorConfig) -> None:
    """Print one line a check. Raises UserError, with the names of those that failed, if any did."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if config.device == "auto" else config.device)
    failed = []
    for name, check in CHECKS.items():
        try:
            outcome, detail = "PASS", check(device)
        except Skipped as reason:
            outcome, detail = "SKIP", str(reason)
        except Exception as error:  # whatever breaks in a check is its result
            outcome, detail = "FAIL", f"{type(error).__name__}: {error}".split("\n")[0]
            failed.append(name)
        print(f"{outcome}  {name:<15} {detail}", flush=True)
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; please report the lines above")


if __name__ == "__main__":
    cli.run(DoctorConfig, examine)
