"""tanh + L1 of the generator's last layer, with its gradient, as one differentiable op."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpix2pix.kernels import reference
from fastpix2pix.kernels.images import as_pixels, output_like, pixel_stride
from fastpix2pix.kernels.language import ImagePointer
from fastpix2pix.kernels.launch import DTYPES, launch, use_triton
from fastpix2pix.kernels.reference import compute_dtype
from fastpix2pix.kernels.tanh_l1_kernels import tanh_l1_backward_map, tanh_l1_forward_map, tanh_l1_sums
from fastpix2pix.kernels.tiles import cdiv, next_power_of_2

NUM_WARPS = 4
BLOCK = NUM_WARPS * 32 * 8
"""Values of one program, eight a thread: one 16-byte vector of 16-bit values, two of fp32. A 256x256 image of
3 channels makes 192 programs, so that every multiprocessor has one."""

SUM_BLOCK = 1024
"""Partial sums that the last launch reads at a time: those of five such images."""


def _image(image: Tensor | None) -> ImagePointer | None:
    """The kernels' argument; its stride is None where pixels lie side by side."""
    if image is None:
        return None
    stride = pixel_stride(image)
    return ImagePointer(image, None if stride == image.shape[1] else stride)


def _programs(image: Tensor) -> int:
    return cdiv(image.numel(), BLOCK)


def _constants(image: Tensor) -> dict[str, Any]:
    return {
        "CHANNELS": image.shape[1],
        "DTYPE": DTYPES[compute_dtype(image.dtype)],
        "BLOCK": BLOCK,
        "num_warps": NUM_WARPS,
    }


def _sum(partials: Tensor, result: Tensor, divisor: int) -> None:
    """``result``: the sums of the columns of ``partials`` over ``divisor``, in a launch of one program."""
    programs, sums = partials.shape
    block_sums = next_power_of_2(sums)
    launch(
        tanh_l1_sums,
        (1,),
        partials,
        result,
        programs,
        divisor,
        SUMS=sums,
        BLOCK=max(SUM_BLOCK // block_sums, 1),
        BLOCK_SUMS=block_sums,
        num_warps=NUM_WARPS,
        reads=(partials,),
        writes=(result,),
    )


def tanh_l1_forward(
    x: Tensor,
    bias: Tensor | None,
    target: Tensor,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``reference.tanh_l1_forward``, in two launches on a GPU. ValueError for an ``out`` unlike ``x``."""
    if not use_triton(x):
        return reference.tanh_l1_forward(x, bias, target, out)
    x, target = as_pixels(x), as_pixels(target)
    fake = output_like(x, out)
    l1 = torch.empty((), dtype=compute_dtype(x.dtype), device=x.device)
    partials = l1.new_empty((_programs(x), 1))
    launch(
        tanh_l1_forward_map,
        (_programs(x),),
        _image(x),
        bias,
        _image(target),
        _image(fake),
        partials,
        x.numel(),
        **_constants(x),
        reads=(x, bias, target),
        writes=(fake, partials),
    )
    _sum(partials, l1, x.numel())
    return fake, l1


def tanh_l1_backward(
    dfake: Tensor | None, dl1: Tensor | None, fake: Tensor, target: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """``reference.tanh_l1_backward``, in one launch on a GPU, and one more for the bias's gradient."""
    if not use_triton(fake):
        return reference.tanh_l1_backward(dfake, dl1, fake, target, bias)
    fake, target = as_pixels(fake), as_pixels(target)
    dfake = None if dfake is None else as_pixels(dfake)
    dx = output_like(fake)
    dbias = partials = None
    if bias is not None:
        dbias = torch.empty_like(bias)
        shape = _programs(fake), fake.shape[1]
        partials = torch.empty(shape, dtype=compute_dtype(fake.dtype), device=fake.device)
    launch(
        tanh_l1_backward_map,
        (_programs(fake),),
        _image(dfake),
        dl1,
        _image(fake),
        _image(target),
        _image(dx),
        partials,
        fake.numel(),
        **_constants(fake),
        reads=(dfake, dl1, fake, target),
        writes=(dx, partials),
    )
    if bias is not None:
        _sum(partials, dbias, 1)
    return dx, dbias


class _TanhL1(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, target, slot):
        fake, l1 = tanh_l1_forward(x, bias, target, *slot)
        ctx.save_for_backward(fake, target, bias)
        ctx.set_materialize_grads(False)
        return fake, l1

    @staticmethod
    @once_differentiable
    def backward(ctx, dfake, dl1):
        fake, target, bias = ctx.saved_tensors
        return *tanh_l1_backward(dfake, dl1, fake, target, bias), None, None


def tanh_l1(
    x: Tensor,
    bias: Tensor | None,
    target: Tensor,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Differentiable ``tanh_l1_forward``, with respect to ``x`` and ``bias``.

    ``out`` is plain memory to write into, not an input of the autograd graph: the image returned is a new
    tensor that shares it.
    """
    return _TanhL1.apply(x, bias, target, (out,))
