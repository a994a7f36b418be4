"""The flags of pytorch-CycleGAN-and-pix2pix's train.py and test.py, as words of our train and translate.

``TRAIN`` and ``TEST`` say for every option name of theirs, of 2017 to 2025, what it is here: the same flag,
another one, something to leave out, or something that this program has not, with what to use instead.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from fastpix2pix.config import TrainConfig
from fastpix2pix.errors import UserError

Words: TypeAlias = list[str]


@dataclass(frozen=True)
class Flag:
    """A flag of ours does what theirs does.

    name: ours. values: what some of their values are called here. instead: why a value is not taken, and what
    to use, by value.
    """

    name: str
    values: Mapping[str, str] = field(default_factory=dict)
    instead: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Only:
    """Some of their values mean something here. words: what each becomes. instead: of any other value."""

    words: Mapping[str, Sequence[str]]
    instead: str


@dataclass(frozen=True)
class LeftOut:
    """Changes no result, and is left out with one line. instead: what serves its purpose here."""

    instead: str


@dataclass(frozen=True)
class Refused:
    """Would change the result, and is refused with one line. instead: what to use."""

    instead: str


@dataclass(frozen=True)
class Read:
    """Read together with other flags. does: what comes of it, for people."""

    does: str


Meaning: TypeAlias = Flag | Only | LeftOut | Refused | Read

SWITCHES = {
    *("no_dropout", "serial_batches", "no_flip", "verbose", "use_wandb", "no_html", "save_by_iter"),
    *("continue_train", "eval", "no_lsgan"),
}
"""Options of theirs that take no value."""

CYCLEGAN = "is CycleGAN's, which is for unpaired images; this program trains pix2pix on pairs"
REPORT = "open CHECKPOINTS_DIR/NAME/report.html or tensorboard --logdir CHECKPOINTS_DIR; there is no visdom"
KNOWN = "the run or the file of weights knows it"
PARALLEL = "one process a GPU: torchrun --nproc_per_node=N -m fastpix2pix.train ..."
RESNET = "is CycleGAN's ResNet; give a U-Net: unet_256, or unet_128 for crops of 128"

_NORM = Flag(
    "norm",
    instead={
        "none": "networks without norm are not built here; give batch or instance",
        **dict.fromkeys(
            ("syncbatch", "sync_batch", "sync_instance"),
            "statistics are each process's own here; give batch or instance",
        ),
    },
)
_THREADS = Flag("num_threads", values={"0": "1"})
_NET_G = Flag("netG", instead=dict.fromkeys(("resnet_9blocks", "resnet_6blocks"), RESNET))
_PREPROCESS = Flag(
    "preprocess",
    instead=dict.fromkeys(
        ("scale_width", "scale_width_and_crop"),
        "keeps an aspect ratio, and images are trained on as squares here; bring the files to one square "
        "size and give none or crop",
    ),
)
_BOTH: dict[str, Meaning] = {
    "gpu_ids": Read("`--device`: -1 is `cpu`, 0 is `cuda:0`; several: `torchrun`"),
    "display_winsize": LeftOut(REPORT),
    "verbose": LeftOut("print(fastpix2pix.load(RUN).generator) shows the network"),
    "suffix": Read("is put behind `--name`, after an underscore, with its {flags} filled in"),
    "lambda_A": Refused(CYCLEGAN),
    "lambda_B": Refused(CYCLEGAN),
    "lambda_identity": Refused(CYCLEGAN),
    "identity": Refused(CYCLEGAN),
    "lambda_regression": Refused("belongs to a template for models of one's own; there is none here"),
    "new_dataset_option": Refused("belongs to a template for data sets of one's own; there is none here"),
}

TRAIN: dict[str, Meaning] = _BOTH | {
    **{
        name: Flag(name)
        for name in (
            *("dataroot", "name", "checkpoints_dir", "ngf", "ndf", "n_layers_D", "init_type", "init_gain"),
            *("no_dropout", "direction", "serial_batches", "batch_size", "load_size", "crop_size"),
            *("input_nc", "output_nc", "max_dataset_size", "no_flip", "use_wandb", "wandb_project_name"),
            *("display_freq", "print_freq", "save_latest_freq", "save_epoch_freq", "continue_train"),
            *("n_epochs", "n_epochs_decay", "beta1", "lr", "lr_decay_iters", "lambda_L1"),
        )
    },
    "model": Only(
        {"pix2pix": ("--preset", "junyanz")},
        "this program trains pix2pix alone; leave --model out, or give pix2pix",
    ),
    "num_threads": _THREADS,
    "netG": _NET_G,
    "netD": Only(
        {"basic": (), "n_layers": ()},
        "the discriminator is a PatchGAN; --n_layers_D 1 has the smallest patches",
    ),
    "norm": _NORM,
    "dataset_mode": Only({"aligned": ()}, "this program trains on aligned pairs; leave it out"),
    "preprocess": _PREPROCESS,
    "epoch": Only(
        {"latest": ()},
        "a run goes on from its newest checkpoint; --init_from FILE starts another run from any other",
    ),
    "load_iter": Only(
        {"0": ()},
        "a run goes on from its newest checkpoint; --init_from FILE starts another run from any other",
    ),
    **dict.fromkeys(
        ("display_ncols", "display_id", "display_server", "display_env", "display_port"), LeftOut(REPORT)
    ),
    "update_html_freq": LeftOut("report.html is rewritten with every checkpoint"),
    "no_html": LeftOut("report.html is always written, with every checkpoint"),
    "save_by_iter": LeftOut("checkpoints are named by their step here anyway"),
    "epoch_count": Read("is left out of a run that goes on, which knows its epoch; a new one begins at 1"),
    "phase": Only({"train": ()}, "training reads DATAROOT/train; give the folder that train/ is in"),
    "gan_mode": Flag("gan_mode", instead={"wgangp": "is not built here; give vanilla or lsgan"}),
    "pool_size": Only({"0": ()}, "pix2pix has no pool of earlier images, there or here; leave it out"),
    "lr_policy": Flag(
        "lr_policy",
        values={"lambda": "linear"},
        instead={"plateau": "waits for a metric that pix2pix does not have; give linear, step or cosine"},
    ),
    # Their names until 2020.
    "niter": Flag("n_epochs"),
    "niter_decay": Flag("n_epochs_decay"),
    # Their names until 2018.
    "batchSize": Flag("batch_size"),
    "loadSize": Flag("load_size"),
    "fineSize": Flag("crop_size"),
    "nThreads": _THREADS,
    "which_direction": Flag("direction"),
    "which_model_netG": _NET_G,
    "which_model_netD": Only(
        {"basic": (), "n_layers": ()},
        "the discriminator is a PatchGAN; --n_layers_D 1 has the smallest patches",
    ),
    "which_epoch": Only({"latest": ()}, "a run goes on from its newest checkpoint"),
    "resize_or_crop": _PREPROCESS,
    "no_lsgan": Only({"": ("--gan_mode", "vanilla")}, ""),
}

TEST: dict[str, Meaning] = _BOTH | {
    **{name: Flag(name) for name in ("direction", "eval", "num_test", "no_dropout")},
    "which_direction": Flag("direction"),
    "how_many": Flag("num_test"),
    "ntest": Flag("num_test"),
    "dataroot": Read("`--input` DATAROOT/PHASE; the folder itself with `--model test`"),
    "name": Read("`--run` CHECKPOINTS_DIR/NAME, or its latest_net_G.pth"),
    "checkpoints_dir": Read("see `--name`"),
    "model": Read("pix2pix: `--kind pair`; test: `--kind image`"),
    "dataset_mode": Read("aligned: `--kind pair`; single: `--kind image`"),
    "phase": Read("see `--dataroot`; test unless it is given"),
    "epoch": Read("EPOCH_net_G.pth of `--name`; our own checkpoints are numbered by steps"),
    "which_epoch": Read("see `--epoch`"),
    "load_iter": Read("the checkpoint of that step of `--name`, or its iter_N_net_G.pth"),
    "model_suffix": Read("latest_net_G SUFFIX.pth of `--name`"),
    "results_dir": Read("`--output` RESULTS_DIR/NAME/PHASE_EPOCH; ./results unless it is given"),
    "preprocess": Read("resize_and_crop: `--resize`, as without it; none: images keep their size"),
    "resize_or_crop": Read("see `--preprocess`"),
    "aspect_ratio": Only({"1.0": (), "1": ()}, "results have the shape of their images; resize them after"),
    **dict.fromkeys(
        (
            *("ngf", "ndf", "netD", "n_layers_D", "norm", "init_type", "init_gain", "load_size"),
            *("crop_size", "no_flip", "loadSize", "fineSize", "which_model_netD", "input_nc", "output_nc"),
        ),
        LeftOut(KNOWN),
    ),
    "netG": Only(dict.fromkeys(("unet_256", "unet_128"), ()), RESNET),
    "which_model_netG": Only(dict.fromkeys(("unet_256", "unet_128"), ()), RESNET),
    **dict.fromkeys(
        ("serial_batches", "num_threads", "nThreads", "batch_size", "batchSize"),
        LeftOut("images are translated one by one, in the order of their names"),
    ),
    "max_dataset_size": Flag("num_test"),
    **dict.fromkeys(
        ("use_wandb", "wandb_project_name", "display_id", "display_port"),
        LeftOut("the results are a page, OUTPUT/index.html"),
    ),
}


def train_words(argv: Sequence[str]) -> tuple[Words, list[str]]:
    """What their train.py was given, as words for ours, and a line for each flag that is left out.

    Words that are no flags of theirs stay as they are. Raises UserError, which says what to use instead, for
    what would train something else here.
    """
    words, given, lines = _read(argv, TRAIN)
    names = _names(argv)
    continued = "continue_train" in names
    if given.get("epoch_count", "1") != "1":
        if not continued:
            raise UserError(
                f"--epoch_count {given['epoch_count']}: a new run begins at epoch 1; give the epochs to "
                "come as --n_epochs and --n_epochs_decay"
            )
        lines.append("--epoch_count is left out: the run knows its epoch")
    if "model" in names and continued or "preset" in names:
        words = _without(words, ("--preset", "junyanz")) if "model" in names else words
    elif "model" in names:
        lines.append("--model pix2pix is --preset junyanz: its network, update rule, direction and length")
    if suffix := _suffix(argv, given):
        name = _values(argv).get("name", TrainConfig.name)
        words = [*(_without(words, ("--name", name)) if "name" in names else words), "--name", name + suffix]
    return [*words, *_device(given)], lines


def test_words(argv: Sequence[str]) -> tuple[Words, list[str]]:
    """What their test.py was given, as words for our translate; otherwise as ``train_words``."""
    words, given, lines = _read(argv, TEST)
    given |= {new: given[old] for old, new in (("which_epoch", "epoch"), ("resize_or_crop", "preprocess")) if
              old in given}  # fmt: skip
    names = _names(argv)
    kind = _kind(given)
    words += _device(given)
    if "name" in given and "run" not in names:
        words += ["--run", str(_find_run(given))]
    if "dataroot" in given and "input" not in names:
        root, phase = Path(given["dataroot"]), given.get("phase", "test")
        inside = kind == "pair" or (kind is None and (root / phase).is_dir())
        words += ["--input", str(root / phase if inside else root)]
    if "output" not in names and {"name", "results_dir"} & given.keys():
        step = given.get("load_iter", "0")
        newest = given.get("epoch", "latest") if step == "0" else f"iter{step}"
        folder = f"{given.get('phase', 'test')}_{newest}"
        name = given.get("name", TrainConfig.name) + _suffix(argv, given)
        words += ["--output", str(Path(given.get("results_dir", "results")) / name / folder)]
    if kind is not None and "kind" not in names:
        words += ["--kind", kind]
    words += _resize(given) if "resize" not in names else []
    return words, lines


def _read(argv: Sequence[str], table: Mapping[str, Meaning]) -> tuple[Words, dict[str, str], list[str]]:
    """(our words, values of the flags that are read together, lines to say) for ``argv``."""
    words: Words = []
    given: dict[str, str] = {}
    lines: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not word.startswith("--") or name not in table:
            words.append(word)
            continue
        if name not in SWITCHES and not equals:
            if not rest or rest[0].startswith("--"):
                if not isinstance(meaning := table[name], Flag):
                    raise UserError(f"--{name}: give a value after it")
                words.append(f"--{meaning.name}")  # whose parser says what is missing
                continue
            value = rest.pop(0)
        said = f"--{name} {value}".rstrip()
        match table[name]:
            case Flag(ours, values, instead):
                if value in instead:
                    raise UserError(f"{said}: {instead[value]}")
                words += [f"--{ours}", *([] if name in SWITCHES else [values.get(value, value)])]
            case Only(becomes, instead):
                if value not in becomes:
                    raise UserError(f"{said}: {instead}")
                words += becomes[value]
            case LeftOut(instead):
                lines.append(f"{said} is left out: {instead}")
            case Refused(instead):
                raise UserError(f"{said}: {instead}")
            case Read():
                given[name] = value
    return words, given, lines


def _names(argv: Sequence[str]) -> set[str]:
    """The flags in ``argv``, without dashes before them or values behind."""
    return {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}


def _without(words: Words, pair: tuple[str, str]) -> Words:
    """``words`` without the first place where ``pair`` stands."""
    at = next(i for i in range(len(words)) if tuple(words[i : i + 2]) == pair)
    return words[:at] + words[at + 2 :]


def _device(given: Mapping[str, str]) -> Words:
    if "gpu_ids" not in given:
        return []
    ids = given["gpu_ids"].split(",")
    try:
        used = [number for number in map(int, ids) if number >= 0]
    except ValueError:
        raise UserError(f"--gpu_ids {given['gpu_ids']}: give a number, or -1 for the CPU") from None
    if len(used) > 1:
        raise UserError(f"--gpu_ids {given['gpu_ids']}: {PARALLEL}")
    return ["--device", f"cuda:{used[0]}" if used else "cpu"]


def _values(argv: Sequence[str]) -> dict[str, str]:
    """Every flag's value, the last one given, under its present name; switches are True."""
    values: dict[str, str] = {}
    for word, following in zip(argv, [*argv[1:], "--"], strict=True):
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            name = flag[2:].replace("-", "_")
            meaning = TRAIN.get(name)
            name = meaning.name if isinstance(meaning, Flag) else name
            values[name] = value if equals else "True" if following.startswith("--") else following
    return values


