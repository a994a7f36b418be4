"""Triton kernels of ``norm_act``: normalisation, dropout and activation, forward and backward.

An image is a matrix: its pixels, over the whole batch, are the rows and its channels the columns. Program
(i, j, k) works on the i-th chunk of pixels, the j-th block of channels and the k-th group; a ``whole`` kernel
has the programs (0, j), whose tile holds all pixels of a group: each image is read once.

Arguments:

* x, y, skip, dy, dskip, dx: ``ImagePointer``s to (N, C, H, W) in the storage type. x is the convolution's
  output, y and skip the results for the next layer and for the skip connection, d... their gradients.
* parameters: ``Parameters``, the layer's (C,) float32 weight, bias and running statistics.
* saved: ``Saved``, the (groups, C) statistics that forward writes and backward reads.
* partials: ``Workspace``, what the first of two launches leaves for the second.
* splits, dy_splits, dskip_splits: ``Splits``, an image as the partial sums of a convolution that has split
  its own sum.
* dweight, dbias: pointers to (C,), or None where they are not wanted.
* dropout: ``Dropout``, the state of its random numbers.
* pixels: rows of one group. chunk_pixels: rows of one program where partials are made. apply_pixels: rows of
  one program of the ``apply`` kernels; the last program of a launch that also has results for the parameters
  has no rows, only these.
* groups, channels: how many there are.

Compile-time constants:

* CONSTANTS: the layer's ``Constants``.
* TILE: the ``tiles.Tile`` of rows and columns that a program holds in registers at a time.
* SPLITS, DSKIP_SPLITS: how many partial sums ``splits`` or ``dy_splits``, and ``dskip_splits`` have, 0 for
  none.
* CHUNKS: a power of two, at least the number of chunks (``tiles.reduction_chunks``): the ``apply`` kernels
  load the partials of all chunks at once.
* DTYPE: the type that is computed in.

None and the constants are known when a kernel is compiled, so unused branches are eliminated.
"""

from typing import Any, NamedTuple

from fastpix2pix.kernels.language import ImagePointer, tl, triton


class Parameters(NamedTuple):
    """Pointers to (channels,), None for parameters that the layer does not have."""

    weight: Any
    bias: Any
    running_mean: Any = None
    running_var: Any = None


class Saved(NamedTuple):
    """Pointers to (groups, channels), the statistics saved for backward; None without norm."""

    mean: Any
    rstd: Any


class Dropout(NamedTuple):
    """rng: pointer to the int64 pair (seed, step). layer: the layer's number in the dropout's counter."""

    rng: Any
    layer: Any


class Workspace(NamedTuple):
    """pointer: to (2, groups, chunks, channels) in the type that is computed in, or None. groups, chunks: its
    sizes.
    """

    pointer: Any
    groups: Any
    chunks: Any


class Splits(NamedTuple):
    """pointer: to (count, pixels of all groups, channels) in float32, or None: partial sums of an image.
    pixels: of all groups. stride: elements from one pixel to the next, of partial sums of a wider image.
    """

    pointer: Any
    pixels: Any
    stride: Any


class Columns(NamedTuple):
    """channel: indices of a program's channels, (TILE.channels,). channels: how many the image has."""

    channel: Any
    channels: Any


class Norm(NamedTuple):
    """How a tile is normalised: (TILE.channels,) each, None for a step that the layer does not have."""

    mean: Any
    rstd: Any
    weight: Any
    bias: Any


class Constants(NamedTuple):
    """A ``NormActConfig`` as compile-time constants; without ``layer``, which would make a variant of each.

    threshold: random words below it drop their value; 0 for no dropout. keep_scale: factor of the values that
    are kept. dtype: Triton's type that is computed in.
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
    """Pointers to a tile's values, with 64-bit offsets for batches of more than 2**31 values."""
    return image.pointer + pixel.to(tl.int64)[:, None] * image.stride + columns.channel[None, :]


