"""Between pixels and the [-1, 1] that networks work in."""

import numpy as np
import torch
from torch import Tensor


def normalize(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 (n, height, width, c) -> x / 127.5 - 1, (n, c, height, width) in channels-last memory.

    float32 images are in [-1, 1] already.
    """
    if images.dtype == torch.uint8:
        images = to_unit_range(images.to(torch.float32))
    return images.to(dtype).permute(0, 3, 1, 2)


def to_unit_range(pixels: Tensor) -> Tensor:
    """float32 0 ... 255 -> -1 ... 1, in place."""
    # The divisor is a tensor because CUDA turns division by a Python number into a product with its
    # reciprocal, one unit in the last place off the tutorial's float32.
    half_range = torch.full((), 127.5, device=pixels.device)
    return pixels.div_(half_range).sub_(1.0)


def to_uint8(image: Tensor) -> np.ndarray:
    """(C, H, W) in [-1, 1] to (H, W, C) uint8."""
    scaled = (image.detach().float().cpu() + 1) * 127.5
    return scaled.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def preview(image: Tensor) -> np.ndarray:
    """(C, H, W) in [-1, 1] -> a picture to look at, uint8 (H, W, 3): one channel as grey, of more the first
    three as red, green and blue (of two: no blue)."""
    pixels = to_uint8(image)
    missing = 3 - pixels.shape[-1]
    if missing == 2:
        return np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    return np.pad(pixels, ((0, 0), (0, 0), (0, max(0, missing))))[..., :3]
