"""Does this GPU compute what it should? The training step against its plain reference on the CPU.

``doctor`` runs this on demand, and training on a GPU runs it by itself before it starts.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastpix2pix.errors import UserError, is_out_of_memory
from fastpix2pix.kernels import language, launch
from fastpix2pix.models import PatchDiscriminator, UNetGenerator
from fastpix2pix.training.diagnosis import explain
from fastpix2pix.training.graph import CapturedStep
from fastpix2pix.training.options import Precision, StepOptions
from fastpix2pix.training.precision import WORKING_TYPES
from fastpix2pix.training.step import TrainStep

# Largest relative difference of a loss over CHECK_STEPS steps from fresh weights: room for another order of
# summation in fp32, and for the shorter significands of the others.
TOLERANCE: dict[Precision, float] = {"fp32": 1e-3, "tf32": 1e-2, "fp16": 2e-2, "bf16": 5e-2}
CHECK_STEPS = 2


class Networks(NamedTuple):
    """A pair of our networks; what they hold is not used, only what they are."""

    generator: UNetGenerator
    discriminator: PatchDiscriminator

    def fresh(self, seed: int = 0) -> "Networks":
        """Networks like these with newly drawn weights on the CPU, the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Networks(self.generator.fresh(), self.discriminator.fresh())


class Comparison(NamedTuple):
    """difference: largest relative difference of any loss. captured: whether the step that was compared ran
    from a CUDA graph; if that was asked for and failed, ``failure`` says why.
    """

    difference: float
    captured: bool
    failure: str | None = None


def random_pairs(
    count: int, size: int, *, batch_size: int = 1, channels: tuple[int, int] = (3, 3)
) -> list[tuple[Tensor, Tensor]]:
    """``count`` (source, target) of (batch_size, channels, size, size) on the CPU, uniform in [-1, 1], always
    the same."""
    random = torch.Generator().manual_seed(0)
    shape = (count, batch_size, sum(channels), size, size)
    images = torch.rand(shape, generator=random) * 2 - 1
    return [(source, target) for source, target in (pair.split(channels, dim=1) for pair in images)]


def compare_with_reference(
    networks: Networks, options: StepOptions, device: torch.device, *, size: int, graph: bool
) -> Comparison:
    """The step on ``device``, fused and (with ``graph``) captured, against the eager float32 step of the
    reference ops on the CPU: two steps on one image each, from fresh weights, dropout included.
    """
    channels = networks.generator.in_channels, networks.generator.out_channels
    pairs = random_pairs(CHECK_STEPS, size, channels=channels)
    plain = TrainStep(*networks.fresh(), replace(options, precision="fp32"))
    fresh = networks.fresh()
    step = TrainStep(fresh.generator.to(device), fresh.discriminator.to(device), options)
    run = CapturedStep(step) if graph else step
    worst = 0.0
    for source, target in pairs:
        expected = torch.stack(plain(source, target))
        dtype = WORKING_TYPES[options.precision]
        images = (image.to(device, dtype, memory_format=torch.channels_last) for image in (source, target))
        losses = torch.stack(run(*images)).cpu()
        worst = max(worst, ((losses - expected).abs() / expected.abs()).nan_to_num(float("inf")).max().item())
    failure = run.failure if isinstance(run, CapturedStep) else None
    return Comparison(worst, graph and failure is None, failure)


class Verified(NamedTuple):
    """What a device may train with. lost: what was given up and why, one line each."""

    graph: bool
    kernels: bool
    lost: tuple[str, ...]


def verify_or_fall_back(
    compare: Callable[[bool], Comparison],
    tolerance: float,
    *,
    graph: bool,
    say: Callable[[str], None] = print,
) -> Verified:
    """Find the fastest way of running the step that agrees with its reference, and say what was given up.

    compare: compares the step as the process is set up now, captured or not. Tried in turn: kernels in a
    graph; kernels alone; plain PyTorch in a graph; plain PyTorch. Whatever a try raises counts as a failure,
    so that no missing compiler or failed capture ends a training that a plainer way could run. Triton kernels
    are switched off for the whole process where they fail.

    Raises UserError when the GPU's memory does not hold the step, or when plain PyTorch disagrees too.
    """
    say("checking this GPU against the reference on the CPU: two steps on one image")
    began = time.perf_counter()
    lost: list[str] = []
    ways = [(True, True), (True, False), (False, True), (False, False)]
    had_kernels = launch.kernels_on_gpu and language.HAS_TRITON
    for kernels, captured in ways:
        if (captured and not graph) or (kernels and not had_kernels):
            continue
        launch.kernels_on_gpu = kernels
        name = f"the {'Triton kernels' if kernels else 'plain step'}{' in a CUDA graph' if captured else ''}"
        try:
            result = compare(captured)
        except Exception as error:
            if is_out_of_memory(error):
                raise UserError(
                    "the GPU's memory does not hold one step on one image; use a smaller --crop_size, --ngf "
                    "or --ndf, or end what else uses this GPU"
                ) from error
            lost.append(f"{name}: {explain(error)}")
            continue
        if not result.difference <= tolerance:
            lost.append(
                f"{name}: losses differ from the reference by {result.difference:.1e} "
                f"(allowed: {tolerance:.0e})"
            )
            continue
        if captured and not result.captured:
            lost.append(f"the CUDA graph: {result.failure}")
        graph_kept = captured and result.captured
        say(
            f"  losses agree within {result.difference:.1e} (allowed: {tolerance:.0e}), "
            f"{time.perf_counter() - began:.1f} s"
        )
        if lost:
            kept = "the Triton kernels" if kernels else "plain PyTorch"
            warnings.warn(
                f"training goes on with {kept}{' in a CUDA graph' if graph_kept else ''}, slower; given up: "
                f"{'; '.join(lost)}; please report what `python -m fastpix2pix.doctor` prints",
                RuntimeWarning,
                stacklevel=3,
            )
        return Verified(graph_kept, kernels, tuple(lost))
    raise UserError(
        f"this GPU does not compute what the CPU does, with plain PyTorch neither ({'; '.join(lost)}); train "
        "with --device cpu, and please report what `python -m fastpix2pix.doctor` prints"
    )
