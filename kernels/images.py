"""Images as the kernels see them: matrices with a row for each pixel and a column for each channel."""

import torch
from torch import Tensor

from fastpix2pix.kernels.language import ImagePointer


def pixel_stride(image: Tensor) -> int | None:
    """Elements from one pixel of (N, C, H, W) to the next, or None if they don't lie at equal distances.

    A channels-last image, a slice of its channels and a range of its batch have one. Dimensions of size 1
    can have any stride.
    """
    n, c, h, w = image.shape
    per_image, per_channel, per_row, per_column = image.stride()
    if c > 1 and per_channel != 1:
        return None
    # The innermost dimension of more than one pixel decides; the others must agree with it.
    stride = per_column if w > 1 else per_row if h > 1 else per_image if n > 1 else c
    agrees = (h == 1 or per_row == w * stride) and (n == 1 or per_image == h * w * stride)
    return stride if agrees and stride >= c else None


def as_pixels(image: Tensor) -> Tensor:
    """``image`` itself if it has a pixel stride, else a channels-last copy."""
    return image.contiguous(memory_format=torch.channels_last) if pixel_stride(image) is None else image


def image_pointer(image: Tensor | None) -> ImagePointer:
    return ImagePointer(None, 0) if image is None else ImagePointer(image, pixel_stride(image))


def output_like(x: Tensor, out: Tensor | None = None) -> Tensor:
    """``out`` if a result of the shape and type of ``x`` can be written there, else ValueError.

    Without ``out``, a new channels-last image.
    """
    if out is None:
        return torch.empty_like(x, memory_format=torch.channels_last)
    if out.shape != x.shape or out.dtype != x.dtype or pixel_stride(out) is None:
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} with strides {out.stride()}; it must be {x.dtype} "
            f"{tuple(x.shape)}, a channels-last image or a slice of one's channels"
        )
    return out
