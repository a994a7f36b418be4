"""A trained generator as a function from image to image, whoever trained it."""

from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastpix2pix import checkpoint
from fastpix2pix.config import TrainConfig
from fastpix2pix.data.options import Direction
from fastpix2pix.data.resize import resize
from fastpix2pix.device import choose_device
from fastpix2pix.errors import UserError
from fastpix2pix.free_memory import free_memory, in_words
from fastpix2pix.interop import keras
from fastpix2pix.interop.junyanz import weights as junyanz
from fastpix2pix.models import UNetGenerator, build_generator
from fastpix2pix.models.generator import generate_without_trace, size_multiple
from fastpix2pix.pixels import normalize, to_uint8
from fastpix2pix.presets import find_preset
from fastpix2pix.tiling import blend_tiles

Picture = TypeVar("Picture", Image.Image, np.ndarray, Tensor)

# Bytes of activations per pixel and per channel of the first layer: 598 a pixel were measured at ngf 64.
BYTES_PER_PIXEL_AND_WIDTH = 10
OVERLAPS_IN_A_TILE = 4  # neighbouring tiles share at least a quarter of their width


class Translator:
    """A trained generator as a function from image to image; make it with :func:`load`.

    direction, size, interpolation: which half of a pair it translates, and to which square images were
    resized for training. source: where it came from, in words. tile: larger images go in tiles of so many
    pixels a side; None: whole.
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
    ):
        self.generator = generator.train(not evaluation).requires_grad_(False)
        self.direction, self.size, self.source = direction, size, source
        self.interpolation = find_preset(generator.preset).data.interpolation
        self.evaluation, self.seed = evaluation, seed
        multiple = size_multiple(generator.num_downs)
        if tile is not None and (tile < multiple or tile % multiple):
            raise UserError(f"--tile {tile}: this network takes multiples of {multiple}")
        self.tile = tile

    @property
    def device(self) -> torch.device:
        return self.generator.last.weight.device

    def __call__(self, image: Picture) -> Picture:
        """Translate ``image``; the result is of its type and size, and the same at every call.

        A PIL image; a uint8 array (height, width, channels), or (height, width) for grey, which becomes
        (height, width, channels); or a floating-point tensor (channels, height, width) or
        (n, channels, height, width) in [-1, 1], whose images are translated one by one. Raises UserError for
        anything else.
        """
        if isinstance(image, Image.Image):
            if image.mode[0] in "IF":
                raise UserError(f"image of mode {image.mode}: convert it to 8 bits per channel first")
            array = np.asarray(image.convert("L" if self.generator.in_channels == 1 else "RGB"))
            generated = self._translate_array(array)
            return Image.fromarray(generated[..., 0] if generated.shape[-1] == 1 else generated)
        if isinstance(image, np.ndarray):
            return self._translate_array(image)
        if isinstance(image, Tensor):
            return self._translate_tensor(image)
        raise UserError(f"{type(image).__name__}: give a PIL image, a uint8 array or a tensor in [-1, 1]")

    def _translate_array(self, image: np.ndarray) -> np.ndarray:
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise UserError(
                f"array of {image.dtype} and shape {image.shape}: give uint8 (height, width, channels)"
            )
        pixels = torch.from_numpy(np.atleast_3d(image).copy())[None].to(self.device)
        if pixels.shape[-1] == 1:
            pixels = pixels.expand(-1, -1, -1, self.generator.in_channels)  # grey is repeated, as in training
        return to_uint8(self._translate_tensor(normalize(pixels, torch.float32))[0])

    def _translate_tensor(self, images: Tensor) -> Tensor:
        channels = self.generator.in_channels
        fits = images.ndim in (3, 4) and images.shape[-3] == channels and images.numel()
        if not fits or not images.is_floating_point():
            raise UserError(
                f"tensor of {images.dtype} and shape {tuple(images.shape)}: give floating point "
                f"({channels}, height, width) or (n, {channels}, height, width) in [-1, 1]"
            )
        if images.ndim == 3:
            return self._translate_tensor(images[None])[0]
        self.check_memory(*images.shape[-2:])
        source = images.to(self.device, torch.float32)
        # One by one: images in one batch would share their batch statistics.
        generated = torch.cat([self._translate_one(one[None]) for one in source])
        return generated.to(images.device, images.dtype)

    @torch.no_grad()
    def _translate_one(self, source: Tensor) -> Tensor:
        """(1, channels, height, width) of any size, whole or in tiles."""
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

    def resize(self, image: np.ndarray) -> np.ndarray:
        """``image`` uint8 (height, width, 3) in the square size and by the filter of the training."""
        return resize(torch.from_numpy(image[None].copy()), self.size, self.interpolation)[0].numpy()

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
    )


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
