"""tanh + L1 of the generator's last layer, with its gradient, as one differentiable op."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpix2pix.kernels import reference
from fastpix2pix.kernels.launch import (
    DTYPES,
    as_pixels,
    cdiv,
    launch,
    next_power_of_2,
    pixel_stride,
    tl,
    triton,
    use_triton,
)
from fastpix2pix.kernels.reference import compute_dtype

NUM_WARPS = 4
BLOCK = NUM_WARPS * 32 * 8
"""Values of one program, eight a thread: one 16-byte vector of 16-bit values, two of fp32. A 256x256 image of
3 channels makes 192 programs, so that every multiprocessor has one."""

SUM_BLOCK = 1024
"""Partial sums that the last launch reads at a time: those of five such images."""

# ------------------------------------------------------------------------------------------------ kernels
#
# Images of 3 channels have no vector in a pixel, so they are walked through value by value: position
# p * channels + c is channel c of pixel p. An ``Image`` whose stride is None has its values side by side
# and moves in full vectors; a slice of a wider buffer is addressed pixel by pixel.
#
# x, fake, target, dfake, dx: ``Image``s. bias: (channels,) or None. dl1: scalar or None.
# partials: (programs, sums), what each program adds to the results; in the type that is computed in.
# total: values of one image. CHANNELS: channels. DTYPE: the type that is computed in.


class Image(NamedTuple):
    """pointer: to the first pixel. stride: elements from one pixel to the next, or None where that is the
    number of channels.
    """

    pointer: Any
    stride: Any


@triton.jit
def _start(BLOCK: tl.constexpr):
    """Position of this program's first value; in 64 bits, for batches of more than 2**31 values."""
    return tl.program_id(0).to(tl.int64) * BLOCK


