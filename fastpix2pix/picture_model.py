"""A function from picture to picture, whatever computes it: what pictures may be, and what comes of them."""

from abc import ABC, abstractmethod
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastpix2pix.data.options import Direction
from fastpix2pix.data.pictures import DTYPES, MODES
from fastpix2pix.data.resize import Interpolation
from fastpix2pix.data.sides import Side
from fastpix2pix.errors import UserError
from fastpix2pix.pixels import normalize

Picture = TypeVar("Picture", Image.Image, np.ndarray, Tensor)


class PictureModel(ABC):
    """direction, size, interpolation: which half of a pair it translates, and to which square images were
    resized for training. input, output: what files and arrays hold on both sides. source: where it came from,
    in words.
    """

    direction: Direction
    size: int
    interpolation: Interpolation
    input: Side
    output: Side
    source: str

    def __call__(self, image: Picture) -> Picture:
        """Translate ``image``; the result is of its kind and size, and the same at every call.

        A PIL image; an array (height, width, channels), or (height, width) for one channel, which becomes
        (height, width, channels); or a floating-point tensor (channels, height, width) or
        (n, channels, height, width) in [-1, 1], whose images are translated one by one. Arrays are uint8,
        uint16 or float32 with the values of files, and become arrays in the type and range of the training's
        targets. Raises UserError for anything else.
        """
        if isinstance(image, Image.Image):
            return _as_picture(self._translate_array(self._of_picture(image)))
        if isinstance(image, np.ndarray):
            return self._translate_array(image)
        if isinstance(image, Tensor):
            return self._translate_tensor(image)
        raise UserError(f"{type(image).__name__}: give a PIL image, an array or a tensor in [-1, 1]")

    @abstractmethod
    def _translate_one(self, source: Tensor) -> Tensor:
        """(1, channels, height, width) float32 in [-1, 1], of any size, -> the same with other channels."""

    def _translate_tensor(self, images: Tensor) -> Tensor:
        channels = self.input.channels
        fits = images.ndim in (3, 4) and images.shape[-3] == channels and images.numel()
        if not fits or not images.is_floating_point():
            raise UserError(
                f"tensor of {images.dtype} and shape {tuple(images.shape)}: give floating point "
                f"({channels}, height, width) or (n, {channels}, height, width) in [-1, 1]"
            )
        if images.ndim == 3:
            return self._translate_tensor(images[None])[0]
        # One by one: images in one batch would share their batch statistics.
        generated = torch.cat([self._translate_one(one[None].float()) for one in images])
        return generated.to(images.device, images.dtype)

    def _of_picture(self, image: Image.Image) -> np.ndarray:
        if image.mode[0] in "IF":  # more than 8 bits, of one channel
            return np.asarray(image)
        if self.input.channels not in MODES:
            raise UserError(f"PIL image: the network takes {self.input.channels} channels; give an array")
        return np.asarray(image.convert(MODES[self.input.channels]))

    def _translate_array(self, image: np.ndarray) -> np.ndarray:
        return self.output.restored(self._translate_tensor(self.normalized(image)))

    def normalized(self, image: np.ndarray) -> Tensor:
        """An array as the network takes it: (channels, height, width) float32 in [-1, 1]. Raises UserError
        for one that it cannot take."""
        channels = self.input.channels
        shaped = image[..., None] if image.ndim == 2 else image
        if shaped.ndim == 3 and shaped.shape[-1] == 1 and (channels, image.dtype) == (3, np.uint8):
            shaped = np.broadcast_to(shaped, (*shaped.shape[:2], 3))  # grey is repeated, as in training
        unscaled = image.dtype == np.float32 and self.input.range is None
        fits = shaped.ndim == 3 and shaped.shape[-1] == channels and shaped.size
        if not fits or image.dtype.name not in DTYPES or unscaled:
            types = "uint8 or uint16" if self.input.range is None else ", ".join(DTYPES)
            raise UserError(
                f"array of {image.dtype} and shape {image.shape}: give {types} (height, width, {channels})"
            )
        if image.dtype == np.float32 and not np.isfinite(image).all():
            raise UserError("array holds values that are not finite (NaN, infinity): give others for them")
        return normalize(self.input.kept(shaped), torch.float32)[0]

    def resize(self, image: np.ndarray, side: Side | None = None) -> np.ndarray:
        """``image`` (height, width, channels) in the square size and by the filter of the training; side: of
        which it is, by default the input."""
        return (side or self.input).resized(image, self.size, self.interpolation)


def _as_picture(samples: np.ndarray) -> Image.Image:
    """(height, width, channels) as a PIL image. Raises UserError where there is none of such samples."""
    channels = samples.shape[-1]
    if channels > 1 and (samples.dtype != np.uint8 or channels not in MODES):
        raise UserError(
            f"PIL image: the result is {channels} channels of {samples.dtype}, which no PIL image holds; "
            "give an array"
        )
    return Image.fromarray(samples[..., 0] if channels == 1 else samples)
