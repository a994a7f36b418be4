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
# x, y, skip, dy, dskip, dx: ``Image``s. parameters: ``Parameters``. saved: the ``Saved`` statistics. dropout:
# a ``Dropout``. dweight, dbias: (channels,), or None if they are not wanted. partials: the ``Workspace``
# between two launches.
# pixels: rows of one group; chunk_pixels: of one program, apply_pixels: of one program of the second launch.
# CONSTANTS: the layer's ``Constants``. TILE: what a program holds in registers at a time, see launch.py.
# CHUNKS: a power of two not below the number of chunks.
#
# What is None and what is in capitals is known when a kernel is compiled: a layer pays for its own parts.


class Image(NamedTuple):
    """pointer: to the first pixel, or None where there is no such image. stride: elements from one pixel to
    the next, which is more than there are channels where the image is a slice of a wider buffer.
    """

    pointer: Any
    stride: Any


class Parameters(NamedTuple):
    """Pointers to (channels,) numbers, or None for those that there are not."""

    weight: Any
    bias: Any
    running_mean: Any = None
    running_var: Any = None


class Saved(NamedTuple):
    """Pointers to the (groups, channels) statistics that the backward pass needs; None without norm."""

    mean: Any
    rstd: Any


class Dropout(NamedTuple):
    """rng: pointer to the int64 pair (seed, step). layer: the layer's number in the dropout's counter."""

    rng: Any
    layer: Any


class Workspace(NamedTuple):
    """pointer: to (2, groups, chunks, channels) numbers in the type that is computed in, or None."""

    pointer: Any
    groups: Any
    chunks: Any


class Columns(NamedTuple):
    """A program's channels: their (BLOCK,) numbers, and how many the image has."""

    channel: Any
    channels: Any


class Rows(NamedTuple):
    """What a tile is normalised with: (BLOCK,) numbers each, one per channel; None for a step left out."""

    mean: Any
    rstd: Any
    weight: Any
    bias: Any


class Constants(NamedTuple):
    """What a ``NormActConfig`` fixes, as the kernels need it; ``layer`` stays out, it differs too often.

    threshold: random words below it drop their value; 0 for no dropout. keep_scale: of the values kept.
    dtype: Triton's, of the numbers that are computed with.
    """

    eps: float
    momentum: float
    unbiased: bool
    slope: float
    skip_slope: float | None
    threshold: int
    keep_scale: float
    dtype: Any


@triton.jit
def _columns(channels, TILE: tl.constexpr):
    return Columns(tl.program_id(1) * TILE.channels + tl.arange(0, TILE.channels), channels)


@triton.jit
def _zeros(PIXELS: tl.constexpr, CHANNELS: tl.constexpr, DTYPE: tl.constexpr):
    return tl.zeros((PIXELS, CHANNELS), DTYPE)


@triton.jit
def _inside(row, last, columns):
    return (row < last)[:, None] & (columns.channel < columns.channels)[None, :]


@triton.jit
def _pointers(image, pixel, columns):
    """Of a tile; the offsets are 64 bits wide, for batches of more than 2**31 values."""
    return image.pointer + pixel.to(tl.int64)[:, None] * image.stride + columns.channel[None, :]


@triton.jit
def _load_tile(image, pixel, last, columns, DTYPE: tl.constexpr):
    """0 outside the image."""
    return tl.load(_pointers(image, pixel, columns), mask=_inside(pixel, last, columns), other=0.0).to(DTYPE)


@triton.jit
def _store_tile(image, value, pixel, last, columns):
    if image.pointer is not None:
        tl.store(_pointers(image, pixel, columns), value, mask=_inside(pixel, last, columns))


@triton.jit
def _load_row(pointer, row, columns, DTYPE: tl.constexpr):
    """One number per channel of the ``row``-th row, 0 beyond the last channel; None for None."""
    if pointer is None:
        return  # not "return None", which Triton before 3.7 refuses
    else:
        numbers = pointer + row * columns.channels + columns.channel
        return tl.load(numbers, mask=columns.channel < columns.channels, other=0.0).to(DTYPE)


@triton.jit
def _store_row(pointer, value, row, columns):
    if pointer is not None:
        numbers = pointer + row * columns.channels + columns.channel
        tl.store(numbers, value, mask=columns.channel < columns.channels)