@triton.jit
def _load_stored(image, pixel, last, columns):
    """A tile's values as they are stored; 0 outside the image."""
    return tl.load(_pointers(image, pixel, columns), mask=_inside(pixel, last, columns), other=0.0)


@triton.jit
def _load_tile(image, pixel, last, columns, DTYPE: tl.constexpr):
    """A tile's values in the compute type."""
    return _load_stored(image, pixel, last, columns).to(DTYPE)


@triton.jit
def _store_tile(image, value, pixel, last, columns):
    if image.pointer is not None:
        tl.store(_pointers(image, pixel, columns), value, mask=_inside(pixel, last, columns))


@triton.jit
def _load_splits(splits, image, pixel, last, columns, SPLITS: tl.constexpr):
    """A tile of the image that ``splits`` are the partial sums of, in order, rounded to the image's type."""
    numbers = ImagePointer(splits.pointer, splits.stride)
    total = _load_tile(numbers, pixel, last, columns, tl.float32)
    for split in tl.static_range(1, SPLITS):
        total += _load_tile(
            numbers, split * splits.pixels + pixel, split * splits.pixels + last, columns, tl.float32
        )
    return total.to(image.pointer.dtype.element_ty)


@triton.jit
def _load_row(pointer, row, columns, DTYPE: tl.constexpr):
    """Row ``row`` of a (rows, channels) matrix, 0 beyond the last channel; None where there is no matrix."""
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
    """The ``which``-th partials (0 or 1) of all chunks of a group: (CHUNKS, TILE.channels)."""
    first = (which * partials.groups + group) * partials.chunks
    numbers = ImagePointer(partials.pointer, columns.channels)
    return _load_tile(numbers, first + tl.arange(0, CHUNKS), first + partials.chunks, columns, DTYPE)


@triton.jit
def _store_chunk(partials, which, value, group, chunk, columns):
    _store_row(partials.pointer, value, (which * partials.groups + group) * partials.chunks + chunk, columns)


