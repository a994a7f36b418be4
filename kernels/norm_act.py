"""Normalisation + activation + dropout of a convolution's output, as one differentiable op.

Two regimes, by the number of pixels:

* few (the inner layers): a program owns a slice of the channels in all groups, so statistics and result
  come from one launch, and the second look at the pixels is served by the L1 cache;
* many (the outer layers): one launch leaves the partial sums of chunks of pixels in a workspace, the next
  combines them, always in the same order, and writes the result.

Where no statistics are taken (no norm, or running statistics) one launch is left of the second regime.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpix2pix.kernels import reference
from fastpix2pix.kernels.launch import (
    CHUNK_BACKWARD,
    CHUNK_FORWARD,
    DTYPES,
    FEW_PIXELS,
    WHOLE_BACKWARD,
    WHOLE_FORWARD,
    Tile,
    as_pixels,
    cdiv,
    choose_tile,
    elementwise_chunks,
    launch,
    next_power_of_2,
    pixel_stride,
    reduction_chunks,
    tl,
    triton,
    use_triton,
)
from fastpix2pix.kernels.reference import (
    NormActBackward,
    NormActConfig,
    NormActForward,
    compute_dtype,
    dropout_threshold,
)

# ------------------------------------------------------------------------------------------------ kernels
#
# An image is a matrix: its pixels, over the whole batch, are the rows and its channels the columns. Program
# (i, j, k) works on the i-th chunk of pixels, the j-th block of channels and the k-th group.
#
# x, y, skip, dy, dskip, dx: ``Image``s. weight, bias, running_mean, running_var, dweight, dbias: (channels,)
# or None. mean, rstd: (groups, channels), in the type that is computed in. partials: the workspace
# (2, groups, chunks, channels) between two launches, in the same type. rng: the int64 pair (seed, step) of
# the dropout, or None; layer: the layer's number in the dropout's counter.
# pixels: rows of one group; chunk_pixels: of one program, apply_pixels: of one program of the second launch.
# CONSTANTS: a ``Constants``. BLOCK_PIXELS, BLOCK_CHANNELS: the tile that a program holds in registers at a
# time, see launch.py. BLOCK_CHUNKS: a power of two not below the number of chunks.
#
# What is None and what is in capitals is known when a kernel is compiled: a layer pays for its own parts.


class Image(NamedTuple):
    """pointer: to the first pixel, or None where there is no such image. stride: elements from one pixel to
    the next, which is more than there are channels where the image is a slice of a wider buffer.
    """

    pointer: Any
    stride: Any


class Channelwise(NamedTuple):
    """What a tile is normalised with: rows of one number per channel; None for a step that is left out."""

    mean: Any
    rstd: Any
    weight: Any
    bias: Any


class Constants(NamedTuple):
    """What a ``NormActConfig`` fixes, as the kernels need it; ``layer`` stays out, it differs too often.

    threshold: random words below it drop their value; 0 for no dropout. keep_scale: of the values kept.
    """

    eps: float
    momentum: float
    unbiased: bool
    slope: float
    skip_slope: float | None
    threshold: int
    keep_scale: float


@triton.jit
def _channel_block(BLOCK_CHANNELS: tl.constexpr):
    return tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)


@triton.jit
def _inside(row, last, channel, channels):
    return (row < last)[:, None] & (channel < channels)[None, :]


@triton.jit
def _pointers(image, pixel, channel):
    """Of a tile; the offsets are 64 bits wide, for batches of more than 2**31 values."""
    return image.pointer + pixel.to(tl.int64)[:, None] * image.stride + channel[None, :]


@triton.jit
def _load_tile(image, pixel, channel, inside, DTYPE: tl.constexpr):
    return tl.load(_pointers(image, pixel, channel), mask=inside, other=0.0).to(DTYPE)


@triton.jit
def _load_row(pointer, channel, channels, DTYPE: tl.constexpr):
    """One number per channel, 0 beyond the last; None for None."""
    if pointer is None:
        return None
    else:
        return tl.load(pointer + channel, mask=channel < channels, other=0.0).to(DTYPE)


@triton.jit
def _store_row(pointer, row, channel, channels):
    if pointer is not None:
        tl.store(pointer + channel, row, mask=channel < channels)


@triton.jit
def _combine(count, mean, m2):
    """Mean and summed squared deviation per channel from those of the rows (Chan et al., 1979).

    count: (rows,) values behind each row. The mean is taken twice, the second time of what the first left
    over: that sum is small, so a large mean does not cost the digits of the spread.
    """
    total = tl.sum(count, 0)
    centre = tl.sum(count[:, None] * mean, 0) / total
    centre += tl.sum(count[:, None] * (mean - centre[None, :]), 0) / total
    deviation = mean - centre[None, :]
    return centre, tl.sum(m2 + count[:, None] * deviation * deviation, 0)


@triton.jit
def _statistics(x, first, last, channel, channels, DTYPE: tl.constexpr, BLOCK_PIXELS: tl.constexpr):
    """Mean and summed squared deviation per channel of the pixels first .. last - 1.

    Each row of the tile follows its own pixels (Welford, 1962); the rows are combined at the end.
    """
    row = tl.arange(0, BLOCK_PIXELS)
    mean = tl.zeros((BLOCK_PIXELS, channel.shape[0]), DTYPE)
    m2 = tl.zeros((BLOCK_PIXELS, channel.shape[0]), DTYPE)
    for start in range(first, last, BLOCK_PIXELS):
        pixel = start + row
        inside = _inside(pixel, last, channel, channels)
        value = _load_tile(x, pixel, channel, inside, DTYPE)
        delta = tl.where(inside, value - mean, 0.0)
        seen = (start - first) // BLOCK_PIXELS + 1
        mean += delta * (1.0 / seen.to(DTYPE))
        m2 += delta * (value - mean)
    count = ((last - first - row + BLOCK_PIXELS - 1) // BLOCK_PIXELS).to(DTYPE)
    return _combine(count, mean, m2)


@triton.jit
def _combined_statistics(
    partials,
    group,
    groups,
    chunks,
    pixels,
    chunk_pixels,
    channel,
    channels,
    DTYPE: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """Mean and summed squared deviation per channel of a group, from those of its chunks."""
    chunk = tl.arange(0, BLOCK_CHUNKS)
    count = tl.minimum(tl.maximum(pixels - chunk * chunk_pixels, 0), chunk_pixels).to(DTYPE)
    inside = _inside(chunk, chunks, channel, channels)
    means = Image(partials + group * chunks * channels, channels)
    m2s = Image(partials + (groups + group) * chunks * channels, channels)
    mean = _load_tile(means, chunk, channel, inside, DTYPE)
    m2 = _load_tile(m2s, chunk, channel, inside, DTYPE)
    return _combine(count, mean, m2)


@triton.jit
def _updated(running_mean, running_var, mean, m2, pixels, CONSTANTS: tl.constexpr):
    """Running statistics after one more group; the variance of a single value counts as 0, not as 0 / 0."""
    degrees = tl.maximum(pixels - 1, 1) if CONSTANTS.unbiased else pixels
    var = m2 / degrees.to(m2.dtype)
    return (
        running_mean + (mean - running_mean) * CONSTANTS.momentum,
        running_var + (var - running_var) * CONSTANTS.momentum,
    )


@triton.jit
def _before_activation(x, rows):
    """A tile normalised, and the same times weight plus bias."""
    if rows.mean is not None:
        x = (x - rows.mean[None, :]) * rows.rstd[None, :]
    if rows.weight is not None:
        return x, tl.fma(x, rows.weight[None, :], rows.bias[None, :])
    elif rows.bias is not None:
        return x, x + rows.bias[None, :]
    else:
        return x, x


@triton.jit
def _activate(value, z, SLOPE: tl.constexpr):
    """``value``, times the slope where z is not positive: the activation if value is z, or a gradient."""
    if SLOPE == 1.0:
        return value
    else:
        return tl.where(z > 0, value, value * SLOPE)


@triton.jit
def _drop(value, pixel, channel, channels, rng, layer, CONSTANTS: tl.constexpr):
    """``value`` times ``reference.dropout_mask``, in either direction."""
    if CONSTANTS.threshold == 0:
        return value
    else:
        seed = tl.load(rng)
        step = tl.load(rng + 1)
        index = (pixel[:, None] * channels + channel[None, :]).to(tl.uint32)
        zero = tl.zeros_like(index)
        bits, _, _, _ = tl.philox(
            seed,
            index,
            zero + layer.to(tl.uint32),
            zero + (step & 0xFFFFFFFF).to(tl.uint32),
            zero + (step >> 32).to(tl.uint32),
        )
        return tl.where(bits >= CONSTANTS.threshold, value * CONSTANTS.keep_scale, 0.0)


@triton.jit
def _forward_pass(
    x,
    y,
    skip,
    first,
    last,
    channel,
    channels,
    rows,
    rng,
    layer,
    CONSTANTS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """Write the results of the pixels first .. last - 1."""
    for start in range(first, last, BLOCK_PIXELS):
        pixel = start + tl.arange(0, BLOCK_PIXELS)
        inside = _inside(pixel, last, channel, channels)
        _, z = _before_activation(_load_tile(x, pixel, channel, inside, DTYPE), rows)
        z = _drop(z, pixel, channel, channels, rng, layer, CONSTANTS)
        tl.store(_pointers(y, pixel, channel), _activate(z, z, CONSTANTS.slope), mask=inside)
        if skip.pointer is not None:
            tl.store(_pointers(skip, pixel, channel), _activate(z, z, CONSTANTS.skip_slope), mask=inside)


@triton.jit
def _backward_pass(
    x,
    dy,
    dskip,
    dx,
    first,
    last,
    channel,
    channels,
    rows,
    dz_mean,
    dz_normalised_mean,
    rng,
    layer,
    SUM: tl.constexpr,
    CONSTANTS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """One look at the pixels first .. last - 1; dz is the gradient before dropout and activation.

    Writes dx, if there is such an image; dz_mean and dz_normalised_mean are the part of it that goes through
    the statistics, None where none were taken. Returns the sums per channel of dz and of dz times the
    normalised values, if SUM.
    """
    dz_sum = tl.zeros((BLOCK_PIXELS, channel.shape[0]), DTYPE)
    dz_normalised_sum = tl.zeros((BLOCK_PIXELS, channel.shape[0]), DTYPE)
    for start in range(first, last, BLOCK_PIXELS):
        pixel = start + tl.arange(0, BLOCK_PIXELS)
        inside = _inside(pixel, last, channel, channels)
        normalised, z = _before_activation(_load_tile(x, pixel, channel, inside, DTYPE), rows)
        dz = tl.zeros((BLOCK_PIXELS, channel.shape[0]), DTYPE)
        if dy.pointer is not None:
            dz += _activate(_load_tile(dy, pixel, channel, inside, DTYPE), z, CONSTANTS.slope)
        if dskip.pointer is not None:
            dz += _activate(_load_tile(dskip, pixel, channel, inside, DTYPE), z, CONSTANTS.skip_slope)
        dz = _drop(dz, pixel, channel, channels, rng, layer, CONSTANTS)
        if SUM:
            dz_sum += dz
            dz_normalised_sum += dz * normalised
        if dx.pointer is not None:
            if dz_mean is not None:
                dz = dz - dz_mean[None, :] - normalised * dz_normalised_mean[None, :]
            if rows.weight is not None:
                dz *= rows.weight[None, :]
            if rows.rstd is not None:
                dz *= rows.rstd[None, :]
            tl.store(_pointers(dx, pixel, channel), dz, mask=inside)
    return tl.sum(dz_sum, 0), tl.sum(dz_normalised_sum, 0)


@triton.jit
def _saved_rows(weight, bias, mean, rstd, group, channel, channels, DTYPE: tl.constexpr):
    """What the forward pass used for a group."""
    weights = _load_row(weight, channel, channels, DTYPE)
    biases = _load_row(bias, channel, channels, DTYPE)
    if mean is None:
        return Channelwise(None, None, weights, biases)
    else:
        means = _load_row(mean + group * channels, channel, channels, DTYPE)
        return Channelwise(
            means, _load_row(rstd + group * channels, channel, channels, DTYPE), weights, biases
        )


@triton.jit
def _combined_sums(
    partials, group, groups, chunks, channel, channels, DTYPE: tl.constexpr, BLOCK_CHUNKS: tl.constexpr
):
    """Sums per channel of dz and of dz times the normalised values over a group, from those of its chunks."""
    chunk = tl.arange(0, BLOCK_CHUNKS)
    inside = _inside(chunk, chunks, channel, channels)
    dz_sums = Image(partials + group * chunks * channels, channels)
    dz_normalised_sums = Image(partials + (groups + group) * chunks * channels, channels)
    return (
        tl.sum(_load_tile(dz_sums, chunk, channel, inside, DTYPE), 0),
        tl.sum(_load_tile(dz_normalised_sums, chunk, channel, inside, DTYPE), 0),
    )


# Numbers that no address depends on; left general, they don't multiply the variants to compile.
_GENERAL = ("layer", "pixels", "groups", "chunks", "chunk_pixels", "apply_pixels")


@triton.jit(do_not_specialize=_GENERAL)
def norm_act_forward_whole(
    x,
    y,
    skip,
    weight,
    bias,
    running_mean,
    running_var,
    mean,
    rstd,
    rng,
    layer,
    groups,
    pixels,
    channels,
    CONSTANTS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Statistics and results of a block of channels, group after group."""
    DTYPE: tl.constexpr = mean.dtype.element_ty
    channel = _channel_block(BLOCK_CHANNELS)
    weights = _load_row(weight, channel, channels, DTYPE)
    biases = _load_row(bias, channel, channels, DTYPE)
    running_means = _load_row(running_mean, channel, channels, DTYPE)
    running_vars = _load_row(running_var, channel, channels, DTYPE)
    for group in range(groups):
        first = group * pixels
        means, m2 = _statistics(x, first, first + pixels, channel, channels, DTYPE, BLOCK_PIXELS)
        rstds = tl.rsqrt(m2 / pixels.to(DTYPE) + CONSTANTS.eps)
        _store_row(mean + group * channels, means, channel, channels)
        _store_row(rstd + group * channels, rstds, channel, channels)
        if running_mean is not None:
            running_means, running_vars = _updated(running_means, running_vars, means, m2, pixels, CONSTANTS)
        rows = Channelwise(means, rstds, weights, biases)
        _forward_pass(
            x,
            y,
            skip,
            first,
            first + pixels,
            channel,
            channels,
            rows,
            rng,
            layer,
            CONSTANTS,
            DTYPE,
            BLOCK_PIXELS,
        )
    _store_row(running_mean, running_means, channel, channels)
    _store_row(running_var, running_vars, channel, channels)


