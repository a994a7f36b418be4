"""Does this machine compute what it should? The training step against its plain reference.

``doctor`` runs this on demand, and training on a GPU runs it by itself before it starts.
"""

import dataclasses
import warnings

import torch

from fastpix2pix.config import TrainConfig
from fastpix2pix.graph import CapturedStep
from fastpix2pix.kernels import launch
from fastpix2pix.models import build_networks
from fastpix2pix.precision import WORKING_TYPES
from fastpix2pix.step import TrainStep

# Largest relative difference of a loss over CHECK_STEPS steps from fresh weights: room for another order of
# summation in fp32, and for the shorter significands of the others.
TOLERANCE = {"fp32": 1e-3, "tf32": 1e-2, "fp16": 2e-2, "bf16": 5e-2}
CHECK_STEPS = 2


def random_pairs(config: TrainConfig, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """``count`` (source, target) of the run's shape on the CPU, uniform in [-1, 1], always the same."""
    random = torch.Generator().manual_seed(0)
    shape = (2, config.batch_size, 3, config.crop_size, config.crop_size)
    return [tuple((torch.rand(shape, generator=random) * 2 - 1).unbind()) for _ in range(count)]


def disagreement(config: TrainConfig, device: torch.device) -> float:
    """Largest relative difference of any loss between the step on ``device``, fused and (on a GPU) captured,
    and the eager float32 step of the reference ops on the CPU, dropout included.
    """
    inputs = random_pairs(config, CHECK_STEPS)
    cpu = torch.device("cpu")
    plain_config = dataclasses.replace(config, precision="fp32")
    plain = TrainStep(*build_networks(plain_config, cpu), plain_config)
    step = TrainStep(*build_networks(config, device), config)
    run = CapturedStep(step) if device.type == "cuda" and not config.no_graph else step
    worst = 0.0
    for source, target in inputs:
        expected = torch.stack(plain(source, target))
        images = (
            image.to(device, WORKING_TYPES[config.precision], memory_format=torch.channels_last)
            for image in (source, target)
        )
        losses = torch.stack(run(*images)).cpu()
        worst = max(worst, ((losses - expected).abs() / expected.abs()).nan_to_num(float("inf")).max().item())
    return worst


def verify_or_fall_back(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The configuration to train with on a GPU: ``config`` where the step agrees with its reference.

    Where it does not, warns, and gives up first the captured graph and then the Triton kernels.
    """
    tolerance = TOLERANCE[config.precision]
    if (difference := disagreement(config, device)) <= tolerance:
        return config
    eager = dataclasses.replace(config, no_graph=True)
    if not config.no_graph and disagreement(eager, device) <= tolerance:
        lost = "without a CUDA graph"
    else:
        launch.kernels_on_gpu = False
        lost = "without CUDA graph and Triton kernels"
    warnings.warn(
        f"on this GPU the fast step differs from the reference by {difference:.1e} (allowed: "
        f"{tolerance:.0e}); training goes on {lost}, slower; please report what "
        "`python -m fastpix2pix.doctor` prints",
        RuntimeWarning,
        stacklevel=2,
    )
    return eager
