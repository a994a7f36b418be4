"""The command line of training: what was asked for, as ``config.json`` keeps it."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fastpix2pix.data.catalog import DATASETS
from fastpix2pix.data.options import Direction, LoaderOptions
from fastpix2pix.errors import UserError
from fastpix2pix.models.discriminator import min_size
from fastpix2pix.models.generator import size_multiple
from fastpix2pix.models.options import GeneratorName, InitType, NetworkOptions, Norm
from fastpix2pix.presets import Preset, PresetName, find_preset
from fastpix2pix.training.options import DeepConv, GanMode, Precision, StepOptions

Part = TypeVar("Part", NetworkOptions, StepOptions)

NOT_OF_THE_RUN = ("continue_train", "force", "quick")
"""Flags that say what to do with a run, and are no part of it."""

QUICK: dict[str, Any] = {"ngf": 16, "ndf": 16, "steps": 1500, "display_freq": 250}
"""What --quick stands for."""

TASK = (
    *("dataroot", "dataset", "direction", "load_size", "crop_size", "no_flip", "gan_mode"),
    *("preprocess", "max_dataset_size", "input_range", "output_range"),
)
"""Flags that make another task of a run when they change in its middle."""

ARCHITECTURE = ("preset", "netG", "ngf", "ndf", "n_layers_D", "norm", "input_nc", "output_nc")
"""Flags that a checkpoint's tensors depend on: they cannot change when a run continues."""

BEGINNING = ("init_from", "init_type", "init_gain")
"""Flags that decide how a run begins, and nothing of how it goes on."""

