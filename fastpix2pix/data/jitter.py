"""Random jitter after the resize, as tensor operations: crop, flip and the step to [-1, 1]."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fastpix2pix.data.plan import Chunk

Images = Tensor | Sequence[Tensor]  # n of uint8 (height, width, 3)


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

    ``images`` are uint8 (height, width, 3) on any device; the arrays, all (n,), hold each crop's corner
    and whether it is flipped. Returns (n, 3, crop_size, crop_size) in channels-last memory on the same
    device, in [-1, 1].
    """
    shape = len(images), crop_size, crop_size, 3
    crops = torch.empty(shape, dtype=dtype, device=images[0].device)
    scratch = torch.empty(shape[1:], device=crops.device)
    # One image at a time: a CPU then finds it in its cache from the first operation to the last.
    for image, y, x, flipped, result in zip(
        images, top.tolist(), left.tolist(), mirror.tolist(), crops, strict=True
    ):
        crop = image[y : y + crop_size, x : x + crop_size]
        pixels = result if dtype == torch.float32 else scratch
        _to_unit_range(pixels.copy_(crop.flip(1) if flipped else crop))
        if pixels is scratch:
            result.copy_(scratch)
    return crops.permute(0, 3, 1, 2)


def normalize(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 (n, height, width, 3) -> x / 127.5 - 1, (n, 3, height, width) in channels-last memory."""
    return _to_unit_range(images.to(torch.float32)).to(dtype).permute(0, 3, 1, 2)


def _to_unit_range(pixels: Tensor) -> Tensor:
    """float32 0 ... 255 -> -1 ... 1, in place."""
    # The divisor is a tensor because CUDA turns division by a Python number into a product with its
    # reciprocal, one unit in the last place off the tutorial's float32.
    half_range = torch.full((), 127.5, device=pixels.device)
    return pixels.div_(half_range).sub_(1.0)