def _suffix(argv: Sequence[str], given: Mapping[str, str]) -> str:
    if not given.get("suffix"):
        return ""
    defaults = {one.name: one.default for one in dataclasses.fields(TrainConfig)} | {"model": "pix2pix"}
    try:
        return "_" + given["suffix"].format(**(defaults | _values(argv)))
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"--suffix {given['suffix']}: {error} is no flag; put {{netG}} or the like") from None


def _kind(given: Mapping[str, str]) -> str | None:
    kinds = {"pix2pix": "pair", "aligned": "pair", "test": "image", "single": "image"}
    for flag in ("dataset_mode", "model"):
        if flag in given and given[flag] not in kinds:
            raise UserError(
                f"--{flag} {given[flag]}: this program has pix2pix alone; give --model pix2pix for pairs, "
                "--model test for images"
            )
    return next((kinds[given[flag]] for flag in ("dataset_mode", "model") if flag in given), None)


def _find_run(given: Mapping[str, str]) -> Path:
    """The folder of a run of ours, one checkpoint of it, or a file of their weights."""
    folder = Path(given.get("checkpoints_dir", str(TrainConfig.checkpoints_dir))) / (
        given["name"] + _suffix([f"--{name}={value}" for name, value in given.items()], given)
    )
    epoch, step, suffix = (given.get(n, d) for n, d in (("epoch", "latest"), ("load_iter", "0"),
                                                        ("model_suffix", "")))  # fmt: skip
    if step != "0":
        ours = folder / "checkpoints" / f"step_{step:0>8}.pt"
        theirs = folder / f"iter_{step}_net_G{suffix}.pth"
        return theirs if theirs.is_file() and not ours.is_file() else ours
    theirs = folder / f"{epoch}_net_G{suffix}.pth"
    if theirs.is_file() and (epoch != "latest" or not (folder / "checkpoints").is_dir()):
        return theirs
    if epoch != "latest":
        raise UserError(
            f"--epoch {epoch}: {folder} has no {theirs.name}, and our own checkpoints are numbered by steps; "
            "give --load_iter STEP"
        )
    return folder


def _resize(given: Mapping[str, str]) -> Words:
    """Their test.py brings images to the size of the training unless it is told otherwise."""
    preprocess = given.get("preprocess", "resize_and_crop" if "dataroot" in given else "none")
    if preprocess not in ("resize_and_crop", "none"):
        raise UserError(
            f"--preprocess {preprocess}: give resize_and_crop for images of the training's size, or none, by "
            "which they keep their own"
        )
    return ["--resize"] if preprocess == "resize_and_crop" else []