LrPolicy = Literal["linear", "step", "cosine"]
Preprocess = Literal["resize_and_crop", "crop", "none"]


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
    """Continue the run NAME exactly where its newest checkpoint left it. What no flag says is as it was."""
    force: bool = False
    """Continue a run although a flag changes its task: its data, direction or sizes."""
    quick: bool = False
    """A first look, in minutes on a CPU: --ngf 16 --ndf 16 --steps 1500 --display_freq 250, where no flag
    says otherwise."""
    preset: PresetName = NetworkOptions.preset
    """Whose pix2pix: the TensorFlow tutorial's, or pytorch-CycleGAN-and-pix2pix's. They differ in network,
    update rule, Adam, resize filter and direction."""
    direction: Direction | None = None
    """Which half is the input: AtoB the left one, BtoA the right one. Default: that of the data set by name
    (synthetic: BtoA); with --dataroot BtoA for tutorial, AtoB for junyanz."""
    input_nc: int = NetworkOptions.input_nc
    """Channels of the input images: 1 for grey, 3 for RGB, any number for TIFF and .npy."""
    output_nc: int = NetworkOptions.output_nc
    """Channels of the output images."""
    input_range: tuple[float, float] | None = None
    """The least and the greatest value of the input files, like 0 4095 for 12 bits; what lies outside is cut
    off. Default: all that 8 or 16 bits can hold. Files of floating point need it."""
    output_range: tuple[float, float] | None = None
    """The same of the output files."""
    preprocess: Preprocess = "resize_and_crop"
    """What is done to images: resized and cropped; cropped alone, from images that are all squares of one
    size; or nothing but mirrored, images of one square size that the network takes."""
    load_size: int = LoaderOptions.load_size
    """Images are resized to this many pixels a side,"""
    crop_size: int = LoaderOptions.crop_size
    """then cropped at random to this."""
    no_flip: bool = False
    """Do not mirror images at random."""
    serial_batches: bool = False
    """Take the pairs in the order of their names in every epoch, instead of at random."""
    max_dataset_size: int | None = None
    """Train on the first so many pairs alone."""
    batch_size: int = LoaderOptions.batch_size
    """Pairs per step of a process. Batch norm at batch 1 normalises each image by itself, as the paper
    recommends."""
    netG: GeneratorName = NetworkOptions.netG  # noqa: N815
    """Generator, by the image size that it takes down to 1x1."""
    ngf: int = NetworkOptions.ngf
    """Width of the generator's first layer."""
    ndf: int = NetworkOptions.ndf
    """Width of the discriminator's first layer."""
    n_layers_D: int = NetworkOptions.n_layers_D  # noqa: N815
    """Strided layers of the discriminator; 3 is the 70x70 PatchGAN."""
    norm: Norm = NetworkOptions.norm
    """Normalisation of both networks."""
    no_dropout: bool = False
    """Leave out the generator's dropout."""
    init_type: InitType = NetworkOptions.init_type
    """How the convolutions' weights are drawn."""
    init_gain: float = NetworkOptions.init_gain
    """Standard deviation for normal; gain for xavier and orthogonal."""
    init_from: Path | None = None
    """Fine-tune: begin with the weights of another run (its folder, or a step_*.pt), of a *_net_G.pth, or of
    the tutorial's generator as np.savez(FILE, *generator.get_weights()). What fits is taken, and said."""
    gan_mode: GanMode = StepOptions.gan_mode
    """Cross-entropy, or least squares."""
    lambda_L1: float = StepOptions.lambda_L1  # noqa: N815
    """Weight of the L1 loss beside the GAN loss."""
    lr: float = StepOptions.lr
    """Learning rate of both Adams."""
    beta1: float = StepOptions.beta1
    """Momentum term of both Adams."""
    steps: int | None = None
    """Length in steps, at a constant learning rate. Default for tutorial: 40000."""
    n_epochs: int | None = None
    """Length in epochs at the initial learning rate, instead of steps. Default for junyanz: 100."""
    n_epochs_decay: int | None = None
    """Epochs after these in which the learning rate falls linearly to zero. Default for junyanz: 100."""
    lr_policy: LrPolicy = "linear"
    """How the learning rate falls, epoch by epoch: linear to zero over n_epochs_decay, to a tenth every
    lr_decay_iters epochs (step), or by the cosine of n_epochs."""
    lr_decay_iters: int = 50
    """Epochs between two falls of --lr_policy step."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""
    precision: Precision | None = None
    """Type that the networks compute in; Adam's masters and checkpoints are fp32 always. Default: bf16 on
    GPUs from sm_80 on, fp16 with dynamic loss scaling on older ones; on a CPU bf16 with AVX512-BF16, else
    fp32."""
    no_graph: bool = False
    """Do not capture the step in a CUDA graph."""
    deep_conv: DeepConv = StepOptions.deep_conv
    """Convolutions of the deep layers on a GPU: our Triton kernels, the library's, or (auto) for each product
    the one that is measured to be faster."""
    seed: int = NetworkOptions.seed
    """Of the weights, of the order, crops and flips, and of dropout."""
    loader: Literal["auto", "dali", "portable"] = LoaderOptions.loader
    """DALI where it is installed, else the portable loader. Both produce the same samples."""
    threads: int | None = None
    """CPU threads that compute. Default: a thread for each core that this process may use."""
    num_threads: int | None = None
    """Threads or workers that decode images. Default: 4; beside a step that computes on the CPU, no more than
    half the cores."""
    cache: float = 1.0
    """GiB for keeping the decoded data set (on the GPU where there is one); 0 decodes in every epoch."""
    print_freq: int = StepOptions.print_freq
    """Steps between two readings of the losses."""
    display_freq: int = 1000
    """Steps between two sample grids (input | target | generated) of the same fixed pairs."""
    save_latest_freq: int = 5000
    """Steps between two checkpoints."""
    save_epoch_freq: int | None = None
    """Epochs between two checkpoints, beside those of save_latest_freq."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints stay on disk."""
    use_wandb: bool = False
    """Log losses, samples and the request to Weights & Biases too (pip install "fastpix2pix[wandb]")."""
    wandb_project_name: str = "fastpix2pix"
    """Project there."""

    def __post_init__(self) -> None:
        check_name(self.name)
        self.network_options(), self.step_options(), self.loader_options()
        for field in ("display_freq", "save_latest_freq", "keep_checkpoints"):
            if getattr(self, field) < 1:
                raise UserError(f"--{field} {getattr(self, field)}: give a number of at least 1")
        least_values = {
            "steps": 1,
            "n_epochs": 1,
            "n_epochs_decay": 0,
            "save_epoch_freq": 1,
            "lr_decay_iters": 1,
            "threads": 1,
        }
        for field, least in least_values.items():
            if getattr(self, field) is not None and getattr(self, field) < least:
                raise UserError(f"--{field} {getattr(self, field)}: give a number of at least {least}")
        if self.steps is not None and (self.n_epochs is not None or self.n_epochs_decay is not None):
            raise UserError("--steps and --n_epochs/--n_epochs_decay both set the length; give one of them")
        if self.n_epochs_decay is not None and self._epochs is None:
            raise UserError("--n_epochs_decay needs --n_epochs, the epochs before the decay")
        if self.lr_policy == "cosine" and self._epochs is None:
            raise UserError("--lr_policy cosine needs a length in epochs; give --n_epochs")
        if self.preprocess != "none":  # whose crop is the image, whatever its size
            self._check_crop_size()

    def _check_crop_size(self) -> None:
        multiple = size_multiple(self.network_options().num_downs)
        if self.crop_size % multiple:
            raise UserError(
                f"--crop_size {self.crop_size} does not fit --netG {self.netG}: give a multiple of "
                f"{multiple}, or another netG"
            )
        smallest = min_size(self.n_layers_D)
        if self.crop_size < smallest:
            raise UserError(
                f"--crop_size {self.crop_size} is too small for --n_layers_D {self.n_layers_D}: the "
                f"discriminator needs {smallest} pixels; use fewer layers"
            )

    @property
    def rules(self) -> Preset:
        """The preset itself."""
        return find_preset(self.preset)

    @property
    def run_folder(self) -> Path:
        return self.checkpoints_dir / self.name

    def network_options(self) -> NetworkOptions:
        """What the networks are built from."""
        return _part(self, NetworkOptions)

    def step_options(self) -> StepOptions:
        """What the training step needs."""
        return _part(self, StepOptions)

    def loader_options(self, rank: int = 0, ranks: int = 1) -> LoaderOptions:
        """What the loader of one of ``ranks`` processes needs, with the direction that ``direction`` or the
        data decide."""
        return LoaderOptions(
            direction=self.resolved_direction(),
            input_nc=self.input_nc,
            output_nc=self.output_nc,
            input_range=self.input_range,
            output_range=self.output_range,
            load_size=self.load_size,
            crop_size=self.crop_size,
            interpolation=self.rules.data.interpolation,
            flip=not self.no_flip,
            shuffle=not self.serial_batches,
            max_dataset_size=self.max_dataset_size,
            batch_size=self.batch_size,
            seed=self.seed,
            loader=self.loader,
            num_threads=LoaderOptions.num_threads if self.num_threads is None else self.num_threads,
            cache_bytes=_gib(self.cache),
            rank=rank,
            ranks=ranks,
        )

    def resolved_direction(self) -> Direction:
        """The direction asked for, else the customary one of a data set by name, else the preset's."""
        if self.direction is not None:
            return self.direction
        if self.dataroot is not None:
            return self.rules.data.direction
        return DATASETS[self.dataset].direction if self.dataset in DATASETS else "BtoA"

    @property
    def _epochs(self) -> tuple[int, int] | None:
        """Epochs at the full learning rate and epochs of decay, or None where the length is in steps."""
        schedule = self.rules.schedule
        n_epochs = schedule.n_epochs if self.n_epochs is None else self.n_epochs
        if self.steps is not None or n_epochs is None:
            return None
        return n_epochs, schedule.n_epochs_decay if self.n_epochs_decay is None else self.n_epochs_decay

    def steps_left(self, done: int, epoch: int, left_of_epoch: int, steps_per_epoch: int) -> int:
        """Steps to the end of the run after ``done`` of them, in its ``epoch``-th epoch from 0, of which
        ``left_of_epoch`` steps are to come. A length in epochs holds whatever the batches were before.
        """
        if self._epochs is not None:
            following = sum(self._epochs) - epoch - 1
            return left_of_epoch + following * steps_per_epoch if following >= 0 else 0
        steps = self.rules.schedule.steps if self.steps is None else self.steps
        assert steps is not None, "a schedule is in epochs or in steps"
        return max(0, steps - done)

    def lr_at(self, epoch: int) -> float:
        """Learning rate of the ``epoch``-th epoch from 0, e: junyanz's policies.

        It is lr times, for linear, 1 - max(0, e + 1 - n_epochs) / (n_epochs_decay + 1); for step,
        0.1 ** (e // lr_decay_iters); for cosine, (1 + cos(pi e / n_epochs)) / 2, which rises again after
        n_epochs. A length in steps has no linear decay.
        """
        if self.lr_policy == "step":
            return self.lr * 0.1 ** (epoch // self.lr_decay_iters)
        if self._epochs is None:
            return self.lr
        n_epochs, n_epochs_decay = self._epochs
        if self.lr_policy == "cosine":
            return self.lr * (1 + math.cos(math.pi * epoch / n_epochs)) / 2
        return self.lr * (1 - max(0, epoch + 1 - n_epochs) / (n_epochs_decay + 1))

    def to_dict(self) -> dict:
        """The request as plain values for JSON and checkpoints."""
        values = {
            name: value for name, value in dataclasses.asdict(self).items() if name not in NOT_OF_THE_RUN
        }
        return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: dict) -> "TrainConfig":
        """Inverse of ``to_dict``. Raises UserError for a field that this version does not know, and for a
        value of another type than the field's."""
        fields = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(values.keys() - fields):
            raise UserError(
                f"configuration has {', '.join(unknown)}, unknown to this version; "
                "use the version that wrote it"
            )
        for name, value in values.items():
            if not _is_of(value, kind := _FIELD_TYPES[name]):
                raise UserError(
                    f"{name} is {value!r}, which is {_in_words(kind)}; mend it or remove the line"
                )
        paths = {
            key: Path(values[key]) for key in ("dataroot", "checkpoints_dir", "init_from") if values.get(key)
        }
        ranges = {
            key: tuple(values[key]) for key in ("input_range", "output_range") if values.get(key) is not None
        }
        return cls(**{**values, **paths, **ranges})


