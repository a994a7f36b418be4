"""Random jitter after the resize, as tensor operations: crop, flip and the step to [-1, 1]."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fastpix2pix.data.plan import Chunk
from fastpix2pix.pixels import to_unit_range

Images = Tensor | Sequence[Tensor]  # n of uint8 or float32 (height, width, channels)


def jittered_chunks(
    images: Iterator[tuple[Images, Images]], chunks: Iterator[Chunk], crop_size: int, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """:func:`jitter` of the resized (A, B) of each chunk, by the chunk's decisions."""
    for halves, chunk in zip(images, chunks, strict=True):
        decisions = chunk.top, chunk.left, chunk.mirror
        yield tuple(jitter(half, *decisions, crop_size, dtype) for half in halves)


def jitter(
    images: Images,
    top: np.ndarray,
    left: np.ndarray,
    mirror: np.ndarray,
    crop_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Crops, flips left to right and normalises n images.

    ``images`` are uint8 (height, width, channels) on any device, or float32, which are normalised already;
    the arrays, all (n,), hold each crop's corner and whether it is flipped. Returns (n, channels, crop_size,
    crop_size) in channels-last memory on the same device, in [-1, 1].
    """
    shape = len(images), crop_size, crop_size, images[0].shape[-1]
    crops = torch.empty(shape, dtype=dtype, device=images[0].device)
    scratch = torch.empty(shape[1:], device=crops.device)
    # One image at a time: a CPU then finds it in its cache from the first operation to the last.
    for image, y, x, flipped, result in zip(
        images, top.tolist(), left.tolist(), mirror.tolist(), crops, strict=True
    ):
        crop = image[y : y + crop_size, x : x + crop_size]
        crop = crop.flip(1) if flipped else crop
        if crop.is_floating_point():
            result.copy_(crop)
            continue
        pixels = result if dtype == torch.float32 else scratch
        to_unit_range(pixels.copy_(crop))
        if pixels is scratch:
            result.copy_(scratch)
    return crops.permute(0, 3, 1, 2)
