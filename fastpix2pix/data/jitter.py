"""The tutorial's random jitter after the resize: crop, flip and the step to [-1, 1]."""

import numpy as np
import torch
from torch import Tensor

from fastpix2pix.pixels import normalize


def jitter(
    images: Tensor,
    which: np.ndarray,
    top: np.ndarray,
    left: np.ndarray,
    mirror: np.ndarray,
    crop_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Crops, flips and normalises the images named by ``which``.

    ``images`` is uint8 (m, size, size, 3) on any device; the arrays, all (n,), say for each result the
    image, the crop's corner and whether it is flipped left to right. Returns
    (n, 3, crop_size, crop_size) in channels-last memory on the same device, in [-1, 1].
    """
    corners = zip(which.tolist(), top.tolist(), left.tolist(), strict=True)
    crops = torch.stack([images[i, y : y + crop_size, x : x + crop_size] for i, y, x in corners])
    # non_blocking: a GPU's queue of steps is not drained for these few numbers
    mirrored = torch.from_numpy(np.flatnonzero(mirror)).to(images.device, non_blocking=True)
    crops[mirrored] = crops[mirrored].flip(2)
    return normalize(crops, dtype)
