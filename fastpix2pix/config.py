"""What a run is: one dataclass that is the command line, ``config.json`` and part of every checkpoint."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastpix2pix.errors import UserError

GENERATOR_DEPTHS = {"unet_32": 5, "unet_64": 6, "unet_128": 7, "unet_256": 8, "unet_512": 9}


@dataclass(frozen=True)
class Recipe:
    """How one reference implementation trains (where it differs from the other)."""

    direction: str
    interpolation: str
    simultaneous: bool
    """Both gradients from the same weights and one D(fake); else D steps first and looks at fake again."""
    real_first: bool
    """Order of the discriminator's two halves, which its running statistics see one after the other."""
    disc_factor: float
    adam_eps: float
    keras_eps: bool
    n_epochs: int | None
    """Length when the user gives none: epochs at the full learning rate and epochs of its linear fall; or
    (None) so many steps."""
    n_epochs_decay: int
    steps: int | None


RECIPES = {
    "tutorial": Recipe(
        direction="BtoA",
        interpolation="nearest",
        simultaneous=True,
        real_first=True,
        disc_factor=1.0,
        adam_eps=1e-7,
        keras_eps=True,
        n_epochs=None,
        n_epochs_decay=0,
        steps=40_000,
    ),
    "junyanz": Recipe(
        direction="AtoB",
        interpolation="bicubic",
        simultaneous=False,
        real_first=False,
        disc_factor=0.5,
        adam_eps=1e-8,
        keras_eps=False,
        n_epochs=100,
        n_epochs_decay=100,
        steps=None,
    ),
}


