"""Triton kernels of the deep layers' convolutions: thin matrix products that read a weight once.

The weight (Cs, Cb, 4, 4) lies channels-last: row ``s`` of a (Cs, 16 Cb) matrix has the kernel's taps, and
each tap its Cb channels side by side. Pixel ``(n, y, x)`` of the small image meets pixel ``(n, 2 y + i - 1,
2 x + j - 1)`` of the big one in tap ``(i, j)``. A sum over taps and channels is cut into blocks of TILE.depth
channels of one tap, and the blocks are shared by the programs along the grid's last axis: each leaves a
partial sum, and the next launch adds them up, always in the same order.

Arguments:

* small, big: ``ImagePointer``s to (N, Cs, h, w) and (N, Cb, 2 h, 2 w) in the storage type.
* weight, dweight: pointers to the channels-last weight and its gradient, of the same type.
* out: ``ImagePointer`` to the result: the image itself, or, where the sum is split, (splits, pixels of the
  image, its channels) in float32.
* partials: pointer to such partial sums.
* pixels: of the small image, the whole batch together. height, width: of the small image.
* small_channels, big_channels: Cs and Cb; Cb is a multiple of 16, so that weights move in full vectors.
* total: values of an image.

Compile-time constants:

* TAPS: (rows, columns) of taps that meet more than padding: a side of one pixel meets only the middle ones.
* TILE: the ``deep_conv.ProductTile`` of a program: channels of its tile (of the weight) by pixels, or, of the
  weight gradient, the small image's channels by the big image's; and the depth of a block of the sum.
* MATH: ``Math``, how the products are computed.
* SPLITS: how many partial sums there are. BLOCK: values of one program (``deep_conv.ADD_BLOCK``).
"""

from typing import Any, NamedTuple

from fastpix2pix.kernels.language import tl, triton


class Math(NamedTuple):
    """operand: Triton's type of the factors; the interpreter multiplies bfloat16's bits as if they were
    integers, so there it is float32. precision: of float32 factors, "tf32" or "ieee".
    """

    operand: Any
    precision: str


class Place(NamedTuple):
    """Where pixels of the small image are: image of the batch, row, column; and which are there at all."""

    image: Any
    row: Any
    column: Any
    inside: Any


# Integers that no address depends on: to specialise on them (1, multiples of 16) would only compile more
# variants.
_GENERAL = ("pixels", "height", "width", "total")