@triton.jit
def _load_chunks(partials, which, group, columns, DTYPE: tl.constexpr, CHUNKS: tl.constexpr):
    """The ``which``-th partials (0 or 1) of all chunks of a group: (CHUNKS, BLOCK)."""
    first = (which * partials.groups + group) * partials.chunks
    numbers = Image(partials.pointer, columns.channels)
    return _load_tile(numbers, first + tl.arange(0, CHUNKS), first + partials.chunks, columns, DTYPE)


@triton.jit
def _store_chunk(partials, which, value, group, chunk, columns):
    _store_row(partials.pointer, value, (which * partials.groups + group) * partials.chunks + chunk, columns)


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
def _statistics(x, first, last, columns, DTYPE: tl.constexpr, TILE: tl.constexpr):
    """Mean and summed squared deviation per channel of the pixels first .. last - 1.

    Each row of the tile follows its own pixels (Welford, 1962); the rows are combined at the end.
    """
    row = tl.arange(0, TILE.pixels)
    mean = _zeros(TILE.pixels, TILE.channels, DTYPE)
    m2 = _zeros(TILE.pixels, TILE.channels, DTYPE)
    for start in range(first, last, TILE.pixels):
        pixel = start + row
        value = _load_tile(x, pixel, last, columns, DTYPE)
        delta = tl.where(_inside(pixel, last, columns), value - mean, 0.0)
        seen = (start - first) // TILE.pixels + 1
        mean += delta * (1.0 / seen.to(DTYPE))
        m2 += delta * (value - mean)
    count = ((last - first - row + TILE.pixels - 1) // TILE.pixels).to(DTYPE)
    return _combine(count, mean, m2)


@triton.jit
def _combined_statistics(
    partials, group, pixels, chunk_pixels, columns, DTYPE: tl.constexpr, CHUNKS: tl.constexpr
):
    """Mean and summed squared deviation per channel of a group, from those of its chunks."""
    count = tl.minimum(tl.maximum(pixels - tl.arange(0, CHUNKS) * chunk_pixels, 0), chunk_pixels)
    mean = _load_chunks(partials, 0, group, columns, DTYPE, CHUNKS)
    m2 = _load_chunks(partials, 1, group, columns, DTYPE, CHUNKS)
    return _combine(count.to(DTYPE), mean, m2)


@triton.jit
def _updated(running_mean, running_var, mean, m2, pixels, CONSTANTS: tl.constexpr):
    """Running statistics after one more group; the variance of a single value counts as 0, not as 0 / 0."""
    degrees = tl.maximum(pixels - 1, 1) if CONSTANTS.unbiased else pixels
    var = m2 / degrees.to(CONSTANTS.dtype)
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
def _drop(value, pixel, columns, dropout, CONSTANTS: tl.constexpr):
    """``value`` times ``reference.dropout_mask``, in either direction."""
    if CONSTANTS.threshold == 0:
        return value
    else:
        seed = tl.load(dropout.rng)
        step = tl.load(dropout.rng + 1)
        index = (pixel[:, None] * columns.channels + columns.channel[None, :]).to(tl.uint32)
        layer = tl.zeros_like(index) + dropout.layer
        low = tl.zeros_like(index) + (step & 0xFFFFFFFF).to(tl.uint32)
        high = tl.zeros_like(index) + (step >> 32).to(tl.uint32)
        bits, _, _, _ = tl.philox(seed, index, layer, low, high)
        return tl.where(bits >= CONSTANTS.threshold, value * CONSTANTS.keep_scale, 0.0)


@triton.jit
def _forward_pass(
    x, y, skip, first, last, columns, rows, dropout, CONSTANTS: tl.constexpr, TILE: tl.constexpr
):
    """Write the results of the pixels first .. last - 1."""
    for start in range(first, last, TILE.pixels):
        pixel = start + tl.arange(0, TILE.pixels)
        _, z = _before_activation(_load_tile(x, pixel, last, columns, CONSTANTS.dtype), rows)
        z = _drop(z, pixel, columns, dropout, CONSTANTS)
        _store_tile(y, _activate(z, z, CONSTANTS.slope), pixel, last, columns)
        if skip.pointer is not None:
            _store_tile(skip, _activate(z, z, CONSTANTS.skip_slope), pixel, last, columns)


@triton.jit
def _gradient_before_activation(dy, dskip, z, pixel, last, columns, dropout, CONSTANTS: tl.constexpr):
    """dz: the two incoming gradients of a tile, through activation and dropout."""
    dz = tl.zeros_like(z)
    if dy.pointer is not None:
        dz += _activate(_load_tile(dy, pixel, last, columns, CONSTANTS.dtype), z, CONSTANTS.slope)
    if dskip.pointer is not None:
        dz += _activate(_load_tile(dskip, pixel, last, columns, CONSTANTS.dtype), z, CONSTANTS.skip_slope)
    return _drop(dz, pixel, columns, dropout, CONSTANTS)


@triton.jit
def _backward_pass(
    x, dy, dskip, dx, first, last, columns, rows, means, dropout, CONSTANTS: tl.constexpr, TILE: tl.constexpr
):
    """One look at the pixels first .. last - 1.

    Returns the sums per channel of dz and of dz times the normalised values. Writes dx, if there is such an
    image; ``means`` are those two sums, over all pixels of the group, divided by the number of pixels: the
    part of dx that goes through the statistics, None where none were taken.
    """
    dz_sum = _zeros(TILE.pixels, TILE.channels, CONSTANTS.dtype)
    dz_normalised_sum = _zeros(TILE.pixels, TILE.channels, CONSTANTS.dtype)
    for start in range(first, last, TILE.pixels):
        pixel = start + tl.arange(0, TILE.pixels)
        normalised, z = _before_activation(_load_tile(x, pixel, last, columns, CONSTANTS.dtype), rows)
        dz = _gradient_before_activation(dy, dskip, z, pixel, last, columns, dropout, CONSTANTS)
        dz_sum += dz
        dz_normalised_sum += dz * normalised
        if dx.pointer is not None:
            if means is not None:
                dz = dz - means[0][None, :] - normalised * means[1][None, :]
            if rows.weight is not None:
                dz *= rows.weight[None, :]
            if rows.rstd is not None:
                dz *= rows.rstd[None, :]
            _store_tile(dx, dz, pixel, last, columns)
    return tl.sum(dz_sum, 0), tl.sum(dz_normalised_sum, 0)


@triton.jit
def _combined_sums(partials, group, columns, DTYPE: tl.constexpr, CHUNKS: tl.constexpr):
    """What ``_backward_pass`` returns for a group, from the same of its chunks."""
    return (
        tl.sum(_load_chunks(partials, 0, group, columns, DTYPE, CHUNKS), 0),
        tl.sum(_load_chunks(partials, 1, group, columns, DTYPE, CHUNKS), 0),
    )


# Numbers that no address depends on; left general, they don't multiply the variants to compile.
_GENERAL = ("pixels", "groups", "chunk_pixels", "apply_pixels")


@triton.jit(do_not_specialize=_GENERAL)
def norm_act_forward_whole(
    x,
    y,
    skip,
    parameters,
    saved,
    dropout,
    groups,
    pixels,
    channels,
    CONSTANTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Statistics and results of a block of channels, group after group."""
    DTYPE: tl.constexpr = CONSTANTS.dtype
    columns = _columns(channels, TILE)
    running_mean = _load_row(parameters.running_mean, 0, columns, DTYPE)
    running_var = _load_row(parameters.running_var, 0, columns, DTYPE)
    for group in range(groups):
        first = group * pixels
        mean, m2 = _statistics(x, first, first + pixels, columns, DTYPE, TILE)
        rstd = tl.rsqrt(m2 / pixels.to(DTYPE) + CONSTANTS.eps)
        # Loaded here: registers are scarce while the statistics are taken.
        weight = _load_row(parameters.weight, 0, columns, DTYPE)
        bias = _load_row(parameters.bias, 0, columns, DTYPE)
        rows = Rows(mean, rstd, weight, bias)
        _forward_pass(x, y, skip, first, first + pixels, columns, rows, dropout, CONSTANTS, TILE)
        _store_row(saved.mean, mean, group, columns)
        _store_row(saved.rstd, rstd, group, columns)
        if parameters.running_mean is not None:
            running_mean, running_var = _updated(running_mean, running_var, mean, m2, pixels, CONSTANTS)
    _store_row(parameters.running_mean, running_mean, 0, columns)
    _store_row(parameters.running_var, running_var, 0, columns)


@triton.jit(do_not_specialize=_GENERAL)
def norm_act_statistics(x, partials, pixels, chunk_pixels, channels, DTYPE: tl.constexpr, TILE: tl.constexpr):
    """Partials of a chunk of pixels: its mean and summed squared deviation per channel."""
    columns = _columns(channels, TILE)
    chunk, group = tl.program_id(0), tl.program_id(2)
    first = group * pixels + chunk * chunk_pixels
    last = group * pixels + tl.minimum((chunk + 1) * chunk_pixels, pixels)
    mean, m2 = _statistics(x, first, last, columns, DTYPE, TILE)
    _store_chunk(partials, 0, mean, group, chunk, columns)
    _store_chunk(partials, 1, m2, group, chunk, columns)


@triton.jit(do_not_specialize=_GENERAL)
def norm_act_forward_apply(
    x,
    y,
    skip,
    parameters,
    saved,
    partials,
    dropout,
    pixels,
    chunk_pixels,
    apply_pixels,
    channels,
    CONSTANTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Results of ``apply_pixels`` pixels, with the statistics in the partials; without partials, with the
    running statistics; without those too, not normalised.
    """
    DTYPE: tl.constexpr = CONSTANTS.dtype
    columns = _columns(channels, TILE)
    chunk, group = tl.program_id(0), tl.program_id(2)
    weight = _load_row(parameters.weight, 0, columns, DTYPE)
    bias = _load_row(parameters.bias, 0, columns, DTYPE)
    running_mean = _load_row(parameters.running_mean, 0, columns, DTYPE)
    running_var = _load_row(parameters.running_var, 0, columns, DTYPE)
    if partials.pointer is not None:
        mean, m2 = _combined_statistics(partials, group, pixels, chunk_pixels, columns, DTYPE, CHUNKS)
        rows = Rows(mean, tl.rsqrt(m2 / pixels.to(DTYPE) + CONSTANTS.eps), weight, bias)
    elif parameters.running_mean is not None:
        rows = Rows(running_mean, tl.rsqrt(running_var + CONSTANTS.eps), weight, bias)
    else:
        rows = Rows(None, None, weight, bias)

    if saved.mean is not None and chunk == 0:
        _store_row(saved.mean, rows.mean, group, columns)
        _store_row(saved.rstd, rows.rstd, group, columns)
    first = group * pixels + chunk * apply_pixels
    last = tl.minimum(first + apply_pixels, (group + 1) * pixels)
    _forward_pass(x, y, skip, first, last, columns, rows, dropout, CONSTANTS, TILE)

    if partials.pointer is not None and parameters.running_mean is not None:  # noqa: SIM102 (compile time)
        if chunk + group == 0:
            for each in range(partials.groups):
                mean, m2 = _combined_statistics(partials, each, pixels, chunk_pixels, columns, DTYPE, CHUNKS)
                running_mean, running_var = _updated(running_mean, running_var, mean, m2, pixels, CONSTANTS)
            _store_row(parameters.running_mean, running_mean, 0, columns)
            _store_row(parameters.running_var, running_var, 0, columns)


@triton.jit(do_not_specialize=_GENERAL)
def norm_act_backward_whole(
    x,
    dy,
    dskip,
    dx,
    parameters,
    saved,
    dweight,
    dbias,
    dropout,
    groups,
    pixels,
    channels,
    CONSTANTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Gradients of a block of channels, group after group: sums first, then dx."""
    DTYPE: tl.constexpr = CONSTANTS.dtype
    columns = _columns(channels, TILE)
    dweight_sum = tl.zeros_like(columns.channel).to(DTYPE)
    dbias_sum = tl.zeros_like(columns.channel).to(DTYPE)
    nowhere = Image(None, 0)
    for group in range(groups):
        first = group * pixels
        last = first + pixels
        rows = Rows(
            _load_row(saved.mean, group, columns, DTYPE),
            _load_row(saved.rstd, group, columns, DTYPE),
            _load_row(parameters.weight, 0, columns, DTYPE),
            _load_row(parameters.bias, 0, columns, DTYPE),
        )
        dz_sum, dz_normalised_sum = _backward_pass(
            x, dy, dskip, nowhere, first, last, columns, rows, None, dropout, CONSTANTS, TILE
        )
        means = (dz_sum / pixels.to(DTYPE), dz_normalised_sum / pixels.to(DTYPE))
        _backward_pass(x, dy, dskip, dx, first, last, columns, rows, means, dropout, CONSTANTS, TILE)
        dweight_sum += dz_normalised_sum
        dbias_sum += dz_sum
    _store_row(dweight, dweight_sum, 0, columns)
    _store_row(dbias, dbias_sum, 0, columns)


@triton.jit(do_not_specialize=_GENERAL)
def norm_act_backward_sums(
    x,
    dy,
    dskip,
    dx,
    parameters,
    saved,
    partials,
    dropout,
    pixels,
    chunk_pixels,
    channels,
    CONSTANTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Partials of a chunk of pixels: its sums of dz and of dz times the normalised values, per channel.

    Where no statistics were taken, dx needs no sums and is written here; there are no partials then unless
    weight or bias want a gradient.
    """
    columns = _columns(channels, TILE)
    chunk, group = tl.program_id(0), tl.program_id(2)
    rows = Rows(
        _load_row(saved.mean, group, columns, CONSTANTS.dtype),
        _load_row(saved.rstd, group, columns, CONSTANTS.dtype),
        _load_row(parameters.weight, 0, columns, CONSTANTS.dtype),
        _load_row(parameters.bias, 0, columns, CONSTANTS.dtype),
    )
    first = group * pixels + chunk * chunk_pixels
    last = group * pixels + tl.minimum((chunk + 1) * chunk_pixels, pixels)
    dz_sum, dz_normalised_sum = _backward_pass(
        x, dy, dskip, dx, first, last, columns, rows, None, dropout, CONSTANTS, TILE
    )
    if partials.pointer is not None:
        _store_chunk(partials, 0, dz_sum, group, chunk, columns)
        _store_chunk(partials, 1, dz_normalised_sum, group, chunk, columns)


@triton.jit(do_not_specialize=_GENERAL)
def norm_act_backward_apply(
    x,
    dy,
    dskip,
    dx,
    parameters,
    saved,
    partials,
    dweight,
    dbias,
    dropout,
    pixels,
    apply_pixels,
    channels,
    CONSTANTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    TILE: tl.constexpr,
):
    """dx of ``apply_pixels`` pixels, from the sums in the partials."""
    DTYPE: tl.constexpr = CONSTANTS.dtype
    columns = _columns(channels, TILE)
    chunk, group = tl.program_id(0), tl.program_id(2)
    if dweight is not None:  # noqa: SIM102 (compile time)
        if chunk + group == 0:
            dweight_sum = tl.zeros_like(columns.channel).to(DTYPE)
            dbias_sum = tl.zeros_like(columns.channel).to(DTYPE)
            for each in range(partials.groups):
                dz_sum, dz_normalised_sum = _combined_sums(partials, each, columns, DTYPE, CHUNKS)
                dweight_sum += dz_normalised_sum
                dbias_sum += dz_sum
            _store_row(dweight, dweight_sum, 0, columns)
            _store_row(dbias, dbias_sum, 0, columns)

    rows = Rows(
        _load_row(saved.mean, group, columns, DTYPE),
        _load_row(saved.rstd, group, columns, DTYPE),
        _load_row(parameters.weight, 0, columns, DTYPE),
        _load_row(parameters.bias, 0, columns, DTYPE),
    )
    dz_sum, dz_normalised_sum = _combined_sums(partials, group, columns, DTYPE, CHUNKS)
    means = (dz_sum / pixels.to(DTYPE), dz_normalised_sum / pixels.to(DTYPE))
    first = group * pixels + chunk * apply_pixels
    last = tl.minimum(first + apply_pixels, (group + 1) * pixels)
    _backward_pass(x, dy, dskip, dx, first, last, columns, rows, means, dropout, CONSTANTS, TILE)


# ---------------------------------------------------------------------------------------------- launchers


def _constants(config: NormActConfig, dtype: torch.dtype) -> Constants:
    return Constants(
        config.eps,
        config.momentum,
        config.unbiased,
        config.slope,
        config.skip_slope,
        dropout_threshold(config.dropout),
        1.0 / (1.0 - config.dropout),
        DTYPES[dtype],
    )


def _dropout(rng: Tensor | None, config: NormActConfig) -> Dropout:
    return Dropout(rng, config.layer) if config.dropout else Dropout(None, 0)


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
    saved = Saved(None, None)
    if not config.norm:
        parameters = Parameters(None, bias)
    else:
        parameters = Parameters(weight, None if weight is None else bias, running_mean, running_var)
        mean = torch.empty((groups, channels), dtype=dtype, device=x.device)
        saved = Saved(mean, torch.empty_like(mean))
    images, dropout = (_image(x), _image(y), _image(skip)), _dropout(rng, config)
    constants = _constants(config, dtype)
    takes_statistics = config.norm and config.training
    updated = parameters[2:] if takes_statistics else ()

    if takes_statistics and groups * pixels <= FEW_PIXELS:
        tile = choose_tile(pixels, channels, x.element_size(), WHOLE_FORWARD)
        launch(
            norm_act_forward_whole,
            (1, cdiv(channels, tile.channels)),
            *images,
            parameters,
            saved,
            dropout,
            groups,
            pixels,
            channels,
            CONSTANTS=constants,
            TILE=tile,
            num_warps=tile.num_warps,
            reads=(x, *parameters),
            writes=(y, skip, *saved, *updated),
        )
        return NormActForward(y, skip, *saved)

    tile = choose_tile(pixels, channels, x.element_size(), CHUNK_FORWARD)
    chunks, shares = reduction_chunks(pixels, tile), elementwise_chunks(pixels, tile)
    programs = cdiv(channels, tile.channels), groups
    partials = Workspace(None, groups, chunks.count)
    if takes_statistics:
        workspace = torch.empty((2, groups, chunks.count, channels), dtype=dtype, device=x.device)
        partials = Workspace(workspace, groups, chunks.count)
        launch(
            norm_act_statistics,
            (chunks.count, *programs),
            _image(x),
            partials,
            pixels,
            chunks.pixels,
            channels,
            DTYPE=DTYPES[dtype],
            TILE=tile,
            num_warps=tile.num_warps,
            reads=(x,),
            writes=(workspace,),
        )
    launch(
        norm_act_forward_apply,
        (shares.count, *programs),
        *images,
        parameters,
        saved,
        partials,
        dropout,
        pixels,
        chunks.pixels,
        shares.pixels,
        channels,
        CONSTANTS=constants,
        CHUNKS=next_power_of_2(chunks.count),
        TILE=tile,
        num_warps=tile.num_warps,
        reads=(x, partials.pointer, *parameters),
        writes=(y, skip, *saved, *updated),
    )
    return NormActForward(y, skip, *saved)


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
        groups, parameters, saved = 1, Parameters(None, bias), Saved(None, None)
    else:
        groups, parameters = mean.shape[0], Parameters(weight, None if weight is None else bias)
        saved = Saved(mean.contiguous(), rstd.contiguous())
    pixels = x.numel() // (groups * channels)
    images, dropout = (_image(x), _image(dy), _image(dskip)), _dropout(rng, config)
    constants = _constants(config, dtype)
    reads = x, dy, dskip, *parameters, *saved
    through_statistics = mean is not None and config.training
    wanted = parameters[:2] if needs_affine else (None, None)
    dweight = dbias = None
    if through_statistics:
        dweight, dbias = (None if p is None else torch.empty_like(p) for p in wanted)

    if through_statistics and groups * pixels <= FEW_PIXELS:
        tile = choose_tile(pixels, channels, x.element_size(), WHOLE_BACKWARD)
        launch(
            norm_act_backward_whole,
            (1, cdiv(channels, tile.channels)),
            *images,
            _image(dx),
            parameters,
            saved,
            dweight,
            dbias,
            dropout,
            groups,
            pixels,
            channels,
            CONSTANTS=constants,
            TILE=tile,
            num_warps=tile.num_warps,
            reads=reads,
            writes=(dx, dweight, dbias),
        )
        return NormActBackward(dx, dweight, dbias)

    tile = choose_tile(pixels, channels, x.element_size(), CHUNK_BACKWARD)
    shares = elementwise_chunks(pixels, tile)
    sums = through_statistics or wanted[1] is not None
    chunks = reduction_chunks(pixels, tile) if sums else shares
    programs = cdiv(channels, tile.channels), groups
    workspace = None
    if sums:
        workspace = torch.empty((2, groups, chunks.count, channels), dtype=dtype, device=x.device)
    partials = Workspace(workspace, groups, chunks.count)
    early_dx = None if through_statistics else dx
    launch(
        norm_act_backward_sums,
        (chunks.count, *programs),
        *images,
        _image(early_dx),
        parameters,
        saved,
        partials,
        dropout,
        pixels,
        chunks.pixels,
        channels,
        CONSTANTS=constants,
        TILE=tile,
        num_warps=tile.num_warps,
        reads=reads,
        writes=(workspace, early_dx),
    )
    if through_statistics:
        launch(
            norm_act_backward_apply,
            (shares.count, *programs),
            *images,
            _image(dx),
            parameters,
            saved,
            partials,
            dweight,
            dbias,
            dropout,
            pixels,
            shares.pixels,
            channels,
            CONSTANTS=constants,
            CHUNKS=next_power_of_2(chunks.count),
            TILE=tile,
            num_warps=tile.num_warps,
            reads=(*reads, workspace),
            writes=(dx, dweight, dbias),
        )
    elif sums:
        totals = reversed(workspace.sum((1, 2)).unbind())
        dweight, dbias = (None if p is None else t.to(p.dtype) for p, t in zip(wanted, totals, strict=True))
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
