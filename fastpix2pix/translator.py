"""A trained generator as a function from image to image, whoever trained it."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastpix2pix import checkpoint
from fastpix2pix.config import TrainConfig
from fastpix2pix.data.options import Direction
from fastpix2pix.data.sides import Side, of_8_bits
from fastpix2pix.device import choose_device
from fastpix2pix.errors import UserError
from fastpix2pix.free_memory import free_memory, in_words
from fastpix2pix.interop import keras
from fastpix2pix.interop.junyanz import weights as junyanz
from fastpix2pix.models import UNetGenerator, build_generator
from fastpix2pix.models.generator import generate_without_trace, size_multiple
from fastpix2pix.picture_model import PictureModel
from fastpix2pix.presets import find_preset
from fastpix2pix.tiling import blend_tiles

# Bytes of activations per pixel and per channel of the first layer: 598 a pixel were measured at ngf 64.
BYTES_PER_PIXEL_AND_WIDTH = 10
OVERLAPS_IN_A_TILE = 4  # neighbouring tiles share at least a quarter of their width


class Translator(PictureModel):
    """A trained generator as a function from image to image; make it with :func:`load`.

    tile: larger images go in tiles of so many pixels a side; None: whole. input, output: by default 8-bit
    images of the network's channels. The rest as in PictureModel.
    """

    def __init__(
        self,
        generator: UNetGenerator,
        *,
        direction: Direction,
        size: int,
        source: str,
        evaluation: bool,
        seed: int,
        tile: int | None = None,
        input: Side | None = None,
        output: Side | None = None,
    ):
        self.generator = generator.train(not evaluation).requires_grad_(False)
        self.direction, self.size, self.source = direction, size, source
        self.input = input or of_8_bits("input", generator.in_channels)
        self.output = output or of_8_bits("output", generator.out_channels)
        self.interpolation = find_preset(generator.preset).data.interpolation
        self.evaluation, self.seed = evaluation, seed
        multiple = size_multiple(generator.num_downs)
        if tile is not None and (tile < multiple or tile % multiple):
            raise UserError(f"--tile {tile}: this network takes multiples of {multiple}")
        self.tile = tile

    @property
    def device(self) -> torch.device:
        return self.generator.last.weight.device

    @torch.no_grad()
    def _translate_one(self, source: Tensor) -> Tensor:
        """Whole or in tiles."""
        self.check_memory(*source.shape[-2:])
        source = source.to(self.device)
        if self.tile is None or not self.tiled(*source.shape[-2:]):
            return self._translate_whole(source)
        return blend_tiles(self._translate_whole, source, self.tile, self.tile // OVERLAPS_IN_A_TILE)

    def _translate_whole(self, source: Tensor) -> Tensor:
        """(1, channels, height, width) of any size: mirrored outwards to a size that fits, then cropped."""
        multiple = size_multiple(self.generator.num_downs)
        (rows, inside_rows), (columns, inside_columns) = (
            mirror_padding(n, multiple) for n in source.shape[-2:]
        )
        padded = source[:, :, rows.to(self.device)][..., columns.to(self.device)]
        self.generator.rng.copy_(torch.tensor([self.seed, 0]))  # the same dropout whatever came before
        return generate_without_trace(self.generator, padded)[:, :, inside_rows, inside_columns]

    def tiled(self, height: int, width: int) -> bool:
        """Whether an image of this size is translated in tiles."""
        return self.tile is not None and max(height, width) > self.tile

    def check_memory(self, height: int, width: int) -> None:
        """Raise UserError if an image of this size cannot go through the network in this machine's memory."""
        if self.tile is not None:
            height, width = min(height, self.tile), min(width, self.tile)
        needed = BYTES_PER_PIXEL_AND_WIDTH * self.generator.ngf * height * width
        there, whose = free_memory(self.device)
        if needed > there:
            raise UserError(
                f"image of {width}x{height} needs about {in_words(needed)} in this network, {whose} leaves "
                f"{in_words(there)}; translate it in tiles (--tile), or resized (--resize)"
            )


