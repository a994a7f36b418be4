"""What two networks are built from, as plain values."""

from dataclasses import dataclass
from math import isfinite
from typing import Literal, get_args

from fastpix2pix.errors import UserError
from fastpix2pix.presets import PresetName, find_preset

GeneratorName = Literal["unet_32", "unet_64", "unet_128", "unet_256", "unet_512"]
Norm = Literal["batch", "instance"]
InitType = Literal["normal", "xavier", "kaiming", "orthogonal"]

GENERATOR_DEPTHS = {"unet_32": 5, "unet_64": 6, "unet_128": 7, "unet_256": 8, "unet_512": 9}
"""Downsamplings of each U-Net, which is named by the image size that it takes down to 1x1."""


MOST_LAYERS = 16
"""Of the discriminator; so many need images of 262144 pixels a side."""


@dataclass(frozen=True)
class NetworkOptions:
    """Architecture of both networks and the seed of their weights; names as on the command line.

    Raises UserError, which calls fields by their flags, for a value that no network has.
    """

    preset: PresetName = "tutorial"
    netG: GeneratorName = "unet_256"  # noqa: N815
    ngf: int = 64
    ndf: int = 64
    n_layers_D: int = 3  # noqa: N815
    norm: Norm = "batch"
    input_nc: int = 3
    output_nc: int = 3
    no_dropout: bool = False
    init_type: InitType = "normal"
    init_gain: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        find_preset(self.preset)
        if self.netG not in GENERATOR_DEPTHS:
            raise UserError(f"--netG {self.netG}: unknown; choose one of {', '.join(GENERATOR_DEPTHS)}")
        for field in ("ngf", "ndf", "n_layers_D", "input_nc", "output_nc"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"--{field} {value}: give a whole number of at least 1")
        if self.n_layers_D > MOST_LAYERS:
            raise UserError(f"--n_layers_D {self.n_layers_D}: give a number of at most {MOST_LAYERS}")
        if self.norm not in ("batch", "instance"):
            raise UserError(f"--norm {self.norm}: choose batch or instance")
        if self.init_type not in get_args(InitType):
            raise UserError(f"--init_type {self.init_type}: choose one of {', '.join(get_args(InitType))}")
        if not (isfinite(self.init_gain) and self.init_gain >= 0):
            raise UserError(f"--init_gain {self.init_gain}: give a finite number of at least 0")

    @property
    def num_downs(self) -> int:
        return GENERATOR_DEPTHS[self.netG]