def check_name(name: str) -> None:
    """Raise UserError unless ``name`` is that of a folder inside another one."""
    path = Path(name.replace("\\", "/"))
    if not path.parts or path.anchor or ".." in path.parts or "\0" in name:
        raise UserError(
            f"--name {name!r}: does not name a folder inside --checkpoints_dir; give a plain name like mine"
        )


def check_changes(saved: TrainConfig, config: TrainConfig) -> list[str]:
    """What ``config`` asks for differently from the run that it continues, one "--flag old -> new" each.

    Raises UserError for what would make another task of the run, unless ``config.force``.
    """
    before, after = saved.to_dict(), config.to_dict()
    changed = [name for name in after if before[name] != after[name]]
    for name in changed:
        if name in BEGINNING:
            raise UserError(
                f"--{name} {after[name]}: decides how a run begins, and {config.name} has begun with "
                f"{before[name]}; drop the flag, or start another run with another --name"
            )
        if name in TASK and not config.force:
            raise UserError(
                f"--{name} {_typed(after[name])}: the run {config.name} was started with "
                f"{_typed(before[name])}; drop the flag, add --force to go on all the same, or start another "
                "run with another --name"
            )
    return [f"--{name} {_typed(before[name])} -> {_typed(after[name])}" for name in changed]


