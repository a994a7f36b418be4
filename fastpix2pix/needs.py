"""What a training needs of memory and disk, estimated before it starts, and whether that is there."""

import math
import shutil
from dataclasses import dataclass, replace

import torch

from fastpix2pix.config import TrainConfig
from fastpix2pix.data import Loader
from fastpix2pix.errors import UserError
from fastpix2pix.free_memory import free_memory, in_words
from fastpix2pix.models import build_networks
from fastpix2pix.models.options import NetworkOptions
from fastpix2pix.training.losses import Losses
from fastpix2pix.training.options import Precision
from fastpix2pix.training.precision import WORKING_TYPES

WITHIN = 1.3
"""Measured memory of trainings on a CPU is within this factor of the estimate (tests/commands/test_needs.py).
What is further above what there is, is refused; what is above it at all, is said."""

# Floats that a step keeps per pixel of an image: for each channel of the generator's first layer, for each of
# the discriminator's, and besides. On a GPU counted on the meta device, on a CPU, whose convolutions keep
# images as matrices of tiles, fitted to measured memory (1 thread, AVX2).
KEPT = {"cuda": (1.2, 3.9, 36.0), "cpu": (9.3, 9.3, 0.0)}


@dataclass(frozen=True)
class Part:
    """Of a training's memory. flags: what makes it smaller; size: in bytes."""

    what: str
    flags: str
    size: float


LIBRARIES = Part("the libraries", "the number of other programs", 420 << 20)
"""The process without any training; those of CUDA take more."""


def parameters(options: NetworkOptions) -> int:
    """How many both networks have, however many that are; exact.

    Every width is a multiple of the first layer's, so the count is a polynomial of degree 2 in that, which
    three tiny networks tell. On the meta device, initialising alone would import for many seconds.
    """
    with torch.random.fork_rng(devices=()):
        small = [build_networks(replace(options, ngf=width, ndf=width, seed=0)) for width in (1, 2, 3)]
    total = 0
    for networks, width in zip(zip(*small, strict=True), (options.ngf, options.ndf), strict=True):
        one, two, three = (sum(p.numel() for p in network.parameters()) for network in networks)
        second = three - 2 * two + one  # Newton's differences
        total += one + (width - 1) * (two - one) + (width - 1) * (width - 2) // 2 * second
    return total


def checkpoint_size(options: NetworkOptions) -> int:
    """Bytes of a checkpoint: every parameter with its two moments, in float32."""
    return 3 * 4 * parameters(options)


def memory_parts(config: TrainConfig, device: torch.device, precision: Precision) -> list[Part]:
    """What the device's memory has to hold, on a CPU with the process itself; without the cache."""
    count = parameters(config.network_options())
    per_generator, per_discriminator, besides = KEPT[device.type]
    item = WORKING_TYPES[precision].itemsize if device.type == "cuda" else 4
    masters = 4 if WORKING_TYPES[precision].itemsize < 4 else 0
    pixel = per_generator * config.ngf + per_discriminator * config.ndf + besides
    pixels = float(config.batch_size) * config.crop_size**2
    # Gradients are alive one at a time, but on a CPU some weights are so in matrix form as well.
    weights = count * (4 * 3 + masters + item)
    parts = [
        Part("the weights and Adam's moments", "--ngf or --ndf", weights),
        Part("what a step keeps", "--batch_size, --crop_size, --ngf or --ndf", pixels * pixel * item),
        Part("the record of losses", "--print_freq", 4.0 * config.print_freq * len(Losses._fields)),
        _decoded(config, device),
    ]
    if device.type == "cpu":
        parts.append(LIBRARIES)
    return parts


def host_parts(config: TrainConfig, device: torch.device) -> list[Part]:
    """What the memory of the machine has to hold when ``device`` is a GPU: weights are made there first."""
    weights = Part(
        "the weights on their way to the GPU", "--ngf or --ndf", 4 * parameters(config.network_options())
    )
    return [weights, _decoded(config, device), LIBRARIES]


def _decoded(config: TrainConfig, device: torch.device) -> Part:
    """Three chunks of pairs: decoded, on their way, in use."""
    options = config.loader_options()
    chunk = options.chunk_size(device)
    pixel = sum(side.channels * side.kept_as.itemsize for side in options.sides)
    size = 3.0 * pixel * chunk * config.load_size**2
    return Part("pairs being decoded", "--load_size or --batch_size", size)


def check_memory(config: TrainConfig, device: torch.device, precision: Precision) -> None:
    """Raise UserError when a training surely does not fit into the memory of ``device``, and say so when it
    may not. Allocates nothing."""
    _check(memory_parts(config, device, precision), device)
    if device.type == "cuda":
        _check(host_parts(config, device), torch.device("cpu"))


def check_data(config: TrainConfig, loader: Loader, precision: Precision, total_steps: int) -> None:
    """As ``check_memory``, with the cache of decoded pairs; and raise UserError for a batch that is larger
    than the data set, and where the disk does not hold the checkpoints."""
    ranks = loader.options.ranks
    if config.batch_size * ranks > len(loader):
        each, most = "", "that"
        if ranks > 1:
            each, most = f" in each of {ranks} processes", str(len(loader) // ranks)
        raise UserError(
            f"--batch_size {config.batch_size}{each}: the data set has {len(loader)} pairs; give at most "
            f"{most}"
        )
    if loader.cached:
        cache = Part("the cache of decoded pairs", "--cache", loader.resized_bytes)
        _check([*memory_parts(config, loader.device, precision), cache], loader.device)
    _check_disk(config, total_steps)


def _check(parts: list[Part], device: torch.device) -> None:
    needed = sum(part.size for part in parts)
    there, whose = free_memory(device)
    if needed <= there:
        return
    largest = max(parts, key=lambda part: part.size)
    line = (
        f"this training needs about {in_words(needed)} of memory, mostly for {largest.what}, and {whose} "
        f"leaves {in_words(there)}; lower {largest.flags}"
    )
    if needed > WITHIN * there:
        raise UserError(line)
    print(f"warning: {line}, if it runs out")


def _check_disk(config: TrainConfig, total_steps: int) -> None:
    folder = config.run_folder / "checkpoints"
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    size = checkpoint_size(config.network_options())
    saves = math.ceil(total_steps / config.save_latest_freq)
    needed = size * min(config.keep_checkpoints + 1, saves)  # an old one goes when the new one is whole
    try:
        held = sum(path.stat().st_size for path in folder.glob("step_*.pt"))
        there = shutil.disk_usage(existing).free
    except OSError:
        return  # saving will say what is wrong
    if needed > there + held:
        raise UserError(
            f"{existing}: has {in_words(there)} left, and the checkpoints need {in_words(needed)}; free "
            "space, lower --keep_checkpoints, or choose another --checkpoints_dir"
        )