@triton.jit(do_not_specialize=_GENERAL)
def norm_act_statistics(
    x,
    partials,
    pixels,
    chunk_pixels,
    channels,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Partials of a chunk of pixels: its mean and summed squared deviation per channel."""
    DTYPE: tl.constexpr = partials.dtype.element_ty
    channel = _channel_block(BLOCK_CHANNELS)
    chunk, chunks, group, groups = tl.program_id(0), tl.num_programs(0), tl.program_id(2), tl.num_programs(2)
    first = group * pixels + chunk * chunk_pixels
    last = group * pixels + tl.minimum((chunk + 1) * chunk_pixels, pixels)
    mean, m2 = _statistics(x, first, last, channel, channels, DTYPE, BLOCK_PIXELS)
    _store_row(partials + (group * chunks + chunk) * channels, mean, channel, channels)
    _store_row(partials + ((groups + group) * chunks + chunk) * channels, m2, channel, channels)


@triton.jit(do_not_specialize=_GENERAL)
def norm_act_forward_apply(
    x,
    y,
    skip,
    partials,
    weight,
    bias,
    running_mean,
    running_var,
    mean,
    rstd,
    rng,
    layer,
    pixels,
    chunks,
    chunk_pixels,
    apply_pixels,
    channels,
    CONSTANTS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Results of ``apply_pixels`` pixels, with the statistics in the partials; without partials, with the
    running statistics; without those too, not normalised.
    """
    channel = _channel_block(BLOCK_CHANNELS)
    group, groups = tl.program_id(2), tl.num_programs(2)
    weights = _load_row(weight, channel, channels, DTYPE)
    biases = _load_row(bias, channel, channels, DTYPE)
    running_means = _load_row(running_mean, channel, channels, DTYPE)
    running_vars = _load_row(running_var, channel, channels, DTYPE)
    if partials is not None:
        means, m2 = _combined_statistics(
            partials, group, groups, chunks, pixels, chunk_pixels, channel, channels, DTYPE, BLOCK_CHUNKS
        )
        rows = Channelwise(means, tl.rsqrt(m2 / pixels.to(DTYPE) + CONSTANTS.eps), weights, biases)
    elif running_mean is not None:
        rows = Channelwise(running_means, tl.rsqrt(running_vars + CONSTANTS.eps), weights, biases)
    else:
        rows = Channelwise(None, None, weights, biases)

    if mean is not None and tl.program_id(0) == 0:
        _store_row(mean + group * channels, rows.mean, channel, channels)
        _store_row(rstd + group * channels, rows.rstd, channel, channels)
    if partials is not None and running_mean is not None:  # noqa: SIM102 (decided by the compiler)
        if tl.program_id(0) + group == 0:
            for each in range(groups):
                means, m2 = _combined_statistics(
                    partials,
                    each,
                    groups,
                    chunks,
                    pixels,
                    chunk_pixels,
                    channel,
                    channels,
                    DTYPE,
                    BLOCK_CHUNKS,
                )
                running_means, running_vars = _updated(
                    running_means, running_vars, means, m2, pixels, CONSTANTS
                )
            _store_row(running_mean, running_means, channel, channels)
            _store_row(running_var, running_vars, channel, channels)

    first = group * pixels + tl.program_id(0) * apply_pixels
    last = tl.minimum(first + apply_pixels, (group + 1) * pixels)
    _forward_pass(
        x, y, skip, first, last, channel, channels, rows, rng, layer, CONSTANTS, DTYPE, BLOCK_PIXELS
    )


@triton.jit(do_not_specialize=_GENERAL)
def norm_act_backward_whole(
    x,
    dy,
    dskip,
    dx,
    weight,
    bias,
    mean,
    rstd,
    dweight,
    dbias,
    rng,
    layer,
    groups,
    pixels,
    channels,
    CONSTANTS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Gradients of a block of channels, group after group: sums first, then dx."""
    DTYPE: tl.constexpr = mean.dtype.element_ty
    channel = _channel_block(BLOCK_CHANNELS)
    dweights = tl.zeros((BLOCK_CHANNELS,), DTYPE)
    dbiases = tl.zeros((BLOCK_CHANNELS,), DTYPE)
    nowhere = Image(None, 0)
    for group in range(groups):
        first = group * pixels
        last = first + pixels
        rows = _saved_rows(weight, bias, mean, rstd, group, channel, channels, DTYPE)
        dz_sum, dz_normalised_sum = _backward_pass(
            x,
            dy,
            dskip,
            nowhere,
            first,
            last,
            channel,
            channels,
            rows,
            None,
            None,
            rng,
            layer,
            True,
            CONSTANTS,
            DTYPE,
            BLOCK_PIXELS,
        )
        _backward_pass(
            x,
            dy,
            dskip,
            dx,
            first,
            last,
            channel,
            channels,
            rows,
            dz_sum / pixels.to(DTYPE),
            dz_normalised_sum / pixels.to(DTYPE),
            rng,
            layer,
            False,
            CONSTANTS,
            DTYPE,
            BLOCK_PIXELS,
        )
        dweights += dz_normalised_sum
        dbiases += dz_sum
    _store_row(dweight, dweights, channel, channels)
    _store_row(dbias, dbiases, channel, channels)


@triton.jit(do_not_specialize=_GENERAL)
def norm_act_backward_sums(
    x,
    dy,
    dskip,
    dx,
    weight,
    bias,
    mean,
    rstd,
    partials,
    rng,
    layer,
    pixels,
    chunk_pixels,
    channels,
    CONSTANTS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Partials of a chunk of pixels: its sums of dz and of dz times the normalised values, per channel.

    Where no statistics were taken, dx needs no sums and is written here; partials are then None unless weight
    or bias want a gradient.
    """
    channel = _channel_block(BLOCK_CHANNELS)
    chunk, chunks, group, groups = tl.program_id(0), tl.num_programs(0), tl.program_id(2), tl.num_programs(2)
    rows = _saved_rows(weight, bias, mean, rstd, group, channel, channels, DTYPE)
    first = group * pixels + chunk * chunk_pixels
    last = group * pixels + tl.minimum((chunk + 1) * chunk_pixels, pixels)
    dz_sum, dz_normalised_sum = _backward_pass(
        x,
        dy,
        dskip,
        dx,
        first,
        last,
        channel,
        channels,
        rows,
        None,
        None,
        rng,
        layer,
        partials is not None,
        CONSTANTS,
        DTYPE,
        BLOCK_PIXELS,
    )
    if partials is not None:
        _store_row(partials + (group * chunks + chunk) * channels, dz_sum, channel, channels)
        _store_row(
            partials + ((groups + group) * chunks + chunk) * channels, dz_normalised_sum, channel, channels
        )


@triton.jit(do_not_specialize=_GENERAL)
def norm_act_backward_apply(
    x,
    dy,
    dskip,
    dx,
    partials,
    weight,
    bias,
    mean,
    rstd,
    dweight,
    dbias,
    rng,
    layer,
    pixels,
    chunks,
    apply_pixels,
    channels,
    CONSTANTS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """dx of ``apply_pixels`` pixels, from the sums in the partials."""
    DTYPE: tl.constexpr = partials.dtype.element_ty
    channel = _channel_block(BLOCK_CHANNELS)
    group, groups = tl.program_id(2), tl.num_programs(2)
    if dweight is not None:  # noqa: SIM102 (decided by the compiler)
        if tl.program_id(0) + group == 0:
            dweights = tl.zeros((BLOCK_CHANNELS,), DTYPE)
            dbiases = tl.zeros((BLOCK_CHANNELS,), DTYPE)
            for each in range(groups):
                dz_sum, dz_normalised_sum = _combined_sums(
                    partials, each, groups, chunks, channel, channels, DTYPE, BLOCK_CHUNKS
                )
                dweights += dz_normalised_sum
                dbiases += dz_sum
            _store_row(dweight, dweights, channel, channels)
            _store_row(dbias, dbiases, channel, channels)

    rows = _saved_rows(weight, bias, mean, rstd, group, channel, channels, DTYPE)
    dz_sum, dz_normalised_sum = _combined_sums(
        partials, group, groups, chunks, channel, channels, DTYPE, BLOCK_CHUNKS
    )
    first = group * pixels + tl.program_id(0) * apply_pixels
    last = tl.minimum(first + apply_pixels, (group + 1) * pixels)
    _backward_pass(
        x,
        dy,
        dskip,
        dx,
        first,
        last,
        channel,
        channels,
        rows,
        dz_sum / pixels.to(DTYPE),
        dz_normalised_sum / pixels.to(DTYPE),
        rng,
        layer,
        False,
        CONSTANTS,
        DTYPE,
        BLOCK_PIXELS,
    )


# ---------------------------------------------------------------------------------------------- launchers


def _constants(config: NormActConfig) -> Constants:
    return Constants(
        config.eps,
        config.momentum,
        config.unbiased,
        config.slope,
        config.skip_slope,
        dropout_threshold(config.dropout),
        1.0 / (1.0 - config.dropout),
    )


def _image(image: Tensor | None) -> Image:
    return Image(None, 0) if image is None else Image(image, pixel_stride(image))


def _result(out: Tensor | None, x: Tensor) -> Tensor:
    """``out``, if it can take the place of x, or memory for an image like x."""
    if out is None:
        return torch.empty_like(x, memory_format=torch.channels_last)
    if out.shape != x.shape or out.dtype != x.dtype or pixel_stride(out) is None:
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} with strides {out.stride()}; it must be {x.dtype} "
            f"{tuple(x.shape)}, a channels-last image or a slice of one's channels"
        )
    return out


def _blocks(tile: Tile) -> dict[str, int]:
    return {"BLOCK_PIXELS": tile.pixels, "BLOCK_CHANNELS": tile.channels, "num_warps": tile.num_warps}


def norm_act_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    rng: Tensor | None,
    config: NormActConfig,
    out: Tensor | None = None,
    skip_out: Tensor | None = None,
) -> NormActForward:
    """``reference.norm_act_forward``, by kernels on a GPU. ValueError for an ``out`` that x does not fit."""
    if not use_triton(x):
        return reference.norm_act_forward(
            x, weight, bias, running_mean, running_var, rng, config, out, skip_out
        )
    x, y = as_pixels(x), _result(out, x)
    skip = None if config.skip_slope is None else _result(skip_out, x)
    channels, dtype = x.shape[1], compute_dtype(x.dtype)
    groups = config.groups if config.norm else 1
    pixels = x.numel() // (groups * channels)
    mean = rstd = None
    if config.norm:
        mean = torch.empty((groups, channels), dtype=dtype, device=x.device)
        rstd = torch.empty_like(mean)
        bias = None if weight is None else bias
    else:
        weight = running_mean = running_var = None
    images = _image(x), _image(y), _image(skip)
    numbers = weight, bias, running_mean, running_var
    saved = mean, rstd
    takes_statistics = config.norm and config.training
    updated = (running_mean, running_var) if takes_statistics else ()

    if takes_statistics and groups * pixels <= FEW_PIXELS:
        tile = choose_tile(pixels, channels, x.element_size(), WHOLE_FORWARD)
        launch(
            norm_act_forward_whole,
            (1, cdiv(channels, tile.channels)),
            *images,
            *numbers,
            *saved,
            rng,
            config.layer,
            groups,
            pixels,
            channels,
            CONSTANTS=_constants(config),
            **_blocks(tile),
            reads=(x, *numbers),
            writes=(y, skip, *saved, *updated),
        )
        return NormActForward(y, skip, mean, rstd)

    tile = choose_tile(pixels, channels, x.element_size(), CHUNK_FORWARD)
    chunks, shares = reduction_chunks(pixels, tile), elementwise_chunks(pixels, tile)
    programs = cdiv(channels, tile.channels), groups
    partials = None
    if takes_statistics:
        partials = torch.empty((2, groups, chunks.count, channels), dtype=dtype, device=x.device)
        launch(
            norm_act_statistics,
            (chunks.count, *programs),
            _image(x),
            partials,
            pixels,
            chunks.pixels,
            channels,
            **_blocks(tile),
            reads=(x,),
            writes=(partials,),
        )
    launch(
        norm_act_forward_apply,
        (shares.count, *programs),
        *images,
        partials,
        *numbers,
        *saved,
        rng,
        config.layer,
        pixels,
        chunks.count,
        chunks.pixels,
        shares.pixels,
        channels,
        CONSTANTS=_constants(config),
        DTYPE=DTYPES[dtype],
        BLOCK_CHUNKS=next_power_of_2(chunks.count),
        **_blocks(tile),
        reads=(x, partials, *numbers),
        writes=(y, skip, *saved, *updated),
    )
    return NormActForward(y, skip, mean, rstd)