def _typed(value: object) -> str:
    """A value as on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _part(config: TrainConfig, kind: type[Part]) -> Part:
    """The options of ``kind``, whose fields are all flags of the same names."""
    return kind(**{field.name: getattr(config, field.name) for field in dataclasses.fields(kind)})


def _gib(gib: float) -> int:
    if not (math.isfinite(gib) and gib >= 0):
        raise UserError(f"--cache {gib}: give a finite number of at least 0")
    return int(gib * 2**30)


_FIELD_TYPES = get_type_hints(TrainConfig)


def _is_of(value: object, kind: Any) -> bool:
    """Whether a value read from JSON is of the annotated type ``kind``; paths are strings there."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(_is_of(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:  # a list in JSON
        kinds = get_args(kind)
        if not isinstance(value, list | tuple) or len(value) != len(kinds):
            return False
        return all(map(_is_of, value, kinds))
    if kind is Path:
        return isinstance(value, str)
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def _in_words(kind: Any) -> str:
    """What a value that is not of ``kind`` is, as the end of a sentence."""
    if get_origin(kind) in (Union, UnionType):
        kind = next(one for one in get_args(kind) if one is not NoneType)
    if get_origin(kind) is Literal:
        return f"none of {', '.join(map(repr, get_args(kind)))}"
    if get_origin(kind) is tuple:
        return f"no list of {len(get_args(kind))} numbers"
    return f"no {'str' if kind is Path else kind.__name__}"