@triton.jit
def _place(pixel, pixels, height, width):
    return Place(pixel // (height * width), pixel // width % height, pixel % width, pixel < pixels)


@triton.jit
def _met(place, height, width):
    """Index of the big image's pixel that ``place`` meets in tap (1, 1), which is never padding."""
    return (place.image * (2 * height) + 2 * place.row) * (2 * width) + 2 * place.column


@triton.jit
def _meets(place, height, width, i, j):
    """Whether ``place`` meets more than padding in tap (i, j)."""
    row, column = 2 * place.row + (i - 1), 2 * place.column + (j - 1)
    return place.inside & (row >= 0) & (row < 2 * height) & (column >= 0) & (column < 2 * width)


@triton.jit
def _share(blocks):
    """This program's part of ``blocks``, first and past the last; programs of axis 2 share them."""
    each = tl.cdiv(blocks, tl.num_programs(2))
    first = tl.program_id(2) * each
    return first, tl.minimum(first + each, blocks)


@triton.jit
def _dot(a, b, accumulator, MATH: tl.constexpr):
    return tl.dot(a.to(MATH.operand), b.to(MATH.operand), accumulator, input_precision=MATH.precision)


@triton.jit(do_not_specialize=_GENERAL)
def deep_conv_to_small(
    big,
    weight,
    out,
    pixels,
    height,
    width,
    small_channels,
    big_channels,
    TAPS: tl.constexpr,
    TILE: tl.constexpr,
    MATH: tl.constexpr,
):
    """``small = big * weight``. Program (i, j, k): pixels of tile i, channels of tile j, share k of the sum.

    The weight's channels are the rows of the product and the pixels its columns.
    """
    pixel = tl.program_id(0) * TILE.pixels + tl.arange(0, TILE.pixels)
    channel = tl.program_id(1) * TILE.channels + tl.arange(0, TILE.channels)
    depth = tl.arange(0, TILE.depth)
    place = _place(pixel, pixels, height, width)
    of_weight = channel[:, None] * (16 * big_channels) + depth[None, :]
    of_image = _met(place, height, width)[None, :] * big.stride + depth[:, None]
    of_a_tap = tl.cdiv(big_channels, TILE.depth)
    sums = tl.zeros((TILE.channels, TILE.pixels), tl.float32)
    first, last = _share(TAPS[0] * TAPS[1] * of_a_tap)
    for block in range(first, last):
        tap, start = block // of_a_tap, block % of_a_tap * TILE.depth
        i, j = tap // TAPS[1] + (4 - TAPS[0]) // 2, tap % TAPS[1] + (4 - TAPS[1]) // 2
        left = big_channels - start
        a = tl.load(
            weight + ((4 * i + j) * big_channels + start) + of_weight,
            mask=(channel < small_channels)[:, None] & (depth < left)[None, :],
            other=0.0,
        )
        b = tl.load(
            big.pointer + (((i - 1) * (2 * width) + (j - 1)) * big.stride + start) + of_image,
            mask=_meets(place, height, width, i, j)[None, :] & (depth < left)[:, None],
            other=0.0,
        )
        sums = _dot(a, b, sums, MATH)
    row = tl.program_id(2) * pixels + pixel
    tl.store(
        out.pointer + row[None, :] * out.stride + channel[:, None],
        sums.to(out.pointer.dtype.element_ty),
        mask=place.inside[None, :] & (channel < small_channels)[:, None],
    )


@triton.jit(do_not_specialize=_GENERAL)
def deep_conv_to_big(
    small,
    weight,
    out,
    pixels,
    height,
    width,
    small_channels,
    big_channels,
    TAPS: tl.constexpr,
    TILE: tl.constexpr,
    MATH: tl.constexpr,
):
    """``big = small * weight``, by the four stride phases: pixels of the big image with even and odd rows and
    columns. Each tap belongs to one phase, so each is read once.

    Program (i, j, k): pixels of tile i, counted in the small image; channels of tile j // 4 of the phase
    j % 4; share k of the sum.
    """
    pixel = tl.program_id(0) * TILE.pixels + tl.arange(0, TILE.pixels)
    channel = tl.program_id(1) // 4 * TILE.channels + tl.arange(0, TILE.channels)
    odd_row, odd_column = tl.program_id(1) // 2 % 2, tl.program_id(1) % 2
    depth = tl.arange(0, TILE.depth)
    place = _place(pixel, pixels, height, width)
    of_weight = depth[None, :] * (16 * big_channels) + channel[:, None]
    of_image = pixel[None, :] * small.stride + depth[:, None]
    of_a_tap = tl.cdiv(small_channels, TILE.depth)
    sums = tl.zeros((TILE.channels, TILE.pixels), tl.float32)
    first, last = _share(TAPS[0] * TAPS[1] // 4 * of_a_tap)
    for block in range(first, last):
        tap, start = block // of_a_tap, block % of_a_tap * TILE.depth
        # An even row 2 y is met by row y in tap 1 and by row y - 1 in tap 3, an odd one 2 y + 1 by row y in
        # tap 2 and by row y + 1 in tap 0.
        further_row, further_column = tap // (TAPS[1] // 2), tap % (TAPS[1] // 2)
        i, down = 1 + odd_row + 2 * further_row * (1 - 2 * odd_row), further_row * (2 * odd_row - 1)
        j, right = (
            1 + odd_column + 2 * further_column * (1 - 2 * odd_column),
            further_column * (2 * odd_column - 1),
        )
        row, column = place.row + down, place.column + right
        inside = place.inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        left = small_channels - start
        a = tl.load(
            weight + ((4 * i + j + 16 * start) * big_channels) + of_weight,
            mask=(channel < big_channels)[:, None] & (depth < left)[None, :],
            other=0.0,
        )
        b = tl.load(
            small.pointer + ((down * width + right) * small.stride + start) + of_image,
            mask=inside[None, :] & (depth < left)[:, None],
            other=0.0,
        )
        sums = _dot(a, b, sums, MATH)
    there = _met(place, height, width) + odd_row * (2 * width) + odd_column
    row = tl.program_id(2) * (4 * pixels) + there
    tl.store(
        out.pointer + row[None, :] * out.stride + channel[:, None],
        sums.to(out.pointer.dtype.element_ty),
        mask=place.inside[None, :] & (channel < big_channels)[:, None],
    )


@triton.jit(do_not_specialize=_GENERAL)
def deep_conv_to_weight(
    small,
    big,
    dweight,
    pixels,
    height,
    width,
    small_channels,
    big_channels,
    TILE: tl.constexpr,
    MATH: tl.constexpr,
):
    """The weight gradient, summed over the pixels. Program (i, j, k): tile i of the big image's channels, tap
    j, tile k of the small image's channels.
    """
    column = tl.program_id(0) * TILE.pixels + tl.arange(0, TILE.pixels)
    channel = tl.program_id(2) * TILE.channels + tl.arange(0, TILE.channels)
    i, j = tl.program_id(1) // 4, tl.program_id(1) % 4
    shift = (i - 1) * (2 * width) + (j - 1)
    sums = tl.zeros((TILE.channels, TILE.pixels), tl.float32)
    for start in range(0, pixels, TILE.depth):
        pixel = start + tl.arange(0, TILE.depth)
        place = _place(pixel, pixels, height, width)
        a = tl.load(
            small.pointer + pixel[None, :] * small.stride + channel[:, None],
            mask=place.inside[None, :] & (channel < small_channels)[:, None],
            other=0.0,
        )
        b = tl.load(
            big.pointer + (_met(place, height, width) + shift)[:, None] * big.stride + column[None, :],
            mask=_meets(place, height, width, i, j)[:, None] & (column < big_channels)[None, :],
            other=0.0,
        )
        sums = _dot(a, b, sums, MATH)
    tl.store(
        dweight
        + channel[:, None] * (16 * big_channels)
        + (tl.program_id(1) * big_channels + column)[None, :],
        sums.to(dweight.dtype.element_ty),
        mask=(channel < small_channels)[:, None] & (column < big_channels)[None, :],
    )


@triton.jit(do_not_specialize=_GENERAL)
def deep_conv_add(partials, out, total, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """``out``, an image without gaps: the partial sums, added up in their order and rounded once."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    value = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        value += tl.load(partials + split * total + at, mask=inside, other=0.0)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)
