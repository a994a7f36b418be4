"""``python -m fastpix2pix.doctor``: what this machine can run, and whether it computes right."""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import torch

from fastpix2pix import cli, environment
from fastpix2pix.data import LoaderOptions, open_loader
from fastpix2pix.data.synthetic import synthetic_dataset
from fastpix2pix.device import choose_device, why_no_gpu
from fastpix2pix.errors import UserError
from fastpix2pix.full_checkup import full_checkup
from fastpix2pix.kernels import language
from fastpix2pix.models import NetworkOptions, build_networks
from fastpix2pix.presets import PresetName
from fastpix2pix.training.diagnosis import explain
from fastpix2pix.training.options import StepOptions
from fastpix2pix.training.precision import choose_precision, set_float32_math
from fastpix2pix.training.prepare import PreparedStep, prepare_step
from fastpix2pix.training.selfcheck import TOLERANCE, Networks, compare_with_reference, random_pairs

SIZE = 256
STEPS = 20


@dataclass(frozen=True)
class DoctorConfig:
    """Check versions, kernels, the captured step and the loaders of this machine; exit code 0 if all pass."""

    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""
    full: bool = False
    """Also run the GPU tests, the benchmarks and the comparison with plain PyTorch, ten minutes in all, and
    write everything to OUTPUT. Needs a clone, with its extras test and bench."""
    output: Path = Path("doctor.json")
    """The file of --full, to be attached to an issue. It names no folder of this machine."""


class Skipped(Exception):
    """A check that this machine cannot run; the message says why."""


def _on_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Skipped("no NVIDIA GPU")


def versions(device: torch.device) -> str:
    found = environment.versions()
    text = f"Python {found['python']}, torch {found['torch']}"
    text += f", Triton {found['triton'] or 'absent'}, DALI {found['dali'] or 'absent'}"
    if device.type != "cuda":
        why = f"; {reason}" if (reason := why_no_gpu()) else ""
        return f"{text}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}{why}"
    major, minor = torch.cuda.get_device_capability(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
    except OSError:  # containers need not have it
        driver = ""
    name = torch.cuda.get_device_name(device)
    return f"{text}, CUDA {found['cuda']}, driver {driver or 'unknown'}, {name} (sm_{major}{minor})"


def precisions(device: torch.device) -> str:
    return f"default {choose_precision(None, device)}"


def kernels_compile(device: torch.device) -> str:
    """In a process of its own: it takes a while, and must not depend on what this one has set."""
    if not language.HAS_TRITON:
        raise Skipped("Triton is not installed")
    arch = "80"
    if device.type == "cuda":
        arch = "".join(map(str, torch.cuda.get_device_capability(device)))
    command = [sys.executable, "-m", "fastpix2pix.kernels.report", "--arch", arch, "--dtype", "bf16"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(done.stderr.strip().split("\n")[-1])
    return f"all compile for sm_{arch}"


def agrees_with_reference(device: torch.device, preset: PresetName) -> str:
    _on_gpu(device)
    precision = choose_precision(None, device)
    set_float32_math(precision)
    networks = Networks(*build_networks(NetworkOptions(preset=preset)))
    options = StepOptions(preset=preset, precision=precision)
    result = compare_with_reference(networks, options, device, size=SIZE, graph=True)
    assert result.difference <= TOLERANCE[precision], f"losses differ by {result.difference:.1e}"
    assert result.captured, f"not captured in a CUDA graph: {result.failure}"
    return f"{precision}, captured, losses within {result.difference:.1e} of fp32 on the CPU"


def _step(
    device: torch.device, options: StepOptions, networks: NetworkOptions, *, graph: bool
) -> PreparedStep:
    return prepare_step(*build_networks(networks), options, device, image_size=SIZE, graph=graph, check=False)


def captured_equals_eager(device: torch.device) -> str:
    _on_gpu(device)
    precision = choose_precision(None, device)
    options = StepOptions(precision=precision)
    eager, replayed = (_step(device, options, NetworkOptions(), graph=graph) for graph in (False, True))
    worst = 0.0
    for source, target in random_pairs(STEPS, SIZE):
        images = [
            image.to(device, eager.dtype, memory_format=torch.channels_last) for image in (source, target)
        ]
        expected, losses = torch.stack(eager.run(*images)), torch.stack(replayed.run(*images))
        worst = max(worst, ((losses - expected).abs() / expected.abs()).max().item())
    captured = replayed.resolved()["cuda_graph"]
    assert captured == "yes", f"not captured: {captured}"
    assert worst <= TOLERANCE[precision], f"losses differ by {worst:.1e} over {STEPS} steps"
    return f"{STEPS} replays and eager steps, losses within {worst:.1e}"


def dropout_advances(device: torch.device) -> str:
    small = NetworkOptions(netG="unet_32", ngf=8, ndf=8)
    prepared = _step(device, StepOptions(lr=0.0, precision="fp32"), small, graph=True)
    images = [image.to(device) for image in random_pairs(1, 32)[0]]
    fakes = []
    for _ in range(2):
        prepared.run(*images)
        assert prepared.step.fake is not None
        fakes.append(prepared.step.fake.clone())
    assert not torch.equal(*fakes), "two steps dropped the same values"
    return "two steps on the same pair draw two masks"


def loaders_agree(device: torch.device) -> str:
    """DALI, on the GPU where there is one, against the portable loader."""
    if environment.versions()["dali"] is None:
        raise Skipped("DALI is not installed; the portable loader serves")
    with tempfile.TemporaryDirectory() as folder:
        root = synthetic_dataset(Path(folder) / "pairs", train=16, val=1, test=1)
        with ExitStack() as stack:
            streams = []
            for kind, where in (("dali", device), ("portable", torch.device("cpu"))):
                loader = open_loader(root, LoaderOptions(loader=kind, chunk=8), device=where)
                streams.append(stack.enter_context(closing(loader)).stream())
            worst = 0.0
            for _ in range(16):
                ours, theirs = (next(stream) for stream in streams)
                worst = max(worst, (ours.source.cpu() - theirs.source).abs().mean().item() * 127.5)
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
    device = choose_device(config.device)
    results = []
    for name, check in CHECKS.items():
        try:
            outcome, detail = "PASS", check(device)
        except Skipped as reason:
            outcome, detail = "SKIP", str(reason)
        except Exception as error:  # whatever breaks in a check is its result
            outcome, detail = "FAIL", explain(error)
        results.append({"check": name, "outcome": outcome, "detail": detail})
        print(f"{outcome}  {name:<15} {detail}", flush=True)
    if config.full:
        full_checkup(results, environment.versions(), config.output)
    if failed := [result["check"] for result in results if result["outcome"] == "FAIL"]:
        raise UserError(f"failed: {', '.join(failed)}; please report the lines above")


def main(argv: list[str] | None = None) -> None:
    cli.run(DoctorConfig, examine, argv)


if __name__ == "__main__":
    main()
