"""The two networks of pix2pix, built from ``NetworkOptions``."""

from typing import Any

import torch
from torch import nn

from fastpix2pix.models.blocks import initialise
from fastpix2pix.models.discriminator import PatchDiscriminator
from fastpix2pix.models.generator import UNetGenerator
from fastpix2pix.models.options import NetworkOptions

__all__ = ["NetworkOptions", "PatchDiscriminator", "UNetGenerator", "build_generator", "build_networks"]


def build_generator(options: NetworkOptions) -> UNetGenerator:
    """A freshly initialised generator on the CPU, the same for the same seed."""
    torch.manual_seed(options.seed)
    dropout: dict[str, Any] = {"dropout": 0.0} if options.no_dropout else {}
    generator = UNetGenerator(
        options.preset,
        options.input_nc,
        options.output_nc,
        ngf=options.ngf,
        num_downs=options.num_downs,
        norm=options.norm,
        seed=options.seed,
        **dropout,
    )
    _initialise(generator, options)
    return generator


def _initialise(network: nn.Module, options: NetworkOptions) -> None:
    """Draw the weights again where they are not to be those that every network is made with."""
    if (options.init_type, options.init_gain) != (NetworkOptions.init_type, NetworkOptions.init_gain):
        initialise(network, options.init_type, options.init_gain)


def build_networks(
    options: NetworkOptions, device: torch.device | str = "cpu"
) -> tuple[UNetGenerator, PatchDiscriminator]:
    """Freshly initialised networks, the same for the same seed on every device."""
    generator = build_generator(options)
    discriminator = PatchDiscriminator(
        options.preset,
        options.input_nc + options.output_nc,
        ndf=options.ndf,
        n_layers=options.n_layers_D,
        norm=options.norm,
    )
    _initialise(discriminator, options)
    return generator.to(device), discriminator.to(device)
