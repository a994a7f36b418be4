"""The two reference implementations of pix2pix, whole: their network, update rule, data and length.

The TensorFlow tutorial and pytorch-CycleGAN-and-pix2pix ("junyanz") differ in all of these. A third
reference would be one more entry of ``PRESETS``.
"""

from dataclasses import dataclass
from typing import Literal

from fastpix2pix.errors import UserError

PresetName = Literal["tutorial", "junyanz"]


@dataclass(frozen=True)
class Architecture:
    """What a reference chooses where the paper leaves the networks open (Isola et al., 2017, section 3.2).

    encoder_slope: negative slope of the LeakyReLU after every encoder and discriminator convolution.
    skip_slope: the same for the copy that a skip connection carries; 0 is ReLU.
    bottleneck_norm, bottleneck_slope: whether the 1x1 bottleneck is normalised, and its activation.
    skip_first: the order of the concatenation, [skip, up] or [up, skip].
    innermost_dropout: whether the dropout blocks begin with the innermost decoder block, or the one after it.
    eps: of the norms. momentum: weight of the newest batch in the running statistics (torch's sense).
    unbiased: whether the running variance is the unbiased one (n - 1).
    gamma_std: standard deviation of the norm weights' initial values around 1.
    discriminator_first_bias: whether the discriminator's first convolution has a bias.
    """

    encoder_slope: float
    skip_slope: float
    bottleneck_norm: bool
    bottleneck_slope: float
    skip_first: bool
    innermost_dropout: bool
    eps: float
    momentum: float
    unbiased: bool
    gamma_std: float
    discriminator_first_bias: bool


@dataclass(frozen=True)
class UpdateRule:
    """How a step updates the two networks.

    simultaneous: both gradients are taken at the same weights, with one D(fake); otherwise the discriminator
    steps first and then sees the fake image again.
    real_first: order of the discriminator's two halves, which its running statistics see one after the other.
    disc_factor: of the discriminator's loss, real + fake.
    adam_eps, keras_eps: Adam's epsilon, and whether it stands where Keras adds it (``MasterAdam``).
    """

    simultaneous: bool
    real_first: bool
    disc_factor: float
    adam_eps: float
    keras_eps: bool


@dataclass(frozen=True)
class DataHabits:
    """direction: which half of a user's own pairs is the input. interpolation: of the resize."""

    direction: Literal["AtoB", "BtoA"]
    interpolation: Literal["nearest", "bicubic"]


@dataclass(frozen=True)
class Schedule:
    """Length when the user gives none: steps, or epochs at the full and then at a falling learning rate."""

    steps: int | None = None
    n_epochs: int | None = None
    n_epochs_decay: int = 0


@dataclass(frozen=True)
class Preset:
    """One reference implementation."""

    name: PresetName
    architecture: Architecture
    update: UpdateRule
    data: DataHabits
    schedule: Schedule


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="tutorial",
            architecture=Architecture(
                encoder_slope=0.3,
                skip_slope=0.3,
                bottleneck_norm=True,
                bottleneck_slope=0.3,
                skip_first=False,
                innermost_dropout=True,
                eps=1e-3,
                momentum=0.01,
                unbiased=False,
                gamma_std=0.0,
                discriminator_first_bias=False,
            ),
            update=UpdateRule(
                simultaneous=True, real_first=True, disc_factor=1.0, adam_eps=1e-7, keras_eps=True
            ),
            data=DataHabits(direction="BtoA", interpolation="nearest"),
            schedule=Schedule(steps=40_000),
        ),
        Preset(
            name="junyanz",
            architecture=Architecture(
                encoder_slope=0.2,
                skip_slope=0.0,
                bottleneck_norm=False,
                bottleneck_slope=0.0,
                skip_first=True,
                innermost_dropout=False,
                eps=1e-5,
                momentum=0.1,
                unbiased=True,
                gamma_std=0.02,
                discriminator_first_bias=True,
            ),
            update=UpdateRule(
                simultaneous=False, real_first=False, disc_factor=0.5, adam_eps=1e-8, keras_eps=False
            ),
            data=DataHabits(direction="AtoB", interpolation="bicubic"),
            schedule=Schedule(n_epochs=100, n_epochs_decay=100),
        ),
    )
}


def find_preset(name: str) -> Preset:
    """The preset called ``name``. Raises UserError for another name."""
    if name not in PRESETS:
        raise UserError(f"--preset {name}: unknown; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