def mirror_padding(length: int, multiple: int) -> tuple[Tensor, slice]:
    """Indices that mirror ``length`` pixels outwards to a multiple, and where they lie in the result."""
    missing = -length % multiple
    before = missing // 2
    index = np.pad(np.arange(length), (before, missing - before), mode="symmetric")
    return torch.from_numpy(index), slice(before, before + length)


# --------------------------------------------------------------------------------------------- loading


def load(
    path: str | Path,
    *,
    device: str | torch.device = "auto",
    evaluation: bool = False,
    seed: int = 0,
    direction: Direction | None = None,
    no_dropout: bool = False,
    tile: int | None = None,
) -> Translator:
    """The trained generator at ``path`` as a function from image to image (see :class:`Translator`).

    path: the folder of a run (its newest checkpoint is taken), a ``step_*.pt`` checkpoint, a
    ``*_net_G.pth`` of pytorch-CycleGAN-and-pix2pix, or an ``.npz`` of the tutorial's weights
    (``np.savez(path, *generator.get_weights())``). By default every image is normalised by its own
    statistics and dropout is on, as both references test; ``evaluation`` takes the running statistics and no
    dropout; ``no_dropout`` leaves out the dropout alone. ``seed`` draws it. ``direction`` defaults to that of
    the training. Images larger than ``tile`` pixels, a multiple of the network's smallest size, are
    translated in tiles that overlap by a quarter and are blended; each is normalised by its own statistics.

    Raises UserError when there is no such model, its weights are not finite, or ``device`` is absent.
    """
    path, device = Path(path), choose_device(str(device))
    sides: dict[str, Side] = {}
    if path.suffix in (".pth", ".npz"):
        generator = (junyanz if path.suffix == ".pth" else keras).read_generator(path)
        trained_direction, size = (
            find_preset(generator.preset).data.direction,
            size_multiple(generator.num_downs),
        )
        source = str(path)
    else:
        file = checkpoint.latest(path) if path.is_dir() else path
        if file is None:
            raise UserError(f"{path} holds no checkpoint; give the folder of a run, or a .pth or .npz file")
        state = checkpoint.load(file)
        config = _configuration(state, file)
        generator = build_generator(config.network_options())
        _load_state(generator, state["generator"], file)
        trained_direction, size = config.resolved_direction(), config.crop_size
        source = f"{config.name}, step {state['step']}"
        sides = _sides(config, state, file)
    _check_finite(generator, path, evaluation)
    if no_dropout:
        generator.leave_out_dropout()
    return Translator(
        generator.to(device),
        direction=direction or trained_direction,
        size=size,
        source=source,
        evaluation=evaluation,
        seed=seed,
        tile=tile,
        **sides,
    )


def _sides(config: TrainConfig, state: dict, file: Path) -> dict[str, Side]:
    """What files of the run hold: what was asked for, and the types that the training found."""
    asked = {
        "input": Side("input", config.input_nc, config.input_range),
        "output": Side("output", config.output_nc, config.output_range),
    }
    try:
        return {name: side.recorded(state.get("environment") or {}) for name, side in asked.items()}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file}: does not say of which type its images are ({error})") from error


def _configuration(state: dict, file: Path) -> TrainConfig:
    try:
        return TrainConfig.from_dict(state["config"])
    except (UserError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"{file}: {error}") from error


def _load_state(generator: UNetGenerator, state: dict[str, Tensor], file: Path) -> None:
    try:
        generator.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{file} holds weights of another network than its configuration says") from error


def _check_finite(generator: UNetGenerator, path: Path, evaluation: bool) -> None:
    """Raise UserError when a weight, or in evaluation a running statistic, is infinite or no number."""
    used = {**dict(generator.named_parameters()), **(dict(generator.named_buffers()) if evaluation else {})}
    for name, tensor in used.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{path}: its weights are not finite ({name}), so every image is empty; take an earlier "
                "checkpoint, or train again with a lower --lr"
            )
