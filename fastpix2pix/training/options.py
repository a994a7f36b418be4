"""What a training step needs to know, and nothing of files, data or flags."""

import math
from dataclasses import dataclass
from typing import Literal

from fastpix2pix.errors import UserError
from fastpix2pix.presets import Preset, PresetName, find_preset

Precision = Literal["bf16", "fp16", "tf32", "fp32"]
GanMode = Literal["vanilla", "lsgan"]
DeepConv = Literal["auto", "triton", "library"]


@dataclass(frozen=True)
class StepOptions:
    """Update rule and hyperparameters of a ``TrainStep``; names and defaults as on the command line.

    preset: whose update rule. gan_mode: cross-entropy ("vanilla") or least squares ("lsgan"). lambda_L1:
    weight of the L1 loss beside the GAN loss. lr, beta1: of both Adams. precision: the type that the networks
    compute in; None leaves it to ``prepare_step``, which takes the best one for the device, while a
    ``TrainStep`` of its own computes in the type that the networks have. print_freq: how many steps' losses
    stay readable on the device. deep_conv: which convolutions ``prepare_step`` chooses for the deep layers on
    a GPU: our kernels, the library's, or for each product the faster one.

    Raises UserError, which calls fields by their flags, for a value that no training can use.
    """

    preset: PresetName = "tutorial"
    gan_mode: GanMode = "vanilla"
    lambda_L1: float = 100.0  # noqa: N815
    lr: float = 2e-4
    beta1: float = 0.5
    precision: Precision | None = None
    print_freq: int = 100
    deep_conv: DeepConv = "auto"

    def __post_init__(self) -> None:
        find_preset(self.preset)
        if self.gan_mode not in ("vanilla", "lsgan"):
            raise UserError(f"--gan_mode {self.gan_mode}: choose vanilla or lsgan")
        if self.precision not in (None, "bf16", "fp16", "tf32", "fp32"):
            raise UserError(f"--precision {self.precision}: choose bf16, fp16, tf32 or fp32")
        if self.deep_conv not in ("auto", "triton", "library"):
            raise UserError(f"--deep_conv {self.deep_conv}: choose auto, triton or library")
        for field in ("lr", "lambda_L1"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"--{field} {value}: give a finite number of at least 0")
        if not 0 <= self.beta1 < 1:
            raise UserError(f"--beta1 {self.beta1}: give a number in [0, 1)")
        if self.print_freq < 1:
            raise UserError(f"--print_freq {self.print_freq}: give a number of at least 1")

    @property
    def rules(self) -> Preset:
        """The preset itself."""
        return find_preset(self.preset)
