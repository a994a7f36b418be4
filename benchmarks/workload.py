"""What every variant of a training step computes: the networks, the update rule, the images."""

from dataclasses import dataclass, fields

from torch import Tensor

from fastpix2pix.models import NetworkOptions
from fastpix2pix.models.options import GeneratorName
from fastpix2pix.presets import PresetName
from fastpix2pix.training.options import StepOptions
from fastpix2pix.training.selfcheck import random_pairs


@dataclass(frozen=True)
class Workload:
    """size: pixels a side of the images; the others as on training's command line."""

    preset: PresetName = "tutorial"
    batch_size: int = 1
    size: int = 256
    netG: GeneratorName = NetworkOptions.netG  # noqa: N815
    ngf: int = NetworkOptions.ngf
    ndf: int = NetworkOptions.ndf
    no_dropout: bool = False

    def network_options(self) -> NetworkOptions:
        known = {field.name for field in fields(NetworkOptions)}
        return NetworkOptions(**{name: value for name, value in vars(self).items() if name in known})

    def step_options(self, precision: str = "fp32") -> StepOptions:
        return StepOptions(preset=self.preset, precision=precision)

    def pairs(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """``count`` (source, target) of uniform noise on the CPU, always the same."""
        return random_pairs(count, self.size, batch_size=self.batch_size)
