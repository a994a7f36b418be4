"""Train steps small enough for Triton's interpreter: both presets' networks, only narrower and shallower.

The tests that use them know nothing of how networks and steps are made, captured and read: it stands here.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastpix2pix.kernels import deep_conv, gan_loss, norm_act, tanh_l1
from fastpix2pix.models import PatchDiscriminator, UNetGenerator
from fastpix2pix.training import step as training_step
from fastpix2pix.training.graph import AsyncHostCopy, CapturedStep
from fastpix2pix.training.options import StepOptions
from fastpix2pix.training.precision import WORKING_TYPES
from fastpix2pix.training.step import TrainStep

if TYPE_CHECKING:
    import pytest


class SmallStep(NamedTuple):
    """A step, and images that it takes: (N, 3, size, size) in [-1, 1], in the step's type, channels last."""

    step: TrainStep
    source: Tensor
    target: Tensor


def small_step(
    preset: str,
    precision: str,
    *,
    size: int = 32,
    num_downs: int = 5,
    width: int = 4,
    batch: int = 1,
    norm: str = "batch",
    device: str | torch.device = "cpu",
    keep_gradients: bool = False,
) -> SmallStep:
    """A ``TrainStep`` of ``preset`` in ``precision``, with networks of ``width`` channels in their first
    layers and ``num_downs`` downsamplings, for ``batch`` images of ``size`` pixels a side.
    """
    torch.manual_seed(2)
    generator = UNetGenerator(preset, ngf=width, num_downs=num_downs, norm=norm).to(device)
    discriminator = PatchDiscriminator(preset, ndf=width, norm=norm).to(device)
    options = StepOptions(preset=preset, precision=precision)
    step = TrainStep(generator, discriminator, options, keep_gradients=keep_gradients)
    images = torch.rand(2, batch, 3, size, size) * 2 - 1
    source, target = (
        image.to(device, WORKING_TYPES[precision]).contiguous(memory_format=torch.channels_last)
        for image in images
    )
    return SmallStep(step, source, target)


def call_small_weights_large(monkeypatch: "pytest.MonkeyPatch") -> None:
    """Have weights of any size updated within the backward pass, and layers of few pixels called deep."""
    monkeypatch.setattr(training_step, "LARGE", 1)
    monkeypatch.setattr(deep_conv, "MIN_WEIGHTS", 1)


def launch_updates_alone(monkeypatch: "pytest.MonkeyPatch") -> None:
    """Have the other ops take their reference, which takes far less time than to interpret their kernels."""
    for op in (norm_act, gan_loss, tanh_l1):
        monkeypatch.setattr(op, "use_triton", lambda tensor: False)


def captured(step: TrainStep) -> CapturedStep:
    """``step`` as a run on a GPU takes it."""
    return CapturedStep(step)


def send_losses(step: TrainStep, count: int) -> AsyncHostCopy:
    """The losses of the newest ``count`` steps on their way to the host, as the loop reads them."""
    return AsyncHostCopy(step.last_losses(count))