def norm_act_backward(
    dy: Tensor | None,
    dskip: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    rng: Tensor | None,
    config: NormActConfig,
    needs_affine: bool = True,
) -> NormActBackward:
    """``reference.norm_act_backward``, by kernels on a GPU."""
    if not use_triton(x):
        return reference.norm_act_backward(dy, dskip, x, weight, bias, mean, rstd, rng, config, needs_affine)
    x = as_pixels(x)
    dy, dskip = (None if gradient is None else as_pixels(gradient) for gradient in (dy, dskip))
    dx = _result(None, x)
    channels, dtype = x.shape[1], compute_dtype(x.dtype)
    if mean is None:
        groups, weight = 1, None
    else:
        groups, mean, rstd = mean.shape[0], mean.contiguous(), rstd.contiguous()
        bias = None if weight is None else bias
    pixels = x.numel() // (groups * channels)
    sources = _image(x), _image(dy), _image(dskip)
    numbers = weight, bias, mean, rstd
    wants_dweight, wants_dbias = needs_affine and weight is not None, needs_affine and bias is not None
    through_statistics = mean is not None and config.training
    dweight = dbias = None
    if through_statistics and wants_dweight:
        dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)

    if through_statistics and groups * pixels <= FEW_PIXELS:
        tile = choose_tile(pixels, channels, x.element_size(), WHOLE_BACKWARD)
        launch(
            norm_act_backward_whole,
            (1, cdiv(channels, tile.channels)),
            *sources,
            _image(dx),
            *numbers,
            dweight,
            dbias,
            rng,
            config.layer,
            groups,
            pixels,
            channels,
            CONSTANTS=_constants(config),
            **_blocks(tile),
            reads=(x, dy, dskip, *numbers),
            writes=(dx, dweight, dbias),
        )
        return NormActBackward(dx, dweight, dbias)

    tile = choose_tile(pixels, channels, x.element_size(), CHUNK_BACKWARD)
    shares = elementwise_chunks(pixels, tile)
    chunks = reduction_chunks(pixels, tile) if through_statistics or wants_dbias else shares
    programs = cdiv(channels, tile.channels), groups
    partials = None
    if through_statistics or wants_dbias:
        partials = torch.empty((2, groups, chunks.count, channels), dtype=dtype, device=x.device)
    early_dx = None if through_statistics else dx
    launch(
        norm_act_backward_sums,
        (chunks.count, *programs),
        *sources,
        _image(early_dx),
        *numbers,
        partials,
        rng,
        config.layer,
        pixels,
        chunks.pixels,
        channels,
        CONSTANTS=_constants(config),
        DTYPE=DTYPES[dtype],
        **_blocks(tile),
        reads=(x, dy, dskip, *numbers),
        writes=(partials, early_dx),
    )
    if through_statistics:
        launch(
            norm_act_backward_apply,
            (shares.count, *programs),
            *sources,
            _image(dx),
            partials,
            *numbers,
            dweight,
            dbias,
            rng,
            config.layer,
            pixels,
            chunks.count,
            shares.pixels,
            channels,
            CONSTANTS=_constants(config),
            BLOCK_CHUNKS=next_power_of_2(chunks.count),
            **_blocks(tile),
            reads=(x, dy, dskip, partials, *numbers),
            writes=(dx, dweight, dbias),
        )
    elif wants_dbias:
        dz_sum, dz_normalised_sum = partials.sum((1, 2))
        dbias = dz_sum.to(bias.dtype)
        dweight = dz_normalised_sum.to(weight.dtype) if wants_dweight else None
    return NormActBackward(dx, dweight, dbias)


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running, rng, config, slots):
        y, skip, mean, rstd = norm_act_forward(x, weight, bias, *running, rng, config, *slots)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.rng, ctx.config = rng, config
        ctx.set_materialize_grads(False)
        # Detached: memory that was handed in as a view must not tie the result to that view's history.
        return (y.detach(), skip.detach()) if skip is not None else y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dskip=None):
        needs_affine = any(ctx.needs_input_grad[1:3])
        gradients = norm_act_backward(dy, dskip, *ctx.saved_tensors, ctx.rng, ctx.config, needs_affine)
        return *gradients, None, None, None, None


def norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    config: NormActConfig,
    rng: Tensor | None = None,
    out: Tensor | None = None,
    skip_out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Differentiable ``norm_act_forward``: y, or (y, skip) when ``config.skip_slope`` is a number.

    ``out`` and ``skip_out`` are plain memory to write into, not inputs of the autograd graph: the results
    are new tensors that share it.
    """
    return _NormAct.apply(x, weight, bias, (running_mean, running_var), rng, config, (out, skip_out))


# ----------------------------------------------------------------------------------------------- specimens


def specimens(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every layer of both presets' networks, for 256x256 images at batch 1 (see report.py)."""
    presets = {
        "tutorial": (NormActConfig(eps=1e-3, momentum=0.01, unbiased=False, slope=0.3), 0.3, (2, 4, 8)),
        "junyanz": (NormActConfig(slope=0.2), 0.0, (4, 8, 16)),
    }
    outer = ((128, 64), (64, 128), (32, 256))  # sizes and channels
    inner = ((16, 512), (8, 512), (4, 512), (2, 512))
    for preset, (config, skip_slope, dropping) in presets.items():
        tutorial = preset == "tutorial"
        for size, channels in outer + inner:
            down = config._replace(norm=size != 128, skip_slope=skip_slope)
            yield from _specimens(f"{preset} down", (1, channels, size, size), dtype, down)
        bottleneck = config if tutorial else config._replace(norm=False, slope=0.0)
        yield from _specimens(f"{preset} bottleneck", (1, 512, 1, 1), dtype, bottleneck)
        for size, channels in outer + inner:
            up = config._replace(slope=0.0, dropout=0.5 if size in dropping else 0.0, layer=2)
            yield from _specimens(f"{preset} up", (1, channels, size, size), dtype, up, into_slice=True)
        for size, channels in (*outer, (31, 512)):
            first = size == 128
            judge = config._replace(norm=not first, groups=2)
            shape = (2, channels, size, size)
            yield from _specimens(f"{preset} judge", shape, dtype, judge, bias=first and not tutorial)