@triton.jit
def _combine(count, mean, m2):
    """Mean and summed squared deviation per channel from those of the rows (Chan et al., 1979).

    count: (rows,), the number of values behind each row. The mean is taken twice, the second time of the
    first one's residuals: their sum is small, so a large mean does not cost the digits of the variance.
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
    loaded = _load_stored(x, first + row, last, columns)
    for start in range(first, last, TILE.pixels):
        pixel = start + row
        ahead = _load_stored(x, pixel + TILE.pixels, last, columns)
        value = loaded.to(DTYPE)
        delta = tl.where(_inside(pixel, last, columns), value - mean, 0.0)
        seen = (start - first) // TILE.pixels + 1
        mean += delta * (1.0 / seen.to(DTYPE))
        m2 += delta * (value - mean)
        loaded = ahead
    count = ((last - first - row + TILE.pixels - 1) // TILE.pixels).to(DTYPE)
    return _combine(count, mean, m2)


@triton.jit
def _group_statistics(value, inside, pixels, DTYPE: tl.constexpr):
    """Mean and summed squared deviation per channel of a tile that holds a group, and 0 around it.

    The corrected two-pass algorithm (Chan, Golub & LeVeque, 1983): the sum of the deviations is what the
    mean's rounding left over.
    """
    count = pixels.to(DTYPE)
    mean = tl.sum(value, 0) / count
    deviation = tl.where(inside, value - mean[None, :], 0.0)
    rest = tl.sum(deviation, 0) / count
    m2 = tl.sum(deviation * deviation, 0) - rest * rest * count
    return mean + rest, tl.maximum(m2, 0.0)


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
def _before_activation(x, norm):
    """A tile normalised, and that times weight plus bias."""
    if norm.mean is not None:
        x = (x - norm.mean[None, :]) * norm.rstd[None, :]
    if norm.weight is not None:
        return x, tl.fma(x, norm.weight[None, :], norm.bias[None, :])
    elif norm.bias is not None:
        return x, x + norm.bias[None, :]
    else:
        return x, x


@triton.jit
def _activate(value, z, SLOPE: tl.constexpr):
    """``value``, times SLOPE where z <= 0: the activation if ``value`` is z, its gradient if it is dy."""
    if SLOPE == 1.0:
        return value
    else:
        return tl.where(z > 0, value, value * SLOPE)


@triton.jit
def _drop(value, pixel, columns, dropout, CONSTANTS: tl.constexpr):
    """``value`` times ``reference.dropout_mask``, forward and backward alike."""
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
def _store_results(y, skip, z, pixel, last, columns, dropout, CONSTANTS: tl.constexpr):
    """Both results of a tile, from its values before dropout."""
    z = _drop(z, pixel, columns, dropout, CONSTANTS)
    _store_tile(y, _activate(z, z, CONSTANTS.slope), pixel, last, columns)
    if skip.pointer is not None:
        _store_tile(skip, _activate(z, z, CONSTANTS.skip_slope), pixel, last, columns)


@triton.jit
def _forward_pass(
    x, loaded, y, skip, first, last, columns, norm, dropout, CONSTANTS: tl.constexpr, TILE: tl.constexpr
):
    """Write the results of the pixels first .. last - 1. ``loaded``: the first tile of x, as stored."""
    for start in range(first, last, TILE.pixels):
        pixel = start + tl.arange(0, TILE.pixels)
        ahead = _load_stored(x, pixel + TILE.pixels, last, columns)
        _, z = _before_activation(loaded.to(CONSTANTS.dtype), norm)
        _store_results(y, skip, z, pixel, last, columns, dropout, CONSTANTS)
        loaded = ahead


@triton.jit
def _load_three(x, dy, dskip, pixel, last, columns):
    """Tiles of the images that backward reads, as they are stored; that of x in place of one there is not."""
    value = _load_stored(x, pixel, last, columns)
    by_y, by_skip = value, value
    if dy.pointer is not None:
        by_y = _load_stored(dy, pixel, last, columns)
    if dskip.pointer is not None:
        by_skip = _load_stored(dskip, pixel, last, columns)
    return value, by_y, by_skip


@triton.jit
def _gradient_before_activation(
    by_y,
    by_skip,
    HAS_Y: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    z,
    pixel,
    columns,
    dropout,
    CONSTANTS: tl.constexpr,
):
    """dz: gradient before activation and dropout, from the tiles of those of the two results."""
    dz = tl.zeros_like(z)
    if HAS_Y:
        dz += _activate(by_y.to(CONSTANTS.dtype), z, CONSTANTS.slope)
    if HAS_SKIP:
        dz += _activate(by_skip.to(CONSTANTS.dtype), z, CONSTANTS.skip_slope)
    return _drop(dz, pixel, columns, dropout, CONSTANTS)


@triton.jit
def _gradient_of_x(dz, normalised, norm, means):
    """dx, through the statistics too if there are ``means``: the group's, of dz and of dz * normalised."""
    if means is not None:
        dz = dz - means[0][None, :] - normalised * means[1][None, :]
    if norm.weight is not None:
        dz *= norm.weight[None, :]
    if norm.rstd is not None:
        dz *= norm.rstd[None, :]
    return dz


