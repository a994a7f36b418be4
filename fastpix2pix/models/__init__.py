"""The two networks of pix2pix, built from ``NetworkOptions``."""

from typing import Any

import torch

from fastpix2pix.models.discriminator import PatchDiscriminator
from fastpix2pix.models.generator import UNetGenerator
from fastpix2pix.models.options import NetworkOptions

__all__ = ["NetworkOptions", "PatchDiscriminator", "UNetGenerator", "build_generator", "build_networks"]


def build_generator(options: NetworkOptions) -> UNetGenerator:
    """A freshly initialised generator on the CPU, the same for the same seed."""
    torch.manual_seed(options.seed)
    dropout: dict[str, Any] = {"dropout": 0.0} if options.no_dropout else {}
    return UNetGenerator(
        options.preset,
        ngf=options.ngf,
        num_downs=options.num_downs,
        norm=options.norm,
        seed=options.seed,
        **dropout,
    )


def build_networks(
    options: NetworkOptions, device: torch.device | str = "cpu"
) -> tuple[UNetGenerator, PatchDiscriminator]:
    """Freshly initialised networks, the same for the same seed on every device."""
    generator = build_generator(options)
    discriminator = PatchDiscriminator(
        options.preset, ndf=options.ndf, n_layers=options.n_layers_D, norm=options.norm
    )
    return generator.to(device), discriminator.to(device)