def _specimens(
    name: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    config: NormActConfig,
    *,
    bias: bool = False,
    into_slice: bool = False,
) -> Iterator[tuple[str, Callable[[], object]]]:
    """One layer forward and backward; of a batch of two also backward through the second half alone."""
    n, c, h, w = shape
    x = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    beside = torch.empty((n, 2 * c, h, w), dtype=dtype, memory_format=torch.channels_last)[:, c:]
    numbers = torch.empty(4, c)
    weight, bias_row, running_mean, running_var = numbers if config.norm else (None, None, None, None)
    if bias:
        bias_row = numbers[0]
    mean = rstd = torch.empty(config.groups, c) if config.norm else None
    rng = torch.empty(2, dtype=torch.int64)
    y = beside if into_slice else x
    skip = None if config.skip_slope is None else beside
    label = f"{name} {h}x{w}x{c}"

    def forward():
        norm_act_forward(x, weight, bias_row, running_mean, running_var, rng, config, y, skip)

    def backward():
        norm_act_backward(y, skip, x, weight, bias_row, mean, rstd, rng, config)

    def backward_half():
        half = config._replace(groups=1)
        rows = (None, None) if mean is None else (mean[1:], rstd[1:])
        norm_act_backward(y[1:], None, x[1:], weight, bias_row, *rows, rng, half, needs_affine=False)

    yield label, forward
    yield label, backward
    if n == 2:
        yield f"{label} fake half", backward_half
