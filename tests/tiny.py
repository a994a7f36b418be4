"""The smallest training that has every part of the full one: a U-Net of five levels on 32x32 images."""

import torch

from fastpix2pix.config import TrainConfig
from fastpix2pix.models import build_networks
from fastpix2pix.training.step import TrainStep

TINY = {"netG": "unet_32", "crop_size": 32, "load_size": 36, "ngf": 8, "ndf": 8}


def tiny_config(**options) -> TrainConfig:
    """A whole configuration; ``options`` win."""
    return TrainConfig(**(TINY | options))


def step_of(config: TrainConfig, device: torch.device | str = "cpu") -> TrainStep:
    """A fresh step as ``config`` describes it, in fp32 unless it says otherwise."""
    return TrainStep(*build_networks(config.network_options(), device), config.step_options())


def random_images(count: int, config: TrainConfig, *, seed: int = 1) -> list[list[torch.Tensor]]:
    """``count`` pairs of (batch_size, 3, crop_size, crop_size) in [-1, 1], float32 and channels-last."""
    random = torch.Generator().manual_seed(seed)
    shape = (2, config.batch_size, 3, config.crop_size, config.crop_size)
    drawn = (torch.rand(shape, generator=random) * 2 - 1 for _ in range(count))
    return [[image.contiguous(memory_format=torch.channels_last) for image in pair] for pair in drawn]