@triton.jit
def _backward_pass(
    x,
    dy,
    dskip,
    loaded,
    dx,
    first,
    last,
    columns,
    norm,
    means,
    dropout,
    CONSTANTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One pass over the pixels first .. last - 1. ``loaded``: the first tiles, from ``_load_three``.

    Returns the sums per channel of dz and of dz times the normalised values. Writes dx, if there is such an
    image; ``means`` as in ``_gradient_of_x``, None where the layer takes no statistics.
    """
    dz_sum = _zeros(TILE.pixels, TILE.channels, CONSTANTS.dtype)
    dz_normalised_sum = _zeros(TILE.pixels, TILE.channels, CONSTANTS.dtype)
    value, by_y, by_skip = loaded
    for start in range(first, last, TILE.pixels):
        pixel = start + tl.arange(0, TILE.pixels)
        ahead = _load_three(x, dy, dskip, pixel + TILE.pixels, last, columns)
        normalised, z = _before_activation(value.to(CONSTANTS.dtype), norm)
        dz = _gradient_before_activation(
            by_y,
            by_skip,
            dy.pointer is not None,
            dskip.pointer is not None,
            z,
            pixel,
            columns,
            dropout,
            CONSTANTS,
        )
        dz_sum += dz
        dz_normalised_sum += dz * normalised
        if dx.pointer is not None:
            _store_tile(dx, _gradient_of_x(dz, normalised, norm, means), pixel, last, columns)
        value, by_y, by_skip = ahead
    return tl.sum(dz_sum, 0), tl.sum(dz_normalised_sum, 0)


@triton.jit
def _combined_sums(partials, group, columns, DTYPE: tl.constexpr, CHUNKS: tl.constexpr):
    """The sums of ``_backward_pass`` for a whole group, from those of its chunks."""
    return (
        tl.sum(_load_chunks(partials, 0, group, columns, DTYPE, CHUNKS), 0),
        tl.sum(_load_chunks(partials, 1, group, columns, DTYPE, CHUNKS), 0),
    )


@triton.jit
def _is_parameters_program(chunk, group):
    """Whether this program of an ``apply`` kernel has the parameters' results to write, and no pixels."""
    return (chunk == tl.num_programs(0) - 1) & (group == 0)


# Integers that no address depends on: to specialise on them (1, multiples of 16) would only compile more
# variants.
_GENERAL = ("pixels", "groups", "chunk_pixels", "apply_pixels")


@triton.jit(do_not_specialize=_GENERAL)
def norm_act_forward_whole(
    x,
    splits,
    y,
    skip,
    parameters,
    saved,
    dropout,
    groups,
    pixels,
    channels,
    CONSTANTS: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Forward in one launch: statistics and results of a block of channels, group after group.

    Reads x and parameters; writes y, skip, saved and the running statistics. With splits x is not read but
    written, from those. Without saved there is no norm.
    """
    DTYPE: tl.constexpr = CONSTANTS.dtype
    columns = _columns(channels, TILE)
    running_mean = _load_row(parameters.running_mean, 0, columns, DTYPE)
    running_var = _load_row(parameters.running_var, 0, columns, DTYPE)
    weight = _load_row(parameters.weight, 0, columns, DTYPE)
    bias = _load_row(parameters.bias, 0, columns, DTYPE)
    for group in range(groups):
        pixel = group * pixels + tl.arange(0, TILE.pixels)
        last = (group + 1) * pixels
        if SPLITS:
            stored = _load_splits(splits, x, pixel, last, columns, SPLITS)
            _store_tile(x, stored, pixel, last, columns)
            value = stored.to(DTYPE)
        else:
            value = _load_tile(x, pixel, last, columns, DTYPE)
        if saved.mean is not None:
            mean, m2 = _group_statistics(value, _inside(pixel, last, columns), pixels, DTYPE)
            norm = Norm(mean, tl.rsqrt(m2 / pixels.to(DTYPE) + CONSTANTS.eps), weight, bias)
        else:
            norm = Norm(None, None, weight, bias)
        # Before the results, so that the sums are no longer held: some layers would spill on sm_100.
        _store_row(saved.mean, norm.mean, group, columns)
        _store_row(saved.rstd, norm.rstd, group, columns)
        if parameters.running_mean is not None:
            running_mean, running_var = _updated(running_mean, running_var, mean, m2, pixels, CONSTANTS)
        _, z = _before_activation(value, norm)
        _store_results(y, skip, z, pixel, last, columns, dropout, CONSTANTS)
    _store_row(parameters.running_mean, running_mean, 0, columns)
    _store_row(parameters.running_var, running_var, 0, columns)


@triton.jit(do_not_specialize=_GENERAL)
def norm_act_statistics(x, partials, pixels, chunk_pixels, channels, DTYPE: tl.constexpr, TILE: tl.constexpr):
    """Forward, first of two launches: mean and summed squared deviation of a chunk, per channel.

    Reads x, writes partials.
    """
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
    """Forward, second of two launches, or the only one of a layer that computes no statistics.

    Normalises with the statistics in the partials; without partials, with the running statistics; without
    those too, not at all. Reads x, partials and parameters; writes y and skip. The first program of each
    group also writes saved, the very first updates the running statistics.
    """
    DTYPE: tl.constexpr = CONSTANTS.dtype
    columns = _columns(channels, TILE)
    chunk, group = tl.program_id(0), tl.program_id(2)
    first = group * pixels + chunk * apply_pixels
    last = tl.minimum(first + apply_pixels, (group + 1) * pixels)
    loaded = _load_stored(x, first + tl.arange(0, TILE.pixels), last, columns)
    weight = _load_row(parameters.weight, 0, columns, DTYPE)
    bias = _load_row(parameters.bias, 0, columns, DTYPE)
    if partials.pointer is not None:
        mean, m2 = _combined_statistics(partials, group, pixels, chunk_pixels, columns, DTYPE, CHUNKS)
        norm = Norm(mean, tl.rsqrt(m2 / pixels.to(DTYPE) + CONSTANTS.eps), weight, bias)
    elif parameters.running_mean is not None:
        mean = _load_row(parameters.running_mean, 0, columns, DTYPE)
        var = _load_row(parameters.running_var, 0, columns, DTYPE)
        norm = Norm(mean, tl.rsqrt(var + CONSTANTS.eps), weight, bias)
    else:
        norm = Norm(None, None, weight, bias)

    if saved.mean is not None and chunk == 0:
        _store_row(saved.mean, norm.mean, group, columns)
        _store_row(saved.rstd, norm.rstd, group, columns)
    _forward_pass(x, loaded, y, skip, first, last, columns, norm, dropout, CONSTANTS, TILE)

    if partials.pointer is not None and parameters.running_mean is not None:  # noqa: SIM102 (compile time)
        if _is_parameters_program(chunk, group):
            # Loaded by the one program that stores them: another might see them before or after the update.
            running_mean = _load_row(parameters.running_mean, 0, columns, DTYPE)
            running_var = _load_row(parameters.running_var, 0, columns, DTYPE)
            for each in range(partials.groups):
                mean, m2 = _combined_statistics(partials, each, pixels, chunk_pixels, columns, DTYPE, CHUNKS)
                running_mean, running_var = _updated(running_mean, running_var, mean, m2, pixels, CONSTANTS)
            _store_row(parameters.running_mean, running_mean, 0, columns)
            _store_row(parameters.running_var, running_var, 0, columns)


@triton.jit(do_not_specialize=_GENERAL)
def norm_act_backward_whole(
    x,
    dy,
    dy_splits,
    dskip,
    dskip_splits,
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
    SPLITS: tl.constexpr,
    DSKIP_SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Backward in one launch: gradients of a block of channels, group after group.

    Reads x, dy and dskip or their splits, parameters and saved; writes dx, dweight and dbias. Without saved
    there is no norm.
    """
    DTYPE: tl.constexpr = CONSTANTS.dtype
    columns = _columns(channels, TILE)
    weight = _load_row(parameters.weight, 0, columns, DTYPE)
    bias = _load_row(parameters.bias, 0, columns, DTYPE)
    dweight_sum = tl.zeros_like(columns.channel).to(DTYPE)
    dbias_sum = tl.zeros_like(columns.channel).to(DTYPE)
    for group in range(groups):
        pixel = group * pixels + tl.arange(0, TILE.pixels)
        last = (group + 1) * pixels
        value, by_y, by_skip = _load_three(x, dy, dskip, pixel, last, columns)
        if SPLITS:
            by_y = _load_splits(dy_splits, x, pixel, last, columns, SPLITS)
        if DSKIP_SPLITS:
            by_skip = _load_splits(dskip_splits, x, pixel, last, columns, DSKIP_SPLITS)
        mean, rstd = (
            _load_row(saved.mean, group, columns, DTYPE),
            _load_row(saved.rstd, group, columns, DTYPE),
        )
        norm = Norm(mean, rstd, weight, bias)
        normalised, z = _before_activation(value.to(DTYPE), norm)
        dz = _gradient_before_activation(
            by_y,
            by_skip,
            SPLITS > 0 or dy.pointer is not None,
            DSKIP_SPLITS > 0 or dskip.pointer is not None,
            z,
            pixel,
            columns,
            dropout,
            CONSTANTS,
        )
        dz_sum, dz_normalised_sum = tl.sum(dz, 0), tl.sum(dz * normalised, 0)
        if saved.mean is not None:
            means = (dz_sum / pixels.to(DTYPE), dz_normalised_sum / pixels.to(DTYPE))
        else:
            means = None
        _store_tile(dx, _gradient_of_x(dz, normalised, norm, means), pixel, last, columns)
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
    """Backward, first of two launches: sums per channel of a chunk, of dz and of dz * normalised x.

    Reads x, dy, dskip, parameters and saved; writes partials. The dx of a layer that computes no statistics
    depends on no sums: it is written here, and there are no partials unless weight or bias need a gradient.
    """
    columns = _columns(channels, TILE)
    chunk, group = tl.program_id(0), tl.program_id(2)
    first = group * pixels + chunk * chunk_pixels
    last = group * pixels + tl.minimum((chunk + 1) * chunk_pixels, pixels)
    loaded = _load_three(x, dy, dskip, first + tl.arange(0, TILE.pixels), last, columns)
    norm = Norm(
        _load_row(saved.mean, group, columns, CONSTANTS.dtype),
        _load_row(saved.rstd, group, columns, CONSTANTS.dtype),
        _load_row(parameters.weight, 0, columns, CONSTANTS.dtype),
        _load_row(parameters.bias, 0, columns, CONSTANTS.dtype),
    )
    dz_sum, dz_normalised_sum = _backward_pass(
        x, dy, dskip, loaded, dx, first, last, columns, norm, None, dropout, CONSTANTS, TILE
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
    """Backward, second of two launches: dx of ``apply_pixels`` pixels, from the sums in the partials.

    Reads x, dy, dskip, parameters, saved and partials; writes dx. The program without pixels writes
    dweight and dbias.
    """
    DTYPE: tl.constexpr = CONSTANTS.dtype
    columns = _columns(channels, TILE)
    chunk, group = tl.program_id(0), tl.program_id(2)
    first = group * pixels + chunk * apply_pixels
    last = tl.minimum(first + apply_pixels, (group + 1) * pixels)
    loaded = _load_three(x, dy, dskip, first + tl.arange(0, TILE.pixels), last, columns)
    norm = Norm(
        _load_row(saved.mean, group, columns, DTYPE),
        _load_row(saved.rstd, group, columns, DTYPE),
        _load_row(parameters.weight, 0, columns, DTYPE),
        _load_row(parameters.bias, 0, columns, DTYPE),
    )
    dz_sum, dz_normalised_sum = _combined_sums(partials, group, columns, DTYPE, CHUNKS)
    means = (dz_sum / pixels.to(DTYPE), dz_normalised_sum / pixels.to(DTYPE))
    _backward_pass(x, dy, dskip, loaded, dx, first, last, columns, norm, means, dropout, CONSTANTS, TILE)
    if dweight is not None:  # noqa: SIM102 (compile time)
        if _is_parameters_program(chunk, group):
            dweight_sum = tl.zeros_like(columns.channel).to(DTYPE)
            dbias_sum = tl.zeros_like(columns.channel).to(DTYPE)
            for each in range(partials.groups):
                dz_sum, dz_normalised_sum = _combined_sums(partials, each, columns, DTYPE, CHUNKS)
                dweight_sum += dz_normalised_sum
                dbias_sum += dz_sum
            _store_row(dweight, dweight_sum, 0, columns)
            _store_row(dbias, dbias_sum, 0, columns)