@triton.jit
def _split(CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """The program's values as (pixels after the first value's, channel), for which 32 bits are enough."""
    i = (_start(BLOCK) % CHANNELS).to(tl.int32) + tl.arange(0, BLOCK)
    return i // CHANNELS, i % CHANNELS


@triton.jit
def _pointers(image, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    start = _start(BLOCK)
    if image.stride is None:
        return image.pointer + start + tl.arange(0, BLOCK)
    else:
        pixel, channel = _split(CHANNELS, BLOCK)
        return image.pointer + start // CHANNELS * image.stride + pixel * image.stride + channel


@triton.jit
def _load(image, inside, CHANNELS: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    return tl.load(_pointers(image, CHANNELS, BLOCK), mask=inside, other=0.0).to(DTYPE)


@triton.jit
def _tanh(x):
    """-m / (2 + m) with m = exp(-2 |x|) - 1, which is exact to rounding for small x too: where exp rounds,
    the logarithm of its result says by how much (Kahan; Higham, 2002, section 1.14.1)."""
    y = -2.0 * tl.abs(x)
    y = tl.where(y < -40.0, -40.0, y)  # there tanh is 1, also in fp64
    e = tl.exp(y)
    m = tl.where(e == 1.0, y, (e - 1.0) * (y / tl.where(e == 1.0, 1.0, tl.log(e))))
    t = -m / (2.0 + m)
    return tl.where(x < 0, -t, t)


@triton.jit
def tanh_l1_forward_map(
    x,
    bias,
    target,
    fake,
    partials,
    total,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    inside = _start(BLOCK) + tl.arange(0, BLOCK) < total
    z = _load(x, inside, CHANNELS, DTYPE, BLOCK)
    if bias is not None:
        _, channel = _split(CHANNELS, BLOCK)
        z += tl.load(bias + channel, mask=inside, other=0.0).to(DTYPE)
    value = _tanh(z).to(fake.pointer.dtype.element_ty)
    tl.store(_pointers(fake, CHANNELS, BLOCK), value, mask=inside)
    distance = tl.abs(value.to(DTYPE) - _load(target, inside, CHANNELS, DTYPE, BLOCK))
    tl.store(partials + tl.program_id(0), tl.sum(tl.where(inside, distance, 0.0)))


@triton.jit
def tanh_l1_backward_map(
    dfake,
    dl1,
    fake,
    target,
    dx,
    partials,
    total,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    inside = _start(BLOCK) + tl.arange(0, BLOCK) < total
    value = _load(fake, inside, CHANNELS, DTYPE, BLOCK)
    gradient = tl.zeros_like(value)
    if dfake is not None:
        gradient += _load(dfake, inside, CHANNELS, DTYPE, BLOCK)
    if dl1 is not None:
        distance = value - _load(target, inside, CHANNELS, DTYPE, BLOCK)
        each = tl.load(dl1).to(DTYPE) / total
        gradient += tl.where(distance > 0, each, tl.where(distance < 0, -each, 0.0))
    gradient *= (1.0 - value) * (1.0 + value)
    tl.store(_pointers(dx, CHANNELS, BLOCK), gradient, mask=inside)
    if partials is not None:
        _, channel = _split(CHANNELS, BLOCK)
        for c in range(CHANNELS):
            mine = inside & (channel == c)
            tl.store(partials + tl.program_id(0) * CHANNELS + c, tl.sum(tl.where(mine, gradient, 0.0)))


@triton.jit
def tanh_l1_sums(
    partials, result, programs, divisor, SUMS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SUMS: tl.constexpr
):
    """``result[i]``: the sum of the partial sums ``[:, i]``, always in the same order, over ``divisor``."""
    column = tl.arange(0, BLOCK_SUMS)
    sums = tl.zeros((BLOCK, BLOCK_SUMS), partials.dtype.element_ty)
    for start in range(0, programs, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = (row < programs)[:, None] & (column < SUMS)[None, :]
        sums += tl.load(partials + row[:, None] * SUMS + column[None, :], mask=inside, other=0.0)
    tl.store(result + column, tl.sum(sums, 0) / divisor, mask=column < SUMS)


# -------------------------------------------------------------------------------------------------- ops


def _image(image: Tensor | None) -> Image | None:
    if image is None:
        return None
    stride = pixel_stride(image)
    return Image(image, None if stride == image.shape[1] else stride)


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
    x: Tensor, bias: Tensor | None, target: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``reference.tanh_l1_forward``, in two launches on a GPU. ValueError for an ``out`` unlike ``x``."""
    if not use_triton(x):
        return reference.tanh_l1_forward(x, bias, target, out)
    x, target = as_pixels(x), as_pixels(target)
    fake = torch.empty_like(x, memory_format=torch.channels_last) if out is None else out
    if fake.shape != x.shape or fake.dtype != x.dtype or pixel_stride(fake) is None:
        raise ValueError(
            f"out is {fake.dtype} {tuple(fake.shape)} with strides {fake.stride()}; it must be {x.dtype} "
            f"{tuple(x.shape)}, a channels-last image or a slice of one's channels"
        )
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
    dx = torch.empty_like(fake, memory_format=torch.channels_last)
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
    x: Tensor, bias: Tensor | None, target: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Differentiable ``tanh_l1_forward``, with respect to ``x`` and ``bias``.

    ``out`` is plain memory to write into, not an input of the autograd graph: the image returned is a new
    tensor that shares it.
    """
    return _TanhL1.apply(x, bias, target, (out,))


# ----------------------------------------------------------------------------------------------- specimens


def specimens(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """One 256x256 image on its way into the discriminator's input, and back (see report.py)."""
    pairs = torch.empty((2, 6, 256, 256), dtype=dtype, memory_format=torch.channels_last)
    x = torch.empty((1, 3, 256, 256), dtype=dtype, memory_format=torch.channels_last)
    fake, bias = pairs[1:, 3:], torch.empty(3)
    label = "256x256x3"
    yield label, partial(tanh_l1_forward, x, bias, x, fake)
    yield label, partial(tanh_l1_backward, fake, torch.empty(()), fake, x, bias)
