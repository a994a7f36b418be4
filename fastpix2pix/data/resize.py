"""Resizing, of 8-bit images the same on every device: the tutorial's nearest and Pillow's bicubic.

DALI resizes by nearest neighbour itself wherever its pixels are these; its cubic differs from Pillow's by a
level or two. Here a GPU does both filters in integers, so that tests on CPU tensors prove the GPU's pixels,
and the CPU leaves bicubic to Pillow itself, which is faster there.
"""

from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Interpolation = Literal["nearest", "bicubic"]

FRACTION_BITS = 22  # Pillow's fixed point: 32 bits less 8 for the pixel and 2 for the overshoot


def resize(images: Tensor, size: int, interpolation: Interpolation) -> Tensor:
    """``images`` uint8 (n, height, width, 3) -> uint8 (n, size, size, 3) on the same device; or, on a CPU,
    float32 of any channels in [-1, 1] -> float32.

    ``nearest`` is ``tf.image.resize(..., NEAREST_NEIGHBOR)`` as the tutorial calls it. ``bicubic`` is
    ``PIL.Image.resize(..., BICUBIC)``, antialiasing included, along the rows first as Pillow before 13
    does always and later ones nearly always.
    """
    if images.shape[1:3] == (size, size):
        return images
    if interpolation == "nearest":
        rows, columns = (nearest_indices(n, size, images.device) for n in images.shape[1:3])
        return images.index_select(1, rows).index_select(2, columns)
    if images.dtype == torch.float32:
        return float_bicubic(images, size)
    return pillow_bicubic(images, size) if images.device.type == "cpu" else integer_bicubic(images, size)


@lru_cache(maxsize=64)
def nearest_indices(size_in: int, size_out: int, device: torch.device) -> Tensor:
    """int64 (size_out,): floor((i + 0.5) * size_in / size_out), the half-pixel-centre rule, in integers."""
    return (2 * torch.arange(size_out, device=device) + 1) * size_in // (2 * size_out)


def pillow_bicubic(images: Tensor, size: int) -> Tensor:
    """Bicubic by Pillow, for CPU tensors; two calls fix the order of the passes whatever its version."""
    resized = torch.empty(len(images), size, size, 3, dtype=torch.uint8)
    for image, out in zip(images.numpy(), resized.numpy(), strict=True):
        along_rows = Image.fromarray(image).resize((size, image.shape[0]), Image.Resampling.BICUBIC)
        out[:] = along_rows.resize((size, size), Image.Resampling.BICUBIC)
    return resized


def float_bicubic(images: Tensor, size: int) -> Tensor:
    """Bicubic by Pillow in float32, channel by channel; what overshoots [-1, 1] ends there, as 8 bits do."""
    resized = torch.empty(len(images), size, size, images.shape[-1])
    for image, out in zip(images.numpy(), resized.numpy(), strict=True):
        for channel in range(image.shape[-1]):
            plane = Image.fromarray(np.ascontiguousarray(image[..., channel]))
            along_rows = plane.resize((size, plane.height), Image.Resampling.BICUBIC)
            out[..., channel] = along_rows.resize((size, size), Image.Resampling.BICUBIC)
    return resized.clamp_(-1, 1)


def integer_bicubic(images: Tensor, size: int) -> Tensor:
    """The same pixels as :func:`pillow_bicubic`, bit for bit, by tensor operations on any device."""
    for dim in (2, 1):  # along the rows first, rounded to 8 bits in between
        if images.shape[dim] != size:
            images = _bicubic_pass(images, size, dim)
    return images


def _bicubic_pass(images: Tensor, size: int, dim: int) -> Tensor:
    first, weights = bicubic_weights(images.shape[dim], size, images.device)
    shape = [1, 1, 1, 1]
    shape[dim] = size
    total: Any = 1 << (FRACTION_BITS - 1)  # one half: the shift below then rounds to nearest
    for tap in range(weights.shape[1]):
        # Past the border the weight is 0, so any pixel may stand in.
        source = (first + tap).clamp(max=images.shape[dim] - 1)
        total = total + images.index_select(dim, source).to(torch.int32) * weights[:, tap].reshape(shape)
    return (total >> FRACTION_BITS).clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=64)
def bicubic_weights(size_in: int, size_out: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pillow's bicubic (Keys 1981, a = -0.5): first source pixel, int64 (n,), and weights, int32 (n, taps).

    When shrinking, the kernel is stretched by the scale (antialiasing). Taps outside the image are left
    out and the others scaled to sum to 1; weights are in units of 2**-22.
    """
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    centre = (np.arange(size_out) + 0.5) * scale
    first = np.maximum((centre - 2 * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + 2 * stretch + 0.5).astype(np.int64), size_in)
    source = first[:, None] + np.arange((last - first).max())
    weights = np.where(source < last[:, None], _keys((source - centre[:, None] + 0.5) / stretch), 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    fixed = np.trunc(weights * (1 << FRACTION_BITS) + np.copysign(0.5, weights)).astype(np.int32)
    return torch.from_numpy(first).to(device), torch.from_numpy(fixed).to(device)


def _keys(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