@dataclass(frozen=True)
class TrainConfig:
    """Train pix2pix on pairs of images.

    With no flags at all, paints a set of facade-like pairs and trains the TensorFlow tutorial's network on
    it. With --dataroot, trains on your own pairs: side-by-side images in DATAROOT/train, or DATAROOT/A/train
    and DATAROOT/B/train matched by name.
    """

    dataroot: Path | None = None
    """Folder with train/ (and val/ or test/) of side-by-side images, or with A/ and B/."""
    dataset: str = "synthetic"
    """Data set by name when no --dataroot is given; synthetic is painted on the spot, without a network."""
    name: str = "experiment_name"
    """Name of the run: its folder inside checkpoints_dir."""
    checkpoints_dir: Path = Path("checkpoints")
    """Where run folders are made."""
    continue_train: bool = False
    """Continue the run NAME exactly where its newest checkpoint left it."""
    preset: Literal["tutorial", "junyanz"] = "tutorial"
    """Whose pix2pix: the TensorFlow tutorial's, or pytorch-CycleGAN-and-pix2pix's. They differ in network,
    update rule, Adam, resize filter and direction."""
    direction: Literal["AtoB", "BtoA"] | None = None
    """Which half is the input: A is the left. Default: that of the data set by name (synthetic: BtoA); with
    --dataroot BtoA for tutorial, AtoB for junyanz."""
    load_size: int = 286
    """Images are resized to this many pixels a side,"""
    crop_size: int = 256
    """then cropped at random to this."""
    no_flip: bool = False
    """Do not mirror images at random."""
    batch_size: int = 1
    """Pairs per step. Batch norm at batch 1 normalises each image by itself, which the paper recommends."""
    netG: Literal["unet_32", "unet_64", "unet_128", "unet_256", "unet_512"] = "unet_256"  # noqa: N815
    """Generator, by the image size that it takes down to 1x1."""
    ngf: int = 64
    """Width of the generator's first layer."""
    ndf: int = 64
    """Width of the discriminator's first layer."""
    n_layers_D: int = 3  # noqa: N815
    """Strided layers of the discriminator; 3 is the 70x70 PatchGAN."""
    norm: Literal["batch", "instance"] = "batch"
    """Normalisation of both networks."""
    no_dropout: bool = False
    """Leave out the generator's dropout."""
    gan_mode: Literal["vanilla", "lsgan"] = "vanilla"
    """Cross-entropy, or least squares."""
    lambda_L1: float = 100.0  # noqa: N815
    """Weight of the L1 loss beside the GAN loss."""
    lr: float = 2e-4
    """Learning rate of both Adams."""
    beta1: float = 0.5
    """Momentum term of both Adams."""
    steps: int | None = None
    """Length in steps, at a constant learning rate. Default for tutorial: 40000."""
    n_epochs: int | None = None
    """Length in epochs at the initial learning rate, instead of steps. Default for junyanz: 100."""
    n_epochs_decay: int | None = None
    """Epochs after these in which the learning rate falls linearly to zero. Default for junyanz: 100."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""
    precision: Literal["bf16", "fp16", "tf32", "fp32"] | None = None
    """Type that the networks compute in; Adam's masters and checkpoints are fp32 always. Default: bf16 on
    GPUs from sm_80 on, fp16 with dynamic loss scaling on older ones, on a CPU bf16 if it is faster there."""
    no_graph: bool = False
    """Do not capture the step in a CUDA graph."""
    seed: int = 0
    """Of the weights, of the order, crops and flips, and of dropout."""
    loader: Literal["auto", "dali", "portable"] = "auto"
    """DALI where it is installed, else the portable loader. Both produce the same samples."""
    num_threads: int = 4
    """Threads or workers that decode images."""
    cache: float = 1.0
    """GiB for keeping the decoded data set (on the GPU where there is one); 0 decodes in every epoch."""
    print_freq: int = 100
    """Steps between two readings of the losses."""
    display_freq: int = 1000
    """Steps between two sample grids (input | target | generated) of the same fixed pairs."""
    save_latest_freq: int = 5000
    """Steps between two checkpoints."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints stay on disk."""

    def __post_init__(self):
        positive = (
            "load_size crop_size batch_size ngf ndf n_layers_D num_threads print_freq display_freq "
            "save_latest_freq keep_checkpoints"
        )
        for field in positive.split():
            if getattr(self, field) < 1:
                raise UserError(f"--{field} {getattr(self, field)}: give a number of at least 1")
        for field in ("lr", "lambda_L1", "cache"):
            if not (math.isfinite(getattr(self, field)) and getattr(self, field) >= 0):
                raise UserError(f"--{field} {getattr(self, field)}: give a finite number of at least 0")
        if not 0 <= self.beta1 < 1:
            raise UserError(f"--beta1 {self.beta1}: give a number in [0, 1)")
        for field, least in (("steps", 1), ("n_epochs", 1), ("n_epochs_decay", 0)):
            if getattr(self, field) is not None and getattr(self, field) < least:
                raise UserError(f"--{field} {getattr(self, field)}: give a number of at least {least}")
        if self.steps is not None and (self.n_epochs is not None or self.n_epochs_decay is not None):
            raise UserError("--steps and --n_epochs/--n_epochs_decay both set the length; give one of them")
        if self.n_epochs_decay is not None and self._epochs is None:
            raise UserError("--n_epochs_decay needs --n_epochs, the epochs before the decay")
        if self.load_size < self.crop_size:
            raise UserError(
                f"--load_size {self.load_size} is smaller than --crop_size {self.crop_size}: a crop does not "
                "fit; make load_size at least crop_size"
            )
        multiple = 2**self.num_downs
        if self.crop_size % multiple:
            raise UserError(
                f"--crop_size {self.crop_size} does not fit --netG {self.netG}: give a multiple of "
                f"{multiple}, or another netG"
            )
        smallest = 2 ** (self.n_layers_D + 1) * 2
        if self.crop_size < smallest:
            raise UserError(
                f"--crop_size {self.crop_size} is too small for --n_layers_D {self.n_layers_D}: the "
                f"discriminator needs {smallest} pixels; use fewer layers"
            )

    @property
    def recipe(self) -> Recipe:
        return RECIPES[self.preset]

    @property
    def num_downs(self) -> int:
        return GENERATOR_DEPTHS[self.netG]

    @property
    def run_folder(self) -> Path:
        return self.checkpoints_dir / self.name

    @property
    def _epochs(self) -> tuple[int, int] | None:
        """Epochs at the full learning rate and epochs of decay, or None where the length is in steps."""
        n_epochs = self.recipe.n_epochs if self.n_epochs is None else self.n_epochs
        if self.steps is not None or n_epochs is None:
            return None
        return n_epochs, self.recipe.n_epochs_decay if self.n_epochs_decay is None else self.n_epochs_decay

    def total_steps(self, steps_per_epoch: int) -> int:
        """Length of the whole run."""
        if self._epochs is not None:
            return sum(self._epochs) * steps_per_epoch
        return self.recipe.steps if self.steps is None else self.steps

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of the step numbered ``step`` from 0: junyanz's linear rule, constant in an epoch.

        In the e-th epoch from 0 it is lr * (1 - max(0, e + 1 - n_epochs) / (n_epochs_decay + 1)).
        """
        if self._epochs is None:
            return self.lr
        n_epochs, n_epochs_decay = self._epochs
        epoch = step // steps_per_epoch
        return self.lr * (1 - max(0, epoch + 1 - n_epochs) / (n_epochs_decay + 1))

    def to_dict(self) -> dict:
        """Plain values for JSON and checkpoints."""
        values = dataclasses.asdict(self)
        return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: dict) -> "TrainConfig":
        """Inverse of ``to_dict``. Raises UserError for a field that this version does not know."""
        fields = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(values.keys() - fields):
            raise UserError(
                f"configuration has {', '.join(unknown)}, unknown to this version; "
                "use the version that wrote it"
            )
        paths = {key: Path(values[key]) for key in ("dataroot", "checkpoints_dir") if values.get(key)}
        return cls(**{**values, **paths})
