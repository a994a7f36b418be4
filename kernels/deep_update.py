"""A deep layer's weight gradient and Adam in one pass: the gradient is never stored.

The weight gradient of a deep layer (``deep_conv``) is a product of two thin matrices: of all pixels of the
small image, at most 256, and what the tap sees of the big one. To form a tile of it takes far less time than
to move the moments and the master of that tile, so the program that forms a tile updates its weights as well.

The gradient goes into Adam as it was summed, in float32; a gradient that is stored in between is rounded to
the weight's type. So one of float16 images never overflows: a sum of 256 products of values up to 65504 is
finite in float32, and not finite just where a value of either image is not. A loss scale, which has to know
before any weight moves, looks for infinities in the images, thousands of values instead of millions.

On a CPU the same happens a few rows at a time, which stay in the cache, for images of so few pixels that
their products take no longer in float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastpix2pix.kernels import adam, deep_conv
from fastpix2pix.kernels.adam import AdamClock, AdamForm, AdamTensors
from fastpix2pix.kernels.cpu_conv import FEW_PIXELS, TRANSPOSED_STRIDE, Tiling
from fastpix2pix.kernels.deep_update_kernels import deep_update
from fastpix2pix.kernels.images import as_pixels, image_pointer
from fastpix2pix.kernels.language import INTERPRETING
from fastpix2pix.kernels.launch import launch, on_tensor_cores, use_triton
from fastpix2pix.kernels.tiles import cdiv, next_power_of_2, pipelined_trips

TAPS = 16

FMA_PIXELS = 64
"""The most pixels of a layer that is updated in one pass without tensor cores. By the published rates (a
model) a V100 then multiplies for a third of the time that the weight's streams take, and can do both at once;
with 256 pixels for longer than that."""


@dataclass(frozen=True)
class Tile:
    """What a program updates, rows x columns of one tap, in steps of so many pixels; its warps and stages;
    the most registers of a thread, None for the hardware's own limit.
    """

    rows: int
    columns: int
    pixels: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def choose_update_tile(pixels: int, itemsize: int, tensor_cores: bool = True) -> Tile:
    """32 x 64 weights: 8 a thread, in two full vectors of each fp32 stream, and 2048 programs for 512 x 512.

    With more than 128 pixels in 16 bit, 64 x 64, which reads the images half as often, and which the matrix
    instructions of sm_90 and sm_100 take; with at most 128 registers two such programs share a
    multiprocessor. A step has at least the 16 pixels that a matrix instruction takes; in fp32 at most 32, as
    more would not stay in registers. Without tensor cores it has 16 in any type: Triton unrolls them, and
    more would not stay in registers either.
    """
    if not tensor_cores:
        return Tile(32, 64, 16, num_warps=8, num_stages=1)
    if itemsize == 2 and pixels > 128:
        return Tile(64, 64, 64, num_warps=8, num_stages=2, max_registers=128)
    most = 64 if itemsize == 2 else 32
    return Tile(32, 64, min(max(next_power_of_2(pixels), 16), most), num_warps=8, num_stages=1)


def serves(small: Tensor, big: Tensor, weight: Tensor) -> bool:
    """Whether ``update`` is one pass for these images and this layer's weight (Cs, Cb, 4, 4).

    The weight has to lie channels-last. For the kernel it has a multiple of 16 columns, and without tensor
    cores there are at most ``FMA_PIXELS``. With ``--deep_conv library`` there is none. On a CPU the weight is
    in bf16: a gradient in fp32 is stored faster.
    """
    cs, cb, *kernel = weight.shape
    if (
        kernel != [4, 4]
        or not weight.is_contiguous(memory_format=torch.channels_last)
        or not small.dtype == big.dtype == weight.dtype
        or (small.shape[1], big.shape[1]) != (cs, cb)
    ):
        return False
    pixels = small.numel() // cs
    if not use_triton(weight):
        on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
        return on_cpu and pixels <= FEW_PIXELS
    return (
        deep_conv.offered
        and (pixels <= FMA_PIXELS or on_tensor_cores(weight))
        and cb % 16 == 0
        and weight.dtype in (torch.bfloat16, torch.float16, torch.float32)
    )


def _update_by_rows(
    small: Tensor,
    big: Tensor,
    weight: AdamTensors,
    clock: AdamClock,
    form: AdamForm,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """``update`` without a kernel, of as many rows at a time as make a chunk of ``adam.CPU_CHUNK``."""
    tiling, grid, dtype = Tiling(TRANSPOSED_STRIDE, 1), tuple(small.shape[2:]), weight.exp_avg.dtype
    rows = tiling.small_matrices(small.to(dtype), grid)[:, 0].t().contiguous()
    pixels = tiling.big_matrices(big.to(dtype), grid)[:, 0]
    columns = pixels.shape[1]
    count = max(adam.CPU_CHUNK // columns, 1)
    memory = pixels.new_empty(count, columns)
    for begin in range(0, len(rows), count):
        some = rows[begin : begin + count]
        chunk = slice(begin * columns, (begin + len(some)) * columns)
        gradient = torch.mm(some, pixels, out=memory[: len(some)])
        part = AdamTensors(*(None if tensor is None else tensor[chunk] for tensor in weight))
        adam.update([part], [gradient.view(-1)], clock, form, grad_scale, found_inf)


def update(
    small: Tensor,
    big: Tensor,
    weight: AdamTensors,
    clock: AdamClock,
    form: AdamForm,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """``adam.update`` of a deep layer's weight by its gradient, which is that of ``deep_conv``, in place.

    small: (N, Cs, h, w); big: (N, Cb, 2 h, 2 w); one of them is a gradient. weight: in channels-last order;
    for the kernel Cb is a multiple of 16. grad_scale, found_inf: float32 scalars, or None.
    """
    if not use_triton(small):
        _update_by_rows(small, big, weight, clock, form, grad_scale, found_inf)
        return
    small, big = as_pixels(small), as_pixels(big)
    n, rows, height, width = small.shape
    pixels, columns = n * height * width, big.shape[1]
    tile = choose_update_tile(pixels, small.element_size(), on_tensor_cores(small))
    launch(
        deep_update,
        (TAPS * cdiv(columns, tile.columns), cdiv(rows, tile.rows)),
        image_pointer(small),
        image_pointer(big),
        *weight,
        pixels,
        height,
        width,
        rows,
        columns,
        clock,
        grad_scale,
        found_inf,
        BETA1=form.beta1,
        BETA2=form.beta2,
        BLOCK_ROWS=tile.rows,
        BLOCK_COLUMNS=tile.columns,
        BLOCK_PIXELS=tile.pixels,
        PRECISION="tf32" if deep_conv.float32_convolutions_use_tf32() else "ieee",
        WIDEN=INTERPRETING and small.element_size() == 2,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.max_registers,
        reads=(small, big, *weight.reads, clock.alpha, clock.eps_hat, grad_scale, found_inf),
        writes=weight.writes,
        # The weight's streams come last.
        trips=pipelined_trips(cdiv(pixels, tile.pixels), tile.num_stages) + 1,
        flops=2 * pixels * weight.exp_avg.numel(),
    )
